"""An inference server in this process, and an engine whose every run the test controls."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlmesh_inference.app import services
from mlmesh_inference.catalog import Catalog, ReadyModel
from mlmesh_inference.config import ProtocolSettings
from mlmesh_inference.engines.base import Engine, EngineError, EngineFacts, EngineOptions
from mlmesh_inference.engines.onnx import OnnxKind
from mlmesh_inference.moving import OpenStreams
from mlmesh_inference.oip.repository import Repository
from mlmesh_inference.oip.stream import Streaming
from mlmesh_inference.overrides import Override
from mlmesh_inference.running import FutureSink, Runner, Work
from mlmesh_inference.scheduling.batcher import Batcher
from mlmesh_inference.scheduling.policy import BatchPolicy
from mlmesh_inference.statistics import Statistics
from mlmesh_inference.tensors import DATATYPES, Array, Signature, TensorSpec
from mlmesh_inference.tokens import Tokens
from mlmesh_inference.trace_settings import TraceSettings
from mlmesh_runtime.errors import NotFound
from mlmesh_runtime.health import HealthStatuses
from mlmesh_runtime.server import Server
from tests.support.server import settings

WAIT_S = 10.0
"""Longest a test waits for a thread; long, because it only matters when the test fails."""


class GatedEngine:
    """y = x * 2 over x[N,width] FP32; a run waits at a gate, and the test sees what ran.

    `open()` lets everything through; `step()` lets one run through. `fail_on` makes rows with that value fail.
    """

    name = "gated"
    facts = EngineFacts(precision="fp32")

    def __init__(self, *, width: int = 4, concurrency: int = 1, is_open: bool = False) -> None:
        spec = DATATYPES["FP32"]
        self.signature = Signature(
            inputs=(TensorSpec(name="x", datatype=spec, shape=(-1, width)),),
            outputs=(TensorSpec(name="y", datatype=spec, shape=(-1, width)),),
        )
        self.concurrency = concurrency
        self.fail_on: float | None = None
        self.result: Callable[[Array], Array] = lambda x: x * 2
        self.batches: list[list[float]] = []
        self.closed = False
        self._permits = threading.Semaphore(0)
        self._open = is_open
        self._loop = asyncio.get_running_loop()
        self._begun = asyncio.Semaphore(0)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Wait at the gate, then double."""
        x = inputs["x"]
        self.batches.append([float(row[0]) for row in x])
        self._loop.call_soon_threadsafe(self._begun.release)
        if not self._open and not self._permits.acquire(timeout=WAIT_S):
            raise EngineError("the test left a run waiting")
        if self.fail_on is not None and self.fail_on in x[:, 0]:
            raise EngineError(f"a row holds {self.fail_on}")
        return [self.result(x) for _ in outputs]

    async def begun(self) -> None:
        """Wait until one more run has begun."""
        async with asyncio.timeout(WAIT_S):
            await self._begun.acquire()

    def step(self, runs: int = 1) -> None:
        """Let runs through."""
        self._permits.release(runs)

    def open(self) -> None:
        """Let everything through from now on."""
        self._open = True
        self._permits.release(1000)

    def close(self) -> None:
        """Remember it."""
        self.closed = True


def ready_model(
    engine: Engine,
    *,
    name: str = "m",
    version: int = 1,
    labels: tuple[str, ...] = (),
    platform: str = "onnxruntime_onnx",
    statistics: Statistics | None = None,
    **policy: Any,
) -> ReadyModel:
    """A model that answers, as the loader would install it."""
    bounds = BatchPolicy(**{"batches": engine.signature.batches, **policy})
    statistics = statistics or Statistics(name, version)
    batcher = Batcher(engine, bounds, statistics, name=f"{name}/{version}")
    statistics.watch_depth(lambda: batcher.depth, lambda: batcher.concurrency_limit)
    return ReadyModel(
        name=name,
        version=version,
        platform=platform,
        signature=engine.signature,
        policy=bounds,
        runner=batcher,
        statistics=statistics,
        labels=labels,
        concurrency=engine.concurrency,
    )


def onnx_engine(path: Path, model: bytes, **options: Any) -> Engine:
    """A real ONNX Runtime engine over a model made in the test."""
    path.write_bytes(model)
    return OnnxKind().build(path, EngineOptions(**options))


def submitted(
    to: Runner, inputs: Mapping[str, Array], outputs: tuple[str, ...] = ("y",), **fields: Any
) -> asyncio.Future[list[Array]]:
    """Submit a request; its answer as a future. `fields` are those of Work."""
    sink = FutureSink()
    to.submit(Work(inputs=inputs, outputs=outputs, **fields), sink)
    return sink.future


def open_streams(*, seed: int = 1, age_s: float = 0.0) -> OpenStreams:
    """Of a server in this process; chance is the same each time."""
    return OpenStreams(asyncio.get_running_loop().call_later, chance=random.Random(seed), age_s=age_s)  # noqa: S311


class NoRepository:
    """A repository without models."""

    async def load(self, model: str, override: Override | None = None) -> None:
        """Nothing to load."""
        raise NotFound(f"failed to load '{model}', failed to poll from model repository", reason="MODEL_NOT_FOUND")

    async def unload(self, model: str, *, dependents: bool = False) -> None:
        """Nothing to unload."""
        raise NotFound(f"failed to unload '{model}', it is not served", reason="MODEL_NOT_FOUND")

    def known(self) -> list[tuple[str, int, str]]:
        """Nothing."""
        return []


def install(catalog: Catalog, *models: ReadyModel) -> None:
    """Let models answer; the last version of each is its default."""
    for model in models:
        catalog.install(model, engine=model.platform, engine_reason="chosen by the test")
        catalog.point(model.name, default=model.version, aliases={"stable": model.version})
    catalog.synced = True


@contextlib.asynccontextmanager
async def inference_server(
    *models: ReadyModel,
    catalog: Catalog | None = None,
    health: HealthStatuses | None = None,
    streaming: Streaming | None = None,
    repository: Repository | None = None,
    protocol: ProtocolSettings | None = None,
    traces: TraceSettings | None = None,
    **changes: Any,
) -> AsyncIterator[Server]:
    """A server in this process that answers for the models given; `changes` are fields of its `Settings`."""
    catalog = catalog or Catalog()
    install(catalog, *models)
    going_away = asyncio.Event()
    streaming = streaming or Streaming(catalog=catalog, open=open_streams(), tokens=Tokens())
    offered = services(
        catalog,
        repository or NoRepository(),
        [OnnxKind()],
        going_away,
        streaming,
        protocol=protocol,
        traces=traces,
    )
    async with Server(settings(**changes), offered, health=health) as server:
        server.on_drain(going_away.set)
        server.on_drain(streaming.open.drain)
        try:
            yield server
        finally:
            for model in models:
                model.runner.abort()


async def eventually(condition: Callable[[], bool], *, timeout_s: float = WAIT_S) -> None:
    """Wait for what another party does and nothing announces, such as a message that arrives."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def rows(*values: float, width: int = 4) -> Array:
    """An FP32 array [len(values), width] whose rows hold these values."""
    return np.repeat(np.array(values, np.float32)[:, None], width, axis=1)
