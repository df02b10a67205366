"""Builds as operations: begun once, joined, one at a time, cancelled, forgotten, and known after a restart."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from google.rpc import code_pb2, error_details_pb2

from mlmesh.inference.v1 import control_pb2 as pb
from mlmesh_inference.build_log import DiskLog
from mlmesh_inference.builds import KEPT_MAX, WAITING_MAX, Build, Builds, Result
from mlmesh_inference.compiling import Stop
from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.tensorrt_compile import BuildCancelled, Step
from mlmesh_inference.operations import build_id, operation, parse_filter
from mlmesh_runtime.errors import InvalidInput, NotFound, Overloaded, WrongState
from mlmesh_runtime.executors import BoundedExecutor

RESULT = Result(precisions=("fp16",), size=5, sha256="ab", source="built", seconds=2.5, serving=True, reason="faster")


class Shop:
    """A workshop whose every build the test ends."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ends: dict[int, asyncio.Future[Result]] = {}
        self.steps: dict[int, Callable[[Step], None]] = {}
        self.arrived = asyncio.Condition()

    def check(self, model: str, version: int, engine: str) -> None:
        if model == "absent":
            raise NotFound("it is not served", reason="MODEL_NOT_FOUND")

    async def make(self, build: Build, step: Callable[[Step], None], stop: Stop) -> Result:
        self.begun.append(build.id)
        loop = asyncio.get_running_loop()
        self.ends[build.version] = loop.create_future()
        self.steps[build.version] = step
        stop.bind(lambda: self.fail(build.version, BuildCancelled("the build was cancelled")))
        async with self.arrived:
            self.arrived.notify_all()
        return await self.ends[build.version]

    def fail(self, version: int, error: Exception) -> None:
        if not self.ends[version].done():
            self.ends[version].set_exception(error)

    async def begins(self, version: int) -> None:
        async with asyncio.timeout(5), self.arrived:
            await self.arrived.wait_for(lambda: version in self.ends)


class Memory:
    """A log that forgets with the test."""

    def __init__(self, builds: dict[str, Build] | None = None) -> None:
        self.kept = builds or {}

    async def save(self, build: Build) -> None:
        self.kept[build.id] = build

    async def forget(self, build_id: str) -> None:
        self.kept.pop(build_id, None)

    async def load(self) -> list[Build]:
        return list(self.kept.values())


class World:
    """Builds that run, and what is behind them."""

    def __init__(self, log: Memory | None = None, **settings: int) -> None:
        self.shop, self.log, self.now = Shop(), log or Memory(), 100.0
        ids = iter(f"{number:04x}" for number in range(10_000))
        self.builds = Builds(self.shop, self.log, wall=self.tick, new_id=lambda: next(ids), **settings)

    def tick(self) -> float:
        self.now += 1.0
        return self.now


@contextlib.asynccontextmanager
async def running(log: Memory | None = None, **settings: int) -> AsyncIterator[World]:
    world = World(log, **settings)
    task = asyncio.create_task(world.builds.run())
    try:
        await world.builds.started.wait()
        yield world
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with running() as made:
        yield made


async def test_a_build_goes_from_waiting_over_steps_to_its_result(world: World) -> None:
    build = await world.builds.start("m", 1)
    assert (build.phase, build.engine, build.done) == ("Waiting", "tensorrt", False)
    await world.shop.begins(1)
    world.shop.steps[1](Step(phase="Optimising", done=3, total=9))
    now = world.builds.get(build.id)
    assert (now.phase, now.steps_done, now.steps_total) == ("Optimising", 3, 9)
    assert now.updated_s > build.updated_s
    assert world.builds.under_way("m", 1) == now
    world.shop.ends[1].set_result(RESULT)
    ended = await world.builds.wait(build.id, 5)
    assert ended.result == RESULT
    assert world.builds.under_way("m", 1) is None


async def test_the_same_request_is_one_build_also_after_it_ended(world: World) -> None:
    build = await world.builds.start("m", 1, request_id="r")
    await world.shop.begins(1)
    assert (await world.builds.start("m", 1, request_id="r")).id == build.id
    world.shop.ends[1].set_result(RESULT)
    await world.builds.wait(build.id, 5)
    assert (await world.builds.start("m", 1, request_id="r")).result == RESULT
    with pytest.raises(InvalidInput, match="request_id 'r' began another build"):
        await world.builds.start("m", 2, request_id="r")
    assert (await world.builds.start("m", 1, request_id="s")).id != build.id


