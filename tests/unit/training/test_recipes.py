"""A job that cannot work is refused when it is submitted, and the answer names the field."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from importlib import metadata

import pytest

from mlmesh_runtime.errors import InvalidInput
from mlmesh_training import recipes
from mlmesh_training.datasets import DATASETS, DatasetKind
from mlmesh_training.jobs import Publication
from mlmesh_training.recipes import RECIPES, Hyperparameter, Recipe, Task, discover, resolve
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
    small = {"digits": dataclasses.replace(DATASETS["digits"], training_examples=10)}
    monkeypatch.setattr(recipes, "DATASETS", small)
    with pytest.raises(InvalidInput, match="10 training examples"):
        resolve(spec(hyperparameters={"batch_size": 11.0}))


def test_names_of_recipes_and_data_sets_fit_into_a_job_name() -> None:
    for recipe in RECIPES.values():
        for dataset in recipe.datasets:
            assert len(f"{recipe.name}-{dataset}-0123456789") <= 64
            assert re.fullmatch(r"[a-z][a-z0-9-]*", f"{recipe.name}-{dataset}")


def test_a_registered_data_set_is_taken_by_every_recipe_and_looked_up_elsewhere() -> None:
    for recipe in RECIPES.values():
        asked = spec(recipe=recipe.name, dataset="models/animals/versions/3", hyperparameters={})
        assert resolve(asked)["epochs"] == {each.name: each.default for each in recipe.hyperparameters}["epochs"]


def test_what_a_recipe_takes_is_said_when_it_takes_something_else() -> None:
    with pytest.raises(InvalidInput, match="diabetes, registered tabular data sets"):
        resolve(spec(recipe="regression", dataset="digits"))


GOOD = Recipe(
    name="linear",
    description="A line.",
    task=Task.REGRESSION,
    dataset_kind=DatasetKind.TABULAR,
    hyperparameters=recipes.fitting(epochs=3, learning_rate=0.1),
    definition="somewhere.training:linear",
)


class Point(metadata.EntryPoint):
    """An entry point whose value is given, not imported."""

    def load(self) -> object:
        value = VALUES[self.value]
        if isinstance(value, Exception):
            raise value
        return value


VALUES: dict[str, object] = {
    "good": GOOD,
    "broken": ImportError("no module named cuda_tricks"),
    "not a recipe": "cnn",
    "other name": dataclasses.replace(GOOD, name="other"),
    "bad name": dataclasses.replace(GOOD, name="Linear_1"),
    "shadow": dataclasses.replace(GOOD, name="cnn"),
    "no module": dataclasses.replace(GOOD, definition="somewhere.training"),
    "no epochs": dataclasses.replace(GOOD, hyperparameters=GOOD.hyperparameters[1:]),
    "twice": dataclasses.replace(GOOD, hyperparameters=(*GOOD.hyperparameters, GOOD.hyperparameters[0])),
    "out of bounds": dataclasses.replace(
        GOOD,
        hyperparameters=(*GOOD.hyperparameters, Hyperparameter(name="x", description="", default=2, low=0, high=1)),
    ),
    "log of nothing": dataclasses.replace(
        GOOD,
        hyperparameters=(
            *GOOD.hyperparameters,
            Hyperparameter(name="x", description="", default=1, low=0, high=1, log_scale=True),
        ),
    ),
    "exits": Exception("anything"),
}


def point(name: str, value: str) -> metadata.EntryPoint:
    return Point(name=name, value=value, group=recipes.ENTRY_POINTS)


def test_recipes_of_other_distributions_are_found_beside_ours() -> None:
    found = discover([point("linear", "good")])
    assert set(found) == {*RECIPES, "linear"}
    assert found["linear"].definition == "somewhere.training:linear"
    assert found["cnn"].distribution.startswith("mlmesh ")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("linear", "broken", "cuda_tricks"),
        ("linear", "not a recipe", "its value is a str"),
        ("linear", "other name", "must be named as its entry point"),
        ("Linear_1", "bad name", "in the form"),
        ("cnn", "shadow", "already"),
        ("linear", "no module", "module:attribute"),
        ("linear", "no epochs", "epochs missing"),
        ("linear", "twice", "given twice"),
        ("linear", "out of bounds", "from 0 to 1"),
        ("linear", "log of nothing", "above 0"),
        ("linear", "exits", "anything"),
    ],
)
def test_a_wrong_entry_point_is_told_and_left_out(
    name: str, value: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="mlmesh_training.recipes"):
        found = discover([point(name, value)])
    assert set(found) == set(RECIPES)
    assert found["cnn"].definition == RECIPES["cnn"].definition
    (record,) = caplog.records
    assert said in vars(record)["error"]
    assert vars(record)["entry_point"] == f"{name} = {value}"


def test_of_two_recipes_of_one_name_one_is_there(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = discover([point("linear", "good"), point("linear", "good")])
    assert "linear" in found
    assert len(caplog.records) == 1
