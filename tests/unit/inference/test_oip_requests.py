"""The protocol's rules for requests: what is taken, what is refused, in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mlmesh_inference.catalog import ReadyModel
from mlmesh_inference.oip import replies, requests
from mlmesh_inference.oip.parameters import Options
from mlmesh_inference.oip.wire import packed
from mlmesh_inference.running import SequenceControl
from mlmesh_inference.tensors import DATATYPES, Signature, TensorSpec
from mlmesh_runtime.errors import InvalidInput, NotFound, Unsupported
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
            "unexpected explicit tensor data for input tensor 'a' for model 'm'",
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
        (raw, lambda m: setattr(m.parameters["timeout"], "int64_param", -1), "'timeout'"),
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
    assert b":0" in response.raw_output_contents[0]


Parameters = dict[str, dict[str, object]]


def asked(parameters: Parameters, model: ReadyModel) -> Options:
    message = raw()
    for name, value in parameters.items():
        message.parameters[name].CopyFrom(pb.InferParameter(**value))  # type: ignore[arg-type]
    return requests.read(message, model).options


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"int64_param": 7}, 7),
        ({"uint64_param": 2**64 - 1}, 2**64 - 1),
        ({"int64_param": -1}, 2**64 - 1),
        ({"string_param": "a"}, "a"),
        ({"int64_param": 0}, None),
        ({"string_param": ""}, None),
    ],
)
async def test_a_sequence_has_a_number_or_a_name(value: dict[str, object], expected: object, model: ReadyModel) -> None:
    start: Parameters = {"sequence_start": {"bool_param": True}, "sequence_end": {"bool_param": False}}
    sequence = asked({"sequence_id": value, **start}, model).sequence
    assert sequence == (None if expected is None else SequenceControl(id=expected, start=True))  # type: ignore[arg-type]


async def test_reserved_parameters_are_read_and_the_rest_is_the_models(model: ReadyModel) -> None:
    options = asked(
        {
            "priority": {"uint64_param": 2},
            "timeout": {"int64_param": 5},
            "headers": {"string_param": "x"},
            "binary_data_output": {"bool_param": True},
            "b": {"bool_param": True},
            "i": {"int64_param": -5},
            "s": {"string_param": "t"},
            "d": {"double_param": 0.5},
            "u": {"uint64_param": 5},
        },
        model,
    )
    assert (options.priority, options.timeout_us, options.sequence) == (2, 5, None)
    assert dict(options.own) == {"b": True, "i": -5, "s": "t", "d": 0.5, "u": 5}
    with pytest.raises(TypeError):
        options.own["b"] = False  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("sequence_id", {"bool_param": True}, "'sequence_id' parameter, expected int64_param, uint64_param or string"),
        ("sequence_id", {"string_param": "x" * 129}, "128 characters"),
        ("sequence_start", {"int64_param": 1}, "'sequence_start' parameter, expected bool_param"),
        ("sequence_end", {"string_param": "1"}, "'sequence_end' parameter, expected bool_param"),
        ("priority", {"int64_param": -1}, "'priority'"),
        ("priority", {"string_param": "1"}, "'priority' parameter, expected int64_param or uint64_param"),
        ("timeout", {"double_param": 1.0}, "'timeout' parameter, expected int64_param or uint64_param"),
        ("triton_enable_empty_final_response", {"int64_param": 1}, "expected bool_param"),
        ("mine", {}, "invalid value type for 'mine' parameter"),
    ],
)
async def test_parameters_that_are_refused(name: str, value: dict[str, object], text: str, model: ReadyModel) -> None:
    with pytest.raises(InvalidInput) as caught:
        asked({name: value}, model)
    assert text in caught.value.message
    assert caught.value.field == f"parameters[{name}]"


async def test_an_absurd_timeout_is_none(model: ReadyModel) -> None:
    assert asked({"timeout": {"uint64_param": 2**64 - 1}}, model).timeout_us == 0
    assert asked({"priority": {"uint64_param": 2**64 - 1}}, model).priority == 2**32 - 1


class Memory:
    """One region of shared memory."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def read(self, region: str, offset: int, size: int) -> memoryview:
        """See Regions."""
        self.check(region, offset, size)
        return memoryview(self.data)[offset : offset + size]

    def window(self, region: str, offset: int, size: int) -> MemoryWindow:
        """See Regions."""
        self.check(region, offset, size)
        return MemoryWindow(memoryview(self.data)[offset : offset + size])

    def check(self, region: str, offset: int, size: int) -> None:
        """Refuse what is not there."""
        if region != "r":
            raise NotFound(f"no region {region}")
        if offset + size > len(self.data):
            raise InvalidInput("outside", field="shared_memory_byte_size")


class MemoryWindow:
    """A part of it."""

    def __init__(self, view: memoryview) -> None:
        self.view = view

    def __len__(self) -> int:
        return len(self.view)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """See Window."""
        self.view[: len(data)] = data


