"""Resources, endpoints and identities in; Envoy's resources out, as proto-JSON. Pure: equal worlds give equal output.

Semantics, defaults and names are Istio's. Where they cannot be, the reason stands beside the code; what is not
supported was refused when the resources were read.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from mlmesh_local.envoy_types import CLUSTER, ENDPOINTS, EXTENSIONS, LISTENER, ROUTES, Json
from mlmesh_local.model import ProxyNode
from mlmesh_local.translate import gateways, reporting, sidecars
from mlmesh_local.translate.tls import IN_CONFIG_MAP, credential_secret, root_secret
from mlmesh_local.translate.view import View, service_endpoints

Configuration = dict[str, dict[str, Json]]
"""Resources by type URL and name."""


Section = Callable[[View, ProxyNode], dict[str, Json]]


def _room(proxy: ProxyNode) -> ModuleType:
    return gateways if proxy.kind == "gateway" else sidecars


SECTIONS: tuple[tuple[str, Section], ...] = (
    (CLUSTER, lambda view, proxy: reporting.clusters(view, proxy, _room(proxy).clusters(view, proxy))),
    (ENDPOINTS, lambda view, proxy: _room(proxy).endpoints(view, proxy)),
    (EXTENSIONS, lambda view, proxy: _room(proxy).extensions(view, proxy)),
    (LISTENER, lambda view, proxy: _room(proxy).listeners(view, proxy)),
    (ROUTES, lambda view, proxy: _room(proxy).routes(view, proxy)),
)
"""What makes the resources of each type. What one of them needs it reads from the view and the proxy alone."""


def translate(view: View, proxy: ProxyNode) -> Configuration:
    """All that one proxy is told, but for secrets."""
    return {type_url: make(view, proxy) for type_url, make in SECTIONS}


__all__ = [
    "IN_CONFIG_MAP",
    "SECTIONS",
    "Configuration",
    "Section",
    "View",
    "credential_secret",
    "root_secret",
    "service_endpoints",
    "translate",
]
