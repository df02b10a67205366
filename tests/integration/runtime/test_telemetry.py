"""Metrics, traces and logs of real calls."""

import asyncio
import json
import logging
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from io import StringIO
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id

from mlmesh_runtime import errors, logs, telemetry
from mlmesh_runtime.channel import open_channel
from mlmesh_runtime.telemetry import REGISTRY, Telemetry
from tests.support.echo import PROTOS, EchoServicer, Protos, Text, echo_service
from tests.support.server import serving, settings

pytestmark = pytest.mark.usefixtures("each_transport")

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"


class Recording:
    """A running exporter that keeps what it is given."""

    def __init__(self, **changes: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.telemetry = Telemetry.start(settings(**changes), exporter=self.exporter)

    async def spans(self) -> dict[str, Any]:
        assert await asyncio.to_thread(self.telemetry.flush)
        return {f"{span.kind.name} {span.name}": span for span in self.exporter.get_finished_spans()}


@pytest.fixture
def recording() -> Iterator[Recording]:
    running = Recording()
    yield running
    running.telemetry.shutdown()


async def test_metrics_by_method_and_code_over_http(each_transport: str) -> None:
    async def fail(request: Any) -> None:
        if request.text == "missing":
            raise errors.NotFound("no")

    async def three() -> AsyncIterator[Any]:
        for _ in range(3):
            yield Text()

    protos = Protos(f"test.metrics.{each_transport}")
    async with (
        serving(echo_service(EchoServicer(fail, protos), protos), metrics_listen="127.0.0.1:0") as server,
        open_channel(server.address) as channel,
    ):
        stub = protos.stub(channel)
        await stub.Unary(protos.Text())
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Unary(protos.Text(text="missing"))
        [_ async for _ in stub.Chat(three())]
        [_ async for _ in stub.Expand(protos.Text(count=4))]
        page = await asyncio.to_thread(_get, f"http://{server.metrics_address}/metrics")
    echo = f'grpc_service="test.metrics.{each_transport}.Echo"'
    unary = f'grpc_method="Unary",{echo},grpc_type="unary"'
    chat = f'grpc_method="Chat",{echo},grpc_type="bidi_stream"'
    expand = f'grpc_method="Expand",{echo},grpc_type="server_stream"'
    for line in (
        f"grpc_server_started_total{{{unary}}} 2.0",
        f"grpc_server_handling_seconds_count{{{unary}}} 2.0",
        f'grpc_server_handled_total{{grpc_code="OK",{unary}}} 1.0',
        f'grpc_server_handled_total{{grpc_code="NOT_FOUND",{unary}}} 1.0',
        f"grpc_server_msg_received_total{{{chat}}} 3.0",
        f"grpc_server_msg_sent_total{{{chat}}} 3.0",
        f"grpc_server_msg_sent_total{{{expand}}} 4.0",
        "process_resident_memory_bytes",
    ):
        assert line in page or _sorted_line(line) in page, line


async def test_durations_lead_to_traces_where_openmetrics_is_asked_for(
    recording: Recording, each_transport: str
) -> None:
    protos = Protos(f"test.exemplars.{each_transport}")
    async with (
        serving(echo_service(EchoServicer(protos=protos), protos), metrics_listen="127.0.0.1:0") as server,
        open_channel(server.address) as channel,
    ):
        stub = protos.stub(channel)
        await stub.Unary(protos.Text(), timeout=30, metadata=(("traceparent", UNSAMPLED),))
        await stub.Unary(protos.Text(), timeout=30, metadata=(("traceparent", SAMPLED),))
        page = f"http://{server.metrics_address}/metrics"
        plain = await asyncio.to_thread(_get, page)
        asked = await asyncio.to_thread(_get, page, "application/openmetrics-text; version=1.0.0")
    spans = await recording.spans()
    (span,) = [span for name, span in spans.items() if name.startswith("SERVER")]
    of_method = f'grpc_service="test.exemplars.{each_transport}.Echo"'
    buckets = [line for line in asked.splitlines() if "handling_seconds_bucket" in line and of_method in line]
    (exemplar,) = [line.partition(" # ")[2] for line in buckets if " # " in line]
    ids = f'{{span_id="{format_span_id(span.context.span_id)}",trace_id="{TRACE}"}}'
    assert exemplar.startswith(f"{ids} ")
    assert TRACE not in plain
    assert asked.rstrip().endswith("# EOF")


def _get(url: str, accept: str = "*/*") -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": accept}), timeout=30) as response:  # noqa: S310  our own loopback address
        return str(response.read().decode())


def _sorted_line(line: str) -> str:
    """The same sample with its labels in the order in which they were declared."""
    name, _, rest = line.partition("{")
    labels, _, value = rest.partition("}")
    order = ["grpc_type", "grpc_service", "grpc_method", "grpc_code"]
    pairs = sorted(labels.split(","), key=lambda pair: order.index(pair.partition("=")[0]))
    return f"{name}{{{','.join(pairs)}}}{value}"


async def test_cancelled_and_late_calls_are_counted_as_such() -> None:
    protos = Protos("test.cancelled")

    async def hang(_: Any) -> None:
        await asyncio.Event().wait()

    def handled(code: str) -> float:
        labels = {"grpc_type": "unary", "grpc_service": "test.cancelled.Echo", "grpc_method": "Unary"}
        return REGISTRY.get_sample_value("grpc_server_handled_total", {**labels, "grpc_code": code}) or 0.0

    servicer = EchoServicer(hang, protos)
    async with serving(echo_service(servicer, protos)) as server, open_channel(server.address) as channel:
        stub = protos.stub(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Unary(protos.Text(), timeout=0.1)
        call = stub.Unary(protos.Text(), timeout=30)
        async with asyncio.timeout(30):
            while servicer.calls < 2:  # noqa: ASYNC110  the handler has no event of its own
                await asyncio.sleep(0)
            call.cancel()
            while not (handled("CANCELLED") and handled("DEADLINE_EXCEEDED")):  # noqa: ASYNC110
                await asyncio.sleep(0)
    assert handled("OK") == 0


async def test_a_sampled_call_is_one_trace_through_two_servers(recording: Recording) -> None:
    async with serving(echo_service()) as second, open_channel(second.address) as onward:

        async def outer(_: Any) -> None:
            with telemetry.span("batch", attributes={"rows": 3}):
                await PROTOS.stub(onward).Unary(Text())

        async with serving(echo_service(EchoServicer(outer))) as first, open_channel(first.address) as channel:
            await PROTOS.stub(channel).Collect(_one(), metadata=(("traceparent", SAMPLED),))
    spans = await recording.spans()
    assert set(spans) == {
        "SERVER test.echo.Echo/Collect",
        "INTERNAL batch",
        "CLIENT test.echo.Echo/Unary",
        "SERVER test.echo.Echo/Unary",
    }
    assert {format_trace_id(span.context.trace_id) for span in spans.values()} == {TRACE}
    chain = [spans[name] for name in ("SERVER test.echo.Echo/Collect", "INTERNAL batch", "CLIENT test.echo.Echo/Unary")]
    assert format_span_id(chain[0].parent.span_id) == PARENT
    assert chain[1].parent.span_id == chain[0].context.span_id
    assert chain[2].parent.span_id == chain[1].context.span_id
    assert spans["SERVER test.echo.Echo/Unary"].parent.span_id == chain[2].context.span_id
    assert spans["SERVER test.echo.Echo/Unary"].attributes["rpc.grpc.status_code"] == 0
    assert spans["INTERNAL batch"].attributes["rows"] == 3
    assert spans["SERVER test.echo.Echo/Unary"].resource.attributes["service.name"] == "test"


async def _one() -> AsyncIterator[Any]:
    yield Text()


async def test_what_the_caller_did_not_sample_is_passed_on_and_not_recorded(recording: Recording) -> None:
    seen: dict[str, Any] = {}

    class Second(EchoServicer):
        async def Unary(self, request: Any, context: Any) -> Any:
            seen.update(dict(context.invocation_metadata()))
            return request

    async with serving(echo_service(Second())) as second, open_channel(second.address) as onward:

        async def outer(_: Any) -> None:
            await PROTOS.stub(onward).Unary(Text())

        async with serving(echo_service(EchoServicer(outer))) as first, open_channel(first.address) as channel:
            metadata = (("traceparent", UNSAMPLED), ("tracestate", "a=b"), ("x-request-id", "r-1"))
            await PROTOS.stub(channel).Unary(Text(), metadata=metadata)
            await PROTOS.stub(channel).Unary(Text())
    assert (seen.get("traceparent"), seen.get("tracestate")) in ((UNSAMPLED, "a=b"), (None, None))
    assert await recording.spans() == {}


async def test_context_is_passed_on_without_any_exporter() -> None:
    seen: list[dict[str, Any]] = []

    class Second(EchoServicer):
        async def Unary(self, request: Any, context: Any) -> Any:
            seen.append(dict(context.invocation_metadata()))
            return request

    async with serving(echo_service(Second())) as second, open_channel(second.address) as onward:

        async def outer(_: Any) -> None:
            await PROTOS.stub(onward).Unary(Text(), metadata=(("x-request-id", "own"), ("x-other", "kept")))

        async with serving(echo_service(EchoServicer(outer))) as first, open_channel(first.address) as channel:
            metadata = (("traceparent", SAMPLED), ("x-request-id", "callers"), ("x-secret", "not passed on"))
            await PROTOS.stub(channel).Unary(Text(), metadata=metadata)
    assert seen[0]["traceparent"] == SAMPLED
    assert seen[0]["x-request-id"] == "own"
    assert seen[0]["x-other"] == "kept"
    assert "x-secret" not in seen[0]


async def test_always_on_begins_traces_and_failures_are_marked() -> None:
    recording = Recording(traces_sampler="always_on")
    try:

        async def fail(_: Any) -> None:
            raise RuntimeError("bug")

        async with serving(echo_service(EchoServicer(fail))) as server, open_channel(server.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await PROTOS.stub(channel).Unary(Text())
        spans = await recording.spans()
        client, server_span = spans["CLIENT test.echo.Echo/Unary"], spans["SERVER test.echo.Echo/Unary"]
        assert client.parent is None
        assert server_span.parent.span_id == client.context.span_id
        for span in (client, server_span):
            assert span.attributes["rpc.grpc.status_code"] == 13
            assert span.status.status_code is StatusCode.ERROR
    finally:
        recording.telemetry.shutdown()


async def test_spans_leave_by_otlp() -> None:
    """A real OTLP/gRPC collector's end, with the stubs of opentelemetry-proto."""
    received: list[Any] = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        async def Export(self, request: Any, _context: Any) -> Any:
            received.append(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    collector = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), collector)
    port = collector.add_insecure_port("127.0.0.1:0")
    await collector.start()
    running = Telemetry.start(settings(otlp_endpoint=f"http://127.0.0.1:{port}", pod_name="pod-0"))
    try:
        async with serving(echo_service()) as server, open_channel(server.address) as channel:
            await PROTOS.stub(channel).Unary(Text(), metadata=(("traceparent", SAMPLED),))
        assert await asyncio.to_thread(running.flush)
    finally:
        await asyncio.to_thread(running.shutdown)
        await collector.stop(0)
    resource = received[0].resource_spans[0]
    attributes = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert (attributes["service.name"], attributes["service.instance.id"]) == ("test", "pod-0")
    span = resource.scope_spans[0].spans[0]
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.name) == (TRACE, PARENT, "test.echo.Echo/Unary")


def test_a_collector_that_is_away_holds_nothing_up() -> None:
    running = Telemetry.start(settings(otlp_endpoint="http://127.0.0.1:9", traces_sampler="always_on"))
    with telemetry.span("lost"):
        pass
    began = time.monotonic()
    running.shutdown()
    assert time.monotonic() - began < 10


def test_spans_of_the_past_with_links() -> None:
    recording = Recording(traces_sampler="always_on")
    try:
        with telemetry.span("request") as request:
            parent = telemetry.current_context()
            assert telemetry.sampled(parent)
        now = time.time_ns()
        batch = telemetry.record_span("batch", start_ns=now - 2000, end_ns=now - 1000)
        telemetry.record_span("queue", start_ns=now - 3000, end_ns=now - 2000, parent=parent, links=[batch])
        recording.telemetry.flush()
        spans = {span.name: span for span in recording.exporter.get_finished_spans()}
    finally:
        recording.telemetry.shutdown()
    assert (spans["queue"].start_time, spans["queue"].end_time) == (now - 3000, now - 2000)
    assert spans["queue"].parent.span_id == request.get_span_context().span_id
    assert spans["queue"].links[0].context.span_id == batch.span_id
    assert spans["queue"].kind is SpanKind.INTERNAL


def test_without_an_exporter_spans_are_free_and_nothing_breaks() -> None:
    with telemetry.span("nothing") as span:
        assert not span.is_recording()
    assert not telemetry.tracing()
    Telemetry.start(settings()).shutdown()


@pytest.mark.parametrize("header", ["", "garbage", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "00-zz-yy-01" * 6])
async def test_a_garbled_trace_context_is_ignored(header: str, recording: Recording) -> None:
    async with serving(echo_service()) as server, open_channel(server.address) as channel:
        answer = await PROTOS.stub(channel).Unary(Text(text="fine"), metadata=(("traceparent", header),))
    assert answer.text == "fine"
    assert all(span.parent is None for span in (await recording.spans()).values())


async def test_logs_are_json_with_the_requests_trace_ids() -> None:
    stream = StringIO()
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        logs.configure(settings(log_level="info", pod_name="pod-0"), stream)

        async def note(_: Any) -> None:
            logging.getLogger("mlmesh_test").info("noted", extra={"rows": 3, "path": object})
            try:
                raise ValueError("why")
            except ValueError:
                logging.getLogger("mlmesh_test").exception("failed")

        async with serving(echo_service(EchoServicer(note))) as server, open_channel(server.address) as channel:
            await PROTOS.stub(channel).Unary(Text(), metadata=(("traceparent", UNSAMPLED),))
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    entries = {entry["event"]: entry for entry in map(json.loads, stream.getvalue().splitlines())}
    assert entries["listening"]["address"] == server.address
    noted = entries["noted"]
    assert (noted["trace_id"], noted["span_id"], noted["rows"]) == (TRACE, PARENT, 3)
    assert (noted["service"], noted["pod"], noted["level"]) == ("test", "pod-0", "info")
    assert "ValueError: why" in entries["failed"]["exception"]
    assert "trace_id" not in entries["listening"]


def test_text_logs_are_one_line_for_people() -> None:
    record = logging.makeLogRecord({"name": "x", "levelname": "INFO", "msg": "hello %s", "args": ("you",), "rows": 3})
    assert logs.TextFormatter().format(record).endswith("info    x  hello you  rows=3")
