"""What is refused of a model file before any library sees it.

A model comes from whoever may publish. Libraries that read it are large and written in C++; some of what they would do
with a bad file is worse than an error. So its outline is walked first, nested graphs included, and refused by name are:

- files that are something else: a pickle, an archive, an executable;
- tensors whose bytes are not what their shape and type say, or whose shape is absurd;
- weights outside of the model's folder: absolute paths, "..", links that lead out, ranges that a file does not have;
- more operators, tensors or levels of nesting, or larger weights together, than are allowed;
- operators of domains that no engine here has.

Field numbers are those of onnx.proto (ONNX IR 13, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
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

DEPTH_MAX: Final = 8
TENSORS_MAX: Final = 200_000
DOMAINS: Final = frozenset(
    {
        "",
        "ai.onnx",
        "ai.onnx.ml",
        "ai.onnx.preview.training",
        "com.microsoft",
        "com.microsoft.nchwc",
        "com.ms.internal.nhwc",
        "pkg.onnxscript.torch_lib",
        "pkg.onnxscript.torch_lib.common",
        "trt.plugins",
    }
)
"""Operators that ONNX Runtime's CPU build, the exporters and TensorRT know."""

_MAGICS: Final = (
    (b"PK\x03\x04", "a zip archive (PyTorch's .pt and .pt2 are such)"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x7fELF", "an executable"),
    (b"\x89HDF", "an HDF5 file"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """What a file that passed holds: operators, tensors, bytes of weights, and the files beside it that it needs."""

    nodes: int
    tensors: int
    weight_bytes: int
    external: frozenset[str]


def inspect(path: Path, *, weight_bytes_max: int, folder: Path | None = None) -> Inspected:
    """Walk a file's outline. Raises EngineError that says what is wrong, for whoever published it.

    Args:
        weight_bytes_max: most bytes of all weights together.
        folder: where weights outside of the file may lie; the file's own when None.
    """
    size = path.stat().st_size
    if size == 0:
        raise EngineError("the file is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        start = bytes(memory[:8])
        for magic, what in _MAGICS:
            if start.startswith(magic):
                raise EngineError(f"it is {what}, not an ONNX model")
        walk = _Walk(memory, folder or path.parent, weight_bytes_max)
        try:
            walk.model()
        except (IndexError, UnicodeDecodeError, ValueError, RecursionError) as error:
            raise EngineError(f"it is no well-formed ONNX model: {error}") from error
        return Inspected(
            nodes=walk.nodes,
            tensors=walk.tensors,
            weight_bytes=walk.weight_bytes,
            external=frozenset(walk.external),
        )


class _Walk:
    def __init__(self, memory: mmap.mmap, folder: Path, weight_bytes_max: int) -> None:
        self._memory = memory
        self._folder = folder
        self._weight_bytes_max = weight_bytes_max
        self.nodes = self.tensors = self.weight_bytes = 0
        self.external: set[str] = set()

    def model(self) -> None:
        """ModelProto: graph 7, functions 25; opsets 8 are checked by the operators that use them."""
        graphs = 0
        for place, value in self._messages((0, len(self._memory))):
            if place == 7:
                graphs += 1
                self._graph(value, 1)
            elif place == 25:
                # FunctionProto: node 7.
                for inner, node in self._messages(value):
                    if inner == 7:
                        self._node(node, 1)
        if graphs != 1:
            raise ValueError(f"{graphs} graphs instead of one")

    def _graph(self, span: Span, depth: int) -> None:
        """GraphProto: node 1, initializer 5, sparse_initializer 15."""
        if depth > DEPTH_MAX:
            raise ValueError(f"graphs nested more than {DEPTH_MAX} deep")
        for place, value in self._messages(span):
            if place == 1:
                self._node(value, depth)
            elif place == 5:
                self._tensor(value)
            elif place == 15:
                self._sparse(value)

    def _node(self, span: Span, depth: int) -> None:
        """NodeProto: op_type 4, attribute 5, domain 7."""
        self.nodes += 1
        if self.nodes > NODES_MAX:
            raise ValueError(f"more than {NODES_MAX} operators")
        for place, value in self._messages(span):
            if place == 5:
                self._attribute(value, depth)
            elif place == 7 and (domain := read_text(self._memory, value)) not in DOMAINS:
                raise EngineError(f"it has an operator of domain '{domain[:64]}', which no engine here knows")

    def _attribute(self, span: Span, depth: int) -> None:
        """AttributeProto: t 5, g 6, tensors 10, graphs 11, sparse_tensor 22, sparse_tensors 23."""
        for place, value in self._messages(span):
            if place in (5, 10):
                self._tensor(value)
            elif place in (6, 11):
                self._graph(value, depth + 1)
            elif place in (22, 23):
                self._sparse(value)

    def _sparse(self, span: Span) -> None:
        """SparseTensorProto: values 1, indices 2, dims 3: as large as it is when it is made dense."""
        dims: list[int] = []
        for place, value in fields(self._memory, span):
            if place == 3:
                dims += read_numbers(self._memory, value)
            elif place in (1, 2) and isinstance(value, tuple):
                self._tensor(value)
        self._count(4 * _elements(dims, "a sparse tensor"))

    def _tensor(self, span: Span) -> None:
        """TensorProto: dims 1, data_type 2, name 8, raw_data 9, external_data 13."""
        self.tensors += 1
        if self.tensors > TENSORS_MAX:
            raise ValueError(f"more than {TENSORS_MAX} tensors")
        dims: list[int] = []
        kind, name, raw, entries = 0, "", -1, {}
        for place, value in fields(self._memory, span):
            if place == 1:
                dims += read_numbers(self._memory, value)
                if len(dims) > RANK_MAX:
                    raise ValueError("a tensor has too many dimensions")
            elif place == 2:
                kind = read_number(value)
            elif place == 8:
                name = read_text(self._memory, value)[:64]
            elif place == 9 and isinstance(value, tuple):
                raw = value[1] - value[0]
            elif place == 13 and isinstance(value, tuple):
                entry = dict(fields(self._memory, value))
                entries[read_text(self._memory, entry.get(1))] = read_text(self._memory, entry.get(2))
        size = (_elements(dims, f"tensor '{name}'") * BITS.get(kind, 0) + 7) // 8
        if entries:
            self._outside(name, entries, size)
        elif raw not in (-1, size):
            raise EngineError(f"tensor '{name}' of shape {dims} has {raw} bytes, {size} were expected")
        self._count(size)

    def _count(self, size: int) -> None:
        self.weight_bytes += size
        if self.weight_bytes > self._weight_bytes_max:
            raise EngineError(f"its weights are more than {self._weight_bytes_max} bytes together")

    def _outside(self, name: str, entries: dict[str, str], size: int) -> None:
        """Weights in a file beside the model: it must be there, be a part of the model, and be large enough."""
        location = entries.get("location", "")
        path = PurePosixPath(location)
        if not location or path.is_absolute() or ".." in path.parts or "\\" in location or "\0" in location:
            raise EngineError(f"tensor '{name}' is in '{location[:128]}', which is not a file of the model's folder")
        file, root = (self._folder / path).resolve(), self._folder.resolve()
        # Versions are laid out with links into the cache: the link's own place counts, not where it leads.
        inside = (self._folder / path).parent.resolve().is_relative_to(root)
        if not inside or not file.is_file():
            raise EngineError(f"tensor '{name}' is in '{location[:128]}', which is not a file of the model")
        offset, length = _whole(entries.get("offset", "0")), _whole(entries.get("length", str(size)))
        if offset < 0 or length != size or offset + length > file.stat().st_size:
            raise EngineError(
                f"tensor '{name}' is said to be {length} bytes at {offset} of '{location[:128]}'; it is not"
            )
        self.external.add(location)

    def _messages(self, span: Span) -> Iterator[tuple[int, Span]]:
        for place, value in fields(self._memory, span):
            if isinstance(value, tuple):
                yield place, value


def _elements(dims: list[int], what: str) -> int:
    if min(dims, default=0) < 0 or len(dims) > RANK_MAX or math.prod(dims) > ELEMENTS_MAX:
        raise EngineError(f"{what} has the impossible shape {dims[:8]}")
    return math.prod(dims)


def _whole(value: str) -> int:
    return int(value) if value.isascii() and value.isdigit() and len(value) < 20 else -1
