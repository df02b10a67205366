"""Studies and trials move legally, count right and know their best."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_runtime.errors import InvalidInput, WrongState
from mlmesh_training.jobs import Publication
from mlmesh_training.options import Direction, FitOptions
from mlmesh_training.queue import DEFAULT_CAPACITY
from mlmesh_training.studies import acceptance
from mlmesh_training.studies import study as steps
from mlmesh_training.studies.space import Dimension
from mlmesh_training.studies.study import (
    Counts,
    Sampler,
    Study,
    StudyChanged,
    StudyState,
    Trial,
    TrialChanged,
    TrialState,
)
from tests.support.studies import begun, both, study, study_spec
from tests.support.training import PUBLICATION, START


def measured(known: Study, trial: Trial, *values: float) -> tuple[Study, Trial]:
    for epoch, value in enumerate(values, trial.epoch + 1):
        known, trial = both(steps.measured(known, trial, START, epoch=epoch, value=value))
    return known, trial


def complete(known: Study, *values: float) -> Study:
    known, trial = measured(*begun(known), *values)
    return steps.succeeded(known, trial, START).study


def test_zeros_mean_what_the_contract_says() -> None:
    known = study(spec={"trials_max": 0})
    assert (known.trials_max, known.spec.parallel, known.spec.failures) == (20, 1, 3)
    assert (known.metric, known.direction) == ("validation_accuracy", Direction.MAXIMIZE)
    assert study(spec={"failures_max": -1}).spec.failures == 0
    assert study(spec={"metric": "validation_loss"}).direction is Direction.MINIMIZE
    assert study(spec={"metric": "validation_loss", "direction": Direction.MAXIMIZE}).direction is Direction.MAXIMIZE
    assert known.epochs_max == 2
    assert study(spec={"dimensions": (Dimension(name="epochs", low=1, high=9),)}).epochs_max == 9


def test_a_grid_has_no_more_trials_than_points() -> None:
    grid = {"sampler": Sampler.GRID, "dimensions": (Dimension(name="width", values=(8.0, 16.0)),)}
    assert study(spec=grid).trials_max == 2
    assert study(spec={**grid, "trials_max": 1}).trials_max == 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"job": {"recipe": "transformer"}}, "spec.job.recipe"),
        ({"job": {"dataset": "imagenet"}}, "spec.job.dataset"),
        ({"job": {"hyperparameters": {"epochs": 0.0}}}, "spec.job.hyperparameters['epochs']"),
        # More than there are examples to train on: no bound of the recipe, but of the data set.
        (
            {
                "dimensions": (Dimension(name="batch_size", low=64, high=1024),),
                "job": {"dataset": "iris", "recipe": "tabular"},
            },
            "spec.dimensions[0]",
        ),
    ],
)
def test_a_study_whose_trials_would_be_refused_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        acceptance.accepted(study_spec(**changes), uid="x", creator="", now=START, capacity=DEFAULT_CAPACITY)
    assert raised.value.field == field


def test_a_trial_is_told_of_with_its_job_and_its_study_after_it() -> None:
    known = study()
    decision = steps.chosen(known, START, hyperparameters={"width": 8.0})
    assert decision.events == ()
    assert decision.trial is not None
    decision = steps.begun(decision.study, decision.trial, START, job="j")
    assert decision.events == (TrialChanged(), StudyChanged())
    assert decision.study.counts == Counts(running=1)
    again = steps.begun(*both(decision), START, job="j")
    assert again.events == ()


def test_no_more_trials_begin_than_may_run_at_once_and_in_all() -> None:
    known = study(spec={"parallel_max": 2, "trials_max": 3})
    for _ in range(5):
        known = steps.chosen(known, START, hyperparameters={}).study
    assert (known.chosen, known.counts.running) == (2, 2)


def test_values_are_taken_once_and_only_numbers() -> None:
    known, trial = measured(*begun(study()), 0.5)
    for epoch, value in ((1, 0.9), (0, 0.9), (2, float("nan")), (2, float("inf"))):
        assert steps.measured(known, trial, START, epoch=epoch, value=value).events == ()
    assert (trial.value, trial.epoch) == (0.5, 1)


@pytest.mark.parametrize(("restore_best", "expected"), [(False, 0.6), (True, 0.8)])
def test_the_value_is_the_last_or_with_restore_best_the_best(restore_best: bool, expected: float) -> None:
    known = study(spec={"job": {"fit": FitOptions(restore_best=restore_best)}})
    assert complete(known, 0.5, 0.8, 0.6).best.value == expected  # type: ignore[union-attr]


def test_a_job_without_a_value_is_a_failed_trial() -> None:
    known, trial = begun(study())
    known, trial = both(steps.succeeded(known, trial, START))
    assert trial.state is TrialState.FAILED
    assert "validation_accuracy" in trial.reason


@pytest.mark.parametrize(("direction", "best"), [(Direction.MAXIMIZE, 0.9), (Direction.MINIMIZE, 0.1)])
def test_the_best_is_by_direction_and_the_first_of_equals(direction: Direction, best: float) -> None:
    known = study(spec={"direction": direction})
    for value in (0.5, 0.9, 0.1, 0.9, 0.1):
        known = complete(known, value)
    assert known.best is not None
    assert (known.best.value, known.best.number) == (best, 1 if best == 0.9 else 2)


def test_failures_beyond_the_budget_end_the_study_once_its_trials_have_ended() -> None:
    known = study(spec={"failures_max": 1, "parallel_max": 2})
    known, other = begun(known, job="other")
    for number in range(2):
        known, trial = begun(known, job=f"j{number}")
        known, _ = both(steps.failed(known, trial, START, reason="boom"))
    assert known.state is StudyState.STOPPING
    assert not known.wants_trial
    assert steps.closed(known, START).events == ()
    known = steps.failed(known, other, START, reason="its job was cancelled").study
    known = steps.closed(known, START).study
    assert (known.state, known.end_time) == (StudyState.FAILED, START)
    assert "boom" in known.error
    assert known.counts == Counts(failed=3)


def test_without_a_success_it_fails_and_says_why() -> None:
    known = study(spec={"trials_max": 1})
    known, trial = begun(known)
    known = steps.failed(known, trial, START, reason="boom").study
    known = steps.closed(known, START).study
    assert known.state is StudyState.FAILED
    assert "no trial succeeded: 1 failed, 0 pruned" in known.error
    assert "boom" in known.error


def test_what_is_asked_to_be_published_is_published_and_only_then_is_it_over() -> None:
    known = complete(study(spec={"trials_max": 1, "job": {"publication": PUBLICATION}}), 0.5)
    known = steps.closed(known, START).study
    assert known.state is StudyState.PUBLISHING
    assert known.keeps("job-0")
    known = steps.registered(known, START, version="models/m/versions/1").study
    assert steps.registered(known, START, version="models/m/versions/1").events == ()
    known = steps.published(known, START).study
    assert (known.state, known.model_version) == (StudyState.SUCCEEDED, "models/m/versions/1")
    assert not known.keeps("job-0")


def test_without_a_publication_nothing_is_kept_and_it_is_over_at_once() -> None:
    known = complete(study(spec={"trials_max": 1}), 0.5)
    assert not known.keeps("job-0")
    assert steps.closed(known, START).study.state is StudyState.SUCCEEDED


def test_a_stop_ends_what_runs_publishes_the_best_and_is_idempotent() -> None:
    known = complete(study(spec={"job": {"publication": PUBLICATION}}), 0.5)
    known, trial = begun(known)
    known = steps.stop_requested(known, START).study
    assert steps.stop_requested(known, START).events == ()
    known = steps.failed(known, trial, START, reason="its job was cancelled").study
    assert known.last_failure == ""
    known = steps.closed(known, START).study
    assert known.state is StudyState.PUBLISHING
    known = steps.published(known, START).study
    assert known.state is StudyState.STOPPED
    assert steps.stop_requested(known, START).events == ()


def test_a_stop_without_a_best_trial_is_just_over() -> None:
    known = steps.closed(steps.stop_requested(study(), START).study, START).study
    assert known.state is StudyState.STOPPED


@pytest.mark.parametrize("state", [StudyState.SUCCEEDED, StudyState.FAILED])
def test_what_ended_in_another_way_cannot_be_stopped(state: StudyState) -> None:
    with pytest.raises(WrongState) as raised:
        steps.stop_requested(study(state=state), START)
    assert raised.value.reason == "STUDY_FINISHED"


def test_a_publication_that_fails_fails_the_study() -> None:
    known = steps.closed(complete(study(spec={"trials_max": 1, "job": {"publication": PUBLICATION}}), 0.5), START).study
    known = steps.publication_failed(known, START, reason="no").study
    assert (known.state, known.error) == (StudyState.FAILED, "no")


def test_trials_publish_nothing_and_get_what_was_resolved() -> None:
    known = study(
        spec={"job": {"publication": Publication(model="models/m"), "hyperparameters": {"epochs": 3.0, "width": 4.0}}},
        dataset="models/d/versions/7",
    )
    _, trial = begun(known, width=8.0)
    asked = steps.trial_spec(known, trial)
    assert asked.publication is None
    assert asked.dataset == "models/d/versions/7"
    assert asked.hyperparameters == {"epochs": 3.0, "width": 8.0}


@given(st.lists(st.sampled_from(["choose", "succeed", "fail", "prune", "stop", "close"]), max_size=40))
def test_counts_always_add_up_and_every_study_can_end(moves: list[str]) -> None:
    known = study(spec={"parallel_max": 3, "trials_max": 5})
    running: list[Trial] = []
    for move in [*moves, "stop", *["fail"] * 3, "close"]:
        if move == "choose" and known.wants_trial:
            known, trial = begun(known, job=f"j{known.chosen}")
            running.append(trial)
        elif move == "succeed" and running:
            known, trial = measured(known, running.pop(0), 0.5)
            known = steps.succeeded(known, trial, START).study
        elif move == "fail" and running:
            known = steps.failed(known, running.pop(0), START, reason="x").study
        elif move == "prune" and running:
            known = steps.pruned(known, running.pop(0), START).study
        elif move == "stop" and not known.final:
            known = steps.stop_requested(known, START).study
        elif move == "close":
            known = steps.closed(known, START).study
        counts = known.counts
        assert counts.running == len(running)
        assert counts.running + counts.complete + counts.pruned + counts.failed == known.chosen <= 5
        assert (known.best is not None) == (counts.complete > 0)
    assert known.final
