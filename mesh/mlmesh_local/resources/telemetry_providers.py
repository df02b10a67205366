"""Providers of traces, access logs and metrics among MeshConfig's `extensionProviders`, and its own settings of them.

https://istio.io/latest/docs/reference/config/istio.mesh.v1alpha1/; rules of validity are those of Istio's
pkg/config/validation/agent/extensionprovider.go.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, cast

from mlmesh_local.resources.checked import part
from mlmesh_local.resources.domains import is_ip
from mlmesh_local.resources.fields import Fields, is_host
from mlmesh_local.resources.model_telemetry import (
    METRICS_PROVIDER,
    Header,
    LogProvider,
    MetricsProvider,
    Provider,
    Tags,
    TelemetrySettings,
    TraceProvider,
)
from mlmesh_local.resources.span_tags import custom_tags

_GONE = "Istio has given it up; use opentelemetry"
_UNSUPPORTED: Final = {
    "lightstep": _GONE,
    "opencensus": _GONE,
    "stackdriver": "it needs a proxy of Google Cloud",
    "sds": "the laptop mesh hands out certificates itself",
}


def telemetry_settings(fields: Fields) -> TelemetrySettings:
    """Settings of MeshConfig."""
    encoding = fields.choice("accessLogEncoding", ("TEXT", "JSON"), "TEXT")
    text = fields.text("accessLogFormat")
    if encoding == "JSON" and not isinstance(_json(text), dict):
        # Istio then takes its own fields.
        text = ""
    defaults = part(fields, "defaultProviders", _defaults) or (None, None, None)
    sampling, tags, istio_tags, length = _proxy_tracing(fields)
    return TelemetrySettings(
        tracing=fields.boolean("enableTracing", default=True),
        sampling_percent=sampling,
        tags=tags,
        istio_tags=istio_tags,
        tag_length_max=length,
        log_file=fields.text("accessLogFile"),
        log_format=text,
        log_encoding=cast("Literal['TEXT', 'JSON']", encoding),
        default_tracing=defaults[0] or (),
        default_logs=defaults[1] or (),
        default_metrics=(METRICS_PROVIDER,) if defaults[2] is None else defaults[2],
        providers=_providers(fields),
    )


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _defaults(fields: Fields) -> tuple[tuple[str, ...] | None, ...]:
    names = ("tracing", "accessLogging", "metrics")
    found = tuple(fields.texts(name) if fields.has(name) else None for name in names)
    fields.ignored(*names)
    return found


def _proxy_tracing(fields: Fields) -> tuple[float | None, Tags, bool | None, int]:
    """`defaultConfig.tracing`; the rest of `defaultConfig` is read elsewhere."""
    config = fields.message("defaultConfig")
    if not config.has("tracing"):
        return None, (), None, 0
    with config.message("tracing") as tracing:
        tracing.unsupported(
            "zipkin", "lightstep", "datadog", "stackdriver", "openCensusAgent", "tlsSettings",
            why="name a provider in extensionProviders instead",
        )  # fmt: skip
        sampling = tracing.number("sampling", low=0.0, high=100.0)
        tags = custom_tags(tracing, formatters=False) if tracing.has("customTags") else ()
        tracing.ignored("customTags")
        return (
            sampling or None,  # 0 is "not set" in Istio
            tags,
            tracing.boolean_or_none("enableIstioTags"),
            tracing.integer("maxPathTagLength") or 0,
        )


def _providers(fields: Fields) -> tuple[Provider, ...]:
    found: list[Provider] = []
    for provider in fields.messages("extensionProviders"):
        # Its name, and what authorizes, is checked where authorizers are read.
        name = provider.text("name")
        provider.ignored("envoyExtAuthzGrpc", "envoyExtAuthzHttp")
        provider.one_of("envoyExtAuthzGrpc", "envoyExtAuthzHttp", *_KINDS, *_UNSUPPORTED, required=True)
        for kind, why in _UNSUPPORTED.items():
            provider.unsupported(kind, why=why)
        for kind, read in _KINDS.items():
            if provider.has(kind):
                with provider.message(kind) as inner:
                    found.append(read(name, inner))
            provider.ignored(kind)
        provider.done()
    return tuple(found)


def _service(fields: Fields) -> tuple[str, int]:
    service = fields.text("service", required=True)
    namespace, slash, host = service.rpartition("/")
    wrong = "*" in host or (slash and (not namespace or "/" in namespace or is_ip(host)))
    if service and (wrong or not (is_host(host) or is_ip(host))):
        fields.refuse("service", f'"{service}" is not [NAMESPACE/]HOST')
    return service, fields.port("port", required=True)


def _headers(fields: Fields, name: str) -> tuple[Header, ...]:
    found: list[Header] = []
    for item in fields.messages(name):
        with item:
            item.one_of("value", "envName", required=True)
            found.append(
                Header(name=item.text("name", required=True), value=item.text("value"), variable=item.text("envName"))
            )
    return tuple(found)


def _opentelemetry(name: str, fields: Fields) -> TraceProvider:
    fields.one_of("http", "grpc")
    service, port = _service(fields)
    options: dict[str, Any] = {}
    with fields.message("resourceDetectors") as detectors:
        detectors.unsupported("dynatrace", why="it needs an agent of Dynatrace on the machine")
        if detectors.has("environment"):
            with detectors.message("environment"):
                options["environment_detector"] = True
        detectors.ignored("environment")
    fields.unsupported("dynatraceSampler", why="it needs a service of Dynatrace")
    enrichment = fields.choice(
        "serviceAttributeEnrichment", ("ISTIO_CANONICAL", "OTEL_SEMANTIC_CONVENTIONS"), "ISTIO_CANONICAL"
    )
    if enrichment == "OTEL_SEMANTIC_CONVENTIONS":
        options |= {"semantic_conventions": True, "environment_detector": True}
    http = fields.has("http")
    timeout_s: float | None = None
    headers: tuple[Header, ...] = ()
    with fields.message("http") as inner:
        path = inner.text("path", required=http)
        if http:
            timeout_s, headers = inner.duration_s("timeout"), _headers(inner, "headers")
        inner.ignored("timeout", "headers")
    with fields.message("grpc") as inner:
        if fields.has("grpc"):
            timeout_s, headers = inner.duration_s("timeout"), _headers(inner, "initialMetadata")
        inner.ignored("timeout", "initialMetadata")
    return TraceProvider(
        name=name,
        kind="opentelemetry-http" if http else "opentelemetry",
        service=service,
        port=port,
        tag_length_max=fields.integer("maxTagLength") or 0,
        path=path,
        timeout_s=timeout_s,
        headers=headers,
        options=options,
    )


def _zipkin(name: str, fields: Fields) -> TraceProvider:
    service, port = _service(fields)
    context = fields.choice("traceContextOption", ("USE_B3", "USE_B3_WITH_W3C_PROPAGATION"), "USE_B3")
    return TraceProvider(
        name=name,
        kind="zipkin",
        service=service,
        port=port,
        tag_length_max=fields.integer("maxTagLength") or 0,
        path=fields.text("path") or "/api/v2/spans",
        timeout_s=fields.duration_s("timeout"),
        headers=_headers(fields, "headers"),
        options={
            "trace_id_128bit": not fields.boolean("enable64bitTraceId"),
            **({} if context == "USE_B3" else {"trace_context_option": context}),
        },
    )


def _datadog(name: str, fields: Fields) -> TraceProvider:
    service, port = _service(fields)
    length = fields.integer("maxTagLength") or 0
    return TraceProvider(name=name, kind="datadog", service=service, port=port, tag_length_max=length)


def _skywalking(name: str, fields: Fields) -> TraceProvider:
    service, port = _service(fields)
    # Istio 1.31 reads it and does nothing with it.
    fields.ignored("accessToken")
    return TraceProvider(name=name, kind="skywalking", service=service, port=port)


def _prometheus(name: str, _fields: Fields) -> MetricsProvider:
    return MetricsProvider(name=name)


def _file(name: str, fields: Fields) -> LogProvider:
    text, labels, formatted = "", None, fields.has("logFormat")
    with fields.message("logFormat") as inner:
        kind = inner.one_of("text", "labels")
        text = inner.text("text")
        labels = _labels(inner) if kind == "labels" else None
        inner.ignored("labels")
    return LogProvider(
        name=name,
        kind="file",
        path=fields.text("path") or "/dev/stdout",
        text=text,
        labels=labels,
        formatted=formatted,
        omit_empty=fields.boolean("omitEmptyValues"),
    )


def _labels(fields: Fields) -> Mapping[str, Any]:
    node = fields.raw("labels")
    plain = node.plain() if node else None
    if not isinstance(plain, dict):
        fields.refuse("labels", "must be a mapping of names to formats")
        return {}
    return plain


def _otel_als(name: str, fields: Fields) -> LogProvider:
    service, port = _service(fields)
    with fields.message("logFormat") as inner:
        text = inner.text("text")
        labels = _labels(inner) if inner.has("labels") else None
        inner.ignored("labels")
    return LogProvider(
        name=name,
        kind="otel",
        service=service,
        port=port,
        log_name=fields.text("logName"),
        text=text,
        labels=labels,
    )


def _http_als(name: str, fields: Fields) -> LogProvider:
    service, port = _service(fields)
    return LogProvider(
        name=name,
        kind="http",
        service=service,
        port=port,
        log_name=fields.text("logName"),
        filter_state=fields.texts("filterStateObjectsToLog"),
        request_headers=fields.texts("additionalRequestHeadersToLog"),
        response_headers=fields.texts("additionalResponseHeadersToLog"),
        response_trailers=fields.texts("additionalResponseTrailersToLog"),
    )


def _tcp_als(name: str, fields: Fields) -> LogProvider:
    service, port = _service(fields)
    return LogProvider(
        name=name,
        kind="tcp",
        service=service,
        port=port,
        log_name=fields.text("logName"),
        filter_state=fields.texts("filterStateObjectsToLog"),
    )


_KINDS: Final[Mapping[str, Callable[[str, Fields], Provider]]] = {
    "opentelemetry": _opentelemetry,
    "zipkin": _zipkin,
    "datadog": _datadog,
    "skywalking": _skywalking,
    "prometheus": _prometheus,
    "envoyFileAccessLog": _file,
    "envoyOtelAls": _otel_als,
    "envoyHttpAls": _http_als,
    "envoyTcpAls": _tcp_als,
}
