"""The queue of jobs as the service uses it: the ledger, off the event loop, with a wake-up after every commit."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from mlmesh_runtime.errors import Overloaded, RevisionLost
from mlmesh_runtime.executors import BoundedExecutor, run_blocking
from mlmesh_training import moves, recipes, schedule
from mlmesh_training.expiry import SqlExpiry
from mlmesh_training.jobs import Event, Job, JobSpec, JobState
from mlmesh_training.ledger import SqlJobLedger
from mlmesh_training.moves import Decision
from mlmesh_training.options import Resources
from mlmesh_training.ports import Fetcher, NamedOnly
from mlmesh_training.schedule import Capacity, Choice

_T = TypeVar("_T")
DEFAULT_CAPACITY = Capacity(total=Resources(cpus=1.0, memory_bytes=1 << 40))
"""One job at a time, whatever it asks for in main memory."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What somebody asks of a job while it is worked on."""

    stop: asyncio.Event
    pause: asyncio.Event


class JobQueue:
    """Accepts jobs, tells about them, and lets the runner move them.

    `create`, `get`, `change`, `cancel`, `watch` and `delete` are also for callers inside the process, such as studies:
    they may be called at any moment while the runner works, and a job's events tell what came of it.

    Args:
        ledger: already migrated.
        executor: one thread for the ledger.
        wakeups: told of every commit by the ledger, the job's uid being the topic.
        clock: the present time, timezone-aware UTC.
        new_uid: a fresh unique suffix of a job's name, [0-9a-z]{8,}.
        capacity: what jobs may occupy; what never fits is refused.
        fetcher: tells which versions registered data sets and sources mean.
    """

    def __init__(
        self,
        ledger: SqlJobLedger,
        *,
        executor: BoundedExecutor,
        wakeups: Wakeups,
        clock: Callable[[], datetime],
        new_uid: Callable[[], str],
        capacity: Capacity = DEFAULT_CAPACITY,
        fetcher: Fetcher | None = None,
    ) -> None:
        self._ledger = ledger
        self._executor = executor
        self._wakeups = wakeups
        self._clock = clock
        self._new_uid = new_uid
        self._fetcher = fetcher or NamedOnly()
        self._signals: dict[str, Signals] = {}
        self._held: set[str] = set()
        self.capacity = capacity
        self.arrived = asyncio.Event()
        """Set when a job may have become runnable."""
        self.deleted = asyncio.Event()
        """Set when a job was deleted."""

    async def create(self, spec: JobSpec, *, request_id: str = "", creator: str = "", study: str = "") -> Job:
        """Check and store a job; then it is durable. The same request again gives the same job, as it first was.

        Args:
            study: "studies/{study}" that it is a trial of.

        Errors: InvalidInput (as `recipes.resolve`, RESOURCES_TOO_LARGE), AlreadyExists (REQUEST_ID_REUSED), Overloaded
        (QUEUE_FULL, DISK_FULL), the registry's where an alias is to be resolved.
        """
        hyperparameters = recipes.resolve(spec)
        schedule.check(spec, self.capacity)
        earlier = await run_blocking(
            self._executor, self._ledger.earlier, spec, creator=creator, study=study, request_id=request_id
        )
        if earlier is not None:
            return earlier
        source = spec.optimization.source if spec.optimization else ""
        job = Job(
            uid=new_uid(spec, self._new_uid()),
            spec=spec,
            hyperparameters=hyperparameters,
            create_time=self._clock(),
            creator=creator,
            study=study,
            resolved_dataset=await self._dataset(spec),
            resolved_source=await self._fetcher.resolve_source(source) if source else "",
            resources=schedule.occupied(spec.resources, spec.distribution.processes, self.capacity),
        )
        stored = await run_blocking(self._executor, self._ledger.create, job, request_id=request_id)
        self.arrived.set()
        return stored

    async def _dataset(self, spec: JobSpec) -> str:
        """The version that the data set means now, or the named data set."""
        if not spec.registered_dataset:
            return spec.dataset
        return await self._fetcher.resolve_dataset(spec.dataset, kind=recipes.known()[spec.recipe].dataset_kind)

    async def get(self, uid: str) -> Job:
        """Read one job. Errors: NotFound (JOB_NOT_FOUND)."""
        return await run_blocking(self._executor, self._ledger.get, uid)

    async def page(
        self, *, size: int, before: int | None, states: Collection[JobState] = (), study: str = ""
    ) -> tuple[Sequence[Job], int | None]:
        """Jobs newest first, of some states and of a study where asked; and the next page's key, None at the end."""
        return await run_blocking(
            self._executor, self._ledger.page, size=size, before=before, states=states, study=study
        )

    async def unfinished(self) -> Sequence[Job]:
        """All jobs that have not ended, oldest first."""
        return await run_blocking(self._executor, self._ledger.unfinished)

    async def choose(self, running: Sequence[Resources], *, excluding: Collection[str]) -> Choice | None:
        """The next job to start beside what runs, None when none can."""
        return await run_blocking(
            self._executor,
            self._ledger.choose,
            lambda waiting: schedule.choose(waiting, running, self.capacity),
            excluding=frozenset(excluding) | self._held,
        )

    async def change(self, uid: str, decide: Callable[[Job, datetime], Decision]) -> Job:
        """Move a job by a pure decision, in one transaction."""
        return await run_blocking(self._executor, self._ledger.change, uid, decide)

    async def cancel(self, uid: str) -> Job:
        """Ask a job to stop. Errors: NotFound (JOB_NOT_FOUND), WrongState (JOB_FINISHED)."""
        job = await self.change(uid, moves.cancel_requested)
        if job.state in {JobState.CANCELLING, JobState.CANCELLED} and uid in self._signals:
            self._signals[uid].stop.set()
        return job

    async def pause(self, uid: str) -> Job:
        """Ask a job to pause. Errors: NotFound (JOB_NOT_FOUND), WrongState (JOB_FINISHED)."""
        job = await self.change(uid, moves.pause_requested)
        if job.state in {JobState.PAUSING, JobState.PAUSED} and uid in self._signals:
            self._signals[uid].pause.set()
        return job

    async def resume(self, uid: str) -> Job:
        """Put a paused job back into the queue.

        Errors: NotFound (JOB_NOT_FOUND), WrongState (JOB_FINISHED), Conflict (JOB_NOT_PAUSED).
        """
        job = await self.change(uid, moves.resume_requested)
        self.arrived.set()
        return job

    async def retry(self, uid: str) -> Job:
        """Put a failed or cancelled job back into the queue.

        Errors: NotFound (JOB_NOT_FOUND), WrongState (JOB_NOT_RETRYABLE, JOB_NOT_FINISHED), Overloaded (QUEUE_FULL).
        """
        job = await self.change(uid, moves.retry_requested)
        self.arrived.set()
        return job

    async def delete(self, uid: str) -> None:
        """Forget an ended job. Errors: NotFound (JOB_NOT_FOUND), WrongState (JOB_NOT_FINISHED)."""
        await self.expiry(lambda expiry: expiry.delete(uid))
        self.deleted.set()

    async def idle(self, *, ended_before: datetime) -> Sequence[str]:
        """Ended jobs whose files may go, at most 1000; see `SqlExpiry.idle`."""
        return await self.expiry(lambda expiry: expiry.idle(ended_before=ended_before, limit=1000))

    async def expired(self, *, ended_before: datetime, finished_max: int, limit: int) -> Sequence[str]:
        """Ended jobs that are to go; see `SqlExpiry.expired`."""
        return await self.expiry(
            lambda expiry: expiry.expired(ended_before=ended_before, finished_max=finished_max, limit=limit)
        )

    async def expiry(self, ask: Callable[[SqlExpiry], _T]) -> _T:
        """Ask something of what the ledger says about ended jobs."""
        return await run_blocking(self._executor, ask, self._ledger.expiry)

    @contextmanager
    def signals(self, uid: str) -> Iterator[Signals]:
        """What is asked of this job while the block runs. Take it before the job starts to run."""
        signals = self._signals[uid] = Signals(stop=asyncio.Event(), pause=asyncio.Event())
        try:
            yield signals
        finally:
            del self._signals[uid]

    @contextmanager
    def held(self, uid: str) -> Iterator[None]:
        """This job is not chosen while the block runs."""
        self._held.add(uid)
        try:
            yield
        finally:
            self._held.discard(uid)
            self.arrived.set()

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


def new_uid(spec: JobSpec, suffix: str) -> str:
    """The uid of a job: recipe and data set for people, a suffix that makes it unique; [0-9a-z-]{1,64}."""
    dataset = spec.dataset.split("/")[1] if spec.registered_dataset else spec.dataset
    readable = re.sub(r"[^0-9a-z]+", "-", f"{spec.recipe}-{dataset}".lower()).strip("-")[:40].rstrip("-")
    return f"{readable}-{suffix}"
