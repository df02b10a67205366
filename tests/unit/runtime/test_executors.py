"""Bounded threads."""

import asyncio
import contextvars
import threading

import pytest

from mlmesh_runtime.errors import Overloaded
from mlmesh_runtime.executors import BoundedExecutor, Executors, run_blocking


async def test_work_runs_on_a_named_thread_in_the_callers_context() -> None:
    variable = contextvars.ContextVar("variable", default="")
    variable.set("here")
    async with Executors({"disk": 1}) as pools:
        name, value = await run_blocking(pools["disk"], lambda: (threading.current_thread().name, variable.get()))
    assert name.startswith("disk")
    assert value == "here"


async def test_errors_pass() -> None:
    async with Executors({"disk": 1}) as pools:
        with pytest.raises(ZeroDivisionError):
            await run_blocking(pools["disk"], lambda: 1 // 0)


async def test_a_full_pool_refuses_and_recovers() -> None:
    executor = BoundedExecutor("tight", workers_max=1, queue_items_max=1)
    release = threading.Event()
    try:
        held = [asyncio.ensure_future(executor.run(release.wait, 10)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            await executor.run(release.wait, 10)
        assert caught.value.reason == "EXECUTOR_FULL"
        release.set()
        assert await asyncio.gather(*held) == [True, True]
        assert await executor.run(int, "3") == 3
    finally:
        release.set()
        executor.shutdown()


async def test_a_cancelled_caller_leaves_begun_work_its_place() -> None:
    executor = BoundedExecutor("tight", workers_max=1, queue_items_max=0)
    begun, release = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        release.wait(10)

    try:
        task = asyncio.ensure_future(executor.run(work))
        await asyncio.to_thread(begun.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(Overloaded):
            await executor.run(work)
    finally:
        release.set()
        executor.shutdown()
