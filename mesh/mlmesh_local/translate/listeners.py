"""Listeners, filter chains and connection managers. They depend on ports and TLS, never on routes or policies.

What is forwarded below HTTP is the exception: routes of connections are filter chains, in Istio too.
"""

from __future__ import annotations

from typing import Final, Literal

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.mesh_tls import TlsSettings
from mlmesh_local.resources.model import FilterPatch, MtlsMode
from mlmesh_local.resources.protocols import Protocol, is_http
from mlmesh_local.translate import tls
from mlmesh_local.translate.authorization import authorization_filters, network_checks
from mlmesh_local.translate.dynamic_hosts import dynamic_filters
from mlmesh_local.translate.jwt import jwt_filter
from mlmesh_local.translate.layer4 import layer4_services, network_logs, outbound_chains
from mlmesh_local.translate.names import ADS, address, filter_of, inbound_cluster
from mlmesh_local.translate.observation import access_logging, manager_tracing
from mlmesh_local.translate.proxy_headers import headers_of, manager_headers
from mlmesh_local.translate.route_actions import CORS_FILTER, FAULT_FILTER, STATE_FILTER
from mlmesh_local.translate.view import View

Role = Literal["inbound", "outbound", "gateway"]
# Name of a chain, what it takes, its filters, whether with mutual TLS.
_Row = tuple[str, Json, list[Json], bool]
_CONTEXTS: Final = {"inbound": "SIDECAR_INBOUND", "outbound": "SIDECAR_OUTBOUND", "gateway": "GATEWAY"}

_MANAGER = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_GRPC_WEB = "envoy.extensions.filters.http.grpc_web.v3.GrpcWeb"
_GRPC_STATS = "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig"
_FAULT = "envoy.extensions.filters.http.fault.v3.HTTPFault"
_CORS = "envoy.extensions.filters.http.cors.v3.Cors"
_ROUTER = "envoy.extensions.filters.http.router.v3.Router"
_TCP_PROXY = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
_HTTP_INSPECTOR = "envoy.extensions.filters.listener.http_inspector.v3.HttpInspector"
_TLS_INSPECTOR = "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector"
_SET_STATE = "envoy.extensions.filters.http.set_filter_state.v3.Config"
TLS_INSPECTOR: Final[Json] = {"name": "envoy.filters.listener.tls_inspector", "typed_config": typed(_TLS_INSPECTOR)}
HTTP_INSPECTOR: Final[Json] = {"name": "envoy.filters.listener.http_inspector", "typed_config": typed(_HTTP_INSPECTOR)}
# What Istio's clients offer: of requests, of connections; other TLS is the application's own.
_REQUEST_ALPN = ["istio-http/1.0", "istio-http/1.1", "istio-h2"]
_CONNECTION_ALPN = ["istio-peer-exchange", "istio"]
_ISTIO_ALPN = [*_REQUEST_ALPN, *_CONNECTION_ALPN]
_PLAIN_HTTP: Final[Json] = {"transport_protocol": "raw_buffer", "application_protocols": ["http/1.1", "h2c"]}
_TLS: Final[Json] = {"transport_protocol": "tls"}
_RAW: Final[Json] = {"transport_protocol": "raw_buffer"}
_NORMALIZATIONS: Final[dict[str, Json]] = {
    "NONE": {"normalize_path": False},
    "MERGE_SLASHES": {"normalize_path": True, "merge_slashes": True},
    "DECODE_AND_MERGE_SLASHES": {
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "UNESCAPE_AND_FORWARD",
    },
}


