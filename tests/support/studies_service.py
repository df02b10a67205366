"""Studies with real ledgers, queue, runner, retention and Optuna; only training and registry are scripted."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from mlmesh_runtime.errors import MeshError, NotReady
from mlmesh_runtime.executors import Executors
from mlmesh_training.backends.base import Finished, Outcome, Report, Stopped, TrainingTask
from mlmesh_training.jobs import Job, Metrics, Progress
from mlmesh_training.ledger import SqlJobLedger
from mlmesh_training.options import Resources
from mlmesh_training.ports import NamedOnly
from mlmesh_training.queue import JobQueue, Wakeups
from mlmesh_training.retention import Retention
from mlmesh_training.runner import Runner, RunnerLimits
from mlmesh_training.schedule import Capacity
from mlmesh_training.studies.book import StudyBook
from mlmesh_training.studies.controller import StudyController
from mlmesh_training.studies.drive import DriveLimits, Means
from mlmesh_training.studies.ledger import SqlStudyLedger, StudyLimits
from mlmesh_training.studies.study import Study, StudyState, Trial
from tests.support.training import model

Value = Callable[[TrainingTask, int], float]


def by_width(task: TrainingTask, epoch: int) -> float:
    """A validation accuracy that grows with the width and with each epoch."""
    return 0.5 + task.hyperparameters["width"] / 100 + epoch / 1000


class Trainer:
    """A backend that reports a value after each epoch, and leaves a "file" behind.

    Args:
        value: the figure of a task after an epoch.
        before: awaited before each epoch; where a test holds a trial up, or kills it.
        lingers: whether an epoch is followed by one that lasts until somebody stops the trial.
    """

    def __init__(
        self,
        value: Value = by_width,
        *,
        before: Callable[[TrainingTask, int], Awaitable[Outcome | None]] | None = None,
        lingers: Callable[[TrainingTask, int], bool] = lambda _task, _epoch: False,
    ) -> None:
        self.value = value
        self.before = before
        self.lingers = lingers
        self.files: set[str] = set()
        self.attempts: list[str] = []
        self.running = 0
        self.running_max = 0

    def folder(self, uid: str) -> Path:
        return Path("/nowhere") / uid

    async def run(
        self,
        task: TrainingTask,
        *,
        report: Callable[[Report], Awaitable[None]],
        stop: asyncio.Event,
        pause: asyncio.Event,
    ) -> Outcome:
        self.attempts.append(task.uid)
        self.files.add(task.uid)
        self.running += 1
        self.running_max = max(self.running_max, self.running)
        epochs = int(task.hyperparameters["epochs"])
        try:
            for epoch in range(1, epochs + 1):
                if self.before is not None and (outcome := await self.before(task, epoch)) is not None:
                    return outcome
                values = {"validation_accuracy": self.value(task, epoch), "train_loss": 1.0}
                progress = Progress(epoch=epoch, epochs=epochs, step=epoch, steps=epochs)
                await report(Metrics(progress=progress, values=values))
                if self.lingers(task, epoch):
                    await stop.wait()
                if stop.is_set():
                    return Stopped()
            return Finished(model=model())
        finally:
            self.running -= 1

    async def discard(self, uid: str) -> None:
        self.files.discard(uid)


@dataclass
class Registry:
    """A publisher that keeps what the registry promises: the same request is one version."""

    versions: dict[str, tuple[str, Job]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    files_seen: list[bool] = field(default_factory=list)
    failures: list[MeshError] = field(default_factory=list)
    trainer: Trainer | None = None

    async def upload(self, job: Job) -> None:
        self.files_seen.append(self.trainer is None or job.uid in self.trainer.files)
        if self.failures:
            raise self.failures.pop(0)

    async def register(self, job: Job) -> str:
        assert job.spec.publication is not None
        name = f"{job.spec.publication.model}/versions/{len(self.versions) + 1}"
        before = self.versions.setdefault(job.uid, (name, job))
        assert before[1] == job, "the same request with other content"
        return before[0]

    async def point(self, job: Job) -> None:
        assert job.spec.publication is not None
        for alias in job.spec.publication.aliases:
            self.aliases[alias] = job.model_version


@dataclass
class Crash:
    """Cuts everything off when so many transactions have been committed."""

    after: int
    committed: int = 0
    happened: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class Service:
    """An open service."""

    book: StudyBook
    queue: JobQueue
    trainer: Trainer
    registry: Registry

    async def end(self, uid: str) -> Study:
        """The study once it has ended."""
        async for _ in self.book.watch(uid):
            pass
        return await self.book.get(uid)

    async def trials(self, uid: str) -> list[Trial]:
        return [recorded.trial for recorded in (await self.book.history(uid))[1]]

    async def until(self, uid: str, wanted: Callable[[Study], bool]) -> Study:
        """The study once it is as wanted."""
        with self.book.ticket(uid) as changed:
            while True:
                changed.clear()
                study = await self.book.get(uid)
                if wanted(study):
                    return study
                await changed.wait()


@contextlib.asynccontextmanager
async def serving(
    folder: Path,
    *,
    trainer: Trainer | None = None,
    registry: Registry | None = None,
    jobs_max: int = 1,
    studies_max: int = 16,
    events_max: int = 100_000,
    crash: Crash | None = None,
    running: bool = True,
) -> AsyncIterator[Service]:
    """A service on a folder; at the end of the block it is gone as after kill -9: nothing is told to anybody."""
    trainer = trainer or Trainer()
    registry = registry or Registry()
    registry.trainer = trainer
    numbers = itertools.count()

    def clock() -> datetime:
        return datetime.now(UTC)

    def new_uid() -> str:
        return f"{next(numbers):04d}{id(numbers) % 10**6}"

    async with Executors({"ledger": 1, "studies": 1}) as executors:
        wakeups = Wakeups()
        ledger = SqlJobLedger(
            f"sqlite:///{folder / 'training.sqlite'}",
            clock=clock,
            on_commit=lambda uid, _sequence: wakeups.announce(uid),
        )
        ledger.migrate()
        if crash is not None:
            _watch_commits(ledger._database.engine, crash)
        studies = SqlStudyLedger(
            ledger.transaction,
            clock=clock,
            on_commit=lambda uid, _sequence: wakeups.announce(f"studies/{uid}"),
            limits=StudyLimits(studies_max=studies_max, events_per_study_max=events_max),
        )
        capacity = Capacity(total=Resources(cpus=4.0, memory_bytes=1 << 40), jobs_max=jobs_max)
        queue = JobQueue(
            ledger,
            executor=executors["ledger"],
            wakeups=wakeups,
            clock=clock,
            new_uid=new_uid,
            capacity=capacity,
        )
        book = StudyBook(
            studies,
            executor=executors["ledger"],
            wakeups=wakeups,
            capacity=capacity,
            fetcher=NamedOnly(),
            clock=clock,
            new_uid=new_uid,
        )
        retention = Retention(queue, discard=trainer.discard, clock=clock, needed=book.keeps)
        runner = Runner(
            queue, backend=trainer, publisher=registry, retention=retention, limits=RunnerLimits(retry_s=0.001)
        )
        controller = StudyController(
            Means(
                book=book,
                queue=queue,
                publisher=registry,
                discard=retention.drop_files,
                executor=executors["studies"],
                limits=DriveLimits(retry_s=0.001, publish_s=5.0),
            )
        )
        tasks = [asyncio.create_task(each()) for each in (runner.run, controller.run)] if running else []
        try:
            yield Service(book=book, queue=queue, trainer=trainer, registry=registry)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            ledger.close()


def _watch_commits(engine: sa.Engine, crash: Crash) -> None:
    """From the commit on at which the process is to die, none gets through. Those that write nothing do not count."""
    loop = asyncio.get_running_loop()
    changes = 0

    def committing(connection: sa.Connection) -> None:
        nonlocal changes
        driver: Any = connection.connection.driver_connection
        if crash.happened.is_set() or (driver.total_changes != changes and crash.committed >= crash.after):
            loop.call_soon_threadsafe(crash.happened.set)
            crash.committed = crash.after
            raise NotReady("the process is gone", reason="CRASHED")
        crash.committed += driver.total_changes != changes
        changes = driver.total_changes

    sa.event.listen(engine, "commit", committing)


STOPPED, SUCCEEDED, FAILED = StudyState.STOPPED, StudyState.SUCCEEDED, StudyState.FAILED
