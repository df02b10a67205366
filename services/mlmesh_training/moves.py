"""How a job moves. Pure: every decision is a function from a job to a job and the events that tell of it.

QUEUED → RUNNING → SUCCEEDED, FAILED or CANCELLED; RUNNING → RETRYING → RUNNING when its process died and the budget
allows; RUNNING → PAUSING → PAUSED → QUEUED and RUNNING → CANCELLING on request. FAILED and CANCELLED go back to QUEUED
by RetryJob alone, SUCCEEDED never changes. `jobs.LEGAL` has the whole table.
"""

from __future__ import annotations

import dataclasses
from datetime import datetime, timedelta

from mlmesh_runtime.errors import Conflict, WrongState
from mlmesh_training.jobs import (
    ATTEMPTS_KEPT,
    INTERRUPTIONS_MAX,
    LEGAL,
    LOG_LINE_BYTES_MAX,
    Attempt,
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
    Progress,
    TrainedModel,
)
from mlmesh_training.options import Resources

Decision = tuple[Job, tuple[EventBody, ...]]

_PAUSED_REASON = "paused on request"
_CANCELLED_REASON = "cancelled on request"
_UNTRAINED = {"trained": None, "registering": False, "evaluation": None, "optimization": None, "progress": Progress()}
_HEARD = frozenset({JobState.RUNNING, JobState.PAUSING})
# A request that comes in these states is one that was made before.
_RUNS = frozenset({JobState.QUEUED, JobState.RUNNING, JobState.RETRYING})


def started(job: Job, now: datetime, resources: Resources | None = None) -> Decision:
    """An attempt begins and occupies these resources."""
    return _moved(
        job,
        JobState.RUNNING,
        attempts=job.attempts + 1,
        error="",
        start_time=job.start_time or now,
        attempt_time=now,
        attempt_from_s=job.run_s,
        resources=resources or job.resources,
        files=True,
    )


def publishing_resumed(job: Job) -> Decision:
    """A job that has trained before it was paused or failed goes on with what is left: publishing. No attempt."""
    return _moved(job, JobState.RUNNING, phase=JobPhase.PUBLISHING, error="")


def ran(job: Job, run_s: float) -> Job:
    """The job's attempts have run for so long, all together. Never less than before."""
    return job if run_s <= job.run_s else dataclasses.replace(job, run_s=run_s)


def entered(job: Job, phase: JobPhase) -> Decision:
    """A running job reaches a phase."""
    if job.state not in _HEARD or job.phase is phase:
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
    if job.state not in _HEARD:
        return job, ()
    return dataclasses.replace(job, evaluation=evaluation), (JobChanged(),)


def optimized(job: Job, result: OptimizationResult) -> Decision:
    """An optimised model was compared with its source."""
    if job.state not in _HEARD:
        return job, ()
    return dataclasses.replace(job, optimization=result), (JobChanged(),)


def trained(job: Job, model: TrainedModel, now: datetime) -> Decision:
    """Training left a model. Without a publication the job has succeeded; one that is to pause publishes later."""
    if job.state not in _HEARD:
        return job, ()
    done = dataclasses.replace(
        _attempt_ended(job, now),
        trained=model,
        evaluation=model.evaluation,
        optimization=model.optimization or job.optimization,
    )
    if job.spec.publication is None:
        return succeeded(done, now)
    if job.state is JobState.PAUSING:
        return _moved(done, JobState.PAUSED, phase=JobPhase.NONE)
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
    return _moved(_attempt_ended(job, now), JobState.SUCCEEDED, phase=JobPhase.NONE, error="", end_time=now)


def failed(job: Job, reason: str, now: datetime, *, charged: bool = False) -> Decision:
    """Trying again would not help. A job that was asked to stop is cancelled instead.

    Args:
        charged: whether the attempt ended by its own fault.
    """
    if job.state is JobState.CANCELLING:
        return cancelled(job, now)
    counted = dataclasses.replace(job, failures=job.failures + charged)
    return _ended(_attempt_ended(counted, now, reason, charged=charged), reason, now)


