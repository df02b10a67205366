"""MeshConfig: the settings of the whole mesh, where Istio keeps them: the key `mesh` of the ConfigMap `istio`.

https://istio.io/latest/docs/reference/config/istio.mesh.v1alpha1/
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from mlmesh_local.resources.checked import part
from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.http_actions import parse_retries
from mlmesh_local.resources.mesh_hosts import HostSettings, host_settings
from mlmesh_local.resources.mesh_tls import TlsSettings, mesh_mtls, tls_settings
from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.model_routes import Retries
from mlmesh_local.resources.model_security import ExternalAuthorizer
from mlmesh_local.resources.model_sidecars import ProxySettings
from mlmesh_local.resources.model_telemetry import TelemetrySettings
from mlmesh_local.resources.problems import At
from mlmesh_local.resources.providers import parse_authorizers
from mlmesh_local.resources.proxies import proxy_settings
from mlmesh_local.resources.telemetry_providers import telemetry_settings
from mlmesh_local.resources.tree import Node, parse_yaml

ROOT_NAMESPACE = "istio-system"
_CAPTURE = "of the capture of traffic, which a laptop does not have"
_INGRESS = "of Kubernetes' Ingress, which the laptop mesh does not serve"
_ISTIOD = "of Istio's control plane itself"
_AMBIENT = "of the ambient mesh and of several clusters"
OF_AN_INSTALL: Final[Mapping[str, str]] = {
    "certificates": _ISTIOD,
    "configSources": _ISTIOD,
    "disableEnvoyListenerLog": "gateways of a laptop log no connections that come to nothing",
    "discoverySelectors": "every document that is applied counts",
    "enablePrometheusMerge": "of Istio's agent; the laptop mesh serves all metrics at one address",
    "hboneIdleTimeout": _AMBIENT,
    "ingressClass": _INGRESS,
    "ingressControllerMode": _INGRESS,
    "ingressSelector": _INGRESS,
    "ingressService": _INGRESS,
    "protocolDetectionTimeout": "a port of no declared protocol waits for the first bytes",
    "proxyHttpPort": _CAPTURE,
    "proxyInboundListenPort": _CAPTURE,
    "proxyListenPort": _CAPTURE,
    "serviceScopeConfigs": _AMBIENT,
    "serviceSettings": "there is one cluster",
    "verifyCertificateAtClient": "Istio 1.31 reads it and does nothing with it",
}
"""Settings that are taken and mean nothing on a laptop, and why."""
# fmt: off
_UNSUPPORTED = (
    "ca", "caCertificates", "enableEnvoyAccessLogService", "inboundClusterStatName", "outboundClusterStatName",
    "serviceEntryVisibility",
)
# fmt: on
_NORMALIZATION = ("DEFAULT", "NONE", "BASE", "MERGE_SLASHES", "DECODE_AND_MERGE_SLASHES")
NAME = "istio"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig:
    """Settings of the mesh. Defaults are Istio's (pkg/config/mesh/mesh.go).

    ``trust_domain`` empty leaves that of the running mesh, ``root_namespace`` empty "istio-system".
    """

    meta: Meta
    trust_domain: str = ""
    trust_domain_aliases: tuple[str, ...] = ()
    enable_auto_mtls: bool = True
    root_namespace: str = ""
    hosts: HostSettings = field(default_factory=HostSettings)
    proxies: ProxySettings = field(default_factory=ProxySettings)
    default_http_retry_policy: Retries | None = None
    path_normalization: str = "DEFAULT"
    authorizers: tuple[ExternalAuthorizer, ...] = ()
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    mesh_mtls: TlsSettings = field(default_factory=TlsSettings)
    tls_defaults: TlsSettings = field(default_factory=TlsSettings)


def is_mesh_config(namespace: str, name: str) -> bool:
    """Whether a ConfigMap is the one that holds the settings of the mesh; others mean nothing here."""
    return namespace == ROOT_NAMESPACE and name == NAME


def parse_mesh_config(meta: Meta, body: Fields) -> MeshConfig:
    """Read the ConfigMap."""
    body.ignored("immutable", "binaryData")
    with body.message("data") as data:
        data.ignored("meshNetworks")
        node = data.raw("mesh")
        place = data.place("mesh")
    return _settings(meta, Fields(_inner(node, place), place, body.problems, quoted_numbers=True))


def _inner(node: Node | None, place: At) -> Node:
    """The YAML inside the text of a value, on the lines of the file."""
    if node is None or not isinstance(node.value, str):
        return Node(place.line, None)
    # The text of a block begins on the line after its key.
    trees = list(parse_yaml(place.source, "\n" * place.line + node.value))
    return trees[0].root if trees else Node(place.line, None)


def _settings(meta: Meta, fields: Fields) -> MeshConfig:
    with fields:
        fields.ignored(*OF_AN_INSTALL)
        fields.unsupported(*_UNSUPPORTED)
        # Applications listen at an address that only their sidecar dials, whatever it is.
        part(fields, "inboundTrafficPolicy", lambda inner: inner.choice("mode", ("PASSTHROUGH", "LOCALHOST")))
        return MeshConfig(
            meta=meta,
            trust_domain=fields.text("trustDomain"),
            trust_domain_aliases=fields.texts("trustDomainAliases"),
            enable_auto_mtls=fields.boolean("enableAutoMtls", default=True),
            root_namespace=fields.name("rootNamespace"),
            hosts=host_settings(fields),
            proxies=part(fields, "defaultConfig", proxy_settings) or ProxySettings(),
            default_http_retry_policy=part(fields, "defaultHttpRetryPolicy", parse_retries),
            path_normalization=part(fields, "pathNormalization", _normalization) or "DEFAULT",
            authorizers=parse_authorizers(fields),
            telemetry=telemetry_settings(fields),
            mesh_mtls=part(fields, "meshMTLS", mesh_mtls) or TlsSettings(),
            tls_defaults=part(fields, "tlsDefaults", tls_settings) or TlsSettings(),
        )


def _normalization(fields: Fields) -> str:
    return fields.choice("normalization", _NORMALIZATION, "DEFAULT")
