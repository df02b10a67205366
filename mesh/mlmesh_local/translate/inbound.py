"""On which ports a workload is called: those of the services that select it, or those that its Sidecar names.

The rules are those of pilot/pkg/networking/core/listener_inbound.go in Istio's source.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mlmesh_local.envoy_types import Json
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.catalog import CatalogService, selects
from mlmesh_local.resources.entries import UNIX
from mlmesh_local.resources.model import ConnectionPool, Deployment, IngressListener, Sidecar
from mlmesh_local.resources.protocols import Protocol
from mlmesh_local.resources.resource_set import ResourceSet
from mlmesh_local.translate.endpoints import EXCLUDED_PORTS, excluded_ports
from mlmesh_local.translate.names import address


@dataclass(frozen=True, slots=True, kw_only=True)
class Inbound:
    """A port of a workload.

    Attributes:
        port: on which its sidecar listens, and its application where ``endpoint`` is empty.
        host, service_port: of the oldest service in front of it; the Sidecar's name for a port that it names.
        service: that service; None where no service has the port.
        endpoint: where the application listens, as a Sidecar says it.
        pool: bounds of connections that a Sidecar sets.
    """

    port: int
    protocol: Protocol
    host: str
    service_port: int
    service: CatalogService | None = None
    endpoint: str = ""
    pool: ConnectionPool | None = None

    def application(self, proxy: ProxyNode) -> Json:
        """Where the application listens, as Envoy's Address. Every address of its own is that of the application."""
        if self.endpoint.startswith(UNIX):
            return address(self.endpoint, 0)
        _, _, number = self.endpoint.rpartition(":")
        return address(proxy.application_address, int(number) if number else self.port)


class InboundIndex:
    """Ports of workloads. Build one for all proxies of a world."""

    def __init__(self, resources: ResourceSet, services: Iterable[CatalogService]) -> None:
        self._resources = resources
        self._excludes = any(EXCLUDED_PORTS in d.annotations for d in resources.specs(Deployment))
        self._services: dict[str, list[CatalogService]] = {}
        # Of services of all kinds the oldest has a port; of one age the first by host.
        for service in sorted(services, key=lambda service: (service.age, service.host)):
            if service.selector is not None:
                self._services.setdefault(service.namespace, []).append(service)

    def of(self, proxy: ProxyNode, sidecar: Sidecar | None) -> tuple[Inbound, ...]:
        """Ports of a workload, in order."""
        excluded = excluded_ports(self._resources, proxy) if self._excludes else frozenset()
        found = self._of_services(proxy)
        if sidecar is not None and sidecar.ingress:
            named = {listener.port: _named(sidecar, listener, found) for listener in sidecar.ingress}
            return tuple(named[port] for port in sorted(named))
        pool = sidecar.pool if sidecar is not None else None
        kept = [one for port, one in sorted(found.items()) if port not in excluded]
        return tuple(kept if pool is None else (replace(one, pool=pool) for one in kept))

    def _of_services(self, proxy: ProxyNode) -> dict[int, Inbound]:
        found: dict[int, Inbound] = {}
        for service in self._services.get(proxy.namespace, ()):
            if not selects(service.selector or {}, proxy.labels):
                continue
            for port in service.ports:
                number = port.target if isinstance(port.target, int) else proxy.container_ports.get(port.target, 0)
                if number and number not in found:
                    found[number] = Inbound(
                        port=number,
                        protocol=port.protocol,
                        host=service.host,
                        service_port=port.number,
                        service=service,
                    )
        return found


def _named(sidecar: Sidecar, listener: IngressListener, found: dict[int, Inbound]) -> Inbound:
    of_service = found.get(listener.port)
    return Inbound(
        port=listener.port,
        protocol=listener.protocol,
        host=f"{sidecar.meta.name}.{sidecar.meta.namespace}",
        service_port=listener.port,
        service=of_service.service if of_service else None,
        endpoint=listener.endpoint,
        pool=listener.pool or sidecar.pool,
    )
