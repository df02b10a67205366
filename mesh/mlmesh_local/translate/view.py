"""The world indexed once for translation: services by host, and what applies to a proxy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from mlmesh_local.model import Endpoint, ProxyNode, World, spiffe_id
from mlmesh_local.resources.catalog import (
    CatalogService,
    HostPolicy,
    catalog,
    full_host,
    host_policy,
    selects,
)
from mlmesh_local.resources.delegates import VirtualServices
from mlmesh_local.resources.model import (
    Deployment,
    Destination,
    DestinationRule,
    EnvoyFilter,
    FilterPatch,
    Gateway,
    LoadBalancer,
    MeshConfig,
    MtlsMode,
    PeerAuthentication,
    Telemetry,
    TrafficPolicy,
    VirtualService,
)
from mlmesh_local.resources.resource_set import ResourceSet

EXCLUDED_PORTS = "traffic.sidecar.istio.io/excludeInboundPorts"
"""Annotation of a pod: ports that bypass its sidecar."""

BoundService = tuple[VirtualService, tuple[str, ...]]
"""A VirtualService with its full hosts."""


class View:
    """A world, indexed. Build one for all proxies of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.resources = world.resources
        self.mesh_config: MeshConfig | None = next(iter(world.resources.specs(MeshConfig)), None)
        """Settings of the mesh; None leaves Istio's defaults."""
        self.services = catalog(world.resources, world.domain)
        self._rules = world.resources.specs(DestinationRule)
        self._policies: dict[tuple[str, str], HostPolicy] = {}
        self._authentications = world.resources.specs(PeerAuthentication)
        self._virtual_services = VirtualServices(world.resources.specs(VirtualService), domain=world.domain)
        self._endpoints: dict[tuple[str, int], list[Endpoint]] = {}
        for endpoint in world.endpoints:
            self._endpoints.setdefault((endpoint.host, endpoint.port), []).append(endpoint)

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

    def services_seen_by(self, namespace: str) -> tuple[CatalogService, ...]:
        """Services that clients of a namespace may call, by host."""
        return tuple(
            service
            for service in self.services.values()
            if any(
                target in ("*", namespace) or (target == "." and namespace == service.namespace)
                for target in service.export_to
            )
        )

    def policy(self, service: CatalogService, client_namespace: str) -> HostPolicy:
        """What DestinationRules say to clients of a namespace."""
        key = (service.host, client_namespace)
        if key not in self._policies:
            self._policies[key] = host_policy(
                self._rules,
                service,
                client_namespace,
                domain=self.world.domain,
                root_namespace=self.world.root_namespace,
            )
        return self._policies[key]

    def endpoints(self, service: CatalogService, port: int, labels: Mapping[str, str]) -> tuple[Endpoint, ...]:
        """Ready endpoints of a service port that have labels, in the order of addresses."""
        if service.is_entry:
            found: Iterable[Endpoint] = entry_endpoints(service, port)
        else:
            found = self._endpoints.get((service.host, port), ())
        chosen = [endpoint for endpoint in found if endpoint.ready and selects(labels, endpoint.labels)]
        return tuple(sorted(chosen, key=lambda endpoint: (endpoint.address, endpoint.target_port)))

    def identities(self, service: CatalogService) -> tuple[str, ...]:
        """SPIFFE ids that may answer for a service; empty when unknown."""
        return tuple(spiffe_id(self.world.trust_domain, ns, account) for ns, account in service.accounts)

    def destination(
        self, destination: Destination, namespace: str, listener_port: int
    ) -> tuple[CatalogService, int] | None:
        """Service and port that a destination of a VirtualService means, or None when there is no such port.

        Istio: the port named, else the only one, else that of the listener.
        """
        service = self.services.get(full_host(destination.host, namespace, self.world.domain))
        if service is None:
            return None
        port = destination.port or (service.ports[0].number if len(service.ports) == 1 else listener_port)
        return (service, port) if service.port(port) else None

    # VirtualServices

    def virtual_services(self, gateway: str, namespace: str) -> tuple[BoundService, ...]:
        """VirtualServices bound to a gateway, with their full hosts, in Istio's order."""
        return tuple((one, one.hosts) for one in self._virtual_services.bound(gateway, namespace))

    def gateways(self, proxy: ProxyNode) -> tuple[Gateway, ...]:
        """Gateways whose servers a gateway proxy runs."""
        return tuple(g for g in self.resources.specs(Gateway) if selects(g.selector, proxy.labels))

    def patches(self, proxy: ProxyNode, context: str, port: int) -> tuple[FilterPatch, ...]:
        """More HTTP filters for a listener of a proxy: those of the root namespace first, then by priority and age."""
        filters = [
            one
            for one in self.resources.specs(EnvoyFilter)
            if one.meta.namespace in (self.world.root_namespace, proxy.namespace)
            and selects(one.selector, proxy.labels)
        ]
        filters.sort(key=lambda one: (one.meta.namespace != self.world.root_namespace, one.priority))
        return tuple(
            patch
            for one in filters
            for patch in one.patches
            if patch.context in ("ANY", context) and patch.port in (0, port)
        )

    # Security and telemetry

    def mtls_mode(self, namespace: str, labels: Mapping[str, str], port: int) -> MtlsMode:
        """Mode of a workload's port: workload over namespace over mesh; in one scope the oldest; PERMISSIVE if none."""
        workload = self._authentication(namespace, lambda a: bool(a.selector) and selects(a.selector, labels))
        scopes = (
            workload,
            self._authentication(namespace, lambda a: not a.selector),
            self._authentication(self.world.root_namespace, lambda a: not a.selector),
        )
        if workload is not None:
            for number, mode in workload.ports:
                if number == port and mode != "UNSET":
                    return mode
        return next((a.mode for a in scopes if a is not None and a.mode != "UNSET"), "PERMISSIVE")

    def _authentication(self, namespace: str, fits: Callable[[PeerAuthentication], bool]) -> PeerAuthentication | None:
        return next((a for a in self._authentications if a.meta.namespace == namespace and fits(a)), None)

    def telemetry(self, proxy: ProxyNode) -> tuple[Telemetry, ...]:
        """Telemetry resources that apply to a proxy, the nearest first."""
        everything = self.resources.specs(Telemetry)
        own = [t for t in everything if t.meta.namespace == proxy.namespace]
        return (
            *[t for t in own if t.selector and selects(t.selector, proxy.labels)][:1],
            *[t for t in own if not t.selector][:1],
            *[t for t in everything if t.meta.namespace == self.world.root_namespace and not t.selector][:1],
        )


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
    """Endpoints of every Service: pods that its selector selects, on the container ports that its ports target.

    `ready` holds the ids of proxies whose workload takes requests now.
    """
    ready_ids = set(ready)
    endpoints: list[Endpoint] = []
    excluded = {proxy.id: excluded_ports(resources, proxy) for proxy in proxies}
    for service in catalog(resources, domain).values():
        if service.is_entry or not service.selector:
            continue
        for proxy in proxies:
            if proxy.namespace != service.namespace or not selects(service.selector, proxy.labels):
                continue
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
                        mesh_tls=proxy.kind == "sidecar" and target not in excluded[proxy.id],
                    )
                )
    return tuple(endpoints)


