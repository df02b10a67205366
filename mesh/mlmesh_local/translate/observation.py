"""Access logs, and what is reported of every call: fields of connection managers and of TCP proxies.

pilot/pkg/model/telemetry_logging.go, pilot/pkg/networking/core/accesslog.go.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.model_telemetry import FILE_PROVIDER, LogProvider, TelemetrySettings
from mlmesh_local.translate import reporting
from mlmesh_local.translate.metric_plans import plan_of
from mlmesh_local.translate.telemetry import Role, cluster_of, logs_of, reporting_interval_s, settings_of
from mlmesh_local.translate.tracing import manager_tracing, route_tracing
from mlmesh_local.translate.view import View

_TEXT_FORMAT: Final = (
    '[%START_TIME%] "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%" %RESPONSE_CODE% %RESPONSE_FLAGS% '
    '%RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% "%UPSTREAM_TRANSPORT_FAILURE_REASON%" %BYTES_RECEIVED% '
    '%BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% "%REQ(X-FORWARDED-FOR)%" "%REQ(USER-AGENT)%" '
    '"%REQ(X-REQUEST-ID)%" "%REQ(:AUTHORITY)%" "%UPSTREAM_HOST%" %UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS% '
    "%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n"
)
_JSON_FORMAT: Final = {
    "start_time": "%START_TIME%",
    "route_name": "%ROUTE_NAME%",
    "method": "%REQ(:METHOD)%",
    "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%",
    "protocol": "%PROTOCOL%",
    "response_code": "%RESPONSE_CODE%",
    "response_flags": "%RESPONSE_FLAGS%",
    "response_code_details": "%RESPONSE_CODE_DETAILS%",
    "connection_termination_details": "%CONNECTION_TERMINATION_DETAILS%",
    "bytes_received": "%BYTES_RECEIVED%",
    "bytes_sent": "%BYTES_SENT%",
    "duration": "%DURATION%",
    "upstream_service_time": "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%",
    "x_forwarded_for": "%REQ(X-FORWARDED-FOR)%",
    "user_agent": "%REQ(USER-AGENT)%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "authority": "%REQ(:AUTHORITY)%",
    "upstream_host": "%UPSTREAM_HOST%",
    "upstream_cluster": "%UPSTREAM_CLUSTER_RAW%",
    "upstream_local_address": "%UPSTREAM_LOCAL_ADDRESS%",
    "downstream_local_address": "%DOWNSTREAM_LOCAL_ADDRESS%",
    "downstream_remote_address": "%DOWNSTREAM_REMOTE_ADDRESS%",
    "requested_server_name": "%REQUESTED_SERVER_NAME%",
    "upstream_transport_failure_reason": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
}
_PEERS: Final = ("upstream_peer", "downstream_peer")
_WASM_PEERS: Final = (
    *_PEERS, "wasm.upstream_peer", "wasm.upstream_peer_id", "wasm.downstream_peer", "wasm.downstream_peer_id",
)  # fmt: skip
_STDOUT: Final = "/dev/stdout"
_LOGGERS: Final = "envoy.extensions.access_loggers."
_FORMATTER: Final = "envoy.extensions.formatter.req_without_query.v3.ReqWithoutQuery"
_CEL: Final = "envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter"


def access_logging(view: View, proxy: ProxyNode, role: Role) -> Json:
    """Fields `access_log` and `access_log_options` of a connection manager."""
    plan = plan_of(view, proxy, role)
    request = frozenset(name for e in plan.expressions for name in e.request_headers)
    response = frozenset(name for e in plan.expressions for name in e.response_headers)
    # Calls out are counted by the rules that routed them, whatever Telemetry wants of metrics.
    quiet = plan.disabled and role == "inbound"
    report = None if quiet else reporting.http_logger(view, role, (request, response))
    return _fields(view, proxy, role, report, ("DownstreamPeriodic",))


def network_logging(view: View, proxy: ProxyNode, role: Role) -> Json:
    """Fields `access_log` and `access_log_options` of a TCP proxy."""
    report = None if plan_of(view, proxy, role).disabled else reporting.tcp_logger(view, role)
    fields = _fields(view, proxy, role, report, ("TcpPeriodic", "TcpUpstreamConnected"))
    if report is not None:
        fields["access_log_options"]["flush_access_log_on_connected"] = True
    return fields


def _fields(view: View, proxy: ProxyNode, role: Role, report: Json | None, early: tuple[str, ...]) -> Json:
    loggers = _loggers(view, proxy, role)
    if report is None:
        return {"access_log": loggers} if loggers else {}
    # What goes on is reported to the control plane; Istio logs what ended.
    ended: Json = {"log_type_filter": {"types": list(early), "exclude": True}}
    logged = [{**logger, "filter": _all(ended, logger.get("filter"))} for logger in loggers]
    interval_s = reporting_interval_s(view, proxy) or reporting.REPORT_S
    return {"access_log": [*logged, report], "access_log_options": {"access_log_flush_interval": f"{interval_s:g}s"}}


def _all(one: Json, other: Json | None) -> Json:
    return {"and_filter": {"filters": [one, other]}} if other else one


def _loggers(view: View, proxy: ProxyNode, role: Role) -> list[Json]:
    """What Telemetry and MeshConfig ask for."""
    settings = settings_of(view)
    chosen = logs_of(view, proxy, role)
    if chosen is None:
        return [_mesh_file(settings, proxy, settings.log_file)] if settings.log_file else []
    found: list[Json] = []
    for provider, expression in chosen:
        logger = _logger(view, proxy, settings, provider)
        if logger is None:
            continue
        if expression is not None:
            cel = {
                "name": "envoy.access_loggers.extension_filters.cel",
                "typed_config": typed(_CEL, {"expression": expression}),
            }
            logger["filter"] = {"extension_filter": cel}
        found.append(logger)
    return found


def _logger(view: View, proxy: ProxyNode, settings: TelemetrySettings, provider: LogProvider) -> Json | None:
    if provider.kind == "file":
        if provider.name == FILE_PROVIDER and not provider.formatted and not provider.omit_empty:
            return _mesh_file(settings, proxy, provider.path)
        if provider.labels is not None:
            return _file(proxy, provider.path, labels=provider.labels, omit_empty=provider.omit_empty)
        return _file(proxy, provider.path, text=provider.text, omit_empty=provider.omit_empty)
    found = cluster_of(view, provider.service, provider.port)
    return _service_logger(provider, *found) if found else None


def _mesh_file(settings: TelemetrySettings, proxy: ProxyNode, path: str) -> Json:
    """A file in the format that MeshConfig says."""
    if settings.log_encoding == "TEXT":
        return _file(proxy, path, text=settings.log_format)
    labels = json.loads(settings.log_format) if settings.log_format else {}
    return _file(proxy, path, labels=labels)


def _file(
    proxy: ProxyNode, path: str, *, text: str = "", labels: Mapping[str, Any] | None = None, omit_empty: bool = False
) -> Json:
    where = proxy.access_log_path if path == _STDOUT and proxy.access_log_path else path
    if labels is None:
        line = text or _TEXT_FORMAT
        line = line if line.endswith("\n") else f"{line}\n"
        log_format: Json = {"text_format_source": {"inline_string": line}}
        used = line
    else:
        log_format = {"json_format": dict(labels) or dict(_JSON_FORMAT), "json_format_options": {}}
        used = json.dumps(dict(labels))
    if omit_empty:
        log_format["omit_empty_values"] = True
    log_format |= _formatters(used)
    config = typed(_LOGGERS + "file.v3.FileAccessLog", {"path": where, "log_format": log_format})
    return {"name": "envoy.access_loggers.file", "typed_config": config}


def _formatters(used: str) -> Json:
    if "%REQ_WITHOUT_QUERY" not in used:
        return {}
    return {"formatters": [{"name": "envoy.formatter.req_without_query", "typed_config": typed(_FORMATTER)}]}


def _service_logger(provider: LogProvider, host: str, cluster: str) -> Json:
    kinds = {"otel": "otel_envoy_accesslog", "http": "http_envoy_accesslog", "tcp": "tcp_envoy_accesslog"}
    common: Json = {
        "log_name": provider.log_name or kinds[provider.kind],
        "grpc_service": {"envoy_grpc": {"cluster_name": cluster, "authority": host}},
        "transport_api_version": "V3",
        "filter_state_objects_to_log": list(
            _WASM_PEERS if provider.kind == "otel" else provider.filter_state or _PEERS
        ),
    }
    if provider.kind == "tcp":
        config = typed(_LOGGERS + "grpc.v3.TcpGrpcAccessLogConfig", {"common_config": common})
        return {"name": "envoy.tcp_grpc_access_log", "typed_config": config}
    if provider.kind == "http":
        http: Json = {
            "common_config": common,
            "additional_request_headers_to_log": list(provider.request_headers),
            "additional_response_headers_to_log": list(provider.response_headers),
            "additional_response_trailers_to_log": list(provider.response_trailers),
        }
        return {
            "name": "envoy.access_loggers.http_grpc",
            "typed_config": typed(_LOGGERS + "grpc.v3.HttpGrpcAccessLogConfig", http),
        }
    text = provider.text or _TEXT_FORMAT
    otel: Json = {"common_config": common, "disable_builtin_labels": True, "body": {"string_value": text}}
    if provider.labels:
        values = [{"key": key, "value": {"string_value": str(provider.labels[key])}} for key in sorted(provider.labels)]
        otel["attributes"] = {"values": values}
    otel |= _formatters(text + json.dumps(dict(provider.labels or {})))
    config = typed(_LOGGERS + "open_telemetry.v3.OpenTelemetryAccessLogConfig", otel)
    return {"name": "envoy.access_loggers.open_telemetry", "typed_config": config}


__all__ = ["access_logging", "manager_tracing", "network_logging", "route_tracing"]
