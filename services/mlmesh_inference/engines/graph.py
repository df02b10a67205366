"""What a .onnx file says of itself, read without loading it: operators, weights by type and shape, names of dimensions.

Only the outline is read, through a memory map: the bytes of weights are passed over, so a file of gigabytes costs what
its graph costs. The field numbers are those of onnx.proto (ONNX IR). Whatever is not well-formed is an EngineError.
"""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.onnx_wire import (
    BITS,
    ELEMENTS_MAX,
    NODES_MAX,
    RANK_MAX,
    Span,
    fields,
    read_number,
    read_numbers,
    read_text,
)
from mlmesh_inference.tensors import Array, Signature

# TensorProto.DataType: the precision that computing with it has.
_PRECISIONS: Final = {
    1: "fp32", 2: "int8", 3: "int8", 10: "fp16", 11: "fp64", 16: "bf16",
    17: "fp8", 18: "fp8", 19: "fp8", 20: "fp8", 21: "int4", 22: "int4", 23: "fp4",
}  # fmt: skip
_FLOATS: Final = frozenset({1, 10, 11, 16})
# Operators through which an index keeps its value.
_CARRIES: Final = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Slice"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """An operator with the names of what goes in and comes out; "" is an input left out."""

    operator: str
    domain: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A constant. `kind` is TensorProto.DataType, `external` the file that holds its bytes, "" for this one."""

    kind: int
    dims: tuple[int, ...]
    external: str = ""

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.dims)

    @property
    def size(self) -> int:
        """Bytes in memory; strings count as nothing."""
        return (self.elements * BITS.get(self.kind, 0) + 7) // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """The outline. `inputs` are the dimensions of each input: a number, a name, or "" when the file says neither."""

    nodes: tuple[Node, ...]
    weights: Mapping[str, Weight]
    inputs: Mapping[str, tuple[int | str, ...]]
    opsets: Mapping[str, int] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        """Of all weights."""
        return sum(weight.size for weight in self.weights.values())

    @property
    def precision(self) -> str:
        """Of the weights that most of the arithmetic is done with, "" when it has none that tell."""
        elements: Counter[str] = Counter()
        for weight in self.weights.values():
            if weight.kind in _PRECISIONS:
                elements[_PRECISIONS[weight.kind]] += weight.elements
        return elements.most_common(1)[0][0] if elements else ""

    @property
    def floats(self) -> bool:
        """Whether all its weights are FP32, so that a lower precision is a choice and not the file's."""
        kinds = {weight.kind for weight in self.weights.values() if weight.kind in _FLOATS or weight.kind in (2, 3)}
        return kinds <= {1}

    def index_bounds(self) -> dict[str, int]:
        """Inputs that are indexes into a table of weights, with the table's rows: what may go in is below that."""
        carriers = {name: {name} for name in self.inputs}
        bounds: dict[str, int] = {}
        for node in self.nodes:
            first = node.inputs[0] if node.inputs else ""
            if node.operator in _CARRIES and first in carriers:
                for output in node.outputs:
                    carriers[output] = carriers[first]
            elif node.operator == "Gather" and len(node.inputs) == 2 and node.inputs[1] in carriers:
                table = self.weights.get(first)
                if table is not None and table.dims:
                    for name in carriers[node.inputs[1]]:
                        bounds[name] = min(table.dims[0], bounds.get(name, table.dims[0]))
        return bounds


