"""Runs the instances that the Deployments ask for: starts, replaces, restarts and stops them in an orderly way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from mlmesh_local.addresses import Block, numbers_free
from mlmesh_local.changes import Changes
from mlmesh_local.instance import Instance, SidecarSetup
from mlmesh_local.instances import Folders, InstancePlan, named, plan
from mlmesh_local.workloads import Workload
from mlmesh_runtime.errors import NotFound, NotReady

logger = logging.getLogger(__name__)

# An endpoint is gone when every sidecar has acknowledged; their workers follow within a few event loop turns.
SETTLE_S = 0.05
RESTART_READY_S = 120.0
SHUTDOWN_GRACE_S = 10.0


class Traffic(Protocol):
    """What a supervisor needs of whoever configures the sidecars."""

    def refresh(self) -> None:
        """Give every sidecar, also new ones, the configuration for the instances as they are now."""

    async def endpoints_known(self, timeout_s: float) -> None:
        """Wait until the sidecars have acknowledged the last refresh, at most so long."""

    async def last_look(self, instance: Instance) -> None:
        """Read what its sidecar knows, before it ends."""

    def forget(self, name: str) -> None:
        """An instance is gone."""


class Supervisor:
    """All instances of a mesh. Tasks run in the given group."""

    def __init__(
        self,
        group: asyncio.TaskGroup,
        setup: SidecarSetup,
        *,
        block: Block,
        folders: Folders,
        changes: Changes,
        environ: Mapping[str, str],
    ) -> None:
        self.instances: dict[str, Instance] = {}
        self.traffic: Traffic
        self._group = group
        self._setup = setup
        self._block = block
        self._folders = folders
        self._changes = changes
        self._environ = environ
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._closing = False
        # One orderly operation at a time: two restarts at once could take all replicas of a service away.
        self._turn = asyncio.Lock()

    @property
    def plans(self) -> Sequence[InstancePlan]:
        """Plans of all instances, by name."""
        return [self.instances[name].plan for name in sorted(self.instances)]

    def plan_all(self, workloads: Sequence[Workload]) -> dict[str, InstancePlan]:
        """Plans for workloads by instance name; instances that exist keep their number and so their addresses."""
        existing = {plan.name: plan.workload.namespace for plan in self.plans}
        numbers = {plan.name: plan.addresses.number for plan in self.plans}
        free = numbers_free(set(numbers.values()))
        plans: dict[str, InstancePlan] = {}
        for name, workload in named(workloads, existing).items():
            number = numbers.get(name) or next(free, 0)
            plans[name] = plan(
                workload, number, name=name, block=self._block, folders=self._folders, inherited=self._environ
            )
        return plans

    async def reconcile(self, plans: Mapping[str, InstancePlan]) -> None:
        """Make what runs equal to the plans: surplus instances go, new ones come, changed ones are replaced in turn."""
        async with self._turn:
            surplus = [instance for name, instance in self.instances.items() if name not in plans]
            async with asyncio.TaskGroup() as group:
                for instance in surplus:
                    group.create_task(self._end(instance, instance.plan.workload.grace_s))
            for name, wanted in plans.items():
                if name not in self.instances:
                    self._begin(Instance(wanted, self._setup, changed=self._changes.notify))
            self.traffic.refresh()
            for name, wanted in plans.items():
                if self.instances[name].plan != wanted:
                    await self._replace(self.instances[name], wanted)

    async def restart(self, name: str) -> list[str]:
        """Restart the replicas of a workload, or one instance, one at a time; gives their names.

        Raises NotFound (WORKLOAD_NOT_FOUND), or NotReady when a replica does not come back.
        """
        async with self._turn:
            chosen = [instance for _, instance in sorted(self.instances.items()) if instance.plan.answers_to(name)]
            if not chosen:
                known = sorted({instance.plan.workload.name for instance in self.instances.values()})
                raise NotFound(f"no workload {name!r}; there are {', '.join(known)}", reason="WORKLOAD_NOT_FOUND")
            for instance in chosen:
                await self._replace(instance, instance.plan)
            return [instance.name for instance in chosen]

    async def stop_all(self, say: Callable[[str], None]) -> None:
        """Drain and end everything: gateways first, so that nothing new comes in, then the rest together."""
        self._closing = True
        everything = list(self.instances.values())
        gateways = [instance for instance in everything if instance.plan.workload.is_gateway]
        for batch in (gateways, [instance for instance in everything if instance not in gateways]):
            for instance in batch:
                instance.drain()
            self.traffic.refresh()
            await self.traffic.endpoints_known(1.0)
            async with asyncio.TaskGroup() as group:
                for instance in batch:
                    grace_s = min(instance.plan.workload.grace_s, SHUTDOWN_GRACE_S)
                    group.create_task(self._stop_and_say(instance, grace_s, say))

    async def _stop_and_say(self, instance: Instance, grace_s: float, say: Callable[[str], None]) -> None:
        await instance.stop(grace_s)
        task = self._tasks.get(instance.name)
        if task:
            await task
        say(f"{instance.name} stopped")

    def _begin(self, instance: Instance) -> None:
        if self._closing:
            return
        self.instances[instance.name] = instance
        self._tasks[instance.name] = self._group.create_task(instance.run())
        self._changes.notify()

    async def _end(self, instance: Instance, grace_s: float) -> None:
        instance.drain()
        self.traffic.refresh()
        await self.traffic.endpoints_known(2.0)
        await asyncio.sleep(SETTLE_S)
        await self.traffic.last_look(instance)
        await instance.stop(grace_s)
        await self._tasks.pop(instance.name)
        self.instances.pop(instance.name)
        self.traffic.forget(instance.name)
        self.traffic.refresh()
        self._changes.notify()

    async def _replace(self, instance: Instance, wanted: InstancePlan) -> None:
        logger.info("instance is replaced", extra={"instance": instance.name})
        await self._end(instance, instance.plan.workload.grace_s)
        fresh = Instance(
            wanted,
            self._setup,
            changed=self._changes.notify,
            restarts=instance.application.restarts + (0 if wanted.workload.is_gateway else 1),
            sidecar_restarts=instance.sidecar.restarts + 1,
        )
        self._begin(fresh)
        self.traffic.refresh()
        await within(RESTART_READY_S, self._changes.until(lambda: fresh.ready or self._closing), fresh.name)
        self.traffic.refresh()
        await self.traffic.endpoints_known(2.0)


async def within(timeout_s: float, waiting: Awaitable[None], name: str) -> None:
    """Wait, or raise NotReady that names the instance."""
    try:
        async with asyncio.timeout(timeout_s):
            await waiting
    except TimeoutError:
        raise NotReady(f"{name} was not ready within {timeout_s:g} s") from None
