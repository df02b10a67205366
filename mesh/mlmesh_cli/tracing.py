"""Client spans: a trace begins where the person's request begins."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, Status, StatusCode, use_span

from mlmesh_runtime.config import Settings
from mlmesh_runtime.telemetry import Telemetry, tracer

SERVICE = "mlmesh-cli"
_FLUSH_S = 2.0
# Under this span a channel records nothing and sends no trace context: only what `request_span` opens is traced.
_UNRECORDED = NonRecordingSpan(SpanContext(trace_id=1, span_id=1, is_remote=False))


@dataclass(slots=True, kw_only=True)
class Traced:
    """A request under a client span; set `error` when it failed."""

    trace_id: str
    error: str = ""


@contextlib.asynccontextmanager
async def exporting(endpoint: str) -> AsyncIterator[None]:
    """Exports client spans to an OTLP collector ("host:port", empty: nowhere) until the block ends."""
    if not endpoint:
        yield
        return
    settings = Settings(
        service=SERVICE, otlp_endpoint=f"http://{endpoint}", traces_sampler="always_on", pod_name=SERVICE
    )
    telemetry = Telemetry.start(settings)
    try:
        with use_span(_UNRECORDED):
            yield
    finally:
        # A collector that is gone must not keep the command: spans are a courtesy.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(telemetry.shutdown), _FLUSH_S)


@contextlib.contextmanager
def request_span(name: str) -> Iterator[Traced]:
    """A root span, sampled; calls made inside are its children. Without an exporter its trace id is empty."""
    with tracer("mlmesh").start_as_current_span(name, context=Context()) as span:
        context = span.get_span_context()
        traced = Traced(trace_id=f"{context.trace_id:032x}" if context.is_valid else "")
        yield traced
        if traced.error:
            span.set_status(Status(StatusCode.ERROR, traced.error))
