"""Metrics, traces and their lifetime. Logs are in `mlmesh_runtime.logs`.

Traces follow the W3C trace context in the metadata. By default a span is recorded only where the caller's *sampled*
flag is set, so an unsampled request costs no more than reading one header.

Metrics live in `REGISTRY`. Whoever scrapes them as OpenMetrics (by `Accept`) gets exemplars, too: with each bucket of
the RPCs' durations the trace of a call that fell into it. A TLS handshake that gRPC refuses is not visible to a Python
server, hence in no metric here: look at the sidecar's ``ssl.*`` statistics, or at the refused client.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from wsgiref.simple_server import WSGIServer

import grpc
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    ParentBased,
    Sampler,
    TraceIdRatioBased,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mlmesh_runtime.calls import Call
from mlmesh_runtime.config import Settings, split_address

logger = logging.getLogger(__name__)

REGISTRY = CollectorRegistry()


class _Bulk(Collector):
    """Sources that count by themselves and add to the metrics only when somebody looks. First in the registry."""

    def __init__(self) -> None:
        self._sources: list[Callable[[], None]] = []

    def add(self, source: Callable[[], None]) -> None:
        """Ask this one too, on whatever thread looks."""
        self._sources = [*self._sources, source]

    def remove(self, source: Callable[[], None]) -> None:
        """Ask it one last time."""
        source()
        self._sources = [other for other in self._sources if other is not source]

    def collect(self) -> Iterator[Metric]:
        """No metrics of its own."""
        for source in self._sources:
            source()
        return iter(())

    def describe(self) -> Iterator[Metric]:
        """No metrics of its own."""
        return iter(())


BULK = _Bulk()
REGISTRY.register(BULK)
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)

_METHOD = ("grpc_type", "grpc_service", "grpc_method")
RPC_STARTED = Counter("grpc_server_started", "RPCs begun.", _METHOD, registry=REGISTRY)
RPC_HANDLED = Counter("grpc_server_handled", "RPCs ended, by status code.", (*_METHOD, "grpc_code"), registry=REGISTRY)
RPC_SECONDS = Histogram(
    "grpc_server_handling_seconds",
    "Time from the handler's start to its end, seconds.",
    _METHOD,
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
    registry=REGISTRY,
)
MESSAGES_RECEIVED = Counter("grpc_server_msg_received", "Messages received on streams.", _METHOD, registry=REGISTRY)
MESSAGES_SENT = Counter("grpc_server_msg_sent", "Messages sent on streams.", _METHOD, registry=REGISTRY)
RPC_IN_FLIGHT = Gauge(
    "mlmesh_server_rpcs_in_flight", "RPCs being handled, health and reflection apart.", registry=REGISTRY
)
TRANSPORT = Gauge(
    "mlmesh_server_transport_info",
    "1 for the transport that serves, and why it does.",
    ("transport", "reason"),
    registry=REGISTRY,
)
CONNECTIONS_ENDED = Counter(
    "mlmesh_server_connections_ended",
    "Connections ended by the native transport for what their peer did: floods of control frames or resets, silence.",
    ("reason",),
    registry=REGISTRY,
)
TLS_RELOADS = Counter(
    "mlmesh_tls_reloads",
    "Changed certificate files: taken (ok), or unusable and the old certificate kept (refused).",
    ("outcome",),
    registry=REGISTRY,
)
TLS_EXPIRY = Gauge(
    "mlmesh_tls_certificate_expiry_timestamp_seconds",
    "When the served certificate expires, Unix time.",
    registry=REGISTRY,
)


def observe_many(histogram: Histogram, counts: Sequence[int], seconds: float) -> None:
    """Add observations counted elsewhere: how many fell into each bucket (the last is +Inf), and their sum."""
    # The library has no public way; a test holds this one to what its `observe` does.
    buckets: Sequence[Any] = histogram._buckets
    for bucket, count in zip(buckets, counts, strict=True):
        if count:
            bucket.inc(count)
    histogram._sum.inc(seconds)


_PROPAGATOR = TraceContextTextMapPropagator()
FORCE_HEADER = "x-client-trace-id"
"""By it a client of Envoy has its request traced (client sampling, which Istio leaves at 100 %)."""


def tracer(name: str) -> trace.Tracer:
    """A tracer of the process's provider. Spans are dropped where no exporter is configured."""
    return _State.tracer(name)