def manager(
    view: View, proxy: ProxyNode, role: Role, route_name: str, stat_prefix: str, *, port: int, grpc_web: bool = False
) -> Json:
    """A connection manager as network filter; its routes come over RDS. ``grpc_web``: browsers' gRPC is translated."""
    filters = _filters(role, grpc_web=grpc_web, debug=headers_of(view, proxy).debug)
    if role != "inbound":
        filters[-1:-1] = dynamic_filters(view, proxy, port)
    config: Json = {
        "stat_prefix": stat_prefix,
        "codec_type": "AUTO",
        "rds": {"config_source": ADS, "route_config_name": route_name},
        "http_filters": _patched(filters, view.patches(proxy, _CONTEXTS[role], port)),
        **_NORMALIZATIONS.get(
            view.mesh_config.path_normalization if view.mesh_config else "", {"normalize_path": True}
        ),
        "stream_idle_timeout": "0s",
        "proxy_100_continue": True,
        "upgrade_configs": [{"upgrade_type": "websocket"}],
    }
    config.update(manager_headers(view, proxy, role))
    config.update(manager_tracing(view, proxy, role))
    config.update(access_logging(view, proxy, role))
    return filter_of("envoy.filters.network.http_connection_manager", _MANAGER, config)


def _filters(role: Role, *, grpc_web: bool, debug: bool) -> list[Json]:
    # Method names of strangers would make statistics without bound: by method only for one's own application's calls.
    stats: Json = {
        "stats_for_all_methods": role == "outbound",
        "enable_upstream_stats": role != "inbound",
        "emit_filter_state": True,
    }
    checks = [] if role == "outbound" else authorization_filters([jwt_filter()])
    return [
        *checks,
        *([filter_of("envoy.filters.http.grpc_web", _GRPC_WEB)] if grpc_web else []),
        filter_of("envoy.filters.http.grpc_stats", _GRPC_STATS, stats),
        filter_of(FAULT_FILTER, _FAULT),
        filter_of(CORS_FILTER, _CORS),
        # Routes of ports without a declared protocol tell the other side that it is HTTP.
        *([filter_of(STATE_FILTER, _SET_STATE)] if role == "outbound" else []),
        # Last: faults are injected before it, so it does not retry them.
        filter_of("envoy.filters.http.router", _ROUTER, None if debug else {"suppress_envoy_headers": True}),
    ]


def _patched(filters: list[Json], patches: tuple[FilterPatch, ...]) -> list[Json]:
    """Filters with those that EnvoyFilters add; a patch whose place is not there adds nothing, as in Istio."""
    for patch in patches:
        names = [each["name"] for each in filters]
        # Istio has several filters of one name where ours are told apart by an ending: "envoy.filters.http.rbac.deny".
        found = [n for n, name in enumerate(names) if f"{name}.".startswith(f"{patch.sub_filter}.")]
        if patch.sub_filter and not found:
            continue
        if patch.operation == "INSERT_FIRST" or (patch.operation == "INSERT_BEFORE" and not patch.sub_filter):
            place = 0
        elif patch.operation == "INSERT_BEFORE":
            place = found[0]
        else:
            place = found[0] + 1 if patch.sub_filter else len(names)
        # The router ends every request: nothing comes after it.
        filters.insert(min(place, len(filters) - 1), dict(patch.value))
    return filters


def outbound_listener(view: View, proxy: ProxyNode, port: int) -> Json:
    """Where a sidecar's application dials to call services on a port.

    Requests are routed by authority, connections with TLS by server name; of services of other connections the oldest
    has the port.
    """
    name = f"{proxy.outbound_address}_{port}"
    listener: Json = {
        "name": name,
        "address": address(proxy.outbound_address, port),
        "traffic_direction": "OUTBOUND",
    }
    services, requests = layer4_services(view, proxy, port)
    web = view.request_protocol(proxy, port) == "grpc-web"
    prefix = f"outbound_{name}"
    http = [manager(view, proxy, "outbound", str(port), prefix, port=port, grpc_web=web)] if requests else []
    if not services:
        return {**listener, "filter_chains": [{"filters": http}]}
    found = outbound_chains(view, proxy, port, services)
    chains = [chain.envoy() for chain in found if not chain.takes_all]
    others = [chain.envoy() for chain in found if chain.takes_all]
    inspectors = [TLS_INSPECTOR] if any(chain.server_names for chain in found) else []
    if http:
        chains.append({"filter_chain_match": _PLAIN_HTTP, "filters": http})
        inspectors.append(HTTP_INSPECTOR)
    if chains and others:
        listener["default_filter_chain"] = others[0]
    return {
        **listener,
        "continue_on_listener_filters_timeout": True,
        "listener_filters_timeout": "0s",
        "listener_filters": inspectors,
        "filter_chains": chains or others,
    }


