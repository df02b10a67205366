"""Sees one study from where it stands to its end: chooses trials, follows their jobs, publishes the best.

Every step is written to the ledger before the next one begins, and every step may be repeated: a job of a trial is
created under a request id of its own, so a crash between the choice and the job makes no twin; a job that is followed
again from its first event adds nothing that is known already. So there is one way to start, whatever happened before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

from mlmesh_runtime.errors import MeshError, NotFound, Overloaded, RevisionLost, WrongState
from mlmesh_runtime.executors import BoundedExecutor, run_blocking
from mlmesh_training import jobs, metrics, moves
from mlmesh_training.jobs import Job, JobState, Metrics
from mlmesh_training.patience import backoff_s, first_of, hopeless
from mlmesh_training.ports import Publisher
from mlmesh_training.queue import JobQueue
from mlmesh_training.studies import study as steps
from mlmesh_training.studies.book import StudyBook
from mlmesh_training.studies.publishing import publishable
from mlmesh_training.studies.study import Decision, Pruner, Study, StudyState, Trial, TrialState

if TYPE_CHECKING:
    from mlmesh_training.studies.search import Search, Verdict

logger = logging.getLogger(__name__)

# What says nothing about whether a job was accepted before: there was no looking.
_BLIND = frozenset({"EXECUTOR_FULL", "DISK_FULL"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DriveLimits:
    """How long what fails is tried again, what has ended is kept; see the environment variables of the same names."""

    retry_s: float = 1.0
    publish_s: float = 900.0
    finished_kept_s: float = 2_592_000.0
    finished_max: int = 100_000
    look_s: float = 60.0
    """Seconds between two looks at what is to be forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What studies are driven with.

    Attributes:
        discard: throws away what is kept of an ended job, by uid.
        executor: one thread, which alone uses Optuna.
    """

    book: StudyBook
    queue: JobQueue
    publisher: Publisher
    discard: Callable[[str], Awaitable[None]]
    executor: BoundedExecutor
    limits: DriveLimits = DriveLimits()


class Drive:
    """One study from a point of its history on. Made anew after anything went wrong.

    Args:
        search: rebuilt from the study's history; None for a study that wants no further trials.
    """

    def __init__(self, means: Means, study: Study, search: Search | None) -> None:
        self._book = means.book
        self._queue = means.queue
        self._means = means
        self._study = study
        self._search = search
        self._stopping = asyncio.Event()

    async def run(self, trials: Sequence[Trial]) -> Study:
        """To the study's end. Args: its trials so far. Errors: what ledger, disk and Optuna raise; drive it again."""
        with self._book.ticket(self._study.uid) as changed:
            async with asyncio.TaskGroup() as group:
                for trial in trials:
                    if trial.state is TrialState.RUNNING:
                        self._start(group, trial)
                while not self._study.final:
                    changed.clear()
                    self._study = await self._book.get(self._study.uid)
                    if self._study.state is not StudyState.RUNNING:
                        self._stopping.set()
                    if not await self._step(group):
                        await changed.wait()
        if self._study.best is not None:
            await self._let_go(self._study.best.job)
        return self._study

    def _start(self, group: asyncio.TaskGroup, trial: Trial) -> None:
        group.create_task(self._try(trial), name=f"{self._study.name} trial {trial.number}")

    async def _step(self, group: asyncio.TaskGroup) -> bool:
        """Take the next step. False when there is none until something changes."""
        study = self._study
        if study.state is StudyState.PUBLISHING:
            self._study = await self._publish(study)
        elif study.wants_trial and self._search is not None:
            point = await run_blocking(self._means.executor, self._search.ask)
            self._study = await self._book.change(study.uid, partial(steps.chosen, hyperparameters=point))
            if self._study.chosen > study.chosen:
                self._start(group, await self._book.trial(study.uid, study.chosen))
        elif study.exhausted:
            self._study = await self._book.change(study.uid, steps.closed)
        else:
            return study.final
        return True

    async def _try(self, trial: Trial) -> None:
        """One trial to its end."""
        begun = await self._begun(trial)
        if begun is None:
            return
        async with asyncio.TaskGroup() as group:
            stopping = group.create_task(self._cancel_when_stopping(begun))
            await self._follow(begun)
            stopping.cancel()

    async def _begun(self, trial: Trial) -> Trial | None:
        """The trial with its job; None when it ended without one."""
        study, failures = self._study, 0
        while not trial.job:
            try:
                job = await self._queue.create(
                    steps.trial_spec(study, trial),
                    request_id=f"{study.name}/trials/{trial.number}",
                    creator=study.creator,
                    study=study.name,
                )
            except MeshError as error:
                refused = f"the job of trial {trial.number} was refused: {error.message}"
                if hopeless(error):
                    await self._book.change(study.uid, partial(steps.aborted, reason=refused))
                    await self._end(trial, partial(steps.failed, reason=refused))
                    return None
                if self._stopping.is_set() and error.reason not in _BLIND:
                    # Had the job been accepted before, this would have been its first answer again.
                    await self._end(trial, partial(steps.failed, reason=refused))
                    return None
                logger.warning("a trial waits for its job", extra={"study": study.name, "error": error.message})
                await first_of(self._stopping, timeout_s=backoff_s(self._means.limits.retry_s, failures))
                failures += 1
            else:
                decide = partial(steps.begun, job=job.uid)
                trial = await self._book.change_trial(study.uid, trial.number, decide)
        return trial

    async def _cancel_when_stopping(self, trial: Trial) -> None:
        """Cancel the trial's job once the study is to end."""
        await self._stopping.wait()
        with contextlib.suppress(WrongState, NotFound):
            await self._queue.cancel(trial.job)

    async def _follow(self, trial: Trial) -> None:
        """Take the figures of the trial's job as they come, to its end."""
        trial = await self._picked_up(trial)
        sequence = 0
        while True:
            job: Job | None = None
            try:
                async with aclosing(self._queue.watch(trial.job, from_sequence=sequence)) as events:
                    async for event in events:
                        sequence = event.sequence + 1
                        if isinstance(event.body, Metrics):
                            trial = await self._measured(trial, event.body)
                job = await self._queue.get(trial.job)
            except NotFound:
                pass
            except (RevisionLost, Overloaded) as error:
                if error.reason not in {"SEQUENCE_LOST", "WATCHER_TOO_SLOW"}:
                    raise
                sequence = 0
                continue
            if job is None or job.final:
                return await self._end(trial, ending(trial, job))

    async def _picked_up(self, trial: Trial) -> Trial:
        """A trial that ran before: what was decided of its latest value is done, what was not decided is."""
        if trial.pruning:
            await self._give_up(trial)
        elif trial.epoch:
            with contextlib.suppress(NotFound):
                job = await self._queue.get(trial.job)
                return trial if job.final else await self._judged(trial, last=trial.epoch >= job.progress.epochs)
        return trial

    async def _measured(self, trial: Trial, found: Metrics) -> Trial:
        """Record what an epoch brought, and see whether to go on."""
        epoch, value = found.progress.epoch, found.values.get(self._study.metric)
        if value is None or epoch <= trial.epoch or not math.isfinite(value):
            return trial
        trial = await self._book.change_trial(
            self._study.uid,
            trial.number,
            partial(steps.measured, epoch=epoch, value=value),
            reading=(epoch, value),
        )
        if self._search is not None:
            await run_blocking(self._means.executor, self._search.report, trial.number, epoch, value)
        # What was trained to its end is kept: giving it up would save nothing.
        return await self._judged(trial, last=epoch >= found.progress.epochs)

    async def _judged(self, trial: Trial, *, last: bool) -> Trial:
        """What the pruner says of the trial's latest value, recorded and done."""
        if self._search is None or self._study.spec.pruner is Pruner.NONE or trial.pruning:
            return trial
        verdict: Verdict = await run_blocking(self._means.executor, self._search.judge, trial.number)
        pruning = "" if last else verdict.pruning
        if pruning or verdict.marks != trial.marks:
            decide = partial(steps.judged, marks=verdict.marks, pruning=pruning)
            trial = await self._book.change_trial(self._study.uid, trial.number, decide)
        if trial.pruning:
            await self._give_up(trial)
        return trial

    async def _give_up(self, trial: Trial) -> None:
        """Stop the job of a pruned trial, and tell it why."""
        line = jobs.LogLine(severity="info", message=trial.pruning)
        with contextlib.suppress(WrongState, NotFound):
            await self._queue.change(trial.job, lambda job, _now: moves.logged(job, line))
            await self._queue.cancel(trial.job)

    async def _end(self, trial: Trial, decide: Callable[[Study, Trial, datetime], Decision]) -> None:
        """Record a trial's end, and let go of the files that nobody needs any more."""
        freed: set[str] = set()

        def deciding(study: Study, before: Trial, now: datetime) -> Decision:
            freed.update([study.best.job] if study.best else [])
            return decide(study, before, now)

        ended = await self._book.change_trial(self._study.uid, trial.number, deciding)
        metrics.TRIALS_FINISHED.labels(state=ended.state.value).inc()
        if self._search is not None:
            await run_blocking(self._means.executor, self._search.tell, ended)
        for job in {*freed, ended.job} - {""}:
            await self._let_go(job)

    async def _let_go(self, job: str) -> None:
        """Throw away a job's files, unless they are the best so far."""
        if not await self._book.keeps(job):
            with contextlib.suppress(NotFound):
                await self._means.discard(job)

    async def _publish(self, study: Study) -> Study:
        """Upload, register, move aliases; again until it works, is hopeless, or the time is up."""
        loop = asyncio.get_running_loop()
        until, tries = loop.time() + self._means.limits.publish_s, 0
        while True:
            try:
                return await self._publish_once(study)
            except (FileNotFoundError, ValueError) as error:
                reason = f"publishing the best trial, whose files are gone: {error}"
                return await self._book.change(study.uid, partial(steps.publication_failed, reason=reason))
            except MeshError as error:
                if hopeless(error) or loop.time() >= until:
                    reason = f"publishing the best trial: {error.message}"
                    return await self._book.change(study.uid, partial(steps.publication_failed, reason=reason))
                logger.warning("publishing is retried", extra={"study": study.name, "error": error.message})
            await asyncio.sleep(backoff_s(self._means.limits.retry_s, tries))
            tries += 1

    async def _publish_once(self, study: Study) -> Study:
        if study.best is None:
            raise ValueError(f"{study.name} has no best trial")
        try:
            job = publishable(study, await self._queue.get(study.best.job))
        except NotFound as error:
            raise ValueError(error.message) from error
        version = study.model_version
        if not version:
            await self._means.publisher.upload(job)
            version = await self._means.publisher.register(job)
            await self._book.change(study.uid, partial(steps.registered, version=version))
        await self._means.publisher.point(replace(job, model_version=version))
        return await self._book.change(study.uid, steps.published)


def ending(trial: Trial, job: Job | None) -> Callable[[Study, Trial, datetime], Decision]:
    """How a trial ends whose job has ended, or was deleted. Pure."""
    if job is None:
        return partial(steps.failed, reason="its job was deleted")
    if job.state is JobState.SUCCEEDED:
        return steps.succeeded
    if job.state is JobState.CANCELLED:
        return steps.pruned if trial.pruning else partial(steps.failed, reason="its job was cancelled")
    return partial(steps.failed, reason=job.error)
