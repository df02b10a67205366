"""Which hosts there are: Kubernetes Services and hosts of ServiceEntries, with their ports and what is behind them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from mlmesh_local.resources.domains import host_covers
from mlmesh_local.resources.indexes import LabelIndex
from mlmesh_local.resources.model import (
    Deployment,
    Namespace,
    Resolution,
    Service,
    ServiceEntry,
    WorkloadEntry,
)
from mlmesh_local.resources.names import MESH_GATEWAY, full_gateway, full_host
from mlmesh_local.resources.protocols import Protocol
from mlmesh_local.resources.rules import HostPolicy
from mlmesh_local.resources.services import Distribution, annotated_distribution

if TYPE_CHECKING:
    from mlmesh_local.resources.resource_set import ResourceSet

ACCOUNTS = "alpha.istio.io/kubernetes-serviceaccounts"
"""Annotation of a Service: more ServiceAccounts, of its namespace, that may answer for it."""

IDENTITIES = "alpha.istio.io/canonical-serviceaccounts"
"""The same, as whole identities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogPort:
    """A port of a service as clients see it. ``target`` is a number, or a container port's name."""

    number: int
    name: str
    protocol: Protocol
    target: int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogService:
    """A host that can be called: a Kubernetes Service, or a host of ServiceEntries of one namespace.

    Attributes:
        name: the Service's, or the host of an entry.
        selector: of the workloads behind it, in its own namespace; None when none is selected.
        accounts: (namespace, ServiceAccount) of those workloads: who may answer for it.
        subject_alt_names: more identities that may answer for it, as they are in certificates.
        export_to: as written; empty leaves the mesh's default.
        is_entry: whether it comes from ServiceEntries, which are ``entries``, the oldest first.
        external: outside of the mesh: no mutual TLS unless asked for.
        resolution: how endpoints are found; "STATIC" for those that the mesh knows.
        headless: a Service without a cluster IP.
        addresses: on which clients reach it where traffic is captured, as written in entries.
        aliases: (namespace, host) of the ExternalName Services that stand for it.
        age: sorts services of all kinds by age, the oldest first.
        alias_for: the host that an ExternalName Service stands for; empty for a service that is called itself.
        distribution: nearest endpoints first: of the own "zone" or of the own "node".
        node_local: only endpoints of the own node.
        not_ready: whether endpoints that are not ready are called, too.
    """

    host: str
    namespace: str
    name: str
    ports: tuple[CatalogPort, ...]
    selector: Mapping[str, str] | None
    accounts: tuple[tuple[str, str], ...]
    subject_alt_names: tuple[str, ...] = ()
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    export_to: tuple[str, ...] = ()
    is_entry: bool = False
    entries: tuple[ServiceEntry, ...] = ()
    external: bool = False
    resolution: Resolution = "STATIC"
    headless: bool = False
    addresses: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    alias_for: str = ""
    age: tuple[bool, str, int] = dataclasses.field(default=(False, "", 0), compare=False)
    distribution: Literal["", "zone", "node"] = ""
    node_local: bool = False
    not_ready: bool = False

    def port(self, number: int) -> CatalogPort | None:
        """The port with a number."""
        return next((port for port in self.ports if port.number == number), None)

    @property
    def dns(self) -> bool:
        """Whether Envoy resolves the names of its endpoints."""
        return self.resolution in ("DNS", "DNS_ROUND_ROBIN")


def host_matches(pattern: str, host: str) -> bool:
    """Whether a host, or a pattern with a leading "*", covers a host."""
    return host_covers(pattern, host)