def process_died(job: Job, reason: str, now: datetime) -> Decision:
    """An attempt ended by its own fault: retry while the budget lasts. One that was to pause is paused then."""
    if job.state is JobState.CANCELLING:
        return cancelled(job, now)
    charged = dataclasses.replace(job, failures=job.failures + 1)
    charged = _attempt_ended(charged, now, reason, charged=True)
    if charged.failures > job.spec.retries:
        return _ended(charged, f"gave up after {charged.failures} attempts: {reason}", now)
    if job.state is JobState.PAUSING:
        return _told(charged, JobState.PAUSED, reason)
    return _told(charged, JobState.RETRYING, reason)


def time_ran_out(job: Job, limit_s: float, now: datetime) -> Decision:
    """Its attempts ran for as long as they may."""
    return failed(job, f"its attempts ran for {job.run_s - job.spared_s:.0f} s, its time limit is {limit_s:g} s", now)


def interrupted(job: Job, now: datetime) -> Decision:
    """The service came back and finds a job that was running when it ended. The job's own budget is not charged."""
    # When the attempt ended was not seen: it ran for at least as long as was noted.
    seen = now if job.attempt_time is None else job.attempt_time + timedelta(seconds=job.run_s - job.attempt_from_s)
    if job.state is JobState.CANCELLING and not job.registering:
        return cancelled(job, now)
    if job.state is JobState.PAUSING and not job.registering:
        return paused(job, min(seen, now))
    if job.state is not JobState.RUNNING or job.trained:
        return job, ()
    reason = "the training service restarted"
    counted = dataclasses.replace(_attempt_ended(job, min(seen, now), reason), interruptions=job.interruptions + 1)
    if counted.interruptions > INTERRUPTIONS_MAX:
        return _ended(counted, f"interrupted {counted.interruptions} times in a row without a checkpoint", now)
    return _told(counted, JobState.RETRYING, reason)


def pause_requested(job: Job, now: datetime) -> Decision:  # noqa: ARG001 - as every decision on a request
    """Somebody asks it to pause. Raises WrongState (JOB_FINISHED) when it has ended or is being cancelled."""
    if job.state in {JobState.PAUSING, JobState.PAUSED}:
        return job, ()
    if job.final or job.state is JobState.CANCELLING:
        raise _finished(job)
    if job.state is JobState.RUNNING:
        return _moved(job, JobState.PAUSING)
    return _moved(job, JobState.PAUSED, phase=JobPhase.NONE, error="")


def paused(job: Job, now: datetime) -> Decision:
    """It holds nothing any more. A job that was asked to stop meanwhile is cancelled instead."""
    if job.state is JobState.CANCELLING:
        return cancelled(job, now)
    if job.state is not JobState.PAUSING:
        return interrupted(job, now)
    return _moved(_attempt_ended(job, now, _PAUSED_REASON), JobState.PAUSED, phase=JobPhase.NONE, error="")


def resume_requested(job: Job, now: datetime) -> Decision:  # noqa: ARG001
    """Somebody asks a paused job to go on.

    Raises WrongState (JOB_FINISHED) when it has ended or is being cancelled, Conflict (JOB_NOT_PAUSED) while it pauses.
    """
    if job.state in _RUNS:
        return job, ()
    if job.state is JobState.PAUSING:
        raise Conflict(f"{job.name} is still {job.state}", reason="JOB_NOT_PAUSED", metadata={"state": job.state})
    if job.state is not JobState.PAUSED:
        raise _finished(job)
    return _moved(job, JobState.QUEUED, error="")


