"""A running laptop mesh: what the control service offers, without gRPC."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from mlmesh_local.certificates import Certificates
from mlmesh_local.changes import Changes
from mlmesh_local.chaos.faults import Faults
from mlmesh_local.configuration import ApplyOutcome, Configuration, gateways_of
from mlmesh_local.instance import Instance
from mlmesh_local.key_sets import KeySets
from mlmesh_local.metering import Metering
from mlmesh_local.model import ProxyNode
from mlmesh_local.pki import Certificate, Clock
from mlmesh_local.poller import StatsPoller
from mlmesh_local.process import rotate_all
from mlmesh_local.resources.catalog import CatalogService, all_services
from mlmesh_local.resources.gateway_api.derive import derive
from mlmesh_local.resources.gateway_api.status import (
    Key,
    Status,
    proxy_addresses,
    resource_statuses,
    text_with_status,
)
from mlmesh_local.resources.model import Gateway, Service
from mlmesh_local.resources.parse import Document
from mlmesh_local.resources.resource_set import ResourceSet
from mlmesh_local.rotation import RootRotation
from mlmesh_local.supervisor import Supervisor
from mlmesh_local.traces import TraceStore
from mlmesh_local.translate.gateway_servers import listening_port
from mlmesh_local.work import Work
from mlmesh_runtime.executors import BoundedExecutor

logger = logging.getLogger(__name__)

LOG_CHECK_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayListener:
    """A listening port of an ingress gateway."""

    gateway: str
    address: str
    tls_mode: str


class Mesh:
    """Everything that runs, and what can be done with it."""

    def __init__(
        self,
        *,
        supervisor: Supervisor,
        configuration: Configuration,
        certificates: Certificates,
        rotation: RootRotation,
        key_sets: KeySets,
        stats: StatsPoller,
        metering: Metering,
        traces: TraceStore,
        trace_executor: BoundedExecutor,
        log_executor: BoundedExecutor,
        changes: Changes,
        faults: Faults,
        work: Work,
        clock: Clock,
        config_folder: Path,
        logs: Path,
    ) -> None:
        self.supervisor = supervisor
        self.configuration = configuration
        self.certificates = certificates
        self.rotation = rotation
        self.key_sets = key_sets
        self.stats = stats
        self.metering = metering
        self.traces = traces
        self.trace_executor = trace_executor
        self._log_executor = log_executor
        self.changes = changes
        self.faults = faults
        self._work = work
        self._clock = clock
        self.start_time = clock()
        self.pid = os.getpid()
        self._config_folder = config_folder
        self._logs = logs
        self._ending = asyncio.Event()
        self._ended = asyncio.Event()
        self._steps: list[str] = []
        self._told = 0
        self._saved_statuses: dict[Key, Status] = {}

    # What is.

    @property
    def instances(self) -> list[Instance]:
        """All instances by name."""
        return [self.supervisor.instances[name] for name in sorted(self.supervisor.instances)]

    @property
    def resources(self) -> ResourceSet:
        """Active resources."""
        return self.configuration.resources

    @property
    def ready(self) -> bool:
        """Whether every instance is ready and every sidecar has acknowledged the active configuration."""
        status = self.configuration.node_status()
        version = self.configuration.version
        return all(
            instance.ready and instance.name in status and status[instance.name].acked_version == version
            for instance in self.instances
        )

    def gateways(self) -> list[GatewayListener]:
        """Listening ports of gateways, the address outside the mesh first."""
        world = self.configuration.world
        proxies = {proxy.id: proxy for proxy in world.proxies if proxy.kind == "gateway"}
        services = all_services(derive(world.resources), world.domain) if proxies else []
        found: dict[GatewayListener, None] = {}
        for instance in self.instances:
            if instance.name in proxies:
                for gateway in gateways_of(self.resources, instance.plan):
                    found |= dict.fromkeys(_listeners(gateway, proxies[instance.name], services))
        return list(found)

    def outbound_ports(self) -> list[int]:
        """Ports on which every sidecar listens for its application."""
        return sorted({port.number for service in derive(self.resources).specs(Service) for port in service.ports})

    # What can be done.

    async def apply(
        self, documents: Sequence[Document], *, prune: bool, dry_run: bool, timeout_s: float
    ) -> ApplyOutcome:
        """Make resources active, then make the processes follow the Deployments."""
        return await self._work.finish(self._apply(documents, prune=prune, dry_run=dry_run, timeout_s=timeout_s))

    async def _apply(
        self, documents: Sequence[Document], *, prune: bool, dry_run: bool, timeout_s: float
    ) -> ApplyOutcome:
        return await self._follow_workloads(
            self.configuration.apply(documents, prune=prune, dry_run=dry_run, timeout_s=timeout_s), dry_run=dry_run
        )

    async def delete(
        self, names: Sequence[tuple[str, str]], *, allow_missing: bool, dry_run: bool, timeout_s: float
    ) -> ApplyOutcome:
        """Remove resources by kind and "namespace/name", then make the processes follow the Deployments."""
        removal = self.configuration.delete(names, allow_missing=allow_missing, dry_run=dry_run, timeout_s=timeout_s)
        return await self._work.finish(self._follow_workloads(removal, dry_run=dry_run))

    async def _follow_workloads(self, change: Coroutine[Any, Any, ApplyOutcome], *, dry_run: bool) -> ApplyOutcome:
        plans_before = self.supervisor.plan_all(self.configuration.workloads)
        outcome = await change
        if dry_run:
            return outcome
        plans = self.supervisor.plan_all(self.configuration.workloads)
        if plans != plans_before:
            await self.supervisor.reconcile(plans)
        self.save()
        self.changes.notify()
        return outcome

    async def restart(self, name: str) -> list[str]:
        """Restart the replicas of a workload, or one instance, one at a time; gives their names."""
        return await self._work.finish(self.supervisor.restart(name))

    def statuses(self) -> dict[Key, Status]:
        """Statuses of the resources of the Gateway API, by the proxies that are ready now."""
        return resource_statuses(self.resources, proxy_addresses(self.configuration.world.endpoints))

    async def begin_counting(self) -> None:
        """Forget calls so far: while a mesh starts, those that start first look in vain for those that start last."""
        await self.stats.begin()
        self.metering.rules.begin(round(self._clock().timestamp() * 1e9))

    def save(self) -> None:
        """Keep the active resources as YAML in the state folder, for a person to read or to compare."""
        found = self.statuses()
        self._saved_statuses = found
        text = "\n---\n".join(text_with_status(one, found.get(one.key)) for one in self.resources.listed())
        path = self._config_folder / "active.yaml"
        draft = path.with_suffix(".tmp")
        try:
            draft.write_text(f"{text}\n")
            draft.replace(path)
        except OSError as error:
            # What is active does not depend on the copy.
            logger.warning("the configuration could not be saved", extra={"problem": str(error)})

    def issue(self, service_account: str, namespace: str, ttl: timedelta) -> Certificate:
        """A certificate for a tool."""
        return self.certificates.authority.lend(
            service_account, namespace, ttl, trust_domain=self.configuration.trust_domain
        )

    def end(self) -> None:
        """Begin to shut down; `wait_ended` tells when that is done."""
        self._ending.set()

    async def wait_ending(self) -> None:
        """Wait until somebody asked for the end."""
        await self._ending.wait()

    async def shut_down(self) -> None:
        """Drain and end every process."""
        try:
            # What was stopped could not drain.
            await self.faults.remove()
            await self.supervisor.stop_all(self._say)
        finally:
            self._work.cancel()
            self._ended.set()
            self.changes.notify()

    async def end_and_tell(self) -> AsyncIterator[str]:
        """Begin to shut down, and tell each step until all is gone."""
        self._told += 1
        try:
            self.end()
            index = 0
            while True:
                await self.changes.until(lambda: len(self._steps) > index or self._ended.is_set())  # noqa: B023
                if index >= len(self._steps):
                    return
                yield self._steps[index]
                index += 1
        finally:
            self._told -= 1
            self.changes.notify()

    async def all_told(self) -> None:
        """Wait until everybody who asked for the end has heard of it."""
        await self.changes.until(lambda: not self._told)

    def _say(self, message: str) -> None:
        logger.info(message)
        self._steps.append(message)
        self.changes.notify()

    # What goes on.

    async def follow(self) -> None:
        """Push endpoints whenever an instance changed, for ever."""
        seen = 0
        while True:
            seen = await self.changes.beyond(seen)
            self.configuration.refresh()
            if self.statuses() != self._saved_statuses:
                self.save()

    async def rotate_logs(self) -> None:
        """Keep logs bounded, for ever."""
        while True:
            # Several MiB may have to be copied.
            await self._log_executor.run(rotate_all, self._logs)
            await asyncio.sleep(LOG_CHECK_S)


class SupervisorTraffic:
    """What the supervisor needs of the rest; see `mlmesh_local.supervisor.Traffic`."""

    def __init__(self, configuration: Configuration, stats: StatsPoller) -> None:
        self._configuration = configuration
        self._stats = stats

    def refresh(self) -> None:
        """Configure every sidecar for the instances as they are now."""
        self._configuration.refresh()

    async def endpoints_known(self, timeout_s: float) -> None:
        """Wait for acknowledgements."""
        await self._configuration.endpoints_known(timeout_s)

    async def last_look(self, instance: Instance) -> None:
        """Read its counters."""
        await self._stats.look(instance)

    def forget(self, name: str) -> None:
        """Nothing is kept for an instance that is gone but its counts."""


def _listeners(gateway: Gateway, proxy: ProxyNode, services: Sequence[CatalogService]) -> Iterator[GatewayListener]:
    extra = dict(proxy.extra_addresses)
    name = f"{gateway.meta.namespace}/{gateway.meta.name}"
    for server in gateway.servers:
        mode = server.tls.mode if server.tls else "PLAINTEXT"
        mode = "MUTUAL" if mode.endswith("MUTUAL") else mode
        own = f"{proxy.pod_address}:{listening_port(services, proxy, server.port)}"
        for address in filter(None, (extra.get(server.port, ""), own)):
            yield GatewayListener(gateway=name, address=address, tls_mode=mode)
