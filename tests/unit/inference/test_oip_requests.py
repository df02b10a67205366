"""The protocol's rules for requests: what is taken, what is refused, in which words."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mlmesh_inference.catalog import ReadyModel
from mlmesh_inference.oip import replies, requests
from mlmesh_inference.tensors import DATATYPES, Signature, TensorSpec
from mlmesh_runtime.errors import InvalidInput, Unsupported
from open_inference import grpc_service_pb2 as pb
from tests.support.inference import GatedEngine, ready_model

Tensor = pb.ModelInferRequest.InferInputTensor
Change = Callable[[pb.ModelInferRequest], object]


class TwoInputs(GatedEngine):
    """INT32 `a` and `b`, [N,2]; gives `sum` (INT32) and `half` (FP16)."""

    def __init__(self) -> None:
        super().__init__(is_open=True)

        def spec(name: str, kind: str) -> TensorSpec:
            return TensorSpec(name=name, datatype=DATATYPES[kind], shape=(-1, 2))

        self.signature = Signature(
            inputs=(spec("a", "INT32"), spec("b", "INT32")), outputs=(spec("sum", "INT32"), spec("half", "FP16"))
        )


@pytest.fixture
async def model() -> ReadyModel:
    return ready_model(TwoInputs(), rows_max=4)


def raw() -> pb.ModelInferRequest:
    data = np.array([[1, 2], [3, 4]], np.int32).tobytes()
    tensors = [Tensor(name=name, datatype="INT32", shape=[2, 2]) for name in "ab"]
    return pb.ModelInferRequest(model_name="m", inputs=tensors, raw_input_contents=[data, data])


def typed() -> pb.ModelInferRequest:
    contents = pb.InferTensorContents(int_contents=[1, 2, 3, 4])
    tensors = [Tensor(name=name, datatype="INT32", shape=[2, 2], contents=contents) for name in "ab"]
    return pb.ModelInferRequest(model_name="m", inputs=tensors)


@pytest.mark.parametrize("make", [raw, typed])
async def test_raw_and_typed_give_the_same_arrays(make: Callable[[], pb.ModelInferRequest], model: ReadyModel) -> None:
    request = requests.read(make(), model)
    assert request.rows == 2
    assert request.outputs == ("sum", "half")
    assert {name: array.tolist() for name, array in request.inputs.items()} == {
        "a": [[1, 2], [3, 4]],
        "b": [[1, 2], [3, 4]],
    }
    assert request.typed is (make is typed)


async def test_raw_contents_follow_the_order_of_inputs(model: ReadyModel) -> None:
    message = raw()
    message.inputs[0].name, message.inputs[1].name = "b", "a"
    message.raw_input_contents[0] = np.array([[9, 9], [9, 9]], np.int32).tobytes()
    assert requests.read(message, model).inputs["b"].tolist() == [[9, 9], [9, 9]]


def _set(path: str, value: object) -> Change:
    def change(message: pb.ModelInferRequest) -> None:
        setattr(message.inputs[0], path, value)

    return change


def _shape(*dims: int) -> Change:
    def change(message: pb.ModelInferRequest) -> None:
        message.inputs[0].shape[:] = dims

    return change


async def test_contents_that_are_there_and_empty_do_not_hurt_raw_ones(model: ReadyModel) -> None:
    message = raw()
    message.inputs[0].contents.SetInParent()
    assert requests.read(message, model).inputs["a"].tolist() == requests.read(raw(), model).inputs["a"].tolist()


@pytest.mark.parametrize(
    ("make", "change", "text"),
    [
        (raw, lambda m: m.raw_input_contents.pop(), "expected 2 raw_input_contents for model 'm', one an input, got 1"),
        (raw, lambda m: m.raw_input_contents.append(b""), "got 3"),
        (
            raw,
            lambda m: m.inputs[1].contents.int_contents.append(1),
            "contents field must not be specified when using raw_input_contents for 'b' for model 'm'",
        ),
        (
            raw,
            lambda m: m.raw_input_contents.__setitem__(0, b"123"),
            "input byte size mismatch for input 'a' for model 'm'. Expected 16, got 3",
        ),
        (raw, _set("name", "c"), "unexpected inference input 'c' for model 'm'"),
        (raw, _set("name", "b"), "input 'b' already exists in request"),
        (raw, _set("datatype", "FP32"), "inference input 'a' data-type is 'FP32', but model 'm' expects 'INT32'"),
        (raw, _set("datatype", "INT3"), "unknown datatype 'INT3'"),
        (raw, _shape(2, 3), "unexpected shape for input 'a' for model 'm'. Expected [-1,2], got [2,3]"),
        (raw, _shape(4), "unexpected shape for input 'a' for model 'm'. Expected [-1,2], got [4]"),
        (raw, _shape(-2, 2), "negative dimension"),
        (raw, _shape(2**40, 2), "more than"),
        (raw, _shape(*[1] * 40), "40 dimensions"),
        (typed, lambda m: m.inputs[0].ClearField("contents"), "unable to find data for input tensor 'a' for model 'm'"),
        (
            typed,
            lambda m: m.inputs[0].contents.int64_contents.append(1),
            "unexpected explicit tensor data for input tensor 'a' for model 'm' in int64_contents",
        ),
        (typed, lambda m: m.inputs[0].contents.int_contents.append(1), "Expected 16, got 20"),
        (
            typed,
            lambda m: m.inputs.pop(),
            "expected 2 inputs but got 1 inputs for model 'm'. Got input(s) ['a'], but missing required input(s) ['b']",
        ),
        (raw, lambda m: m.outputs.add(name="nope"), "unexpected inference output 'nope' for model 'm'"),
        (raw, lambda m: [m.outputs.add(name="sum") for _ in "12"], "output 'sum' already exists in request"),
        (raw, lambda m: m.parameters["triton_x"].SetInParent(), "parameter keys starting with 'triton_' are reserved"),
        (raw, lambda m: setattr(m.parameters["timeout"], "string_param", "1"), "'timeout' parameter"),
        (raw, lambda m: setattr(m.parameters["timeout"], "int64_param", -1), "'timeout' parameter"),
    ],
)
async def test_what_is_refused(
    make: Callable[[], pb.ModelInferRequest], change: Change, text: str, model: ReadyModel
) -> None:
    message = make()
    change(message)
    with pytest.raises(InvalidInput) as caught:
        requests.read(message, model)
    assert text in caught.value.message
    assert caught.value.violations or "raw_input_contents" in caught.value.message


async def test_inputs_of_one_request_agree_in_their_rows(model: ReadyModel) -> None:
    message = raw()
    message.inputs[1].shape[:] = [1, 2]
    message.raw_input_contents[1] = bytes(8)
    with pytest.raises(InvalidInput, match="batch size does not match"):
        requests.read(message, model)


async def test_more_rows_than_a_batch_may_have(model: ReadyModel) -> None:
    message = raw()
    for tensor in message.inputs:
        tensor.shape[:] = [5, 2]
    message.raw_input_contents[:] = [bytes(40)] * 2
    with pytest.raises(InvalidInput, match="batch-size must be <= 4 for 'm', got 5"):
        requests.read(message, model)


async def test_no_rows_are_rows_too(model: ReadyModel) -> None:
    message = typed()
    for tensor in message.inputs:
        tensor.shape[:] = [0, 2]
        tensor.ClearField("contents")
    request = requests.read(message, model)
    assert request.rows == 0
    assert request.inputs["a"].shape == (0, 2)


@pytest.mark.parametrize("name", ["shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"])
async def test_shared_memory_is_refused_by_name(name: str, model: ReadyModel) -> None:
    message = raw()
    message.inputs[0].parameters[name].string_param = "x"
    with pytest.raises(Unsupported, match=name):
        requests.read(message, model)
    message = raw()
    message.outputs.add(name="sum").parameters[name].string_param = "x"
    with pytest.raises(Unsupported, match=name):
        requests.read(message, model)


async def test_parameters_of_others_are_taken(model: ReadyModel) -> None:
    message = raw()
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    message.parameters["mine"].string_param = "x"
    message.parameters["timeout"].uint64_param = 1500
    options = requests.read(message, model).options
    assert (options.timeout_us, options.empty_final, dict(options.own)) == (1500, True, {"mine": "x"})


async def test_a_typed_request_is_answered_in_kind(model: ReadyModel) -> None:
    message = typed()
    message.outputs.add(name="sum")
    request = requests.read(message, model)
    response = replies.write("7", request, model, [np.array([[1, 2]], np.int32)])
    assert (response.id, response.model_name, response.model_version) == ("7", "m", "1")
    assert list(response.outputs[0].contents.int_contents) == [1, 2]
    assert not response.raw_output_contents


async def test_half_precision_is_answered_raw_even_to_a_typed_request(model: ReadyModel) -> None:
    request = requests.read(typed(), model)
    arrays = [np.array([[1, 2]], np.int32), np.array([[0.5, 1]], np.float16)]
    response = replies.write("", request, model, arrays)
    assert [len(content) for content in response.raw_output_contents] == [8, 4]
    assert not any(output.HasField("contents") for output in response.outputs)


async def test_outputs_come_in_the_order_asked_for(model: ReadyModel) -> None:
    message = raw()
    message.outputs.add(name="half")
    message.outputs.add(name="sum")
    assert requests.read(message, model).outputs == ("half", "sum")


@pytest.mark.parametrize("value", [0, -1])
async def test_classes_are_positive(value: int, model: ReadyModel) -> None:
    message = raw()
    message.outputs.add(name="sum").parameters["classification"].int64_param = value
    with pytest.raises(InvalidInput, match="'classification' parameter"):
        requests.read(message, model)


async def test_classes_replace_the_tensor(model: ReadyModel) -> None:
    message = raw()
    message.outputs.add(name="sum").parameters["classification"].int64_param = 1
    request = requests.read(message, model)
    response = replies.write("", request, model, [np.array([[4, 2], [1, 3]], np.int32)])
    assert response.outputs[0].datatype == "BYTES"
    assert list(response.outputs[0].shape) == [2, 1]
    assert b"4.000000:0" in response.raw_output_contents[0]
