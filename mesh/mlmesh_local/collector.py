"""OTLP over gRPC into the trace store: Envoy's and the applications' spans end here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from mlmesh_local.forwarding import Forwarder
from mlmesh_local.traces import Span, TraceStore
from mlmesh_runtime.errors import Overloaded
from mlmesh_runtime.executors import BoundedExecutor, run_blocking

_KINDS = {
    trace_pb2.Span.SPAN_KIND_CLIENT: "client",
    trace_pb2.Span.SPAN_KIND_SERVER: "server",
    trace_pb2.Span.SPAN_KIND_PRODUCER: "producer",
    trace_pb2.Span.SPAN_KIND_CONSUMER: "consumer",
}


class TraceServicer(trace_service_pb2_grpc.TraceServiceServicer):
    """OTLP's TraceService. Answers when the spans are kept, so an exporter that is too fast waits."""

    def __init__(self, store: TraceStore, executor: BoundedExecutor, forwarder: Forwarder | None = None) -> None:
        self._store = store
        self._executor = executor
        self._forwarder = forwarder

    async def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Keep spans."""
        try:
            await self.take(request)
        except Overloaded as error:
            # UNAVAILABLE is OTLP's word for "later"; RESOURCE_EXHAUSTED without RetryInfo means "drop".
            await context.abort(grpc.StatusCode.UNAVAILABLE, error.message)
        return trace_service_pb2.ExportTraceServiceResponse()

    async def take(self, request: trace_service_pb2.ExportTraceServiceRequest) -> None:
        """Keep the spans of an export, and send it on where that was asked for. Raises Overloaded."""
        await run_blocking(self._executor, self._store.add, list(spans_of(request.resource_spans)))
        if self._forwarder is not None:
            self._forwarder.put(request)


def spans_of(resources: Iterable[trace_pb2.ResourceSpans]) -> Iterator[Span]:
    """Spans of an export; those without proper ids are left out, as OTLP asks of receivers."""
    for resource in resources:
        service = next((_text(a.value) for a in resource.resource.attributes if a.key == "service.name"), "")
        for scope in resource.scope_spans:
            for span in scope.spans:
                if len(span.trace_id) == 16 and len(span.span_id) == 8:
                    yield _span(span, service)


def _span(span: trace_pb2.Span, service: str) -> Span:
    attributes = {attribute.key: _text(attribute.value) for attribute in span.attributes}
    return Span(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_span_id=span.parent_span_id.hex(),
        name=span.name,
        service=service,
        kind=_KINDS.get(span.kind, "internal"),
        start_ns=span.start_time_unix_nano,
        end_ns=max(span.end_time_unix_nano, span.start_time_unix_nano),
        attributes=attributes,
        error=_error(span, attributes),
        links=tuple(f"{link.trace_id.hex()}/{link.span_id.hex()}" for link in span.links),
    )


def _error(span: trace_pb2.Span, attributes: dict[str, str]) -> str:
    # Envoy sets no status for a gRPC error but writes the code into an attribute.
    code = attributes.get("grpc.status_code") or attributes.get("rpc.grpc.status_code") or ""
    if span.status.code == trace_pb2.Status.STATUS_CODE_ERROR:
        return span.status.message or attributes.get("grpc.message") or f"gRPC status {code}".strip()
    if attributes.get("error") == "true" or code not in {"", "0"}:
        return attributes.get("grpc.message") or (f"gRPC status {code}" if code else "error")
    return ""


def _text(value: common_pb2.AnyValue) -> str:
    kind = value.WhichOneof("value")
    if kind is None:
        return ""
    if kind == "bool_value":
        return "true" if value.bool_value else "false"
    if kind == "bytes_value":
        return value.bytes_value.hex()
    if kind == "array_value":
        return ", ".join(_text(item) for item in value.array_value.values)
    if kind == "kvlist_value":
        return ", ".join(f"{item.key}={_text(item.value)}" for item in value.kvlist_value.values)
    return str(getattr(value, kind))
