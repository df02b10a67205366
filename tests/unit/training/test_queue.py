"""Watchers get every event once, in order, as it is committed, and hold little."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from mlmesh_runtime.errors import InvalidInput, NotFound, Overloaded, RevisionLost, WrongState
from mlmesh_runtime.executors import Executors
from mlmesh_training import moves
from mlmesh_training.jobs import JobState, LogLine
from mlmesh_training.ledger import LedgerLimits, SqlJobLedger
from mlmesh_training.queue import WATCH_PAGE_ITEMS, JobQueue, Wakeups
from tests.support.training import ManualClock, spec


@pytest.fixture
async def queue(tmp_path: Path) -> AsyncIterator[JobQueue]:
    numbers = itertools.count()
    wakeups = Wakeups()
    ledger = SqlJobLedger(
        f"sqlite:///{tmp_path / 'l.sqlite'}",
        clock=ManualClock(),
        on_commit=lambda uid, _: wakeups.announce(uid),
        limits=LedgerLimits(events_per_job_max=200),
    )
    ledger.migrate()
    async with Executors({"ledger": 1}) as executors:
        yield JobQueue(
            ledger,
            executor=executors["ledger"],
            wakeups=wakeups,
            clock=ManualClock(),
            new_uid=lambda: f"{next(numbers):08d}",
        )
    ledger.close()


async def say(queue: JobQueue, uid: str, count: int) -> None:
    lines = [LogLine(severity="info", message=str(number)) for number in range(count)]
    await queue.change(uid, lambda job, now: moves.logged(job, *lines))


async def sequences(queue: JobQueue, uid: str, start: int = 0) -> list[int]:
    return [event.sequence async for event in queue.watch(uid, from_sequence=start)]


async def test_a_watcher_follows_to_the_end(queue: JobQueue) -> None:
    job = await queue.create(spec())
    async with asyncio.TaskGroup() as group:
        watchers = [group.create_task(sequences(queue, job.uid, start)) for start in (0, 1, 2)]
        await queue.change(job.uid, moves.started)
        for _ in range(10):
            await say(queue, job.uid, 7)
        await queue.change(job.uid, moves.succeeded)
    everything = list(range(1, 74))
    assert [watcher.result() for watcher in watchers] == [everything, everything, everything[1:]]


async def test_a_cut_watch_goes_on_where_it_was(queue: JobQueue) -> None:
    job = await queue.create(spec())
    await say(queue, job.uid, 150)
    await queue.cancel(job.uid)
    seen: list[int] = []
    while len(seen) < 152:
        async with aclosing(queue.watch(job.uid, from_sequence=seen[-1] + 1 if seen else 0)) as events:
            async for event in events:
                seen.append(event.sequence)
                if len(seen) % 20 == 0:
                    break
    assert seen == list(range(1, 153))
    assert await sequences(queue, job.uid, 153) == []


async def test_a_commit_between_look_and_wait_is_not_missed(queue: JobQueue) -> None:
    job = await queue.create(spec())
    async with aclosing(queue.watch(job.uid)) as events:
        assert (await anext(events)).sequence == 1
        # The watcher is suspended here, before it looks again: the commit's announcement comes first.
        await say(queue, job.uid, 1)
        async with asyncio.timeout(5):
            assert (await anext(events)).sequence == 2


async def test_a_watcher_that_is_overtaken_by_the_bound_is_told(queue: JobQueue) -> None:
    job = await queue.create(spec())
    await say(queue, job.uid, WATCH_PAGE_ITEMS * 2)
    async with aclosing(queue.watch(job.uid)) as events:
        assert (await anext(events)).sequence == 1
        for _ in range(10):
            await say(queue, job.uid, 100)
        with pytest.raises(Overloaded) as raised:
            async for _ in events:
                pass
    assert raised.value.reason == "WATCHER_TOO_SLOW"
    with pytest.raises(RevisionLost):
        await sequences(queue, job.uid, 1)


async def test_nobody_waits_for_a_job_that_is_not_there(queue: JobQueue) -> None:
    with pytest.raises(NotFound):
        await sequences(queue, "x")
    assert queue._wakeups._waiting == {}


async def test_a_watcher_that_goes_leaves_nothing_behind(queue: JobQueue) -> None:
    job = await queue.create(spec())
    seen = asyncio.Event()

    async def watch() -> None:
        async for _ in queue.watch(job.uid):
            seen.set()

    watching = asyncio.ensure_future(watch())
    await seen.wait()
    assert set(queue._wakeups._waiting) == {job.uid}
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    assert queue._wakeups._waiting == {}


async def test_a_bad_spec_is_not_stored(queue: JobQueue) -> None:
    with pytest.raises(InvalidInput):
        await queue.create(spec(recipe="nope"))
    assert (await queue.page(size=10, before=None))[0] == []


async def test_cancelling_reaches_who_runs_the_job(queue: JobQueue) -> None:
    job = await queue.create(spec())
    with queue.signals(job.uid) as signals:
        await queue.change(job.uid, moves.started)
        assert (await queue.cancel(job.uid)).state is JobState.CANCELLING
        assert signals.stop.is_set()
        assert not signals.pause.is_set()
        await queue.cancel(job.uid)
    await queue.change(job.uid, moves.cancelled)
    assert (await queue.cancel(job.uid)).state is JobState.CANCELLED


async def test_cancelling_what_ended_says_so(queue: JobQueue) -> None:
    job = await queue.create(spec())
    await queue.change(job.uid, moves.started)
    await queue.change(job.uid, moves.succeeded)
    with pytest.raises(WrongState) as raised:
        await queue.cancel(job.uid)
    assert raised.value.reason == "JOB_FINISHED"
