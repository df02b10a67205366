"""What a gateway runs: a listener for each port of the Gateways that select it."""

from __future__ import annotations

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.catalog import host_matches
from mlmesh_local.resources.model import Gateway, GatewayServer
from mlmesh_local.translate import tls
from mlmesh_local.translate.authorization import authorization, authorization_extensions
from mlmesh_local.translate.clusters import outbound_clusters, outbound_endpoints
from mlmesh_local.translate.jwt import jwt_extensions
from mlmesh_local.translate.listeners import manager
from mlmesh_local.translate.matches import ANYTHING
from mlmesh_local.translate.names import address, split_address
from mlmesh_local.translate.observation import route_tracing
from mlmesh_local.translate.routes import Frame, rule_routes
from mlmesh_local.translate.view import View

Served = tuple[Gateway, GatewayServer]


def clusters(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """CDS."""
    return outbound_clusters(view, proxy)


def endpoints(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """EDS."""
    return outbound_endpoints(view, proxy)


def extensions(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """ECDS: configurations of filters by name, for listeners that take them from there."""
    return {**authorization_extensions(view, proxy), **jwt_extensions(view, proxy)}


def listeners(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """LDS."""
    found = [_listener(view, proxy, port, served) for port, served in _servers(view, proxy).items()]
    return {listener["name"]: listener for listener in found}


def routes(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """RDS."""
    tracing = route_tracing(view, proxy, "gateway")
    checks = authorization(view, proxy)
    result: dict[str, Json] = {}
    for port, served in _servers(view, proxy).items():
        for name, group in _by_route_name(served).items():
            configuration: Json = {
                "name": name,
                "virtual_hosts": _virtual_hosts(view, proxy, port, group, tracing),
                "validate_clusters": False,
            }
            if checks:
                configuration["typed_per_filter_config"] = checks
            result[name] = configuration
    return result


def _servers(view: View, proxy: ProxyNode) -> dict[int, list[Served]]:
    found: dict[int, list[Served]] = {}
    for gateway in view.gateways(proxy):
        for server in gateway.servers:
            found.setdefault(server.port, []).append((gateway, server))
    return dict(sorted(found.items()))


def _route_name(gateway: Gateway, server: GatewayServer) -> str:
    if server.tls is None:
        return f"http.{server.port}"
    return f"https.{server.port}.{server.port_name}.{gateway.meta.name}.{gateway.meta.namespace}"


def _by_route_name(served: list[Served]) -> dict[str, list[Served]]:
    groups: dict[str, list[Served]] = {}
    for gateway, server in served:
        groups.setdefault(_route_name(gateway, server), []).append((gateway, server))
    return groups


def _listener(view: View, proxy: ProxyNode, port: int, served: list[Served]) -> Json:
    name = f"0.0.0.0_{port}"
    chains: list[Json] = []
    for route_name, group in _by_route_name(served).items():
        _, server = group[0]
        chain: Json = {
            "name": route_name,
            "filters": [manager(view, proxy, "gateway", route_name, f"outbound_{name}", port=port)],
        }
        if server.tls:
            chain["transport_socket"] = tls.gateway_server(server.tls, view.trust_domains)
            named = [] if "*" in server.hosts or len(served) == 1 else list(server.hosts)
            if named:
                chain["filter_chain_match"] = {"server_names": named}
        chains.append(chain)
    extra = [split_address(text) for number, text in proxy.extra_addresses if number == port]
    listener: Json = {
        "name": name,
        "address": address(proxy.pod_address, port),
        "additional_addresses": [{"address": address(host, number)} for host, number in extra],
        "traffic_direction": "OUTBOUND",
        "filter_chains": chains,
    }
    if any("filter_chain_match" in chain for chain in chains):
        inspector = typed("envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector")
        listener["listener_filters"] = [{"name": "envoy.filters.listener.tls_inspector", "typed_config": inspector}]
    return listener


def _virtual_hosts(view: View, proxy: ProxyNode, port: int, served: list[Served], tracing: Json | None) -> list[Json]:
    by_host: dict[str, list[Json]] = {}
    for gateway, server in served:
        name = f"{gateway.meta.namespace}/{gateway.meta.name}"
        frame = Frame(view=view, proxy=proxy, gateway=name, listener_port=port, tracing=tracing)
        for service, hosts in view.virtual_services(name, proxy.namespace):
            for host in _common_hosts(_hosts_for(server, service.meta.namespace), hosts):
                # VirtualServices of one host are merged in order, as in Istio.
                by_host.setdefault(host, []).extend(rule_routes(frame, service))
    result = [
        {
            "name": f"{host}:{port}",
            "domains": ["*"] if host == "*" else [host, f"{host}:*"] if "*" not in host else [host],
            "routes": found,
            "include_request_attempt_count": True,
        }
        for host, found in sorted(by_host.items())
        if found
    ]
    if "*" not in by_host:
        result.append(_nothing_here())
    return result


def _hosts_for(server: GatewayServer, namespace: str) -> tuple[str, ...]:
    """Hosts of a server that VirtualServices of a namespace may bind to."""
    bounds = zip(server.hosts, server.host_namespaces, strict=True)
    return tuple(host for host, bound in bounds if bound in ("*", namespace))


def _common_hosts(server_hosts: tuple[str, ...], hosts: tuple[str, ...]) -> list[str]:
    """Hosts of a VirtualService that a server serves; the narrower of the two where one is a wildcard."""
    common: list[str] = []
    for host in hosts:
        for server_host in server_hosts:
            if host_matches(server_host, host):
                common.append(host)
            elif host_matches(host, server_host):
                common.append(server_host)
    return list(dict.fromkeys(common))


def _nothing_here() -> Json:
    answer = {"status": 404, "body": {"inline_string": "no VirtualService of this gateway has this host name"}}
    return {
        "name": "blackhole",
        "domains": ["*"],
        "routes": [{"name": "blackhole", "match": dict(ANYTHING), "direct_response": answer}],
    }