def entry_endpoints(service: CatalogService, port: int) -> Iterable[Endpoint]:
    """Endpoints of a ServiceEntry's port; its own host where it has none (resolution DNS)."""
    described = service.port(port)
    if described is None:
        return
    target = described.target if isinstance(described.target, int) else port
    if not service.entry_endpoints:
        yield Endpoint(
            host=service.host,
            port=port,
            address=service.host,
            target_port=target,
            labels={},
            ready=True,
            instance="",
            mesh_tls=False,
        )
    for endpoint in service.entry_endpoints:
        yield Endpoint(
            host=service.host,
            port=port,
            address=endpoint.address,
            target_port=endpoint.ports.get(described.name, target),
            labels=endpoint.labels,
            ready=True,
            instance="",
            # Istio's label of endpoints behind a sidecar.
            mesh_tls=not service.external and endpoint.labels.get("security.istio.io/tlsMode") == "istio",
            weight=endpoint.weight,
        )


def port_policy(policy: TrafficPolicy | None, port: int) -> TrafficPolicy | None:
    """A policy as it is for one port: port-level settings replace part by part."""
    if policy is None:
        return None
    for number, override in policy.ports:
        if number == port:
            return merge_policies(policy, override)
    return policy


def merge_policies(base: TrafficPolicy | None, override: TrafficPolicy | None) -> TrafficPolicy | None:
    """A policy whose parts are replaced by those that another one sets."""
    if base is None or override is None:
        return override or base
    return TrafficPolicy(
        connection_pool=override.connection_pool or base.connection_pool,
        outlier=override.outlier or base.outlier,
        load_balancer=override.load_balancer or base.load_balancer,
        tls=override.tls or base.tls,
        ports=base.ports,
    )


def effective_policy(policy: HostPolicy, subset: str, port: int) -> TrafficPolicy | None:
    """What applies to a subset's port: the rule's policy, overridden by the subset's, each with its port level."""
    base = port_policy(policy.policy, port)
    chosen = policy.subset(subset) if subset else None
    return merge_policies(base, port_policy(chosen.policy, port)) if chosen else base


def load_balancer_of(policy: TrafficPolicy | None) -> LoadBalancer:
    """How endpoints are chosen; Istio's default is LEAST_REQUEST."""
    return (policy.load_balancer if policy else None) or LoadBalancer(policy="LEAST_REQUEST")
