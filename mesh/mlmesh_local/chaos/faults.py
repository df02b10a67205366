"""Faults that are active, their ends, and the proxies that stand in the way of connections."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from mlmesh_local.changes import Changes
from mlmesh_local.chaos.disturbance import Disturbance
from mlmesh_local.chaos.proxy import FaultProxy
from mlmesh_local.instance import Instance
from mlmesh_local.model import Endpoint
from mlmesh_local.slot import Slot
from mlmesh_runtime.errors import InvalidInput, NotFound, WrongState

logger = logging.getLogger(__name__)

DURATION_MAX_S = 3600.0
Part = Literal["application", "sidecar"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveFault:
    """A fault and when it ends, by the event loop's clock."""

    instance: str
    description: str
    end: float
    connections: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stopped:
    slot: Slot
    pid: int
    part: Part
    end: float


class Faults:
    """All faults of a mesh.

    Args:
        instances: those that run, by name.
        changed: called when endpoints lead elsewhere (proxies come and go), to push that to every sidecar.
        random: what is late, and which bits are turned over.
    """

    def __init__(
        self, instances: Callable[[], Mapping[str, Instance]], *, changed: Callable[[], None], random: Random
    ) -> None:
        self._instances = instances
        self._changed = changed
        self._random = random
        self._proxies: dict[str, dict[int, FaultProxy]] = {}
        self._ends: dict[str, float] = {}
        self._stopped: dict[tuple[str, Part], _Stopped] = {}
        self._wake = Changes()

    # What is done.

    def kill(self, target: str, part: Part) -> list[str]:
        """Kill (SIGKILL) a process of each instance that is meant; it starts again by itself. Gives their names.

        Raises NotFound (WORKLOAD_NOT_FOUND), WrongState (PROCESS_NOT_RUNNING) where none runs.
        """
        names = []
        for instance in self._meant(target):
            slot = _slot(instance, part)
            if slot.child is not None:
                slot.child.kill()
                names.append(instance.name)
                logger.warning("killed on purpose", extra={"instance": instance.name, "part": part})
        return self._some(names, target, part)

    def stop(self, target: str, part: Part, duration_s: float) -> list[str]:
        """Stop (SIGSTOP) a process for a time. Raises as `kill`, and InvalidInput for the duration."""
        _check_duration(duration_s)
        end = asyncio.get_running_loop().time() + duration_s
        names = []
        for instance in self._meant(target):
            slot = _slot(instance, part)
            if slot.child is not None and _signal(slot.pid, signal.SIGSTOP):
                self._stopped[instance.name, part] = _Stopped(slot=slot, pid=slot.pid, part=part, end=end)
                names.append(instance.name)
                logger.warning("stopped on purpose", extra={"instance": instance.name, "part": part})
        self._wake.notify()
        return self._some(names, target, part)

    async def disturb(self, target: str, disturbance: Disturbance, duration_s: float) -> list[str]:
        """Disturb connections to instances for a time; later the proxy stays as long as connections run through it.

        Raises NotFound (WORKLOAD_NOT_FOUND), InvalidInput for the duration, or for a gateway: outside clients dial it.
        """
        _check_duration(duration_s)
        meant = self._meant(target)
        for instance in meant:
            if instance.plan.workload.is_gateway:
                raise InvalidInput(
                    f"{instance.name} is a gateway: its clients are outside, and no proxy can be put between; "
                    "kill or stop it, or disturb the workloads behind it",
                    field="target",
                )
        end = asyncio.get_running_loop().time() + duration_s
        for instance in meant:
            for proxy in (await self._proxies_of(instance)).values():
                proxy.set(disturbance)
            self._ends[instance.name] = end
            logger.warning("disturbed on purpose", extra={"instance": instance.name, "fault": str(disturbance)})
        self._wake.notify()
        self._changed()
        return [instance.name for instance in meant]

    async def remove(self, target: str = "") -> int:
        """End faults before their time; gives how many there were. Raises NotFound for an unknown target."""
        names = {instance.name for instance in self._meant(target)} if target else None
        stopped = [key for key in self._stopped if names is None or key[0] in names]
        disturbed = [name for name in self._ends if names is None or name in names]
        for key in stopped:
            self._go_on(key)
        for name in disturbed:
            await self._undisturb(name)
        return len(stopped) + len(disturbed)

    # What is.

    def active(self) -> list[ActiveFault]:
        """Faults by instance."""
        found = [
            ActiveFault(instance=name, description=f"{part} stopped", end=item.end)
            for (name, part), item in self._stopped.items()
        ]
        for name, end in self._ends.items():
            proxies = self._proxies[name].values()
            disturbance = next((proxy.disturbance for proxy in proxies), Disturbance())
            connections = sum(proxy.connections for proxy in proxies)
            found.append(ActiveFault(instance=name, description=str(disturbance), end=end, connections=connections))
        return sorted(found, key=lambda fault: (fault.instance, fault.description))

    def detour(self, endpoint: Endpoint) -> Endpoint:
        """The endpoint, or the proxy in front of it."""
        if endpoint.instance not in self._ends:
            return endpoint
        proxy = self._proxies.get(endpoint.instance, {}).get(endpoint.target_port)
        return replace(endpoint, address=proxy.address[0]) if proxy else endpoint

    # What goes on.

    async def run(self) -> None:
        """End faults when their time has come, for ever; ends all of them when cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                seen = self._wake.count
                now = loop.time()
                for key in [key for key, item in self._stopped.items() if item.end <= now or not _is_same(item)]:
                    self._go_on(key)
                for name in [name for name, end in self._ends.items() if end <= now]:
                    await self._undisturb(name)
                await self._retire()
                ends = [item.end for item in self._stopped.values()] + list(self._ends.values())
                # Processes that ended, and proxies that nobody uses any more, are looked for now and then.
                wait_s = max(0.0, min([1.0, *(end - loop.time() for end in ends)])) if ends or self._proxies else None
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._wake.beyond(seen)
        finally:
            for key in list(self._stopped):
                self._go_on(key)
            self._ends.clear()
            for proxies in self._proxies.values():
                for proxy in proxies.values():
                    await proxy.close()
            self._proxies.clear()

    async def _retire(self) -> None:
        """Close proxies that lead nowhere: their fault is over and their connections have ended."""
        for name in [name for name in self._proxies if name not in self._ends]:
            if not any(proxy.connections for proxy in self._proxies[name].values()) or name not in self._instances():
                for proxy in self._proxies.pop(name).values():
                    await proxy.close()

    async def _proxies_of(self, instance: Instance) -> dict[int, FaultProxy]:
        addresses = instance.plan.addresses
        proxies = self._proxies.setdefault(instance.name, {})
        for port in sorted(set(instance.plan.workload.ports.values())):
            if port not in proxies:
                proxy = FaultProxy((addresses.faults, port), (addresses.pod, port), random=self._random)
                await proxy.start()
                proxies[port] = proxy
        return proxies

    async def _undisturb(self, name: str) -> None:
        self._ends.pop(name, None)
        for proxy in self._proxies.get(name, {}).values():
            proxy.set(Disturbance())
        logger.info("no longer disturbed", extra={"instance": name})
        self._changed()
        self._wake.notify()

    def _go_on(self, key: tuple[str, Part]) -> None:
        item = self._stopped.pop(key)
        if _is_same(item):
            _signal(item.pid, signal.SIGCONT)
        logger.info("goes on", extra={"instance": key[0], "part": key[1]})

    def _meant(self, target: str) -> list[Instance]:
        everything = self._instances()
        found = [instance for _, instance in sorted(everything.items()) if instance.plan.answers_to(target)]
        if not found:
            known = ", ".join(sorted({instance.plan.workload.name for instance in everything.values()}))
            raise NotFound(f"no workload {target!r}; there are {known}", reason="WORKLOAD_NOT_FOUND")
        return found

    def _some(self, names: list[str], target: str, part: Part) -> list[str]:
        if not names:
            raise WrongState(f"no {part} of {target} runs now", reason="PROCESS_NOT_RUNNING")
        return names


def _slot(instance: Instance, part: Part) -> Slot:
    return instance.sidecar if part == "sidecar" else instance.application


def _is_same(item: _Stopped) -> bool:
    """Whether the process that was stopped is still the one that runs: its number may belong to another by now."""
    return item.slot.pid == item.pid


def _signal(pid: int, number: signal.Signals) -> bool:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        # The whole group: a service may have children that work for it.
        os.killpg(pid, number)
        return True
    return False


def _check_duration(duration_s: float) -> None:
    if not 0 < duration_s <= DURATION_MAX_S:
        raise InvalidInput(f"must be more than 0 s and at most {DURATION_MAX_S:g} s", field="duration")
