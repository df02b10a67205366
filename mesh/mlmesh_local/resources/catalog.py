"""Which services there are and what applies to them: names resolved, policies found by Istio's rules of scope."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mlmesh_local.resources.model import (
    Deployment,
    DestinationRule,
    EntryEndpoint,
    Meta,
    Service,
    ServiceEntry,
    Subset,
    TrafficPolicy,
    VirtualService,
)

if TYPE_CHECKING:
    from mlmesh_local.resources.resource_set import ResourceSet

MESH_GATEWAY = "mesh"
"""What a VirtualService calls all sidecars."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogPort:
    """A port of a service as clients see it. ``target`` is a number, or a container port's name."""

    number: int
    name: str
    protocol: Literal["grpc", "http2", "http"]
    target: int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogService:
    """A host that can be called: a Kubernetes Service, or a host of a ServiceEntry.

    ``accounts`` are (namespace, ServiceAccount) of the workloads behind it: who may answer for it. ``entry_endpoints``
    and ``dns`` are those of a ServiceEntry; ``selector`` is that of a Service.
    """

    host: str
    namespace: str
    name: str
    ports: tuple[CatalogPort, ...]
    selector: Mapping[str, str]
    accounts: tuple[tuple[str, str], ...]
    export_to: tuple[str, ...] = ("*",)
    is_entry: bool = False
    external: bool = False
    dns: bool = False
    entry_endpoints: tuple[EntryEndpoint, ...] = ()
    subject_alt_names: tuple[str, ...] = ()

    def port(self, number: int) -> CatalogPort | None:
        """The port with a number."""
        return next((port for port in self.ports if port.number == number), None)


def full_host(host: str, namespace: str, domain: str) -> str:
    """Istio's expansion of short names: what has no dot is a service of the resource's namespace."""
    if "." in host or host == "*":
        return host
    return f"{host}.{namespace}.svc.{domain}"


def full_gateway(name: str, namespace: str) -> str:
    """ "{namespace}/{name}" of a gateway that a VirtualService names; "mesh" stays."""
    return name if name == MESH_GATEWAY or "/" in name else f"{namespace}/{name}"


def host_matches(pattern: str, host: str) -> bool:
    """Whether a host, or a pattern with a leading "*", covers a host."""
    return pattern in ("*", host) or (pattern.startswith("*.") and host.endswith(pattern[1:]))


