"""Istio's standard metrics of a running mesh: who is who follows the configuration, intervals are closed on time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from mlmesh_local.metrics.directory import Directory
from mlmesh_local.metrics.exposition import exposition
from mlmesh_local.metrics.queries import TICK_S, History
from mlmesh_local.metrics.registry import MeshMetrics
from mlmesh_local.metrics.rules import RuleCounts
from mlmesh_local.model import World
from mlmesh_local.translate import View
from mlmesh_local.translate.metric_plans import plans_of

SWEEP_TICKS = 30


class Metering:
    """Metrics and their recent history, and calls by the rules that routed them."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.metrics = MeshMetrics(clock=clock)
        self.history = History(self.metrics, clock=clock)
        self.rules = RuleCounts(clock=clock)

    def describe(self, world: World) -> None:
        """Take labels, and what Telemetry says of metrics, from a world that is about to be active."""
        view = View(world)
        self.metrics.describe(Directory.of(view), plans_of(view))

    def page(self) -> Iterable[str]:
        """What Prometheus scrapes."""
        return exposition(self.metrics)

    async def run(self) -> None:
        """Close intervals, for ever."""
        while True:
            for _ in range(SWEEP_TICKS):
                await asyncio.sleep(TICK_S)
                self.history.tick()
                self.rules.sample()
            self.metrics.sweep()
