"""The loader with a registry in memory and real ONNX Runtime: swaps, failures, cache, restarts, by hand."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlmesh_inference.cache import ModelCache
from mlmesh_inference.catalog import Catalog, State, Status
from mlmesh_inference.config import InferenceSettings
from mlmesh_inference.desired import parse_selectors
from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.onnx import OnnxKind
from mlmesh_inference.loader import Loader
from mlmesh_inference.loading import Loading, warm_up
from mlmesh_inference.scheduling.policy import BatchPolicy
from mlmesh_inference.tensors import DATATYPES, Signature, TensorSpec
from mlmesh_runtime.errors import NotFound, NotReady, WrongState
from mlmesh_runtime.executors import Executors
from tests.support import onnx_models
from tests.support.inference import GatedEngine, submitted
from tests.support.registry_source import MemoryRegistry

ADD_1 = onnx_models.add(plus=1.0)
ADD_100 = onnx_models.add(plus=100.0)


class Loaded:
    """A loader that runs over a registry in memory."""

    def __init__(
        self, source: MemoryRegistry, root: Path, executors: Executors, selectors: str, prover: Any = None, **more: Any
    ) -> None:
        self.heard: list[Status] = []
        self.synced = False
        self._changed = asyncio.Event()
        self.catalog = Catalog(listener=self._hear)
        self.loader = Loader(
            Loading(
                source=source,
                cache=ModelCache(root),
                catalog=self.catalog,
                kinds=[OnnxKind()],
                settings=InferenceSettings(selectors=parse_selectors(selectors), rows_max=8, rows_preferred=4, **more),
                disk=executors["disk"],
                build=executors["build"],
                sleep=self._sleep,
                prover=prover,
            ),
            on_synced=self._sync,
            fallback_s=0.05,
        )

    def _hear(self, status: Status) -> None:
        self.heard.append(status)
        self._changed.set()

    def _sync(self) -> None:
        self.synced = True
        self._changed.set()

    @staticmethod
    async def _sleep(_seconds: float) -> None:
        await asyncio.sleep(0.001)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def state(self, version: int, model: str = "m") -> State | None:
        status = self.catalog.status(model, version)
        return status and status.state

    async def plus(self, version: str = "", model: str = "m") -> float:
        """What the model adds."""
        ready = self.catalog.resolve(model, version)
        outcome = submitted(ready.runner, {"x": np.zeros((1, 4), np.float32)})
        return float((await outcome)[0][0, 0])


@contextlib.asynccontextmanager
async def loader(source: MemoryRegistry, root: Path, selectors: str = "*@stable", **more: Any) -> AsyncIterator[Loaded]:
    async with Executors({"disk": 2, "build": 1}) as executors:
        it = Loaded(source, root, executors, selectors, **more)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(it.loader.run())
            yield it
            task.cancel()
        for ready in it.catalog.ready_models():
            await ready.runner.drain()


async def published(*versions: bytes) -> MemoryRegistry:
    """A registry whose model m has these versions, the first of them stable."""
    source = MemoryRegistry()
    for number, data in enumerate(versions, 1):
        await source.publish("m", number, data)
    await source.alias("m", "stable", 1)
    return source


async def test_a_file_that_takes_its_process_with_it_is_not_loaded(tmp_path: Path) -> None:
    source = await published(ADD_1, ADD_100)
    asked: list[str] = []

    async def prover(path: Path, digest: str) -> str:
        assert path.name == "model.onnx"
        asked.append(digest)
        return "the process that tried the model died (signal SIGSEGV)" if len(asked) == 2 else ""

    async with loader(source, tmp_path, prover=prover) as it:
        await it.until(lambda: it.synced)
        await source.alias("m", "stable", 2)
        await it.until(lambda: it.state(2) is State.FAILED)
        status = it.catalog.status("m", 2)
        assert status is not None
        assert "SIGSEGV" in status.error
        assert await it.plus() == 1.0
    assert asked == [hashlib.sha256(data).hexdigest() for data in (ADD_1, ADD_100)]


async def test_an_empty_registry_is_soon_settled(tmp_path: Path) -> None:
    async with loader(MemoryRegistry(), tmp_path) as it:
        await it.until(lambda: it.synced)
        assert it.catalog.statuses() == []


async def test_a_version_is_fetched_built_warmed_up_and_answers(tmp_path: Path) -> None:
    source = await published(ADD_1)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        assert await it.plus() == 1.0
        states = [status.state for status in it.heard]
        assert list(dict.fromkeys(states)) == [State.FETCHING, State.BUILDING, State.WARMING_UP, State.READY]
        status = it.catalog.status("m", 1)
        assert status is not None
        assert (status.fetched_bytes, status.total_bytes) == (len(ADD_1), len(ADD_1))
        assert status.engine == "onnxruntime-cpu"
        assert status.engine_reason
        assert status.default


async def test_the_new_version_answers_before_the_old_one_goes(tmp_path: Path) -> None:
    source = await published(ADD_1, ADD_100)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        await source.alias("m", "stable", 2)
        await it.until(lambda: it.state(1) is None)
        assert await it.plus() == 100.0
        kept = [(status.version, status.state) for status in it.heard]
        assert kept.index((2, State.READY)) < kept.index((1, State.DRAINING)) < kept.index((1, State.UNLOADED))
        assert not (tmp_path / "models" / "m" / "1").exists()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"this is no model", "it is no well-formed ONNX model"),
        (onnx_models.always_failing(), "warm-up with 1 rows"),
        (onnx_models.wrong_shape(), "warm-up with 4 rows"),
    ],
)
async def test_a_bad_version_fails_and_the_old_one_serves_on(data: bytes, text: str, tmp_path: Path) -> None:
    source = await published(ADD_1, data)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        await source.alias("m", "stable", 2)
        await it.until(lambda: it.state(2) is State.FAILED)
        status = it.catalog.status("m", 2)
        assert status is not None
        assert text in status.error
        assert str(tmp_path) not in status.error
        assert it.catalog.resolve("m", "").version == 1
        assert it.catalog.resolve("m", "@stable").version == 1
        await source.publish("m", 3, ADD_100)
        await source.alias("m", "stable", 3)
        await it.until(lambda: it.state(1) is None and it.state(2) is None)
        assert await it.plus("@stable") == 100.0


async def test_a_bad_first_version_still_ends_the_start(tmp_path: Path) -> None:
    source = await published(b"this is no model")
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        assert it.state(1) is State.FAILED


async def test_a_signature_that_is_not_the_files_fails(tmp_path: Path) -> None:
    source = MemoryRegistry()
    spec = TensorSpec(name="x", datatype=DATATYPES["FP32"], shape=(-1, 28, 28))
    await source.publish("m", 1, ADD_1, signature=Signature(inputs=(spec,), outputs=()))
    async with loader(source, tmp_path, "*") as it:
        await it.until(lambda: it.synced)
        status = it.catalog.status("m", 1)
        assert status is not None
        assert "'x' is FP32[-1, 28, 28], the model file says FP32[-1, 4]" in status.error


async def test_stable_and_canary_in_one_process(tmp_path: Path) -> None:
    source = await published(ADD_1, ADD_100)
    await source.alias("m", "canary", 2)
    async with loader(source, tmp_path, "*@stable,*@canary") as it:
        await it.until(lambda: it.synced)
        assert [await it.plus(version) for version in ("", "@stable", "@canary", "1", "2")] == [1, 1, 100, 1, 100]


async def test_an_alias_stays_where_it_was_until_its_new_version_answers(tmp_path: Path) -> None:
    source = await published(ADD_1, ADD_100)
    await source.alias("m", "canary", 2)
    async with loader(source, tmp_path, "*@stable,*@canary") as it:
        await it.until(lambda: it.synced)
        source.hold_downloads = asyncio.Event()
        await source.publish("m", 3, onnx_models.add(plus=7.0))
        await source.alias("m", "canary", 3)
        await it.until(lambda: it.state(3) is State.FETCHING)
        assert await it.plus("@canary") == 100.0
        source.hold_downloads.set()
        await it.until(lambda: it.state(2) is None)
        assert await it.plus("@canary") == 7.0


async def test_a_deleted_alias_unloads(tmp_path: Path) -> None:
    source = await published(ADD_1)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        await source.delete_alias("m", "stable")
        await it.until(lambda: it.catalog.statuses() == [])


async def test_a_quarantined_or_deleted_version_is_unloaded_and_comes_back(tmp_path: Path) -> None:
    source = await published(ADD_1)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        await source.publish("m", 1, ADD_1, quarantined=True)
        await it.until(lambda: it.catalog.statuses() == [])
        await source.publish("m", 1, ADD_1)
        await it.until(lambda: it.catalog.default_version("m") == 1)
        assert await it.plus() == 1.0
        await source.delete("m", 1)
        await it.until(lambda: it.catalog.statuses() == [])


async def test_a_quarantined_version_does_not_stand_in_for_the_next(tmp_path: Path) -> None:
    source = await published(ADD_1, ADD_100)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        source.hold_downloads = asyncio.Event()
        await source.alias("m", "stable", 2)
        await it.until(lambda: it.state(2) is State.FETCHING)
        assert await it.plus() == 1.0
        await source.publish("m", 1, ADD_1, quarantined=True)
        await it.until(lambda: it.state(1) is None)
        with pytest.raises(NotReady):
            await it.plus()
        source.hold_downloads.set()
        await it.until(lambda: it.catalog.default_version("m") == 2)
        assert await it.plus() == 100.0


async def test_a_data_set_is_not_loaded(tmp_path: Path) -> None:
    source = await published(ADD_1)
    await source.name("data", servable=False)
    await source.publish("data", 1, b"rows")
    await source.alias("data", "stable", 1)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        assert {status.model for status in it.catalog.statuses()} == {"m"}


async def test_what_is_no_longer_wanted_stops_loading(tmp_path: Path) -> None:
    source = await published(ADD_1, ADD_100)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        source.hold_downloads = asyncio.Event()
        await source.alias("m", "stable", 2)
        await it.until(lambda: it.state(2) is State.FETCHING)
        await source.alias("m", "stable", 1)
        await it.until(lambda: it.state(2) is None)
        assert await it.plus() == 1.0


async def test_bytes_are_fetched_once(tmp_path: Path) -> None:
    source = await published(ADD_1)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        assert await it.plus() == 1.0
    assert len(source.downloads) == 1


async def test_a_cut_fetch_goes_on_where_it_was(tmp_path: Path) -> None:
    source = await published(ADD_1)
    source.chunk_bytes, source.cut_after = 64, 64
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.catalog.default_version("m") == 1)
        assert await it.plus() == 1.0
    offsets = [offset for _, offset in source.downloads]
    assert offsets == list(range(0, len(ADD_1), 64))


async def test_wrong_bytes_are_never_built(tmp_path: Path) -> None:
    source = await published(ADD_1)
    digest = next(iter(source.blobs))
    source.damage[digest] = ADD_1[:-1] + bytes([ADD_1[-1] ^ 1])
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.state(1) is State.FAILED)
        status = it.catalog.status("m", 1)
        assert status is not None
        assert "SHA-256" in status.error
        assert State.BUILDING not in {heard.state for heard in it.heard}
    assert len(source.downloads) == 3


async def test_a_damaged_cache_is_fetched_anew(tmp_path: Path) -> None:
    source = await published(ADD_1)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
    blob = next((tmp_path / "blobs").iterdir())
    blob.write_bytes(b"\x00" * len(ADD_1))
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        assert await it.plus() == 1.0
    assert len(source.downloads) == 2


async def test_the_cache_serves_when_the_registry_is_away_at_the_start(tmp_path: Path) -> None:
    source = await published(ADD_1, ADD_100)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
    source.down = True
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        assert await it.plus() == 1.0
        source.down = False
        await source.alias("m", "stable", 2)
        await it.until(lambda: it.catalog.default_version("m") == 2)
        assert await it.plus() == 100.0


async def test_without_registry_and_cache_the_start_is_not_over(tmp_path: Path) -> None:
    source = await published(ADD_1)
    source.down = True
    async with loader(source, tmp_path) as it:
        async with asyncio.timeout(5):
            await source.watched(20)
        assert not it.synced
        source.down = False
        await it.until(lambda: it.synced)
        assert await it.plus() == 1.0


async def test_a_registry_that_goes_away_takes_nothing_with_it(tmp_path: Path) -> None:
    source = await published(ADD_1)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        source.down = True
        await source.cut()
        assert await it.plus() == 1.0


async def test_load_and_unload_by_hand(tmp_path: Path) -> None:
    source = await published(ADD_1)
    await source.publish("other", 1, ADD_100)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        async with asyncio.timeout(10):
            await it.loader.load("other")
            assert await it.plus(model="other") == 100.0
            await it.loader.load("other")
            await it.loader.unload("m")
        assert it.catalog.statuses("m") == []
        async with asyncio.timeout(10):
            await it.loader.load("m")
        assert await it.plus() == 1.0


async def test_what_cannot_be_loaded_by_hand(tmp_path: Path) -> None:
    source = await published(ADD_1)
    await source.publish("broken", 1, b"no")
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        with pytest.raises(NotFound, match="failed to load 'nope', failed to poll from model repository"):
            await it.loader.load("nope")
        with pytest.raises(NotFound, match="failed to unload 'nope'"):
            await it.loader.unload("nope")
        async with asyncio.timeout(10):
            with pytest.raises(WrongState, match="version 1 is at UNAVAILABLE state"):
                await it.loader.load("broken")


async def test_what_was_in_flight_is_answered_by_the_version_that_took_it(tmp_path: Path) -> None:
    source = await published(ADD_1, ADD_100)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        answers: list[float] = []
        stop = False

        async def ask() -> None:
            while not stop:
                answers.append(await it.plus())

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(ask())
            for version in (2, 1, 2):
                await source.alias("m", "stable", version)
                await it.until(lambda version=version: it.catalog.default_version("m") == version)
                await it.until(lambda version=version: it.state(3 - version) is None)
            stop = True
        assert set(answers) == {1.0, 100.0}
        assert len(answers) > 10


class _Engine(GatedEngine):
    def __init__(self, **changes: Any) -> None:
        super().__init__(is_open=True)
        self.__dict__.update(changes)


async def test_a_model_with_free_dimensions_may_dislike_small_ones() -> None:
    engine = _Engine()
    spec = engine.signature.inputs[0]
    engine.signature = Signature(
        inputs=(TensorSpec(name="x", datatype=spec.datatype, shape=(-1, -1)),), outputs=engine.signature.outputs
    )

    def refuse(_x: Any) -> Any:
        raise EngineError("too small")

    engine.result = refuse
    warm_up(engine, BatchPolicy())
    assert len(engine.batches) == 1


async def test_an_output_that_is_not_what_the_signature_says_fails_the_warm_up() -> None:
    engine = _Engine(result=lambda x: x.astype(np.float64))
    with pytest.raises(EngineError, match="output 'y' is float64"):
        warm_up(engine, BatchPolicy())