def placed(tensor: Any, offset: int, size: int, region: str = "r") -> None:
    tensor.parameters["shared_memory_region"].string_param = region
    tensor.parameters["shared_memory_byte_size"].int64_param = size
    tensor.parameters["shared_memory_offset"].int64_param = offset


async def test_tensors_in_shared_memory(model: ReadyModel) -> None:
    """Raw contents skip them on the way in, and hold their place on the way out."""
    memory = Memory(64)
    memory.data[1:17] = np.array([[1, 2], [3, 4]], np.int32).tobytes()
    message = raw()
    placed(message.inputs[0], 1, 16)
    del message.raw_input_contents[0]
    placed(message.outputs.add(name="half"), 32, 8)
    message.outputs.add(name="sum")
    request = requests.read(message, model, memory)
    assert request.inputs["a"].tolist() == [[1, 2], [3, 4]]
    assert request.inputs["a"].flags.aligned
    half, total = np.ones((2, 2), np.float16), np.ones((2, 2), np.int32)
    response = replies.write("", request, model, [half, total])
    assert memory.data[32:40] == half.tobytes()
    assert list(response.raw_output_contents) == [b"", total.tobytes()]
    parameters = response.outputs[0].parameters
    assert parameters["shared_memory_region"].string_param == "r"
    assert parameters["shared_memory_byte_size"].int64_param == 8
    assert not response.outputs[1].parameters


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: None, "expected 1 raw_input_contents for model 'm', one an input, got 2"),
        (lambda m: m.raw_input_contents.pop() and placed(m.inputs[0], 0, 12), "Expected 16, got 12"),
        (lambda m: m.raw_input_contents.pop() and placed(m.inputs[0], 60, 16), "outside"),
        (lambda m: m.raw_input_contents.pop() and placed(m.inputs[0], -1, 16), "'shared_memory_offset'"),
        (
            lambda m: m.raw_input_contents.pop() and m.inputs[0].parameters.pop("shared_memory_byte_size"),
            "'shared_memory_byte_size'",
        ),
        (lambda m: m.inputs[0].parameters.pop("shared_memory_region"), "without 'shared_memory_region'"),
        (
            lambda m: m.raw_input_contents.pop() and m.inputs[0].contents.int_contents.append(1),
            "contents field must not be specified when using shared memory for 'a'",
        ),
    ],
)
async def test_what_is_refused_of_shared_memory(change: Change, text: str, model: ReadyModel) -> None:
    message = raw()
    placed(message.inputs[0], 0, 16)
    change(message)
    with pytest.raises(InvalidInput) as caught:
        requests.read(message, model, Memory(64))
    assert text in caught.value.message


async def test_an_output_that_does_not_fit_into_shared_memory(model: ReadyModel) -> None:
    message = raw()
    placed(message.outputs.add(name="sum"), 0, 4)
    request = requests.read(message, model, Memory(64))
    with pytest.raises(InvalidInput, match=r"for output 'sum' \(4 bytes\) should be at least 16 bytes"):
        replies.write("", request, model, [np.ones((2, 2), np.int32)])


async def test_too_many_classes_are_refused(model: ReadyModel) -> None:
    message = raw()
    message.outputs.add(name="sum").parameters["classification"].int64_param = 1 << 20
    request = requests.read(message, model)
    with pytest.raises(InvalidInput, match="more than 262144 classes"):
        replies.write("", request, model, [np.zeros((2, 140_000), np.int32)])


@pytest.mark.parametrize("kind", ["FP32", "FP64"])
async def test_typed_floats_keep_every_bit(kind: str) -> None:
    """Negative zero, and quiet and signalling NaN."""
    dtype = DATATYPES[kind].dtype
    values = np.array([0.0, -0.0, np.nan, np.inf, 1e-310], dtype)
    bits = values.view(f"u{dtype.itemsize}").copy()
    bits[2] = (0x7F800001, 0x7FF0000000000001)[dtype.itemsize == 8]
    spec = TensorSpec(name="x", datatype=DATATYPES[kind], shape=(-1, 5))
    engine = TwoInputs()
    engine.signature = Signature(inputs=(spec,), outputs=(spec,))
    own = ready_model(engine)
    field = DATATYPES[kind].contents
    contents = pb.InferTensorContents.FromString(packed(DATATYPES[kind], bits.view(dtype)))
    message = pb.ModelInferRequest(
        model_name="m", inputs=[Tensor(name="x", datatype=kind, shape=[1, 5], contents=contents)]
    )
    request = requests.read(message, own)
    assert request.inputs["x"].tobytes() == bits.tobytes()
    response = replies.write("", request, own, [request.inputs["x"]])
    assert response.outputs[0].contents.SerializeToString() == contents.SerializeToString()
    assert len(getattr(response.outputs[0].contents, field)) == 5
