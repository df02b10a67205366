from __future__ import annotations

import asyncio

import pytest

from mlmesh_local.work import Work


async def test_a_caller_that_goes_away_does_not_stop_the_operation() -> None:
    begun, go, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def operation() -> None:
        begun.set()
        await go.wait()
        done.set()

    async with asyncio.TaskGroup() as group:
        work = Work(group)
        caller = asyncio.ensure_future(work.finish(operation()))
        await begun.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        go.set()
        await done.wait()


async def test_results_and_errors_belong_to_the_caller_and_not_to_the_group() -> None:
    async def good() -> int:
        return 7

    async def bad() -> None:
        raise ValueError("no")

    async with asyncio.TaskGroup() as group:
        work = Work(group)
        assert await work.finish(good()) == 7
        with pytest.raises(ValueError, match="no"):
            await work.finish(bad())


async def test_what_still_runs_can_be_ended() -> None:
    async with asyncio.TaskGroup() as group:
        work = Work(group)
        caller = asyncio.ensure_future(work.finish(asyncio.Event().wait()))
        await asyncio.sleep(0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
