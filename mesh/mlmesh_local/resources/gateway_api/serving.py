"""Which gateway proxies serve a Gateway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from mlmesh_local.resources.gateway_api.listeners import PARENT_NAMESPACE, SERVICES
from mlmesh_local.resources.model import Gateway, Service

if TYPE_CHECKING:
    from mlmesh_local.resources.resource_set import ResourceSet


def gateways_serving(resources: ResourceSet, namespace: str, labels: Mapping[str, str]) -> tuple[Gateway, ...]:
    """Gateways whose servers a proxy runs: those whose selector selects it, and those of its Service.

    A Gateway of the Gateway API has no selector: it is served by the proxies behind its Service, in its namespace. A
    port that the Service does not have is not served.
    """
    return tuple(_serving(resources, namespace, labels))


def _serving(resources: ResourceSet, namespace: str, labels: Mapping[str, str]) -> Iterator[Gateway]:
    for gateway in resources.specs(Gateway):
        hosts = gateway.meta.annotations.get(SERVICES)
        if hosts is None:
            if all(labels.get(key) == value for key, value in gateway.selector.items()):
                yield gateway
            continue
        # The listeners of a set are served where its Gateway is.
        if namespace != gateway.meta.annotations.get(PARENT_NAMESPACE, gateway.meta.namespace):
            continue
        services = [one for one in _services(resources, namespace, hosts) if _selects(one, labels)]
        ports = {port.number for service in services for port in service.ports}
        servers = tuple(server for server in gateway.servers if server.port in ports)
        if servers:
            yield replace(gateway, servers=servers)


def _services(resources: ResourceSet, namespace: str, hosts: str) -> list[Service]:
    names = {host.split(".")[0] for host in hosts.split(",")}
    return [
        service
        for service in resources.specs(Service)
        if service.meta.namespace == namespace and service.meta.name in names
    ]


def _selects(service: Service, labels: Mapping[str, str]) -> bool:
    return bool(service.selector) and all(labels.get(key) == value for key, value in service.selector.items())
