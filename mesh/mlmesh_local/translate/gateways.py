"""What a gateway runs: a listener for each port of the Gateways that select it.

Istio's rules (pilot/pkg/networking/core/gateway.go in its source).
"""

from __future__ import annotations

from mlmesh_local.envoy_types import Json
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.domains import host_covers
from mlmesh_local.resources.gateways import UNIX
from mlmesh_local.resources.mesh_tls import TlsSettings
from mlmesh_local.resources.model_routes import VirtualService
from mlmesh_local.translate.authorization import authorization, authorization_extensions
from mlmesh_local.translate.clusters import outbound_clusters, outbound_endpoints
from mlmesh_local.translate.gateway_connections import (
    connection_chains,
    direct_clusters,
    direct_endpoints,
    passes_mesh_tls,
)
from mlmesh_local.translate.gateway_servers import Listening, Served, by_route_name, listening
from mlmesh_local.translate.gateway_tls import server_context
from mlmesh_local.translate.jwt import jwt_extensions
from mlmesh_local.translate.layer4 import Chain, distinct
from mlmesh_local.translate.listeners import TLS_INSPECTOR, manager
from mlmesh_local.translate.matches import is_catch_all
from mlmesh_local.translate.names import address, split_address
from mlmesh_local.translate.observation import route_tracing
from mlmesh_local.translate.proxy_headers import PROXY_PROTOCOL, counted, topology_of
from mlmesh_local.translate.routes import Frame, rule_routes
from mlmesh_local.translate.view import View
from mlmesh_local.translate.virtual_hosts import route_configuration

_Routes = dict[tuple[str, str, str], list[Json]]


