"""Tracing: where spans go is a matter of listeners; how many there are, and their tags, of routes.

A change of sampling or of tags so leaves listeners, and the streams that they carry, as they are. Istio has all of it
in listeners (pilot/pkg/networking/core/tracing.go).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.metrics.names import CLUSTER_ID
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.model_telemetry import Header, Tag, TraceProvider
from mlmesh_local.translate import names
from mlmesh_local.translate.names import seconds
from mlmesh_local.translate.telemetry import (
    DEFAULT_SAMPLING_PERCENT,
    Role,
    TracingSpec,
    cluster_of,
    settings_of,
    tracing_of,
)
from mlmesh_local.translate.view import View

_TRACE: Final = "envoy.config.trace.v3."
_DETECTOR: Final = "envoy.extensions.tracers.opentelemetry.resource_detectors.v3.EnvironmentResourceDetectorConfig"
_REQUEST_ID: Final = "envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig"
_SHADOW: Final = "istio_dry_run_{}_shadow_{}"


def manager_tracing(view: View, proxy: ProxyNode, role: Role) -> Json:
    """Fields `tracing` and `request_id_extension` of a connection manager; empty where spans cannot go anywhere."""
    spec = tracing_of(view, proxy, role)
    exporter = _exporter(view, proxy, spec)
    if exporter is None:
        return {}
    name, config = exporter
    provider = spec.provider
    tracing: Json = {
        # A gateway's call into the mesh is a span of its own, as in Istio; SkyWalking wants it everywhere.
        "spawn_upstream_span": proxy.kind == "gateway" or (provider is not None and provider.kind == "skywalking"),
        "client_sampling": {"value": 100.0},
        "random_sampling": {"value": DEFAULT_SAMPLING_PERCENT},
        "overall_sampling": {"value": 100.0},
        "provider": {"name": name, "typed_config": config},
    }
    length = (provider.tag_length_max if provider else 0) or settings_of(view).tag_length_max
    if length:
        tracing["max_path_tag_length"] = length
    result: Json = {"tracing": tracing}
    if not spec.use_request_id:
        extension = typed(_REQUEST_ID, {"use_request_id_for_trace_sampling": False})
        result["request_id_extension"] = {"typed_config": extension}
    return result


def route_tracing(view: View, proxy: ProxyNode, role: Role) -> Json | None:
    """Field `tracing` of every route; None where the listener has no tracing."""
    spec = tracing_of(view, proxy, role)
    if _exporter(view, proxy, spec) is None:
        return None
    return {
        "client_sampling": {"numerator": 100},
        # Envoy draws a number below ten thousand from the request id: a finer fraction would always be met.
        "random_sampling": {"numerator": round(spec.sampling_percent * 100), "denominator": "TEN_THOUSAND"},
        "overall_sampling": {"numerator": 100},
        "custom_tags": sorted(_tags(proxy, spec, view.world.trust_domain), key=_tag_name),
    }


def _tag_name(tag: Json) -> str:
    name: str = tag["tag"]
    return name


def _exporter(view: View, proxy: ProxyNode, spec: TracingSpec) -> tuple[str, Json] | None:
    """The tracer's name and configuration."""
    provider = spec.provider
    if spec.disabled:
        # As in Istio: such a proxy leaves the trace context of calls as it is.
        return None
    if provider is None:
        if not view.world.otlp_address:
            return None
        config = {
            "grpc_service": {"envoy_grpc": {"cluster_name": names.COLLECTOR}, "timeout": "0.250s"},
            "service_name": service_name(proxy),
        }
        return "envoy.tracers.opentelemetry", typed(_TRACE + "OpenTelemetryConfig", config)
    found = cluster_of(view, provider.service, provider.port)
    if found is None:
        return None
    tracer, message = _TRACERS[provider.kind]
    return tracer, typed(_TRACE + message, _CONFIGS[provider.kind](provider, proxy, *found))


def _opentelemetry(provider: TraceProvider, proxy: ProxyNode, host: str, cluster: str) -> Json:
    config: Json = {"envoy_grpc": {"cluster_name": cluster, "authority": host}}
    if provider.timeout_s is not None:
        config["timeout"] = seconds(provider.timeout_s)
    if provider.headers:
        config["initial_metadata"] = [{"key": h.name, "value": h.value} for h in provider.headers]
    return {"grpc_service": config, **_opentelemetry_common(provider, proxy)}


def _opentelemetry_http(provider: TraceProvider, proxy: ProxyNode, host: str, cluster: str) -> Json:
    uri = host.rstrip("/") + "/" + provider.path.lstrip("/")
    return {"http_service": _http_service(provider, uri, cluster), **_opentelemetry_common(provider, proxy)}


