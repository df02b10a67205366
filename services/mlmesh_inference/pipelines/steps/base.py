"""What built-in steps share: the port, their options, and reading the files that a version carries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mlmesh_inference.engines.base import EngineError, EngineFacts
from mlmesh_inference.pipelines.plan import ANY_SHAPE
from mlmesh_inference.tensors import DATATYPES, Array, Signature, TensorSpec

THREADS: Final = 2
"""Requests that a step works on at once."""
FILE_BYTES_MAX: Final = 64 << 20
"""Largest file that a step reads from its version."""


def tensor(name: str, datatype: str, *shape: int, optional: bool = False) -> TensorSpec:
    """A tensor of a step; no shape is any shape."""
    return TensorSpec(name=name, datatype=DATATYPES[datatype], shape=shape or ANY_SHAPE, optional=optional)


class BuiltIn:
    """A step. A subclass sets `signature` and says what `compute` does with one request; see engines.base.Engine."""

    name = "built-in"
    signature: Signature
    concurrency = THREADS
    facts = EngineFacts()

    def compute(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """All outputs. On a thread; raises InvalidInput for what the caller sent, EngineError for what a model did."""
        raise NotImplementedError

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """See Engine.run."""
        found = self.compute(inputs)
        return [found[name] for name in outputs]

    def close(self) -> None:
        """See Engine.close."""


@dataclass(slots=True, kw_only=True)
class Options:
    """What the configuration says of a step: its parameters "mlmesh.NAME.OPTION", read once and all of them.

    Attributes:
        step: the step's name, for texts. values: by option. folder: of the version.
    """

    step: str
    values: dict[str, str]
    folder: Path

    @classmethod
    def of(cls, step: str, parameters: Mapping[str, str], folder: Path) -> Options:
        """Those of a step out of a configuration's parameters."""
        start = f"{step}."
        values = {name[len(start) :]: value for name, value in parameters.items() if name.startswith(start)}
        return cls(step=step, values=values, folder=folder)

    def text(self, name: str, default: str) -> str:
        """A text."""
        return self.values.pop(name, default)

    def choice(self, name: str, default: str, *choices: str) -> str:
        """One of several texts. Raises EngineError for another."""
        value = self.text(name, default)
        if value not in choices:
            raise self._wrong(name, value, f"one of {', '.join(choices)}")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        """ "true" or "false". Raises EngineError for anything else."""
        return self.choice(name, "true" if default else "false", "true", "false") == "true"

    def integer(self, name: str, default: int, *, low: int = 0, high: int = 1 << 20) -> int:
        """A number without a fraction. Raises EngineError for one out of bounds."""
        value = self.text(name, str(default))
        if not (value.isascii() and value.isdigit() and low <= int(value) <= high):
            raise self._wrong(name, value, f"a number from {low} to {high}")
        return int(value)

    def number(self, name: str, default: float, *, low: float, high: float) -> float:
        """A number. Raises EngineError for one out of bounds."""
        return self.numbers(name, (default,), low=low, high=high)[0]

    def numbers(self, name: str, default: Sequence[float], *, low: float, high: float) -> tuple[float, ...]:
        """As many numbers as the default has, with commas; one stands for all. Raises EngineError."""
        value = self.values.pop(name, None)
        if value is None:
            return tuple(default)
        try:
            found = tuple(float(piece) for piece in value.split(","))
        except ValueError:
            found = ()
        if len(found) == 1:
            found *= len(default)
        if len(found) != len(default) or not all(math.isfinite(each) and low <= each <= high for each in found):
            raise self._wrong(name, value, f"{len(default)} numbers from {low:g} to {high:g}, with commas")
        return found

    def file(self, name: str, default: str) -> Path | None:
        """A file of the version; None where the default is not there. Raises EngineError where a named one is not."""
        said = self.values.get(name)
        path = self.folder / self.text(name, default)
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise EngineError(f"step '{self.step}': {name} names a file outside of the version")
        if not path.is_file():
            if said is None:
                return None
            raise EngineError(f"step '{self.step}': the version has no file '{said}'")
        if path.stat().st_size > FILE_BYTES_MAX:
            raise EngineError(f"step '{self.step}': {path.name} has more than {FILE_BYTES_MAX} bytes")
        return path

    def needed(self, name: str, default: str) -> Path:
        """A file of the version that must be there. Raises EngineError."""
        path = self.file(name, default)
        if path is None:
            raise EngineError(f"step '{self.step}': the version has no file '{default}'")
        return path

    def finish(self) -> None:
        """Refuse what nobody asked for. Raises EngineError."""
        if self.values:
            raise EngineError(f"step '{self.step}' has no option '{min(self.values)}'")

    def _wrong(self, name: str, value: str, expected: str) -> EngineError:
        return EngineError(f"parameter {self.step}.{name}: expected {expected}; got {value[:100]!r}")


def imaging() -> Any:
    """Pillow. A step asks for it when it is made, so that a version that needs it fails to load where it is missing."""
    from PIL import Image  # noqa: PLC0415  only versions with images need it

    return Image


def lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file, only line feeds taken away: a line may be a space. Raises EngineError."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise EngineError(f"{path.name} is not UTF-8: {error.reason}") from error
    return text.removesuffix("\n").split("\n")
