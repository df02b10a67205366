"""Resources, endpoints and identities in; Envoy's resources out, as proto-JSON. Pure: equal worlds give equal output.

Semantics, defaults and names are Istio's. Where they cannot be, the reason stands beside the code; what is not
supported was refused when the resources were read.
"""

from __future__ import annotations

from mlmesh_local.envoy_types import CLUSTER, ENDPOINTS, EXTENSIONS, LISTENER, ROUTES, Json
from mlmesh_local.model import ProxyNode
from mlmesh_local.translate import gateways, reporting, sidecars
from mlmesh_local.translate.tls import credential_secret
from mlmesh_local.translate.view import View, service_endpoints

Configuration = dict[str, dict[str, Json]]
"""Resources by type URL and name."""


def translate(view: View, proxy: ProxyNode) -> Configuration:
    """All that one proxy is told, but for secrets."""
    room = gateways if proxy.kind == "gateway" else sidecars
    return {
        CLUSTER: reporting.clusters(view, proxy, room.clusters(view, proxy)),
        ENDPOINTS: room.endpoints(view, proxy),
        EXTENSIONS: room.extensions(view, proxy),
        LISTENER: room.listeners(view, proxy),
        ROUTES: room.routes(view, proxy),
    }


__all__ = ["Configuration", "View", "credential_secret", "service_endpoints", "translate"]
