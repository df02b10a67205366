"""Whether an engine answers as another: how far two answers are apart, and how far they may be.

A difference of numbers is taken relative to the largest magnitude that the reference gives in that output, so that a
tolerance means the same for logits and for probabilities. For integers, booleans and bytes it is the share of elements
that are not the same.

The tolerances are the unit roundoff u = 2^-p of a precision (p bits of significand: 24 in FP32, 11 in FP16, as IEEE 754
has them, 8 in bfloat16) times an allowance for how roundings add up. They grow with the square root of their number
(Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41, 2019): in FP32
over sums of some ten thousand terms in tens of layers, 2048 u; in the others, which add up in FP32 and round once a
layer, 8 u for some 64 layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np

from mlmesh_inference.tensors import Array, TensorSpec, show

TOLERANCES: Final[Mapping[str, float]] = MappingProxyType(
    {
        "fp64": 2048 * 2.0**-24,
        "fp32": 2048 * 2.0**-24,
        "tf32": 8 * 2.0**-11,
        "fp16": 8 * 2.0**-11,
        "bf16": 8 * 2.0**-8,
    }
)
TOLERANCE_QUANTISED: Final = 8 * 2.0**-7
"""For what has no precision of its own above: as if numbers had eight bits."""


def tolerance(precision: str) -> float:
    """Largest relative difference allowed when nobody declared another."""
    return TOLERANCES.get(precision, TOLERANCE_QUANTISED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of the worst output: largest difference, absolute and relative to the reference's largest magnitude."""

    absolute: float = 0.0
    relative: float = 0.0
    output: str = ""

    def worse(self, other: Difference) -> Difference:
        """The one that is further off."""
        return other if other.relative > self.relative else self


def difference(specs: Sequence[TensorSpec], expected: Sequence[Array], found: Sequence[Array]) -> Difference:
    """How far two answers to one request are apart. Another shape, or NaN where there is none, is infinitely far."""
    worst = Difference()
    for spec, one, other in zip(specs, expected, found, strict=True):
        worst = worst.worse(_of_output(spec, one, other))
    return worst


def _of_output(spec: TensorSpec, expected: Array, found: Array) -> Difference:
    if expected.shape != found.shape:
        return Difference(absolute=np.inf, relative=np.inf, output=f"{spec.name} is {show(found.shape)}")
    if expected.size == 0:
        return Difference(output=spec.name)
    if spec.datatype.name == "BF16":
        expected, found = _widened(expected), _widened(found)
    if expected.dtype.kind != "f":
        share = float(np.mean(expected != found))
        return Difference(absolute=share, relative=share, output=spec.name)
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], found[~finite], equal_nan=True) or not np.isfinite(found[finite]).all():
        return Difference(absolute=np.inf, relative=np.inf, output=spec.name)
    if not finite.any():
        return Difference(output=spec.name)
    absolute = float(np.abs(expected[finite] - found[finite]).max())
    scale = float(np.abs(expected[finite]).max())
    return Difference(absolute=absolute, relative=absolute / scale if scale else absolute, output=spec.name)


def _widened(array: Array) -> Array:
    return (array.astype(np.uint32) << 16).view(np.float32)
