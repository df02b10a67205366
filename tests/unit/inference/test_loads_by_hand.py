"""Loads by hand with a configuration of their own, and with files: what serves meanwhile, and what holds afterwards."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from mlmesh_inference.catalog import State
from mlmesh_inference.overrides import Override, file_of
from mlmesh_inference.serving import ServingConfig, TensorConfig, VersionPolicy
from mlmesh_runtime.errors import InvalidInput, NotFound, NotReady, WrongState
from tests.support import onnx_models
from tests.support.inference import submitted
from tests.support.registry_source import MemoryRegistry
from tests.unit.inference.test_loader import ADD_1, ADD_100, Loaded, loader, published

CONFIG = b'max_batch_size: 4\noutput { name: "y" label_filename: "names.txt" }\n'


def of(**fields: object) -> Override:
    return Override(config=ServingConfig(**fields))  # type: ignore[arg-type]


async def answer(it: Loaded, rows: int) -> float:
    outcome = submitted(it.catalog.resolve("m", "").runner, {"x": np.zeros((rows, 4), np.float32)}, rows=rows)
    return float((await outcome)[0][-1, 0])


async def test_a_versions_own_configuration_is_obeyed(tmp_path: Path) -> None:
    source = MemoryRegistry()
    files = {"model.onnx": ADD_1, "config.pbtxt": CONFIG, "names.txt": b"a\nb"}
    await source.publish_files("m", 1, files)
    async with loader(source, tmp_path, "*") as it:
        await it.until(lambda: it.synced)
        ready = it.catalog.resolve("m", "")
        assert ready.policy.rows_max == 4
        assert ready.output_labels["y"] == ("a", "b")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (b"input {", "config.pbtxt: the model configuration is malformed"),
        (b'name: "other"', "the configuration's name is 'other'"),
        (b"max_batch_size: 4096", "MLMESH_BATCH_ROWS_MAX"),
        (b'input { name: "z" }', "the configuration says input 'z'"),
        (b'default_model_filename: "gone.onnx"', "the version has no file 'gone.onnx'"),
        (b"version_policy { all {} }", "version_policy"),
        (b"response_cache { enable: true }", "config.response_cache.enable is not supported"),
        (b'model_warmup { name: "w" batch_size: 1 }', "model_warmup 'w' gives inputs []"),
    ],
)
async def test_a_configuration_that_does_not_go_with_its_version_fails_it(
    config: bytes, text: str, tmp_path: Path
) -> None:
    source = MemoryRegistry()
    await source.publish_files("m", 1, {"model.onnx": ADD_1, "config.pbtxt": config})
    async with loader(source, tmp_path, "*") as it:
        await it.until(lambda: it.synced)
        status = it.catalog.status("m", 1)
        assert status is not None
        assert status.state is State.FAILED
        assert text in status.error


async def test_an_override_replaces_what_serves_and_goes_again(tmp_path: Path) -> None:
    source = await published(ADD_1)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        before = it.catalog.resolve("m", "")
        await it.loader.load("m", of(rows_max=2))
        assert it.catalog.resolve("m", "").policy.rows_max == 2
        assert await answer(it, 2) == 1.0
        await it.until(lambda: _drained(before))
        await it.loader.load("m")
        assert it.catalog.resolve("m", "").policy.rows_max == 8
        assert it.catalog.resolve("m", "").statistics is before.statistics
        states = {status.state for status in it.heard if status.model == "m"}
        assert State.DRAINING not in states


def _drained(model: object) -> bool:
    try:
        submitted(model.runner, {"x": np.zeros((1, 4), np.float32)})  # type: ignore[attr-defined]
    except NotReady:
        return True
    return False


async def test_an_override_that_fails_changes_nothing(tmp_path: Path) -> None:
    source = await published(ADD_1, ADD_100)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        before = it.catalog.resolve("m", "")
        wrong = of(inputs=(TensorConfig(name="x", datatype="INT8"),), versions=VersionPolicy())
        with pytest.raises(WrongState, match="load failed for model 'm': version 2 is at UNAVAILABLE state"):
            await it.loader.load("m", wrong)
        assert it.catalog.resolve("m", "") is before
        assert it.state(1) is State.READY
        await it.until(lambda: it.state(2) is None)
        with pytest.raises(NotFound, match="no version is available"):
            await it.loader.load("m", of(versions=VersionPolicy(numbers=(7,))))
        with pytest.raises(NotFound, match="failed to poll from model repository"):
            await it.loader.load("nobody", of())
        assert await answer(it, 1) == 1.0


@pytest.mark.parametrize(
    ("policy", "served", "default"),
    [
        (VersionPolicy(numbers=(3, 1)), {1, 3}, 3),
        (VersionPolicy(latest=2), {2, 3}, 3),
        (VersionPolicy(), {1, 2, 3}, 3),
        (None, {1}, 1),
    ],
)
async def test_the_version_policy_of_an_override(
    policy: VersionPolicy | None, served: set[int], default: int, tmp_path: Path
) -> None:
    source = await published(ADD_1, ADD_100, onnx_models.add(plus=7.0))
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        await it.loader.load("m", of(versions=policy))
        await it.until(lambda: {status.version for status in it.catalog.statuses()} == served)
        assert it.catalog.default_version("m") == default
        await it.loader.load("m")
        await it.until(lambda: {status.version for status in it.catalog.statuses()} == {1})
        assert await answer(it, 1) == 1.0


async def test_versions_that_come_later_are_loaded_under_the_override_too(tmp_path: Path) -> None:
    source = await published(ADD_1)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        await it.loader.load("m", of(rows_max=3))
        await source.publish("m", 2, ADD_100)
        await source.alias("m", "stable", 2)
        await it.until(lambda: it.catalog.default_version("m") == 2)
        assert it.catalog.resolve("m", "").policy.rows_max == 3


async def test_two_overrides_of_one_model_do_not_cross(tmp_path: Path) -> None:
    source = await published(ADD_1, ADD_100)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        source.hold_downloads = asyncio.Event()
        first = asyncio.ensure_future(it.loader.load("m", of(versions=VersionPolicy(numbers=(2,)))))
        await it.until(lambda: it.state(2) is State.FETCHING)
        with pytest.raises(WrongState, match="is being loaded already"):
            await it.loader.load("m", of(rows_max=2))
        assert await answer(it, 1) == 1.0
        source.hold_downloads.set()
        await first
        assert await answer(it, 1) == 100.0


async def test_whoever_asked_may_go_and_the_load_goes_on(tmp_path: Path) -> None:
    source = await published(ADD_1, ADD_100)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        source.hold_downloads = asyncio.Event()
        asked = asyncio.ensure_future(it.loader.load("m", of(versions=VersionPolicy(numbers=(2,)))))
        await it.until(lambda: it.state(2) is State.FETCHING)
        asked.cancel()
        source.hold_downloads.set()
        await it.until(lambda: it.catalog.default_version("m") == 2)


async def test_files_that_come_along_make_a_model(tmp_path: Path) -> None:
    source = await published(ADD_1)
    brought = Override(config=ServingConfig(), files={3: {"model.onnx": ADD_100}})
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        await it.loader.load("mine", brought)
        assert it.catalog.resolve("mine", "").version == 3
        assert await it.plus(model="mine") == 100.0
        assert ("mine", 3, "unloaded") in it.loader.known()
        await it.loader.load("m", brought)
        await it.until(lambda: it.state(1) is None)
        assert await answer(it, 1) == 100.0
        await it.loader.load("m")
        assert await answer(it, 1) == 1.0
        await it.loader.unload("mine")
        with pytest.raises(NotFound):
            await it.loader.load("mine")
        broken = Override(config=ServingConfig(), files={1: {"model.onnx": b"no model"}})
        with pytest.raises(WrongState, match="load failed for model 'm'"):
            await it.loader.load("m", broken)
        assert await answer(it, 1) == 1.0
    assert not (tmp_path / "models" / "mine" / "3").exists()


async def test_nothing_of_an_override_outlives_the_process(tmp_path: Path) -> None:
    source = await published(ADD_1)
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        await it.loader.load("m", of(rows_max=2))
        await it.loader.load("mine", Override(config=ServingConfig(), files={1: {"model.onnx": ADD_100}}))
    async with loader(source, tmp_path) as it:
        await it.until(lambda: it.synced)
        assert it.catalog.resolve("m", "").policy.rows_max == 8
        assert it.catalog.find("mine", "") is None


async def test_before_the_start_there_is_nothing_to_load_into(tmp_path: Path) -> None:
    source = await published(ADD_1)
    async with loader(source, tmp_path) as it:
        it.loader._group = None
        with pytest.raises(NotReady):
            await it.loader.load("m", of())


@pytest.mark.parametrize(
    ("parameter", "place"),
    [("file:1/model.onnx", (1, "model.onnx")), ("file:12/sub/labels.txt", (12, "sub/labels.txt"))],
)
def test_files_by_version_and_path(parameter: str, place: tuple[int, str]) -> None:
    assert file_of(parameter) == place


@pytest.mark.parametrize(
    "parameter",
    [
        "file:",
        "file:model.onnx",
        "file:0/x",
        "file:1/",
        "file:1//x",
        "file:1/../x",
        "file:1/.x",
        "file:/1/x",
        "file:-1/x",
        "file:1/a\x00b",
        "file:1/a\n",
        "file:1/" + "a" * 200,
        "file:1/" + "a/" * 20 + "b",
        "file:\u0661/x",
    ],
)
def test_files_that_could_be_anywhere_are_refused(parameter: str) -> None:
    with pytest.raises(InvalidInput, match="Invalid file path"):
        file_of(parameter)
