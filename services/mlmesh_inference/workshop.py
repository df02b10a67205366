"""What a build does: find the engine, on disk or in the fleet, or compile it; keep it; and switch to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mlmesh_inference.builds import Build, Result
from mlmesh_inference.compiling import Stop
from mlmesh_inference.engine_cache import EngineCache, Plan, PlanKey
from mlmesh_inference.engines.base import Availability, Engine, EngineError, EngineOptions
from mlmesh_inference.engines.tensorrt_compile import BuildCancelled, Step
from mlmesh_runtime.errors import InvalidInput, WrongState
from mlmesh_runtime.executors import BoundedExecutor, run_blocking

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Where a served version's model file is, and how engines of it are built."""

    path: Path
    options: EngineOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Switched:
    """Which engine serves after a switch, and why: it need not be the one that was built."""

    engine: str
    reason: str


class Served(Protocol):
    """The versions that this process serves."""

    def order(self, model: str, version: int) -> Order:
        """How to build for a version. Raises NotFound (MODEL_NOT_FOUND), NotReady (MODEL_NOT_READY)."""

    async def renew(self, model: str, version: int) -> Switched:
        """Choose the version's engine anew, among those that are there now, and switch when another one wins.

        What serves goes on until then. Raises EngineError, MeshError.
        """


class Compiling(Protocol):
    """An engine kind whose engines are compiled beforehand; everything blocks."""

    name: str
    cache: EngineCache | None

    def probe(self) -> Availability:
        """Whether its engines can run here."""

    def probe_compiler(self) -> Availability:
        """Whether they can be compiled here."""

    def key(self, model: Path, options: EngineOptions) -> PlanKey:
        """What an engine is found by."""

    def compile(self, model: Path, options: EngineOptions, step: Callable[[Step], None], stop: Stop) -> Plan:
        """Compile and keep."""

    def load(self, plan: Plan) -> Engine:
        """Run it."""


class Fleet(Protocol):
    """Engines that processes of one fleet share."""

    async def fetch(self, model: str, key: PlanKey) -> Plan | None:
        """The fleet's engine, None when there is none."""

    async def offer(self, model: str, version: int, plan: Plan) -> None:
        """Share one."""


class EngineWorkshop:
    """Builds for the versions of this process.

    Args:
        served: the versions. kinds: what compiles, by name. fleet: shared engines, None for none.
        compiler: executor with one thread: one build at a time. disk: executor for files.
    """

    def __init__(
        self,
        served: Served,
        kinds: Mapping[str, Compiling],
        *,
        compiler: BoundedExecutor,
        disk: BoundedExecutor,
        fleet: Fleet | None = None,
    ) -> None:
        self._served = served
        self._kinds = kinds
        self._fleet = fleet
        self._compiler = compiler
        self._disk = disk

    def check(self, model: str, version: int, engine: str) -> None:
        """See builds.Workshop."""
        kind = self._kinds.get(engine)
        if kind is None:
            known = ", ".join(sorted(self._kinds)) or "none"
            raise InvalidInput(f"{engine!r} is no engine that is compiled beforehand; there is {known}", field="engine")
        found = kind.probe_compiler()
        if not found.available:
            raise WrongState(f"{engine} cannot compile here: {found.reason}", reason="BUILD_FAILED")
        self._served.order(model, version)

    async def make(self, build: Build, step: Callable[[Step], None], stop: Stop) -> Result:
        """See builds.Workshop."""
        kind, order = self._kinds[build.engine], self._served.order(build.model, build.version)
        key = await run_blocking(self._disk, kind.key, order.path, order.options)
        plan = await self._found(build, kind, key, step)
        if plan is None:
            plan = await self._compiled(build, kind, order, step, stop)
        facts, source = plan.facts, plan.source
        # Its bytes are on disk, from where an engine is loaded; here they would only take memory.
        del plan
        switched = await self._switch(build, kind, step, stop)
        return Result(
            precisions=facts.precisions,
            size=facts.size,
            sha256=facts.sha256,
            source=source,
            seconds=facts.seconds if source == "built" else None,
            serving=switched.engine == kind.name,
            reason=switched.reason,
        )

    async def _found(self, build: Build, kind: Compiling, key: PlanKey, step: Callable[[Step], None]) -> Plan | None:
        step(Step(phase="Looking for the engine"))
        plan = await run_blocking(self._disk, kind.cache.get, key) if kind.cache else None
        if plan is None and self._fleet is not None:
            plan = await self._fleet.fetch(build.model, key)
            if plan is not None and kind.cache:
                await run_blocking(self._disk, kind.cache.put, plan)
        return plan

    async def _compiled(
        self, build: Build, kind: Compiling, order: Order, step: Callable[[Step], None], stop: Stop
    ) -> Plan:
        loop = asyncio.get_running_loop()

        def told(at: Step) -> None:
            loop.call_soon_threadsafe(step, at)

        plan = await run_blocking(self._compiler, kind.compile, order.path, order.options, told, stop)
        _LOG.info(
            "engine compiled",
            extra={"model": build.model, "version": build.version, "seconds": round(plan.facts.seconds, 2)},
        )
        if self._fleet is not None:
            step(Step(phase="Sharing the engine"))
            await self._fleet.offer(build.model, build.version, plan)
        return plan

    async def _switch(self, build: Build, kind: Compiling, step: Callable[[Step], None], stop: Stop) -> Switched:
        if stop.asked:
            raise BuildCancelled("the build was cancelled; the engine is kept")
        if build.build_only:
            return Switched(engine="", reason="it was asked to build only")
        found = kind.probe()
        if not found.available:
            return Switched(engine="", reason=f"it cannot run here: {found.reason}")
        step(Step(phase="Comparing and switching"))
        try:
            return await self._served.renew(build.model, build.version)
        except EngineError as error:
            return Switched(engine="", reason=f"what serves goes on: {error}")
