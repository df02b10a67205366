"""A job that cannot work is refused when it is submitted, and the answer names the field."""

from __future__ import annotations

import math

import pytest

from mlmesh_runtime.errors import InvalidInput
from mlmesh_training.jobs import Publication
from mlmesh_training.recipes import DATASETS, RECIPES, resolve
from tests.support.training import spec


def test_defaults_are_filled_in_and_within_their_own_bounds() -> None:
    for recipe in RECIPES.values():
        for dataset in recipe.datasets:
            values = resolve(spec(recipe=recipe.name, dataset=dataset, hyperparameters={}))
            assert set(values) == {known.name for known in recipe.hyperparameters}
            assert dataset in DATASETS


def test_what_is_given_wins() -> None:
    assert resolve(spec(hyperparameters={"epochs": 3.0, "dropout": 0.5}))["epochs"] == 3.0


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"recipe": "transformer"}, "spec.recipe", "UNKNOWN_RECIPE"),
        ({"recipe": "../cnn"}, "spec.recipe", "UNKNOWN_RECIPE"),
        ({"dataset": "imagenet"}, "spec.dataset", "UNKNOWN_DATASET"),
        ({"hyperparameters": {"lerning_rate": 0.1}}, "spec.hyperparameters['lerning_rate']", "INVALID_FIELD"),
        ({"hyperparameters": {"depth": 2.0}}, "spec.hyperparameters['depth']", "INVALID_FIELD"),
        ({"hyperparameters": {"epochs": 0.0}}, "spec.hyperparameters['epochs']", "INVALID_FIELD"),
        ({"hyperparameters": {"epochs": 1.5}}, "spec.hyperparameters['epochs']", "INVALID_FIELD"),
        ({"hyperparameters": {"learning_rate": -1.0}}, "spec.hyperparameters['learning_rate']", "INVALID_FIELD"),
        ({"hyperparameters": {"learning_rate": math.nan}}, "spec.hyperparameters['learning_rate']", "INVALID_FIELD"),
        ({"hyperparameters": {"epochs": math.inf}}, "spec.hyperparameters['epochs']", "INVALID_FIELD"),
        ({"hyperparameters": {"batch_size": 1e300}}, "spec.hyperparameters['batch_size']", "INVALID_FIELD"),
        ({"hyperparameters": {"": 1.0}}, "spec.hyperparameters['']", "INVALID_FIELD"),
        (
            {"publication": Publication(model="models/m", aliases=("a", "a"))},
            "spec.publication.aliases",
            "INVALID_FIELD",
        ),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, object], field: str, reason: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        resolve(spec(**changes))
    assert raised.value.reason == reason
    assert [violation.field for violation in raised.value.violations] == [field]


def test_every_wrong_hyperparameter_is_named_at_once() -> None:
    with pytest.raises(InvalidInput) as raised:
        resolve(spec(hyperparameters={"epochs": 0.0, "dropout": 2.0, "nope": 1.0}))
    assert len(raised.value.violations) == 3


def test_a_batch_cannot_be_larger_than_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from mlmesh_training import recipes

    small = {"digits": dataclasses.replace(DATASETS["digits"], training_examples=10)}
    monkeypatch.setattr(recipes, "DATASETS", small)
    with pytest.raises(InvalidInput, match="10 training examples"):
        resolve(spec(hyperparameters={"batch_size": 11.0}))


def test_names_of_recipes_and_data_sets_fit_into_a_job_name() -> None:
    for recipe in RECIPES.values():
        for dataset in recipe.datasets:
            assert len(f"{recipe.name}-{dataset}-0123456789") <= 64
            assert f"{recipe.name}{dataset}".isalnum()
