"""What a proxy knows: what a Sidecar imports, or everything that is exported to its namespace.

The rules are those of pilot/pkg/model/sidecar.go in Istio's source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mlmesh_local.resources.catalog import CatalogPort, CatalogService
from mlmesh_local.resources.delegates import VirtualServices
from mlmesh_local.resources.domains import host_covers, hosts_overlap
from mlmesh_local.resources.model import EgressHost, EgressListener, Sidecar, VirtualService
from mlmesh_local.resources.names import MESH_GATEWAY, exported_to

EVERYTHING = EgressListener(hosts=(EgressHost(namespace="*", host="*"),))
"""What a sidecar imports that no Sidecar resource speaks of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Egress:
    """A listener for a workload's calls: what it imports. ``port`` None: every port that no other listener has.

    ``aliases`` are ExternalName Services: rules may name them, but they are not called themselves.
    """

    listener: EgressListener
    services: tuple[CatalogService, ...]
    virtual_services: tuple[VirtualService, ...]
    aliases: tuple[CatalogService, ...] = ()

    @property
    def port(self) -> int | None:
        """The port of its own."""
        return self.listener.port

    @property
    def bind(self) -> str:
        """Address or unix socket of its own; empty for none."""
        return self.listener.bind


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What the proxies of one namespace and one Sidecar know.

    ``services`` are by host, in the order of hosts; ``aliases`` are ExternalName Services by host.
    """

    namespace: str
    sidecar: Sidecar | None = None
    egress: tuple[Egress, ...] = ()
    services: Mapping[str, CatalogService] = field(default_factory=dict)
    aliases: Mapping[str, CatalogService] = field(default_factory=dict)

    def egress_for(self, port: int, bind: str = "") -> Egress | None:
        """The listener that serves a port (0 and a bind: a unix socket): one of its own, else the one for the rest."""
        for egress in self.egress:
            if egress.port is None or (egress.port == port and (port or egress.bind == bind)):
                return egress
        return None

    def ports(self) -> tuple[int, ...]:
        """Ports on which the workload calls, in order; one without a service is none, as in Istio."""
        found: set[int] = set()
        for egress in self.egress:
            if egress.port is None:
                found.update(port.number for service in egress.services for port in service.ports)
            elif egress.port and egress.services:
                found.add(egress.port)
        return tuple(sorted(found))

    def virtual_services(self) -> tuple[VirtualService, ...]:
        """VirtualServices of all listeners, each once."""
        found = {str(one.meta): one for egress in self.egress for one in egress.virtual_services}
        return tuple(found.values())


class Scopes:
    """Scopes by namespace and Sidecar. Build one for all proxies of a world."""

    def __init__(
        self,
        services: Sequence[CatalogService],
        virtual_services: VirtualServices,
        sidecars: Iterable[Sidecar],
        *,
        root_namespace: str,
        default_export: tuple[str, ...],
    ) -> None:
        self._services = services
        self._virtual_services = virtual_services
        self._root = root_namespace
        self._default_export = default_export
        # Those that select count before those of a whole namespace; of each the oldest first.
        self._sidecars = sorted(sidecars, key=lambda sidecar: sidecar.selector is None)
        self._by_host: dict[str, list[CatalogService]] = {}
        for service in services:
            self._by_host.setdefault(service.host, []).append(service)
        self._made: dict[tuple[str, str], Scope] = {}

    def sidecar(self, namespace: str, labels: Mapping[str, str]) -> Sidecar | None:
        """The Sidecar of a workload: one that selects it, its namespace's, or the mesh's in the root namespace."""
        own = [sidecar for sidecar in self._sidecars if sidecar.meta.namespace == namespace]
        for sidecar in own:
            if sidecar.selector is None or sidecar.selector.items() <= labels.items():
                return sidecar
        return next((s for s in self._sidecars if s.meta.namespace == self._root and s.selector is None), None)

    def of_sidecar(self, namespace: str, labels: Mapping[str, str]) -> Scope:
        """What the sidecar of a workload knows."""
        sidecar = self.sidecar(namespace, labels)
        key = (namespace, str(sidecar.meta) if sidecar else "")
        if key not in self._made:
            self._made[key] = self._scope(namespace, sidecar)
        return self._made[key]

    def of_gateway(self, namespace: str) -> Scope:
        """What gateways of a namespace know: all that is exported to it."""
        key = (namespace, "gateway")
        if key not in self._made:
            found: dict[str, CatalogService] = {}
            for service in self._exported(namespace):
                known = found.get(service.host)
                if known is None or (known.is_entry and not service.is_entry):
                    found[service.host] = service
            self._made[key] = Scope(
                namespace=namespace, services=_ordered(found, aliases=False), aliases=_ordered(found, aliases=True)
            )
        return self._made[key]

    def _exported(self, namespace: str) -> list[CatalogService]:
        """Services that a namespace sees: those exported to it by name, then those that everybody sees."""
        seen: tuple[list[CatalogService], list[CatalogService]] = ([], [])
        for service in self._services:
            targets = service.export_to or self._default_export
            if "*" in targets:
                seen[1].append(service)
            elif exported_to(targets, service.namespace, namespace) and "~" not in targets:
                seen[0].append(service)
        return [*seen[0], *seen[1]]

    def _scope(self, namespace: str, sidecar: Sidecar | None) -> Scope:
        listeners = (sidecar.egress if sidecar else ()) or (EVERYTHING,)
        exported = self._exported(namespace)
        bound = self._virtual_services.bound(MESH_GATEWAY, namespace)
        egress = tuple(_egress(listener, namespace, exported, bound) for listener in listeners)
        found: dict[str, CatalogService] = {}
        for one in egress:
            for service in (*one.services, *one.aliases):
                _append(found, service)
            for host, ports in _destinations(one.virtual_services, namespace):
                service_of_rule = self._destination(host, namespace)
                trimmed = _with_ports(service_of_rule, _wanted(one.listener, ports)) if service_of_rule else None
                if trimmed is not None:
                    _append(found, trimmed)
        return Scope(
            namespace=namespace,
            sidecar=sidecar,
            egress=egress,
            services=_ordered(found, aliases=False),
            aliases=_ordered(found, aliases=True),
        )

    def _destination(self, host: str, namespace: str) -> CatalogService | None:
        """The service that a VirtualService means: of the own namespace, else Kubernetes', else the oldest seen."""
        candidates = self._by_host.get(host, ())
        own = next((service for service in candidates if service.namespace == namespace), None)
        if own is not None:
            return own
        visible = [s for s in candidates if exported_to(s.export_to or self._default_export, s.namespace, namespace)]
        return next((service for service in visible if not service.is_entry), visible[0] if visible else None)


