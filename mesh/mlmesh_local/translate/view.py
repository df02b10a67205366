"""The world indexed once for translation: services by host, and what applies to a proxy."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import TypeVar

from mlmesh_local.model import Endpoint, ProxyNode, World, spiffe_id
from mlmesh_local.resources.catalog import (
    CatalogService,
    HostPolicy,
    alias_services,
    all_services,
    full_host,
    selects,
)
from mlmesh_local.resources.delegates import VirtualServices
from mlmesh_local.resources.gateway_api.derive import derive
from mlmesh_local.resources.gateway_api.serving import gateways_serving
from mlmesh_local.resources.mesh_hosts import HostSettings
from mlmesh_local.resources.model import (
    Destination,
    DestinationRule,
    EnvoyFilter,
    FilterPatch,
    Gateway,
    MeshConfig,
    MtlsMode,
    PeerAuthentication,
    Sidecar,
    TrafficPolicy,
    VirtualService,
)
from mlmesh_local.resources.names import MESH_GATEWAY
from mlmesh_local.resources.protocols import Protocol, is_http
from mlmesh_local.resources.rules import RuleIndex, chosen, effective_policy, load_balancer_of
from mlmesh_local.translate.endpoints import EndpointIndex, excluded_ports, service_endpoints
from mlmesh_local.translate.inbound import Inbound, InboundIndex
from mlmesh_local.translate.scopes import Egress, Scope, Scopes

Part = TypeVar("Part")

Client = ProxyNode | str
"""Who calls: a proxy, or any workload of a namespace."""

BoundService = tuple[VirtualService, tuple[str, ...]]
"""A VirtualService with its full hosts."""


class View:
    """A world, indexed. Build one for all proxies of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.resources = derive(world.resources)
        self.mesh_config: MeshConfig | None = next(iter(self.resources.specs(MeshConfig)), None)
        """Settings of the mesh; None leaves Istio's defaults."""
        self.settings = self.mesh_config.hosts if self.mesh_config else HostSettings()
        """Settings of the mesh about hosts."""
        own_root = self.mesh_config.root_namespace if self.mesh_config else ""
        self.root_namespace = own_root or world.root_namespace
        """Where what is for the whole mesh lives."""
        self._all = all_services(self.resources, world.domain)
        self.services: dict[str, CatalogService] = {}
        """Services by host, in the order of hosts; what a proxy sees is `services_seen_by`."""
        for service in self._all:
            self.services.setdefault(service.host, service)
        self.services = dict(sorted(self.services.items()))
        self._rules = RuleIndex(
            self.resources.specs(DestinationRule),
            domain=world.domain,
            root_namespace=self.root_namespace,
            default_export=self.settings.destination_rule_export,
        )
        self._candidates: dict[tuple[str, str, str], tuple[HostPolicy, ...]] = {}
        self._authentications = self.resources.specs(PeerAuthentication)
        self._virtual_services = VirtualServices(
            self.resources.specs(VirtualService),
            domain=world.domain,
            default_export_to=self.settings.virtual_service_export,
        )
        self._scopes = Scopes(
            [*self._all, *alias_services(self.resources, world.domain)],
            self._virtual_services,
            self.resources.specs(Sidecar),
            root_namespace=self.root_namespace,
            default_export=self.settings.service_export,
        )
        # By identity of scopes, which `Scopes` keeps.
        self._bound: dict[int, tuple[BoundService, ...]] = {}
        self._inbound = InboundIndex(self.resources, self._all)
        self._inbound_of: dict[str, tuple[Inbound, ...]] = {}
        self._endpoints = EndpointIndex(self.resources, world.endpoints, self._all)

    def part(self, key: Hashable, make: Callable[[], Part], *given: object) -> Part:  # noqa: ARG002
        """What `make` makes: one part of a translation, which may be reused for another world or proxy.

        It depends on the view, the proxy and on what is `given`, and on nothing else; ``key`` tells parts apart. What
        it gives is shared: nobody changes it. Views of `mlmesh_local.incremental` remember parts, this one does not.
        """
        return make()

    @property
    def trust_domain(self) -> str:
        """Of the identities in this mesh."""
        return (self.mesh_config.trust_domain if self.mesh_config else "") or self.world.trust_domain

    @property
    def trust_domains(self) -> tuple[str, ...]:
        """The trust domain and its aliases: identities that mean the same workloads."""
        aliases = self.mesh_config.trust_domain_aliases if self.mesh_config else ()
        return tuple(dict.fromkeys((self.trust_domain, *aliases)))

    # Services and their policies

    def services_seen_by(self, client: Client) -> tuple[CatalogService, ...]:
        """Services that a client may call, by host."""
        return tuple(self._visible(client).values())

    def services_by_age(self) -> tuple[str, ...]:
        """Hosts of services, those that have been there longest first."""
        return tuple(service.host for service in self._all)

    def service_seen_by(self, client: Client, host: str) -> CatalogService | None:
        """The service that a client means by a full host."""
        return self._visible(client).get(host)

    def alias_seen_by(self, client: Client, host: str, port: int = 0) -> CatalogService | None:
        """The ExternalName Service that a client's rule means by a full host; with a port: on that listener."""
        if not port:
            return self.scope(client).aliases.get(host)
        egress = self.scope(client).egress_for(port)
        found = (one for one in (egress.aliases if egress else ()) if one.host == host and one.port(port) is not None)
        return next(found, None)

    def _visible(self, client: Client) -> Mapping[str, CatalogService]:
        return self.scope(client).services

    def scope(self, client: Client) -> Scope:
        """What a client knows, and on which listeners. A namespace stands for workloads that no selector selects."""
        if isinstance(client, str):
            return self._scopes.of_sidecar(client, {})
        if client.kind == "gateway":
            return self._scopes.of_gateway(client.namespace)
        return self._scopes.of_sidecar(client.namespace, client.labels)

    def outbound_ports(self, proxy: ProxyNode) -> tuple[int, ...]:
        """Ports on which a sidecar's application may call, in order."""
        return self.scope(proxy).ports()

    def egress(self, proxy: ProxyNode, port: int, bind: str = "") -> Egress | None:
        """What the listener of a port knows; 0 with a bind is the one on that unix socket. None: there is none."""
        return self.scope(proxy).egress_for(port, bind)

    def egress_services(self, proxy: ProxyNode, port: int) -> tuple[CatalogService, ...]:
        """Services that the listener of a port knows."""
        egress = self.egress(proxy, port)
        return egress.services if egress else ()

    def egress_protocol(self, proxy: ProxyNode, port: int) -> Protocol:
        """What a Sidecar says is spoken on a port of its own."""
        egress = self.egress(proxy, port)
        return egress.listener.protocol if egress is not None and egress.port is not None else "unknown"

    def request_protocol(self, proxy: ProxyNode, port: int) -> Protocol:
        """What decides where services with requests share a port: what a Sidecar says, else the oldest of them; those
        that everybody sees come last."""
        everyone = self.settings.service_export
        found = [
            ("*" in (service.export_to or everyone), service.age, service.name, service.namespace, described.protocol)
            for service in self.egress_services(proxy, port)
            if (described := service.port(port)) is not None and is_http(described.protocol)
        ]
        declared = self.egress_protocol(proxy, port)
        return declared if declared != "unknown" or not found else min(found)[-1]

    def other_services(self, proxy: ProxyNode) -> tuple[CatalogService, ...]:
        """Services that the listener for ports without one of their own knows."""
        return next((egress.services for egress in self.scope(proxy).egress if egress.port is None), ())

    def policy(self, service: CatalogService, client: Client, *, inbound: bool = False) -> HostPolicy:
        """What DestinationRules say of a client's calls of a service, or (`inbound`) of the calls that it takes."""
        namespace = client if isinstance(client, str) else client.namespace
        key = (service.host, service.namespace, namespace)
        if key not in self._candidates:
            self._candidates[key] = self._rules.candidates(*key)
        labels: Mapping[str, str] = {} if isinstance(client, str) else client.labels
        return chosen(self._candidates[key], namespace, labels, inbound=inbound)

    def traffic_policy(self, service: CatalogService, client: Client, subset: str, port: int) -> TrafficPolicy | None:
        """What applies to a client's calls of a subset's port; empty is all endpoints."""
        return effective_policy(self.policy(service, client), subset, port)

    def endpoints(self, service: CatalogService, port: int, labels: Mapping[str, str]) -> tuple[Endpoint, ...]:
        """Ready endpoints of a service port that have labels, in the order of addresses."""
        return tuple(endpoint for endpoint in self.all_endpoints(service, port, labels) if endpoint.ready)

    def all_endpoints(self, service: CatalogService, port: int, labels: Mapping[str, str]) -> tuple[Endpoint, ...]:
        """Endpoints of a service port that have labels, in the order of addresses, ready or not."""
        return tuple(endpoint for endpoint in self._endpoints.of(service, port) if selects(labels, endpoint.labels))

    def identities(self, service: CatalogService) -> tuple[str, ...]:
        """SPIFFE ids that may answer for a service; empty when unknown."""
        own = (spiffe_id(domain, ns, account) for domain in self.trust_domains for ns, account in service.accounts)
        return tuple(dict.fromkeys((*own, *service.subject_alt_names)))

    @property
    def auto_mtls(self) -> bool:
        """Whether sidecars use mutual TLS by themselves where the other side takes it."""
        return self.mesh_config is None or self.mesh_config.enable_auto_mtls

    def inbound(self, proxy: ProxyNode) -> tuple[Inbound, ...]:
        """Ports on which a workload is called, in order."""
        if proxy.id not in self._inbound_of:
            self._inbound_of[proxy.id] = self._inbound.of(proxy, self.scope(proxy).sidecar)
        return self._inbound_of[proxy.id]

    def inbound_policy(self, proxy: ProxyNode, inbound: Inbound) -> TrafficPolicy | None:
        """Bounds of connections to the application: those of calls of its service, and over them the Sidecar's."""
        found = self.settings.default_policy
        # Rules of a service that the workload's own Sidecar does not import are not known to it.
        service = self.service_seen_by(proxy, inbound.service.host) if inbound.service is not None else None
        if service is not None:
            rules = self.policy(service, proxy, inbound=True)
            found = effective_policy(rules, "", inbound.service_port, self.settings.default_policy)
        if inbound.pool is None:
            return found
        return replace(found or TrafficPolicy(), connection_pool=inbound.pool)

    def destination(
        self, destination: Destination, namespace: str, listener_port: int, client: Client = ""
    ) -> tuple[CatalogService, int] | None:
        """Service and port that a destination of a VirtualService means, or None when there is no such port.

        Istio: the port named, else the only one, else that of the listener.
        """
        host = full_host(destination.host, namespace, self.world.domain)
        service = self.service_seen_by(client, host) if client else self.services.get(host)
        if service is None:
            return None
        port = destination.port or (service.ports[0].number if len(service.ports) == 1 else listener_port)
        return (service, port) if service.port(port) else None

    # VirtualServices

    def virtual_services(self, gateway: str, client: Client) -> tuple[BoundService, ...]:
        """VirtualServices bound to a gateway, with their full hosts, in Istio's order."""
        if gateway == MESH_GATEWAY:
            scope = self.scope(client)
            if id(scope) not in self._bound:
                self._bound[id(scope)] = tuple((one, one.hosts) for one in scope.virtual_services())
            return self._bound[id(scope)]
        namespace = client if isinstance(client, str) else client.namespace
        return tuple((one, one.hosts) for one in self._virtual_services.bound(gateway, namespace))

    def gateways(self, proxy: ProxyNode) -> tuple[Gateway, ...]:
        """Gateways whose servers a gateway proxy runs."""
        return gateways_serving(self.resources, proxy.namespace, proxy.labels)

    def patches(self, proxy: ProxyNode, context: str, port: int) -> tuple[FilterPatch, ...]:
        """More HTTP filters for a listener of a proxy: those of the root namespace first, then by priority and age."""
        filters = [
            one
            for one in self.resources.specs(EnvoyFilter)
            if one.meta.namespace in (self.root_namespace, proxy.namespace) and selects(one.selector, proxy.labels)
        ]
        filters.sort(key=lambda one: (one.meta.namespace != self.root_namespace, one.priority))
        return tuple(
            patch
            for one in filters
            for patch in one.patches
            if patch.context in ("ANY", context) and patch.port in (0, port)
        )

    # Security

    def mtls_mode(self, namespace: str, labels: Mapping[str, str], port: int) -> MtlsMode:
        """Mode of a workload's port: workload over namespace over mesh; in one scope the oldest; PERMISSIVE if none."""
        workload: PeerAuthentication | None = None
        if namespace != self.root_namespace:
            # Istio knows no policies of single workloads there (pilot/pkg/security/authn/policy_applier.go).
            workload = self._authentication(namespace, lambda a: bool(a.selector) and selects(a.selector, labels))
        scopes = (
            workload,
            self._authentication(namespace, lambda a: not a.selector),
            self._authentication(self.root_namespace, lambda a: not a.selector),
        )
        if workload is not None:
            for number, mode in workload.ports:
                if number == port and mode != "UNSET":
                    return mode
        return next((a.mode for a in scopes if a is not None and a.mode != "UNSET"), "PERMISSIVE")

    def _authentication(self, namespace: str, fits: Callable[[PeerAuthentication], bool]) -> PeerAuthentication | None:
        return next((a for a in self._authentications if a.meta.namespace == namespace and fits(a)), None)


__all__ = [
    "BoundService",
    "Client",
    "View",
    "effective_policy",
    "excluded_ports",
    "load_balancer_of",
    "service_endpoints",
]
