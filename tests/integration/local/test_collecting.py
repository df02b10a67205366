"""Spans come in over gRPC and over HTTP, and go on to another collector."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from mlmesh_local.addresses import Block, claim
from mlmesh_local.forwarding import EXPORTS_MAX, Export, Forwarder
from mlmesh_local.receiving import receiving
from mlmesh_local.traces import TraceFilter, TraceStore
from mlmesh_runtime.errors import InvalidInput
from mlmesh_runtime.executors import BoundedExecutor

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Elsewhere(trace_service_pb2_grpc.TraceServiceServicer):
    """Another collector: refuses as often as it is told, and keeps what it got."""

    def __init__(self) -> None:
        self.got: asyncio.Queue[Export] = asyncio.Queue()
        self.refusals = 0

    async def Export(self, request: Any, context: Any) -> Any:
        if self.refusals:
            self.refusals -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "later")
        await self.got.put(request)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest_asyncio.fixture
async def elsewhere() -> AsyncIterator[tuple[Elsewhere, str]]:
    servicer = Elsewhere()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servicer, f"http://127.0.0.1:{port}"
    await server.stop(None)


@pytest_asyncio.fixture
async def collector(tmp_path: Path, elsewhere: tuple[Elsewhere, str]) -> AsyncIterator[tuple[Block, TraceStore]]:
    ticks = itertools.count()
    held = claim(str(tmp_path))
    store = TraceStore(tmp_path / "traces.sqlite", clock_ns=lambda: next(ticks))
    executor = BoundedExecutor("traces", workers_max=1)
    async with receiving(held.block, store, executor, otlp_endpoint=elsewhere[1]):
        yield held.block, store
    executor.shutdown()
    store.close()
    held.close()


def export() -> Export:
    request = Export()
    resource = request.resource_spans.add()
    resource.resource.attributes.add(key="service.name").value.string_value = "app"
    span = resource.scope_spans.add().spans.add(name="work", start_time_unix_nano=1, end_time_unix_nano=5)
    span.trace_id, span.span_id = bytes.fromhex(TRACE), bytes.fromhex(SPAN)
    return request


JSON = {
    "resourceSpans": [
        {
            "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "app"}}]},
            "scopeSpans": [
                {"spans": [{"traceId": TRACE, "spanId": SPAN, "name": "work", "startTimeUnixNano": "1", "kind": 2}]}
            ],
        }
    ]
}


async def post(block: Block, body: bytes, kind: str, path: str = "/v1/traces", encoding: str = "identity") -> int:
    def send() -> int:
        headers = {"Content-Type": kind, "Content-Encoding": encoding}
        request = urllib.request.Request(f"http://{block.otlp_http}{path}", data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310  (our own loopback address)
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    return await asyncio.to_thread(send)


@pytest.mark.parametrize("form", ["protobuf", "gzip", "json", "grpc"])
async def test_every_form_of_otlp_is_kept_and_goes_on(
    collector: tuple[Block, TraceStore], elsewhere: tuple[Elsewhere, str], form: str
) -> None:
    block, store = collector
    body = export().SerializeToString()
    elsewhere[0].refusals = 1 if form == "protobuf" else 0
    if form == "grpc":
        async with grpc.aio.insecure_channel(block.otlp) as channel:
            await trace_service_pb2_grpc.TraceServiceStub(channel).Export(export(), timeout=30)  # type: ignore[no-untyped-call]
    elif form == "json":
        assert await post(block, json.dumps(JSON).encode(), "application/json") == 200
    elif form == "gzip":
        assert await post(block, gzip.compress(body), "application/x-protobuf", encoding="gzip") == 200
    else:
        assert await post(block, body, "application/x-protobuf") == 200
    (span,) = store.get_trace(TRACE)
    assert (span.span_id, span.name, span.service) == (SPAN, "work", "app")
    async with asyncio.timeout(10):
        forwarded = await elsewhere[0].got.get()
    assert forwarded.resource_spans[0].scope_spans[0].spans[0].trace_id.hex() == TRACE


async def test_what_is_no_export_is_refused_and_keeps_nothing(collector: tuple[Block, TraceStore]) -> None:
    block, store = collector
    assert await post(block, b"\xff\xff", "application/x-protobuf") == 400
    for body in (b"{", b"1", b"null", b"[]", b"[" * 100_000):
        assert await post(block, body, "application/json") == 400
    assert await post(block, b"", "text/plain") == 415
    assert await post(block, b"", "application/json", path="/v1/logs") == 404
    assert await post(block, b"x", "application/x-protobuf", encoding="gzip") == 400
    assert store.list_traces(10, TraceFilter()) == []


async def test_a_collector_that_is_away_costs_exports_and_no_memory() -> None:
    forwarder = Forwarder("http://127.0.0.1:1")
    for _ in range(EXPORTS_MAX + 5):
        forwarder.put(export())
    assert forwarder.dropped == 5


@pytest.mark.parametrize("text", ["127.0.0.1:4317", "http://a", "ftp://a:1", "http://a:1/v1/traces", "http://a:b"])
def test_a_wrong_endpoint_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="--otlp-endpoint must be"):
        Forwarder(text)
