"""Tensors of the Open Inference Protocol from and to numpy, and from files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlmesh_cli.errors import CliError, usage_error
from mlmesh_client.errors import InferenceError
from mlmesh_client.tensors import DTYPES, raw
from mlmesh_client.tensors import outputs as tensors_of
from open_inference import grpc_service_pb2 as oip

Array = NDArray[Any]


def as_datatype(array: Array, datatype: str) -> Array:
    """The array in the numpy type of a protocol datatype. Raises CliError for one that the command cannot send."""
    if datatype == "BYTES":
        encoded = np.empty(array.size, object)
        encoded[:] = [each if isinstance(each, bytes) else str(each).encode() for each in array.ravel()]
        return encoded.reshape(array.shape)
    if datatype not in DTYPES:
        raise usage_error(f"the model wants {datatype}, which this command cannot send", "use a client of your own")
    return np.ascontiguousarray(array, dtype=DTYPES[datatype])


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
        request.raw_input_contents.append(raw(as_datatype(array, datatype), datatype))
    return request


def outputs(response: oip.ModelInferResponse) -> dict[str, Array]:
    """The tensors of an answer by name, raw or typed contents alike. Raises CliError for one that is not in order."""
    try:
        return tensors_of(response)
    except InferenceError as error:
        raise CliError(str(error)) from None


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
