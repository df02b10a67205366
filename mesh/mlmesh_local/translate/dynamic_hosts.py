"""Wildcard hosts whose names are resolved when they are called: ServiceEntries with resolution DYNAMIC_DNS (or NONE).

Envoy's dynamic forward proxy needs a filter that resolves, and a cluster that goes where it led; both share a cache.
"""

from __future__ import annotations

from mlmesh_local.envoy_types import Json
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.catalog import CatalogService
from mlmesh_local.resources.protocols import is_http
from mlmesh_local.translate.names import filter_of
from mlmesh_local.translate.view import View

_FILTER = "envoy.extensions.filters.http.dynamic_forward_proxy.v3.FilterConfig"


def is_dynamic(service: CatalogService) -> bool:
    """Whether a service is a wildcard that is resolved when it is called."""
    return service.host.startswith("*") and service.resolution in ("DYNAMIC_DNS", "NONE")


def dns_cache(host: str) -> Json:
    """DnsCacheConfig that the filter and the clusters of a host share, named as in Istio."""
    return {"name": f"{host}_dfp_dns_cache", "dns_lookup_family": "V4_ONLY"}


def dynamic_filters(view: View, proxy: ProxyNode, port: int) -> list[Json]:
    """Filters for the wildcard hosts of a port; each leaves alone what is not sent to a cluster of its kind."""
    return [
        filter_of("envoy.filters.http.dynamic_forward_proxy", _FILTER, {"dns_cache_config": dns_cache(service.host)})
        for service in view.services_seen_by(proxy)
        if is_dynamic(service)
        and (proxy.kind == "gateway" or any(p.number == port and is_http(p.protocol) for p in service.ports))
    ]
