"""Tells many waiters that something changed; how often does not matter, only that it did."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Changes:
    """A counter to wait on. Nothing is queued, so nobody can fall behind."""

    def __init__(self) -> None:
        self.count = 0
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Something changed."""
        self.count += 1
        self._event.set()
        self._event = asyncio.Event()

    async def beyond(self, count: int) -> int:
        """Wait until the count is more than ``count``; gives it."""
        while self.count <= count:
            await self._event.wait()
        return self.count

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds."""
        while not condition():
            await self._event.wait()
