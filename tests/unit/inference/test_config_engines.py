"""The variables of compiled engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlmesh_inference.building import tensorrt_kind
from mlmesh_inference.config import VARIABLES as ALL
from mlmesh_inference.config_engines import VARIABLES, EngineSettings
from mlmesh_runtime.config import ConfigError


def test_defaults() -> None:
    assert EngineSettings.from_environ({}) == EngineSettings()
    assert {variable.name for variable in VARIABLES} <= {variable.name for variable in ALL}


def test_everything_can_be_said() -> None:
    found = EngineSettings.from_environ(
        {
            "MLMESH_GPU": "1",
            "MLMESH_TENSORRT_INSTANCES": "2",
            "MLMESH_TENSORRT_GRAPHS": "0",
            "MLMESH_TENSORRT_CAPABILITIES": "SM86, sm120",
            "MLMESH_ENGINE_BUILD": "manual",
            "MLMESH_ENGINE_CACHE_BYTES": "1000",
            "MLMESH_ENGINE_CACHE_KEY_FILE": "/keys/cache",
            "MLMESH_ENGINE_SHARE": "offer",
            "MLMESH_ENGINE_SHARE_KEY_FILE": "/keys/fleet",
        }
    )
    assert found == EngineSettings(
        gpu=1,
        instances=2,
        graphs=False,
        capabilities=("SM86", "SM120"),
        automatic=False,
        cache_bytes=1000,
        cache_key_file=Path("/keys/cache"),
        takes=True,
        offers=True,
        share_key_file=Path("/keys/fleet"),
    )
    assert not EngineSettings.from_environ({"MLMESH_ENGINE_SHARE": "take", "MLMESH_ENGINE_SHARE_KEY_FILE": "k"}).offers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MLMESH_GPU", "-1"),
        ("MLMESH_GPU", "first"),
        ("MLMESH_TENSORRT_INSTANCES", "0"),
        ("MLMESH_TENSORRT_GRAPHS", "yes"),
        ("MLMESH_TENSORRT_CAPABILITIES", "8.6"),
        ("MLMESH_ENGINE_BUILD", "never"),
        ("MLMESH_ENGINE_CACHE_BYTES", "8GiB"),
        ("MLMESH_ENGINE_SHARE", "all"),
    ],
)
def test_a_wrong_value_names_its_variable(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        EngineSettings.from_environ({name: value})


def test_sharing_needs_a_key() -> None:
    with pytest.raises(ConfigError, match="MLMESH_ENGINE_SHARE_KEY_FILE: sharing engines needs a key"):
        EngineSettings.from_environ({"MLMESH_ENGINE_SHARE": "take"})


def test_a_key_that_was_named_and_is_not_there_ends_the_start(tmp_path: Path) -> None:
    """A typing error must not make a key of its own."""
    named = EngineSettings(cache_key_file=tmp_path / "key")
    with pytest.raises(ConfigError, match=r"MLMESH_ENGINE_CACHE_KEY_FILE: .*cannot be read"):
        tensorrt_kind(named, tmp_path)
    assert not (tmp_path / "key").exists()
    assert tensorrt_kind(EngineSettings(), tmp_path).cache is not None
    assert (tmp_path / "engines" / "key").exists()
