"""The space that a study searches: dimensions as asked, axes as resolved against a recipe, and the points of a grid.

Pure. A discrete axis (values, or a range with a step) is searched by the index of its points in ascending order, so
that a sampler sees their order and no float is rounded twice.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mlmesh_runtime.errors import FieldViolation, InvalidInput

_SIGNIFICANT_DIGITS = 12
# A last step that misses the end of its range by less than this share of a step is meant to hit it.
_SLACK = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """One hyperparameter that is searched, as it was asked."""

    name: str
    low: float | None = None
    high: float | None = None
    step: float = 0.0
    log: bool = False
    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One hyperparameter that is searched, resolved. With `values` these; else low to high, by `step` where it is set.

    `integer`: only whole numbers. `log`: on a logarithmic scale; never with step or values.
    """

    name: str
    low: float
    high: float
    integer: bool = False
    log: bool = False
    step: float = 0.0
    values: tuple[float, ...] = ()

    @property
    def count(self) -> int | None:
        """Points of a discrete axis, None for a continuous one or a plain range of whole numbers."""
        if self.values:
            return len(self.values)
        return math.floor((self.high - self.low) / self.step + _SLACK) + 1 if self.step else None

    def at(self, index: int) -> float:
        """The value of a discrete axis at an index from 0 to count - 1."""
        if self.values:
            return self.values[index]
        value = float(f"{self.low + index * self.step:.{_SIGNIFICANT_DIGITS}g}")
        return min(max(value, self.low), self.high)

    def index(self, value: float) -> int:
        """The index of a value that `at` gave."""
        return self.values.index(value) if self.values else round((value - self.low) / self.step)


class Bounds(Protocol):
    """What the space must know of a recipe's hyperparameter."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def low(self) -> float:
        """Least value."""
        ...

    @property
    def high(self) -> float:
        """Greatest value."""
        ...

    @property
    def integer(self) -> bool:
        """Whether only whole numbers make sense."""
        ...


def resolve(dimensions: Sequence[Dimension], known: Mapping[str, Bounds], *, grid: bool) -> tuple[Axis, ...]:
    """The axes of a search over a recipe's hyperparameters, which are given by name.

    Errors: InvalidInput that names every field at fault, such as "spec.dimensions[1].step".
    """
    wrong: list[FieldViolation] = []
    axes = []
    for number, dimension in enumerate(dimensions):
        complaints = list(_complaints(dimension, known, grid=grid))
        if any(earlier.name == dimension.name for earlier in dimensions[:number]):
            complaints.append(("name", f"{dimension.name!r} is searched twice"))
        wrong += [
            FieldViolation(field=f"spec.dimensions[{number}].{field}", description=text) for field, text in complaints
        ]
        if not complaints:
            axes.append(_axis(dimension, known[dimension.name]))
    if wrong:
        text = "; ".join(f"{violation.field}: {violation.description}" for violation in wrong)
        raise InvalidInput(text, field=wrong[0].field, violations=wrong)
    return tuple(axes)


def grid_points(axes: Sequence[Axis]) -> int:
    """Points of the grid that the axes span. Every axis must be discrete."""
    return math.prod(axis.count or 0 for axis in axes)


def grid_order(axes: Sequence[Axis], *, seed: int, among: int) -> Sequence[int]:
    """Indices of grid points, one for each of `among` trials: none twice, in an order drawn from the seed."""
    # A sample of a range holds only what it draws, however large the grid is.
    return random.Random(seed).sample(range(min(grid_points(axes), 2**63 - 1)), among)  # noqa: S311  not secrets


def grid_point(axes: Sequence[Axis], index: int) -> dict[str, float]:
    """The point of a grid with this index, from 0 to grid_points - 1."""
    point = {}
    for axis in axes:
        index, position = divmod(index, axis.count or 1)
        point[axis.name] = axis.at(position)
    return point


def corners(axes: Sequence[Axis]) -> tuple[dict[str, float], dict[str, float]]:
    """The least and the greatest value of every axis: what is allowed at both ends is taken to be between them."""
    ends = [(axis.name, (axis.values or (axis.low, axis.high))) for axis in axes]
    return {name: values[0] for name, values in ends}, {name: values[-1] for name, values in ends}


def _axis(dimension: Dimension, bounds: Bounds) -> Axis:
    values = tuple(sorted(dimension.values))
    low = bounds.low if dimension.low is None else dimension.low
    high = bounds.high if dimension.high is None else dimension.high
    if values:
        low, high = values[0], values[-1]
    return Axis(
        name=dimension.name,
        low=low,
        high=high,
        integer=bounds.integer,
        log=dimension.log,
        step=dimension.step,
        values=values,
    )


def _complaints(dimension: Dimension, known: Mapping[str, Bounds], *, grid: bool) -> list[tuple[str, str]]:
    """What is wrong with a dimension: field and text."""
    bounds = known.get(dimension.name)
    if bounds is None:
        return [("name", f"the recipe has no hyperparameter {dimension.name!r}; it has {', '.join(known)}")]
    return _values_complaints(dimension, bounds) if dimension.values else _range_complaints(dimension, bounds, grid)


def _values_complaints(dimension: Dimension, bounds: Bounds) -> list[tuple[str, str]]:
    found = [
        (field, "is for a range, and values are given instead of one")
        for field, given in (
            ("min_value", dimension.low is not None),
            ("max_value", dimension.high is not None),
            ("step", bool(dimension.step)),
            ("log_scale", dimension.log),
        )
        if given
    ]
    if len(set(dimension.values)) != len(dimension.values):
        found.append(("values", "a value is given twice"))
    for position, value in enumerate(dimension.values):
        if text := _outside(value, bounds):
            found.append((f"values[{position}]", text))
    return found


def _range_complaints(dimension: Dimension, bounds: Bounds, grid: bool) -> list[tuple[str, str]]:
    if (dimension.low is None) != (dimension.high is None):
        missing = "min_value" if dimension.low is None else "max_value"
        return [(missing, "min_value and max_value go together; without both the recipe's bounds are searched")]
    low = bounds.low if dimension.low is None else dimension.low
    high = bounds.high if dimension.high is None else dimension.high
    found = []
    for field, value in (("min_value", low), ("max_value", high)):
        if text := _outside(value, bounds):
            found.append((field, text))
    if low > high:
        found.append(("min_value", f"must not be above max_value, got {low:g} and {high:g}"))
    if dimension.log and dimension.step:
        found.append(("log_scale", "goes with no step"))
    if dimension.log and low <= 0:
        found.append(("log_scale", f"needs a min_value above 0, got {low:g}"))
    if bounds.integer and dimension.step != int(dimension.step):
        found.append(("step", f"must be a whole number, got {dimension.step:g}"))
    if grid and not dimension.step:
        found.append(("step", "a grid needs a step or values"))
    return found


def _outside(value: float, bounds: Bounds) -> str:
    if not math.isfinite(value):
        return f"must be a finite number, got {value}"
    if not bounds.low <= value <= bounds.high:
        return f"must be from {bounds.low:g} to {bounds.high:g}, got {value:g}"
    if bounds.integer and value != int(value):
        return f"must be a whole number, got {value:g}"
    return ""
