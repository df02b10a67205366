"""A registry that collects its garbage and is killed at the Nth step: `python purge.py FOLDER N`.

Steps are each write transaction of the collection and each removal of bytes, right before and right after. Exit code 3
says that there was no such step: the collection came to its end.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from mlmesh_registry.config import RegistrySettings
from mlmesh_registry.registry import Registry, open_registry

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
LATER = BEGIN + timedelta(days=60)
SETTINGS = RegistrySettings()
FINISHED = 3


async def collect(registry: Registry) -> None:
    """Purge, and then remove what became unused by it: two rounds, a grace period apart."""
    await registry.garbage.collect(grace=None, dry_run=False)


async def killed(folder: Path, step: int) -> None:
    left = step

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def around(*arguments: Any, **keywords: Any) -> Any:
            count()
            result = await call(*arguments, **keywords)
            count()
            return result

        return around

    for now in (LATER, LATER + timedelta(days=8)):
        async with open_registry(folder, SETTINGS, clock=lambda now=now: now) as registry:  # type: ignore[misc]
            garbage = registry.garbage
            garbage._database.write = counted(garbage._database.write)  # type: ignore[assignment, method-assign]
            garbage._remove = counted(garbage._remove)
            await collect(registry)
    sys.exit(FINISHED)


if __name__ == "__main__":
    asyncio.run(killed(Path(sys.argv[1]), int(sys.argv[2])))
