"""How a job moves. Pure: every decision is a function from a job to a job and the events that tell of it."""

from __future__ import annotations

import dataclasses
from datetime import datetime

from mlmesh_runtime.errors import WrongState
from mlmesh_training.jobs import (
    INTERRUPTIONS_MAX,
    LEGAL,
    LOG_LINE_BYTES_MAX,
    Checkpoint,
    Evaluation,
    EventBody,
    Job,
    JobChanged,
    JobPhase,
    JobState,
    LogLine,
    Metrics,
    OptimizationResult,
    TrainedModel,
)

Decision = tuple[Job, tuple[EventBody, ...]]


def started(job: Job, now: datetime) -> Decision:
    """An attempt begins."""
    return _moved(job, JobState.RUNNING, attempts=job.attempts + 1, error="", start_time=job.start_time or now)


def entered(job: Job, phase: JobPhase) -> Decision:
    """A running job reaches a phase."""
    if job.state is not JobState.RUNNING or job.phase is phase:
        return job, ()
    return dataclasses.replace(job, phase=phase), (JobChanged(),)


def measured(job: Job, metrics: Metrics) -> Decision:
    """Figures came from the fitting."""
    if job.final:
        return job, ()
    return dataclasses.replace(job, progress=metrics.progress), (metrics,)


def logged(job: Job, *lines: LogLine) -> Decision:
    """Lines came from the process."""
    return job, (() if job.final else tuple(shortened(line) for line in lines))


def checkpointed(job: Job, checkpoint: Checkpoint) -> Decision:
    """A checkpoint is safely on disk: whatever interrupted the job before, it gets on."""
    if job.final:
        return job, ()
    return dataclasses.replace(job, progress=checkpoint.progress, interruptions=0), (checkpoint,)


def evaluated(job: Job, evaluation: Evaluation) -> Decision:
    """Held-out data was measured."""
    if job.state is not JobState.RUNNING:
        return job, ()
    return dataclasses.replace(job, evaluation=evaluation), (JobChanged(),)


def optimized(job: Job, result: OptimizationResult) -> Decision:
    """An optimised model was compared with its source."""
    if job.state is not JobState.RUNNING:
        return job, ()
    return dataclasses.replace(job, optimization=result), (JobChanged(),)


def trained(job: Job, model: TrainedModel, now: datetime) -> Decision:
    """Training left a model. Without a publication the job has succeeded."""
    if job.state is not JobState.RUNNING:
        return job, ()
    done = dataclasses.replace(job, trained=model, evaluation=model.evaluation)
    if job.spec.publication is None:
        return succeeded(done, now)
    return entered(done, JobPhase.PUBLISHING)


def registration_begun(job: Job) -> Decision:
    """From here on a version may exist. A job that is asked to stop before this point does not pass it."""
    if job.state is not JobState.RUNNING:
        raise WrongState(f"{job.name} is {job.state}", reason="JOB_STOPPED")
    return dataclasses.replace(job, registering=True), ()


def registered(job: Job, version: str) -> Decision:
    """The version exists; aliases may still have to move."""
    if job.final or job.model_version == version:
        return job, ()
    return dataclasses.replace(job, model_version=version), (JobChanged(),)


def succeeded(job: Job, now: datetime) -> Decision:
    """All that was asked is done."""
    return _moved(job, JobState.SUCCEEDED, phase=JobPhase.NONE, error="", end_time=now)


def failed(job: Job, reason: str, now: datetime) -> Decision:
    """Trying again would not help. A job that was asked to stop is cancelled instead."""
    if job.state is JobState.CANCELLING:
        return cancelled(job, now)
    return _ended(job, reason, now)


def process_died(job: Job, reason: str, now: datetime) -> Decision:
    """An attempt ended by its own fault: retry while the budget lasts."""
    if job.state is JobState.CANCELLING:
        return cancelled(job, now)
    charged = dataclasses.replace(job, failures=job.failures + 1)
    if charged.failures > job.spec.retries:
        return _ended(charged, f"gave up after {job.attempts} attempts: {reason}", now)
    return _retrying(charged, reason)


def interrupted(job: Job, now: datetime) -> Decision:
    """The service came back and finds a job that was running when it ended. The job's own budget is not charged."""
    if job.state is JobState.CANCELLING and not job.registering:
        return cancelled(job, now)
    if job.state is not JobState.RUNNING or job.trained:
        return job, ()
    counted = dataclasses.replace(job, interruptions=job.interruptions + 1)
    if counted.interruptions > INTERRUPTIONS_MAX:
        return _ended(counted, f"interrupted {counted.interruptions} times in a row without a checkpoint", now)
    return _retrying(counted, "the training service restarted")


def cancel_requested(job: Job, now: datetime) -> Decision:
    """Somebody asks it to stop. Raises WrongState (JOB_FINISHED) when it ended in another way."""
    if job.state in {JobState.CANCELLING, JobState.CANCELLED}:
        return job, ()
    if job.final:
        raise WrongState(f"{job.name} is {job.state} already", reason="JOB_FINISHED", metadata={"state": job.state})
    if job.state is JobState.RUNNING:
        return _moved(job, JobState.CANCELLING)
    return cancelled(job, now)


def cancelled(job: Job, now: datetime) -> Decision:
    """It stopped on request."""
    return _moved(job, JobState.CANCELLED, phase=JobPhase.NONE, error="", end_time=now)


def shortened(line: LogLine) -> LogLine:
    """A line cut to LOG_LINE_BYTES_MAX, on a character boundary."""
    raw = line.message.encode()
    if len(raw) <= LOG_LINE_BYTES_MAX:
        return line
    return dataclasses.replace(line, message=raw[: LOG_LINE_BYTES_MAX - 3].decode(errors="ignore") + "…")


def _ended(job: Job, reason: str, now: datetime) -> Decision:
    line = shortened(LogLine(severity="error", message=reason))
    moved, events = _moved(job, JobState.FAILED, phase=JobPhase.NONE, error=line.message, end_time=now)
    return moved, (line, *events)


def _retrying(job: Job, reason: str) -> Decision:
    line = shortened(LogLine(severity="warning", message=reason))
    moved, events = _moved(job, JobState.RETRYING, phase=JobPhase.NONE, error=line.message)
    return moved, (line, *events)


def _moved(job: Job, state: JobState, **changes: object) -> Decision:
    if state not in LEGAL[job.state]:
        raise WrongState(f"{job.name} is {job.state}, it cannot become {state}", reason="ILLEGAL_TRANSITION")
    return dataclasses.replace(job, state=state, **changes), (JobChanged(),)  # type: ignore[arg-type]
