"""Where services are served: pods that selectors select, endpoints of ServiceEntries, WorkloadEntries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from mlmesh_local.model import Endpoint, ProxyNode
from mlmesh_local.resources.catalog import CatalogPort, CatalogService, all_services, selects
from mlmesh_local.resources.domains import is_ip
from mlmesh_local.resources.entries import UNIX
from mlmesh_local.resources.indexes import LabelIndex
from mlmesh_local.resources.model import Deployment, EntryEndpoint, ServiceEntry, WorkloadEntry
from mlmesh_local.resources.resource_set import ResourceSet
from mlmesh_local.translate.localities import locality_of, located

EXCLUDED_PORTS = "traffic.sidecar.istio.io/excludeInboundPorts"
"""Annotation of a pod: ports that bypass its sidecar."""

TLS_MODE = "security.istio.io/tlsMode"
"""Istio's label of endpoints behind a sidecar: "istio"."""


def excluded_ports(resources: ResourceSet, proxy: ProxyNode) -> frozenset[int]:
    """Ports that the annotation `excludeInboundPorts` of a proxy's pod names."""
    for deployment in resources.specs(Deployment):
        if deployment.meta.namespace == proxy.namespace and selects(deployment.labels, proxy.labels):
            words = deployment.annotations.get(EXCLUDED_PORTS, "").split(",")
            return frozenset(int(word) for word in map(str.strip, words) if word.isdigit())
    return frozenset()


def service_endpoints(
    resources: ResourceSet,
    proxies: Sequence[ProxyNode],
    *,
    ready: Iterable[str],
    domain: str = "cluster.local",
) -> tuple[Endpoint, ...]:
    """Endpoints of every service that pods serve, on the container ports that its ports target.

    `ready` holds the ids of proxies whose workload takes requests now.
    """
    ready_ids = set(ready)
    annotated = any(EXCLUDED_PORTS in deployment.annotations for deployment in resources.specs(Deployment))
    excluded = {proxy.id: excluded_ports(resources, proxy) for proxy in proxies} if annotated else {}
    pods = LabelIndex((proxy.namespace, proxy.labels, proxy) for proxy in proxies)
    endpoints: list[Endpoint] = []
    for service in all_services(resources, domain):
        if service.selector is None:
            continue
        for proxy in pods.select(service.namespace, service.selector):
            for port in service.ports:
                target = port.target if isinstance(port.target, int) else proxy.container_ports.get(port.target)
                if target is None:
                    continue
                endpoints.append(
                    Endpoint(
                        host=service.host,
                        port=port.number,
                        address=proxy.pod_address,
                        target_port=target,
                        labels=proxy.labels,
                        ready=proxy.id in ready_ids,
                        instance=proxy.id,
                        mesh_tls=proxy.kind == "sidecar" and target not in excluded.get(proxy.id, ()),
                        namespace=service.namespace,
                    )
                )
    return tuple(endpoints)


class EndpointIndex:
    """Endpoints by service and port: those of the world, and those that resources name themselves."""

    def __init__(
        self, resources: ResourceSet, endpoints: Iterable[Endpoint], services: Iterable[CatalogService]
    ) -> None:
        self._found: dict[tuple[str, str, int], list[Endpoint]] = {}
        workloads = LabelIndex((w.meta.namespace, w.endpoint.labels, w) for w in resources.specs(WorkloadEntry))
        any_workloads = bool(resources.specs(WorkloadEntry))
        namespaces: dict[str, str] = {}
        for service in services:
            namespaces.setdefault(service.host, service.namespace)
            if service.is_entry or (any_workloads and service.selector is not None):
                for port in service.ports:
                    named = _named(service, port, workloads)
                    self._found.setdefault((service.namespace, service.host, port.number), []).extend(named)
        for endpoint in endpoints:
            namespace = endpoint.namespace or namespaces.get(endpoint.host, "")
            self._found.setdefault((namespace, endpoint.host, endpoint.port), []).append(endpoint)
        for found in self._found.values():
            found.sort(key=lambda one: (one.address, one.target_port))

    def of(self, service: CatalogService, port: int) -> Sequence[Endpoint]:
        """Endpoints of a service's port, in the order of addresses."""
        return self._found.get((service.namespace, service.host, port), ())


def _named(service: CatalogService, port: CatalogPort, workloads: LabelIndex[WorkloadEntry]) -> Iterator[Endpoint]:
    if not service.is_entry:
        if service.node_local:
            # A laptop is one node, and other machines are not on it.
            return
        for entry in workloads.select(service.namespace, service.selector or {}):
            endpoint = entry.endpoint
            served = _service_target(port, endpoint)
            if served and is_ip(endpoint.address):
                yield _endpoint(service, port, endpoint, served)
        return
    once = service.resolution == "DNS_ROUND_ROBIN"
    for source in service.entries:
        target = next((each.target_port or each.number for each in source.ports if each.name == port.name), None)
        if target is None:
            continue
        for endpoint in _endpoints_of(source, service.host, workloads):
            # Only Envoy's DNS clusters resolve names.
            if service.dns or service.resolution != "STATIC" or _is_address(endpoint.address):
                yield _endpoint(service, port, endpoint, endpoint.ports.get(port.name) or target)
                if once:
                    return


def _endpoints_of(source: ServiceEntry, host: str, workloads: LabelIndex[WorkloadEntry]) -> Iterable[EntryEndpoint]:
    if source.selector is not None:
        found = [entry.endpoint for entry in workloads.select(source.meta.namespace, source.selector)]
        dns = source.resolution in ("DNS", "DNS_ROUND_ROBIN")
        return [endpoint for endpoint in found if dns or is_ip(endpoint.address)]
    if not source.endpoints and source.resolution != "STATIC" and not host.startswith("*"):
        # With resolution NONE Istio forwards to what the application resolved: here the sidecar resolves it.
        return [EntryEndpoint(address=host, ports={}, labels={})]
    return [endpoint for endpoint in source.endpoints if endpoint.address]


def _is_address(address: str) -> bool:
    return address.startswith(UNIX) or is_ip(address)


def _service_target(port: CatalogPort, endpoint: EntryEndpoint) -> int:
    """Where a WorkloadEntry serves a Service's port: the target's number or, by its port's name, another; else the
    port that it has by the target's name. 0: nowhere."""
    if isinstance(port.target, int):
        return endpoint.ports.get(port.name) or port.target
    return endpoint.ports.get(port.target, 0)


def _endpoint(service: CatalogService, port: CatalogPort, endpoint: EntryEndpoint, target: int) -> Endpoint:
    mode = endpoint.labels.get(TLS_MODE, "istio" if endpoint.service_account else "")
    locality = endpoint.locality or locality_of(endpoint.labels)
    return Endpoint(
        host=service.host,
        port=port.number,
        address=endpoint.address,
        target_port=0 if endpoint.address.startswith(UNIX) else target,
        labels=located(endpoint.labels, locality, endpoint.network),
        ready=True,
        instance="",
        mesh_tls=mode == "istio",
        weight=endpoint.weight or 1,
        namespace=service.namespace,
        locality=locality,
    )


def by_locality(endpoints: Iterable[Endpoint]) -> Mapping[str, list[Endpoint]]:
    """Endpoints by their locality, in the order of localities."""
    groups: dict[str, list[Endpoint]] = {}
    for endpoint in endpoints:
        groups.setdefault(endpoint.locality or locality_of(endpoint.labels), []).append(endpoint)
    return dict(sorted(groups.items()))
