"""Runs what the queue holds: trains, retries, publishes, and takes up again what a crash left behind.

Every step is written to the ledger before the next one begins, and every step may be repeated. So there is one way to
start, whatever happened before: look at each unfinished job and go on from what it says.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from mlmesh_runtime.errors import (
    AlreadyExists,
    Denied,
    InvalidInput,
    MeshError,
    Unauthenticated,
    Unsupported,
    WrongState,
)
from mlmesh_training import jobs, metrics, moves
from mlmesh_training.backends.base import Backend, Died, Finished, Report, TrainingTask
from mlmesh_training.jobs import Job, JobState
from mlmesh_training.moves import Decision
from mlmesh_training.queue import JobQueue

logger = logging.getLogger(__name__)

_RETRY_S_MAX = 30.0
_PUBLISHING_MAX = 16
# What a registry answers that no waiting changes.
_HOPELESS = (AlreadyExists, Denied, InvalidInput, Unauthenticated, Unsupported, WrongState)


class Publisher(Protocol):
    """Where trained models go. Every method may be repeated with the same job, and then changes nothing more."""

    def upload(self, job: Job) -> Coroutine[Any, Any, None]:
        """Make sure that the model and the files of its version are there."""
        ...

    async def register(self, job: Job) -> str:
        """Create the version, "models/{model}/versions/{number}"."""
        ...

    async def point(self, job: Job) -> None:
        """Move the aliases that were asked for to the job's version."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerLimits:
    """Bounds of the runner; see the environment variables of the same names."""

    jobs_max: int = 1
    retry_s: float = 1.0
    publish_s: float = 900.0


