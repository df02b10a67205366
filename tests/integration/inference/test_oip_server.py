"""A real server over gRPC: unary, streams, errors, cancellation, deadlines, draining, health, control."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mlmesh.inference.v1 import control_pb2, control_pb2_grpc
from mlmesh_inference.app import ModelHealth
from mlmesh_inference.catalog import Catalog
from mlmesh_inference.oip.stream import IN_FLIGHT_MAX
from mlmesh_runtime.health import HealthStatuses
from open_inference import grpc_service_pb2 as pb
from open_inference import grpc_service_pb2_grpc as stubs
from tests.support.inference import GatedEngine, eventually, inference_server, install, ready_model, rows
from tests.support.oip_server import TRANSPORTS, usable

TIMEOUT_S = 20.0


def request(*values: float, name: str = "", model: str = "m", version: str = "") -> pb.ModelInferRequest:
    return pb.ModelInferRequest(
        model_name=model,
        model_version=version,
        id=name,
        inputs=[pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[len(values), 4])],
        raw_input_contents=[rows(*values).tobytes()],
    )


def first_column(response: pb.ModelInferResponse) -> list[float]:
    shape = list(response.outputs[0].shape)
    return [float(v) for v in np.frombuffer(response.raw_output_contents[0], np.float32).reshape(shape)[:, 0]]


def reason(error: grpc.aio.AioRpcError) -> tuple[str, set[str]]:
    """(ErrorInfo.reason, kinds of details)."""
    raw = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(raw)
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
    return info.reason, {detail.type_url.rpartition(".")[2] for detail in status.details}


class Running:
    """A server with a gated model, and stubs."""

    def __init__(self, engine: GatedEngine, catalog: Catalog, address: str, channel: grpc.aio.Channel) -> None:
        self.engine = engine
        self.catalog = catalog
        self.address = address
        self.channel = channel
        self.stub: Any = stubs.GRPCInferenceServiceStub(channel)


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return usable(request.param)


@pytest.fixture
async def running(request: pytest.FixtureRequest, transport: str) -> AsyncIterator[Running]:
    policy = getattr(request, "param", {})
    engine, catalog = GatedEngine(), Catalog()
    async with inference_server(ready_model(engine, **policy), catalog=catalog, transport=transport) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield Running(engine, catalog, server.address, channel)
        engine.open()


async def stream_of(messages: Iterable[pb.ModelInferRequest]) -> AsyncIterator[pb.ModelInferRequest]:
    for message in messages:
        yield message


async def test_concurrent_calls_run_in_one_batch_and_get_their_own_rows(running: Running) -> None:
    first = running.stub.ModelInfer(request(0.0), timeout=TIMEOUT_S)
    await running.engine.begun()
    calls = [running.stub.ModelInfer(request(float(n), name=str(n)), timeout=TIMEOUT_S) for n in range(1, 6)]
    await eventually(lambda: running.catalog.resolve("m", "").runner.depth == 5)
    running.engine.open()
    responses = await asyncio.gather(first, *calls)
    assert [first_column(response) for response in responses] == [[2.0 * n] for n in range(6)]
    assert [response.id for response in responses[1:]] == ["1", "2", "3", "4", "5"]
    assert sorted(running.engine.batches[1]) == [1.0, 2.0, 3.0, 4.0, 5.0]


async def test_one_wrong_request_does_not_hurt_its_batch_mates(running: Running) -> None:
    running.engine.fail_on = 13.0
    first = running.stub.ModelInfer(request(0.0), timeout=TIMEOUT_S)
    await running.engine.begun()
    values = [1.0, 13.0, 3.0]
    calls = [running.stub.ModelInfer(request(value), timeout=TIMEOUT_S) for value in values]
    await eventually(lambda: running.catalog.resolve("m", "").runner.depth == 3)
    running.engine.open()
    await first
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [first_column(results[0]), first_column(results[2])] == [[2.0], [6.0]]  # type: ignore[arg-type]
    assert isinstance(results[1], grpc.aio.AioRpcError)
    assert results[1].code() is grpc.StatusCode.INTERNAL
    assert reason(results[1])[0] == "ENGINE_FAILED"
    assert "13" not in (results[1].details() or "")


async def test_a_cancelled_call_never_reaches_the_engine(running: Running) -> None:
    first = running.stub.ModelInfer(request(1.0), timeout=TIMEOUT_S)
    await running.engine.begun()
    batcher = running.catalog.resolve("m", "").runner
    cancelled = running.stub.ModelInfer(request(2.0), timeout=TIMEOUT_S)
    kept = running.stub.ModelInfer(request(3.0), timeout=TIMEOUT_S)
    await eventually(lambda: batcher.depth == 2)
    waiting = next(item for item in batcher._queue if item.work.inputs["x"][0, 0] == 2.0)
    cancelled.cancel()
    await eventually(waiting.sink.done)
    running.engine.open()
    await asyncio.gather(first, kept)
    assert running.engine.batches == [[1.0], [3.0]]


async def test_a_call_past_its_deadline_never_reaches_the_engine(running: Running) -> None:
    first = running.stub.ModelInfer(request(1.0), timeout=TIMEOUT_S)
    await running.engine.begun()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.stub.ModelInfer(request(2.0), timeout=0.1)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    kept = running.stub.ModelInfer(request(3.0), timeout=TIMEOUT_S)
    running.engine.open()
    await asyncio.gather(first, kept)
    assert running.engine.batches == [[1.0], [3.0]]


async def test_a_requests_own_timeout_holds_too(running: Running) -> None:
    first = running.stub.ModelInfer(request(1.0), timeout=TIMEOUT_S)
    await running.engine.begun()
    hasty = request(2.0)
    hasty.parameters["timeout"].int64_param = 1000
    late = running.stub.ModelInfer(hasty, timeout=TIMEOUT_S)
    await eventually(lambda: running.catalog.resolve("m", "").runner.depth == 1)
    await asyncio.sleep(0.002)  # the millisecond that the request allows itself
    running.engine.open()
    await first
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await late
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert reason(caught.value)[0] == "DEADLINE_TOO_SHORT"
    assert running.engine.batches == [[1.0]]


@pytest.mark.parametrize("running", [{"queue_items_max": 2}], indirect=True)
async def test_a_full_queue_is_resource_exhausted_with_a_retry_hint(running: Running) -> None:
    taken = [running.stub.ModelInfer(request(1.0), timeout=TIMEOUT_S)]
    await running.engine.begun()
    taken += [running.stub.ModelInfer(request(float(n)), timeout=TIMEOUT_S) for n in (2, 3)]
    await eventually(lambda: running.catalog.resolve("m", "").runner.depth == 2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.stub.ModelInfer(request(4.0), timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason(caught.value) == ("QUEUE_FULL", {"ErrorInfo", "RetryInfo"})
    running.engine.open()
    await asyncio.gather(*taken)


@pytest.mark.parametrize(
    ("message", "code", "text", "why"),
    [
        (request(1.0, model="x"), "NOT_FOUND", "Request for unknown model: 'x' is not found", "MODEL_NOT_FOUND"),
        (request(1.0, version="9"), "NOT_FOUND", "version 9 is not found", "MODEL_NOT_FOUND"),
        (request(*[1.0] * 65), "INVALID_ARGUMENT", "batch-size must be <= 64 for 'm'", "SHAPE_MISMATCH"),
        (pb.ModelInferRequest(model_name="m"), "INVALID_ARGUMENT", "missing required input(s) ['x']", "INVALID_FIELD"),
    ],
)
async def test_refusals(message: pb.ModelInferRequest, code: str, text: str, why: str, running: Running) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.stub.ModelInfer(message, timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode[code]
    assert text in (caught.value.details() or "")
    assert reason(caught.value)[0] == why


async def test_what_is_no_message_is_invalid(running: Running) -> None:
    call = running.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"\xff\xff\xff\xff", timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason(caught.value)[0] == "MALFORMED_MESSAGE"


@pytest.mark.parametrize(
    "method",
    [
        "SystemSharedMemoryStatus",
        "SystemSharedMemoryRegister",
        "SystemSharedMemoryUnregister",
        "CudaSharedMemoryStatus",
        "CudaSharedMemoryRegister",
        "CudaSharedMemoryUnregister",
    ],
)
async def test_what_is_not_implemented_says_so_by_name(method: str, running: Running) -> None:
    message = getattr(pb, f"{method}Request")()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(running.stub, method)(message)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert method in (caught.value.details() or "")


async def test_probes_do_not_wait_behind_inference(running: Running) -> None:
    stuck = running.stub.ModelInfer(request(1.0), timeout=TIMEOUT_S)
    await running.engine.begun()
    assert (await running.stub.ServerLive(pb.ServerLiveRequest(), timeout=20)).live
    assert (await running.stub.ServerReady(pb.ServerReadyRequest(), timeout=20)).ready
    assert (await running.stub.ModelStatistics(pb.ModelStatisticsRequest(), timeout=20)).model_stats[0].name == "m"
    running.engine.open()
    await stuck


async def test_a_stream_answers_in_order_and_errors_take_their_place(running: Running) -> None:
    running.engine.open()
    messages = [request(float(n), name=str(n), model="x" if n == 3 else "m") for n in range(200)]
    responses = [response async for response in running.stub.ModelStreamInfer(stream_of(messages), timeout=TIMEOUT_S)]
    assert [response.infer_response.id for response in responses] == [str(n) for n in range(200)]
    assert all(response.infer_response.parameters["triton_final_response"].bool_param for response in responses)
    failed = [n for n, response in enumerate(responses) if response.error_message]
    assert failed == [3]
    assert responses[3].error_message == "Request for unknown model: 'x' is not found"
    assert first_column(responses[199].infer_response) == [398.0]
    assert max(len(batch) for batch in running.engine.batches) > 1, "a stream's requests run together"


async def test_a_stream_can_be_told_to_fail_as_grpc_does(running: Running) -> None:
    running.engine.open()
    messages = [request(1.0), request(2.0, model="x"), request(3.0)]
    call = running.stub.ModelStreamInfer(
        stream_of(messages), timeout=TIMEOUT_S, metadata=[("triton_grpc_error", "true")]
    )
    assert first_column((await call.read()).infer_response) == [2.0]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_reader_that_does_not_read_holds_back_only_itself(running: Running) -> None:
    """Answers of 1 MiB: what neither the wire nor the stream's places can hold is not read from the client."""
    wide = ready_model(GatedEngine(width=1 << 18, is_open=True), name="wide")
    install(running.catalog, wide)
    sent = 0

    async def messages() -> AsyncIterator[pb.ModelInferRequest]:
        nonlocal sent
        tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 1 << 18])
        message = pb.ModelInferRequest(model_name="wide", inputs=[tensor], raw_input_contents=[bytes(1 << 20)])
        for _ in range(IN_FLIGHT_MAX * 4):
            yield message
            sent += 1

    call = running.stub.ModelStreamInfer(messages(), timeout=TIMEOUT_S)
    before = -1
    while sent != before:
        before = sent
        await asyncio.sleep(0.3)
    assert sent < IN_FLIGHT_MAX * 3
    running.engine.open()
    response = await running.stub.ModelInfer(request(1.0), timeout=TIMEOUT_S)
    assert first_column(response) == [2.0]
    call.cancel()
    await eventually(lambda: not wide.runner.depth)
    wide.runner.abort()


