"""Optimisation profiles of a TensorRT engine: which shapes each covers, and which one runs a batch. Pure.

One kernel cannot suit one row and a hundred, so the batch dimension is cut into several narrow ranges: one row, 2 to
the usual batch, and what is larger. A free dimension beside the batch, such as a text's length, has no bound that an
ONNX file could tell; its ranges are declared with the model, and every range of it is combined with every other.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.tensors import show

PROFILES_MAX: Final = 16
"""Each takes build time, memory and a share of the plan."""
SIZE_MAX: Final = 1 << 24
"""Largest value of a declared dimension."""

_RANGE: Final = re.compile(
    r"(?P<name>[^=,\s][^=,]*?)\s*=\s*(?P<low>[0-9]{1,8})\.\.(?P<high>[0-9]{1,8})(@(?P<usual>[0-9]{1,8}))?"
)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Sizes of one dimension: least, greatest, and the one that kernels are chosen for."""

    low: int
    usual: int
    high: int

    def __str__(self) -> str:
        return f"{self.low}..{self.high}@{self.usual}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeInput:
    """An input of a network: its shape, -1 for what is free, and what the model calls each dimension ("" if not)."""

    name: str
    shape: Shape
    dimensions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Shapes of one input in one profile."""

    low: Shape
    usual: Shape
    high: Shape

    def holds(self, shape: Sequence[int]) -> bool:
        """Whether the shape is one of the profile's."""
        return len(shape) == len(self.low) and all(
            low <= dim <= high for low, dim, high in zip(self.low, shape, self.high, strict=True)
        )


Profile = Mapping[str, Bounds]
"""Bounds by input, of every input that has a free dimension."""


def parse_dims(text: str) -> dict[str, tuple[Range, ...]]:
    """Read declared ranges: "seq=2..64@32, seq=65..256@128, input_ids[1]=1..8".

    A name is the model's own of a dimension or INPUT[AXIS]; the part behind @ is the usual size, by default the
    greatest. Raises ValueError that names what is wrong.
    """
    result: dict[str, tuple[Range, ...]] = {}
    for part in (piece.strip() for piece in text.split(",")):
        if not part:
            continue
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is not a range of a dimension, such as seq=1..256@64")
        low, high = int(match["low"]), int(match["high"])
        usual = int(match["usual"] or high)
        if not 1 <= low <= usual <= high <= SIZE_MAX:
            raise ValueError(f"{part!r}: expected 1 <= least <= usual <= greatest <= {SIZE_MAX}")
        name = match["name"]
        result[name] = (*result.get(name, ()), Range(low=low, usual=usual, high=high))
    return result


def batch_ranges(preferred: int, most: int) -> tuple[Range, ...]:
    """One row; 2 to the usual batch; more than that."""
    usual = min(preferred, most)
    result = [Range(low=1, usual=1, high=1)]
    if usual > 1:
        result.append(Range(low=2, usual=usual, high=usual))
    if most > usual:
        result.append(Range(low=usual + 1, usual=most, high=most))
    return tuple(result)


def profiles(
    inputs: Sequence[FreeInput], rows: Sequence[Range], declared: Mapping[str, Sequence[Range]]
) -> tuple[Profile, ...]:
    """All profiles of a network; none when nothing is free.

    The first dimension is the batch's where it is free and not declared otherwise. Raises EngineError for a free
    dimension that nobody declared, for a declared one that does not exist, and for more than PROFILES_MAX.
    """
    places = {each.name: _places(each, declared) for each in inputs if -1 in each.shape}
    used = {name for named in places.values() for name in named if name}
    unknown = sorted(set(declared) - used)
    if unknown:
        known = sorted({name for each in inputs for name in each.dimensions if name})
        raise EngineError(f"'{unknown[0]}' is declared, but is no free dimension; the model has {known or 'none'}")
    if not places:
        return ()
    axes: dict[str, Sequence[Range]] = {"": rows} if any("" in named for named in places.values()) else {}
    axes |= {name: declared[name] for name in sorted(used)}
    made = [
        {
            each.name: _bounds(each, places[each.name], dict(zip(axes, chosen, strict=True)))
            for each in inputs
            if -1 in each.shape
        }
        for chosen in itertools.product(*axes.values())
    ]
    if len(made) > PROFILES_MAX:
        raise EngineError(f"{len(made)} profiles are declared, at most {PROFILES_MAX} are built")
    return tuple(made)


def _places(each: FreeInput, declared: Mapping[str, object]) -> list[str | None]:
    """For each dimension: None when it is fixed, "" for the batch, else under which name it is declared."""
    result: list[str | None] = []
    for axis, dim in enumerate(each.shape):
        own = each.dimensions[axis] if axis < len(each.dimensions) else ""
        names = [name for name in (f"{each.name}[{axis}]", own) if name in declared and name]
        if dim != -1:
            result.append(None)
        elif names:
            result.append(names[0])
        elif axis == 0:
            result.append("")
        else:
            raise EngineError(
                f"input '{each.name}' {show(each.shape)} has a free dimension beside the batch, and no optimization "
                f"profile has been declared for it: set mlmesh.dims, such as {own or f'{each.name}[{axis}]'}=1..256@64"
            )
    return result


def _bounds(each: FreeInput, places: Sequence[str | None], chosen: Mapping[str, Range]) -> Bounds:
    ranges = [
        Range(low=dim, usual=dim, high=dim) if place is None else chosen[place]
        for dim, place in zip(each.shape, places, strict=True)
    ]
    return Bounds(
        low=tuple(each.low for each in ranges),
        usual=tuple(each.usual for each in ranges),
        high=tuple(each.high for each in ranges),
    )


def choose(made: Sequence[Profile], shapes: Mapping[str, Sequence[int]]) -> int:
    """Number of the first profile that covers all of these shapes, -1 when none does."""
    for number, profile in enumerate(made):
        if all(bounds.holds(shapes[name]) for name, bounds in profile.items()):
            return number
    return -1


def bucket(rows: int, most: int) -> int:
    """Rows that a batch is padded to: the next power of two, but no more than its profile has."""
    return min(1 << max(rows - 1, 0).bit_length(), most)


def buckets(rows: Sequence[Range]) -> tuple[int, ...]:
    """All sizes that `bucket` gives for these profiles, ascending."""
    return tuple(sorted({bucket(count, each.high) for each in rows for count in _turns(each)}))


def _turns(each: Range) -> list[int]:
    powers = [1 << turn for turn in range(each.high.bit_length())]
    return [each.low, *(power for power in powers if each.low <= power <= each.high), each.high]


def show_profile(profile: Profile) -> str:
    """A profile as a person reads it: "ids [1,2]..[8,256]"."""
    return ", ".join(f"{name} {show(each.low)}..{show(each.high)}" for name, each in profile.items())
