"""Connections at a gateway: TCP servers, TLS that is ended and forwarded, TLS that is passed through by server name.

Istio's rules (pilot/pkg/networking/core/gateway.go in its source).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlmesh_local.envoy_types import Json
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.catalog import HostPolicy
from mlmesh_local.resources.domains import host_covers, hosts_overlap
from mlmesh_local.resources.model_routes import Layer4Match, VirtualService
from mlmesh_local.translate import names
from mlmesh_local.translate.gateway_servers import Listening, Served
from mlmesh_local.translate.layer4 import Chain, counted, forward, tcp_proxy, wanted_names
from mlmesh_local.translate.routes import Frame
from mlmesh_local.translate.view import View

MESH_ALPN = ("istio", "istio-peer-exchange", "istio-http/1.0", "istio-http/1.1", "istio-h2")
# One such server is enough for the clusters of every service, as in Istio: only its chains go by its hosts.
_ALL = ("*",)
_OF_THE_ENDS = ("transport_socket", "transport_socket_matches", "alt_stat_name")


def connection_chains(view: View, proxy: ProxyNode, one: Served) -> list[Chain]:
    """Filter chains of a server that takes connections."""
    services = {service.host: service for service in view.services_seen_by(proxy)}
    frame = Frame(
        view=view,
        proxy=proxy,
        gateway=one.gateway_name,
        listener_port=one.server.port,
        tracing=None,
        services=services,
    )
    tls = one.server.tls
    if tls is not None and tls.mode == "AUTO_PASSTHROUGH":
        return [_direct_chain(frame, direct) for direct in _direct(view, proxy, one.server.hosts)]
    if tls is not None and tls.passes_through:
        return _passed_through(frame, one)
    chain = _forwarded(frame, one)
    return [chain] if chain else []


def _bound(frame: Frame, one: Served) -> Iterator[VirtualService]:
    """VirtualServices of the gateway that have a host of the server."""
    for service, hosts in frame.view.virtual_services(one.gateway_name, frame.proxy):
        own = one.hosts_for(service.meta.namespace)
        if any(hosts_overlap(host, other) for host in own for other in hosts):
            yield service


def _applies(match: Layer4Match, frame: Frame) -> bool:
    """At gateways only the port and the gateway count; who calls is not known."""
    return match.port in (0, frame.listener_port) and (not match.gateways or frame.gateway in match.gateways)


def _forwarded(frame: Frame, one: Served) -> Chain | None:
    """The chain of the first rule that fits: all connections of the server go there."""
    for service in _bound(frame, one):
        name = f"{service.meta.name}.{service.meta.namespace}"
        for rule in service.tcp:
            fits = not rule.matches or any(_applies(match, frame) for match in rule.matches)
            if rule.destinations and fits:
                filters = forward(frame, rule.destinations, name, mongo=one.server.protocol == "MONGO")
                named = one.server_names if one.server.tls is not None else ()
                return Chain(filters=tuple(filters), server_names=named)
        if service.semantics == "gateway":
            # A TLSRoute whose TLS ends here.
            for rule in service.tls:
                if rule.destinations and any(_applies(match, frame) for match in rule.matches):
                    filters = forward(frame, rule.destinations, name)
                    return Chain(filters=tuple(filters), server_names=one.server_names)
    return None


def _passed_through(frame: Frame, one: Served) -> list[Chain]:
    """A chain for each match by server name; one with a name that is taken is left out whole."""
    chains: list[Chain] = []
    taken: set[str] = set()
    for service in _bound(frame, one):
        for rule in service.tls:
            for match in rule.matches:
                if not rule.destinations or not _applies(match, frame) or taken & set(match.sni_hosts):
                    continue
                taken |= set(match.sni_hosts)
                filters = forward(frame, rule.destinations, f"{service.meta.name}.{service.meta.namespace}")
                chains.append(Chain(filters=tuple(filters), server_names=wanted_names(match.sni_hosts)))
    return chains


# AUTO_PASSTHROUGH: mutual TLS of sidecars goes on to the service that its server name says.


def passes_mesh_tls(places: list[Listening]) -> bool:
    """Whether there is a server of mode AUTO_PASSTHROUGH."""
    return any(
        one.server.tls is not None and one.server.tls.mode == "AUTO_PASSTHROUGH"
        for place in places
        for one in place.servers
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Direct:
    """What a server of that mode passes on: its server name, and the cluster of sidecars that it stands for."""

    name: str
    origin: str
    subset: str
    rules: HostPolicy
    mongo: bool


def _direct(view: View, proxy: ProxyNode, hosts: Sequence[str]) -> Iterator[_Direct]:
    for service in view.services_seen_by(proxy):
        if service.external or not any(host_covers(host, service.host) for host in hosts):
            continue
        rules = view.policy(service, proxy)
        for port in service.ports:
            for subset in ("", *(subset.name for subset in rules.subsets)):
                yield _Direct(
                    name=names.sni(port.number, subset, service.host),
                    origin=names.outbound_cluster(port.number, subset, service.host),
                    subset=subset,
                    rules=rules,
                    mongo=port.protocol == "mongo",
                )


def _direct_chain(frame: Frame, direct: _Direct) -> Chain:
    name = direct.name
    proxy = tcp_proxy(frame, {"cluster": name}, name, direct.rules, direct.subset, tunnels=False)
    return Chain(filters=(*counted(name, direct.mongo), proxy), server_names=(name,), protocols=MESH_ALPN)


def direct_clusters(
    view: View, proxy: ProxyNode, places: list[Listening], clusters: dict[str, Json]
) -> dict[str, Json]:
    """Clusters without TLS of their own: what comes is encrypted already."""
    result: dict[str, Json] = {}
    for direct in _direct(view, proxy, _ALL) if passes_mesh_tls(places) else ():
        name, origin = direct.name, direct.origin
        cluster = clusters.get(origin, {})
        if cluster.get("type") == "EDS":
            result[name] = {
                **{field: value for field, value in cluster.items() if field not in _OF_THE_ENDS},
                "name": name,
                "eds_cluster_config": {**cluster["eds_cluster_config"], "service_name": name},
            }
    return result


def direct_endpoints(
    view: View, proxy: ProxyNode, places: list[Listening], endpoints: dict[str, Json]
) -> dict[str, Json]:
    """Endpoints of those clusters: only such as take mutual TLS."""
    result: dict[str, Json] = {}
    for direct in _direct(view, proxy, _ALL) if passes_mesh_tls(places) else ():
        name, origin = direct.name, direct.origin
        if origin in endpoints:
            localities = [
                {**group, "lb_endpoints": [one for one in group["lb_endpoints"] if "metadata" in one]}
                for group in endpoints[origin]["endpoints"]
            ]
            result[name] = {"cluster_name": name, "endpoints": localities}
    return result
