"""The service's own variables are checked, and every one of them does something."""

from __future__ import annotations

import dataclasses

import pytest

from mlmesh_runtime.config import ConfigError
from mlmesh_training.config import VARIABLES, TrainingSettings, trainer_environment


def test_the_table_says_the_defaults() -> None:
    assert TrainingSettings.from_environment({}) == TrainingSettings()
    fields = {field.name for field in dataclasses.fields(TrainingSettings)}
    assert {v.name.removeprefix("MLMESH_TRAINING_").lower() for v in VARIABLES} == fields


@pytest.mark.parametrize("variable", [variable.name for variable in VARIABLES])
@pytest.mark.parametrize("text", ["x", "-1", "nan", "1e99", "0x10"])
def test_wrong_values_are_named(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        TrainingSettings.from_environment({variable: text})


def test_training_processes_do_not_get_what_is_the_services_own() -> None:
    given = {"PATH": "/bin", "MLMESH_TLS_KEY": "k", "OTEL_SERVICE_NAME": "training", "OMP_WAIT_POLICY": "ACTIVE"}
    assert trainer_environment(given) == {"PATH": "/bin", "OMP_WAIT_POLICY": "ACTIVE", "PYTHONUNBUFFERED": "1"}
