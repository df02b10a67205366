"""What a study is and how it and its trials may move. Pure: every decision is a function from values to values.

RUNNING → STOPPING → STOPPED or FAILED; RUNNING or STOPPING → PUBLISHING → SUCCEEDED, STOPPED or FAILED. Trials go from
RUNNING to COMPLETE, PRUNED or FAILED and stay there. Times are timezone-aware UTC.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType

from mlmesh_runtime.errors import WrongState
from mlmesh_training.jobs import JobSpec
from mlmesh_training.options import Direction
from mlmesh_training.studies.space import Axis, Dimension, grid_points

TRIALS_DEFAULT = 20
FAILURES_DEFAULT = 3
REASON_CHARACTERS_MAX = 2000
"""Longest reason kept of a trial or a study."""


class StudyState(enum.StrEnum):
    """Where a study stands; names as in the contract."""

    RUNNING = "RUNNING"
    STOPPING = "STOPPING"
    PUBLISHING = "PUBLISHING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"


class TrialState(enum.StrEnum):
    """Where a trial stands; names as in the contract."""

    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    FAILED = "FAILED"


class Sampler(enum.StrEnum):
    """How the values of the next trial are chosen."""

    TPE = "TPE"
    RANDOM = "RANDOM"
    GRID = "GRID"


class Pruner(enum.StrEnum):
    """When a trial is given up before its end."""

    NONE = "NONE"
    MEDIAN = "MEDIAN"
    HYPERBAND = "HYPERBAND"


FINAL = frozenset({StudyState.SUCCEEDED, StudyState.FAILED, StudyState.STOPPED})

LEGAL: Mapping[StudyState, frozenset[StudyState]] = MappingProxyType(
    {
        StudyState.RUNNING: frozenset(
            {StudyState.STOPPING, StudyState.PUBLISHING, StudyState.SUCCEEDED, StudyState.FAILED}
        ),
        StudyState.STOPPING: frozenset({StudyState.PUBLISHING, StudyState.STOPPED, StudyState.FAILED}),
        StudyState.PUBLISHING: frozenset({StudyState.SUCCEEDED, StudyState.STOPPED, StudyState.FAILED}),
        StudyState.SUCCEEDED: frozenset(),
        StudyState.FAILED: frozenset(),
        StudyState.STOPPED: frozenset(),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySpec:
    """What was asked, as it was asked; the properties say what zeros mean."""

    job: JobSpec
    dimensions: tuple[Dimension, ...]
    sampler: Sampler = Sampler.TPE
    pruner: Pruner = Pruner.NONE
    metric: str = ""
    direction: Direction | None = None
    trials_max: int = 0
    parallel_max: int = 0
    seed: int = 0
    failures_max: int = 0

    @property
    def parallel(self) -> int:
        """Trials at once."""
        return self.parallel_max or 1

    @property
    def failures(self) -> int:
        """Trials that may fail."""
        return FAILURES_DEFAULT if self.failures_max == 0 else max(0, self.failures_max)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Trials by state."""

    running: int = 0
    complete: int = 0
    pruned: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One point of the search and the job that tries it.

    Attributes:
        job: uid of its job; empty for the moment between its choice and the job's acceptance.
        hyperparameters: those that were chosen.
        value: the objective's; the latest one while it runs.
        peak: the best value of all epochs so far.
        marks: what the pruner remembers of it.
        pruning: why it is being given up; empty while it is not.
        reason: why it ended other than by COMPLETE.
    """

    number: int
    hyperparameters: Mapping[str, float]
    create_time: datetime
    job: str = ""
    state: TrialState = TrialState.RUNNING
    value: float | None = None
    peak: float | None = None
    epoch: int = 0
    marks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    pruning: str = ""
    reason: str = ""
    end_time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A trial with its value after each epoch."""

    trial: Trial
    values: Mapping[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A search and all that is known of it.

    Attributes:
        uid: the name is "studies/{uid}".
        axes: the dimensions with the recipe's bounds filled in, resolved when the study was accepted.
        metric, direction: the objective, resolved.
        trials_max: trials in all; for a grid no more than its points.
        epochs_max: most epochs that a trial can have; the pruner's full resource.
        chosen: trials chosen so far, which is the number of the next one.
        asked_to_stop: somebody asked for its end.
        dataset, source: what the data set and an optimisation's source meant when the study was accepted.
        error: why it failed or is failing.
        last_failure: the latest trial that failed, and why.
    """

    uid: str
    spec: StudySpec
    axes: tuple[Axis, ...]
    metric: str
    direction: Direction
    trials_max: int
    epochs_max: int
    dataset: str
    create_time: datetime
    source: str = ""
    creator: str = ""
    state: StudyState = StudyState.RUNNING
    counts: Counts = Counts()
    chosen: int = 0
    best: Trial | None = None
    asked_to_stop: bool = False
    model_version: str = ""
    error: str = ""
    last_failure: str = ""
    end_time: datetime | None = None
    last_sequence: int = 0

    @property
    def name(self) -> str:
        """Resource name."""
        return f"studies/{self.uid}"

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.state in FINAL

    @property
    def wants_trial(self) -> bool:
        """Whether another trial is to begin now."""
        return (
            self.state is StudyState.RUNNING
            and self.counts.running < self.spec.parallel
            and self.chosen < self.trials_max
        )

    @property
    def exhausted(self) -> bool:
        """Whether all its trials have ended and no other will begin."""
        return self.counts.running == 0 and (
            self.state is StudyState.STOPPING or (self.state is StudyState.RUNNING and self.chosen >= self.trials_max)
        )

    def keeps(self, job: str) -> bool:
        """Whether the files of a trial's ended job are still needed: those of the best, until it is published."""
        return (
            not self.final and self.spec.job.publication is not None and self.best is not None and self.best.job == job
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyChanged:
    """The study changed. The ledger fills in the study as of this event."""

    study: Study | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialChanged:
    """A trial began, got on or ended. The ledger fills in the trial as of this event."""

    trial: Trial | None = None


EventBody = StudyChanged | TrialChanged


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One entry of a study's history. Sequences count up from 1 without gap."""

    sequence: int
    time: datetime
    body: EventBody


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a step changes: the study, the trial it was about, and the events that tell of it, in order."""

    study: Study
    trial: Trial | None = None
    events: tuple[EventBody, ...] = ()


def trial_spec(study: Study, trial: Trial) -> JobSpec:
    """What a trial's job does. The same trial always gives the same."""
    job, optimization = study.spec.job, study.spec.job.optimization
    if optimization is not None and study.source:
        optimization = dataclasses.replace(optimization, source=study.source)
    return dataclasses.replace(
        job,
        dataset=study.dataset,
        hyperparameters={**job.hyperparameters, **trial.hyperparameters},
        publication=None,
        optimization=optimization,
    )


def trials_in_all(spec: StudySpec, axes: tuple[Axis, ...]) -> int:
    """Trials that a study of this spec has at most."""
    asked = spec.trials_max or TRIALS_DEFAULT
    return min(asked, grid_points(axes)) if spec.sampler is Sampler.GRID else asked


def better(value: float, than: float, direction: Direction) -> bool:
    """Whether a value of the objective beats another."""
    return value > than if direction is Direction.MAXIMIZE else value < than


def chosen(study: Study, now: datetime, *, hyperparameters: Mapping[str, float]) -> Decision:
    """The next trial is chosen, unless none may begin any more. It is told of once its job is known."""
    if not study.wants_trial:
        return Decision(study=study)
    trial = Trial(number=study.chosen, hyperparameters=dict(hyperparameters), create_time=now)
    counts = dataclasses.replace(study.counts, running=study.counts.running + 1)
    return Decision(study=dataclasses.replace(study, chosen=study.chosen + 1, counts=counts), trial=trial)


def begun(study: Study, trial: Trial, _now: datetime, *, job: str) -> Decision:
    """The trial's job is accepted."""
    if trial.job:
        return Decision(study=study, trial=trial)
    return Decision(study=study, trial=dataclasses.replace(trial, job=job), events=(TrialChanged(), StudyChanged()))


def measured(study: Study, trial: Trial, _now: datetime, *, epoch: int, value: float) -> Decision:
    """An epoch of the trial ended with a value. One that is known already, or is no number, changes nothing."""
    if trial.state is not TrialState.RUNNING or epoch <= trial.epoch or not math.isfinite(value):
        return Decision(study=study, trial=trial)
    peak = value if trial.peak is None or better(value, trial.peak, study.direction) else trial.peak
    return Decision(
        study=study, trial=dataclasses.replace(trial, epoch=epoch, value=value, peak=peak), events=(TrialChanged(),)
    )


def judged(study: Study, trial: Trial, _now: datetime, *, marks: Mapping[str, float], pruning: str) -> Decision:
    """The pruner looked at the trial's latest value; `pruning` says why to give it up, empty to go on."""
    if trial.state is not TrialState.RUNNING or trial.pruning:
        return Decision(study=study, trial=trial)
    return Decision(study=study, trial=dataclasses.replace(trial, marks=dict(marks), pruning=pruning))


def succeeded(study: Study, trial: Trial, now: datetime) -> Decision:
    """The trial's job ended well. Without a value of the objective the trial has failed all the same."""
    if trial.state is not TrialState.RUNNING:
        return Decision(study=study, trial=trial)
    value = trial.peak if study.spec.job.fit.restore_best else trial.value
    if value is None:
        return failed(study, trial, now, reason=f"its job reported no {study.metric!r}")
    done = dataclasses.replace(trial, state=TrialState.COMPLETE, value=value, pruning="", end_time=now)
    best = study.best
    if best is None or best.value is None or better(value, best.value, study.direction):
        best = done
    counts = dataclasses.replace(study.counts, running=study.counts.running - 1, complete=study.counts.complete + 1)
    return _told(dataclasses.replace(study, counts=counts, best=best), done)


def pruned(study: Study, trial: Trial, now: datetime) -> Decision:
    """The trial's job was stopped because the trial was given up."""
    if trial.state is not TrialState.RUNNING:
        return Decision(study=study, trial=trial)
    done = dataclasses.replace(trial, state=TrialState.PRUNED, reason=trial.pruning, end_time=now)
    counts = dataclasses.replace(study.counts, running=study.counts.running - 1, pruned=study.counts.pruned + 1)
    return _told(dataclasses.replace(study, counts=counts), done)


def failed(study: Study, trial: Trial, now: datetime, *, reason: str) -> Decision:
    """The trial's job failed or was cancelled. One failure too many, and the study fails once its trials have ended."""
    if trial.state is not TrialState.RUNNING:
        return Decision(study=study, trial=trial)
    reason = shortened(reason)
    done = dataclasses.replace(trial, state=TrialState.FAILED, reason=reason, end_time=now)
    counts = dataclasses.replace(study.counts, running=study.counts.running - 1, failed=study.counts.failed + 1)
    changed = dataclasses.replace(study, counts=counts)
    if study.state is StudyState.RUNNING:
        changed = dataclasses.replace(changed, last_failure=shortened(f"trial {trial.number}: {reason}"))
        if counts.failed > study.spec.failures:
            text = f"{counts.failed} trials failed, {study.spec.failures} may; the last, {changed.last_failure}"
            changed = dataclasses.replace(changed, state=StudyState.STOPPING, error=shortened(text))
    return _told(changed, done)


def stop_requested(study: Study, _now: datetime) -> Decision:
    """Somebody asks it to stop. Errors: WrongState (STUDY_FINISHED) when it ended in another way."""
    if study.state in {StudyState.STOPPING, StudyState.STOPPED, StudyState.PUBLISHING}:
        return Decision(study=study)
    if study.final:
        raise WrongState(
            f"{study.name} is {study.state} already", reason="STUDY_FINISHED", metadata={"state": study.state}
        )
    return _moved(study, StudyState.STOPPING, asked_to_stop=True)


def aborted(study: Study, _now: datetime, *, reason: str) -> Decision:
    """No further trial can begin, for a reason that no waiting changes: it fails once its trials have ended."""
    if study.state is not StudyState.RUNNING:
        return Decision(study=study)
    return _moved(study, StudyState.STOPPING, error=shortened(reason))


def closed(study: Study, now: datetime) -> Decision:
    """All trials have ended: the best is to be published, or this is the end."""
    if not study.exhausted:
        return Decision(study=study)
    if study.error:
        return _moved(study, StudyState.FAILED, end_time=now)
    if study.best is not None and study.spec.job.publication is not None:
        return _moved(study, StudyState.PUBLISHING)
    if study.asked_to_stop:
        return _moved(study, StudyState.STOPPED, end_time=now)
    if study.best is None:
        text = f"no trial succeeded: {study.counts.failed} failed, {study.counts.pruned} pruned"
        text = f"{text}; the last failure, {study.last_failure}" if study.last_failure else text
        return _moved(study, StudyState.FAILED, error=shortened(text), end_time=now)
    return _moved(study, StudyState.SUCCEEDED, end_time=now)


def registered(study: Study, _now: datetime, *, version: str) -> Decision:
    """The best trial's version exists; aliases may still have to move."""
    if study.final or study.model_version == version:
        return Decision(study=study)
    return Decision(study=dataclasses.replace(study, model_version=version), events=(StudyChanged(),))


def published(study: Study, now: datetime) -> Decision:
    """All that was asked is done."""
    if study.state is not StudyState.PUBLISHING:
        return Decision(study=study)
    return _moved(study, StudyState.STOPPED if study.asked_to_stop else StudyState.SUCCEEDED, end_time=now)


def publication_failed(study: Study, now: datetime, *, reason: str) -> Decision:
    """The best trial could not be published."""
    if study.state is not StudyState.PUBLISHING:
        return Decision(study=study)
    return _moved(study, StudyState.FAILED, error=shortened(reason), end_time=now)


def shortened(text: str) -> str:
    """A reason cut to REASON_CHARACTERS_MAX."""
    return text if len(text) <= REASON_CHARACTERS_MAX else f"{text[: REASON_CHARACTERS_MAX - 1]}…"


def _told(study: Study, trial: Trial) -> Decision:
    return Decision(study=study, trial=trial, events=(TrialChanged(), StudyChanged()))


def _moved(study: Study, state: StudyState, **changes: object) -> Decision:
    if state not in LEGAL[study.state]:
        raise WrongState(f"{study.name} is {study.state}, it cannot become {state}", reason="ILLEGAL_TRANSITION")
    moved = dataclasses.replace(study, state=state, **changes)  # type: ignore[arg-type]
    return Decision(study=moved, events=(StudyChanged(),))