def inbound_listener(view: View, proxy: ProxyNode, port: int, protocol: Protocol, mode: MtlsMode) -> Json:
    """Where a sidecar takes calls for one of its container ports: Istio's chains for the protocol and the mode."""
    name = f"{proxy.pod_address}_{port}"
    listener: Json = {
        "name": name,
        "address": address(proxy.pod_address, port),
        "traffic_direction": "INBOUND",
    }
    chains = _inbound_chains(view, proxy, port, protocol, mode)
    found = [chain.get("filter_chain_match", {}) for chain in chains]
    inspectors = [TLS_INSPECTOR] if mode != "DISABLE" else []
    if any("http/1.1" in match.get("application_protocols", ()) for match in found):
        inspectors.append(HTTP_INSPECTOR)
    listener["filter_chains"] = chains
    if not inspectors:
        return listener
    return {
        **listener,
        "continue_on_listener_filters_timeout": True,
        "listener_filters_timeout": "0s",
        "listener_filters": inspectors,
    }


def _inbound_chains(view: View, proxy: ProxyNode, port: int, protocol: Protocol, mode: MtlsMode) -> list[Json]:
    name = f"{proxy.pod_address}_{port}"
    web = protocol == "grpc-web"
    http = [manager(view, proxy, "inbound", inbound_cluster(port), f"inbound_{name}", port=port, grpc_web=web)]
    tcp = [] if is_http(protocol) else _inbound_connection(view, proxy, port)
    settings = view.mesh_config.mesh_mtls if view.mesh_config else TlsSettings()
    secure = tls.mesh_server(view.trust_domains, settings)
    strict: list[_Row]
    plain: list[_Row]
    mixed: list[_Row]
    if is_http(protocol):
        strict = [("mtls", _TLS, http, True)]
        plain = [("plaintext", _RAW, http, False)]
        mixed = [("mtls", {**_TLS, "application_protocols": _ISTIO_ALPN}, http, True), *plain]
    elif protocol == "unknown":
        of_requests: _Row = ("mtls-http", {**_TLS, "application_protocols": _REQUEST_ALPN}, http, True)
        strict = [of_requests, ("mtls", _TLS, tcp, True)]
        plain = [("plaintext-http", _PLAIN_HTTP, http, False), ("plaintext", _RAW, tcp, False)]
        mixed = [
            of_requests,
            ("mtls", {**_TLS, "application_protocols": _CONNECTION_ALPN}, tcp, True),
            ("tls-of-the-application", _TLS, tcp, False),
            *plain,
        ]
    else:
        strict = [("mtls", _TLS, tcp, True)]
        plain = [("plaintext", _RAW, tcp, False)]
        mixed = [
            ("mtls", {**_TLS, "application_protocols": _ISTIO_ALPN}, tcp, True),
            ("tls-of-the-application", _TLS, tcp, False),
            *plain,
        ]
    rows = strict if mode == "STRICT" else plain if mode == "DISABLE" else mixed
    return [
        {
            "name": chain,
            "filter_chain_match": match,
            "filters": filters,
            **({"transport_socket": secure} if mutual else {}),
        }
        for chain, match, filters, mutual in rows
    ]


def _inbound_connection(view: View, proxy: ProxyNode, port: int) -> list[Json]:
    """Filters of connections to the application."""
    cluster = inbound_cluster(port)
    config: Json = {"stat_prefix": cluster, "cluster": cluster, **network_logs(view, proxy, "inbound")}
    return [*network_checks(view, proxy), filter_of("envoy.filters.network.tcp_proxy", _TCP_PROXY, config)]
