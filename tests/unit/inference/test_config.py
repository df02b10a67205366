"""The inference process's own variables."""

from __future__ import annotations

from pathlib import Path

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
            MLMESH_ENGINE="OpenVINO",
            MLMESH_PRECISION="bf16",
            MLMESH_ENGINE_TUNING="load",
            MLMESH_MODEL_TRIAL="0",
            MLMESH_MODEL_MIB_MAX="2",
            MLMESH_MEMORY_MIB="100",
        )
    )
    assert found == InferenceSettings(
        selectors=(Selector(model="*", alias="stable"),),
        engine="openvino",
        precision="bf16",
        tuning="load",
        rows_max=4,
        rows_preferred=4,
        rows_said=True,
        concurrency_said=True,
        queue_items_max=10,
        concurrency=3,
        threads=2,
        model_trial=False,
        model_bytes_max=2 << 20,
        memory_bytes=100 << 20,
    )


NUMBERS = (
    "MLMESH_BATCH_ROWS_MAX",
    "MLMESH_BATCH_ROWS_PREFERRED",
    "MLMESH_QUEUE_ITEMS_MAX",
    "MLMESH_ENGINE_CONCURRENCY",
    "MLMESH_ENGINE_THREADS",
    "MLMESH_MODEL_MIB_MAX",
    "MLMESH_MEMORY_MIB",
)
WORDS = (
    "MLMESH_MODEL_TRIAL",
    "MLMESH_ENGINE",
    "MLMESH_PRECISION",
    "MLMESH_ENGINE_TUNING",
    "MLMESH_OIP_DIALECT",
    "MLMESH_OIP_COMPAT",
)


def test_the_variables_tested_here_are_described() -> None:
    assert {*NUMBERS, *WORDS} <= {variable.name for variable in VARIABLES}


@pytest.mark.parametrize("name", WORDS)
def test_a_wrong_word_names_its_variable(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected one of .*got 'sideways'"):
        InferenceSettings.from_settings(settings(**{name: "sideways"}))


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", "99999999999", "٣"])
def test_a_wrong_number_names_its_variable(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        InferenceSettings.from_settings(settings(**{name: value}))


def test_a_wrong_selector_names_its_variable() -> None:
    with pytest.raises(ConfigError, match="MLMESH_SERVE: 'Mnist@x' is none of"):
        InferenceSettings.from_settings(settings(MLMESH_SERVE="Mnist@x"))


def test_streams_that_move(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"sixteen bytes or more\n")
    found = InferenceSettings.from_settings(settings(MLMESH_STREAM_AGE_S="90.5", MLMESH_STREAM_KEY=str(key)))
    assert (found.stream_age_s, found.stream_key) == (90.5, b"sixteen bytes or more")
    assert "sixteen" not in repr(found)
    for text in ("-1", "soon", "inf", "nan"):
        with pytest.raises(ConfigError, match="MLMESH_STREAM_AGE_S"):
            InferenceSettings.from_settings(settings(MLMESH_STREAM_AGE_S=text))
    key.write_bytes(b"short")
    for path in (key, tmp_path / "none"):
        with pytest.raises(ConfigError, match="MLMESH_STREAM_KEY"):
            InferenceSettings.from_settings(settings(MLMESH_STREAM_KEY=str(path)))


def test_choices_of_the_protocol() -> None:
    plain = InferenceSettings.from_settings(settings()).protocol
    assert (plain.dialect, plain.compat, plain.load_files, plain.shared_memory) == ("triton", "", False, False)
    said = settings(
        MLMESH_OIP_DIALECT="MLServer", MLMESH_OIP_COMPAT="triton", MLMESH_LOAD_FILES="1", MLMESH_SHARED_MEMORY="1"
    )
    found = InferenceSettings.from_settings(said).protocol
    assert (found.dialect, found.compat, found.load_files, found.shared_memory) == ("mlserver", "triton", True, True)


@pytest.mark.parametrize("name", ["MLMESH_LOAD_FILES", "MLMESH_SHARED_MEMORY"])
@pytest.mark.parametrize("value", ["yes", "true", "2"])
def test_what_opens_a_door_is_switched_on_by_1_only(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        InferenceSettings.from_settings(settings(**{name: value}))