def best_match(patterns: Iterable[str], host: str) -> str | None:
    """The most specific pattern that covers a host: itself, else the longest wildcard."""
    covering = [pattern for pattern in patterns if host_matches(pattern, host)]
    return max(covering, key=lambda pattern: (pattern == host, len(pattern)), default=None)


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether labels have everything that a selector asks for."""
    return all(labels.get(key) == value for key, value in selector.items())


def visible(meta: Meta, export_to: tuple[str, ...], namespace: str) -> bool:
    """Whether a resource applies to clients of a namespace."""
    return any(
        target == "*" or (target == "." and namespace == meta.namespace) or target == namespace for target in export_to
    )


def catalog(resources: ResourceSet, domain: str = "cluster.local") -> dict[str, CatalogService]:
    """Every service by host, in the order of hosts. A Kubernetes Service wins over a ServiceEntry of its host."""
    found: dict[str, CatalogService] = {}
    deployments = resources.specs(Deployment)
    for service in resources.specs(Service):
        host = full_host(service.meta.name, service.meta.namespace, domain)
        found[host] = _of_service(service, host, deployments)
    for entry in resources.specs(ServiceEntry):
        for host in entry.hosts:
            found.setdefault(host, _of_entry(entry, host))
    return dict(sorted(found.items()))


def workloads_of(service: CatalogService, deployments: Iterable[Deployment]) -> tuple[Deployment, ...]:
    """Deployments whose pods a Service selects."""
    if not service.selector:
        return ()
    return tuple(
        deployment
        for deployment in deployments
        if deployment.meta.namespace == service.namespace and selects(service.selector, deployment.labels)
    )


def _of_service(service: Service, host: str, deployments: tuple[Deployment, ...]) -> CatalogService:
    ports = tuple(
        CatalogPort(number=port.number, name=port.name, protocol=port.protocol, target=port.target)
        for port in service.ports
        if port.protocol != "tls"
    )
    plain = CatalogService(
        host=host,
        namespace=service.meta.namespace,
        name=service.meta.name,
        ports=ports,
        selector=service.selector,
        accounts=(),
    )
    accounts = {(workload.meta.namespace, workload.service_account) for workload in workloads_of(plain, deployments)}
    return CatalogService(
        host=host,
        namespace=plain.namespace,
        name=plain.name,
        ports=ports,
        selector=service.selector,
        accounts=tuple(sorted(accounts)),
    )


def _of_entry(entry: ServiceEntry, host: str) -> CatalogService:
    protocols: dict[str, Literal["grpc", "http2", "http"]] = {"GRPC": "grpc", "HTTP2": "http2"}
    ports = tuple(
        CatalogPort(
            number=port.number,
            name=port.name,
            protocol=protocols.get(port.protocol, "http"),
            target=port.target_port,
        )
        for port in entry.ports
    )
    accounts = {(entry.meta.namespace, e.service_account) for e in entry.endpoints if e.service_account}
    return CatalogService(
        host=host,
        namespace=entry.meta.namespace,
        name=entry.meta.name,
        ports=ports,
        selector={},
        accounts=tuple(sorted(accounts)),
        export_to=entry.export_to,
        is_entry=True,
        external=entry.external,
        dns=entry.resolution == "DNS",
        entry_endpoints=entry.endpoints,
        subject_alt_names=entry.subject_alt_names,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPolicy:
    """What DestinationRules say of a host, merged: the first policy, and subsets by name."""

    policy: TrafficPolicy | None = None
    subsets: tuple[Subset, ...] = ()
    rules: tuple[str, ...] = ()

    def subset(self, name: str) -> Subset | None:
        """The subset with a name."""
        return next((subset for subset in self.subsets if subset.name == name), None)


def host_policy(
    rules: Iterable[DestinationRule],
    service: CatalogService,
    client_namespace: str,
    *,
    domain: str,
    root_namespace: str,
) -> HostPolicy:
    """DestinationRules that apply to a client's calls of a host.

    Istio looks in the client's namespace, then the service's, then the root namespace, and takes the most specific
    host there; rules of the same host and namespace are merged, the oldest's policy wins.
    """
    all_rules = tuple(rules)
    for namespace in dict.fromkeys((client_namespace, service.namespace, root_namespace)):
        by_host: dict[str, list[DestinationRule]] = {}
        for rule in all_rules:
            if rule.meta.namespace == namespace and visible(rule.meta, rule.export_to, client_namespace):
                by_host.setdefault(full_host(rule.host, namespace, domain), []).append(rule)
        best = best_match(by_host, service.host)
        if best is not None:
            return _merged(by_host[best])
    return HostPolicy()


def _merged(rules: list[DestinationRule]) -> HostPolicy:
    subsets: dict[str, Subset] = {}
    for rule in rules:
        for subset in rule.subsets:
            subsets.setdefault(subset.name, subset)
    return HostPolicy(
        policy=next((rule.policy for rule in rules if rule.policy is not None), None),
        subsets=tuple(subsets.values()),
        rules=tuple(str(rule.meta) for rule in rules),
    )


def virtual_services_of(
    services: Iterable[VirtualService], gateway: str, client_namespace: str, *, domain: str
) -> tuple[tuple[VirtualService, tuple[str, ...]], ...]:
    """VirtualServices bound to a gateway ("mesh" or "namespace/name") that a namespace sees, with their full hosts."""
    return tuple(
        (service, tuple(full_host(host, service.meta.namespace, domain) for host in service.hosts))
        for service in services
        if gateway in {full_gateway(name, service.meta.namespace) for name in service.gateways}
        and visible(service.meta, service.export_to, client_namespace)
    )
