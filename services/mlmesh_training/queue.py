"""The queue of jobs as the service uses it: the ledger, off the event loop, with a wake-up after every commit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

from mlmesh_runtime.errors import Overloaded, RevisionLost
from mlmesh_runtime.executors import BoundedExecutor, run_blocking
from mlmesh_training import moves, recipes
from mlmesh_training.jobs import Event, Job, JobSpec, JobState
from mlmesh_training.ledger import SqlJobLedger
from mlmesh_training.moves import Decision

WATCH_PAGE_ITEMS = 64
"""Events that a watcher holds at most."""


class Wakeups:
    """Tells waiting coroutines that a topic changed. Lives on one event loop; `announce` may come from any thread.

    A waiter takes a ticket, looks at the state, and waits for a change since the ticket: so none is missed. Topics
    without waiters cost nothing.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[str, set[asyncio.Event]] = {}

    def announce(self, topic: str) -> None:
        """Wake all who wait for a topic."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, topic)

    @contextmanager
    def ticket(self, topic: str) -> Iterator[asyncio.Event]:
        """An event that is set when the topic changes; clear it before looking at the state."""
        event = asyncio.Event()
        waiting = self._waiting.setdefault(topic, set())
        waiting.add(event)
        try:
            yield event
        finally:
            waiting.discard(event)
            if not waiting and self._waiting.get(topic) is waiting:
                del self._waiting[topic]

    def _wake(self, topic: str) -> None:
        for event in self._waiting.get(topic, ()):
            event.set()


class JobQueue:
    """Accepts jobs, tells about them, and lets the runner move them.

    Args:
        ledger: already migrated.
        executor: one thread for the ledger.
        wakeups: told of every commit by the ledger, the job's uid being the topic.
        clock: the present time, timezone-aware UTC.
        new_uid: a fresh unique suffix of a job's name, [0-9a-z]{8,}.
    """

    def __init__(
        self,
        ledger: SqlJobLedger,
        *,
        executor: BoundedExecutor,
        wakeups: Wakeups,
        clock: Callable[[], datetime],
        new_uid: Callable[[], str],
    ) -> None:
        self._ledger = ledger
        self._executor = executor
        self._wakeups = wakeups
        self._clock = clock
        self._new_uid = new_uid
        self._stops: dict[str, asyncio.Event] = {}
        self.arrived = asyncio.Event()

    async def create(self, spec: JobSpec, *, request_id: str = "", creator: str = "", study: str = "") -> Job:
        """Check and store a job; then it is durable.

        Args:
            study: "studies/{study}" that it is a trial of.

        Errors: as `recipes.resolve` and `SqlJobLedger.create`.
        """
        job = Job(
            uid=f"{spec.recipe}-{spec.dataset}-{self._new_uid()}",
            study=study,
            resolved_dataset=spec.dataset,
            spec=spec,
            hyperparameters=recipes.resolve(spec),
            create_time=self._clock(),
            creator=creator,
        )
        stored = await run_blocking(self._executor, self._ledger.create, job, request_id=request_id)
        self.arrived.set()
        return stored

    async def get(self, uid: str) -> Job:
        """Read one job. Errors: NotFound (JOB_NOT_FOUND)."""
        return await run_blocking(self._executor, self._ledger.get, uid)

    async def page(self, *, size: int, before: int | None) -> tuple[Sequence[Job], int | None]:
        """Jobs newest first; and the key of the next page, None at the end."""
        return await run_blocking(self._executor, self._ledger.page, size=size, before=before)

    async def unfinished(self) -> Sequence[Job]:
        """All jobs that have not ended, oldest first."""
        return await run_blocking(self._executor, self._ledger.unfinished)

    async def next_runnable(self, *, excluding: Sequence[str]) -> Job | None:
        """The oldest job that waits to run."""
        return await run_blocking(self._executor, self._ledger.next_runnable, excluding=excluding)

    async def change(self, uid: str, decide: Callable[[Job, datetime], Decision]) -> Job:
        """Move a job by a pure decision, in one transaction."""
        return await run_blocking(self._executor, self._ledger.change, uid, decide)

    async def cancel(self, uid: str) -> Job:
        """Ask a job to stop. Errors: NotFound (JOB_NOT_FOUND), WrongState (JOB_FINISHED)."""
        job = await self.change(uid, moves.cancel_requested)
        if job.state in {JobState.CANCELLING, JobState.CANCELLED} and uid in self._stops:
            self._stops[uid].set()
        return job

    @contextmanager
    def stop_signal(self, uid: str) -> Iterator[asyncio.Event]:
        """An event that is set when somebody asks this job to stop. Take it before the job starts to run."""
        stop = self._stops[uid] = asyncio.Event()
        try:
            yield stop
        finally:
            del self._stops[uid]

    async def watch(self, uid: str, *, from_sequence: int = 0) -> AsyncGenerator[Event]:
        """Events of a job from a sequence on, as they are committed; ends after the one that ended the job.

        A watcher holds at most WATCH_PAGE_ITEMS events, whatever its pace. Errors: NotFound (JOB_NOT_FOUND),
        RevisionLost (SEQUENCE_LOST), Overloaded (WATCHER_TOO_SLOW) when the events it has not read yet were dropped.
        """
        following = False
        with self._wakeups.ticket(uid) as changed:
            while True:
                changed.clear()
                try:
                    page, ended = await run_blocking(
                        self._executor, self._ledger.events, uid, from_sequence=from_sequence, limit=WATCH_PAGE_ITEMS
                    )
                except RevisionLost as error:
                    if not following:
                        raise
                    raise Overloaded(
                        f"jobs/{uid}: event {from_sequence} was dropped before it was read", reason="WATCHER_TOO_SLOW"
                    ) from error
                for event in page:
                    yield event
                    from_sequence = event.sequence + 1
                if ended:
                    return
                following = True
                if len(page) < WATCH_PAGE_ITEMS:
                    await changed.wait()
