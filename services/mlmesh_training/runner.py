"""Runs what the queue holds: trains, retries, pauses, publishes, and takes up again what a crash left behind.

Every step is written to the ledger before the next one begins, and every step may be repeated. So there is one way to
start, whatever happened before: look at each unfinished job and go on from what it says.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime

from mlmesh_runtime.errors import MeshError, NotFound, WrongState
from mlmesh_training import jobs, metrics, moves, publishing, schedule
from mlmesh_training.backends.base import Backend, Died, Finished, Outcome, Paused, Report, Stopped, TrainingTask
from mlmesh_training.jobs import WAITING, Job, JobState
from mlmesh_training.moves import Decision
from mlmesh_training.options import Resources
from mlmesh_training.patience import backoff_s, being_cancelled, first_of, hopeless, unless
from mlmesh_training.ports import Fetcher, NamedOnly, Publisher
from mlmesh_training.queue import JobQueue, Signals
from mlmesh_training.retention import Retention
from mlmesh_training.schedule import Choice

logger = logging.getLogger(__name__)

NOTE_S = 5.0
"""Between two notes of how long an attempt has run; so much of it may be forgotten when the service is killed."""
_PUBLISHING_MAX = 16

Decide = Callable[[Job, datetime], Decision]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerLimits:
    """Bounds of the runner; see the environment variables of the same names."""

    retry_s: float = 1.0
    publish_s: float = 900.0
    time_limit_s: float = 604_800.0


class Runner:
    """Works on the queue for as long as it is awaited. One a ledger.

    Args:
        retention: told of each job that ends; the one who composes the service also runs it.
    """

    def __init__(
        self,
        queue: JobQueue,
        *,
        backend: Backend,
        publisher: Publisher,
        retention: Retention,
        fetcher: Fetcher | None = None,
        limits: RunnerLimits = RunnerLimits(),
    ) -> None:
        self._queue = queue
        self._backend = backend
        self._publisher = publisher
        self._retention = retention
        self._fetcher = fetcher or NamedOnly()
        self._limits = limits
        self._active: set[str] = set()
        self._occupied: dict[str, Resources] = {}
        self._gpus: dict[str, tuple[int, ...]] = {}

    async def run(self) -> None:
        """Take up unfinished jobs, then run what is queued, each in its turn. Never returns."""
        async with asyncio.TaskGroup() as group:
            for job in await self._queue.unfinished():
                after = await self._queue.change(job.uid, moves.interrupted)
                if after.final:
                    await self._finished(after)
                elif after.state in {JobState.RUNNING, JobState.CANCELLING, JobState.PAUSING}:
                    self._start(group, after.uid)
                elif after.state in WAITING:
                    await self._warn(after)
            while True:
                self._queue.arrived.clear()
                while len(self._active) - len(self._occupied) < _PUBLISHING_MAX:
                    choice = await self._queue.choose(tuple(self._occupied.values()), excluding=self._active)
                    if choice is None:
                        break
                    self._occupy(choice)
                    self._start(group, choice.job.uid)
                await self._queue.arrived.wait()

    def _occupy(self, choice: Choice) -> None:
        if not choice.job.light:
            used = {gpu for gpus in self._gpus.values() for gpu in gpus}
            free = (gpu for gpu in range(self._queue.capacity.total.gpus) if gpu not in used)
            self._occupied[choice.job.uid] = choice.resources
            self._gpus[choice.job.uid] = tuple(itertools.islice(free, choice.resources.gpus))

    def _start(self, group: asyncio.TaskGroup, uid: str) -> None:
        self._active.add(uid)
        metrics.JOBS_ACTIVE.set(len(self._active))
        group.create_task(self._work(uid), name=f"jobs/{uid}")

    async def _work(self, uid: str) -> None:
        """See one job to its end or its pause, whatever fails on the way."""
        failures = 0
        try:
            while True:
                try:
                    with self._queue.signals(uid) as signals:
                        return await self._finished(await self._advance(uid, signals))
                except NotFound as error:
                    if error.reason == "JOB_NOT_FOUND":
                        return None  # It had ended, and somebody deleted it.
                    logger.exception("work on a job was cut off", extra={"job": f"jobs/{uid}"})
                except Exception as error:
                    if being_cancelled():
                        raise asyncio.CancelledError from error
                    # The ledger or the disk failed, not the job: go on as after a restart.
                    logger.exception("work on a job was cut off", exc_info=error, extra={"job": f"jobs/{uid}"})
                await asyncio.sleep(backoff_s(self._limits.retry_s, failures))
                failures += 1
                with contextlib.suppress(MeshError):
                    await self._queue.change(uid, moves.interrupted)
        finally:
            self._active.discard(uid)
            metrics.JOBS_ACTIVE.set(len(self._active))
            self._leave_slot(uid)

    async def _advance(self, uid: str, signals: Signals) -> Job:
        """Take the next step until the job has ended, is paused, or waits for its turn again."""
        job = await self._queue.get(uid)
        while not job.final and job.state is not JobState.PAUSED:
            if job.trained is not None and job.state in WAITING:
                job = await self._queue.change(uid, _publishing_resumed)
            elif job.trained is not None and (job.state is JobState.RUNNING or job.registering):
                self._leave_slot(uid)
                limits = self._limits
                job = await publishing.publish(
                    self._queue, self._publisher, job, signals, retry_s=limits.retry_s, publish_s=limits.publish_s
                )
            elif job.state in {JobState.CANCELLING, JobState.PAUSING}:
                job = await self._queue.change(uid, moves.paused)
            else:
                job = await self._train(job, signals)
                if job.state is JobState.RETRYING:
                    wait_s = backoff_s(self._limits.retry_s, job.failures - 1) if job.failures else 0.0
                    await first_of(signals.stop, signals.pause, timeout_s=wait_s)
                    job = await self._queue.get(uid)
                if job.state is JobState.QUEUED:
                    break  # It was paused and resumed meanwhile.
        return job

    async def _train(self, job: Job, signals: Signals) -> Job:
        """One attempt."""
        resources = self._occupied.get(job.uid, job.resources)
        job = await self._queue.change(job.uid, lambda job, now: _started(job, now, resources))
        if job.state is not JobState.RUNNING:
            return job
        metrics.ATTEMPTS.inc()
        limit_s = job.spec.time_limit_s or self._limits.time_limit_s
        watch = _Stopwatch(before_s=job.run_s, left_s=limit_s - (job.run_s - job.spared_s))

        async def report(told: Report) -> None:
            await self._queue.change(job.uid, watch.noting(lambda job, _now: reported(job, told)))

        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            timing = group.create_task(self._keep_time(job.uid, watch, signals.stop, stop))
            outcome = await self._attempt(job, report, Signals(stop=stop, pause=signals.pause))
            timing.cancel()
        return await self._queue.change(job.uid, watch.noting(_ended(outcome, limit_s if watch.late else None)))

    async def _keep_time(self, uid: str, watch: _Stopwatch, asked: asyncio.Event, stop: asyncio.Event) -> None:
        """Note how long the attempt has run; stop it when somebody asks for that or its time is up."""
        while not asked.is_set() and watch.left_s > 0:
            await first_of(asked, timeout_s=min(NOTE_S, watch.left_s))
            with contextlib.suppress(MeshError):
                await self._queue.change(uid, watch.noting(lambda job, _now: (job, ())))
        watch.late = not asked.is_set()
        stop.set()

    async def _attempt(self, job: Job, report: Callable[[Report], Awaitable[None]], signals: Signals) -> Outcome:
        fetched = await self._fetch(job, report, signals)
        if fetched is not None:
            return fetched
        spec, optimization = job.spec, job.spec.optimization
        task = TrainingTask(
            uid=job.uid,
            recipe=spec.recipe,
            dataset="" if spec.registered_dataset else spec.dataset,
            dataset_version=job.resolved_dataset if spec.registered_dataset else "",
            hyperparameters=job.hyperparameters,
            seed=spec.seed,
            fit=spec.fit,
            distribution=spec.distribution,
            optimization=replace(optimization, source=job.resolved_source) if optimization else None,
            attempt=job.attempts,
            threads=schedule.threads(spec, job.resources, self._queue.capacity),
            gpus=self._gpus.get(job.uid, ()),
            resources=spec.resources,
        )
        return await self._backend.run(task, report=report, stop=signals.stop, pause=signals.pause)

    async def _fetch(self, job: Job, report: Callable[[Report], Awaitable[None]], signals: Signals) -> Outcome | None:
        """Have the files that the attempt needs; how it ended when they cannot be had."""
        if not job.spec.registered_dataset and not job.resolved_source:
            return None
        await report(jobs.JobPhase.LOADING_DATA)
        loop = asyncio.get_running_loop()
        until = loop.time() + self._limits.publish_s
        tries = 0
        while True:
            try:
                await unless(self._fetcher.fetch(job, self._backend.folder(job.uid)), signals.stop, signals.pause)
            except OSError as error:
                return Died(reason=f"fetching its files: {error.strerror or error}")
            except MeshError as error:
                if isinstance(error, WrongState) and error.reason == "JOB_STOPPED":
                    return Stopped() if signals.stop.is_set() else Paused()
                reason = f"fetching its files: {error.message}"
                if hopeless(error, reading=True) or loop.time() >= until:
                    return Died(reason=reason, permanent=True)
                if tries == 0:
                    await report(jobs.LogLine(severity="warning", message=f"{reason}; it is tried again"))
            else:
                return None
            await first_of(signals.stop, signals.pause, timeout_s=backoff_s(self._limits.retry_s, tries))
            tries += 1

    async def _warn(self, job: Job) -> None:
        """Say so when a job that was accepted earlier does not fit into what there is now."""
        capacity = self._queue.capacity
        needs = schedule.occupied(job.spec.resources, job.spec.distribution.processes, capacity)
        if not schedule.fits([needs], capacity.total):
            text = f"it asks for more than this service has now ({capacity.total}); it waits until there is more"
            logger.warning("a job does not fit", extra={"job": job.name, "asks": str(needs)})
            line = jobs.LogLine(severity="warning", message=text)
            await self._queue.change(job.uid, lambda job, _now: moves.logged(job, line))

    async def _finished(self, job: Job) -> None:
        if not job.final:
            return
        metrics.JOBS_FINISHED.labels(state=job.state.value).inc()
        logger.info("job ended", extra={"job": job.name, "state": job.state.value, "error": job.error})
        await self._retention.ended(job)

    def _leave_slot(self, uid: str) -> None:
        self._occupied.pop(uid, None)
        self._gpus.pop(uid, None)
        self._queue.arrived.set()


class _Stopwatch:
    """Measures one attempt, by a clock that does not jump.

    Args:
        before_s: the job's run time before it.
        left_s: its time limit, less what it has used of that.
    """

    def __init__(self, *, before_s: float, left_s: float) -> None:
        self._before_s = before_s
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._until = self._began + left_s
        self.late = False
        """Whether the attempt was stopped because its time was up."""

    @property
    def left_s(self) -> float:
        return self._until - self._loop.time()

    def noting(self, decide: Decide) -> Decide:
        """A decision about the job with the time that it has run by now."""
        ran_s = self._before_s + self._loop.time() - self._began
        return lambda job, now: decide(moves.ran(job, ran_s), now)


def reported(job: Job, report: Report) -> Decision:
    """What a report of the training process changes. Pure."""
    match report:
        case jobs.JobPhase():
            return moves.entered(job, report)
        case jobs.Metrics():
            return moves.measured(job, report)
        case jobs.Checkpoint():
            return moves.checkpointed(job, report)
        case jobs.Evaluation():
            return moves.evaluated(job, report)
        case jobs.LogLine():
            return moves.logged(job, report)
        case jobs.OptimizationResult():
            return moves.optimized(job, report)


def _ended(outcome: Outcome, limit_s: float | None) -> Decide:
    """What the end of an attempt changes. `limit_s`: the time limit, where it was reached. Pure."""

    def decide(job: Job, now: datetime) -> Decision:
        match outcome:
            case Finished(model=model):
                return moves.trained(job, model, now)
            case Died(reason=reason, permanent=True):
                return moves.failed(job, reason, now, charged=True)
            case Died(reason=reason):
                return moves.process_died(job, reason, now)
            case _ if limit_s is not None:
                return moves.time_ran_out(job, limit_s, now)
            case Paused():
                return moves.paused(job, now)
            case Stopped():
                return moves.interrupted(job, now)

    return decide


def _started(job: Job, now: datetime, resources: Resources) -> Decision:
    """An attempt begins, unless somebody was faster and cancelled or paused the job."""
    return moves.started(job, now, resources) if job.state in WAITING else (job, ())


def _publishing_resumed(job: Job, _now: datetime) -> Decision:
    return moves.publishing_resumed(job) if job.state in WAITING else (job, ())
