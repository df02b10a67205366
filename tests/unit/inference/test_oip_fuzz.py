"""Whatever bytes come: they are a request in order, or a refusal with a reason. Never anything else."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_inference.catalog import ReadyModel
from mlmesh_inference.oip import replies, requests
from mlmesh_inference.tensors import DATATYPES, Signature, TensorSpec, encode_raw
from mlmesh_runtime.errors import InvalidInput, Unsupported
from open_inference import grpc_service_pb2 as pb
from tests.support.inference import GatedEngine, ready_model

KINDS = sorted(DATATYPES)


@pytest.fixture(scope="module")
def model() -> ReadyModel:
    """A model that nothing is submitted to."""
    return asyncio.run(_model())


async def _model() -> ReadyModel:
    engine = GatedEngine(is_open=True)
    specs = tuple(TensorSpec(name=kind, datatype=DATATYPES[kind], shape=(-1, -1)) for kind in KINDS)
    engine.signature = Signature(inputs=specs, outputs=specs)
    return ready_model(engine, rows_max=16)


def check(message: pb.ModelInferRequest, model: ReadyModel) -> requests.Request | None:
    """Read a request; what is taken must be what it says it is."""
    try:
        request = requests.read(message, model)
    except (InvalidInput, Unsupported) as refusal:
        error = refusal
        request = None
    if request is None:
        assert 0 < len(error.message) < 5000
        return None
    for name, array in request.inputs.items():
        assert array.dtype == model.inputs[name].datatype.dtype
        assert array.shape[0] == request.rows
    return request


_SHAPE = st.lists(st.integers(-2, 4) | st.integers(-(2**63), 2**63 - 1), max_size=4)
_PARAMETER = st.builds(pb.InferParameter, int64_param=st.integers(-(2**63), 2**63 - 1)) | st.builds(
    pb.InferParameter, string_param=st.text(max_size=5)
)
_PARAMETERS = st.dictionaries(
    st.sampled_from(["timeout", "triton_x", "classification", "shared_memory_region", "priority"]),
    _PARAMETER,
    max_size=2,
)
_CONTENTS = st.builds(
    pb.InferTensorContents,
    bool_contents=st.lists(st.booleans(), max_size=4),
    int_contents=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4),
    uint64_contents=st.lists(st.integers(0, 2**64 - 1), max_size=4),
    bytes_contents=st.lists(st.binary(max_size=4), max_size=4),
)
_INPUT = st.builds(
    pb.ModelInferRequest.InferInputTensor,
    name=st.sampled_from([*KINDS, "nope", ""]),
    datatype=st.sampled_from([*KINDS, "FP8", ""]),
    shape=_SHAPE,
    parameters=_PARAMETERS,
    contents=st.none() | _CONTENTS,
)
_OUTPUT = st.builds(
    pb.ModelInferRequest.InferRequestedOutputTensor,
    name=st.sampled_from([*KINDS, "nope"]),
    parameters=_PARAMETERS,
)
_REQUEST = st.builds(
    pb.ModelInferRequest,
    parameters=_PARAMETERS,
    inputs=st.lists(_INPUT, max_size=4),
    outputs=st.lists(_OUTPUT, max_size=3),
    raw_input_contents=st.lists(st.binary(max_size=64), max_size=4),
)


@given(message=_REQUEST)
def test_any_request(message: pb.ModelInferRequest, model: ReadyModel) -> None:
    check(message, model)


@given(data=st.data())
def test_a_valid_request_of_any_shape_is_taken_and_answered_in_kind(data: st.DataObject, model: ReadyModel) -> None:
    rows, width = data.draw(st.integers(0, 16)), data.draw(st.integers(0, 4))
    message = pb.ModelInferRequest(model_name="m")
    arrays = {}
    for kind in data.draw(st.permutations(KINDS)):
        count = rows * width
        if kind == "BYTES":
            array = np.empty(count, object)
            array[:] = data.draw(st.lists(st.binary(max_size=3), min_size=count, max_size=count))
        else:
            array = np.arange(count).astype(DATATYPES[kind].dtype)
        arrays[kind] = array.reshape(rows, width)
        message.inputs.add(name=kind, datatype=kind, shape=[rows, width])
        message.raw_input_contents.append(encode_raw(DATATYPES[kind], arrays[kind]))
    request = check(message, model)
    assert request is not None
    response = replies.write("", request, model, [request.inputs[kind] for kind in KINDS])
    assert [output.name for output in response.outputs] == KINDS
    sent = dict(zip((tensor.name for tensor in message.inputs), message.raw_input_contents, strict=True))
    assert list(response.raw_output_contents) == [sent[kind] for kind in KINDS]


def _valid() -> bytes:
    message = pb.ModelInferRequest(model_name="m", id="7")
    for kind in KINDS:
        tensor = message.inputs.add(name=kind, datatype=kind, shape=[1, 1])
        tensor.parameters["p"].int64_param = 1
        message.raw_input_contents.append(b"\x00" * (DATATYPES[kind].itemsize or 4))
    message.outputs.add(name="FP32").parameters["classification"].int64_param = 1
    return bytes(message.SerializeToString(deterministic=True))


VALID = _valid()


def test_what_is_mutated_is_valid_to_begin_with(model: ReadyModel) -> None:
    assert check(pb.ModelInferRequest.FromString(VALID), model) is not None


@given(
    changes=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, len(VALID)) | st.none(),
)
def test_mutated_bytes(changes: list[tuple[int, int]], cut: int | None, model: ReadyModel) -> None:
    raw = bytearray(VALID)
    for place, value in changes:
        raw[place] = value
    try:
        message = pb.ModelInferRequest.FromString(bytes(raw[:cut]))
    except DecodeError:
        return
    check(message, model)