async def test_a_broken_off_stream_withdraws_what_waits(running: Running) -> None:
    call = running.stub.ModelStreamInfer(timeout=TIMEOUT_S)
    await call.write(request(0.0))
    await running.engine.begun()
    for value in (1.0, 2.0, 3.0, 4.0):
        await call.write(request(value))
    batcher = running.catalog.resolve("m", "").runner
    await eventually(lambda: batcher.depth == 4)
    items = list(batcher._queue)
    call.cancel()
    await eventually(lambda: all(item.sink.done() for item in items))
    running.engine.open()
    assert first_column(await running.stub.ModelInfer(request(9.0), timeout=TIMEOUT_S)) == [18.0]
    assert running.engine.batches == [[0.0], [9.0]]


async def test_a_stream_ends_at_a_message_boundary_when_the_server_drains(transport: str) -> None:
    engine = GatedEngine()
    async with (
        inference_server(ready_model(engine), transport=transport) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub: Any = stubs.GRPCInferenceServiceStub(channel)
        call = stub.ModelStreamInfer(timeout=TIMEOUT_S)
        await call.write(request(1.0, name="1"))
        await engine.begun()
        async with asyncio.TaskGroup() as group:
            stopping = group.create_task(server.stop(drain_s=0, grace_s=10))
            await server.draining.wait()
            await asyncio.sleep(0.05)
            engine.open()
            answered = await call.read()
            assert answered.infer_response.id == "1"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "shutting down" in (caught.value.details() or "")
            await stopping


async def test_a_swap_under_load_fails_nobody(transport: str) -> None:
    catalog = Catalog()
    old, new = ready_model(GatedEngine(is_open=True)), ready_model(GatedEngine(is_open=True), version=2)
    async with (
        inference_server(old, catalog=catalog, transport=transport) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub: Any = stubs.GRPCInferenceServiceStub(channel)
        versions: list[str] = []
        stop = False

        async def ask() -> None:
            while not stop:
                versions.append((await stub.ModelInfer(request(1.0), timeout=TIMEOUT_S)).model_version)

        async def swap() -> None:
            nonlocal stop
            await eventually(lambda: len(versions) >= 100)
            install(catalog, new)
            catalog.withdraw("m", 1)
            await old.runner.drain()
            so_far = len(versions)
            await eventually(lambda: len(versions) >= so_far + 100)
            stop = True

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(ask())
            group.create_task(swap())
        assert set(versions) == {"1", "2"}
        assert versions[-1] == "2"
        new.runner.abort()


async def test_metadata_config_statistics_and_index(running: Running) -> None:
    running.engine.open()
    await running.stub.ModelInfer(request(1.0, 2.0, 3.0), timeout=TIMEOUT_S)
    metadata = await running.stub.ModelMetadata(pb.ModelMetadataRequest(name="m"), timeout=TIMEOUT_S)
    assert (metadata.name, list(metadata.versions)) == ("m", ["1"])
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("x", "FP32", [-1, 4])]
    config = (await running.stub.ModelConfig(pb.ModelConfigRequest(name="m"), timeout=TIMEOUT_S)).config
    assert (config.max_batch_size, list(config.input[0].dims)) == (64, [4])
    assert list(config.dynamic_batching.preferred_batch_size) == [8]
    (stats,) = (await running.stub.ModelStatistics(pb.ModelStatisticsRequest(name="m"), timeout=TIMEOUT_S)).model_stats
    assert (stats.inference_count, stats.execution_count) == (3, 1)
    assert stats.inference_stats.success.count == 1
    assert stats.inference_stats.success.ns >= stats.inference_stats.compute_infer.ns > 0
    assert [batch.batch_size for batch in stats.batch_stats] == [3]
    index = await running.stub.RepositoryIndex(pb.RepositoryIndexRequest(), timeout=TIMEOUT_S)
    assert [(m.name, m.version, m.state) for m in index.models] == [("m", "1", "READY")]
    running.catalog.begin("late", 1, total_bytes=1, sha256="")
    running.catalog.fail("late", 1, "it is no model")
    index = await running.stub.RepositoryIndex(pb.RepositoryIndexRequest(), timeout=TIMEOUT_S)
    assert [(m.state, m.reason) for m in index.models if m.name == "late"] == [("UNAVAILABLE", "it is no model")]
    index = await running.stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True), timeout=TIMEOUT_S)
    assert [m.name for m in index.models] == ["m"]


