"""Servers of all Gateways of a proxy as one: which share a listener, and which are left out since they do not fit.

Istio's rules (pilot/pkg/model/gateway.go): of servers of one port and address, those with plain HTTP share routes,
those with TLS are told apart by server name; what does not fit to an older server is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.catalog import CatalogService, selects
from mlmesh_local.resources.gateways import UNIX
from mlmesh_local.resources.model_gateways import Gateway, GatewayServer
from mlmesh_local.translate.view import View

_NO_TRANSLATION = "experimental.istio.io/disable-gateway-port-translation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A server of a Gateway on a port of the proxy."""

    gateway: Gateway
    server: GatewayServer
    port: int
    bind: str

    @property
    def gateway_name(self) -> str:
        """ "namespace/name" of the Gateway."""
        return f"{self.gateway.meta.namespace}/{self.gateway.meta.name}"

    @property
    def route_name(self) -> str:
        """Name of its route configuration; empty where it takes no requests."""
        bind = f".{self.bind}" if self.bind else ""
        if self.server.speaks_http:
            return f"http.{self.port}{bind}"
        if self.server.ends_https:
            meta = self.gateway.meta
            return f"https.{self.server.port}.{self.server.port_name}.{meta.name}.{meta.namespace}{bind}"
        return ""

    @property
    def server_names(self) -> tuple[str, ...]:
        """Server names that TLS clients of it send, in order; empty is every name."""
        return () if "*" in self.server.hosts else tuple(sorted(set(self.server.hosts)))

    def hosts_for(self, namespace: str) -> tuple[str, ...]:
        """Hosts that VirtualServices of a namespace may bind to."""
        bounds = zip(self.server.hosts, self.server.host_namespaces, strict=True)
        return tuple(host for host, bound in bounds if bound in ("*", namespace))


@dataclass(slots=True)
class Listening:
    """Servers of one port and address, in the order of their Gateways."""

    port: int
    bind: str
    servers: list[Served] = field(default_factory=list)


def listening(view: View, proxy: ProxyNode) -> list[Listening]:
    """What a gateway proxy listens on."""
    found: dict[tuple[int, str], Listening] = {}
    names: dict[tuple[int, str], set[str]] = {}
    for gateway in view.gateways(proxy):
        for server in gateway.servers:
            one = Served(
                gateway=gateway,
                server=server,
                port=listening_port(view.services.values(), proxy, server.port),
                bind=_bind(server),
            )
            key = (one.port, one.bind)
            if server.tls is not None:
                taken = names.setdefault(key, set())
                own = {f"{bound}/{host}" for bound, host in zip(server.host_namespaces, server.hosts, strict=True)}
                if own & taken:
                    continue
                taken |= own
            place = found.setdefault(key, Listening(one.port, one.bind))
            if _fits(one, place.servers):
                place.servers.append(one)
    return [place for _, place in sorted(found.items()) if place.servers]


def _fits(one: Served, others: list[Served]) -> bool:
    if not others:
        return True
    plain = [other for other in others if other.server.tls is None or other.server.speaks_http]
    if plain:
        return one.server.speaks_http and all(other.server.speaks_http for other in plain)
    if one.server.tls is None or one.server.speaks_http:
        # Plain connections beside TLS: those without a server name are its.
        return all(other.server_names for other in others)
    return not one.route_name or all(other.route_name != one.route_name for other in others)


def by_route_name(places: Iterable[Listening]) -> dict[str, list[Served]]:
    """Servers that take requests, by the name of their routes."""
    groups: dict[str, list[Served]] = {}
    for place in places:
        for one in place.servers:
            if one.route_name:
                groups.setdefault(one.route_name, []).append(one)
    return groups


def _bind(server: GatewayServer) -> str:
    """Only loopback addresses and sockets of files are bound: all others are the gateway's own address here."""
    return server.bind if server.bind.startswith((UNIX, "127.")) else ""


def outside_port(
    services: Iterable[CatalogService], proxy: ProxyNode, ports: Iterable[int], outside: int
) -> int | None:
    """Which of a gateway's ports an address outside of the mesh is for: that of its own number, else the lowest.

    "443" of a Service that stands for 8443 is of both numbers.
    """
    known = sorted(set(ports))
    alike = [port for port in known if outside in (port, listening_port(services, proxy, port))]
    return next(iter(alike or known), None)


def listening_port(services: Iterable[CatalogService], proxy: ProxyNode, port: int) -> int:
    """The port of the proxy behind a server's: a port of a Service of the proxy stands for its targetPort."""
    for service in services:
        if not service.selector or service.namespace != proxy.namespace or _NO_TRANSLATION in service.labels:
            continue
        if not selects(service.selector, proxy.labels):
            continue
        described = service.port(port)
        if described is not None:
            target = described.target
            return target if isinstance(target, int) else proxy.container_ports.get(target, port)
    return port
