"""How proxies run: ProxyConfig, the annotation `proxy.istio.io/config`, and MeshConfig's `defaultConfig`.

https://istio.io/latest/docs/reference/config/networking/proxy-config/
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlmesh_local.resources.checked import duration_s, selector
from mlmesh_local.resources.fields import INT32_MAX, Fields
from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.model_sidecars import ProxyConfig

ANNOTATION = "proxy.istio.io/config"

# Each is of Istio's own agent, of its control plane's address, or of a part that the laptop mesh has in another way.
# fmt: off
_OF_THE_AGENT = (
    "availabilityZone", "binaryPath", "caCertificatesPem", "configPath", "controlPlaneAuthPolicy",
    "customConfigFile", "discoveryAddress", "discoveryRefreshDelay", "fileFlushInterval", "fileFlushMinSizeKb",
    "holdApplicationUntilProxyStarts", "image", "interceptionMode", "meshId", "proxyAdminPort",
    "proxyBootstrapTemplatePath", "proxyMetadata", "readinessProbe", "sds", "serviceCluster", "statNameLength",
    "statsCompression", "statusPort", "tracingServiceName",
)
_UNSUPPORTED = (
    "connectionSettings", "envoyAccessLogService", "envoyMetricsService", "envoyMetricsServiceAddress",
    "extraStatTags", "gatewayTopology", "privateKeyProvider", "proxyHeaders", "proxyStatsMatcher", "runtimeValues",
    "statsdUdpAddress", "zipkinAddress",
)
# fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxySettings:
    """What of a proxy's configuration applies on a laptop. None leaves the laptop's own.

    ``concurrency`` 0 is a worker thread for each core; ``drain_s`` is how long listeners that go away keep their
    connections.
    """

    concurrency: int | None = None
    drain_s: float | None = None

    def over(self, base: ProxySettings) -> ProxySettings:
        """These settings, and those of a wider scope where they say nothing."""
        return ProxySettings(
            concurrency=base.concurrency if self.concurrency is None else self.concurrency,
            drain_s=base.drain_s if self.drain_s is None else self.drain_s,
        )


def proxy_settings(fields: Fields) -> ProxySettings:
    """Read `defaultConfig`, or the annotation, which has the same fields."""
    fields.ignored(*_OF_THE_AGENT)
    fields.unsupported(*_UNSUPPORTED)
    # Of `defaultConfig` it is read with the other settings of tracing.
    fields.ignored("tracing")
    duration_s(fields, "terminationDrainDuration", low_s=0.0)
    return ProxySettings(
        concurrency=fields.integer("concurrency", high=INT32_MAX), drain_s=duration_s(fields, "drainDuration")
    )


def parse_proxy_config(meta: Meta, spec: Fields) -> ProxyConfig:
    """Read a ProxyConfig's spec. Variables and images are of Istio's own agent, which a laptop does not run."""
    spec.text_map("environmentVariables")
    spec.ignored("image")
    return ProxyConfig(
        meta=meta,
        selector=selector(spec, "selector", "matchLabels"),
        concurrency=spec.integer("concurrency", high=INT32_MAX),
    )


def settings_of(
    configs: Iterable[ProxyConfig],
    default: ProxySettings,
    namespace: str,
    labels: Mapping[str, str],
    *,
    root_namespace: str,
) -> ProxySettings:
    """What applies to a workload: ProxyConfigs of the mesh, over them its namespace's, over them its own.

    In one scope the oldest counts.
    """
    found = default
    everything = list(configs)
    scopes = (
        [c for c in everything if c.meta.namespace == root_namespace and not c.selector],
        [c for c in everything if c.meta.namespace == namespace and not c.selector],
        [
            c
            for c in everything
            if c.meta.namespace == namespace and c.selector and c.selector.items() <= labels.items()
        ],
    )
    for scope in scopes:
        if scope:
            found = ProxySettings(concurrency=scope[0].concurrency).over(found)
    return found
