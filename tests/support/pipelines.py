"""Versions of several files, served as a process would: registry in memory, real loader, real engines."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mlmesh_inference.cache import ModelCache
from mlmesh_inference.catalog import Catalog, ReadyModel, State, Status
from mlmesh_inference.config import InferenceSettings
from mlmesh_inference.desired import parse_selectors
from mlmesh_inference.engines.onnx import OnnxKind
from mlmesh_inference.loader import Loader
from mlmesh_inference.loading import Loading
from mlmesh_inference.running import Answer, Work, run
from mlmesh_inference.statistics import Tracer
from mlmesh_inference.tensors import Array, object_array
from mlmesh_runtime.executors import Executors
from tests.support.registry_source import MemoryRegistry

WAIT_S = 60.0

Files = Mapping[str, bytes]


class Platform:
    """Models as the loader has them."""

    def __init__(self, source: MemoryRegistry, catalog: Catalog, loader: Loader, changed: asyncio.Event) -> None:
        self.source = source
        self.catalog = catalog
        self.loader = loader
        self._changed = changed

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a change that makes it so."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def settled(self, model: str, version: int = 1) -> Status:
        """A version that is ready or has failed."""

        def over() -> bool:
            status = self.catalog.status(model, version)
            return status is not None and status.state in (State.READY, State.FAILED)

        await self.until(over)
        status = self.catalog.status(model, version)
        assert status is not None
        return status

    async def ready(self, model: str, version: int = 1) -> ReadyModel:
        """A version, once it answers; the test fails when it does not."""
        status = await self.settled(model, version)
        assert status.state is State.READY, status.error
        await self.until(lambda: self.catalog.default_version(model) != 0)
        return self.catalog.resolve(model, str(version))

    async def ask(self, model: str, inputs: Mapping[str, Array], *outputs: str) -> dict[str, Array]:
        """One request; outputs by name, all of them where none is named."""
        ready = self.catalog.resolve(model, "")
        names = outputs or ready.output_names
        rows = next(iter(inputs.values())).shape[0] if ready.policy.batches else 1
        return dict(zip(names, await run(ready.runner, Work(inputs=inputs, outputs=names, rows=rows)), strict=True))


async def answers(ready: ReadyModel, work: Work) -> list[Answer]:
    """All that a model answers."""
    return [answer async for answer in ready.runner.respond(work)]


@contextlib.asynccontextmanager
async def platform(
    root: Path,
    models: Mapping[str, Sequence[Files]],
    *,
    rows_max: int = 8,
    concurrency: int = 1,
    tracer: Tracer | None = None,
) -> AsyncIterator[Platform]:
    """Serve models: by name, the files of each of their versions."""
    source, changed = MemoryRegistry(), asyncio.Event()
    for name, versions in models.items():
        for number, files in enumerate(versions, 1):
            await source.publish_files(name, number, files)
    catalog = Catalog(listener=lambda _: changed.set())
    async with Executors({"disk": 2, "build": 2}) as executors:
        settings = InferenceSettings(
            selectors=parse_selectors("*"), rows_max=rows_max, rows_preferred=min(4, rows_max), concurrency=concurrency
        )
        loading = Loading(
            source=source,
            cache=ModelCache(root),
            catalog=catalog,
            kinds=[OnnxKind()],
            settings=settings,
            disk=executors["disk"],
            build=executors["build"],
            tracer=tracer,
        )
        loader = Loader(loading, fallback_s=0.05)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(loader.run())
            try:
                yield Platform(source, catalog, loader, changed)
            finally:
                task.cancel()
        # Ensembles first: they go through the models that they are made of.
        for ready in sorted(catalog.ready_models(), key=lambda each: not each.composing):
            await ready.runner.drain()
            ready.statistics.close()


def texts(*values: str | bytes, column: bool = True) -> Array:
    """A BYTES tensor [count, 1], or [count]."""
    data = [value.encode() if isinstance(value, str) else value for value in values]
    return object_array(data, (len(data), 1) if column else (len(data),))


def floats(*values: float) -> Array:
    """An FP32 tensor."""
    return np.array(values, np.float32)
