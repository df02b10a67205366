"""Calls in the background while something changes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc

from tests.support.envoy_mesh import Answer, EnvoyMesh


class Outcomes:
    """Codes of calls that several callers make in the background without pause."""

    def __init__(self, callers: int) -> None:
        self._codes: list[tuple[float, grpc.StatusCode]] = []
        self._ended = [0] * callers
        self._more = asyncio.Event()

    def add(self, caller: int, began: float, code: grpc.StatusCode) -> None:
        self._codes.append((began, code))
        self._ended[caller] += 1
        self._more.set()

    def codes(self, *, since: float = 0.0) -> set[grpc.StatusCode]:
        """Codes of calls that began since a time of `time.perf_counter`."""
        return {code for began, code in self._codes if began >= since}

    async def more(self, count: int) -> None:
        """Wait for so many more calls."""
        target = len(self._codes) + count
        await self._until(lambda: len(self._codes) >= target)

    async def settled(self) -> None:
        """Wait until every call that is under way now has ended."""
        before = list(self._ended)
        await self._until(lambda: all(now > then for now, then in zip(self._ended, before, strict=True)))

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._more.clear()
            await self._more.wait()


@contextlib.asynccontextmanager
async def under_load(
    mesh: EnvoyMesh,
    *,
    callers: int = 4,
    client: str = "client-0",
    call: Callable[[], Awaitable[Answer]] | None = None,
) -> AsyncIterator[Outcomes]:
    """Calls without pause by several callers while the block runs; ``call`` is how, by default a plain one."""
    outcomes = Outcomes(callers)
    stop = asyncio.Event()

    async def run(caller: int) -> None:
        while not stop.is_set():
            began = time.perf_counter()
            answer = await (call() if call else mesh.call(client))
            outcomes.add(caller, began, answer.code)

    async with asyncio.TaskGroup() as group:
        for caller in range(callers):
            group.create_task(run(caller))
        try:
            yield outcomes
        finally:
            stop.set()
