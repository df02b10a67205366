"""Optuna over fake objectives: what it proposes depends on the recorded history alone, and it finds what is good."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest

pytest.importorskip("optuna")

from mlmesh_training.studies.search import Search
from mlmesh_training.studies.space import Dimension
from mlmesh_training.studies.study import Pruner, Recorded, Sampler, Study, Trial, TrialState
from tests.support.studies import RATES, WIDTHS, study
from tests.support.training import START

DIMENSIONS = (
    RATES,
    WIDTHS,
    Dimension(name="dropout", low=0.0, high=0.9, step=0.1),
    Dimension(name="shift", low=0, high=4),
    Dimension(name="weight_decay", low=0.25, high=0.25),
)


def searched(**spec: Any) -> Study:
    return study(
        spec={
            "dimensions": DIMENSIONS,
            "trials_max": 40,
            "job": {"hyperparameters": {"epochs": 9.0}},
            **spec,
        }
    )


class Run:
    """A study of a fake objective, whose trials get on in an order drawn by chance."""

    def __init__(self, known: Study, *, chance: int = 0, epochs: int = 9) -> None:
        self.known = known
        self.search = Search(known, [])
        self.recorded: list[Recorded] = []
        self.epochs = epochs
        self._chance = random.Random(chance)  # noqa: S311

    def rebuilt(self) -> Search:
        return Search(self.known, self.recorded)

    def ask(self) -> dict[str, float]:
        point = self.search.ask()
        trial = Trial(number=len(self.recorded), hyperparameters=point, create_time=START)
        self.recorded.append(Recorded(trial=trial, values={}))
        return point

    def step(self) -> None:
        """One of the running trials gets on by an epoch, or ends."""
        number = self._chance.choice(self.running)
        trial, values = self.recorded[number].trial, dict(self.recorded[number].values)
        epoch = trial.epoch + 1
        values[epoch] = objective(trial.hyperparameters) + 0.01 * epoch
        self.search.report(number, epoch, values[epoch])
        verdict = self.search.judge(number)
        trial = dataclasses.replace(trial, epoch=epoch, value=values[epoch], marks=verdict.marks)
        if verdict.pruning and epoch < self.epochs:
            trial = dataclasses.replace(trial, state=TrialState.PRUNED, reason=verdict.pruning)
        elif self._chance.random() < 0.02:
            trial = dataclasses.replace(trial, state=TrialState.FAILED)
        elif epoch == self.epochs:
            trial = dataclasses.replace(trial, state=TrialState.COMPLETE)
        if trial.state is not TrialState.RUNNING:
            self.search.tell(trial)
        self.recorded[number] = Recorded(trial=trial, values=values)

    @property
    def running(self) -> list[int]:
        return [each.trial.number for each in self.recorded if each.trial.state is TrialState.RUNNING]

    def go(self, trials: int) -> None:
        while len(self.recorded) < trials or self.running:
            if len(self.recorded) < trials and len(self.running) < self.known.spec.parallel:
                self.ask()
            else:
                self.step()

    def count(self, state: TrialState) -> int:
        return sum(each.trial.state is state for each in self.recorded)


def objective(point: dict[str, float] | Any) -> float:
    """Greatest, 0, at a rate of 0.01 without dropout."""
    return float(-abs(point["learning_rate"] - 0.01) * 5 - point["dropout"])


@pytest.mark.parametrize(
    ("sampler", "pruner", "parallel"),
    [
        (Sampler.TPE, Pruner.HYPERBAND, 4),
        (Sampler.TPE, Pruner.NONE, 1),
        (Sampler.RANDOM, Pruner.MEDIAN, 3),
        (Sampler.TPE, Pruner.MEDIAN, 2),
    ],
)
def test_rebuilt_at_any_moment_it_goes_on_as_if_nothing_had_happened(
    sampler: Sampler, pruner: Pruner, parallel: int
) -> None:
    whole = Run(searched(sampler=sampler, pruner=pruner, parallel_max=parallel))
    cut = Run(searched(sampler=sampler, pruner=pruner, parallel_max=parallel))
    whole.go(24)
    moments = itertools.count()
    while len(cut.recorded) < 24 or cut.running:
        if next(moments) % 7 == 0:
            cut.search = cut.rebuilt()
        if len(cut.recorded) < 24 and len(cut.running) < parallel:
            cut.ask()
        else:
            cut.step()
    assert cut.recorded == whole.recorded
    if pruner is not Pruner.NONE:
        assert whole.count(TrialState.PRUNED) > 0


def test_points_are_within_what_is_searched() -> None:
    run = Run(searched(sampler=Sampler.TPE))
    run.go(15)
    for recorded in run.recorded:
        point = recorded.trial.hyperparameters
        assert list(point) == [dimension.name for dimension in DIMENSIONS]
        assert 1e-4 <= point["learning_rate"] <= 1e-1
        assert point["width"] in WIDTHS.values
        assert point["dropout"] in {0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9}
        assert point["shift"] in range(5)
        assert point["weight_decay"] == 0.25
    assert len({recorded.trial.hyperparameters["learning_rate"] for recorded in run.recorded}) == 15


def test_tpe_finds_better_points_than_chance() -> None:
    """Of the later trials, the median: one lucky point proves nothing."""
    found = {}
    for sampler in (Sampler.TPE, Sampler.RANDOM):
        run = Run(searched(sampler=sampler), epochs=1)
        run.go(36)
        later = sorted(objective(recorded.trial.hyperparameters) for recorded in run.recorded[18:])
        found[sampler] = later[len(later) // 2]
    assert found[Sampler.TPE] > found[Sampler.RANDOM] + 0.05


def test_trials_side_by_side_are_not_the_same_point() -> None:
    run = Run(searched(sampler=Sampler.TPE, parallel_max=8), epochs=1)
    run.go(16)
    at_once = [run.ask() for _ in range(8)]
    assert len({tuple(point.values()) for point in at_once}) == 8


def test_another_seed_is_another_search() -> None:
    first, second, third = (Search(searched(seed=seed), []).ask() for seed in (1, 1, 2))
    assert first == second != third


def test_a_grid_is_visited_point_by_point_also_over_a_rebuild() -> None:
    known = study(
        spec={
            "sampler": Sampler.GRID,
            "dimensions": (WIDTHS, Dimension(name="shift", low=0, high=4, step=2)),
            "trials_max": 100,
        }
    )
    assert known.trials_max == 9
    run = Run(known)
    for number in range(9):
        if number == 4:
            run.search = run.rebuilt()
        run.ask()
    points = [tuple(recorded.trial.hyperparameters.values()) for recorded in run.recorded]
    assert sorted(points) == sorted(itertools.product(WIDTHS.values, (0.0, 2.0, 4.0)))


@pytest.mark.parametrize("pruner", [Pruner.MEDIAN, Pruner.HYPERBAND])
def test_a_bad_trial_is_given_up_and_a_good_one_is_not(pruner: Pruner) -> None:
    known = searched(pruner=pruner, sampler=Sampler.RANDOM, trials_max=8)
    search = Search(known, [])
    point = dict.fromkeys((dimension.name for dimension in DIMENSIONS), 0.0) | {"width": 8.0, "learning_rate": 0.01}
    given_up: list[int] = []
    for number in range(8):
        search.ask()
        good = number % 4 != 3
        for epoch in range(1, 10):
            search.report(number, epoch, (0.9 if good else 0.1) + number / 1000 + epoch / 100)
            verdict = search.judge(number)
            assert search.judge(number).marks == verdict.marks
            if verdict.pruning:
                given_up.append(number)
                assert verdict.pruning.startswith(f"pruned after epoch {epoch}: validation_accuracy 0.")
                break
        state = TrialState.PRUNED if verdict.pruning else TrialState.COMPLETE
        search.tell(Trial(number=number, hyperparameters=point, create_time=START, state=state, value=0.9))
    # Hyperband's brackets look at a trial at different epochs, and compare it with those of its own bracket.
    assert given_up == [3, 7] if pruner is Pruner.MEDIAN else given_up and set(given_up) <= {3, 7}
