"""ONNX files whose tensors lie in files beside them, made one file: the registry stores no bytes without a format."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from mlmesh_cli.errors import CliError

# A protobuf message ends there.
BYTES_MAX = 2**31 - 1


def outside_files(path: Path) -> set[str]:
    """Paths, relative to the file's folder, of the files that hold its tensors. Raises CliError when it is no ONNX."""
    onnx = _onnx()
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise CliError(f"{path.name} is not an ONNX file: {error}", reason="NOT_ONNX") from None
    return {location for tensor in _tensors(model.graph) if (location := _location(tensor))}


def make_whole(path: Path) -> None:
    """Takes the tensors from the files beside it into the file; one without such stays as it is. Raises CliError."""
    onnx = _onnx()
    try:
        model = onnx.load(str(path), load_external_data=False)
        outside = [tensor for tensor in _tensors(model.graph) if _location(tensor)]
        if not outside:
            return
        for tensor in outside:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
        data = model.SerializeToString()
    except Exception as error:
        # Whatever is wrong with a file that came over the network, onnx and protobuf have an error of their own for.
        raise CliError(f"{path.name} cannot be made one file: {error}", reason="NOT_ONNX") from None
    path.write_bytes(data)


def _onnx() -> Any:
    try:
        return import_module("onnx")
    except ImportError:
        raise CliError(
            "reading an ONNX file needs the onnx package", "pip install 'mlmesh[training]'", reason="NOT_INSTALLED"
        ) from None


def _location(tensor: Any) -> str:
    # 1 is TensorProto.EXTERNAL.
    if tensor.data_location != 1:
        return ""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)
            for inner in attribute.graphs:
                yield from _tensors(inner)
