"""NVIDIA's own client, unchanged, against a whole server on every transport: what its examples and tests do."""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from mlmesh_inference.config import ProtocolSettings
from tests.support import onnx_models
from tests.support.oip_server import TRANSPORTS, OipServer, oip_server_beside, usable

TIMEOUT_S = 20.0
DTYPES = {
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
    "BYTES": np.object_,
}
FIRST = np.arange(16, dtype=np.int32)[None]
SECOND = np.full((1, 16), 3, np.int32)


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OipServer]:
    transport = usable(request.param)
    root = tmp_path_factory.mktemp("server")
    with oip_server_beside(root, transport=transport, protocol=ProtocolSettings(shared_memory=True)) as running:
        yield running


@pytest.fixture
def client(server: OipServer) -> Iterator[Any]:
    with triton.InferenceServerClient(server.address) as opened:
        yield opened


def tensor(name: str, array: np.ndarray[Any, Any], datatype: str = "") -> Any:
    made = triton.InferInput(name, list(array.shape), datatype or np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made


def both(first: np.ndarray[Any, Any] = FIRST, second: np.ndarray[Any, Any] = SECOND) -> list[Any]:
    return [tensor("INPUT0", first), tensor("INPUT1", second)]


def refused(call: Callable[[], Any]) -> tuple[str, str]:
    """(status, text) of a call that must fail."""
    with pytest.raises(InferenceServerException) as caught:
        call()
    return str(caught.value.status()).removeprefix("StatusCode."), str(caught.value.message())


def test_health_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("simple")
    assert client.is_model_ready("simple", "1")
    assert not client.is_model_ready("simple", "7")
    assert not client.is_model_ready("nobody")
    assert "system_shared_memory" in client.get_server_metadata().extensions
    metadata = client.get_model_metadata("simple", as_json=True)
    assert metadata["inputs"][0] == {"name": "INPUT0", "datatype": "INT32", "shape": ["-1", "16"]}
    assert refused(lambda: client.get_model_metadata("nobody")) == (
        "NOT_FOUND",
        "Request for unknown model: 'nobody' is not found",
    )


def test_the_configuration_is_that_of_the_file(client: Any) -> None:
    config = client.get_model_config("simple").config
    assert (config.max_batch_size, list(config.input[0].dims)) == (8, [16])
    images = client.get_model_config("images", as_json=True)["config"]
    assert images["input"][0]["format"] == "FORMAT_NCHW"
    assert images["output"][0]["label_filename"] == "classes.txt"
    assert client.get_model_config("accumulate").config.WhichOneof("scheduling_choice") == "sequence_batching"


def test_sum_and_difference(client: Any) -> None:
    outputs = [triton.InferRequestedOutput("OUTPUT1"), triton.InferRequestedOutput("OUTPUT0")]
    result = client.infer("simple", both(), outputs=outputs, request_id="7", client_timeout=TIMEOUT_S)
    assert (result.as_numpy("OUTPUT0") == FIRST + SECOND).all()
    assert (result.as_numpy("OUTPUT1") == FIRST - SECOND).all()
    response = result.get_response()
    assert (response.id, response.model_version) == ("7", "1")
    assert [output.name for output in response.outputs] == ["OUTPUT1", "OUTPUT0"]


def test_objects_may_be_used_again(client: Any) -> None:
    inputs = both()
    for turn in range(3):
        inputs[0].set_data_from_numpy(FIRST + turn)
        assert (client.infer("simple", inputs).as_numpy("OUTPUT0") == FIRST + turn + SECOND).all()


def test_asynchronous_calls_and_their_cancellation(client: Any) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    for _ in range(20):
        client.async_infer("simple", both(), lambda result, error: answers.put((result, error)))
    for _ in range(20):
        result, error = answers.get(timeout=TIMEOUT_S)
        assert error is None
        assert (result.as_numpy("OUTPUT0") == FIRST + SECOND).all()


@pytest.mark.parametrize("datatype", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(1, 3), (2, 0), (3, 2)])
def test_every_datatype_comes_back_as_it_went(datatype: str, shape: tuple[int, int], client: Any) -> None:
    dtype = DTYPES[datatype]
    count = shape[0] * shape[1]
    if datatype == "BYTES":
        texts = ["", "a\x00b", "ü" * 3, "plain", "x", "y"][:count]
        array = np.array([text.encode() for text in texts], np.object_).reshape(shape)
    else:
        array = np.arange(count).astype(dtype).reshape(shape)
    inputs = [
        tensor(f"in_{name}", array if name == datatype else np.empty((shape[0], 0), kind), name)
        for name, kind in DTYPES.items()
    ]
    result = client.infer("identity", inputs, outputs=[triton.InferRequestedOutput(f"out_{datatype}")])
    found = result.as_numpy(f"out_{datatype}")
    assert found.shape == shape
    assert (found == array).all()


