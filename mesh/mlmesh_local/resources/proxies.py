"""How proxies run: ProxyConfig, the annotation `proxy.istio.io/config`, and MeshConfig's `defaultConfig`.

https://istio.io/latest/docs/reference/config/networking/proxy-config/
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

from mlmesh_local.resources.checked import duration_s, part, selector
from mlmesh_local.resources.fields import INT32_MAX, Fields
from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.model_sidecars import GatewayTopology, ProxyConfig, ProxyHeaders, ProxySettings
from mlmesh_local.resources.problems import At, Problems
from mlmesh_local.resources.tree import Node, parse_yaml

if TYPE_CHECKING:
    from mlmesh_local.resources.model_workload import Deployment

ANNOTATION = "proxy.istio.io/config"

_AGENT = "of Istio's agent beside Envoy, or of its way to the control plane"
_START = "of how Envoy is started, which is the laptop's own"
OF_THE_AGENT: Final[Mapping[str, str]] = {
    "availabilityZone": _AGENT,
    "binaryPath": _START,
    "caCertificatesPem": _AGENT,
    "configPath": _START,
    "controlPlaneAuthPolicy": _AGENT,
    "customConfigFile": _START,
    "discoveryAddress": _AGENT,
    "discoveryRefreshDelay": _AGENT,
    "fileFlushInterval": _START,
    "fileFlushMinSizeKb": _START,
    "holdApplicationUntilProxyStarts": "applications of a laptop are ready when their sidecar is",
    "image": "a laptop runs no images",
    "interceptionMode": "of the capture of traffic, which a laptop does not have",
    "meshId": "there is one mesh",
    "proxyAdminPort": "the laptop mesh chooses where Envoy's admin listens",
    "proxyBootstrapTemplatePath": _START,
    "proxyMetadata": _AGENT,
    "readinessProbe": _AGENT,
    "sds": _AGENT,
    "serviceCluster": "the name of the workload is taken",
    "statNameLength": "Envoy has given it up",
    "statsCompression": "the laptop mesh serves all metrics at one address",
    "statusPort": _AGENT,
    "terminationDrainDuration": "instances end by their terminationGracePeriodSeconds",
    "tracingServiceName": "the canonical name of the workload is taken",
}
"""Settings that are taken and mean nothing on a laptop, and why."""
# fmt: off
_UNSUPPORTED = (
    "connectionSettings", "envoyAccessLogService", "envoyMetricsService", "envoyMetricsServiceAddress",
    "extraStatTags", "privateKeyProvider", "proxyStatsMatcher", "runtimeValues", "statsdUdpAddress", "zipkinAddress",
)
# fmt: on
_CERTIFICATES = ("UNDEFINED", "SANITIZE", "FORWARD_ONLY", "APPEND_FORWARD", "SANITIZE_SET", "ALWAYS_FORWARD_ONLY")
_DETAILS = ("subject", "cert", "chain", "dns", "uri")


def proxy_settings(fields: Fields) -> ProxySettings:
    """Read `defaultConfig`, or the annotation, which has the same fields."""
    fields.ignored(*OF_THE_AGENT)
    fields.unsupported(*_UNSUPPORTED)
    # Of `defaultConfig` it is read with the other settings of tracing.
    fields.ignored("tracing")
    duration_s(fields, "terminationDrainDuration", low_s=0.0)
    return ProxySettings(
        concurrency=fields.integer("concurrency", high=INT32_MAX),
        drain_s=duration_s(fields, "drainDuration"),
        topology=part(fields, "gatewayTopology", _topology),
        headers=part(fields, "proxyHeaders", _headers),
    )


def _topology(fields: Fields) -> GatewayTopology:
    announced = fields.has("proxyProtocol")
    with fields.message("proxyProtocol"):
        return GatewayTopology(
            trusted_proxies=fields.integer("numTrustedProxies") or 0,
            client_certificates=_certificates(fields, "forwardClientCertDetails"),
            proxy_protocol=announced,
        )


def _certificates(fields: Fields, name: str) -> str:
    chosen = fields.choice(name, _CERTIFICATES, "UNDEFINED")
    return "" if chosen == "UNDEFINED" else chosen


def _headers(fields: Fields) -> ProxyHeaders:
    fields.unsupported("preserveHttp1HeaderCase")
    # Sidecars of a laptop do not tell each other who they are by headers.
    fields.ignored("metadataExchangeHeaders")
    with fields.message("setCurrentClientCertDetails") as inner:
        said = ((name, inner.boolean_or_none(name)) for name in _DETAILS)
        details = tuple((name, value) for name, value in said if value is not None)
    with fields.message("server") as inner:
        disabled, value = inner.boolean("disabled"), inner.text("value")
    return ProxyHeaders(
        client_certificates=_certificates(fields, "forwardedClientCert"),
        certificate_details=details,
        request_id=not _switch(fields, "requestId", "disabled"),
        server="" if disabled else value or None,
        attempt_count=not _switch(fields, "attemptCount", "disabled"),
        debug=not _switch(fields, "envoyDebugHeaders", "disabled"),
        forwarded_port=_switch(fields, "xForwardedPort", "enabled"),
        forwarded_host=_switch(fields, "xForwardedHost", "enabled"),
    )


def _switch(fields: Fields, name: str, word: str) -> bool:
    with fields.message(name) as inner:
        return inner.boolean(word)


def annotated(text: str, at: At, problems: Problems) -> ProxySettings:
    """Read the annotation: YAML inside a text, on the lines of the file where it is a block."""
    trees = list(parse_yaml(at.source, "\n" * at.line + text))
    with Fields(trees[0].root if trees else Node(at.line, None), at, problems) as fields:
        fields.unsupported("tracing", why="say it in a Telemetry that selects the workload")
        return proxy_settings(fields)


def parse_proxy_config(meta: Meta, spec: Fields) -> ProxyConfig:
    """Read a ProxyConfig's spec. Variables and images are of Istio's own agent, which a laptop does not run."""
    spec.text_map("environmentVariables")
    part(spec, "image", lambda image: image.text("imageType"))
    return ProxyConfig(
        meta=meta,
        selector=selector(spec, "selector", "matchLabels"),
        concurrency=spec.integer("concurrency", high=INT32_MAX),
    )


def settings_of(
    configs: Iterable[ProxyConfig],
    default: ProxySettings,
    deployment: Deployment,
    *,
    root_namespace: str,
) -> ProxySettings:
    """What applies to a workload: MeshConfig's, over them ProxyConfigs of the mesh and of the namespace.

    Over these comes the workload's annotation, and over that a ProxyConfig that selects it. In one scope the oldest
    counts (pilot/pkg/model/proxy_config.go in Istio's source).
    """
    everything = list(configs)
    namespace, labels = deployment.meta.namespace, deployment.labels
    own = [config for config in everything if config.meta.namespace == namespace]
    scopes = (
        [c for c in everything if c.meta.namespace == root_namespace and c.selector is None],
        [c for c in own if c.selector is None],
    )
    found = default
    for scope in scopes:
        found = ProxySettings(concurrency=scope[0].concurrency).over(found) if scope else found
    found = deployment.proxy.over(found)
    selected = next((c for c in own if c.selector and c.selector.items() <= labels.items()), None)
    return ProxySettings(concurrency=selected.concurrency).over(found) if selected else found