def read_graph(path: Path) -> Graph:
    """Read the outline of a file. Raises EngineError when it is no well-formed model, OSError when it is not there."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise EngineError("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            try:
                return _model(memory)
            except (IndexError, UnicodeDecodeError, ValueError) as error:
                raise EngineError(f"it is no well-formed ONNX model: {error}") from error


def _model(memory: mmap.mmap) -> Graph:
    graph: Span | None = None
    opsets: dict[str, int] = {}
    for number, value in fields(memory, (0, len(memory))):
        if number == 7 and isinstance(value, tuple):
            graph = value
        elif number == 8 and isinstance(value, tuple):
            said = dict(fields(memory, value))
            opsets[read_text(memory, said.get(1))] = read_number(said.get(2))
    if graph is None:
        raise ValueError("there is no graph in it")
    nodes: list[Node] = []
    weights: dict[str, Weight] = {}
    inputs: dict[str, tuple[int | str, ...]] = {}
    for number, value in fields(memory, graph):
        if not isinstance(value, tuple):
            continue
        if number == 1:
            nodes.append(_node(memory, value))
            if len(nodes) > NODES_MAX:
                raise ValueError(f"more than {NODES_MAX} nodes")
        elif number == 5:
            name, weight = _weight(memory, value)
            weights[name] = weight
        elif number == 11:
            name, dims = _value_info(memory, value)
            inputs[name] = dims
    # Files of old have an input for every weight.
    inputs = {name: dims for name, dims in inputs.items() if name not in weights}
    return Graph(nodes=tuple(nodes), weights=weights, inputs=inputs, opsets=opsets)


def _node(memory: mmap.mmap, span: Span) -> Node:
    inputs: list[str] = []
    outputs: list[str] = []
    operator = domain = ""
    for number, value in fields(memory, span):
        if number == 1:
            inputs.append(read_text(memory, value))
        elif number == 2:
            outputs.append(read_text(memory, value))
        elif number == 4:
            operator = read_text(memory, value)
        elif number == 7:
            domain = read_text(memory, value)
    return Node(operator=operator, domain=domain, inputs=tuple(inputs), outputs=tuple(outputs))


def _weight(memory: mmap.mmap, span: Span) -> tuple[str, Weight]:
    dims: list[int] = []
    kind, name, external = 0, "", ""
    for number, value in fields(memory, span):
        if number == 1:
            dims += read_numbers(memory, value)
        elif number == 2:
            kind = read_number(value)
        elif number == 8:
            name = read_text(memory, value)
        elif number == 13 and isinstance(value, tuple):
            entry = dict(fields(memory, value))
            if read_text(memory, entry.get(1)) == "location":
                external = read_text(memory, entry.get(2))
    if len(dims) > RANK_MAX or min(dims, default=0) < 0 or math.prod(dims) > ELEMENTS_MAX:
        raise ValueError(f"weight '{name[:64]}' has an impossible shape")
    return name, Weight(kind=kind, dims=tuple(dims), external=external)


def _value_info(memory: mmap.mmap, span: Span) -> tuple[str, tuple[int | str, ...]]:
    said = dict(fields(memory, span))
    dims: list[int | str] = []
    for number, value in fields(memory, _inner(memory, _inner(memory, said.get(2), 1), 2)):
        if number == 1 and isinstance(value, tuple):
            entry = dict(fields(memory, value))
            dims.append(read_number(entry[1]) if 1 in entry else read_text(memory, entry.get(2)))
    return read_text(memory, said.get(1)), tuple(dims)


def _inner(memory: mmap.mmap, value: object, wanted: int) -> Span:
    """The span of the message in field `wanted` of the message `value`; an empty one when there is none."""
    if isinstance(value, tuple):
        for number, inner in fields(memory, value):
            if number == wanted and isinstance(inner, tuple):
                return inner
    return (0, 0)


class IntegerGuard:
    """Holds integers of a request against what a model can take, for engines that do not look themselves.

    An index into a table must be in it (ONNX counts negative ones from the end); any other integer must fit 32 bits.
    """

    def __init__(self, graph: Graph, signature: Signature) -> None:
        bounds = graph.index_bounds()
        self._limits: dict[str, tuple[int, int]] = {}
        for spec in signature.inputs:
            if spec.name in bounds:
                self._limits[spec.name] = (-bounds[spec.name], bounds[spec.name] - 1)
            elif spec.datatype.dtype.kind in "iu" and spec.datatype.itemsize == 8:
                self._limits[spec.name] = (-(1 << 31), (1 << 31) - 1)

    def check(self, inputs: Mapping[str, Array]) -> None:
        """Raises EngineError that names the input."""
        for name, (low, high) in self._limits.items():
            array = inputs.get(name)
            if array is not None and array.size and not (low <= array.min() and array.max() <= high):
                raise EngineError(f"input '{name}' has a value that is not from {low} to {high}")
