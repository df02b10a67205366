"""What a training job is, as values; how it moves is in `moves`. Pure. Times are timezone-aware UTC.

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

from mlmesh_training.options import Distribution, FitOptions, Optimization, Resources

RETRIES_DEFAULT = 2
INTERRUPTIONS_MAX = 20
"""Times in a row that a job may be interrupted by the service's own end, without a checkpoint in between."""
ATTEMPTS_KEPT = 100
"""Attempts kept in a job's history."""
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
    PAUSING = "PAUSING"
    PAUSED = "PAUSED"


class JobPhase(enum.StrEnum):
    """What a running job is at; names as in the contract."""

    NONE = ""
    LOADING_DATA = "LOADING_DATA"
    TRAINING = "TRAINING"
    EVALUATING = "EVALUATING"
    EXPORTING = "EXPORTING"
    PUBLISHING = "PUBLISHING"
    OPTIMIZING = "OPTIMIZING"


FINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
WAITING = frozenset({JobState.QUEUED, JobState.RETRYING})
"""Of these the scheduler chooses."""

LEGAL: Mapping[JobState, frozenset[JobState]] = MappingProxyType(
    {
        JobState.QUEUED: frozenset({JobState.RUNNING, JobState.PAUSED, JobState.CANCELLED}),
        JobState.RUNNING: frozenset(
            {JobState.RETRYING, JobState.PAUSING, JobState.CANCELLING, JobState.SUCCEEDED, JobState.FAILED}
        ),
        JobState.RETRYING: frozenset({JobState.RUNNING, JobState.PAUSED, JobState.CANCELLED, JobState.FAILED}),
        # A job may end while it is asked to pause: there was nothing left to do, or it failed for good.
        JobState.PAUSING: frozenset({JobState.PAUSED, JobState.CANCELLING, JobState.SUCCEEDED, JobState.FAILED}),
        JobState.PAUSED: frozenset({JobState.QUEUED, JobState.CANCELLED}),
        # A version that is being registered when the request comes is registered: then the job has succeeded.
        JobState.CANCELLING: frozenset({JobState.CANCELLED, JobState.SUCCEEDED}),
        JobState.SUCCEEDED: frozenset(),
        # Only by RetryJob.
        JobState.FAILED: frozenset({JobState.QUEUED}),
        JobState.CANCELLED: frozenset({JobState.QUEUED}),
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
    """What was asked, as it was asked.

    Attributes:
        dataset: a name, or "models/{model}/versions/{number}" or "models/{model}/aliases/{alias}" of a registered one.
        retries_max: 0 means the default, -1 none.
        priority: greater runs first.
        resources: what is 0 takes the service's default.
        time_limit_s: of all attempts together; 0 means the service's limit.
    """

    recipe: str
    dataset: str
    hyperparameters: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    retries_max: int = 0
    publication: Publication | None = None
    priority: int = 0
    resources: Resources = dataclasses.field(default_factory=Resources)
    distribution: Distribution = dataclasses.field(default_factory=Distribution)
    fit: FitOptions = dataclasses.field(default_factory=FitOptions)
    time_limit_s: float = 0.0
    optimization: Optimization | None = None
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def registered_dataset(self) -> bool:
        """Whether the data set is one of the registry's."""
        return self.dataset.startswith("models/")

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
class CalibrationBin:
    """One bin of a reliability diagram: its examples, their mean confidence, the share of right answers."""

    examples: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Probability of the predicted class against how often it was right; bins are equal, from 0 to 1."""

    expected_error: float
    max_error: float
    brier: float
    bins: tuple[CalibrationBin, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """How fast the exported model answers requests of one batch size, seconds."""

    batch_size: int
    median_s: float
    p95_s: float
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RegressionErrors:
    """Errors in the unit of the target."""

    mean_absolute_error: float
    root_mean_squared_error: float
    r2: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Measures on held-out data; precision, recall and F1 are macro means. `confusion`: one row a true class.

    Of a regressor only `loss`, `examples`, `latency` and `regression` say something.
    """

    accuracy: float = 0.0
    precision: float = 0.0
    recall: float = 0.0
    f1: float = 0.0
    loss: float
    labels: tuple[str, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    examples: int
    export_max_abs_diff: float = 0.0
    calibration: Calibration | None = None
    latency: tuple[Latency, ...] = ()
    regression: RegressionErrors | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizationResult:
    """An optimised model against its source, on the same held-out data.

    `technique` is "int8", "fp16", "bf16", "pruned", "2:4" or "distilled"; `sparsity` the share of weights that are
    zero; `quality_drop` in the unit of `quality_drop_max`, negative when it got better.
    """

    source: str
    technique: str
    before: Evaluation
    after: Evaluation
    size_bytes_before: int
    size_bytes_after: int
    sparsity: float = 0.0
    quality_drop: float
    quality_drop_max: float


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
    optimization: OptimizationResult | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Further figures to register with the version, beside those of the evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One run of a job's processes that ended.

    `number` counts up from 1; `reason` is empty when it did all there was to do; `charged`: it used up a part of the
    retry budget.
    """

    number: int
    start_time: datetime
    end_time: datetime
    reason: str = ""
    charged: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job and all that is known of it.

    Attributes:
        uid: the name is "jobs/{uid}".
        hyperparameters: all of the recipe's, resolved when the job was accepted.
        attempts: started, since the job was accepted.
        failures: attempts that ended by their own fault; these use up the retries. RetryJob starts anew at 0.
        interruptions: attempts in a row cut off by the service's own end, without a checkpoint in between.
        trained: set once training has left a model; from then on only publishing is left.
        registering: set before the version is created, so that a crash or a cancellation knows it may exist.
        last_sequence: of its latest event.
        study: "studies/{study}" that it is a trial of, or empty.
        resolved_dataset: the version that the data set meant when the job was accepted, or the named data set.
        resolved_source: the version that an optimisation's source meant then.
        resources: what it occupies while it runs, defaults filled in.
        history: attempts that ended, oldest first, at most ATTEMPTS_KEPT.
        run_s: seconds that its attempts ran, added up; by a clock that does not jump.
        spared_s: of these, the ones from before the last RetryJob: the time limit does not count them.
        attempt_time: when the attempt that runs now began.
        attempt_from_s: `run_s` at that moment.
        generation: how often it had to be trained anew from the start, by RetryJob after its files were gone.
        files: whether anything of it is kept in its folder.
        queue_position: jobs ahead of it, while it is queued; filled in when it is read.
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
    study: str = ""
    resolved_dataset: str = ""
    resolved_source: str = ""
    resources: Resources = dataclasses.field(default_factory=Resources)
    history: tuple[Attempt, ...] = ()
    run_s: float = 0.0
    spared_s: float = 0.0
    attempt_time: datetime | None = None
    attempt_from_s: float = 0.0
    generation: int = 0
    files: bool = False
    optimization: OptimizationResult | None = None
    queue_position: int = 0

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