class _State:
    """The running provider. Not OpenTelemetry's global one: that can be set once a process, and tests need many."""

    provider: TracerProvider | None = None
    follows: bool = True
    """Whether only what a caller sampled is recorded."""

    @classmethod
    def tracer(cls, name: str) -> trace.Tracer:
        return trace.NoOpTracer() if cls.provider is None else cls.provider.get_tracer(name)


def tracing() -> bool:
    """Whether spans can be recorded at all in this process."""
    return _State.provider is not None


def recording() -> int:
    """Of which calls spans are recorded: 0 none, 1 those that their caller sampled, 2 perhaps any."""
    if _State.provider is None:
        return 0
    return 1 if _State.follows else 2


def current_context() -> otel_context.Context:
    """The trace context to hand to work that another task does: `span(..., parent=...)`, links."""
    return otel_context.get_current()


def sampled(context: otel_context.Context | None = None) -> bool:
    """Whether spans under this context are recorded; cheap, to skip measuring what nobody will see."""
    return trace.get_current_span(context).is_recording()


@contextlib.contextmanager
def span(
    name: str,
    *,
    parent: otel_context.Context | None = None,
    links: Sequence[trace.SpanContext] = (),
    attributes: Mapping[str, Any] | None = None,
) -> Iterator[trace.Span]:
    """An internal span around a block. Exceptions are recorded and pass on. Free when nothing is sampled."""
    if _State.provider is None:
        yield trace.INVALID_SPAN
        return
    with tracer("mlmesh").start_as_current_span(
        name, context=parent, links=[trace.Link(link) for link in links], attributes=attributes
    ) as opened:
        yield opened


def record_span(
    name: str,
    *,
    start_ns: int,
    end_ns: int,
    parent: otel_context.Context | None = None,
    links: Sequence[trace.SpanContext] = (),
    attributes: Mapping[str, Any] | None = None,
) -> trace.SpanContext:
    """A span of something already over, with explicit Unix times in nanoseconds. Returns its context, for links."""
    opened = tracer("mlmesh").start_span(
        name,
        context=parent,
        links=[trace.Link(link) for link in links],
        attributes=attributes,
        start_time=start_ns,
    )
    opened.end(end_ns)
    return opened.get_span_context()


def extract(traceparent: str | None, tracestate: str | None) -> otel_context.Context:
    """The remote parent named by W3C headers; an empty context when there is none or it does not parse."""
    carrier = {"traceparent": traceparent or "", "tracestate": tracestate or ""}
    return _PROPAGATOR.extract(carrier, context=otel_context.Context())


def inject(context: otel_context.Context | None = None) -> dict[str, str]:
    """W3C headers of the current (or given) span; empty when there is none.

    What is sampled also tells Envoy so in its own way: in spite of the W3C headers Envoy (measured with 1.40) follows
    its own draw, and a mesh that samples 1 % cuts the trace at its first sidecar.
    """
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, context=context)
    found = trace.get_current_span(context).get_span_context()
    if carrier and found.trace_flags.sampled:
        carrier[FORCE_HEADER] = f"{found.trace_id:032x}"
    return carrier


class ServerSpan:
    """The span of one RPC in a server, a child of what the caller's trace context names."""

    __slots__ = ("_span", "_token")

    def __init__(self, span: trace.Span, token: Any) -> None:
        self._span = span
        self._token = token

    @classmethod
    def begin(cls, call: Call, service: str, method: str) -> ServerSpan | None:
        """Open the span and make it current; None where nobody will record it."""
        traceparent = call.header("traceparent")
        if _State.follows and (traceparent is None or not _is_sampled(traceparent)):
            return None
        parent = extract(traceparent, call.header("tracestate"))
        opened = tracer("mlmesh").start_span(
            f"{service}/{method}",
            context=parent,
            kind=trace.SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
        )
        return cls(opened, otel_context.attach(trace.set_span_in_context(opened, parent)))

    def exemplar(self) -> dict[str, str] | None:
        """What leads from a histogram to this call's trace; None where the trace is not recorded."""
        context = self._span.get_span_context()
        if not context.trace_flags.sampled:
            return None
        return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}

    def end(self, code: str) -> None:
        """Close the span with the RPC's status code."""
        end_rpc_span(self._span, code, faults=_SERVER_FAULTS)
        otel_context.detach(self._token)


