"""A mesh of real Envoys that Istio's control plane configures, beside the one of tests/support/envoy_mesh.py."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

from mlmesh_local.istiod.driver import Driver
from mlmesh_local.istiod.process import Istiod
from tests.support.envoy_mesh import EnvoyMesh, load

DELIVERED_S = 15.0


class DrivenMesh(EnvoyMesh):
    """Configured by pilot-discovery: what it sends is adapted as `mlmesh up --control-plane istiod` does."""

    driver: ClassVar[Any]

    @classmethod
    @contextlib.asynccontextmanager
    async def driven(cls, program: Path, folder: Path, *texts: str) -> AsyncIterator[EnvoyMesh]:
        """A mesh of the Deployments in these documents, every Envoy configured."""
        istiod = Istiod(program, folder / "istiod", environ={"PILOT_DEBOUNCE_AFTER": "10ms"})
        await istiod.start()
        try:
            async with asyncio.TaskGroup() as group:
                meshes: list[EnvoyMesh] = []
                driver = Driver(istiod, group, deliver=lambda *what: meshes[0].ads.update(*what))  # noqa: PLW0108  (the mesh is made below)

                class Here(cls):  # type: ignore[misc, valid-type]
                    def __init__(self, *arguments: Any) -> None:
                        super().__init__(*arguments)
                        meshes.append(self)

                Here.driver = driver
                try:
                    async with Here.start(folder, *texts) as mesh:
                        yield mesh
                finally:
                    driver.close()
        finally:
            await istiod.stop()

    def push(self) -> str:
        """Show Istio the world as it is."""
        self.driver.offer(self.world, self.resources)
        return self.world.version

    async def apply(self, *texts: str, timeout_s: float = 5.0) -> float:
        """Apply documents; returns the seconds until every sidecar had acknowledged what Istio makes of them."""
        self.resources = self.resources.apply(load(*texts)).resources
        begin = time.perf_counter()
        await self._acknowledged(self.push(), timeout_s)
        return time.perf_counter() - begin

    async def reset(self, *texts: str) -> None:
        """Back to these documents alone; backends behave and count from zero."""
        self.resources = self.resources.apply(load(*texts), prune=True).resources
        self.not_ready.clear()
        await self._acknowledged(self.push(), DELIVERED_S)
        for backend in self.backends.values():
            backend.calls, backend.fail, backend.fail_times, backend.delay_s = 0, None, 1 << 30, 0.0
            backend.metadata.clear()

    async def _acknowledged(self, version: str, timeout_s: float) -> None:
        await self.driver.delivered(version, timeout_s=DELIVERED_S)
        await self.ads.wait_acked(version, timeout_s=timeout_s)