def retry_requested(job: Job, now: datetime) -> Decision:  # noqa: ARG001
    """Somebody asks for another try of a job that failed or was cancelled, with a fresh budget of retries and of time.

    What was trained stays, where its files are still kept or its version is registered. Raises WrongState:
    JOB_NOT_RETRYABLE when it succeeded or is paused, JOB_NOT_FINISHED while it is being cancelled.
    """
    if job.state in _RUNS:
        return job, ()
    if job.state is JobState.CANCELLING:
        raise WrongState(f"{job.name} is still {job.state}", reason="JOB_NOT_FINISHED", metadata={"state": job.state})
    if job.state not in {JobState.FAILED, JobState.CANCELLED}:
        raise WrongState(f"{job.name} is {job.state}", reason="JOB_NOT_RETRYABLE", metadata={"state": job.state})
    line = LogLine(severity="info", message="put back into the queue on request")
    keeps = job.files or job.model_version
    moved, events = _moved(
        job,
        JobState.QUEUED,
        error="",
        end_time=None,
        failures=0,
        interruptions=0,
        spared_s=job.run_s,
        **({} if keeps else {**_UNTRAINED, "generation": job.generation + 1}),
    )
    return moved, (line, *events)


def deletable(job: Job) -> None:
    """Raises WrongState (JOB_NOT_FINISHED) while a job may still run."""
    if not job.final:
        raise WrongState(
            f"{job.name} is {job.state}; cancel it first", reason="JOB_NOT_FINISHED", metadata={"state": job.state}
        )


def files_dropped(job: Job) -> Decision:
    """Nothing of an ended job is kept any more, beside what the ledger says."""
    return (dataclasses.replace(job, files=False) if job.final else job), ()


def cancel_requested(job: Job, now: datetime) -> Decision:
    """Somebody asks it to stop. Raises WrongState (JOB_FINISHED) when it ended in another way."""
    if job.state in {JobState.CANCELLING, JobState.CANCELLED}:
        return job, ()
    if job.final:
        raise _finished(job)
    if job.state in _HEARD:
        return _moved(job, JobState.CANCELLING)
    return cancelled(job, now)


def cancelled(job: Job, now: datetime) -> Decision:
    """It stopped on request."""
    ended = _attempt_ended(job, now, _CANCELLED_REASON)
    return _moved(ended, JobState.CANCELLED, phase=JobPhase.NONE, error="", end_time=now)


def shortened(line: LogLine) -> LogLine:
    """A line cut to LOG_LINE_BYTES_MAX, on a character boundary."""
    raw = line.message.encode()
    if len(raw) <= LOG_LINE_BYTES_MAX:
        return line
    return dataclasses.replace(line, message=raw[: LOG_LINE_BYTES_MAX - 3].decode(errors="ignore") + "…")


def _attempt_ended(job: Job, now: datetime, reason: str = "", *, charged: bool = False) -> Job:
    """The attempt that runs, if any, goes into the history."""
    if job.attempt_time is None:
        return job
    attempt = Attempt(
        number=job.attempts,
        start_time=job.attempt_time,
        end_time=max(job.attempt_time, now),
        reason=shortened(LogLine(severity="", message=reason)).message,
        charged=charged,
    )
    return dataclasses.replace(job, history=(*job.history, attempt)[-ATTEMPTS_KEPT:], attempt_time=None)


def _finished(job: Job) -> WrongState:
    return WrongState(f"{job.name} is {job.state} already", reason="JOB_FINISHED", metadata={"state": job.state})


def _ended(job: Job, reason: str, now: datetime) -> Decision:
    line = shortened(LogLine(severity="error", message=reason))
    moved, events = _moved(job, JobState.FAILED, phase=JobPhase.NONE, error=line.message, end_time=now)
    return moved, (line, *events)


def _told(job: Job, state: JobState, reason: str) -> Decision:
    """Move for a reason that a line tells."""
    line = shortened(LogLine(severity="warning", message=reason))
    moved, events = _moved(job, state, phase=JobPhase.NONE, error=line.message)
    return moved, (line, *events)


def _moved(job: Job, state: JobState, **changes: object) -> Decision:
    if state not in LEGAL[job.state]:
        raise WrongState(f"{job.name} is {job.state}, it cannot become {state}", reason="ILLEGAL_TRANSITION")
    return dataclasses.replace(job, state=state, **changes), (JobChanged(),)  # type: ignore[arg-type]
