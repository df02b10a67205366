"""Which gateway proxies serve a Gateway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mlmesh_local.resources.gateway_api.listeners import SERVICES
from mlmesh_local.resources.model import Gateway, Service

if TYPE_CHECKING:
    from mlmesh_local.resources.resource_set import ResourceSet


def gateways_serving(resources: ResourceSet, namespace: str, labels: Mapping[str, str]) -> tuple[Gateway, ...]:
    """Gateways whose servers a proxy runs: those whose selector selects it, and those of its Service.

    A Gateway of the Gateway API has no selector: it is served by the proxies behind its Service, in its namespace.
    """
    return tuple(gateway for gateway in resources.specs(Gateway) if _serves(gateway, resources, namespace, labels))


def _serves(gateway: Gateway, resources: ResourceSet, namespace: str, labels: Mapping[str, str]) -> bool:
    hosts = gateway.meta.annotations.get(SERVICES)
    if hosts is None:
        return all(labels.get(key) == value for key, value in gateway.selector.items())
    if namespace != gateway.meta.namespace:
        return False
    names = {host.split(".")[0] for host in hosts.split(",")}
    return any(
        service.meta.namespace == namespace
        and service.meta.name in names
        and bool(service.selector)
        and all(labels.get(key) == value for key, value in service.selector.items())
        for service in resources.specs(Service)
    )
