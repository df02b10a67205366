"""What is kept of jobs that ended, and for how long.

Files go first: those of a job that succeeded at once, those of one that failed or was cancelled when nobody retried it
in time. Later the job itself goes, with its events. Whatever goes is noted before it goes, so a crash leaves nothing
behind that is not taken up again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from mlmesh_runtime.errors import MeshError
from mlmesh_training import moves
from mlmesh_training.expiry import SqlExpiry
from mlmesh_training.jobs import Job, JobState
from mlmesh_training.queue import JobQueue

logger = logging.getLogger(__name__)

EVENTS_A_STEP = 1000
JOBS_A_STEP = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionLimits:
    """What is kept; see the environment variables of the same names."""

    kept_s: float = 86_400.0
    finished_kept_s: float = 2_592_000.0
    finished_max: int = 100_000
    look_s: float = 60.0
    """Seconds between two looks at what is to go; a deletion is taken up at once."""


class Retention:
    """Removes what need not be kept, for as long as it is awaited. One a ledger.

    Args:
        discard: removes the files of a job, by uid; idempotent.
        clock: the present time, timezone-aware UTC.
        needed: whether somebody else still needs the files of an ended job, by uid.
    """

    def __init__(
        self,
        queue: JobQueue,
        *,
        discard: Callable[[str], Awaitable[None]],
        clock: Callable[[], datetime],
        needed: Callable[[str], Awaitable[bool]] | None = None,
        limits: RetentionLimits = RetentionLimits(),
    ) -> None:
        self._queue = queue
        self._discard = discard
        self._clock = clock
        self._needed = needed
        self._limits = limits

    async def run(self) -> None:
        """Look again and again. Never returns."""
        while True:
            self._queue.deleted.clear()
            try:
                await self.look()
            except Exception as error:
                # The ledger or the disk failed: what is to go now goes later. No job suffers from it.
                logger.exception("cannot remove what has expired", exc_info=error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._limits.look_s):
                    await self._queue.deleted.wait()

    async def look(self) -> None:
        """Remove all that is to go now. Errors: MeshError, OSError; the rest is removed by a later look."""
        now = self._clock()
        await self._bury()
        for uid in await self._queue.idle(ended_before=now - timedelta(seconds=self._limits.kept_s)):
            if not await self._is_needed(uid):
                await self.drop_files(uid)
        while uids := await self._queue.expired(
            ended_before=now - timedelta(seconds=self._limits.finished_kept_s),
            finished_max=self._limits.finished_max,
            limit=JOBS_A_STEP,
        ):
            gone = 0
            for uid in uids:
                if not await self._is_needed(uid):
                    # Somebody may have deleted or retried it since.
                    with contextlib.suppress(MeshError):
                        await self._queue.delete(uid)
                        gone += 1
            await self._bury()
            if not gone:
                return

    async def ended(self, job: Job) -> None:
        """A job has ended: what it leaves behind goes now, unless it may go on or somebody needs it."""
        unused = job.state is JobState.SUCCEEDED or not self._limits.kept_s
        if job.files and unused and not await self._is_needed(job.uid):
            await self.drop_files(job.uid)

    async def drop_files(self, uid: str) -> None:
        """Remove the files of an ended job. Nobody starts it again meanwhile."""
        with self._queue.held(uid):
            job = await self._queue.change(uid, lambda job, _now: moves.files_dropped(job))
            if job.final:
                await self._discard(uid)

    async def _bury(self) -> None:
        """Remove what is left of deleted jobs, a bounded number of events at a time."""
        while (found := await self._queue.expiry(lambda expiry: expiry.doomed())) is not None:
            number, uid = found
            while await self._queue.expiry(
                functools.partial(SqlExpiry.drop_events, number=number, limit=EVENTS_A_STEP)
            ):
                pass
            await self._discard(uid)
            await self._queue.expiry(functools.partial(SqlExpiry.forget, number=number))

    async def _is_needed(self, uid: str) -> bool:
        return self._needed is not None and await self._needed(uid)


async def sweep(queue: JobQueue, *, present: list[str], discard: Callable[[str], Awaitable[Any]]) -> None:
    """At the start: remove files of jobs that need none, which a crash left between a note and its deed."""
    kept = await queue.expiry(lambda expiry: expiry.kept())
    for uid in present:
        if uid not in kept:
            await discard(uid)
