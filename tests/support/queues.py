"""A queue of jobs on a real ledger, and a runner on it as a service process would have one."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from mlmesh_runtime.errors import MeshError
from mlmesh_runtime.executors import Executors
from mlmesh_training.jobs import Event, Job, JobChanged, JobState
from mlmesh_training.ledger import SqlJobLedger
from mlmesh_training.ports import Fetcher
from mlmesh_training.queue import JobQueue, Wakeups
from mlmesh_training.retention import Retention, RetentionLimits
from mlmesh_training.runner import Runner, RunnerLimits
from tests.support.training import ManualClock, ScriptedBackend


class RecordingPublisher:
    """A registry that notes what it is asked, and fails first as told."""

    def __init__(self, *failures: tuple[str, MeshError]) -> None:
        self.calls: list[str] = []
        self._failures = list(failures)
        self.gate: dict[str, asyncio.Event] = {}
        self.reached = asyncio.Event()

    async def _step(self, name: str) -> None:
        self.calls.append(name)
        if self._failures and self._failures[0][0] == name:
            raise self._failures.pop(0)[1]
        if name in self.gate:
            self.reached.set()
            await self.gate[name].wait()

    async def upload(self, job: Job) -> None:
        assert job.trained is not None
        await self._step("upload")

    async def register(self, job: Job) -> str:
        assert job.registering
        await self._step("register")
        return "models/digits/versions/1"

    async def point(self, job: Job) -> None:
        assert job.model_version == "models/digits/versions/1"
        await self._step("point")


class Bench:
    """A queue on a real ledger; `run` starts a runner on it for a block, as a service process would."""

    def __init__(self, queue: JobQueue, clock: ManualClock) -> None:
        self.queue = queue
        self.clock = clock

    @contextlib.asynccontextmanager
    async def run(
        self,
        backend: ScriptedBackend,
        publisher: RecordingPublisher | None = None,
        fetcher: Fetcher | None = None,
        kept: RetentionLimits | None = None,
        **limits: float,
    ) -> AsyncIterator[Retention]:
        """Run jobs for the length of a block; the retention is there, but looks only when it is told to."""
        retention = Retention(self.queue, discard=backend.discard, clock=self.clock, limits=kept or RetentionLimits())
        runner = Runner(
            self.queue,
            backend=backend,
            publisher=publisher or RecordingPublisher(),
            fetcher=fetcher,
            retention=retention,
            limits=RunnerLimits(**{"retry_s": 0.0, **limits}),
        )
        async with asyncio.TaskGroup() as group:
            running = group.create_task(runner.run())
            yield retention
            running.cancel()

    async def end(self, job: Job) -> list[Event]:
        """Every event up to the end."""
        async with asyncio.timeout(10):
            return [event async for event in self.queue.watch(job.uid)]

    async def reaches(self, job: Job, state: JobState) -> Job:
        """The job as it was when it first reached a state since its latest event."""
        async with asyncio.timeout(10), contextlib.aclosing(self.queue.watch(job.uid)) as events:
            async for event in events:
                if isinstance(event.body, JobChanged) and event.body.job and event.body.job.state is state:
                    return event.body.job
        raise AssertionError(f"{job.name} never was {state}")


@functools.cache
def migrated() -> bytes:
    """A ledger's file, as its migrations leave it. They take longer than most tests."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "l.sqlite"
        ledger = SqlJobLedger(f"sqlite:///{path}", clock=ManualClock())
        ledger.migrate()
        ledger.close()
        return path.read_bytes()


@contextlib.asynccontextmanager
async def bench_in(folder: Path) -> AsyncIterator[Bench]:
    """A bench whose ledger is in a folder."""
    numbers = itertools.count()
    wakeups = Wakeups()
    clock = ManualClock()
    (folder / "l.sqlite").write_bytes(migrated())
    ledger = SqlJobLedger(
        f"sqlite:///{folder / 'l.sqlite'}", clock=clock, on_commit=lambda uid, _: wakeups.announce(uid)
    )
    async with Executors({"ledger": 1}) as executors:
        yield Bench(
            JobQueue(
                ledger,
                executor=executors["ledger"],
                wakeups=wakeups,
                clock=clock,
                new_uid=lambda: f"{next(numbers):08d}",
            ),
            clock,
        )
    ledger.close()


def states(events: list[Event]) -> list[str]:
    """State and phase of each change."""
    return [
        f"{event.body.job.state}{':' if event.body.job.phase else ''}{event.body.job.phase}"
        for event in events
        if isinstance(event.body, JobChanged) and event.body.job
    ]


def last(events: list[Event]) -> Job:
    """The job as of the last event."""
    body = events[-1].body
    assert isinstance(body, JobChanged)
    assert body.job is not None
    return body.job
