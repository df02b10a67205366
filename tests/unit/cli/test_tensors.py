from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlmesh_cli import tensors
from mlmesh_cli.errors import CliError, ExitCode
from open_inference import grpc_service_pb2 as oip

_NUMPY = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}


def _echo(request: oip.ModelInferRequest) -> oip.ModelInferResponse:
    response = oip.ModelInferResponse(raw_output_contents=request.raw_input_contents)
    for tensor in request.inputs:
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    return response


@given(st.data())
def test_what_is_sent_is_what_comes_back(data: st.DataObject) -> None:
    datatype = data.draw(st.sampled_from(sorted(_NUMPY)))
    shape = data.draw(hnp.array_shapes(max_dims=4, max_side=5, min_side=0))
    array = data.draw(hnp.arrays(_NUMPY[datatype], shape))
    back = tensors.outputs(_echo(tensors.infer_request("m", [("x", datatype, array)])))["x"]
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@given(st.lists(st.binary(max_size=20), max_size=5))
def test_bytes_of_any_content_survive(elements: list[bytes]) -> None:
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    back = tensors.outputs(_echo(tensors.infer_request("m", [("x", "BYTES", array)])))["x"]
    assert list(back) == elements


def test_typed_contents_are_read_as_well() -> None:
    response = oip.ModelInferResponse()
    output = response.outputs.add(name="y", datatype="INT32", shape=[2, 2])
    output.contents.int_contents.extend([1, 2, 3, 4])
    assert tensors.outputs(response)["y"].tolist() == [[1, 2], [3, 4]]


def test_a_type_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(CliError, match="BF16") as refused:
        tensors.infer_request("m", [("x", "BF16", np.zeros(1))])
    assert refused.value.exit_code == ExitCode.USAGE


def _file(tmp_path: Path, value: Any) -> Path:
    path = tmp_path / "input.json"
    path.write_text(json.dumps(value))
    return path


def test_files_of_every_form(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(4, dtype=np.float32))
    wanted = [("x", "FP32")]
    assert tensors.read_file(tmp_path / "a.npy", wanted)[0][2].tolist() == [0, 1, 2, 3]
    assert tensors.read_file(_file(tmp_path, [[1, 2]]), wanted)[0][2].shape == (1, 2)
    assert tensors.read_file(_file(tmp_path, {"x": [1]}), wanted)[0][:2] == ("x", "FP32")
    rest = {"inputs": [{"name": "z", "datatype": "INT8", "shape": [2, 1], "data": [1, 2]}]}
    name, datatype, array = tensors.read_file(_file(tmp_path, rest), wanted)[0]
    assert (name, datatype, array.shape) == ("z", "INT8", (2, 1))


@pytest.mark.parametrize(
    ("value", "wanted", "problem"),
    [
        ({"y": [1]}, [("x", "FP32")], "has input 'y'"),
        ([1], [("x", "FP32"), ("z", "FP32")], "holds one tensor, the model takes 2"),
        ([[1, 2], [3]], [("x", "FP32")], "is not a tensor"),
        ({"inputs": [{"name": "x"}]}, [("x", "FP32")], "not of the form"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, value: Any, wanted: Any, problem: str) -> None:
    with pytest.raises(CliError, match=problem):
        tensors.read_file(_file(tmp_path, value), wanted)


def test_a_pickled_array_is_not_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CliError, match="neither"):
        tensors.read_file(tmp_path / "evil.npy", [("x", "FP32")])


def test_a_row_is_fitted_to_the_model() -> None:
    assert tensors.fit(np.zeros(784), [-1, 1, 28, 28], "x").shape == (1, 1, 28, 28)
    assert tensors.fit(np.zeros((2, 784)), [-1, 1, 28, 28], "x").shape == (2, 1, 28, 28)
    assert tensors.fit(np.zeros((1, 9)), [-1, -1], "x").shape == (1, 9)
    with pytest.raises(CliError, match=r"shape \[5\], the model takes \[-1, 1, 28, 28\]"):
        tensors.fit(np.zeros(5), [-1, 1, 28, 28], "x")
