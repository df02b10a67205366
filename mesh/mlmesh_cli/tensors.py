"""Tensors of the Open Inference Protocol from and to numpy, and from files."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlmesh_cli.errors import CliError, usage_error
from open_inference import grpc_service_pb2 as oip

_NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
Array = NDArray[Any]


def as_datatype(array: Array, datatype: str) -> Array:
    """The array in the numpy type of a protocol datatype. Raises CliError for one that the command cannot send."""
    if datatype == "BYTES":
        return array.astype(object)
    if datatype not in _NUMPY:
        raise usage_error(f"the model wants {datatype}, which this command cannot send", "use a client of your own")
    return np.ascontiguousarray(array, dtype=_NUMPY[datatype])


def _raw(array: Array) -> bytes:
    if array.dtype != object:
        return array.tobytes()
    parts = []
    for element in array.ravel():
        data = element if isinstance(element, bytes) else str(element).encode()
        parts.append(struct.pack("<I", len(data)) + data)
    return b"".join(parts)


def infer_request(
    model: str, inputs: Sequence[tuple[str, str, Array]], *, version: str = "", request_id: str = ""
) -> oip.ModelInferRequest:
    """A request with raw contents.

    Args:
        model: name of the model.
        inputs: name, datatype and array of each input; arrays are converted to the datatype.
        version: empty leaves the choice to the server.
        request_id: comes back in the answer.
    """
    request = oip.ModelInferRequest(model_name=model, model_version=version, id=request_id)
    for name, datatype, array in inputs:
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(_raw(as_datatype(array, datatype)))
    return request


def outputs(response: oip.ModelInferResponse) -> dict[str, Array]:
    """The tensors of an answer by name, raw or typed contents alike. BYTES become object arrays of bytes."""
    result: dict[str, Array] = {}
    for index, tensor in enumerate(response.outputs):
        shape = tuple(tensor.shape)
        if index < len(response.raw_output_contents):
            result[tensor.name] = _from_raw(response.raw_output_contents[index], tensor.datatype).reshape(shape)
            continue
        field = _CONTENTS.get(tensor.datatype)
        if field is None:
            raise CliError(f"the answer's tensor {tensor.name!r} is {tensor.datatype}, which is unreadable here")
        values = list(getattr(tensor.contents, field))
        kind = object if tensor.datatype == "BYTES" else _NUMPY[tensor.datatype]
        result[tensor.name] = np.array(values, dtype=kind).reshape(shape)
    return result


def _from_raw(data: bytes, datatype: str) -> Array:
    if datatype != "BYTES":
        if datatype not in _NUMPY:
            raise CliError(f"the answer has a tensor of type {datatype}, which is unreadable here")
        return np.frombuffer(data, dtype=_NUMPY[datatype])
    elements, position = [], 0
    while position < len(data):
        (length,) = struct.unpack_from("<I", data, position)
        elements.append(data[position + 4 : position + 4 + length])
        position += 4 + length
    return np.array(elements, dtype=object)


def read_file(path: Path, wanted: Sequence[tuple[str, str]]) -> list[tuple[str, str, Array]]:
    """Inputs from a file: .npy (one input), or JSON.

    JSON is nested lists for a model of one input, {"input name": nested lists}, or the REST form of the protocol
    ({"inputs": [{"name", "shape", "datatype", "data"}]}).

    Args:
        path: the file.
        wanted: name and datatype of the model's inputs.

    Raises:
        CliError: the file is unreadable or its inputs are not the model's.
    """
    try:
        if path.suffix == ".npy":
            return _for_only_input(np.load(path, allow_pickle=False), wanted, path)
        value = json.loads(path.read_text())
    except ValueError as error:
        raise CliError(
            f"{path} is neither .npy nor JSON: {error}", "save it with numpy.save or as nested lists"
        ) from None
    if not isinstance(value, Mapping):
        return _for_only_input(_array(value, path), wanted, path)
    if isinstance(value.get("inputs"), list):
        return [_rest_input(item, path) for item in value["inputs"]]
    datatypes = dict(wanted)
    unknown = [name for name in value if name not in datatypes]
    if unknown:
        raise CliError(f"{path} has input {unknown[0]!r}", f"the model's inputs are {', '.join(datatypes)}")
    return [(name, datatypes[name], _array(data, path)) for name, data in value.items()]


def _rest_input(item: Any, path: Path) -> tuple[str, str, Array]:
    try:
        return item["name"], item["datatype"], _array(item["data"], path).reshape(item["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise CliError(
            f"{path}: an input is not of the form name, shape, datatype, data: {error}",
            'see the REST form of the Open Inference Protocol: {"inputs": [{"name": …, "shape": …, …}]}',
        ) from None


def _for_only_input(array: Array, wanted: Sequence[tuple[str, str]], path: Path) -> list[tuple[str, str, Array]]:
    if len(wanted) != 1:
        names = ", ".join(name for name, _ in wanted)
        raise CliError(f"{path} holds one tensor, the model takes {len(wanted)}", f"name them in JSON: {names}")
    return [(wanted[0][0], wanted[0][1], array)]


def _array(value: Any, path: Path) -> Array:
    try:
        return np.array(value)
    except ValueError as error:
        raise CliError(f"{path} is not a tensor: {error}", "every row must be of the same length") from None


def fit(array: Array, shape: Sequence[int], name: str) -> Array:
    """The array with the batch dimension that the model wants added where it lacks, and flattened or unflattened to
    the model's other dimensions where the count of elements allows it. Raises CliError when it does not fit."""
    row = [int(d) for d in shape[1:]]
    size = int(np.prod([d for d in row if d > 0], dtype=np.int64)) if row else 1
    if array.ndim == len(shape):
        return array
    if any(d < 0 for d in row) or array.size % size or not array.size:
        raise CliError(
            f"input {name!r} is of shape {list(array.shape)}, the model takes {list(shape)}",
            "-1 stands for any number; the first dimension is the batch",
        )
    return array.reshape([-1, *row])
