"""Telemetry: what a proxy traces and logs."""

from __future__ import annotations

from dataclasses import dataclass

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.model import ProxyNode
from mlmesh_local.translate import names, reporting
from mlmesh_local.translate.view import View

# Istio's defaults, pilot/pkg: features/telemetry.go, networking/core/tracing.go, model/telemetry_logging.go.
DEFAULT_SAMPLING_PERCENT = 1.0
_TEXT_FORMAT = (
    '[%START_TIME%] "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%" %RESPONSE_CODE% %RESPONSE_FLAGS% '
    '%RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% "%UPSTREAM_TRANSPORT_FAILURE_REASON%" %BYTES_RECEIVED% '
    '%BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% "%REQ(X-FORWARDED-FOR)%" "%REQ(USER-AGENT)%" '
    '"%REQ(X-REQUEST-ID)%" "%REQ(:AUTHORITY)%" "%UPSTREAM_HOST%" %UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS% '
    "%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What Telemetry resources say to one proxy. ``sampling_percent`` is None when nothing is traced."""

    sampling_percent: float | None
    tags: tuple[tuple[str, str], ...]
    access_logs: bool


def observation(view: View, proxy: ProxyNode) -> Observation:
    """The nearest resource that says something wins, field by field; Istio logs nothing unless told to."""
    sampling: float | None = None
    disabled: bool | None = None
    access_logs: bool | None = None
    tags: dict[str, str] = {}
    for telemetry in view.telemetry(proxy):
        if access_logs is None:
            access_logs = telemetry.access_logs
        if telemetry.tracing is None:
            continue
        sampling = telemetry.tracing.sampling_percent if sampling is None else sampling
        disabled = telemetry.tracing.disabled if disabled is None else disabled
        for name, value in telemetry.tracing.tags:
            tags.setdefault(name, value)
    traced = bool(view.world.otlp_address) and not disabled
    chosen = DEFAULT_SAMPLING_PERCENT if sampling is None else sampling
    return Observation(
        sampling_percent=chosen if traced else None, tags=tuple(sorted(tags.items())), access_logs=bool(access_logs)
    )


def manager_tracing(view: View, proxy: ProxyNode) -> Json | None:
    """Tracing of a connection manager: the exporter, with Istio's default sampling. Routes say what is sampled."""
    if not view.world.otlp_address:
        return None
    config = {
        "grpc_service": {"envoy_grpc": {"cluster_name": names.COLLECTOR}, "timeout": "0.250s"},
        "service_name": _service_name(proxy),
    }
    return {
        # A gateway's call into the mesh is a span of its own, as in Istio.
        "spawn_upstream_span": proxy.kind == "gateway",
        "client_sampling": {"value": 100.0},
        "random_sampling": {"value": DEFAULT_SAMPLING_PERCENT},
        "overall_sampling": {"value": 100.0},
        "provider": {
            "name": "envoy.tracers.opentelemetry",
            "typed_config": typed("envoy.config.trace.v3.OpenTelemetryConfig", config),
        },
    }


def route_tracing(seen: Observation, *, configured: bool) -> Json | None:
    """Sampling of a route. On routes and not on listeners, so that a change of it breaks no stream."""
    if not configured:
        return None
    percent = seen.sampling_percent
    result: Json = {
        "client_sampling": {"numerator": 100 if percent is not None else 0},
        "random_sampling": names.fraction(percent or 0.0),
        "overall_sampling": {"numerator": 100 if percent is not None else 0},
    }
    if seen.tags:
        result["custom_tags"] = [{"tag": name, "literal": {"value": value}} for name, value in seen.tags]
    return result


def access_log(seen: Observation, proxy: ProxyNode) -> list[Json]:
    """Access loggers of a listener, in Istio's text format."""
    if not seen.access_logs:
        return []
    log_format: Json = {"log_format": {"text_format_source": {"inline_string": _TEXT_FORMAT}}}
    if proxy.access_log_path:
        config = typed(
            "envoy.extensions.access_loggers.file.v3.FileAccessLog", {"path": proxy.access_log_path, **log_format}
        )
        return [{"name": "envoy.access_loggers.file", "typed_config": config}]
    config = typed("envoy.extensions.access_loggers.stream.v3.StdoutAccessLog", log_format)
    return [{"name": "envoy.access_loggers.stdout", "typed_config": config}]


def access_logging(view: View, proxy: ProxyNode, role: reporting.Role) -> Json:
    """Fields `access_log` and `access_log_options` of a connection manager."""
    loggers = access_log(observation(view, proxy), proxy)
    report = reporting.http_logger(view, role, (frozenset(), frozenset()))
    if report is None:
        return {"access_log": loggers} if loggers else {}
    # What goes on is reported to the control plane; Istio logs what ended.
    ended = {"log_type_filter": {"types": ["DownstreamPeriodic"], "exclude": True}}
    return {
        "access_log": [*({**logger, "filter": ended} for logger in loggers), report],
        "access_log_options": {"access_log_flush_interval": f"{reporting.REPORT_S}s"},
    }


def _service_name(proxy: ProxyNode) -> str:
    """Istio's: the canonical name and the namespace."""
    labels = proxy.labels
    keys = ("service.istio.io/canonical-name", "app.kubernetes.io/name", "app")
    name = next((labels[key] for key in keys if labels.get(key)), proxy.id)
    return f"{name}.{proxy.namespace}"