def _ordered(found: Mapping[str, CatalogService], *, aliases: bool) -> dict[str, CatalogService]:
    """Services, or those that only stand for others, in the order of hosts."""
    return {host: service for host, service in sorted(found.items()) if bool(service.alias_for) == aliases}


def _matches_ports(listener: EgressListener) -> bool:
    """Whether a listener takes only services with its own port: not on a unix socket, and not as an HTTP proxy."""
    return bool(listener.port) and listener.protocol != "http-proxy"


def _wanted(listener: EgressListener, ports: frozenset[int]) -> frozenset[int]:
    """Ports of a service that are imported; empty for all. 0 among those of a rule: one that names no port."""
    if _matches_ports(listener):
        return frozenset({listener.port or 0})
    return frozenset() if 0 in ports else ports


def _with_ports(service: CatalogService, wanted: frozenset[int]) -> CatalogService | None:
    if not wanted:
        return service
    ports = tuple(port for port in service.ports if port.number in wanted)
    if len(ports) == len(service.ports):
        return service
    return dataclasses.replace(service, ports=ports) if ports else None


class _Hosts:
    """Hosts that a listener imports, by namespace."""

    def __init__(self, hosts: Iterable[EgressHost], own_namespace: str) -> None:
        self._exact: set[tuple[str, str]] = set()
        self._wild: dict[str, list[str]] = {}
        self._all: dict[str, list[str]] = {}
        self._excluded: dict[str, list[str]] = {}
        for each in hosts:
            namespace = own_namespace if each.namespace == "." else each.namespace
            if each.excluded:
                self._excluded.setdefault(namespace, []).append(each.host)
                continue
            self._all.setdefault(namespace, []).append(each.host)
            if each.host.startswith("*"):
                self._wild.setdefault(namespace, []).append(each.host)
            else:
                self._exact.add((namespace, each.host))

    def imports(self, namespace: str, host: str) -> bool:
        """Whether a service of a namespace is imported."""
        if self._left_out(namespace, host):
            return False
        return any(self._has(scope, host) for scope in (namespace, "*"))

    def aliases(self, service: CatalogService) -> tuple[tuple[str, str], ...]:
        """Other names of an imported service that are imported with it: by the hosts that bring the service."""
        scope = next(scope for scope in (service.namespace, "*") if self._has(scope, service.host))
        return tuple(alias for alias in service.aliases if self._has(scope, alias[1]))

    def _has(self, scope: str, host: str) -> bool:
        return (scope, host) in self._exact or any(host_covers(wild, host) for wild in self._wild.get(scope, ()))

    def imports_rules(self, service: VirtualService) -> bool:
        """Whether a VirtualService is imported: by a host that has one in common with what is imported."""
        covers = host_covers if service.semantics == "gateway" else hosts_overlap
        return any(
            ((scope, host) in self._exact or any(covers(name, host) for name in self._patterns(scope, host)))
            and not self._left_out(service.meta.namespace, host)
            for host in service.hosts
            for scope in (service.meta.namespace, "*")
        )

    def _patterns(self, scope: str, host: str) -> Sequence[str]:
        """Imported hosts that may cover a host, or be covered by it, without being the same."""
        return self._all.get(scope, ()) if host.startswith("*") else self._wild.get(scope, ())

    def _left_out(self, namespace: str, host: str) -> bool:
        return bool(self._excluded) and any(
            host_covers(name, host) for scope in (namespace, "*") for name in self._excluded.get(scope, ())
        )


