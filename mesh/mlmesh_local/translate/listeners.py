"""Listeners, filter chains and connection managers. They depend on ports and TLS, never on routes or policies."""

from __future__ import annotations

from typing import Final, Literal

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.model import FilterPatch, MtlsMode
from mlmesh_local.translate import tls
from mlmesh_local.translate.authorization import authorization_filters
from mlmesh_local.translate.jwt import jwt_filter
from mlmesh_local.translate.names import ADS, address, filter_of, inbound_cluster
from mlmesh_local.translate.observation import access_logging, manager_tracing
from mlmesh_local.translate.route_actions import CORS_FILTER, FAULT_FILTER
from mlmesh_local.translate.view import View

Role = Literal["inbound", "outbound", "gateway"]
_CONTEXTS: Final = {"inbound": "SIDECAR_INBOUND", "outbound": "SIDECAR_OUTBOUND", "gateway": "GATEWAY"}

_MANAGER = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_GRPC_STATS = "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig"
_FAULT = "envoy.extensions.filters.http.fault.v3.HTTPFault"
_CORS = "envoy.extensions.filters.http.cors.v3.Cors"
_ROUTER = "envoy.extensions.filters.http.router.v3.Router"
_TCP_PROXY = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
_INSPECTOR = "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector"
# What Istio's clients offer first; other TLS is the application's own.
_ISTIO_ALPN = ["istio-http/1.0", "istio-http/1.1", "istio-h2", "istio-peer-exchange", "istio"]


def manager(view: View, proxy: ProxyNode, role: Role, route_name: str, stat_prefix: str, *, port: int) -> Json:
    """A connection manager as network filter; its routes come over RDS."""
    config: Json = {
        "stat_prefix": stat_prefix,
        "codec_type": "AUTO",
        "rds": {"config_source": ADS, "route_config_name": route_name},
        "http_filters": _patched(_filters(role), view.patches(proxy, _CONTEXTS[role], port)),
        "server_name": "istio-envoy",
        "normalize_path": True,
        "stream_idle_timeout": "0s",
        "upgrade_configs": [{"upgrade_type": "websocket"}],
    }
    if role == "gateway":
        config["use_remote_address"] = True
    if role != "outbound":
        # Behind this, the last element of x-forwarded-client-cert is who called; a gateway drops what clients sent.
        config["forward_client_cert_details"] = "SANITIZE_SET" if role == "gateway" else "APPEND_FORWARD"
        config["set_current_client_cert_details"] = {
            "subject": True,
            "dns": True,
            "uri": True,
            "cert": role == "gateway",
        }
    tracing = manager_tracing(view, proxy)
    if tracing:
        config["tracing"] = tracing
    config.update(access_logging(view, proxy, role))
    return filter_of("envoy.filters.network.http_connection_manager", _MANAGER, config)


def _filters(role: Role) -> list[Json]:
    # Method names of strangers would make statistics without bound: by method only for one's own application's calls.
    stats: Json = {
        "stats_for_all_methods": role == "outbound",
        "enable_upstream_stats": role != "inbound",
        "emit_filter_state": True,
    }
    checks = [] if role == "outbound" else authorization_filters([jwt_filter()])
    return [
        *checks,
        filter_of("envoy.filters.http.grpc_stats", _GRPC_STATS, stats),
        filter_of(FAULT_FILTER, _FAULT),
        filter_of(CORS_FILTER, _CORS),
        # Last: faults are injected before it, so it does not retry them.
        filter_of("envoy.filters.http.router", _ROUTER),
    ]


def _patched(filters: list[Json], patches: tuple[FilterPatch, ...]) -> list[Json]:
    """Filters with those that EnvoyFilters add; a patch whose place is not there adds nothing, as in Istio."""
    for patch in patches:
        names = [each["name"] for each in filters]
        if patch.sub_filter and patch.sub_filter not in names:
            continue
        if patch.operation == "INSERT_FIRST" or (patch.operation == "INSERT_BEFORE" and not patch.sub_filter):
            place = 0
        elif patch.operation == "INSERT_BEFORE":
            place = names.index(patch.sub_filter)
        else:
            place = names.index(patch.sub_filter) + 1 if patch.sub_filter else len(names)
        # The router ends every request: nothing comes after it.
        filters.insert(min(place, len(filters) - 1), dict(patch.value))
    return filters


def outbound_listener(view: View, proxy: ProxyNode, port: int) -> Json:
    """Where a sidecar's application dials to call services on a port; routed by authority."""
    name = f"{proxy.outbound_address}_{port}"
    return {
        "name": name,
        "address": address(proxy.outbound_address, port),
        "traffic_direction": "OUTBOUND",
        "filter_chains": [{"filters": [manager(view, proxy, "outbound", str(port), f"outbound_{name}", port=port)]}],
    }


def inbound_listener(view: View, proxy: ProxyNode, port: int, mode: MtlsMode) -> Json:
    """Where a sidecar takes calls for one of its container ports."""
    name = f"{proxy.pod_address}_{port}"
    listener: Json = {
        "name": name,
        "address": address(proxy.pod_address, port),
        "traffic_direction": "INBOUND",
    }
    http = [manager(view, proxy, "inbound", inbound_cluster(port), f"inbound_{name}", port=port)]
    secure: Json = {"name": "mtls", "filters": http, "transport_socket": tls.mesh_server(view.world.trust_domain)}
    if mode == "STRICT":
        return {**listener, "filter_chains": [secure]}
    plain: Json = {"name": "plaintext", "filters": http}
    if mode == "DISABLE":
        return {**listener, "filter_chains": [plain]}
    secure["filter_chain_match"] = {"transport_protocol": "tls", "application_protocols": _ISTIO_ALPN}
    plain["filter_chain_match"] = {"transport_protocol": "raw_buffer"}
    own_tls: Json = {
        "name": "tls-of-the-application",
        "filter_chain_match": {"transport_protocol": "tls"},
        "filters": [
            filter_of(
                "envoy.filters.network.tcp_proxy",
                _TCP_PROXY,
                {"stat_prefix": f"inbound_{name}", "cluster": inbound_cluster(port)},
            )
        ],
    }
    inspector = {"name": "envoy.filters.listener.tls_inspector", "typed_config": typed(_INSPECTOR)}
    return {**listener, "listener_filters": [inspector], "filter_chains": [secure, own_tls, plain]}
