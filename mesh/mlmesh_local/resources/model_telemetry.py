"""What Telemetry says, and what MeshConfig says of tracing, access logs and metrics, as values. Unset is None."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlmesh_local.resources.meta import Meta

Mode = Literal["CLIENT_AND_SERVER", "CLIENT", "SERVER"]
"""Whether something applies to calls that a workload makes, to those that it takes, or to both."""


TagKind = Literal["literal", "environment", "header", "formatter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """Where the value of a span's tag comes from: ``name`` of a header or variable, or the text itself."""

    kind: TagKind
    value: str
    default: str = ""


Tags = tuple[tuple[str, Tag], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TracingRule:
    """An item of `tracing`."""

    mode: Mode = "CLIENT_AND_SERVER"
    providers: tuple[str, ...] = ()
    sampling_percent: float | None = None
    disabled: bool | None = None
    tags: Tags | None = None
    use_request_id: bool | None = None
    istio_tags: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRule:
    """An item of `accessLogging`. ``expression`` is CEL, empty for everything."""

    mode: Mode = "CLIENT_AND_SERVER"
    providers: tuple[str, ...] = ()
    disabled: bool = False
    expression: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TagOverride:
    """A label that is added or changed to what an expression gives, or removed (no expression)."""

    name: str
    expression: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricOverride:
    """An item of `overrides`. ``metric`` is a selector such as "REQUEST_COUNT", empty for all metrics."""

    metric: str = ""
    mode: Mode = "CLIENT_AND_SERVER"
    disabled: bool | None = None
    tags: tuple[TagOverride, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsRule:
    """An item of `metrics`."""

    providers: tuple[str, ...] = ()
    overrides: tuple[MetricOverride, ...] = ()
    interval_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """Observation of workloads. ``targets`` are names of Gateway API Gateways."""

    meta: Meta
    selector: Mapping[str, str]
    targets: tuple[str, ...] = ()
    tracing: tuple[TracingRule, ...] = ()
    logs: tuple[LogRule, ...] = ()
    metrics: tuple[MetricsRule, ...] = ()

    @property
    def scoped(self) -> bool:
        """Whether it is for some workloads of its namespace only."""
        return bool(self.selector or self.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A header that is sent to a provider; ``variable`` names a variable of the environment instead of a value."""

    name: str
    value: str = ""
    variable: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceProvider:
    """Where spans go. ``service`` is "[NAMESPACE/]HOST"; ``options`` are settings of its kind as Envoy names them."""

    name: str
    kind: Literal["opentelemetry", "opentelemetry-http", "zipkin", "datadog", "skywalking"]
    service: str
    port: int
    tag_length_max: int = 0
    path: str = ""
    timeout_s: float | None = None
    headers: tuple[Header, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProvider:
    """Where access logs go. ``labels`` are those of JSON lines or of log records, None for a line of text."""

    name: str
    kind: Literal["file", "otel", "http", "tcp"]
    path: str = ""
    text: str = ""
    labels: Mapping[str, Any] | None = None
    formatted: bool = False
    omit_empty: bool = False
    service: str = ""
    port: int = 0
    log_name: str = ""
    filter_state: tuple[str, ...] = ()
    request_headers: tuple[str, ...] = ()
    response_headers: tuple[str, ...] = ()
    response_trailers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsProvider:
    """Prometheus: metrics are there to be scraped."""

    name: str


Provider = TraceProvider | LogProvider | MetricsProvider

FILE_PROVIDER = "envoy"
METRICS_PROVIDER = "prometheus"


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetrySettings:
    """Settings of MeshConfig. Defaults are Istio's, but for metrics: those of its Helm chart.

    ``default_*`` name providers; ``log_file`` empty logs nothing; ``istio_tags`` None is true.
    """

    tracing: bool = True
    sampling_percent: float | None = None
    tags: Tags = ()
    istio_tags: bool | None = None
    tag_length_max: int = 0
    log_file: str = ""
    log_format: str = ""
    log_encoding: Literal["TEXT", "JSON"] = "TEXT"
    default_tracing: tuple[str, ...] = ()
    default_logs: tuple[str, ...] = ()
    default_metrics: tuple[str, ...] = (METRICS_PROVIDER,)
    providers: tuple[Provider, ...] = ()

    def provider(self, name: str) -> Provider | None:
        """The provider of a name; Istio does not look at its case."""
        everything = (*self.providers, *BUILT_IN)
        return next((each for each in everything if each.name.lower() == name.lower()), None)


BUILT_IN: tuple[Provider, ...] = (
    MetricsProvider(name=METRICS_PROVIDER),
    LogProvider(name=FILE_PROVIDER, kind="file", path="/dev/stdout"),
)
"""Providers that every Istio has."""
