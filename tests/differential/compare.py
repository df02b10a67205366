"""Two trees compared, and the differences that are accepted taken out."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MISSING = "(nothing)"
WHOLE = ("order", "network", "filters")
"""Lists that are compared as one: filters in their order."""
DIFFERENCES = Path(__file__).resolve().parents[2] / "mesh" / "mlmesh_local" / "differences.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """One place where the sides differ."""

    path: tuple[str, ...]
    ours: Any
    theirs: Any

    def __str__(self) -> str:
        return f"{' / '.join(self.path)}\n    ours:   {_short(self.ours)}\n    theirs: {_short(self.theirs)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A difference on purpose. ``where`` are patterns of paths, parts apart by " / ", "**" for any number of parts."""

    id: str
    kind: str
    what: str
    why: str
    where: tuple[tuple[str, ...], ...]
    fields: tuple[str, ...] = ()
    refused: bool = False
    by_case: bool = False
    extra: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    ours: Any = field(default=None)
    theirs: Any = field(default=None)

    @property
    def compared(self) -> bool:
        """Whether the table of cases meets it; others show in behaviour only."""
        return bool(self.where) or self.refused or self.by_case

    def covers(self, mismatch: Mismatch) -> bool:
        """Whether a mismatch is this difference."""
        if self.ours is not None and mismatch.ours != self.ours:
            return False
        if (self.extra or self.missing) and not self._is_but_for(mismatch):
            return False
        if self.theirs is not None and mismatch.theirs != self.theirs:
            return False
        return any(_fits(pattern, mismatch.path) for pattern in self.where)

    def _is_but_for(self, mismatch: Mismatch) -> bool:
        """Whether the sides are equal without what only one of them has to have."""
        ours, theirs = mismatch.ours, mismatch.theirs
        if isinstance(ours, list) and isinstance(theirs, list):
            return _less(ours, self.extra) == _less(theirs, self.missing)
        last = mismatch.path[-1].split(" ")[0]
        return (theirs == MISSING and last in self.extra) or (ours == MISSING and last in self.missing)


def accepted(path: Path = DIFFERENCES) -> list[Accepted]:
    """The list of accepted differences."""
    return [
        Accepted(
            id=item["id"],
            kind=item["kind"],
            what=item["what"],
            why=item["why"],
            where=tuple(tuple(part.strip() for part in text.split(" / ")) for text in item.get("where", [])),
            fields=tuple(item.get("fields", [])),
            refused=item.get("refused", False),
            by_case=item.get("by_case", False),
            extra=tuple(item.get("extra", [])),
            missing=tuple(item.get("missing", [])),
            ours=item.get("ours"),
            theirs=item.get("theirs"),
        )
        for item in yaml.safe_load(path.read_text())["differences"]
    ]


def mismatches(ours: Any, theirs: Any, path: tuple[str, ...] = ()) -> Iterator[Mismatch]:
    """Every place where two trees differ, as deep as possible."""
    if ours == theirs:
        return
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            if key not in theirs:
                yield Mismatch(path=(*path, key), ours=ours[key], theirs=MISSING)
            elif key not in ours:
                yield Mismatch(path=(*path, key), ours=MISSING, theirs=theirs[key])
            else:
                yield from mismatches(ours[key], theirs[key], (*path, key))
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs) and path[-1] not in WHOLE:
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from mismatches(one, other, (*path, str(index)))
    else:
        yield Mismatch(path=path, ours=ours, theirs=theirs)


def sort_out(found: Sequence[Mismatch], listed: Sequence[Accepted]) -> tuple[list[Mismatch], dict[str, int]]:
    """Mismatches that nothing covers, and how often each accepted difference was met."""
    left: list[Mismatch] = []
    used: dict[str, int] = {}
    for mismatch in found:
        cover = next((item for item in listed if item.covers(mismatch)), None)
        if cover is None:
            left.append(mismatch)
        else:
            used[cover.id] = used.get(cover.id, 0) + 1
    return left, used


def _less(items: list[Any], names: Sequence[str]) -> list[Any]:
    """A list without items of these names; an item is a name, or has one as its only key."""
    return [item for item in items if (next(iter(item), "") if isinstance(item, dict) else item) not in names]


def _fits(pattern: Sequence[str], path: Sequence[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_fits(pattern[1:], path[start:]) for start in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _fits(pattern[1:], path[1:])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 600 else f"{text[:600]}…"
