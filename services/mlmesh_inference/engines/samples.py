"""Requests to try an engine with: every size of batch that it will meet, with values that the model can take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from mlmesh_inference.engines.graph import Graph
from mlmesh_inference.tensors import Array, Signature, TensorSpec, object_array

LENGTHS: Final = (32, 128)
"""Sizes given to dimensions that are free beside the batch, when the model does not name its own."""
LENGTHS_OTHERWISE: Final = (64, 224, 8, 1)
"""Tried one after the other for a model that takes neither."""
LENGTHS_MAX: Final = 8
_SEED: Final = 2026


def buckets(rows_max: int, rows_preferred: int, *, batches: bool) -> tuple[int, ...]:
    """Batch sizes to try: the powers of two, the usual one and the largest; 1 for a model that does not batch."""
    if not batches:
        return (1,)
    powers = {1 << power for power in range(rows_max.bit_length()) if 1 << power <= rows_max}
    return tuple(sorted(powers | {rows_preferred, rows_max}))


def parse_lengths(text: str) -> tuple[int, ...]:
    """Read the parameter `mlmesh.lengths`, "32,128". Raises ValueError."""
    lengths = tuple(int(part) for part in text.split(",") if part.strip())
    if len(lengths) > LENGTHS_MAX or any(not 0 < length <= 1 << 16 for length in lengths):
        raise ValueError(f"expected at most {LENGTHS_MAX} sizes from 1 to 65536, got {text[:64]!r}")
    return lengths


def has_free_dimensions(signature: Signature, *, batches: bool) -> bool:
    """Whether an input has a dimension of any size beside the batch."""
    return any(-1 in spec.shape[1 if batches else 0 :] for spec in signature.inputs)


class Samples:
    """Makes requests, the same ones in every process.

    Floats are of the standard normal distribution.
    Integers that are indexes stay within their table; others, such as masks, are 0 and 1 and begin with 1.

    Args:
        signature: as it is served. graph: where tables are found. batches: whether the first dimension is the batch's.
    """

    def __init__(self, signature: Signature, graph: Graph, *, batches: bool) -> None:
        self._signature = signature
        self._bounds: Mapping[str, int] = graph.index_bounds()
        self._batches = batches

    def make(self, rows: int, length: int) -> dict[str, Array]:
        """A request of so many rows, with free dimensions of that length."""
        random = np.random.default_rng([_SEED, rows, length])
        return {spec.name: self._filled(spec, rows, length, random) for spec in self._signature.inputs}

    def _filled(self, spec: TensorSpec, rows: int, length: int, random: np.random.Generator) -> Array:
        shape = tuple(
            (rows if place == 0 and self._batches else length) if dim == -1 else dim
            for place, dim in enumerate(spec.shape)
        )
        dtype = spec.datatype.dtype
        if spec.datatype.itemsize == 0:
            return object_array([b"text"] * int(np.prod(shape)), shape)
        if spec.datatype.name == "BF16":
            return (random.standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        if dtype.kind == "f":
            return random.standard_normal(shape, np.float32).astype(dtype)
        if spec.name in self._bounds:
            return random.integers(0, self._bounds[spec.name], shape).astype(dtype)
        array: Array = random.integers(0, 2, shape).astype(dtype)
        if array.ndim:
            array[..., :1] = 1
        return array