async def test_a_build_under_way_is_joined_by_whoever_needs_the_same(world: World) -> None:
    build = await world.builds.start("m", 1, request_id="r")
    assert (await world.builds.start("m", 1, request_id="s")).id == build.id
    assert (await world.builds.start("m", 1)).id == build.id
    assert (await world.builds.start("m", 1, build_only=True)).id != build.id
    assert (await world.builds.start("m", 2)).id != build.id


async def test_builds_come_one_after_the_other(world: World) -> None:
    first, second = await world.builds.start("m", 1), await world.builds.start("m", 2)
    await world.shop.begins(1)
    assert world.shop.begun == [first.id]
    world.shop.ends[1].set_result(RESULT)
    await world.shop.begins(2)
    assert world.shop.begun == [first.id, second.id]


async def test_what_cannot_be_built_is_refused_at_once(world: World) -> None:
    with pytest.raises(NotFound):
        await world.builds.start("absent", 1)
    for version in range(1, WAITING_MAX + 2):
        await world.builds.start("m", version)
    with pytest.raises(Overloaded) as caught:
        await world.builds.start("m", 1000)
    assert caught.value.reason == "QUEUE_FULL"


async def test_cancelling_reaches_the_build_under_way(world: World) -> None:
    build = await world.builds.start("m", 1)
    await world.shop.begins(1)
    await world.builds.cancel(build.id)
    ended = await world.builds.wait(build.id, 5)
    assert (ended.code, ended.cancel_requested) == ("CANCELLED", True)
    await world.builds.cancel(build.id)
    assert world.builds.get(build.id) == ended, "a build that has ended stays as it is"


async def test_a_build_that_waits_is_cancelled_at_once_and_never_begins(world: World) -> None:
    await world.builds.start("m", 1)
    await world.shop.begins(1)
    waiting, third = await world.builds.start("m", 2), await world.builds.start("m", 3)
    await world.builds.cancel(waiting.id)
    assert world.builds.get(waiting.id).code == "CANCELLED"
    world.shop.ends[1].set_result(RESULT)
    await world.shop.begins(3)
    assert waiting.id not in world.shop.begun
    assert third.id in world.shop.begun


async def test_cancelling_twice_at_once_is_as_cancelling_once(world: World) -> None:
    await world.builds.start("m", 1)
    await world.shop.begins(1)
    waiting = await world.builds.start("m", 2)
    await asyncio.gather(*(world.builds.cancel(waiting.id) for _ in range(3)))
    assert world.builds.get(waiting.id).code == "CANCELLED"


async def test_it_is_written_down_before_anybody_is_told(world: World) -> None:
    build = await world.builds.start("m", 1)
    assert world.log.kept[build.id].phase == "Waiting"
    await world.shop.begins(1)
    world.shop.ends[1].set_result(RESULT)
    ended = await world.builds.wait(build.id, 5)
    assert world.log.kept[build.id].result == ended.result


async def test_one_that_is_being_cancelled_is_not_joined(world: World) -> None:
    build = await world.builds.start("m", 1)
    await world.shop.begins(1)
    world.builds._change(build.id, cancel_requested=True)
    assert (await world.builds.start("m", 1)).id != build.id


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (EngineError("no such operator"), "FAILED_PRECONDITION", "no such operator"),
        (NotFound("it was unloaded"), "FAILED_PRECONDITION", "it was unloaded"),
        (ZeroDivisionError("secret"), "INTERNAL", "ZeroDivisionError; the log says more"),
    ],
)
async def test_a_build_that_fails_says_why_and_the_next_goes_on(
    error: Exception, code: str, text: str, world: World
) -> None:
    build = await world.builds.start("m", 1)
    await world.shop.begins(1)
    world.shop.fail(1, error)
    ended = await world.builds.wait(build.id, 5)
    assert (ended.code, ended.message) == (code, text)
    await world.builds.start("m", 2)
    await world.shop.begins(2)


async def test_waiting_ends_with_the_time(world: World) -> None:
    build = await world.builds.start("m", 1)
    assert not (await world.builds.wait(build.id, 0)).done


async def test_what_is_under_way_is_not_forgotten_and_what_ended_is(world: World) -> None:
    build = await world.builds.start("m", 1)
    await world.shop.begins(1)
    with pytest.raises(WrongState) as caught:
        await world.builds.delete(build.id)
    assert caught.value.reason == "BUILD_UNDER_WAY"
    world.shop.ends[1].set_result(RESULT)
    await world.builds.wait(build.id, 5)
    await world.builds.delete(build.id)
    for call in (world.builds.cancel, world.builds.delete):
        with pytest.raises(NotFound) as missing:
            await call(build.id)
        assert missing.value.reason == "BUILD_NOT_FOUND"
    assert world.log.kept == {}