def clusters(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """CDS."""
    found = outbound_clusters(view, proxy)
    places = listening(view, proxy)
    return found | direct_clusters(view, proxy, places, found) if passes_mesh_tls(places) else found


def endpoints(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """EDS."""
    found = outbound_endpoints(view, proxy)
    places = listening(view, proxy)
    return found | direct_endpoints(view, proxy, places, found) if passes_mesh_tls(places) else found


def extensions(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """ECDS: configurations of filters by name, for listeners that take them from there."""
    return {**authorization_extensions(view, proxy), **jwt_extensions(view, proxy)}


def listeners(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """LDS."""
    found = [_listener(view, proxy, place) for place in listening(view, proxy)]
    return {listener["name"]: listener for listener in found if listener["filter_chains"]}


def routes(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """RDS."""
    tracing = route_tracing(view, proxy, "gateway")
    checks = authorization(view, proxy)
    services = {service.host: service for service in view.services_seen_by(proxy)}
    result: dict[str, Json] = {}
    for name, served in by_route_name(listening(view, proxy)).items():
        frames = [
            Frame(
                view=view,
                proxy=proxy,
                gateway=one.gateway_name,
                listener_port=one.server.port,
                tracing=tracing,
                tls=one.server.tls is not None,
                services=services,
            )
            for one in served
        ]
        hosts = _virtual_hosts(list(zip(served, frames, strict=True)))
        configuration = route_configuration(name, counted(view, proxy, hosts))
        if checks:
            configuration["typed_per_filter_config"] = checks
        result[name] = configuration
    return result


# Listeners


def _listener(view: View, proxy: ProxyNode, place: Listening) -> Json:
    name = f"{place.bind or '0.0.0.0'}_{place.port}"  # noqa: S104  Istio's name; the address is the pod's
    chains = _chains(view, proxy, place, name)
    inspect = any(one.server.tls is not None and not one.server.speaks_http for one in place.servers)
    numbers = {one.server.port for one in place.servers}
    extra = [split_address(text) for number, text in proxy.extra_addresses if number in numbers]
    listener: Json = {
        "name": name,
        "address": _address(proxy, place),
        "additional_addresses": [{"address": address(host, number)} for host, number in extra],
        "traffic_direction": "OUTBOUND",
        "filter_chains": chains,
    }
    filters = [PROXY_PROTOCOL] if topology_of(view, proxy).proxy_protocol else []
    filters += [TLS_INSPECTOR] if inspect else []
    if filters:
        listener["listener_filters"] = filters
    return listener


def _address(proxy: ProxyNode, place: Listening) -> Json:
    if place.bind.startswith(UNIX):
        return {"pipe": {"path": place.bind.removeprefix(UNIX)}}
    return address(place.bind or proxy.pod_address, place.port)


def _chains(view: View, proxy: ProxyNode, place: Listening, name: str) -> list[Json]:
    """Filter chains of a listener; of those that take the same connections the first stays."""
    sockets: dict[int, Json] = {}
    titles: dict[int, str] = {}
    found: list[Chain] = []
    defaults = view.mesh_config.tls_defaults if view.mesh_config else TlsSettings()
    plain = False
    for one in place.servers:
        if one.server.speaks_http and plain:
            # It shares the routes of the first.
            continue
        plain = plain or one.server.speaks_http
        chains = [_requests(view, proxy, one, name)] if one.route_name else connection_chains(view, proxy, one)
        tls = one.server.tls
        if tls is not None and not tls.passes_through:
            sockets |= {id(chain.filters): server_context(tls, defaults) for chain in chains}
        titles |= {id(chain.filters): one.route_name for chain in chains if one.route_name}
        found += chains
    result: list[Json] = []
    for chain in distinct(found):
        envoy = chain.envoy()
        if id(chain.filters) in titles:
            envoy["name"] = titles[id(chain.filters)]
        if id(chain.filters) in sockets:
            envoy["transport_socket"] = sockets[id(chain.filters)]
        result.append(envoy)
    return result


def _requests(view: View, proxy: ProxyNode, one: Served, listener: str) -> Chain:
    server = one.server
    prefix = server.name if server.ends_https and server.name else f"outbound_{listener}"
    web = server.protocol == "GRPC-WEB"
    filters = (manager(view, proxy, "gateway", one.route_name, prefix, port=one.port, grpc_web=web),)
    return Chain(filters=filters, server_names=one.server_names if server.ends_https else ())


# Routes


def _virtual_hosts(served: list[tuple[Served, Frame]]) -> list[Json]:
    """Virtual hosts of servers that share routes. VirtualServices of one host are merged in order."""
    by_host: dict[str, Json] = {}
    made: _Routes = {}
    for one, frame in served:
        for service, hosts in frame.view.virtual_services(one.gateway_name, frame.proxy):
            common = common_hosts(one.hosts_for(service.meta.namespace), hosts)
            found = _routes_of(made, frame, service) if common else []
            if not found:
                continue
            for host in common:
                virtual_host = by_host.setdefault(host, _virtual_host(host, one.server.port))
                virtual_host["routes"].extend(found)
                if _redirects(one):
                    virtual_host["require_tls"] = "ALL"
        for host in one.hosts_for("*") if _redirects(one) else ():
            by_host.setdefault(host, _virtual_host(host, one.server.port))["require_tls"] = "ALL"
    if not by_host:
        port = served[0][0].server.port
        return [{"name": f"blackhole:{port}", "domains": ["*"], "routes": []}]
    merged = _collapsed(by_host)
    for virtual_host in merged:
        # What takes everything comes last, whichever VirtualService it is of.
        virtual_host["routes"] = sorted(virtual_host["routes"], key=lambda route: is_catch_all(route["match"]))
    return sorted(merged, key=lambda virtual_host: str(virtual_host["name"]))


def _redirects(one: Served) -> bool:
    return one.server.tls is not None and one.server.tls.https_redirect


def _routes_of(made: _Routes, frame: Frame, service: VirtualService) -> list[Json]:
    """Routes of a VirtualService, made once for all servers of a Gateway that share routes, as in Istio."""
    key = (frame.gateway, service.meta.namespace, service.meta.name)
    if key not in made:
        made[key] = rule_routes(frame, service)
    return made[key]


def _virtual_host(host: str, port: int) -> Json:
    return {"name": f"{host}:{port}", "domains": [host], "routes": [], "include_request_attempt_count": True}


def _collapsed(by_host: dict[str, Json]) -> list[Json]:
    """Hosts with the very same routes become one virtual host, under the name of the most specific."""
    known: dict[tuple[str, ...], Json] = {}
    for host in sorted(by_host, key=_specificity):
        virtual_host = by_host[host]
        key = (str(virtual_host.get("require_tls")), *(str(id(route)) for route in virtual_host["routes"]))
        if key in known:
            known[key]["domains"].append(host)
        else:
            known[key] = virtual_host
    return list(known.values())


def _specificity(host: str) -> tuple[bool, int, str]:
    return host.startswith("*"), -len(host), host


def common_hosts(server_hosts: tuple[str, ...], hosts: tuple[str, ...]) -> list[str]:
    """Hosts that both have; the narrower of the two where one is a wildcard."""
    common: list[str] = []
    for own in server_hosts:
        for other in hosts:
            if host_covers(other, own):
                common.append(own)
            elif host_covers(own, other):
                common.append(other)
    return list(dict.fromkeys(common))
