"""Whatever bytes come: they are a request in order, or a refusal with a reason. Never anything else."""

from __future__ import annotations

import asyncio
from typing import Any

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


class Regions:
    """Shared memory of one region, "r", of 64 bytes."""

    def read(self, region: str, offset: int, size: int) -> memoryview:
        """See requests.Regions."""
        if region != "r" or offset + size > 64:
            raise InvalidInput("not there", field="shared_memory_region")
        return memoryview(bytes(size))

    def window(self, region: str, offset: int, size: int) -> memoryview:
        """See requests.Regions."""
        return self.read(region, offset, size)


def check(message: pb.ModelInferRequest, model: ReadyModel, *, shared: bool = False) -> requests.Request | None:
    """Read a request; what is taken must be what it says it is, what is refused says where."""
    regions: Any = Regions() if shared else None
    try:
        request = requests.read(message, model, regions)
    except (InvalidInput, Unsupported) as refusal:
        refused = refusal
        request = None
    if request is None:
        assert 0 < len(refused.message) < 5000
        assert isinstance(refused, Unsupported) or refused.field
        return None
    options = request.options
    assert 0 <= options.timeout_us < 2**63 // 1000
    assert 0 <= options.priority < 2**32
    assert options.sequence is None or options.sequence.id
    assert not any(name.startswith(("triton_", "sequence_")) for name in options.own)
    for name, array in request.inputs.items():
        assert array.dtype == model.inputs[name].datatype.dtype
        assert array.shape[0] == request.rows
    return request


_SHAPE = st.lists(st.integers(-2, 4) | st.integers(-(2**63), 2**63 - 1), max_size=4)
_PARAMETER = st.one_of(
    st.builds(pb.InferParameter, int64_param=st.integers(-(2**63), 2**63 - 1)),
    st.builds(pb.InferParameter, uint64_param=st.integers(0, 2**64 - 1)),
    st.builds(pb.InferParameter, string_param=st.text(max_size=5)),
    st.builds(pb.InferParameter, bool_param=st.booleans()),
    st.builds(pb.InferParameter, double_param=st.floats()),
    st.builds(pb.InferParameter),
)
_PARAMETERS = st.dictionaries(
    st.sampled_from(
        [
            "timeout",
            "priority",
            "sequence_id",
            "sequence_start",
            "triton_x",
            "triton_enable_empty_final_response",
            "headers",
            "mine",
            "classification",
            "shared_memory_region",
            "shared_memory_byte_size",
            "shared_memory_offset",
        ]
    ),
    _PARAMETER,
    max_size=3,
)
_CONTENTS = st.builds(
    pb.InferTensorContents,
    bool_contents=st.lists(st.booleans(), max_size=4),
    int_contents=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4),
    uint64_contents=st.lists(st.integers(0, 2**64 - 1), max_size=4),
    fp32_contents=st.lists(st.floats(width=32), max_size=4),
    fp64_contents=st.lists(st.floats(), max_size=4),
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


@given(message=_REQUEST, shared=st.booleans())
def test_any_request(message: pb.ModelInferRequest, shared: bool, model: ReadyModel) -> None:
    check(message, model, shared=shared)


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
