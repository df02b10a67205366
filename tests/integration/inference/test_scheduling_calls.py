"""Refusals and load reports over gRPC, on both transports, with gRPC's own retries as the client."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from mlmesh.inference.v1 import control_pb2, control_pb2_grpc
from mlmesh_inference.catalog import ReadyModel
from mlmesh_inference.config import ProtocolSettings
from mlmesh_runtime import orca
from open_inference import grpc_service_pb2 as pb
from open_inference import grpc_service_pb2_grpc as stubs
from tests.support.inference import GatedEngine, eventually, inference_server, ready_model, rows
from tests.support.raw_http2 import connected, framed
from tests.support.raw_http2 import request as call_headers

pytestmark = pytest.mark.usefixtures("each_transport")

RETRIES = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": "inference.GRPCInferenceService"}],
                "retryPolicy": {
                    "maxAttempts": 3,
                    # Only the server's word can make it wait this short.
                    "initialBackoff": "30s",
                    "maxBackoff": "30s",
                    "backoffMultiplier": 1,
                    "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
                },
            }
        ]
    }
)


def request(value: float, **parameters: int) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(
        model_name="m",
        inputs=[pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 4])],
        raw_input_contents=[rows(value).tobytes()],
    )
    for name, number in parameters.items():
        message.parameters[name].int64_param = number
    return message


@asynccontextmanager
async def served(model: ReadyModel, *options: tuple[str, Any], **protocol: Any) -> AsyncIterator[Any]:
    """A stub of a server with this model."""
    async with (
        inference_server(model, protocol=ProtocolSettings(**protocol)) as server,
        grpc.aio.insecure_channel(server.address, options=options) as channel,
    ):
        yield stubs.GRPCInferenceServiceStub(channel), channel


def told(error: grpc.aio.AioRpcError) -> tuple[str, float, int]:
    """Reason, seconds of RetryInfo and milliseconds of the pushback."""
    trailers: Any = error.trailing_metadata() or ()
    found = dict(trailers)
    status = status_pb2.Status.FromString(found["grpc-status-details-bin"])
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(retry)
    return info.reason, retry.retry_delay.ToNanoseconds() / 1e9, int(found["grpc-retry-pushback-ms"])


async def refused(call: Any) -> tuple[str, float, int]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    return told(caught.value)


async def test_a_full_queue_is_told_with_its_reason_and_when_to_come_back() -> None:
    engine = GatedEngine()
    model = ready_model(engine, queue_items_max=1)
    async with served(model) as (stub, _):
        running = stub.ModelInfer(request(1.0), timeout=20)
        await engine.begun()
        waiting = stub.ModelInfer(request(2.0), timeout=20)
        await eventually(lambda: model.runner.depth == 1)
        reason, retry_s, pushback_ms = await refused(stub.ModelInfer(request(3.0), timeout=20))
        assert reason == "QUEUE_FULL"
        assert 0.01 <= retry_s <= pushback_ms / 1000 <= retry_s + 0.001
        engine.open()
        await asyncio.gather(running, waiting)


async def test_grpcs_own_retries_wait_as_long_as_they_are_told() -> None:
    engine = GatedEngine()
    model = ready_model(engine, queue_items_max=1)
    async with served(model, ("grpc.service_config", RETRIES)) as (stub, _):
        running = stub.ModelInfer(request(1.0), timeout=20)
        await engine.begun()
        waiting = stub.ModelInfer(request(2.0), timeout=20)
        await eventually(lambda: model.runner.depth == 1)
        begun = time.monotonic()
        refused_first = stub.ModelInfer(request(3.0), timeout=20)
        await eventually(lambda: model.statistics.fail.count == 1)
        engine.open()
        assert (await refused_first).outputs[0].name == "y"
        elapsed = time.monotonic() - begun
        assert 0.01 <= elapsed < 15, "not at once, and long before the backoff of its own policy"
        await asyncio.gather(running, waiting)


async def test_who_cannot_be_in_time_is_told_so_at_once() -> None:
    engine = GatedEngine()
    model = ready_model(engine, rows_preferred=1)
    async with served(model) as (stub, _):
        known = model.runner._admission  # type: ignore[attr-defined]
        known.pace.observe(1, 20_000_000_000)  # as if it had taken twenty seconds
        known._refresh()
        running = stub.ModelInfer(request(2.0), timeout=600)
        await engine.begun()
        waiting = [stub.ModelInfer(request(3.0 + n), timeout=600) for n in range(3)]
        await eventually(lambda: model.runner.depth == 3)
        begun = time.monotonic()
        reason, retry_s, _ = await refused(stub.ModelInfer(request(9.0), timeout=30))
        assert time.monotonic() - begun < 25, "it did not wait for its deadline"
        assert (reason, retry_s > 0) == ("WOULD_EXPIRE", True)
        urgent = stub.ModelInfer(request(8.0), timeout=600)
        engine.open()
        await asyncio.gather(running, urgent, *waiting)
        assert [9.0] not in engine.batches


async def test_the_limit_is_shown_and_its_refusal_named() -> None:
    engine = GatedEngine()
    model = ready_model(engine)
    async with served(model) as (stub, channel):
        control: Any = control_pb2_grpc.InferenceControlServiceStub(channel)
        asked = control_pb2.GetServedVersionRequest(name="models/m/versions/1")
        assert (await control.GetServedVersion(asked, timeout=20)).served_version.concurrency_limit == 256 + 8
        admission = model.runner._admission  # type: ignore[attr-defined]
        admission.limiter.limit = admission.limit = 1
        assert (await control.GetServedVersion(asked, timeout=20)).served_version.concurrency_limit == 1
        running = stub.ModelInfer(request(1.0), timeout=20)
        await engine.begun()
        assert (await refused(stub.ModelInfer(request(2.0), timeout=20)))[0] == "CONCURRENCY_LIMIT"
        engine.open()
        await running


async def test_priority_and_timeout_of_requests_reach_the_queue() -> None:
    engine = GatedEngine()
    model = ready_model(engine, rows_preferred=1, levels=2, level_default=2)
    async with served(model) as (stub, _):
        running = stub.ModelInfer(request(1.0), timeout=20)
        await engine.begun()
        calls = [stub.ModelInfer(request(2.0, timeout=1), timeout=20), stub.ModelInfer(request(3.0), timeout=20)]
        await eventually(lambda: model.runner.depth == 2)
        calls.append(stub.ModelInfer(request(4.0, priority=1), timeout=20))
        await eventually(lambda: model.runner.depth == 3)
        engine.open()
        expired, *answered = await asyncio.gather(*calls, return_exceptions=True)
        await running
    assert isinstance(expired, grpc.aio.AioRpcError)
    assert expired.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not any(isinstance(answer, BaseException) for answer in answered)
    assert engine.batches == [[1.0], [4.0], [3.0]]


async def test_probes_and_statistics_do_not_wait_behind_inference() -> None:
    engine = GatedEngine()
    model = ready_model(engine, queue_items_max=4)
    async with served(model) as (stub, channel):
        calls = [stub.ModelInfer(request(1.0), timeout=20)]
        await engine.begun()
        calls += [stub.ModelInfer(request(2.0 + n), timeout=20) for n in range(4)]
        await eventually(lambda: model.runner.depth == 4)
        assert (await stub.ServerLive(pb.ServerLiveRequest(), timeout=20)).live
        assert (await stub.ModelReady(pb.ModelReadyRequest(name="m"), timeout=20)).ready
        (statistics,) = (await stub.ModelStatistics(pb.ModelStatisticsRequest(name="m"), timeout=20)).model_stats
        assert statistics.inference_count == 0
        control: Any = control_pb2_grpc.InferenceControlServiceStub(channel)
        asked = control_pb2.GetServedVersionRequest(name="models/m/versions/1")
        assert (await control.GetServedVersion(asked, timeout=20)).served_version.queue_depth == 4
        assert not any(call.done() for call in calls)
        engine.open()
        await asyncio.gather(*calls)


async def test_load_reports_come_out_of_band_at_once_and_again() -> None:
    engine = GatedEngine()
    model = ready_model(engine, queue_items_max=4)
    async with served(model) as (stub, channel):
        calls = [stub.ModelInfer(request(1.0), timeout=20)]
        await engine.begun()
        calls += [stub.ModelInfer(request(2.0 + n), timeout=20) for n in range(2)]
        await eventually(lambda: model.runner.depth == 2)
        wanted = orca.OrcaLoadReportRequest()
        wanted.report_interval.nanos = 1  # less than the server's least
        stream = channel.unary_stream(
            f"/{orca.SERVICE}/{orca.METHOD}",
            request_serializer=orca.OrcaLoadReportRequest.SerializeToString,
            response_deserializer=orca.OrcaLoadReport.FromString,
        )(wanted)
        first = await stream.read()
        assert first.application_utilization == pytest.approx(0.5)
        assert first.utilization["mlmesh.queue_fill"] == pytest.approx(0.5)
        assert first.named_metrics["mlmesh.m/1.queue_fill"] == pytest.approx(0.5)
        engine.open()
        await asyncio.gather(*calls)
        second = await stream.read()
        assert second.utilization["mlmesh.queue_fill"] == 0
        assert second.rps_fractional > 0
        assert second.named_metrics["mlmesh.m/1.engine_busy"] > 0
        assert second.mem_utilization > 0
        stream.cancel()


@pytest.mark.parametrize("asked", [True, False])
async def test_load_reports_go_with_answers_and_refusals_where_the_server_is_told_so(asked: bool) -> None:
    engine = GatedEngine(is_open=True)
    model = ready_model(engine)
    sent = framed(request(1.0).SerializeToString())
    headers = call_headers("/inference.GRPCInferenceService/ModelInfer")
    async with (
        inference_server(model, protocol=ProtocolSettings(load_trailers=asked)) as server,
        # gRPC's own clients keep the report to themselves, for their balancers.
        connected(server.address) as connection,
    ):
        answered = await connection.call(headers, [sent])
        model.runner.abort()
        refused = await connection.call(headers, [sent])
        live = call_headers("/inference.GRPCInferenceService/ServerLive")
        ordinary = await connection.call(live, [framed(b"")])
    assert [answered.status, refused.status, ordinary.status] == [0, 14, 0]
    for answer in (answered, refused, ordinary):
        found = answer.headers[-1].get(orca.TRAILER)
        assert (found is not None) == asked
        if found is not None:
            report = orca.OrcaLoadReport.FromString(base64.b64decode(found + "=" * (-len(found) % 4)))
            assert report.mem_utilization > 0
            assert "mlmesh.m/1.queue_fill" in report.named_metrics
