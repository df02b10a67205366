"""Waiting for events, for a while, and between tries."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

from mlmesh_runtime.errors import (
    AlreadyExists,
    Corrupt,
    Denied,
    InvalidInput,
    MeshError,
    NotFound,
    Unauthenticated,
    Unsupported,
    WrongState,
)

RETRY_S_MAX = 30.0
# What a registry answers that no waiting changes.
_HOPELESS = (AlreadyExists, Denied, InvalidInput, Unauthenticated, Unsupported, WrongState)


def hopeless(error: MeshError, *, reading: bool = False) -> bool:
    """Whether the registry would answer the same again. `reading`: what is not there or broken then stays so."""
    if error.reason == "BLOB_NOT_FOUND" and not reading:
        return False
    return isinstance(error, (*_HOPELESS, *((Corrupt, NotFound) if reading else ())))


def backoff_s(first_s: float, failures: int) -> float:
    """Seconds to wait after so many failures before this one."""
    return float(min(RETRY_S_MAX, first_s * 2 ** min(failures, 16)))


def being_cancelled() -> bool:
    """Whether the present task is to end. A task group in it that fails at that very moment tells of its failure only:
    who goes on after any failure must ask."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def first_of(*events: asyncio.Event, timeout_s: float | None = None) -> None:
    """Wait until one of the events is set, or for so long."""
    if any(event.is_set() for event in events):
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as group:
            waiters = [group.create_task(event.wait()) for event in events]
            await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
            for waiter in waiters:
                waiter.cancel()


async def unless(work: Coroutine[Any, Any, None], *events: asyncio.Event) -> None:
    """Do work; when one of the events is set first, cancel it and raise WrongState (JOB_STOPPED)."""
    async with asyncio.TaskGroup() as group:
        working = group.create_task(_caught(work))
        waiting = group.create_task(first_of(*events))
        await asyncio.wait([working, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        stopped = working.cancel()
    if stopped:
        raise WrongState("the job was asked to stop", reason="JOB_STOPPED")
    if (error := working.result()) is not None:
        raise error


async def _caught(work: Coroutine[Any, Any, None]) -> Exception | None:
    """The error of some work as its result, so that it leaves a task group as it is."""
    try:
        await work
    except (MeshError, OSError) as error:
        return error
    return None