def best_match(patterns: Iterable[str], host: str) -> str | None:
    """The most specific pattern that covers a host: itself, else the longest wildcard."""
    covering = [pattern for pattern in patterns if host_covers(pattern, host)]
    return max(covering, key=lambda pattern: (pattern == host, len(pattern)), default=None)


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether labels have everything that a selector asks for."""
    return selector.items() <= labels.items()


def catalog(resources: ResourceSet, domain: str = "cluster.local") -> dict[str, CatalogService]:
    """Every service by host, in the order of hosts. A Kubernetes Service wins over a ServiceEntry of its host.

    Of entries of one host in several namespaces the oldest wins here; clients see the one of `View.services_seen_by`.
    """
    found: dict[str, CatalogService] = {}
    for service in all_services(resources, domain):
        found.setdefault(service.host, service)
    return dict(sorted(found.items()))


def all_services(resources: ResourceSet, domain: str = "cluster.local") -> list[CatalogService]:
    """Services by host and namespace, those of Kubernetes first, then the oldest. ExternalName Services are aliases."""
    deployments = LabelIndex((d.meta.namespace, d.labels, d) for d in resources.specs(Deployment))
    workloads = LabelIndex((w.meta.namespace, w.endpoint.labels, w) for w in resources.specs(WorkloadEntry))
    near = {one.meta.name: annotated_distribution(one.meta) for one in resources.specs(Namespace)}
    behind = _Behind(deployments, workloads, near)
    found: dict[tuple[str, str], CatalogService] = {}
    targets: dict[tuple[str, str], str] = {}
    for resource in sorted(resources.of_kind(Service), key=lambda resource: resource.age):
        service = cast("Service", resource.spec)
        host = full_host(service.meta.name, service.meta.namespace, domain)
        if service.external_name:
            targets[service.meta.namespace, host] = service.external_name
        else:
            new = _of_service(service, host, behind)
            found[service.meta.namespace, host] = dataclasses.replace(new, age=resource.age[:3])
    for resource in resources.of_kind(ServiceEntry):
        entry = cast("ServiceEntry", resource.spec)
        for host in dict.fromkeys(entry.hosts):
            key = (entry.meta.namespace, host)
            new = dataclasses.replace(_of_entry(entry, host, behind), age=resource.age[:3])
            found[key] = _joined(found[key], new) if key in found else new
    if not targets:
        return list(found.values())
    aliases = _aliases(targets)
    return [dataclasses.replace(one, aliases=tuple(sorted(aliases.get(one.host, ())))) for one in found.values()]


def alias_services(resources: ResourceSet, domain: str = "cluster.local") -> list[CatalogService]:
    """ExternalName Services, the oldest first. Rules may name them; what is called is what they stand for."""
    return [
        CatalogService(
            host=full_host(service.meta.name, service.meta.namespace, domain),
            namespace=service.meta.namespace,
            name=service.meta.name,
            ports=tuple(
                CatalogPort(number=port.number, name=port.name, protocol=port.protocol, target=port.target)
                for port in service.ports
            ),
            selector=None,
            accounts=(),
            labels=service.meta.labels,
            export_to=service.export_to,
            alias_for=service.external_name,
        )
        for service in resources.specs(Service)
        if service.external_name
    ]


def _aliases(targets: Mapping[tuple[str, str], str]) -> dict[str, list[tuple[str, str]]]:
    """(namespace, host) of the Services that stand for a host, by that host; some stand for one that stands for it."""
    by_host = {host: target for (_, host), target in targets.items()}
    found: dict[str, list[tuple[str, str]]] = {}
    for alias, target in targets.items():
        seen = {alias[1]}
        final = target
        while final in by_host and final not in seen:
            seen.add(final)
            final = by_host[final]
        if final not in by_host:
            found.setdefault(final, []).append(alias)
    return found


def workloads_of(service: CatalogService, deployments: Iterable[Deployment]) -> tuple[Deployment, ...]:
    """Deployments whose pods a service selects."""
    if not service.selector and not (service.is_entry and service.selector is not None):
        return ()
    selector = service.selector or {}
    return tuple(
        deployment
        for deployment in deployments
        if deployment.meta.namespace == service.namespace and selects(selector, deployment.labels)
    )


@dataclass(frozen=True, slots=True)
class _Behind:
    """Workloads by the labels that select them."""

    deployments: LabelIndex[Deployment]
    entries: LabelIndex[WorkloadEntry]
    distributions: Mapping[str, Distribution]

    def distribution(self, namespace: str, own: Distribution) -> Literal["", "zone", "node"]:
        found = own or self.distributions.get(namespace, "")
        return "" if found == "any" else found

    def accounts(self, namespace: str, selector: Mapping[str, str]) -> set[tuple[str, str]]:
        found = {(namespace, pod.service_account) for pod in self.deployments.select(namespace, selector)}
        return found | {
            (namespace, entry.endpoint.service_account)
            for entry in self.entries.select(namespace, selector)
            if entry.endpoint.service_account
        }


def _of_service(service: Service, host: str, behind: _Behind) -> CatalogService:
    namespace = service.meta.namespace
    ports = tuple(
        CatalogPort(number=port.number, name=port.name, protocol=port.protocol, target=port.target)
        for port in service.ports
    )
    accounts = behind.accounts(namespace, service.selector) if service.selector else set()
    accounts.update((namespace, name) for name in _listed(service, ACCOUNTS))
    return CatalogService(
        host=host,
        namespace=namespace,
        name=service.meta.name,
        ports=ports,
        selector=service.selector or None,
        accounts=tuple(sorted(accounts)),
        subject_alt_names=_listed(service, IDENTITIES),
        labels=service.meta.labels,
        export_to=service.export_to,
        headless=service.headless,
        distribution=behind.distribution(namespace, service.distribution),
        node_local=service.node_local,
        not_ready=service.not_ready,
    )


def _of_entry(entry: ServiceEntry, host: str, behind: _Behind) -> CatalogService:
    namespace = entry.meta.namespace
    ports = tuple(
        CatalogPort(number=port.number, name=port.name, protocol=port.protocol, target=port.target_port or port.number)
        for port in entry.ports
        if port.protocol != "udp"
    )
    accounts = {(namespace, e.service_account) for e in entry.endpoints if e.service_account}
    if entry.selector is not None:
        accounts |= behind.accounts(namespace, entry.selector)
    return CatalogService(
        host=host,
        namespace=namespace,
        name=host,
        ports=ports,
        selector=entry.selector,
        accounts=tuple(sorted(accounts)),
        subject_alt_names=entry.subject_alt_names,
        labels=entry.meta.labels,
        export_to=entry.export_to,
        is_entry=True,
        entries=(entry,),
        external=entry.external,
        resolution=entry.resolution,
        addresses=entry.addresses,
        distribution=behind.distribution(namespace, annotated_distribution(entry.meta)),
    )


def _listed(service: Service, annotation: str) -> tuple[str, ...]:
    """Names as they are written between commas, as in Istio."""
    text = service.meta.annotations.get(annotation, "")
    return tuple(text.split(",")) if text else ()


def _joined(old: CatalogService, new: CatalogService) -> CatalogService:
    """A service with what a younger entry of its host and namespace adds: endpoints, and ports where all else is equal.

    Nothing is added to a Kubernetes Service: nobody takes its host away by an entry.
    """
    if not old.is_entry:
        return old
    ports = old.ports
    alike = all(getattr(old, name) == getattr(new, name) for name in ("resolution", "labels", "selector", "export_to"))
    if alike:
        numbers = {port.number for port in old.ports}
        ports = (*old.ports, *(port for port in new.ports if port.number not in numbers))
    return dataclasses.replace(
        old,
        ports=ports,
        accounts=tuple(sorted({*old.accounts, *new.accounts})),
        subject_alt_names=tuple(dict.fromkeys((*old.subject_alt_names, *new.subject_alt_names))),
        entries=(*old.entries, *new.entries),
    )


__all__ = [
    "MESH_GATEWAY",
    "CatalogPort",
    "CatalogService",
    "HostPolicy",
    "alias_services",
    "all_services",
    "best_match",
    "catalog",
    "full_gateway",
    "full_host",
    "host_matches",
    "selects",
    "workloads_of",
]
