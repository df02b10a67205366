"""The inference process's own variables."""

from __future__ import annotations

import dataclasses

import pytest

from mlmesh_inference.config import VARIABLES, InferenceSettings
from mlmesh_inference.desired import Selector
from mlmesh_runtime.config import ConfigError, Settings


def settings(**environ: str) -> Settings:
    return Settings.from_environment(environ, service="inference")


def test_defaults() -> None:
    found = InferenceSettings.from_settings(settings(), cpus=2)
    assert found == InferenceSettings(rows_max=64, rows_preferred=8, queue_items_max=256, concurrency=2, threads=1)


@pytest.mark.parametrize(("cpus", "concurrency"), [(1, 1), (3, 3), (64, 4)])
def test_concurrency_follows_the_cpus(cpus: int, concurrency: int) -> None:
    assert InferenceSettings.from_settings(settings(), cpus=cpus).concurrency == concurrency


def test_everything_can_be_said() -> None:
    found = InferenceSettings.from_settings(
        settings(
            MLMESH_SERVE="*@stable",
            MLMESH_BATCH_ROWS_MAX="4",
            MLMESH_BATCH_ROWS_PREFERRED="16",
            MLMESH_QUEUE_ITEMS_MAX="10",
            MLMESH_ENGINE_CONCURRENCY="3",
            MLMESH_ENGINE_THREADS="2",
        )
    )
    assert dataclasses.asdict(found) == {
        "selectors": (dataclasses.asdict(Selector(model="*", alias="stable")),),
        "rows_max": 4,
        "rows_preferred": 4,
        "queue_items_max": 10,
        "concurrency": 3,
        "threads": 2,
    }


@pytest.mark.parametrize("name", [variable.name for variable in VARIABLES])
@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", "99999999999", "٣"])
def test_a_wrong_number_names_its_variable(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        InferenceSettings.from_settings(settings(**{name: value}))


def test_a_wrong_selector_names_its_variable() -> None:
    with pytest.raises(ConfigError, match="MLMESH_SERVE: 'Mnist@x' is none of"):
        InferenceSettings.from_settings(settings(MLMESH_SERVE="Mnist@x"))
