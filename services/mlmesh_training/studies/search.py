"""Optuna's samplers and pruners over a study's history. Proposes and judges; remembers nothing of its own.

What is proposed next depends on the study's spec and its recorded trials alone: Optuna's state lives in memory, is
rebuilt from the ledger, and every trial is drawn by a sampler that is seeded with the study's seed and its number. So
a service that was killed goes on as one that was not. Not thread-safe: one thread uses a search from its making on.
Importing this module imports Optuna, which takes a third of a second.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna import distributions, pruners, samplers, storages
from optuna.trial import TrialState as State
from optuna.trial import create_trial

from mlmesh_training.options import Direction
from mlmesh_training.studies.space import Axis, grid_order, grid_point
from mlmesh_training.studies.study import Pruner, Recorded, Sampler, Study, Trial, TrialState

STARTUP_SHARE = 4
"""A quarter of a study's trials is drawn at random, and runs unpruned by the median, before any is judged by others."""
TPE_STARTUP_MAX = 10
MEDIAN_STARTUP_MAX = 5
REDUCTION_FACTOR = 3
"""Of the trials that reach a rung of Hyperband, one of so many goes on."""
_MARK = "completed_rung_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the pruner thinks of a trial: `pruning` says why to give it up; `marks` is what to remember of it."""

    marks: Mapping[str, float]
    pruning: str = ""


class Search:
    """The search of one study.

    Args:
        study: for its axes, sampler, pruner, direction, bounds and seed; its other fields are not looked at.
        history: all of its trials by number.
    """

    def __init__(self, study: Study, history: Sequence[Recorded]) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._about = study
        self._distributions = {axis.name: _distribution(axis) for axis in study.axes}
        self._axes = {axis.name: axis for axis in study.axes}
        self._grid = (
            grid_order(study.axes, seed=study.spec.seed, among=study.trials_max)
            if study.spec.sampler is Sampler.GRID
            else ()
        )
        self._storage = storages.InMemoryStorage()
        self._study = optuna.create_study(
            study_name=study.uid,
            storage=self._storage,
            direction="maximize" if study.direction is Direction.MAXIMIZE else "minimize",
            sampler=samplers.RandomSampler(seed=0),
            pruner=_pruner(study),
        )
        self._asked = 0
        for recorded in history:
            self._add(recorded.trial, recorded.values)

    def ask(self) -> dict[str, float]:
        """The hyperparameters of the next trial, whose number is that of trials so far."""
        number = self._asked
        if self._grid:
            point = grid_point(self._about.axes, self._grid[number])
            self._insert(State.RUNNING, point)
            return point
        self._study.sampler = self._sampler(number)
        drawn = self._study.ask(fixed_distributions=self._distributions)
        self._asked += 1
        return {name: _outer(axis, drawn.params[name]) for name, axis in self._axes.items()}

    def report(self, number: int, epoch: int, value: float) -> None:
        """Take a running trial's value after an epoch."""
        self._storage.set_trial_intermediate_value(self._id(number), epoch, value)

    def judge(self, number: int) -> Verdict:
        """Look at a running trial's latest value. Asking again without a new value changes nothing."""
        trial = self._storage.get_trial(self._id(number))
        prune = trial.last_step is not None and self._study.pruner.prune(self._study, trial)
        marks = self._storage.get_trial(self._id(number)).system_attrs
        kept = {name: float(value) for name, value in marks.items() if name.startswith(_MARK)}
        if not prune or trial.last_step is None:
            return Verdict(marks=kept)
        pruner = "the median of the others" if self._about.spec.pruner is Pruner.MEDIAN else "Hyperband asks for"
        value = trial.intermediate_values[trial.last_step]
        return Verdict(
            marks=kept,
            pruning=f"pruned after epoch {trial.last_step}: {self._about.metric} {value:.6g} is worse than {pruner}",
        )

    def tell(self, trial: Trial) -> None:
        """Take the end of a trial."""
        if trial.state is TrialState.COMPLETE:
            self._study.tell(trial.number, trial.value)
        else:
            state = State.PRUNED if trial.state is TrialState.PRUNED else State.FAIL
            self._study.tell(trial.number, state=state)

    def _add(self, trial: Trial, values: Mapping[int, float]) -> None:
        state, value = {
            TrialState.RUNNING: (State.RUNNING, None),
            TrialState.COMPLETE: (State.COMPLETE, trial.value),
            # What Optuna itself records when it is told of a pruned trial.
            TrialState.PRUNED: (State.PRUNED, values[max(values)] if values else None),
            TrialState.FAILED: (State.FAIL, None),
        }[trial.state]
        self._insert(state, trial.hyperparameters, values=values, marks=trial.marks, value=value)

    def _insert(
        self,
        state: State,
        point: Mapping[str, float],
        *,
        values: Mapping[int, float] | None = None,
        marks: Mapping[str, float] | None = None,
        value: float | None = None,
    ) -> None:
        self._study.add_trial(
            create_trial(
                state=state,
                value=value,
                params={name: _inner(axis, point[name]) for name, axis in self._axes.items()},
                distributions=self._distributions,
                system_attrs=dict(marks or {}),
                intermediate_values=dict(values or {}),
            )
        )
        self._asked += 1

    def _id(self, number: int) -> int:
        study = self._storage.get_study_id_from_name(self._about.uid)
        return self._storage.get_trial_id_from_study_id_trial_number(study, number)

    def _sampler(self, number: int) -> samplers.BaseSampler:
        text = f"{self._about.spec.seed}/{number}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        if self._about.spec.sampler is Sampler.RANDOM:
            return samplers.RandomSampler(seed=seed)
        startup = min(TPE_STARTUP_MAX, max(1, self._about.trials_max // STARTUP_SHARE))
        # A trial that runs counts as a bad one: so trials side by side do not try the same point.
        return samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=self._about.spec.parallel > 1)


def _pruner(study: Study) -> pruners.BasePruner:
    match study.spec.pruner:
        case Pruner.MEDIAN:
            startup = min(MEDIAN_STARTUP_MAX, max(1, study.trials_max // STARTUP_SHARE))
            return pruners.MedianPruner(n_startup_trials=startup)
        case Pruner.HYPERBAND:
            return pruners.HyperbandPruner(
                min_resource=1, max_resource=study.epochs_max, reduction_factor=REDUCTION_FACTOR
            )
        case Pruner.NONE:
            return pruners.NopPruner()


def _distribution(axis: Axis) -> distributions.BaseDistribution:
    if axis.count is not None:
        return distributions.IntDistribution(0, axis.count - 1)
    if axis.integer:
        return distributions.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return distributions.FloatDistribution(axis.low, axis.high, log=axis.log)


def _inner(axis: Axis, value: float) -> float | int:
    """A hyperparameter's value as Optuna knows it."""
    if axis.count is not None:
        return axis.index(value)
    return int(value) if axis.integer else value


def _outer(axis: Axis, value: float) -> float:
    """Optuna's value as the hyperparameter's."""
    return axis.at(int(value)) if axis.count is not None else float(value)
