"""What a person types: names of models, pairs, hyperparameters, jobs, samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlmesh_cli import samples
from mlmesh_cli.errors import CliError, ExitCode
from mlmesh_cli.jobs import hyperparameters, job_name, read_spec
from mlmesh_cli.names import parse_model, parse_pairs


@pytest.mark.parametrize(
    ("text", "version_name"),
    [
        ("mnist", ""),
        ("models/mnist", ""),
        ("mnist/3", "models/mnist/versions/3"),
        ("mnist@stable", "models/mnist/aliases/stable"),
    ],
)
def test_models_are_named_shortly(text: str, version_name: str) -> None:
    reference = parse_model(text)
    assert reference.parent == "models/mnist"
    assert reference.version_name == version_name


@pytest.mark.parametrize("text", ["", "Mnist", "mnist/0", "mnist/x", "mnist@", "../x", "mnist/1@stable", "a b"])
def test_what_names_no_model_is_wrong_usage(text: str) -> None:
    with pytest.raises(CliError, match="does not name a model") as refused:
        parse_model(text)
    assert refused.value.exit_code == ExitCode.USAGE


def test_pairs_keep_what_is_after_the_first_equals_sign() -> None:
    assert parse_pairs(["a=b=c", "d="], "--header") == {"a": "b=c", "d": ""}
    with pytest.raises(CliError, match="--header wants NAME=VALUE"):
        parse_pairs(["=b"], "--header")


def test_hyperparameters_are_numbers() -> None:
    assert hyperparameters(["epochs=3", "learning_rate=1e-3"]) == {"epochs": 3.0, "learning_rate": 0.001}
    for wrong in ("epochs", "epochs=many", "=3"):
        with pytest.raises(CliError, match="NAME=NUMBER"):
            hyperparameters([wrong])


def test_jobs_are_named_with_or_without_their_collection() -> None:
    assert job_name("7f") == job_name("jobs/7f") == "jobs/7f"


def test_a_job_file_has_the_fields_of_the_proto(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("recipe: cnn\ndataset: mnist\nhyperparameters: {epochs: 2}\npublication: {model: models/m}\n")
    spec = read_spec(path)
    assert (spec.recipe, spec.hyperparameters["epochs"], spec.publication.model) == ("cnn", 2, "models/m")
    path.write_text('{"spec": {"recipe": "mlp"}}')
    assert read_spec(path).recipe == "mlp"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("recipe: [", "is not YAML"),
        ("- a", "is not a job"),
        ("recipe: cnn\nepochz: 3", "epochz"),
        ("seed: x", "seed"),
    ],
)
def test_a_wrong_job_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(CliError, match=problem) as refused:
        read_spec(path)
    assert "job.yaml" in refused.value.problem


def test_images_are_raw_and_every_class_is_visited() -> None:
    data = samples.load("digits")
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.dtype == "float32"
    assert data.images.max() == 16
    assert set(data.labels[samples.spread(0, 100, 1797)]) == set(range(10))


def test_spread_repeats_nothing_before_it_has_seen_all() -> None:
    for total in (1797, 5000):
        assert len(set(samples.spread(3, total, total))) == total


def test_a_model_s_shape_chooses_the_images() -> None:
    assert samples.for_shape([-1, 1, 28, 28]) == "mnist"
    assert samples.for_shape([-1, 64]) == "digits"
    assert samples.for_shape([-1, 3, 224, 224]) == ""


def test_unknown_data_and_indices_are_wrong_usage() -> None:
    with pytest.raises(CliError, match="unknown data set 'cats'"):
        samples.load("cats")
    with pytest.raises(CliError, match="outside of the data set") as refused:
        samples.spread(5000, 1, 5000)
    assert "0 to 4999" in refused.value.hint
