"""What every sidecar is told: active resources and running instances make a world, the world makes snapshots."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlmesh_local.addresses import Block, split_address
from mlmesh_local.backend_credentials import backend_credentials
from mlmesh_local.certificates import Certificates, ServerCredential
from mlmesh_local.instance import Instance
from mlmesh_local.instances import InstancePlan
from mlmesh_local.key_sets import KeySets
from mlmesh_local.model import Endpoint, NodeStatus, ProxyNode, World
from mlmesh_local.proxyless.bootstrap import bootstrap
from mlmesh_local.proxyless.build import Client, client_of
from mlmesh_local.proxyless.node import ProxylessNode
from mlmesh_local.proxyless.status import ClientStatus, client_status
from mlmesh_local.resources.catalog import all_services
from mlmesh_local.resources.gateway_api.derive import derive
from mlmesh_local.resources.gateway_api.serving import gateways_serving
from mlmesh_local.resources.model import Deployment, Gateway, MeshConfig
from mlmesh_local.resources.parse import Document, load_resources
from mlmesh_local.resources.resource_set import Applied, Change, ResourceSet
from mlmesh_local.root_bundles import backend_bundles, client_bundles
from mlmesh_local.snapshot import Snapshot, SnapshotBuilder
from mlmesh_local.translate import View, service_endpoints
from mlmesh_local.translate.gateway_servers import outside_port
from mlmesh_local.translate.shadowed import shadowed
from mlmesh_local.workloads import Workload, workload_of, workloads_of
from mlmesh_local.xds import AdsServer, ConfigurationRejectedError, SentResource
from mlmesh_runtime.errors import MeshError, TimedOut

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyOutcome:
    """What an apply did. ``ack_latency_s`` is from the push to the last acknowledgement."""

    changes: tuple[Change, ...]
    warnings: tuple[str, ...]
    version: str
    acked: int = 0
    connected: int = 0
    ack_latency_s: float = 0.0


class OtherControlPlane(Protocol):
    """A control plane in the place of ours; see `mlmesh_local.istiod.driver.Driver`."""

    def offer(self, world: World, resources: ResourceSet) -> None:
        """Show it a world, and the resources that were applied; it configures the proxies."""

    async def delivered(self, version: str, *, timeout_s: float) -> None:
        """Wait until every proxy was given what it makes of a version."""


class Configuration:
    """Builds and pushes configuration. Either a whole change is active everywhere, or nothing changed.

    ``gateway_address`` is where the first gateway listens in addition to its pod's address; empty for nowhere.
    ``detour`` gives where an endpoint is dialled while connections to it are disturbed on purpose.
    ``other`` translates in the place of our own control plane; what ours refuses is refused all the same.
    """

    def __init__(
        self,
        ads: AdsServer,
        certificates: Certificates,
        key_sets: KeySets,
        *,
        resources: ResourceSet,
        block: Block,
        logs: Path,
        gateway_address: str,
        instances: Callable[[], Mapping[str, Instance]],
        detour: Callable[[Endpoint], Endpoint] = lambda endpoint: endpoint,
        describe: Callable[[World], None] = lambda _world: None,
        other: OtherControlPlane | None = None,
        token: Callable[[str], str] = lambda _node_id: "",
    ) -> None:
        self.resources = resources
        self.world = World(resources=resources, otlp_address=block.otlp)
        self._ads = ads
        self._certificates = certificates
        self._key_sets = key_sets
        self._block = block
        self._logs = logs
        self._gateway_address = gateway_address
        self._instances = instances
        self._detour = detour
        self._describe = describe
        self._other = other
        self._known: set[str] = set()
        self._token = token
        self._builder = SnapshotBuilder()
        self._clients: dict[str, Client] = {}
        self._turn = asyncio.Lock()
        if other is None:
            ads.hosts = self

    @property
    def version(self) -> str:
        """Version of what was pushed last."""
        return self.world.version

    @property
    def metrics_address(self) -> str:
        """``host:port`` at which Prometheus can scrape the mesh."""
        return self._block.metrics

    @property
    def workloads(self) -> list[Workload]:
        """What the active Deployments ask to run."""
        return workloads_of(self.resources)

    def node_status(self) -> Mapping[str, NodeStatus]:
        """What the control plane knows of each Envoy."""
        return self._ads.statuses()

    def sent(self, node_id: str) -> tuple[SentResource, ...]:
        """What an Envoy was told, and what of it it runs."""
        return self._ads.sent(node_id)

    def snapshot_of(self, node: ProxylessNode) -> Snapshot:
        """What a client without a sidecar is told in the world that was pushed last."""
        if self._builder.view is None or self._builder.view.world is not self.world:
            # What was built last was only tried.
            self._builder.build(self.world)
        client = client_of(self._builder, node, before=self._clients.get(node.id))
        self._clients[node.id] = client
        return client.snapshot(self.version)

    def client_bootstrap(self, node: ProxylessNode, folder: str) -> dict[str, Any]:
        """The bootstrap of a client without a sidecar. It comes to us, also where another control plane serves it."""
        proven = dataclasses.replace(node, token=self._token(node.id))
        return bootstrap(proven, ads=self._block.ads, folder=folder)

    def clients(self) -> list[ClientStatus]:
        """Clients without a sidecar that are connected, by node id, and what each was refused or does without."""
        found: dict[str, list[NodeStatus]] = {}
        nodes: dict[str, ProxylessNode] = {}
        for node, status in self._ads.guests():
            found.setdefault(node.id, []).append(status)
            nodes[node.id] = node
        self._clients = {name: client for name, client in self._clients.items() if name in nodes}
        return [client_status(nodes[name], found[name], self._clients.get(name)) for name in sorted(found)]

    @property
    def trust_domain(self) -> str:
        """Of the identities, as MeshConfig says; empty leaves that of the certificate authority."""
        return trust_domain_of(self.resources)

    def address_of(self, host: str, port: int) -> str:
        """ "host:port" of a ready endpoint of a service of the mesh, by any of its names; empty for other hosts."""
        names = {host, f"{host}.svc.{self.world.domain}", f"{host}.{self.world.domain}"}
        found = (e for e in self.world.endpoints if e.host in names and e.port == port and e.ready)
        return next((f"{endpoint.address}:{endpoint.target_port}" for endpoint in found), "")

    def refresh(self) -> None:
        """Push what follows from the instances as they are now, if it differs from what was pushed."""
        world = self._world(self.resources)
        if world.version == self.world.version and self._known == {proxy.id for proxy in world.proxies}:
            return
        self._push(world, self._builder.build(world))

    async def endpoints_known(self, timeout_s: float) -> None:
        """Wait until every connected sidecar has acknowledged the last push; the deadline is not an error."""
        try:
            await self._acknowledged(timeout_s)
        except MeshError as error:
            logger.warning("sidecars did not acknowledge", extra={"problem": error.message})

    async def apply(
        self, documents: Sequence[Document], *, prune: bool, dry_run: bool, timeout_s: float
    ) -> ApplyOutcome:
        """Validate, merge and activate. Raises InvalidResource; then the last good configuration stays active."""
        async with self._turn:
            return await self._activate(
                self.resources.apply(load_resources(documents), prune=prune), dry_run=dry_run, timeout_s=timeout_s
            )

    async def _activate(self, applied: Applied, *, dry_run: bool, timeout_s: float) -> ApplyOutcome:
        for deployment in derive(applied.resources).specs(Deployment):
            workload_of(deployment)
        if not dry_run:
            await self._key_sets.need(applied.resources)
        world = self._world(applied.resources)
        self._certificates.check(world.proxies, trust_domain=trust_domain_of(applied.resources))
        snapshots = self._builder.build(world)
        warnings = (*applied.warnings, *(f"{one.detail}; give it another port" for one in shadowed(View(world))))
        if dry_run:
            return ApplyOutcome(changes=applied.changes, warnings=warnings, version=self.version)
        before = self.resources
        started = time.monotonic()
        self.resources = applied.resources
        self._push(world, snapshots)
        try:
            await self._acknowledged(timeout_s)
        except TimedOut as error:
            # Sidecars that are slow or restart get it later; nothing needs to be taken back.
            warnings = (*warnings, error.message)
        except ConfigurationRejectedError:
            self.resources = before
            last_good = self._world(before)
            self._push(last_good, self._builder.build(last_good))
            raise
        return self._outcome(applied.changes, warnings, time.monotonic() - started)

    async def delete(
        self, names: Sequence[tuple[str, str]], *, allow_missing: bool, dry_run: bool, timeout_s: float
    ) -> ApplyOutcome:
        """Remove resources by kind and "namespace/name", and activate what is left. Raises as `apply`, and NotFound."""
        async with self._turn:
            return await self._activate(
                self.resources.without(names, allow_missing=allow_missing), dry_run=dry_run, timeout_s=timeout_s
            )

    async def _acknowledged(self, timeout_s: float) -> None:
        end_s = time.monotonic() + timeout_s
        version = ""
        # Endpoints may change meanwhile; what was asked for is part of every later version.
        while version != self.version:
            version = self.version
            # Who waits tells who is late when its own time is over: there is no other clock around them.
            if self._other is not None:
                await self._other.delivered(version, timeout_s=round(max(0.0, end_s - time.monotonic()), 1))
            await self._ads.wait_acked(version, timeout_s=round(max(0.0, end_s - time.monotonic()), 1))

    def _outcome(self, changes: tuple[Change, ...], warnings: tuple[str, ...], latency_s: float) -> ApplyOutcome:
        connected = [status for status in self._ads.statuses().values() if status.connected]
        return ApplyOutcome(
            changes=changes,
            warnings=warnings,
            version=self.version,
            acked=sum(status.acked_version == self.version for status in connected),
            connected=len(connected),
            ack_latency_s=latency_s,
        )

    def _world(self, active: ResourceSet) -> World:
        resources = derive(active)
        instances = self._instances()
        proxies = tuple(self._proxy(instances[name].plan, resources) for name in sorted(instances))
        ready = {name for name, instance in instances.items() if instance.ready}
        endpoints = service_endpoints(resources, proxies, ready=ready)
        return World(
            resources=resources,
            proxies=proxies,
            endpoints=tuple(map(self._detour, endpoints)),
            otlp_address=self._block.otlp,
            als_address=self._block.als,
            key_sets=self._key_sets.current(),
        )

    def _proxy(self, plan: InstancePlan, resources: ResourceSet) -> ProxyNode:
        workload = plan.workload
        proxy = ProxyNode(
            id=plan.name,
            kind="gateway" if workload.is_gateway else "sidecar",
            namespace=workload.namespace,
            service_account=workload.service_account,
            labels=workload.labels,
            pod_address=plan.addresses.pod,
            application_address="" if workload.is_gateway else plan.addresses.application,
            outbound_address="" if workload.is_gateway else plan.addresses.outbound,
            container_ports=workload.ports,
            access_log_path=str(self._logs / f"{plan.name}.access.log"),
            settings=workload.proxy,
        )
        return dataclasses.replace(proxy, extra_addresses=self._extra_addresses(proxy, plan, resources))

    def _extra_addresses(
        self, proxy: ProxyNode, plan: InstancePlan, resources: ResourceSet
    ) -> tuple[tuple[int, str], ...]:
        # One address outside the mesh can be bound once: the first replica of a gateway has it.
        if not self._gateway_address or not plan.workload.is_gateway or not plan.name.endswith("-0"):
            return ()
        ports = {server.port for gateway in gateways_of(resources, plan) for server in gateway.servers}
        services = all_services(resources) if len(ports) > 1 else []
        outside = split_address(self._gateway_address, field="--gateway-address")[1]
        chosen = outside_port(services, proxy, ports, outside)
        return ((chosen, self._gateway_address),) if chosen else ()

    def _push(self, world: World, snapshots: Mapping[str, Snapshot]) -> None:
        self.world = world
        # Before sidecars act on it: what they then report is to be understood.
        self._describe(world)
        instances = self._instances()
        derived = derive(world.resources)
        backends = backend_bundles(derived)
        for proxy in world.proxies:
            if proxy.id in instances:
                plan = instances[proxy.id].plan
                served = gateways_of(world.resources, plan) if plan.workload.is_gateway else []
                self._certificates.provide(
                    proxy,
                    self._credentials(plan, served),
                    trust_domain=self.trust_domain,
                    bundles=(
                        *backends,
                        *client_bundles(derived, served),
                        *backend_credentials(derived, proxy),
                    ),
                )
            if self._other is None:
                self._ads.update(proxy.id, snapshots[proxy.id])
        if self._other is not None:
            self._other.offer(world, self.resources)
        if self._other is None:
            self._ads.update_guests(self.snapshot_of)
        gone = self._known - {proxy.id for proxy in world.proxies}
        for node_id in gone:
            self._certificates.forget(node_id)
            self._ads.forget(node_id)
        self._known = {proxy.id for proxy in world.proxies}

    def _credentials(self, plan: InstancePlan, gateways: Iterable[Gateway]) -> tuple[ServerCredential, ...]:
        hosts: dict[str, list[str]] = {}
        for gateway in gateways:
            for server in gateway.servers:
                for name in server.tls.credentials if server.tls else ():
                    hosts.setdefault(name, ["localhost"]).extend(host for host in server.hosts if host != "*")
        addresses = [plan.addresses.pod, "127.0.0.1"]
        if self._gateway_address:
            addresses.append(split_address(self._gateway_address, field="--gateway-address")[0])
        return tuple(
            ServerCredential(name=name, hosts=tuple(dict.fromkeys(names)), addresses=_ip_only(addresses))
            for name, names in sorted(hosts.items())
        )


def trust_domain_of(resources: ResourceSet) -> str:
    """What MeshConfig says; empty when it says nothing."""
    return next((config.trust_domain for config in resources.specs(MeshConfig)), "")


def gateways_of(resources: ResourceSet, plan: InstancePlan) -> list[Gateway]:
    """Gateway resources that an instance serves, those of the Gateway API among them."""
    return list(gateways_serving(derive(resources), plan.workload.namespace, plan.workload.labels))


def _ip_only(addresses: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(address for address in addresses if not address.strip("0123456789abcdef.:")))
