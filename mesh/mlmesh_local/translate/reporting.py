"""What proxies report to the control plane of every request and connection: Istio's metrics are made of it there.

The Envoy of the laptop lacks Istio's stats filter. In its place stands an access logger of Envoy's own, which sends to
the access log service of the control plane. It is the same for all proxies and for every Telemetry resource, but for
the headers that labels are made of: what is counted, and how, is decided where it is counted.
"""

from __future__ import annotations

import functools
from typing import Final, Literal

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.model import ProxyNode
from mlmesh_local.translate.names import address, split_address
from mlmesh_local.translate.view import View

Role = Literal["inbound", "outbound", "gateway"]

CLUSTER: Final = "envoy_accesslog_service"
"""Cluster of the access log service; Istio's name."""
REPORT_S: Final = 5
"""How often what goes on is reported; Istio's default."""
FLUSH: Final = "0.250s"
BUFFER_BYTES: Final = 65536
CONNECTION_BUFFER_BYTES: Final = 64 * 1024 * 1024
"""Entries wait here while the control plane is busy; beyond it Envoy drops them, and counts what it drops."""
_HTTP: Final = "envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig"
_TCP: Final = "envoy.extensions.access_loggers.grpc.v3.TcpGrpcAccessLogConfig"
_OPTIONS: Final = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def reports(view: View) -> bool:
    """Whether there is somebody to report to."""
    return bool(view.world.als_address)


def clusters(view: View, proxy: ProxyNode, found: dict[str, Json]) -> dict[str, Json]:
    """The clusters of a proxy with that of the access log service, and with its own address on calls into the mesh.

    By its address the other side knows which workload calls: several may share a ServiceAccount.
    """
    if not reports(view):
        return found
    return view.part(("reporting clusters", proxy.id), functools.partial(_clusters, view, proxy, found), found)


def _clusters(view: View, proxy: ProxyNode, found: dict[str, Json]) -> dict[str, Json]:
    result: dict[str, Json] = {}
    for name, cluster in found.items():
        if _is_inside(view, name, cluster):
            make = functools.partial(_bound, cluster, proxy.pod_address)
            # What stays the same object is not packed again.
            result[name] = view.part(("reporting cluster", proxy.id, name), make, cluster)
        else:
            result[name] = cluster
    result[CLUSTER] = _cluster(view.world.als_address)
    return result


def _bound(cluster: Json, pod_address: str) -> Json:
    return {**cluster, "upstream_bind_config": {"source_address": {"address": pod_address, "port_value": 0}}}


def _is_inside(view: View, name: str, cluster: Json) -> bool:
    """Whether all endpoints are pods of this mesh: from a loopback address nothing outside can be reached."""
    service = view.services.get(name.rpartition("|")[2])
    return cluster.get("type") == "EDS" and service is not None and not service.is_entry


def http_logger(view: View, role: Role, headers: Headers) -> Json | None:
    """The access logger of a connection manager."""
    if not reports(view):
        return None
    request, response = headers
    config = {
        "common_config": _common(role, filter_state=True),
        "additional_request_headers_to_log": ["content-type", *sorted(request - {"content-type"})],
        "additional_response_headers_to_log": ["grpc-status", *sorted(response - {"grpc-status"})],
        "additional_response_trailers_to_log": ["grpc-status"],
    }
    return {"name": "envoy.access_loggers.http_grpc", "typed_config": typed(_HTTP, config)}


def tcp_logger(view: View, role: Role) -> Json | None:
    """The access logger of a TCP proxy."""
    if not reports(view):
        return None
    config = {"common_config": _common(role, filter_state=False)}
    return {"name": "envoy.access_loggers.tcp_grpc", "typed_config": typed(_TCP, config)}


Headers = tuple[frozenset[str], frozenset[str]]
"""Names of request and of response headers that labels are made of."""


def _common(role: Role, *, filter_state: bool) -> Json:
    config: Json = {
        "log_name": role,
        "grpc_service": {"envoy_grpc": {"cluster_name": CLUSTER}},
        "transport_api_version": "V3",
        "buffer_flush_interval": FLUSH,
        "buffer_size_bytes": BUFFER_BYTES,
    }
    if filter_state:
        config["filter_state_objects_to_log"] = ["envoy.filters.http.grpc_stats"]
    if role != "inbound":
        # Entries of their own accord tell the cluster only when a host of it was found.
        config["custom_tags"] = [
            {"tag": "upstream_peer", "value": "%UPSTREAM_PEER_URI_SAN%"},
            {"tag": "cluster", "value": "%UPSTREAM_CLUSTER_RAW%"},
        ]
    if role != "inbound" and filter_state:
        # Which rule of which VirtualService routed the call; TCP proxies have no routes.
        config["custom_tags"] += [
            {"tag": "resource", "value": "%METADATA(ROUTE:istio:config)%"},
            {"tag": "rule", "value": "%METADATA(ROUTE:mlmesh)%"},
        ]
    return config


def _cluster(als_address: str) -> Json:
    host, port = split_address(als_address)
    endpoint = {"endpoint": {"address": address(host, port)}}
    return {
        "name": CLUSTER,
        "type": "STATIC",
        "connect_timeout": "1s",
        "per_connection_buffer_limit_bytes": CONNECTION_BUFFER_BYTES,
        "load_assignment": {"cluster_name": CLUSTER, "endpoints": [{"lb_endpoints": [endpoint]}]},
        "typed_extension_protocol_options": {
            _OPTIONS: typed(_OPTIONS, {"explicit_http_config": {"http2_protocol_options": {}}})
        },
    }