def test_bfloat16_travels_raw(client: Any) -> None:
    values = np.array([[1.0, -2.5, 0.0]], ml_dtypes.bfloat16)
    made = triton.InferInput("in_BF16", [1, 3], "BF16")
    made.set_data_from_numpy(values)
    result = client.infer("identity-bf16", [made])
    assert (result.as_numpy("out_BF16") == values).all()


@pytest.mark.parametrize("count", [3, 99])
def test_classes_have_the_labels_of_their_output(count: int, client: Any) -> None:
    image = np.random.default_rng(1).random((2, 1, 8, 8), np.float32)
    plain = client.infer("images", [tensor("x", image)]).as_numpy("scores")
    asked = [triton.InferRequestedOutput("scores", class_count=count)]
    found = client.infer("images", [tensor("x", image)], outputs=asked).as_numpy("scores")
    assert found.shape == (2, min(count, 10))
    for row in range(2):
        value, index, label = found[row, 0].decode().split(":")
        assert int(index) == int(plain[row].argmax())
        assert float(value) == pytest.approx(float(plain[row].max()), abs=1e-4)
        assert label == f"class {index}"


@pytest.mark.parametrize(
    ("inputs", "code", "text"),
    [
        ([tensor("INPUT0", FIRST)], "INVALID_ARGUMENT", "expected 2 inputs but got 1 inputs for model 'simple'"),
        ([*both(), tensor("INPUT2", FIRST)], "INVALID_ARGUMENT", "expected 2 inputs but got 3 inputs for model"),
        (both(FIRST.astype(np.float32)), "INVALID_ARGUMENT", "data-type is 'FP32', but model 'simple' expects 'INT32'"),
        (both(FIRST[:, :8], SECOND[:, :8]), "INVALID_ARGUMENT", "unexpected shape for input 'INPUT0'"),
        (both(np.tile(FIRST, (9, 1)), np.tile(SECOND, (9, 1))), "INVALID_ARGUMENT", "batch-size must be <= 8"),
    ],
)
def test_what_is_wrong_is_said_as_clients_expect(inputs: list[Any], code: str, text: str, client: Any) -> None:
    status, message = refused(lambda: client.infer("simple", inputs))
    assert status == code
    assert text in message


def test_unknown_models_versions_and_outputs(client: Any) -> None:
    assert refused(lambda: client.infer("nobody", both()))[0] == "NOT_FOUND"
    assert refused(lambda: client.infer("simple", both(), model_version="7"))[0] == "NOT_FOUND"
    status, text = refused(lambda: client.infer("simple", both(), model_version="one"))
    assert status == "INVALID_ARGUMENT"
    assert "version should be an integral value > 0" in text
    outputs = [triton.InferRequestedOutput("OUTPUT9")]
    assert "unexpected inference output" in refused(lambda: client.infer("simple", both(), outputs=outputs))[1]


def test_priority_timeout_and_parameters_of_ones_own(client: Any) -> None:
    result = client.infer(
        "simple", both(), priority=1, timeout=5_000_000, parameters={"mine": 1, "text": "x", "yes": True}
    )
    assert (result.as_numpy("OUTPUT0") == FIRST + SECOND).all()


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_compressed_requests(compression: str, client: Any, server: OipServer) -> None:
    result = client.infer("simple", both(), compression_algorithm=compression)
    assert (result.as_numpy("OUTPUT0") == FIRST + SECOND).all()


