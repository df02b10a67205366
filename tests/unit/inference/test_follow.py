"""Following the registry: the first word, resuming, lost revisions, a registry that went back or fell silent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable

import pytest

from mlmesh_inference.events import Bookmark, Event, Published
from mlmesh_inference.follow import Backoff, Follower
from tests.support.registry_source import MemoryRegistry


class Following:
    """A follower that runs, and whose waits between attempts are written down instead of slept."""

    def __init__(self, source: MemoryRegistry, **arguments: float) -> None:
        self.changed = asyncio.Event()
        self.waits: list[float] = []
        self.follower = Follower(
            source, self.changed, backoff=Backoff(random=lambda: 1.0), sleep=self._sleep, **arguments
        )

    async def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        await asyncio.sleep(0)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    def versions(self) -> list[int]:
        return [] if self.follower.view is None else sorted(number for _, number in self.follower.view.versions)


@contextlib.asynccontextmanager
async def following(source: MemoryRegistry, **arguments: float) -> AsyncIterator[Following]:
    it = Following(source, **arguments)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(it.follower.run())
        yield it
        task.cancel()


async def test_the_first_word_comes_whole() -> None:
    source = MemoryRegistry()
    await source.publish("m", 1, b"one")
    await source.alias("m", "stable", 1)
    async with following(source) as it:
        await it.until(lambda: it.follower.view is not None)
        assert it.follower.view is not None
        assert it.versions() == [1]
        assert it.follower.view.aliases == {("m", "stable"): 1}
        assert it.follower.view.revision == 2
        assert source.watched_from == [0]


async def test_a_cut_is_resumed_after_the_last_revision() -> None:
    source = MemoryRegistry()
    await source.publish("m", 1, b"one")
    async with following(source) as it:
        await it.until(lambda: it.versions() == [1])
        await source.cut()
        await source.publish("m", 2, b"two")
        await it.until(lambda: it.versions() == [1, 2])
        assert source.watched_from == [0, 2]
        assert it.waits == [0.1]


async def test_a_lost_revision_begins_anew() -> None:
    source = MemoryRegistry()
    await source.publish("m", 1, b"one")
    async with following(source) as it:
        await it.until(lambda: it.versions() == [1])
        source.kept_from = 100
        await source.cut()
        await source.publish("m", 2, b"two")
        await it.until(lambda: it.versions() == [1, 2])
        assert source.watched_from == [0, 2, 0]


async def test_a_registry_that_went_back_is_read_anew() -> None:
    source = MemoryRegistry()
    for number in (1, 2, 3):
        await source.publish("m", number, b"x")
    async with following(source) as it:
        await it.until(lambda: it.versions() == [1, 2, 3])
        del source.events[1:]
        await source.cut()
        await it.until(lambda: it.versions() == [1])
        assert source.watched_from == [0, 4, 0]


async def test_a_registry_that_is_away_is_tried_less_and_less_often() -> None:
    source = MemoryRegistry()
    source.down = True
    async with following(source) as it:
        await it.until(lambda: len(it.waits) >= 12)
        assert it.waits[:4] == [0.1, 0.2, 0.4, 0.8]
        assert max(it.waits) == 5.0
        assert it.follower.view is None
        assert it.follower.problem == "connection refused"
        source.down = False
        await source.publish("m", 1, b"one")
        await it.until(lambda: it.versions() == [1])
        assert it.follower.problem == ""


async def test_a_silent_registry_is_left() -> None:
    class Mute(MemoryRegistry):
        async def watch(self, from_revision: int) -> AsyncGenerator[Event]:
            self.watched_from.append(from_revision)
            if len(self.watched_from) == 1:
                await asyncio.Event().wait()
            yield Bookmark(revision=1)
            await asyncio.Event().wait()

    source = Mute()
    async with following(source, silence_s=0.01) as it:
        await it.until(lambda: it.follower.view is not None)
        assert len(source.watched_from) >= 2


async def test_a_version_that_cannot_be_served_is_passed_over() -> None:
    source = MemoryRegistry()
    source.events.append(Published(revision=1, record=None, problem="models/m/versions/1: no"))
    await source.publish("m", 2, b"two")
    async with following(source) as it:
        await it.until(lambda: it.versions() == [2])


@pytest.mark.parametrize(("chance", "expected"), [(0.0, 0.05), (1.0, 0.1)])
def test_waits_are_shortened_by_chance(chance: float, expected: float) -> None:
    assert Backoff(random=lambda: chance).next_s() == pytest.approx(expected)
