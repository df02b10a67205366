"""Named, bounded thread pools for blocking work: the event loop never waits for a disk or a CPU."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, TypeVar

from mlmesh_runtime.errors import Overloaded

P = ParamSpec("P")
T = TypeVar("T")


class BoundedExecutor:
    """A thread pool that refuses instead of queueing without end.

    Args:
        name: shows in thread names and in the refusal.
        workers_max: threads.
        queue_items_max: calls that may wait for a thread; one more raises Overloaded (EXECUTOR_FULL).
    """

    def __init__(self, name: str, *, workers_max: int, queue_items_max: int = 1000) -> None:
        self.name = name
        self._room = workers_max + queue_items_max
        self._held = 0
        self._pool = ThreadPoolExecutor(workers_max, thread_name_prefix=name)

    async def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `fn` on a thread, in a copy of the caller's context (trace ids follow).

        A cancelled caller stops waiting; work that a thread has begun goes on to its end, and keeps its place.
        """
        if self._held >= self._room:
            raise Overloaded(
                f"too much is waiting for the {self.name!r} threads",
                reason="EXECUTOR_FULL",
                metadata={"pool": self.name},
            )
        loop = asyncio.get_running_loop()
        context = contextvars.copy_context()
        future = self._pool.submit(lambda: context.run(fn, *args, **kwargs))
        self._held += 1
        # A submitted call gives its place back when it ends, not when its caller stops waiting.
        future.add_done_callback(lambda _: _call_soon(loop, self._release))
        return await asyncio.wrap_future(future)

    def _release(self) -> None:
        self._held -= 1

    def shutdown(self) -> None:
        """Finish what was begun, drop what waits."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _call_soon(loop: asyncio.AbstractEventLoop, fn: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(fn)


async def run_blocking(executor: BoundedExecutor, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking function on a named executor. Raises what it raises, or Overloaded when the pool is full."""
    return await executor.run(fn, *args, **kwargs)


class Executors:
    """The pools of a process, by name; an async context manager that waits for them at its end.

    >>> async with Executors({"disk": 4, "cpu": 2}) as pools:      # doctest: +SKIP
    ...     await run_blocking(pools["disk"], path.read_bytes)
    """

    def __init__(self, workers: Mapping[str, int], *, queue_items_max: int = 1000) -> None:
        self._pools = {
            name: BoundedExecutor(name, workers_max=count, queue_items_max=queue_items_max)
            for name, count in workers.items()
        }

    def __getitem__(self, name: str) -> BoundedExecutor:
        return self._pools[name]

    async def __aenter__(self) -> Executors:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        for pool in self._pools.values():
            await asyncio.to_thread(pool.shutdown)