def _http_service(provider: TraceProvider, uri: str, cluster: str) -> Json:
    # Envoy wants a time.
    timeout = seconds(5.0 if provider.timeout_s is None else provider.timeout_s)
    service: Json = {"http_uri": {"uri": uri, "cluster": cluster, "timeout": timeout}}
    if provider.headers:
        service["request_headers_to_add"] = [_added(header) for header in provider.headers]
    return service


def _added(header: Header) -> Json:
    return {
        "header": {"key": header.name, "value": header.value},
        "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
    }


def _opentelemetry_common(provider: TraceProvider, proxy: ProxyNode) -> Json:
    canonical = not provider.options.get("semantic_conventions")
    result: Json = {"service_name": service_name(proxy) if canonical else _semantic_name(proxy)}
    if provider.options.get("environment_detector"):
        name = "envoy.tracers.opentelemetry.resource_detectors.environment"
        result["resource_detectors"] = [{"name": name, "typed_config": typed(_DETECTOR)}]
    return result


def _zipkin(provider: TraceProvider, _proxy: ProxyNode, host: str, cluster: str) -> Json:
    return {
        "collector_service": _http_service(provider, f"http://{host}{provider.path}", cluster),
        "collector_endpoint_version": "HTTP_JSON",
        "shared_span_context": False,
        **provider.options,
    }


def _datadog(_provider: TraceProvider, proxy: ProxyNode, host: str, cluster: str) -> Json:
    return {"collector_cluster": cluster, "service_name": service_name(proxy), "collector_hostname": host}


def _skywalking(_provider: TraceProvider, _proxy: ProxyNode, host: str, cluster: str) -> Json:
    return {"grpc_service": {"envoy_grpc": {"cluster_name": cluster, "authority": host}}}


_TRACERS: Final[Mapping[str, tuple[str, str]]] = {
    "opentelemetry": ("envoy.tracers.opentelemetry", "OpenTelemetryConfig"),
    "opentelemetry-http": ("envoy.tracers.opentelemetry", "OpenTelemetryConfig"),
    "zipkin": ("envoy.tracers.zipkin", "ZipkinConfig"),
    "datadog": ("envoy.tracers.datadog", "DatadogConfig"),
    "skywalking": ("envoy.tracers.skywalking", "SkyWalkingConfig"),
}
_CONFIGS: Final[Mapping[str, Callable[[TraceProvider, ProxyNode, str, str], dict[str, Any]]]] = {
    "opentelemetry": _opentelemetry,
    "opentelemetry-http": _opentelemetry_http,
    "zipkin": _zipkin,
    "datadog": _datadog,
    "skywalking": _skywalking,
}


def _tags(proxy: ProxyNode, spec: TracingSpec, trust_domain: str) -> Iterator[Json]:
    if spec.istio_tags:
        labels = proxy.labels
        about = {
            "istio.canonical_revision": _first(labels, _REVISION, "latest"),
            "istio.canonical_service": _first(labels, _CANONICAL, proxy.id),
            "istio.mesh_id": trust_domain,
            "istio.namespace": proxy.namespace,
            "istio.cluster_id": CLUSTER_ID,
        }
        for name, value in about.items():
            yield {"tag": name, "literal": {"value": value}}
        for action in ("allow", "deny"):
            for what, key in (("name", "effective_policy_id"), ("result", "engine_result")):
                yield _dry_run(f"istio.authorization.dry_run.{action}_policy.{what}", _SHADOW.format(action, key))
    for name, tag in spec.tags:
        yield {"tag": name, **_tag(tag)}


def _dry_run(tag: str, key: str) -> Json:
    path = {"key": "envoy.filters.http.rbac", "path": [{"key": key}]}
    return {"tag": tag, "metadata": {"kind": {"request": {}}, "metadata_key": path}}


def _tag(tag: Tag) -> Json:
    if tag.kind == "literal":
        return {"literal": {"value": tag.value}}
    if tag.kind == "formatter":
        return {"value": tag.value}
    named: Json = {"name": tag.value}
    if tag.default:
        named["default_value"] = tag.default
    return {"environment" if tag.kind == "environment" else "request_header": named}


_CANONICAL: Final = ("service.istio.io/canonical-name", "app.kubernetes.io/name", "app")
_REVISION: Final = ("service.istio.io/canonical-revision", "app.kubernetes.io/version", "version")
_SEMANTIC: Final = ("app.kubernetes.io/instance", "app.kubernetes.io/name")


def _first(labels: Mapping[str, str], keys: tuple[str, ...], default: str) -> str:
    return next((labels[key] for key in keys if labels.get(key)), default)


def service_name(proxy: ProxyNode) -> str:
    """Istio's: the canonical name and the namespace."""
    return f"{_first(proxy.labels, _CANONICAL, proxy.id)}.{proxy.namespace}"


def _semantic_name(proxy: ProxyNode) -> str:
    """https://opentelemetry.io/docs/specs/semconv/non-normative/k8s-attributes/#service-attributes"""
    return _first(proxy.labels, _SEMANTIC, proxy.id.rpartition("-")[0] or proxy.id)
