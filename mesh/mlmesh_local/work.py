"""Operations that end once begun: a caller that goes away must not leave half a restart behind."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Work:
    """Runs operations in a task group, each to its end or until `cancel`; their callers may be cancelled."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._tasks: set[asyncio.Task[None]] = set()

    async def finish(self, operation: Coroutine[Any, Any, T]) -> T:
        """Run an operation; gives or raises what it does. Cancelling the caller does not cancel the operation."""
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        task = self._group.create_task(_into(outcome, operation))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

        def ended(_: asyncio.Task[None]) -> None:
            # Cancelled before it began, it could do neither itself.
            operation.close()
            outcome.cancel()

        task.add_done_callback(ended)
        return await asyncio.shield(outcome)

    def cancel(self) -> None:
        """End what still runs."""
        for task in self._tasks:
            task.cancel()


async def _into(outcome: asyncio.Future[T], operation: Coroutine[Any, Any, T]) -> None:
    try:
        result = await operation
    except Exception as error:
        # The group must not end for it: it belongs to whoever asked.
        outcome.set_exception(error)
        # Who asked may be gone; then nobody hears of it.
        outcome.exception()
    else:
        if not outcome.done():
            outcome.set_result(result)
