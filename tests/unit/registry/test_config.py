"""The registry's variables."""

import dataclasses

import pytest

from mlmesh_registry.config import VARIABLES, RegistrySettings
from mlmesh_runtime.config import ConfigError


def test_the_defaults_of_the_table_are_those_of_the_code() -> None:
    assert RegistrySettings.from_environment({}) == RegistrySettings()


def test_every_variable_has_a_field_and_every_field_a_variable() -> None:
    fields = {field.name for field in dataclasses.fields(RegistrySettings)}
    assert {variable.name.removeprefix("MLMESH_REGISTRY_").lower() for variable in VARIABLES} == fields


def test_a_value_is_read() -> None:
    found = RegistrySettings.from_environment({"MLMESH_REGISTRY_BOOKMARK_S": "0.5"})
    assert found == RegistrySettings(bookmark_s=0.5)


@pytest.mark.parametrize("text", ["0", "-1", "many", "nan", "inf", "1e400"])
def test_a_wrong_value_names_its_variable(text: str) -> None:
    with pytest.raises(ConfigError, match="MLMESH_REGISTRY_UPLOAD_TTL_S"):
        RegistrySettings.from_environment({"MLMESH_REGISTRY_UPLOAD_TTL_S": text})
