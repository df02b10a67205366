"""What a training job is and how it may move. Pure: every decision is a function from a job to a job and its events.

QUEUED → RUNNING → SUCCEEDED, FAILED or CANCELLED; RUNNING → RETRYING → RUNNING when its process died and the budget
allows; RUNNING → CANCELLING on request. Final states never change. Times are timezone-aware UTC.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType

from mlmesh_runtime.errors import WrongState

RETRIES_DEFAULT = 2
INTERRUPTIONS_MAX = 20
"""Times in a row that a job may be interrupted by the service's own end, without a checkpoint in between."""
LOG_LINE_BYTES_MAX = 8192
"""Longest log line kept, UTF-8 bytes."""


class JobState(enum.StrEnum):
    """Where a job stands; names as in the contract."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    RETRYING = "RETRYING"
    CANCELLING = "CANCELLING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class JobPhase(enum.StrEnum):
    """What a running job is at; names as in the contract."""

    NONE = ""
    LOADING_DATA = "LOADING_DATA"
    TRAINING = "TRAINING"
    EVALUATING = "EVALUATING"
    EXPORTING = "EXPORTING"
    PUBLISHING = "PUBLISHING"


FINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})

LEGAL: Mapping[JobState, frozenset[JobState]] = MappingProxyType(
    {
        JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED}),
        JobState.RUNNING: frozenset({JobState.RETRYING, JobState.CANCELLING, JobState.SUCCEEDED, JobState.FAILED}),
        JobState.RETRYING: frozenset({JobState.RUNNING, JobState.CANCELLED, JobState.FAILED}),
        # A version that is being registered when the request comes is registered: then the job has succeeded.
        JobState.CANCELLING: frozenset({JobState.CANCELLED, JobState.SUCCEEDED}),
        JobState.SUCCEEDED: frozenset(),
        JobState.FAILED: frozenset(),
        JobState.CANCELLED: frozenset(),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """Where a trained model is registered: "models/{model}", and the aliases to move."""

    model: str
    aliases: tuple[str, ...] = ()
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What was asked, as it was asked. `retries_max`: 0 means the default, -1 none."""

    recipe: str
    dataset: str
    hyperparameters: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    retries_max: int = 0
    publication: Publication | None = None

    @property
    def retries(self) -> int:
        """Attempts allowed after the first."""
        return RETRIES_DEFAULT if self.retries_max == 0 else max(0, self.retries_max)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the fitting is: epochs and optimizer steps, done and in all."""

    epoch: int = 0
    epochs: int = 0
    step: int = 0
    steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Measures on held-out data; precision, recall and F1 are macro means. `confusion`: one row a true class."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    loss: float
    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    examples: int
    export_max_abs_diff: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One input or output of a model: Open Inference Protocol datatype, dimensions with -1 for a dynamic one."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file that training left in the job's folder, ready to publish."""

    path: str
    sha256: str
    size_bytes: int
    media_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """What a finished training left behind: files, signature, measures and where they came from."""

    files: tuple[File, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    evaluation: Evaluation
    labels: Mapping[str, str]
    dataset_fingerprint: str
    code_digest: str
    environment_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job and all that is known of it.

    Attributes:
        uid: the name is "jobs/{uid}".
        hyperparameters: all of the recipe's, resolved when the job was accepted.
        attempts: processes started.
        failures: attempts that ended by their own fault; these use up the retries.
        interruptions: attempts in a row cut off by the service's own end, without a checkpoint in between.
        trained: set once training has left a model; from then on only publishing is left.
        registering: set before the version is created, so that a crash or a cancellation knows it may exist.
        last_sequence: of its latest event.
    """

    uid: str
    spec: JobSpec
    hyperparameters: Mapping[str, float]
    create_time: datetime
    creator: str = ""
    state: JobState = JobState.QUEUED
    phase: JobPhase = JobPhase.NONE
    progress: Progress = Progress()
    evaluation: Evaluation | None = None
    trained: TrainedModel | None = None
    registering: bool = False
    model_version: str = ""
    attempts: int = 0
    failures: int = 0
    interruptions: int = 0
    error: str = ""
    start_time: datetime | None = None
    end_time: datetime | None = None
    last_sequence: int = 0

    @property
    def name(self) -> str:
        """Resource name."""
        return f"jobs/{self.uid}"

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.state in FINAL


@dataclass(frozen=True, slots=True, kw_only=True)
class JobChanged:
    """State or phase changed. The ledger fills `job` with the job as of this event."""

    job: Job | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Figures at one point of the fitting."""

    progress: Progress
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """A line that the job wrote; severity is "info", "warning" or "error"."""

    severity: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Training can resume from here. sha256: of the file, hex."""

    progress: Progress
    sha256: str


EventBody = JobChanged | Metrics | LogLine | Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One entry of a job's history. Sequences count up from 1 without gap."""

    sequence: int
    time: datetime
    body: EventBody


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
