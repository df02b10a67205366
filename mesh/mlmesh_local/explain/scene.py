"""A world, and the configuration of the proxies that a call meets; each is translated once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mlmesh_local.envoy_types import CLUSTER, ENDPOINTS, EXTENSIONS, LISTENER, ROUTES, Json
from mlmesh_local.explain.chains import MANAGER, network_filter
from mlmesh_local.explain.provenance import Provenance
from mlmesh_local.model import ProxyNode, World
from mlmesh_local.translate import Configuration, View, translate


class Scene:
    """What explanations read.

    Args:
        world: resources, proxies and endpoints.
        now_s: seconds since 1970, for tokens.
        sent: what proxies were really told, by node id, where that is known; others are translated from the world.
    """

    def __init__(self, world: World, *, now_s: float, sent: Mapping[str, Configuration] | None = None) -> None:
        self.world = world
        self.view = View(world)
        self.now_s = now_s
        self.provenance = Provenance(self.view.resources)
        self._configurations: dict[str, Configuration] = dict(sent or {})
        self._by_address = {proxy.pod_address: proxy for proxy in world.proxies}
        by_name = {proxy.id: proxy for proxy in world.proxies}
        # Where connections are disturbed on purpose, an instance is dialed at another address than its own.
        self._by_address |= {
            endpoint.address: by_name[endpoint.instance]
            for endpoint in world.endpoints
            if endpoint.instance in by_name and endpoint.mesh_tls
        }

    def configuration(self, proxy: ProxyNode) -> Configuration:
        """All that a proxy is told."""
        if proxy.id not in self._configurations:
            self._configurations[proxy.id] = translate(self.view, proxy)
        return self._configurations[proxy.id]

    def clusters(self, proxy: ProxyNode) -> dict[str, Json]:
        """Clusters by name."""
        return self.configuration(proxy).get(CLUSTER, {})

    def endpoints(self, proxy: ProxyNode) -> dict[str, Json]:
        """Assignments by name."""
        return self.configuration(proxy).get(ENDPOINTS, {})

    def extensions(self, proxy: ProxyNode) -> dict[str, Json]:
        """Filters that come over ECDS, by name."""
        return self.configuration(proxy).get(EXTENSIONS, {})

    def listeners(self, proxy: ProxyNode) -> Iterable[Json]:
        """Listeners."""
        return self.configuration(proxy).get(LISTENER, {}).values()

    def route_configuration(self, proxy: ProxyNode, manager: Json) -> Json:
        """The routes of a connection manager."""
        if "route_config" in manager:
            inline: Json = manager["route_config"]
            return inline
        name = str(manager.get("rds", {}).get("route_config_name", ""))
        return self.configuration(proxy).get(ROUTES, {}).get(name, {})

    def identity(self, proxy: ProxyNode) -> str:
        """The SPIFFE id that a proxy shows."""
        settings = self.view.mesh_config
        return proxy.identity((settings.trust_domain if settings else "") or self.world.trust_domain)

    def at(self, address: str) -> ProxyNode | None:
        """The proxy that listens for the mesh at an address."""
        return self._by_address.get(address)


def listening_at(listeners: Iterable[Json], direction: str, port: int, address: str = "") -> Json | None:
    """The listener of a direction that takes connections to a port (at an address)."""
    for listener in listeners:
        if listener.get("traffic_direction", direction) != direction:
            continue
        places = [listener.get("address", {}), *[one["address"] for one in listener.get("additional_addresses", ())]]
        for place in places:
            socket = place.get("socket_address", {})
            if int(socket.get("port_value", 0)) == port and (not address or socket.get("address") == address):
                return listener
    return None


def manager_of(chain: Json) -> Json | None:
    """The connection manager of a filter chain."""
    return network_filter(chain, MANAGER)
