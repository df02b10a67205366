"""Plain TCP services that cannot be reached because another one has their port. Pure.

In a cluster each has an address of its own. Here all services of a port share the sidecar's outbound address, and of
those whose connections nothing tells apart the oldest gets all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from mlmesh_local.resources.catalog import CatalogService
from mlmesh_local.resources.protocols import is_http, is_tls
from mlmesh_local.translate.layer4 import layer4_services
from mlmesh_local.translate.view import View

_GUESSED: Final = "unknown"
"""Most ports without a declared protocol speak HTTP, and requests are told apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadowed:
    """A port of a service, and the service that gets its connections."""

    service: CatalogService
    port: int
    taken_by: CatalogService

    @property
    def detail(self) -> str:
        """What is so, for a person."""
        return (
            f"plain TCP to port {self.port} of {self.service.host} reaches {self.taken_by.host}, which comes first: "
            "sidecars of the laptop tell TCP services apart by port only"
        )


def shadowed(view: View) -> tuple[Shadowed, ...]:
    """Ports that some sidecar cannot reach, by port and host."""
    found = {(one.port, one.service.host): one for one in _shadowed(view)}
    return tuple(found[key] for key in sorted(found))


def _shadowed(view: View) -> Iterator[Shadowed]:
    ports = _shared_ports(view)
    for proxy in view.world.proxies if ports else ():
        for port in ports if proxy.kind != "gateway" else ():
            services = [one for one in layer4_services(view, proxy, port)[0] if not _by_name(one, port)]
            for service in services[1:]:
                described = service.port(port)
                if described is not None and described.protocol != _GUESSED:
                    yield Shadowed(service=service, port=port, taken_by=services[0])


def _shared_ports(view: View) -> list[int]:
    """Ports on which there are several services of connections, and TCP is declared."""
    hosts: dict[int, list[str]] = {}
    for service in view.services.values():
        for port in service.ports:
            if not is_http(port.protocol) and not is_tls(port.protocol) and port.protocol != "udp":
                hosts.setdefault(port.number, []).append(port.protocol)
    return sorted(port for port, found in hosts.items() if len(found) > 1 and {*found} != {_GUESSED})


def _by_name(service: CatalogService, port: int) -> bool:
    described = service.port(port)
    return described is None or is_tls(described.protocol) or described.protocol == "udp"
