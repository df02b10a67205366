"""Refusals in the words of Triton's own server (2.51, gRPC), which clients and their tests compare.

Each text was told by that server for the same request. Where the order of looking differs (Triton looks at the last
input first), the texts are about the input that mlmesh looks at first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from mlmesh_inference.config import ProtocolSettings
from open_inference import grpc_service_pb2 as pb
from open_inference import grpc_service_pb2_grpc as stubs
from tests.support.oip_server import TRANSPORTS, OipServer, oip_server_beside, usable

ROW = np.arange(16, dtype=np.int32).tobytes()
Change = Callable[[pb.ModelInferRequest], Any]
_STOL = (
    "failed to get model version from specified version string 'x' (details: stol), version should be an integral value"
)
_RESERVED = (
    "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys starting with "
    "'triton_' are allowed: triton_enable_empty_final_response"
)


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OipServer]:
    protocol = ProtocolSettings(shared_memory=True)
    root = tmp_path_factory.mktemp("server")
    with oip_server_beside(root, transport=usable(request.param), protocol=protocol) as running:
        yield running


@pytest.fixture(scope="module")
def stub(server: OipServer) -> Iterator[Any]:
    with grpc.insecure_channel(server.address) as channel:
        yield stubs.GRPCInferenceServiceStub(channel)


def request(*, raw: bool = True, names: tuple[str, ...] = ("INPUT0", "INPUT1"), rows: int = 1) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="simple", id="i")
    for name in names:
        tensor = message.inputs.add(name=name, datatype="INT32", shape=[rows, 16])
        if raw:
            message.raw_input_contents.append(ROW * rows)
        else:
            tensor.contents.int_contents.extend(list(range(16)) * rows)
    return message


def parameter(name: str, kind: str, value: Any) -> Change:
    return lambda message: setattr(message.parameters[name], kind, value)


def output(kind: str, value: Any, *, shared: bool = False) -> Change:
    def change(message: pb.ModelInferRequest) -> None:
        asked = message.outputs.add(name="OUTPUT0")
        setattr(asked.parameters["classification"], kind, value)
        if shared:
            asked.parameters["shared_memory_region"].string_param = "r"
            asked.parameters["shared_memory_byte_size"].int64_param = 64

    return change


def in_shared_memory(message: pb.ModelInferRequest, **more: int) -> None:
    message.ClearField("raw_input_contents")
    for tensor in message.inputs:
        tensor.parameters["shared_memory_region"].string_param = "r"
        for name, value in more.items():
            tensor.parameters[name].int64_param = value


def wrong_field(message: pb.ModelInferRequest) -> None:
    message.inputs[0].contents.Clear()
    message.inputs[0].contents.fp32_contents.extend([0.0] * 16)


def nothing(_message: pb.ModelInferRequest) -> None:
    """As it is."""


@pytest.mark.parametrize(
    ("make", "change", "code", "text"),
    [
        (
            request,
            lambda m: setattr(m, "model_name", "nobody"),
            "NOT_FOUND",
            "Request for unknown model: 'nobody' is not found",
        ),
        (
            request,
            lambda m: setattr(m, "model_version", "9"),
            "NOT_FOUND",
            "Request for unknown model: 'simple' version 9 is not found",
        ),
        (request, lambda m: setattr(m, "model_version", "x"), "INVALID_ARGUMENT", _STOL),
        (
            request,
            lambda m: setattr(m, "model_version", "-1"),
            "INVALID_ARGUMENT",
            "invalid model version specified '-1' , version should be an integral value > 0",
        ),
        (
            lambda: request(names=("INPUT0",)),
            nothing,
            "INVALID_ARGUMENT",
            "expected 2 inputs but got 1 inputs for model 'simple'. Got input(s) ['INPUT0'], but missing required "
            "input(s) ['INPUT1']. Please provide all required input(s).",
        ),
        (
            lambda: request(names=("INPUT0", "INPUT1", "INPUT2")),
            nothing,
            "INVALID_ARGUMENT",
            "expected 2 inputs but got 3 inputs for model 'simple'. Got input(s) [",
        ),
        (
            lambda: request(names=("INPUT0", "INPUTX")),
            nothing,
            "INVALID_ARGUMENT",
            "unexpected inference input 'INPUTX' for model 'simple'",
        ),
        (
            lambda: request(names=("INPUT0", "INPUT0")),
            nothing,
            "INVALID_ARGUMENT",
            "input 'INPUT0' already exists in request",
        ),
        (
            request,
            lambda m: setattr(m.inputs[0], "datatype", "FP32"),
            "INVALID_ARGUMENT",
            "inference input 'INPUT0' data-type is 'FP32', but model 'simple' expects 'INT32'",
        ),
        (
            request,
            lambda m: m.inputs[0].shape.__setitem__(1, 8),
            "INVALID_ARGUMENT",
            "unexpected shape for input 'INPUT0' for model 'simple'. Expected [-1,16], got [1,8]",
        ),
        (
            lambda: request(rows=9),
            nothing,
            "INVALID_ARGUMENT",
            "inference request batch-size must be <= 8 for 'simple'",
        ),
        (
            request,
            lambda m: m.raw_input_contents.__setitem__(1, b"123"),
            "INVALID_ARGUMENT",
            "input byte size mismatch for input 'INPUT1' for model 'simple'. Expected 64, got 3",
        ),
        (
            request,
            lambda m: m.raw_input_contents.pop(),
            "INVALID_ARGUMENT",
            "unable to find data for input tensor 'INPUT1' for model 'simple' in request.",
        ),
        (
            request,
            lambda m: m.inputs[0].contents.int_contents.append(1),
            "INVALID_ARGUMENT",
            "contents field must not be specified when using raw_input_contents for 'INPUT0' for model 'simple'",
        ),
        (
            request,
            lambda m: m.ClearField("raw_input_contents"),
            "INVALID_ARGUMENT",
            "unable to find data for input tensor 'INPUT0' for model 'simple' in request.",
        ),
        (
            lambda: request(raw=False),
            wrong_field,
            "INVALID_ARGUMENT",
            "unexpected explicit tensor data for input tensor 'INPUT0' for model 'simple' of type 'FP32', expected "
            "datatype 'INT32'",
        ),
        (
            lambda: request(raw=False),
            lambda m: m.inputs[0].contents.int_contents.pop(),
            "INVALID_ARGUMENT",
            "input byte size mismatch for input 'INPUT0' for model 'simple'. Expected 64, got 60",
        ),
        (
            request,
            lambda m: m.outputs.add(name="NOPE"),
            "INVALID_ARGUMENT",
            "unexpected inference output 'NOPE' for model 'simple'",
        ),
        (
            request,
            output("int64_param", 0),
            "INVALID_ARGUMENT",
            "invalid value for 'classification' parameter, expected >= 0",
        ),
        (
            request,
            output("string_param", "2"),
            "INVALID_ARGUMENT",
            "invalid value type for 'classification' parameter, expected int64_param",
        ),
        (
            request,
            output("int64_param", 2, shared=True),
            "INVALID_ARGUMENT",
            "output can't set both 'shared_memory_region' and 'classification'",
        ),
        (request, parameter("triton_x", "int64_param", 1), "INVALID_ARGUMENT", _RESERVED),
        (
            request,
            parameter("triton_enable_empty_final_response", "int64_param", 1),
            "INVALID_ARGUMENT",
            "invalid value type for 'triton_enable_empty_final_response' parameter, expected bool_param.",
        ),
        (
            request,
            parameter("priority", "string_param", "1"),
            "INVALID_ARGUMENT",
            "invalid value type for 'priority' parameter, expected int64_param or uint64_param.",
        ),
        (
            request,
            parameter("priority", "int64_param", -1),
            "INVALID_ARGUMENT",
            "invalid value for 'priority', expected value >= 0.",
        ),
        (
            request,
            parameter("sequence_start", "string_param", "x"),
            "INVALID_ARGUMENT",
            "invalid value type for 'sequence_start' parameter, expected bool_param.",
        ),
        (
            request,
            parameter("sequence_id", "string_param", "x" * 200),
            "INVALID_ARGUMENT",
            "string correlation ID cannot be longer than 128 characters",
        ),
        (
            request,
            lambda m: in_shared_memory(m, shared_memory_byte_size=64),
            "NOT_FOUND",
            "Unable to find shared memory region: 'r'",
        ),
        (
            request,
            in_shared_memory,
            "INVALID_ARGUMENT",
            "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter for tensor "
            "'INPUT0'",
        ),
    ],
)
def test_a_refused_request(
    make: Callable[[], pb.ModelInferRequest], change: Change, code: str, text: str, stub: Any
) -> None:
    message = make()
    change(message)
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(message, timeout=20)
    error: Any = caught.value
    assert (error.code().name, text in error.details()) == (code, True), error.details()
    (answer,) = stub.ModelStreamInfer(iter([message]), timeout=20)
    assert text in answer.error_message
    assert answer.infer_response.id == "i"


def test_whole_numbers_are_classes_as_whole_numbers(stub: Any) -> None:
    message = request()
    output("int64_param", 2)(message)
    answer = stub.ModelInfer(message, timeout=20)
    assert answer.raw_output_contents[0] == b"\x05\x00\x00\x0030:15\x05\x00\x00\x0028:14"


@pytest.mark.parametrize(
    ("method", "message", "text"),
    [
        ("ModelMetadata", pb.ModelMetadataRequest(name="nobody"), "Request for unknown model: 'nobody' is not found"),
        ("ModelMetadata", pb.ModelMetadataRequest(name="simple", version="x"), _STOL),
        ("ModelReady", pb.ModelReadyRequest(name="simple", version="x"), _STOL),
        ("ModelConfig", pb.ModelConfigRequest(name="nobody"), "Request for unknown model: 'nobody' is not found"),
        ("ModelStatistics", pb.ModelStatisticsRequest(name="nobody"), "requested model 'nobody' is not available"),
        (
            "ModelStatistics",
            pb.ModelStatisticsRequest(name="simple", version="9"),
            "requested model version is not available for model 'simple'",
        ),
        (
            "RepositoryIndex",
            pb.RepositoryIndexRequest(repository_name="other"),
            "'repository_name' specification is not supported",
        ),
        (
            "RepositoryModelLoad",
            pb.RepositoryModelLoadRequest(repository_name="other", model_name="simple"),
            "'repository_name' specification is not supported",
        ),
        (
            "RepositoryModelLoad",
            pb.RepositoryModelLoadRequest(model_name="nobody"),
            "failed to load 'nobody', failed to poll from model repository",
        ),
        ("TraceSetting", pb.TraceSettingRequest(model_name="nobody"), "Request for unknown model : nobody"),
        (
            "SystemSharedMemoryStatus",
            pb.SystemSharedMemoryStatusRequest(name="x"),
            "Unable to find system shared memory region: 'x'",
        ),
        (
            "SystemSharedMemoryRegister",
            pb.SystemSharedMemoryRegisterRequest(name="x", key="/gone", byte_size=4),
            "Unable to open shared memory region: '/gone'",
        ),
    ],
)
def test_other_refusals(method: str, message: Any, text: str, stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        getattr(stub, method)(message, timeout=20)
    error: Any = caught.value
    assert text in error.details()