def client_span(method: str) -> trace.Span | None:
    """A span for an outgoing call of "/package.Service/Method"; None where nobody will record it."""
    current = trace.get_current_span()
    if not current.is_recording() and (_State.follows or current.get_span_context().is_valid):
        return None
    service, _, name = method.lstrip("/").partition("/")
    return tracer("mlmesh").start_span(
        f"{service}/{name}",
        kind=trace.SpanKind.CLIENT,
        attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
    )


def end_rpc_span(span: trace.Span, code: str, *, faults: frozenset[str] | None = None) -> None:
    """Close a span of an RPC. A code in `faults` (default: all but OK) marks it failed."""
    span.set_attribute("rpc.grpc.status_code", grpc.StatusCode[code].value[0])
    if code != "OK" and (faults is None or code in faults):
        span.set_status(trace.StatusCode.ERROR, code)
    span.end()


# The other codes are the caller's doing (OpenTelemetry semantic conventions for gRPC servers).
_SERVER_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})


def _is_sampled(traceparent: str) -> bool:
    """The sampled flag of a W3C traceparent, ``00-{32 hex}-{16 hex}-{2 hex}``, without parsing the rest."""
    return len(traceparent) >= 55 and traceparent[54] in "13579bdf"


class Telemetry:
    """The process's trace export and metrics endpoint. `start` once, `shutdown` last.

    Args:
        settings: where to, and who decides to record.
        exporter: instead of OTLP, for tests.
    """

    def __init__(self, settings: Settings, *, exporter: SpanExporter | None = None) -> None:
        self._settings = settings
        self._exporter = exporter
        self._provider: TracerProvider | None = None

    @classmethod
    def start(cls, settings: Settings, *, exporter: SpanExporter | None = None) -> Telemetry:
        """Begin to export spans, when an endpoint (or exporter) is given."""
        telemetry = cls(settings, exporter=exporter)
        telemetry._begin()
        return telemetry

    def _begin(self) -> None:
        exporter = self._exporter
        if exporter is None:
            if not self._settings.otlp_endpoint:
                return
            exporter = OTLPSpanExporter(
                endpoint=self._settings.otlp_endpoint,
                insecure=self._settings.otlp_endpoint.startswith("http://"),
                timeout=2,
            )
        attributes = {
            "service.name": self._settings.service,
            "service.namespace": self._settings.pod_namespace,
            "service.instance.id": self._settings.pod_name or self._settings.service,
        }
        self._provider = TracerProvider(
            sampler=_sampler(self._settings), resource=Resource.create(attributes), shutdown_on_exit=False
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, max_queue_size=4096, schedule_delay_millis=500, max_export_batch_size=512)
        )
        _State.provider = self._provider
        _State.follows = self._settings.traces_sampler in ("parentbased_always_off", "always_off")

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Send what is recorded; True when all of it left. Blocks: call it on a thread."""
        return self._provider is None or self._provider.force_flush(int(timeout_s * 1000))

    def shutdown(self) -> None:
        """Send what is recorded and stop. Blocks for a few seconds at most."""
        if self._provider is None:
            return
        if _State.provider is self._provider:
            _State.provider = None
        self._provider.shutdown()
        self._provider = None


def _sampler(settings: Settings) -> Sampler:
    ratio = TraceIdRatioBased(settings.traces_sampler_ratio)
    return {
        "parentbased_always_off": ParentBased(ALWAYS_OFF),
        "parentbased_always_on": ParentBased(ALWAYS_ON),
        "parentbased_traceidratio": ParentBased(ratio),
        "always_on": ALWAYS_ON,
        "always_off": ALWAYS_OFF,
        "traceidratio": ratio,
    }[settings.traces_sampler]


class MetricsEndpoint:
    """Serves REGISTRY over HTTP on its own thread, so that a busy event loop can still be looked at."""

    def __init__(self, listen: str) -> None:
        host, port = split_address(listen)
        self._server: WSGIServer
        self._thread: threading.Thread
        self._server, self._thread = start_http_server(port, addr=host, registry=REGISTRY)
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        """Stop serving. Blocks for a moment: call it on a thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