@pytest.mark.parametrize("name", ["../etc", "", "a/b", ".x", "x\n", "x" * 200])
async def test_a_name_that_could_be_a_path_is_refused(name: str, running: Running) -> None:
    for call, message in (
        (running.stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name=name)),
        (running.stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(model_name=name)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(message, timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_control_lists_and_watches(running: Running) -> None:
    control: Any = control_pb2_grpc.InferenceControlServiceStub(running.channel)
    engines = (await control.ListEngines(control_pb2.ListEnginesRequest(), timeout=TIMEOUT_S)).engines
    assert [(engine.name, engine.available) for engine in engines] == [("onnxruntime-cpu", True)]
    watch = control.WatchServedVersions(control_pb2.WatchServedVersionsRequest(parent="models/m"))
    first = (await watch.read()).served_version
    assert (first.name, first.state, first.default_version) == (
        "models/m/versions/1",
        control_pb2.SERVED_STATE_READY,
        True,
    )
    running.catalog.withdraw("m", 1)
    second = (await watch.read()).served_version
    assert second.state == control_pb2.SERVED_STATE_DRAINING
    running.catalog.forget("m", 1)
    assert (await watch.read()).served_version.state == control_pb2.SERVED_STATE_UNLOADED
    watch.cancel()
    listed = await control.ListServedVersions(control_pb2.ListServedVersionsRequest(), timeout=TIMEOUT_S)
    assert list(listed.served_versions) == []


async def test_health_has_a_name_for_every_model_and_version(transport: str) -> None:
    health = HealthStatuses()
    model_health = ModelHealth(health)
    catalog = Catalog(listener=model_health.changed)
    model_health.catalog = catalog
    catalog.begin("m", 1, total_bytes=1, sha256="")
    assert health.status("model:m/1") == health_pb2.HealthCheckResponse.NOT_SERVING
    assert health.status("") == health_pb2.HealthCheckResponse.NOT_SERVING
    engine = GatedEngine(is_open=True)
    started = inference_server(ready_model(engine), catalog=catalog, health=health, transport=transport)
    async with started as server, grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)

        async def status(name: str) -> int:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_S)
            return int(answer.status)

        assert await status("model:m") == health_pb2.HealthCheckResponse.SERVING
        assert await status("model:m/1") == health_pb2.HealthCheckResponse.SERVING
        catalog.withdraw("m", 1)
        assert await status("model:m") == health_pb2.HealthCheckResponse.NOT_SERVING
        catalog.forget("m", 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await status("model:m/1")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
