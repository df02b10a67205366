"""Every datatype there and back, and what is refused before it is sent."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mlmesh_client.errors import InvalidInput, ServerError
from mlmesh_client.messages import Model, arrays_of, request_of
from mlmesh_client.tensors import DTYPES, TensorSpec, convert, outputs, raw
from open_inference import grpc_service_pb2 as pb


def spec(datatype: str, *shape: int) -> TensorSpec:
    return TensorSpec(name="x", datatype=datatype, shape=shape or (-1, 2))


def echoed(array: Any, datatype: str) -> Any:
    """What a server that gives back what it got would answer."""
    response = pb.ModelInferResponse()
    response.outputs.add(name="x", datatype=datatype, shape=array.shape)
    response.raw_output_contents.append(raw(array, datatype))
    return outputs(response)["x"]


@pytest.mark.parametrize("datatype", DTYPES)
def test_numbers_go_there_and_back(datatype: str) -> None:
    array = np.array([[0, 1], [1, 0], [1, 1]], DTYPES[datatype])
    back = echoed(convert(array, spec(datatype)), datatype)
    assert back.dtype == DTYPES[datatype]
    np.testing.assert_array_equal(back, array)


def test_lists_become_what_the_model_takes() -> None:
    for datatype in ("FP32", "FP64", "FP16", "INT8", "UINT64"):
        assert convert([[1, 2]], spec(datatype)).dtype == DTYPES[datatype]
    assert convert([[1.5, 2]], spec("FP32")).tolist() == [[1.5, 2.0]]
    assert convert(np.float64([[1.5, 2]]), spec("FP32")).dtype == np.float32
    assert convert([[True, False]], spec("BOOL")).dtype == np.bool_
    assert convert(np.zeros((0, 2)), spec("INT32")).shape == (0, 2)


@pytest.mark.parametrize(
    ("value", "datatype", "text"),
    [
        ([[1.5, 2]], "INT64", "takes INT64, got float64"),
        ([[300, 0]], "INT8", "out of its range"),
        ([[-1, 0]], "UINT8", "out of its range"),
        ([[1e300, 0]], "FP32", "out of its range"),
        ([["a", "b"]], "FP32", "takes FP32, got <U1"),
        ([[1, 2]], "BYTES", "takes BYTES, got int"),
        ([[1, 2], [3]], "FP32", "is no tensor"),
        ([1, 2], "FP32", r"takes shape \[-1,2\], got \[2\]; the first dimension is the batch: give x\[None\]"),
        ([[1, 2, 3]], "FP32", r"takes shape \[-1,2\], got \[1,3\]$"),
        ([[1, 2]], "FP8", "unknown datatype FP8"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_text_that_says_why(value: Any, datatype: str, text: str) -> None:
    with pytest.raises(InvalidInput, match=text) as caught:
        convert(value, spec(datatype))
    assert caught.value.field.startswith("inputs[x]")


def test_strings_of_any_kind_are_bytes() -> None:
    given = [["é", b"\0\xff"], ["", "plain"]]
    expected = [["é".encode(), b"\0\xff"], [b"", b"plain"]]
    assert convert(given, spec("BYTES")).tolist() == expected
    assert echoed(convert(given, spec("BYTES")), "BYTES").tolist() == expected
    assert convert(np.array([["a", "b"]]), spec("BYTES")).tolist() == [[b"a", b"b"]]
    assert convert(np.array([[b"a", b"b"]]), spec("BYTES")).tolist() == [[b"a", b"b"]]
    assert convert("one", TensorSpec(name="x", datatype="BYTES", shape=())).item() == b"one"


def test_bf16_is_rounded_as_ml_dtypes_does() -> None:
    values = np.array([[0.0, -0.0], [1.0, 1.00390625], [3.14159, -2.5e38], [np.inf, -np.inf]], np.float32)
    values = np.concatenate([values, np.random.default_rng(1).standard_normal((500, 2)).astype(np.float32)])
    ours = convert(values, spec("BF16"))
    np.testing.assert_array_equal(ours, values.astype(ml_dtypes.bfloat16).view(np.uint16))
    assert np.isnan(echoed(convert([[np.nan, 1]], spec("BF16")), "BF16").astype(np.float32))[0, 0]
    back = echoed(ours, "BF16")
    assert back.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(convert(back, spec("BF16")), ours)
    np.testing.assert_array_equal(convert(ours, spec("BF16")), ours)


def test_typed_answers_are_read_as_raw_ones() -> None:
    response = pb.ModelInferResponse()
    response.outputs.add(name="n", datatype="INT8", shape=[1, 2]).contents.int_contents.extend([-1, 2])
    response.outputs.add(name="s", datatype="BYTES", shape=[2]).contents.bytes_contents.extend([b"a", b""])
    found = outputs(response)
    assert (found["n"].dtype, found["n"].tolist()) == (np.int8, [[-1, 2]])
    assert found["s"].tolist() == [b"a", b""]


@pytest.mark.parametrize(
    ("datatype", "shape", "content"),
    [("FP32", [2], b"1234"), ("BYTES", [1], b"\xff\0\0\0a"), ("BYTES", [1], b"\1\0"), ("FP8", [1], b"1")],
)
def test_an_answer_that_lies_is_the_servers_fault(datatype: str, shape: list[int], content: bytes) -> None:
    response = pb.ModelInferResponse(raw_output_contents=[content])
    response.outputs.add(name="y", datatype=datatype, shape=shape)
    with pytest.raises(ServerError, match="'y'"):
        outputs(response)


TWO = Model(
    name="m",
    platform="",
    versions=(),
    inputs=(TensorSpec(name="a", datatype="FP32", shape=(-1,)), TensorSpec(name="b", datatype="INT32", shape=(-1,))),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1,)),),
)


def test_names_are_checked_before_anything_is_sent() -> None:
    with pytest.raises(InvalidInput, match="has no input 'c'"):
        arrays_of(TWO, {"a": [1], "c": [1]})
    with pytest.raises(InvalidInput, match="give them by name"):
        arrays_of(TWO, [1.0])
    with pytest.raises(InvalidInput, match="has no output 'z'; it has"):
        request_of(TWO, {"a": [1]}, wanted=["z"])
    with pytest.raises(InvalidInput, match="parameter 'p' is list"):
        request_of(TWO, {"a": [1]}, parameters={"p": [1]})  # type: ignore[dict-item]


def test_a_request_carries_what_was_asked_for() -> None:
    request = request_of(
        TWO, {"b": [1], "a": [2]}, parameters={"t": True, "i": 1, "u": 1 << 63, "f": 0.5, "s": "x"}, priority=2
    )
    assert [tensor.name for tensor in request.inputs] == ["a", "b"]
    found = {name: value.WhichOneof("parameter_choice") for name, value in request.parameters.items()}
    assert found == {
        "t": "bool_param",
        "i": "int64_param",
        "u": "uint64_param",
        "f": "double_param",
        "s": "string_param",
        "priority": "uint64_param",
    }


def test_a_server_that_describes_nothing_gets_arrays_as_they_are() -> None:
    unknown = Model(name="m", platform="", versions=(), inputs=(), outputs=())
    given = {
        "f": np.ones((1, 2), np.float32),
        "i": np.ones(3, np.int8),
        "s": np.array(["a"]),
        "b": np.ones(2, ml_dtypes.bfloat16),
    }
    request = request_of(unknown, given, wanted=["whatever"])
    assert [(t.name, t.datatype, list(t.shape)) for t in request.inputs] == [
        ("f", "FP32", [1, 2]),
        ("i", "INT8", [3]),
        ("s", "BYTES", [1]),
        ("b", "BF16", [2]),
    ]
    for wrong in ({"x": [1.0]}, np.ones(2)):
        with pytest.raises(InvalidInput, match="give numpy arrays, by name"):
            request_of(unknown, wrong)
    with pytest.raises(InvalidInput, match="complex128, which has no datatype"):
        request_of(unknown, {"x": np.ones(1, np.complex128)})
