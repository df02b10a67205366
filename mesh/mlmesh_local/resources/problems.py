"""What is wrong with a resource, where: `file:line: Kind namespace/name: path: message`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlmesh_runtime.errors import FieldViolation, InvalidInput

PROBLEMS_MAX = 50
"""Most problems told at once; more would not be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class At:
    """A place in a document: its file, line (from 1), resource ("VirtualService mlmesh/inference") and field path."""

    source: str
    line: int
    resource: str = ""
    path: str = ""

    def field(self, name: str, line: int | None = None) -> At:
        """The same place, one field deeper."""
        path = f"{self.path}.{name}" if self.path and not name.startswith("[") else f"{self.path}{name}"
        return At(source=self.source, line=self.line if line is None else line, resource=self.resource, path=path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong, for a person."""

    at: At
    message: str

    def __str__(self) -> str:
        where = f"{self.at.source}:{self.at.line}" if self.at.line else self.at.source
        return ": ".join(part for part in (where, self.at.resource, self.at.path, self.message) if part)


class InvalidResource(InvalidInput):
    """Resources are refused; nothing was changed. ``problems`` tells each place, ``message`` is one a line."""

    default_reason = "INVALID_RESOURCE"

    def __init__(self, problems: Sequence[Problem]) -> None:
        shown = problems[:PROBLEMS_MAX]
        text = "\n".join(str(problem) for problem in shown)
        if len(problems) > len(shown):
            text += f"\nand {len(problems) - len(shown)} more"
        violations = tuple(
            FieldViolation(field=problem.at.path or problem.at.resource or problem.at.source, description=str(problem))
            for problem in shown
        )
        super().__init__(text, violations=violations)
        self.problems = tuple(problems)


class Problems:
    """Collects problems, so that a person sees all of them at once."""

    def __init__(self) -> None:
        self._found: list[Problem] = []

    def add(self, at: At, message: str) -> None:
        """Note a problem."""
        self._found.append(Problem(at=at, message=message))

    def found(self) -> tuple[Problem, ...]:
        """All problems, in the order of their lines."""
        # A field that is read twice is wrong once.
        once = dict.fromkeys(self._found)
        return tuple(sorted(once, key=lambda problem: (problem.at.source, problem.at.line, problem.at.path)))

    def refuse(self) -> None:
        """Raise InvalidResource if there are problems."""
        if self._found:
            raise InvalidResource(self.found())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean "weight"?)`, or empty when nothing is near."""
    candidates = list(known)
    folded = {candidate.lower().replace("_", ""): candidate for candidate in candidates}
    near = folded.get(word.lower().replace("_", "").replace("-", ""))
    if near is None:
        near = next(iter(difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)), None)
    return f' (did you mean "{near}"?)' if near else ""
