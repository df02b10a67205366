"""Polls every Envoy for its counters, and adds them up."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from mlmesh_local import sidecar
from mlmesh_local.instance import Instance
from mlmesh_local.stats import STATS_REQUEST, Counts, Destination, Traffic, parse_counters, parse_dropped
from mlmesh_runtime.errors import MeshError

logger = logging.getLogger(__name__)

POLL_S = 1.0
# Who asks more often than this gets the last figures: each look costs every Envoy about a millisecond.
FRESH_S = 0.05


class StatsPoller:
    """Observed traffic of all sidecars."""

    def __init__(
        self,
        instances: Callable[[], Iterable[Instance]],
        *,
        changed: Callable[[], None],
        dropped: Callable[[int], None] = lambda _entries: None,
    ) -> None:
        self._instances = instances
        self._changed = changed
        self._dropped = dropped
        self._dropped_before: dict[str, int] = {}
        self._traffic = Traffic()
        self._generation: dict[str, int] = {}
        self._polled_s = 0.0
        self._turn = asyncio.Lock()

    async def run(self) -> None:
        """Poll, for ever."""
        while True:
            before = self._traffic.observed(time.monotonic(), POLL_S)
            await self.poll()
            if self._traffic.observed(time.monotonic(), POLL_S) != before:
                self._changed()
            await asyncio.sleep(POLL_S)

    async def observed(self, window_s: float) -> dict[Destination, Counts]:
        """Counts of the last ``window_s`` seconds, fresh."""
        await self.poll()
        return self._traffic.observed(time.monotonic(), window_s)

    async def begin(self) -> None:
        """Count from now on."""
        self._polled_s = 0.0
        await self.poll()
        self._traffic.begin(time.monotonic())

    async def poll(self) -> None:
        """Ask every Envoy, unless that was just done."""
        async with self._turn:
            if time.monotonic() - self._polled_s < FRESH_S:
                return
            async with asyncio.TaskGroup() as group:
                for instance in self._instances():
                    if instance.sidecar_live:
                        group.create_task(self.look(instance))
            self._polled_s = time.monotonic()
            self._traffic.sample(self._polled_s)

    async def look(self, instance: Instance) -> None:
        """Ask one Envoy; one that does not answer is asked again at the next round."""
        process = instance.sidecar.pid
        if not process:
            return
        try:
            body = await sidecar.admin(instance.plan.addresses.admin, STATS_REQUEST)
            counters, dropped = parse_counters(body), parse_dropped(body)
        except (MeshError, ValueError) as error:
            logger.debug("no statistics", extra={"instance": instance.name, "reason": str(error)})
            return
        if self._generation.get(instance.name) != process:
            self._traffic.restarted(instance.name)
            self._generation[instance.name] = process
            self._dropped_before.pop(instance.name, None)
        self._dropped(dropped - self._dropped_before.get(instance.name, 0))
        self._dropped_before[instance.name] = dropped
        self._traffic.record(instance.name, counters)