class Runner:
    """Works on the queue for as long as it is awaited. One a ledger."""

    def __init__(
        self,
        queue: JobQueue,
        *,
        backend: Backend,
        publisher: Publisher,
        limits: RunnerLimits = RunnerLimits(),
    ) -> None:
        self._queue = queue
        self._backend = backend
        self._publisher = publisher
        self._limits = limits
        self._active: set[str] = set()
        self._training: set[str] = set()

    async def run(self) -> None:
        """Take up unfinished jobs, then run what is queued, oldest first. Never returns."""
        async with asyncio.TaskGroup() as group:
            for job in await self._queue.unfinished():
                after = await self._queue.change(job.uid, moves.interrupted)
                if after.final:
                    await self._finished(after)
                elif after.state in {JobState.RUNNING, JobState.CANCELLING}:
                    self._start(group, after)
            while True:
                self._queue.arrived.clear()
                while len(self._training) < self._limits.jobs_max and len(self._active) < _PUBLISHING_MAX:
                    found = await self._queue.next_runnable(excluding=tuple(self._active))
                    if found is None:
                        break
                    self._training.add(found.uid)
                    self._start(group, found)
                await self._queue.arrived.wait()

    def _start(self, group: asyncio.TaskGroup, job: Job) -> None:
        self._active.add(job.uid)
        metrics.JOBS_ACTIVE.set(len(self._active))
        group.create_task(self._work(job.uid), name=job.name)

    async def _work(self, uid: str) -> None:
        """See one job to its end, whatever fails on the way."""
        failures = 0
        try:
            while True:
                try:
                    with self._queue.stop_signal(uid) as stop:
                        return await self._finished(await self._advance(uid, stop))
                except Exception as error:
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

    async def _advance(self, uid: str, stop: asyncio.Event) -> Job:
        """Take the next step until the job has ended."""
        job = await self._queue.get(uid)
        while not job.final:
            if job.trained is not None and (job.state is JobState.RUNNING or job.registering):
                self._leave_slot(uid)
                job = await self._publish(job, stop)
            elif job.state is JobState.CANCELLING:
                job = await self._queue.change(uid, moves.cancelled)
            else:
                job = await self._train(job, stop)
            if job.state is JobState.RETRYING:
                await _set_within(stop, backoff_s(self._limits.retry_s, job.failures - 1) if job.failures else 0.0)
                job = await self._queue.get(uid)
        return job

    async def _train(self, job: Job, stop: asyncio.Event) -> Job:
        """One attempt."""
        job = await self._queue.change(job.uid, _started)
        if job.state is not JobState.RUNNING:
            return job
        metrics.ATTEMPTS.inc()
        task = TrainingTask(
            uid=job.uid,
            recipe=job.spec.recipe,
            dataset=job.spec.dataset,
            hyperparameters=job.hyperparameters,
            seed=job.spec.seed,
            fit=job.spec.fit,
            distribution=job.spec.distribution,
            attempt=job.attempts,
        )
        outcome = await self._backend.run(task, report=self._reporter(job.uid), stop=stop, pause=asyncio.Event())
        if isinstance(outcome, Finished):
            return await self._queue.change(job.uid, _timed(moves.trained, outcome.model))
        if isinstance(outcome, Died):
            end = moves.failed if outcome.permanent else moves.process_died
            return await self._queue.change(job.uid, _timed(end, outcome.reason))
        return await self._queue.change(job.uid, moves.interrupted)

    def _reporter(self, uid: str) -> Callable[[Report], Awaitable[None]]:
        async def report(report: Report) -> None:
            await self._queue.change(uid, _timeless(reported, report))

        return report

    async def _publish(self, job: Job, stop: asyncio.Event) -> Job:
        """Upload, register, move aliases; again until it works, is hopeless, or the time is up."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._limits.publish_s
        tries = 0
        while True:
            try:
                return await self._publish_once(job, stop)
            except MeshError as error:
                if isinstance(error, WrongState) and error.reason == "JOB_STOPPED":
                    return await self._queue.change(job.uid, moves.cancelled)
                reason = f"publishing to {job.spec.publication.model if job.spec.publication else ''}: {error.message}"
                hopeless = isinstance(error, _HOPELESS) and error.reason != "BLOB_NOT_FOUND"
                if hopeless or loop.time() >= until:
                    return await self._queue.change(job.uid, _timed(moves.failed, reason))
                logger.warning("publishing is retried", extra={"job": job.name, "error": error.message})
                if tries == 0:
                    line = jobs.LogLine(severity="warning", message=f"{reason}; it is tried again")
                    await self._queue.change(job.uid, _timeless(moves.logged, line))
            await _set_within(stop, backoff_s(self._limits.retry_s, tries))
            tries += 1

    async def _publish_once(self, job: Job, stop: asyncio.Event) -> Job:
        job = await self._queue.get(job.uid)
        if job.registering:
            # The version may exist by now: being asked to stop no longer stops it.
            await self._publisher.upload(job)
        else:
            await _unless(stop, self._publisher.upload(job))
            job = await self._queue.change(job.uid, _timeless(moves.registration_begun))
        version = job.model_version or await self._publisher.register(job)
        job = await self._queue.change(job.uid, _timeless(moves.registered, version))
        await self._publisher.point(job)
        return await self._queue.change(job.uid, moves.succeeded)

    async def _finished(self, job: Job) -> None:
        metrics.JOBS_FINISHED.labels(state=job.state.value).inc()
        logger.info("job ended", extra={"job": job.name, "state": job.state.value, "error": job.error})
        await self._backend.discard(job.uid)

    def _leave_slot(self, uid: str) -> None:
        self._training.discard(uid)
        self._queue.arrived.set()


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


def backoff_s(first_s: float, failures: int) -> float:
    """Seconds to wait after so many failures before this one."""
    return float(min(_RETRY_S_MAX, first_s * 2 ** min(failures, 16)))


def _started(job: Job, now: datetime) -> Decision:
    """An attempt begins, unless somebody was faster and cancelled the job."""
    return moves.started(job, now) if job.state in {JobState.QUEUED, JobState.RETRYING} else (job, ())


def _timed(decide: Callable[..., Decision], *values: object) -> Callable[[Job, datetime], Decision]:
    """A decision that takes the job, these values and the time."""
    return lambda job, now: decide(job, *values, now)


def _timeless(decide: Callable[..., Decision], *values: object) -> Callable[[Job, datetime], Decision]:
    """A decision that takes the job and these values."""
    return lambda job, _now: decide(job, *values)


async def _set_within(event: asyncio.Event, timeout_s: float) -> None:
    """Wait for an event, or for so long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Do work; when stop is set first, cancel it and raise WrongState (JOB_STOPPED)."""
    async with asyncio.TaskGroup() as group:
        working = group.create_task(_caught(work))
        stopping = group.create_task(stop.wait())
        await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        stopped = working.cancel()
    if stopped:
        raise WrongState("the job was asked to stop", reason="JOB_STOPPED")
    if (error := working.result()) is not None:
        raise error


async def _caught(work: Coroutine[Any, Any, None]) -> MeshError | None:
    """The error of some work as its result, so that it leaves a task group as it is."""
    try:
        await work
    except MeshError as error:
        return error
    return None