def streamed(client: Any, send: Callable[[], None], count: int, **options: Any) -> list[tuple[Any, Any]]:
    """What a stream answers to what `send` sends."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)), **options)
    try:
        send()
        return [answers.get(timeout=TIMEOUT_S) for _ in range(count)]
    finally:
        client.stop_stream()


def test_a_stream_answers_in_order_with_errors_in_their_place(client: Any) -> None:
    def send() -> None:
        for number in range(10):
            model = "nobody" if number == 4 else "simple"
            client.async_stream_infer(model, both(FIRST + number), request_id=str(number))

    answers = streamed(client, send, 10)
    for number, (result, error) in enumerate(answers):
        if number == 4:
            assert "Request for unknown model: 'nobody' is not found" in error.message()
        else:
            assert result.get_response().id == str(number)
            assert (result.as_numpy("OUTPUT0") == FIRST + number + SECOND).all()
            assert result.get_response().parameters["triton_final_response"].bool_param


def test_a_stream_that_wants_a_status_gets_one(client: Any) -> None:
    def send() -> None:
        client.async_stream_infer("nobody", both())

    ((result, error),) = streamed(client, send, 1, headers={"triton_grpc_error": "true"})
    assert result is None
    assert error.status() == "StatusCode.NOT_FOUND"


@pytest.mark.parametrize("ids", [(1001, 1002), ("left", "right")])
def test_two_sequences_on_one_stream(ids: tuple[Any, Any], client: Any) -> None:
    values = [11, 7, 5, 3, 2, 0, 1]

    def send() -> None:
        for place, value in enumerate(values):
            for sequence, sign in zip(ids, (1, -1), strict=True):
                client.async_stream_infer(
                    "accumulate",
                    [tensor("INPUT", np.array([[sign * value]], np.int32))],
                    request_id=f"{sequence}/{place}",
                    sequence_id=sequence,
                    sequence_start=place == 0,
                    sequence_end=place == len(values) - 1,
                )

    answers = streamed(client, send, len(values) * 2)
    assert [error for _, error in answers] == [None] * len(answers)
    found = {result.get_response().id: int(result.as_numpy("OUTPUT")[0, 0]) for result, _ in answers}
    sums = np.cumsum(values).tolist()
    assert [found[f"{ids[0]}/{place}"] for place in range(len(values))] == sums
    assert [found[f"{ids[1]}/{place}"] for place in range(len(values))] == [-value for value in sums]


def test_a_sequence_by_single_calls(client: Any) -> None:
    sums = [
        int(
            client.infer(
                "accumulate",
                [tensor("INPUT", np.array([[value]], np.int32))],
                sequence_id=77,
                sequence_start=value == 1,
                sequence_end=value == 4,
            ).as_numpy("OUTPUT")[0, 0]
        )
        for value in (1, 2, 3, 4)
    ]
    assert sums == [1, 3, 6, 10]
    again = [tensor("INPUT", np.array([[1]], np.int32))]
    assert refused(lambda: client.infer("accumulate", again, sequence_id=77))[0] == "INVALID_ARGUMENT"


@pytest.mark.parametrize("empty", [False, True])
def test_a_decoupled_model_answers_on_streams_only(empty: bool, client: Any) -> None:
    inputs = [tensor("x", np.ones((1, 4), np.float32))]
    status, text = refused(lambda: client.infer("decoupled", inputs))
    assert status == "UNIMPLEMENTED"
    assert text == "ModelInfer RPC doesn't support models with decoupled transaction policy"
    assert client.get_model_config("decoupled").config.model_transaction_policy.decoupled

    def send() -> None:
        client.async_stream_infer("decoupled", inputs, request_id="d", enable_empty_final_response=empty)

    answers = streamed(client, send, 2 if empty else 1)
    assert [error for _, error in answers] == [None] * len(answers)
    first = answers[0][0]
    assert (first.as_numpy("y") == 2).all()
    finals = [result.get_response().parameters["triton_final_response"].bool_param for result, _ in answers]
    assert finals[-1] or not empty
    assert not any(finals[:-1])
    if empty:
        assert not answers[1][0].get_response().outputs
        assert answers[1][0].get_response().id == "d"


def test_statistics_count_rows_and_executions(client: Any) -> None:
    def stats() -> Any:
        return client.get_inference_statistics("images", "1").model_stats[0]

    before = stats()
    client.infer("images", [tensor("x", np.zeros((3, 1, 8, 8), np.float32))])
    after = stats()
    assert after.inference_count - before.inference_count == 3
    assert after.execution_count - before.execution_count == 1
    assert after.inference_stats.success.count - before.inference_stats.success.count == 1
    assert [batch.batch_size for batch in after.batch_stats if batch.batch_size == 3] == [3]
    assert after.last_inference > 0
    everything = client.get_inference_statistics(as_json=True)["model_stats"]
    assert {one["name"] for one in everything} >= {"simple", "identity", "images", "accumulate"}
    assert refused(lambda: client.get_inference_statistics("nobody")) == (
        "NOT_FOUND",
        "requested model 'nobody' is not available",
    )


def test_the_repository_lists_what_is_served(client: Any) -> None:
    index = client.get_model_repository_index(as_json=True)["models"]
    assert {(one["name"], one["version"], one["state"]) for one in index} >= {
        ("simple", "1", "READY"),
        ("accumulate", "1", "READY"),
    }


def test_trace_settings(client: Any) -> None:
    first = client.get_trace_settings(as_json=True)["settings"]
    assert first["trace_level"]["value"] == ["TIMESTAMPS"]
    changed = client.update_trace_settings("simple", {"trace_rate": "5", "trace_count": ["9"]}, as_json=True)
    assert changed["settings"]["trace_rate"]["value"] == ["5"]
    assert client.get_trace_settings("simple", as_json=True)["settings"]["trace_count"]["value"] == ["9"]
    assert client.get_trace_settings(as_json=True)["settings"] == first
    client.update_trace_settings("simple", {"trace_rate": None, "trace_count": None})
    assert client.get_trace_settings("simple", as_json=True)["settings"] == first
    for settings in ({"trace_file": "/tmp/x"}, {"trace_level": ["TENSORS"]}):
        assert refused(lambda settings=settings: client.update_trace_settings(settings=settings))[0] == "UNIMPLEMENTED"
    assert refused(lambda: client.get_trace_settings("nobody")) == ("NOT_FOUND", "Request for unknown model : nobody")


@pytest.fixture
def own_log() -> Iterator[None]:
    """The log of this process as it was: the server under test is in it, and later tests read it."""
    root = logging.getLogger()
    level, filters = root.level, [(handler, list(handler.filters)) for handler in root.handlers]
    yield
    root.setLevel(level)
    for handler, before in filters:
        handler.filters[:] = before


@pytest.mark.usefixtures("own_log")
def test_log_settings(client: Any) -> None:
    first = client.get_log_settings(as_json=True)["settings"]
    try:
        changed = client.update_log_settings({"log_verbose_level": 1, "log_info": False}, as_json=True)["settings"]
        assert changed["log_verbose_level"]["uint32_param"] == 1
        assert not changed["log_info"]["bool_param"]
    finally:
        client.update_log_settings(
            {
                "log_verbose_level": first["log_verbose_level"]["uint32_param"],
                "log_info": first["log_info"]["bool_param"],
            }
        )
    assert client.get_log_settings(as_json=True)["settings"] == first
    status, text = refused(lambda: client.update_log_settings({"log_file": "/tmp/log"}))
    assert status == "UNIMPLEMENTED"
    assert text == "log file location can not be updated through network protocol"


@pytest.fixture
def region() -> Iterator[Callable[[int], tuple[str, Any]]]:
    """Makes segments of shared memory: (key, handle)."""
    made: list[Any] = []

    def make(size: int) -> tuple[str, Any]:
        key = f"/mlmesh-test-{uuid.uuid4().hex}"
        made.append(shm.create_shared_memory_region(key[1:], key, size))
        return key, made[-1]

    yield make
    for handle in made:
        shm.destroy_shared_memory_region(handle)


def test_inputs_and_outputs_in_shared_memory(client: Any, region: Callable[[int], tuple[str, Any]]) -> None:
    key_in, handle_in = region(128)
    key_out, handle_out = region(128)
    shm.set_shared_memory_region(handle_in, [FIRST, SECOND])
    client.register_system_shared_memory("in", key_in, 128)
    client.register_system_shared_memory("out", key_out, 128)
    try:
        status = client.get_system_shared_memory_status(as_json=True)["regions"]
        assert status["in"] == {"name": "in", "key": key_in, "byte_size": "128"}
        inputs = [triton.InferInput("INPUT0", [1, 16], "INT32"), triton.InferInput("INPUT1", [1, 16], "INT32")]
        inputs[0].set_shared_memory("in", 64)
        inputs[1].set_shared_memory("in", 64, 64)
        outputs = [triton.InferRequestedOutput("OUTPUT0"), triton.InferRequestedOutput("OUTPUT1")]
        outputs[0].set_shared_memory("out", 64)
        outputs[1].set_shared_memory("out", 64, 64)
        for turn in range(3):
            shm.set_shared_memory_region(handle_in, [FIRST + turn, SECOND])
            result = client.infer("simple", inputs, outputs=outputs)
            assert result.get_output("OUTPUT0").parameters["shared_memory_region"].string_param == "out"
            assert (shm.get_contents_as_numpy(handle_out, np.int32, [1, 16]) == FIRST + turn + SECOND).all()
            assert (shm.get_contents_as_numpy(handle_out, np.int32, [1, 16], 64) == FIRST + turn - SECOND).all()
        shm.set_shared_memory_region(handle_in, [SECOND])
        mixed = [tensor("INPUT0", FIRST), triton.InferInput("INPUT1", [1, 16], "INT32")]
        mixed[1].set_shared_memory("in", 64)
        assert (client.infer("simple", mixed).as_numpy("OUTPUT0") == FIRST + SECOND).all()
    finally:
        client.unregister_system_shared_memory()
    assert client.get_system_shared_memory_status(as_json=True) == {}


def test_shared_memory_that_is_not_there(client: Any, region: Callable[[int], tuple[str, Any]]) -> None:
    key, _handle = region(64)
    client.register_system_shared_memory("small", key, 64)
    try:
        status, text = refused(lambda: client.register_system_shared_memory("small", key, 64))
        assert status == "ALREADY_EXISTS"
        assert "already in manager" in text
        status, text = refused(lambda: client.register_system_shared_memory("big", key, 4096))
        assert status == "INVALID_ARGUMENT"
        assert "failed to register shared memory region 'big': invalid args" in text
        status, text = refused(lambda: client.register_system_shared_memory("gone", "/mlmesh-gone", 64))
        assert status == "INVALID_ARGUMENT"
        assert "Unable to open shared memory region: '/mlmesh-gone'" in text
        inputs = both()
        inputs[1].set_shared_memory("nobody", 64)
        status, text = refused(lambda: client.infer("simple", inputs))
        assert "Unable to find shared memory region: 'nobody'" in text
        inputs[1].set_shared_memory("small", 64, 32)
        status, text = refused(lambda: client.infer("simple", inputs))
        assert status == "INVALID_ARGUMENT"
        assert "Invalid offset + byte size for shared memory region: 'small'" in text
        inputs[1].set_shared_memory("small", 64, 64)
        status, text = refused(lambda: client.infer("simple", inputs))
        assert "Invalid offset for shared memory region: 'small'" in text
        status, text = refused(lambda: client.get_system_shared_memory_status("nobody"))
        assert status == "NOT_FOUND"
        assert "Unable to find system shared memory region: 'nobody'" in text
    finally:
        client.unregister_system_shared_memory()


def test_cuda_shared_memory_says_that_it_is_not_there(client: Any) -> None:
    status, text = refused(client.get_cuda_shared_memory_status)
    assert status == "UNIMPLEMENTED"
    assert "CudaSharedMemoryStatus" in text
    assert "cuda_shared_memory" not in client.get_server_metadata().extensions


def test_probes_answer_while_clients_infer(server: OipServer, client: Any) -> None:
    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(client.infer, "identity-bf16", [_bf16(512)]) for _ in range(40)]
        for _ in range(5):
            assert client.is_server_live(client_timeout=30)
            assert client.get_inference_statistics("simple", client_timeout=30).model_stats
        for call in busy:
            call.result(TIMEOUT_S)


def _bf16(width: int) -> Any:
    made = triton.InferInput("in_BF16", [8, width], "BF16")
    made.set_data_from_numpy(np.ones((8, width), ml_dtypes.bfloat16))
    return made


async def test_the_asyncio_client(server: OipServer) -> None:
    async with triton_aio.InferenceServerClient(server.address) as client:
        assert await client.is_server_ready()
        results = await asyncio.gather(*(client.infer("simple", both(FIRST + n)) for n in range(20)))
        for number, result in enumerate(results):
            assert (result.as_numpy("OUTPUT0") == FIRST + number + SECOND).all()
        assert (await client.get_model_config("simple")).config.max_batch_size == 8
        with pytest.raises(InferenceServerException, match="unknown model"):
            await client.infer("nobody", both())


async def test_the_asyncio_clients_stream(server: OipServer) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for place, value in enumerate((4, 5, 6)):
            yield {
                "model_name": "accumulate",
                "inputs": [tensor("INPUT", np.array([[value]], np.int32))],
                "sequence_id": 500,
                "sequence_start": place == 0,
                "sequence_end": place == 2,
            }

    async with triton_aio.InferenceServerClient(server.address) as client:
        found = []
        async for result, error in client.stream_infer(requests()):
            assert error is None
            found.append(int(result.as_numpy("OUTPUT")[0, 0]))
        assert found == [4, 9, 15]


@pytest.fixture(params=TRANSPORTS)
def controlled(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[OipServer, Any]]:
    """A server of its own, where models are loaded and unloaded and files may come along."""
    transport = usable(request.param)
    protocol = ProtocolSettings(load_files=True)
    with (
        oip_server_beside(tmp_path, transport=transport, protocol=protocol) as running,
        triton.InferenceServerClient(running.address) as client,
    ):
        yield running, client


def test_model_control_as_the_examples_do(controlled: tuple[OipServer, Any]) -> None:
    _server, client = controlled
    client.unload_model("simple")
    assert not client.is_model_ready("simple")
    assert (
        "Request for unknown model: 'simple' has no available versions"
        in refused(lambda: client.infer("simple", both()))[1]
    )
    index = {one.name: (one.state, one.reason) for one in client.get_model_repository_index().models}
    assert index["simple"] == ("UNAVAILABLE", "unloaded")
    client.unload_model("nobody")
    client.load_model("simple")
    assert client.is_model_ready("simple")
    malformed = '"parameters": {"config": {{"max_batch_size": "16"}}}'
    assert "failed to load" in refused(lambda: client.load_model("simple", config=malformed))[1]
    client.load_model("simple", config='{"max_batch_size":"16"}')
    assert client.get_model_config("simple").config.max_batch_size == 16
    rows = np.tile(FIRST, (16, 1))
    assert (client.infer("simple", both(rows, rows)).as_numpy("OUTPUT0") == rows * 2).all()
    status, text = refused(lambda: client.load_model("nobody"))
    assert (status, text) == ("NOT_FOUND", "failed to load 'nobody', failed to poll from model repository")
    client.load_model("simple")
    assert client.get_model_config("simple").config.max_batch_size == 8


def test_an_override_that_cannot_be_carried_out_leaves_what_serves(controlled: tuple[OipServer, Any]) -> None:
    _server, client = controlled
    for config, text in (
        ({"input": [{"name": "INPUT0", "data_type": "TYPE_FP32"}]}, "load failed for model 'simple'"),
        ({"name": "other"}, "load failed for model 'simple'"),
        ({"backend": "python"}, "load failed for model 'simple'"),
        ({"max_batch_size": 4096}, "MLMESH_BATCH_ROWS_MAX"),
        ({"instance_group": [{"rate_limiter": {"priority": 1}}]}, "config.instance_group[0].rate_limiter"),
        ({"version_policy": {"specific": {"versions": [9]}}}, "failed to load 'simple', no version is available"),
    ):
        assert text in refused(lambda config=config: client.load_model("simple", config=json.dumps(config)))[1]
        assert client.is_model_ready("simple")
        assert client.get_model_config("simple").config.max_batch_size == 8
        assert (client.infer("simple", both()).as_numpy("OUTPUT0") == FIRST + SECOND).all()


def test_a_configuration_read_is_a_configuration_to_load(controlled: tuple[OipServer, Any]) -> None:
    _server, client = controlled
    for model in ("simple", "images", "accumulate", "decoupled", "twice"):
        config = client.get_model_config(model, as_json=True)["config"]
        client.load_model(model, config=json.dumps(config))
        assert client.get_model_config(model, as_json=True)["config"] == config


def test_calls_go_on_while_a_model_is_loaded_anew(controlled: tuple[OipServer, Any]) -> None:
    _server, client = controlled
    stop = False

    def ask() -> int:
        count = 0
        while not stop:
            assert (client.infer("simple", both()).as_numpy("OUTPUT0") == FIRST + SECOND).all()
            assert client.is_model_ready("simple")
            count += 1
        return count

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask) for _ in range(2)]
        try:
            for rows in (4, 16, 2):
                client.load_model("simple", config=json.dumps({"max_batch_size": rows}))
        finally:
            stop = True
        assert all(call.result(TIMEOUT_S) > 0 for call in asking)
    assert client.get_model_config("simple").config.max_batch_size == 2


def test_a_model_that_the_client_brings_along(controlled: tuple[OipServer, Any]) -> None:
    _server, client = controlled
    files = {"file:1/model.onnx": onnx_models.add_sub()}
    assert "override files need the parameter 'config'" in refused(lambda: client.load_model("brought", files=files))[1]
    client.load_model("brought", config=json.dumps({"max_batch_size": 2}), files=files)
    assert (client.infer("brought", both()).as_numpy("OUTPUT0") == FIRST + SECOND).all()
    for path in ("file:" + "A" * 256, "file:1/../../x", "file:../1/x", "file:1//x", "file:/etc/passwd", "file:0/x"):
        status, text = refused(lambda path=path: client.load_model("brought", config="{}", files={path: b"a"}))
        assert status == "INVALID_ARGUMENT"
        assert "Invalid file path" in text
    assert client.is_model_ready("brought")
    client.unload_model("brought")
    assert not client.is_model_ready("brought")
    assert refused(lambda: client.load_model("brought"))[0] == "NOT_FOUND"


def test_an_ensemble_and_what_it_is_made_of(controlled: tuple[OipServer, Any]) -> None:
    _server, client = controlled
    inputs = [tensor("IN", np.ones((2, 4), np.float32))]
    assert (client.infer("twice", inputs).as_numpy("OUT") == 21).all()
    config = client.get_model_config("twice", as_json=True)["config"]
    assert [step["model_name"] for step in config["ensemble_scheduling"]["step"]] == ["plus", "plus"]
    client.unload_model("twice")
    assert not client.is_model_ready("twice")
    assert client.is_model_ready("plus")
    client.load_model("twice")
    assert (client.infer("twice", inputs).as_numpy("OUT") == 21).all()
    client.unload_model("twice", unload_dependents=True)
    assert not client.is_model_ready("twice")
    assert not client.is_model_ready("plus")
    assert client.is_model_ready("simple")


def test_files_are_refused_unless_switched_on(server: OipServer, client: Any) -> None:
    status, text = refused(lambda: client.load_model("simple", config="{}", files={"file:1/model.onnx": b"x"}))
    assert status == "UNIMPLEMENTED"
    assert "MLMESH_LOAD_FILES" in text
    assert (client.infer("simple", both()).as_numpy("OUTPUT0") == FIRST + SECOND).all()