def _egress(
    listener: EgressListener,
    namespace: str,
    exported: Sequence[CatalogService],
    bound: Sequence[VirtualService],
) -> Egress:
    everything = listener.hosts == EVERYTHING.hosts
    hosts = _Hosts(listener.hosts, namespace)
    wanted = frozenset({listener.port or 0}) if _matches_ports(listener) else frozenset()
    imported: list[CatalogService] = []
    for service in exported:
        if everything or hosts.imports(service.namespace, service.host):
            trimmed = _with_ports(service, wanted)
            if trimmed is not None and trimmed.aliases and not everything:
                trimmed = dataclasses.replace(trimmed, aliases=hosts.aliases(trimmed))
            if trimmed is not None:
                imported.append(trimmed)
    found = tuple(_one_namespace_a_host(imported, namespace))
    return Egress(
        listener=listener,
        services=tuple(service for service in found if not service.alias_for),
        aliases=tuple(service for service in found if service.alias_for),
        virtual_services=tuple(one for one in bound if everything or hosts.imports_rules(one)),
    )


def _one_namespace_a_host(services: Sequence[CatalogService], namespace: str) -> Iterator[CatalogService]:
    """Of services with one host those of one namespace: the client's, else Kubernetes', else the first."""
    chosen: dict[str, tuple[str, bool]] = {}
    for service in services:
        known = chosen.get(service.host)
        new = (service.namespace, not service.is_entry)
        better = known is not None and new[1] and not known[1] and known[0] != namespace
        if known is None or service.namespace == namespace or better:
            chosen[service.host] = new
    return (service for service in services if chosen[service.host][0] == service.namespace)


def _append(found: dict[str, CatalogService], service: CatalogService) -> None:
    """Add a service; the ports of one that is there are joined where both are parts of the same."""
    known = found.get(service.host)
    if known is None or (known.is_entry and not service.is_entry):
        found[service.host] = service
        return
    numbers = {port.number for port in known.ports}
    more = tuple(port for port in service.ports if port.number not in numbers)
    if more and dataclasses.replace(known, ports=()) == dataclasses.replace(service, ports=()):
        ports: tuple[CatalogPort, ...] = (*known.ports, *more)
        found[service.host] = dataclasses.replace(known, ports=ports)


def _destinations(virtual_services: Iterable[VirtualService], namespace: str) -> Iterator[tuple[str, frozenset[int]]]:
    """Hosts that rules send to, with the ports named; 0 for a destination without one."""
    found: dict[str, set[int]] = {}
    for service in virtual_services:
        for rule in service.http:
            sources = [match.source_namespace for match in rule.matches if match.source_namespace]
            if sources and namespace not in sources:
                continue
            named = [weighted.destination for weighted in rule.destinations]
            # Those that nothing is mirrored to, too: Istio does not look at shares here.
            mirrors = [*([rule.mirror] if rule.mirror else []), *(one.destination for one in rule.listed_mirrors)]
            for destination in (*named, *mirrors):
                found.setdefault(destination.host, set()).add(destination.port)
        for layer4 in (*service.tls, *service.tcp):
            for weighted in layer4.destinations:
                found.setdefault(weighted.destination.host, set()).add(weighted.destination.port)
    return ((host, frozenset(ports)) for host, ports in found.items())
