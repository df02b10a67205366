"""What a request leaves behind: spans queue, batch and engine when it is sampled, and numbers always."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mlmesh_inference.catalog import Catalog
from mlmesh_inference.statistics import Statistics
from mlmesh_inference.trace_settings import TraceSettings
from mlmesh_inference.tracing import SpanTracer
from mlmesh_runtime.telemetry import REGISTRY, Telemetry
from open_inference import grpc_service_pb2 as pb
from open_inference import grpc_service_pb2_grpc as stubs
from tests.support.inference import GatedEngine, eventually, inference_server, ready_model, rows, submitted
from tests.support.server import settings


@pytest.fixture
def spans() -> Iterator[Any]:
    """A function that gives the spans that ended so far."""
    exporter = InMemorySpanExporter()
    telemetry = Telemetry.start(settings(), exporter=exporter)

    def finished() -> tuple[ReadableSpan, ...]:
        telemetry.flush()
        return exporter.get_finished_spans()

    yield finished
    telemetry.shutdown()


def request(value: float) -> pb.ModelInferRequest:
    return pb.ModelInferRequest(
        model_name="m",
        inputs=[pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 4])],
        raw_input_contents=[rows(value).tobytes()],
    )


def traced(number: int, *, sampled: bool) -> list[tuple[str, str]]:
    return [("traceparent", f"00-{number:032x}-{number:016x}-0{int(sampled)}")]


async def test_sampled_requests_show_queue_batch_and_engine_and_their_batch_mates(spans: Any) -> None:
    engine, catalog = GatedEngine(), Catalog()
    model = ready_model(engine, statistics=Statistics("m", 1, tracer=SpanTracer()))
    async with inference_server(model, catalog=catalog) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = stubs.GRPCInferenceServiceStub(channel)
        first = stub.ModelInfer(request(0.0), timeout=10, metadata=traced(9, sampled=False))
        await engine.begun()
        calls = [stub.ModelInfer(request(n), timeout=10, metadata=traced(n, sampled=True)) for n in (1, 2)]
        calls.append(stub.ModelInfer(request(3.0), timeout=10, metadata=traced(3, sampled=False)))
        await eventually(lambda: model.runner.depth == 3)
        engine.open()
        await asyncio.gather(first, *calls)
    by_trace: dict[int, dict[str, ReadableSpan]] = {}
    for span in spans():
        assert span.context is not None
        by_trace.setdefault(span.context.trace_id, {})[span.name.rpartition("/")[2]] = span
    assert set(by_trace) == {1, 2}, "only what is sampled is written"
    for number, named in by_trace.items():
        assert set(named) == {"ModelInfer", "queue", "batch", "engine"}
        server_span = named["ModelInfer"]
        assert server_span.context is not None
        for name in ("queue", "batch", "engine"):
            parent = named[name].parent
            assert parent is not None
            assert parent.span_id == server_span.context.span_id
        other = by_trace[3 - number]["ModelInfer"].context
        assert other is not None
        assert [link.context.span_id for link in named["batch"].links] == [other.span_id]
        assert named["batch"].attributes is not None
        assert named["batch"].attributes["mlmesh.batch.requests"] == 3
        times = [
            server_span.start_time,
            named["queue"].start_time,
            named["queue"].end_time,
            named["batch"].start_time,
            named["engine"].start_time,
            named["engine"].end_time,
            named["batch"].end_time,
        ]
        assert times == sorted(times, key=lambda time: time or 0)
        assert named["queue"].end_time == named["batch"].start_time


async def test_trace_settings_choose_among_what_callers_sample(spans: Any) -> None:
    engine, catalog, settings = GatedEngine(is_open=True), Catalog(), TraceSettings()
    tracer = SpanTracer(admits=settings.admits)
    model = ready_model(engine, statistics=Statistics("m", 1, tracer=tracer))
    async with (
        inference_server(model, catalog=catalog, traces=settings) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub: Any = stubs.GRPCInferenceServiceStub(channel)
        change = pb.TraceSettingRequest(model_name="m")
        change.settings["trace_rate"].value.append("3")
        change.settings["trace_count"].value.append("2")
        await stub.TraceSetting(change, timeout=10)
        for number in range(1, 13):
            await stub.ModelInfer(request(1.0), timeout=10, metadata=traced(number, sampled=True))
        told = await stub.TraceSetting(pb.TraceSettingRequest(model_name="m"), timeout=10)
        assert list(told.settings["trace_count"].value) == ["0"]
    found = [(span.name.rpartition("/")[2], span.context.trace_id) for span in spans() if span.context]
    assert [trace for name, trace in found if name == "batch"] == [1, 4]
    assert len([trace for name, trace in found if name == "ModelInfer"]) == 12


async def test_numbers_of_a_version_come_and_go_with_it() -> None:
    engine = GatedEngine(is_open=True)
    engine.fail_on = 13.0
    model = ready_model(engine, name="counted")
    labels = {"model": "counted", "version": "1"}

    def sample(name: str, **more: str) -> float | None:
        return REGISTRY.get_sample_value(f"mlmesh_inference_{name}", {**labels, **more})

    assert (await submitted(model.runner, {"x": rows(1.0, 2.0)}, rows=2))[0].shape == (2, 4)
    with pytest.raises(Exception, match="failed on the request"):
        await submitted(model.runner, {"x": rows(13.0)})
    submitted(model.runner, {"x": rows(1.0)}).cancel()
    await model.runner.drain()
    for outcome in ("answered", "failed", "cancelled"):
        assert sample("requests_total", priority="1", outcome=outcome) == 1
    assert sample("batch_rows_sum") == 3
    assert sample("batch_rows_count") == 2
    assert sample("queue_seconds_count", priority="1") == 2
    assert sample("queue_seconds_bucket", priority="1", le="+Inf") == 2
    assert sample("tenant_rows_total", tenant="") == 3
    assert sample("engine_seconds_count") == 2
    model.statistics.watch_depth(lambda: 7, lambda: 70)
    assert sample("queue_depth") == 7
    assert sample("concurrency_limit") == 70
    model.statistics.close()
    assert sample("requests_total", priority="1", outcome="answered") is None
    assert sample("queue_depth") is None