async def test_pages_are_newest_first_and_stay_when_builds_begin() -> None:
    world = World()
    for version in range(1, 8):
        await world.builds.start("m", version)
    first = world.builds.list(lambda build: build.version != 6, size=3)
    assert [build.version for build in first.builds] == [7, 5, 4]
    await world.builds.start("m", 8)
    second = world.builds.list(lambda build: build.version != 6, size=3, token=first.next_token)
    assert [build.version for build in second.builds] == [3, 2, 1]
    assert second.next_token == ""


async def test_after_a_restart_what_ended_is_known_and_what_was_cut_says_so() -> None:
    log = Memory()
    async with running(log) as before:
        done = await before.builds.start("m", 1)
        await before.shop.begins(1)
        before.shop.ends[1].set_result(RESULT)
        await before.builds.wait(done.id, 5)
        cut = await before.builds.start("m", 2, request_id="r")
        await before.shop.begins(2)
    async with running(log) as after:
        assert after.builds.get(done.id).result == RESULT
        found = after.builds.get(cut.id)
        assert (found.code, found.message) == ("ABORTED", "the process ended while it was under way")
        assert log.kept[cut.id] == found
        assert [build.id for build in after.builds.list(lambda _: True, size=9).builds] == [cut.id, done.id]


async def test_only_so_many_that_ended_are_kept() -> None:
    old = {f"{number:x}": Build(id=f"{number:x}", model="m", version=1, engine="e", created_s=number, result=RESULT)
           for number in range(1, 6)}  # fmt: skip
    log = Memory(old)
    async with running(log, kept_max=3) as world:
        assert set(log.kept) == {"3", "4", "5"}
        assert KEPT_MAX >= 3
        with pytest.raises(NotFound):
            world.builds.get("1")


async def test_builds_on_disk_come_back_and_what_is_broken_does_not(tmp_path: Path) -> None:
    disk = BoundedExecutor("disk", workers_max=1)
    log = DiskLog(tmp_path / "builds", disk)
    assert await log.load() == []
    first = Build(id="a1", model="m", version=1, engine="tensorrt", created_s=1.5, result=RESULT)
    second = replace(first, id="b2", result=None, code="ABORTED", message="cut")
    for build in (first, second, replace(first, id="c3")):
        await log.save(build)
    await log.forget("c3")
    (tmp_path / "builds" / "d4.json").write_text('{"id": "d4"}')
    (tmp_path / "builds" / "e5.json").write_text("not json")
    assert await log.load() == [first, second]
    for name in ("../x", "", "A", "a" * 65):
        with pytest.raises(ValueError, match="not the id"):
            await log.save(replace(first, id=name))
    disk.shutdown()


def test_an_operation_tells_all_of_a_build() -> None:
    build = Build(
        id="a1",
        model="m",
        version=3,
        engine="tensorrt",
        phase="Optimising",
        steps_done=2,
        steps_total=7,
        created_s=1.5,
        updated_s=2.5,
    )
    under_way = operation(build)
    metadata = pb.EngineBuildMetadata()
    assert under_way.metadata.Unpack(metadata)
    assert (under_way.name, under_way.done) == ("operations/a1", False)
    assert (metadata.name, metadata.phase, metadata.steps_done) == ("models/m/versions/3", "Optimising", 2)
    assert metadata.create_time.ToNanoseconds() == 1_500_000_000
    done, response = operation(replace(build, result=RESULT)), pb.EngineBuild()
    assert done.response.Unpack(response)
    assert (done.done, list(response.precisions), response.serving) == (True, ["fp16"], True)
    assert response.build_duration.ToMilliseconds() == 2500
    failed, info = operation(replace(build, code="CANCELLED", message="as asked")), error_details_pb2.ErrorInfo()
    assert (failed.error.code, failed.error.message) == (code_pb2.CANCELLED, "as asked")
    assert failed.error.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("BUILD_FAILED", "mlmesh")


def test_filters() -> None:
    build = Build(id="a", model="m", version=3, engine="tensorrt")
    for text in (
        "",
        "done=false",
        'done = false AND metadata.engine = "tensorrt"',
        'metadata.name="models/m/versions/3"',
    ):
        assert parse_filter(text)(build), text
    for text in ("done = true", "metadata.engine = openvino", "done = false AND metadata.name = x"):
        assert not parse_filter(text)(build), text
    for text in ("done", "done = yes", "name = x", "done = true OR done = false", "done : true"):
        with pytest.raises(InvalidInput) as caught:
            parse_filter(text)
        assert caught.value.violations[0].field == "filter"


@pytest.mark.parametrize("name", ["", "a", "operations/", "operations/../a", "operations/A", "operations/a/b"])
def test_names_of_no_operation_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="expected operations/ID"):
        build_id(name)
