"""The port between the service and the place where a job's training runs. Pure values."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mlmesh_training.jobs import Checkpoint, Evaluation, JobPhase, LogLine, Metrics, OptimizationResult, TrainedModel
from mlmesh_training.options import Distribution, FitOptions, Optimization, Resources

TASK_FILE = "task.json"
"""In a job's folder: what to train."""
RESULT_FILE = "result.json"
"""In a job's folder: what training left. It is written last and whole; where it is, training is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTask:
    """What to train. The same task always gives the same model; `uid` names the place that outlives an attempt.

    Attributes:
        dataset: name of a named data set; empty for a registered one, whose files are then in `<folder>/dataset/`.
        dataset_version: "models/{model}/versions/{number}" of a registered one, else empty.
        hyperparameters: all of the recipe's, defaults filled in.
        optimization: set to optimise a version, whose files are then in `<folder>/source/`.
        attempt: counts up from 1.
        threads: of torch in each process; 0 leaves it to the backend.
        gpus: indexes of the GPUs that are this attempt's, among those that the service sees.
        resources: what the whole job asks for; what is 0 it leaves to the backend.
    """

    uid: str
    recipe: str
    dataset: str
    dataset_version: str = ""
    hyperparameters: Mapping[str, float]
    seed: int
    fit: FitOptions = field(default_factory=FitOptions)
    distribution: Distribution = field(default_factory=Distribution)
    optimization: Optimization | None = None
    attempt: int = 1
    threads: int = 0
    gpus: tuple[int, ...] = ()
    resources: Resources = field(default_factory=Resources)


Report = JobPhase | Metrics | LogLine | Checkpoint | Evaluation | OptimizationResult
"""What training tells while it runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Training left a model."""

    model: TrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Died:
    """The attempt ended without a model. `permanent`: the same task would end in the same way again."""

    reason: str
    permanent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """The attempt ended because it was asked to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused:
    """The attempt wrote a checkpoint and ended because it was asked to; another goes on from there."""


Outcome = Finished | Died | Stopped | Paused


class Backend(Protocol):
    """A place where training runs."""

    async def run(
        self,
        task: TrainingTask,
        *,
        report: Callable[[Report], Awaitable[None]],
        stop: asyncio.Event,
        pause: asyncio.Event,
    ) -> Outcome:
        """Run one attempt, from the last complete checkpoint, to its end.

        `report` is awaited for each report, in order. Once `pause` is set the attempt writes a checkpoint at its next
        step and ends as Paused, or goes on to its end where no step is left; an attempt that dies meanwhile has died.
        Once `stop` is set the attempt is ended, paused or not. Both may be set before this is called. When this
        returns, raises or is cancelled, nothing of the attempt runs any more.
        """
        ...

    def folder(self, uid: str) -> Path:
        """The task's folder on this service's disk: what was fetched for it, and what it left to be published."""
        ...

    async def discard(self, uid: str) -> None:
        """Throw away all that is kept of a task: checkpoints and model. Idempotent."""
        ...
