"""`mlmesh optimize`: the job that it submits, what it refuses, and how the comparison reads."""

from __future__ import annotations

from typing import Any

import pytest

from mlmesh.registry.v1 import registry_pb2
from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_cli.render.training import job_view
from tests.unit.cli.conftest import FakeMesh, text_of


def trained(**labels: str) -> registry_pb2.ModelVersion:
    return registry_pb2.ModelVersion(
        name="models/mnist/versions/3", labels=labels, lineage=registry_pb2.Lineage(dataset=labels.get("dataset", ""))
    )


@pytest.fixture
def submitting(mesh: FakeMesh) -> FakeMesh:
    version = trained(recipe="cnn", dataset="mnist")
    mesh.registry["GetModelVersion"] = lambda _request, _context: registry_pb2.GetModelVersionResponse(
        model_version=version
    )

    def create(request: pb.CreateJobRequest, _context: Any) -> pb.CreateJobResponse:
        return pb.CreateJobResponse(job=pb.Job(name="jobs/1", spec=request.spec, state=pb.JOB_STATE_QUEUED))

    mesh.training["CreateJob"] = create
    return mesh


@pytest.mark.parametrize(
    ("options", "technique", "recipe"),
    [
        (["--int8", "--calibration", "100"], "quantization { calibration_examples: 100 }", "cnn"),
        (["--fp16"], "mixed_precision { precision: PRECISION_FP16 }", "cnn"),
        (["--prune", "0.6", "--epochs", "3"], "pruning { sparsity: 0.6 epochs: 3 }", "cnn"),
        (["--two-four"], "pruning { two_four: true }", "cnn"),
        (["--distill", "mlp", "--set", "width=32"], "distillation { }", "mlp"),
    ],
)
def test_the_job_starts_from_the_version_and_its_data(
    submitting: FakeMesh, options: list[str], technique: str, recipe: str
) -> None:
    result = submitting.run("optimize", "mnist@stable", *options, "--alias", "canary", "--max-drop", "0.02", "--detach")
    assert result.exit_code == 0, result.stderr
    (request,) = submitting.training.requests["CreateJob"]
    spec = request.spec
    assert submitting.registry.requests["GetModelVersion"][0].name == "models/mnist/aliases/stable"
    # The version, not the alias: what the alias means later is another question.
    assert spec.optimization.source == "models/mnist/versions/3"
    assert (spec.recipe, spec.dataset, spec.optimization.quality_drop_max) == (recipe, "mnist", 0.02)
    assert technique.replace(" ", "") in str(spec.optimization).replace("\n", "").replace(" ", "")
    assert (spec.publication.model, list(spec.publication.aliases)) == ("models/mnist", ["canary"])
    assert dict(spec.hyperparameters) == ({"width": 32.0} if recipe == "mlp" else {})


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "choose one of --int8"),
        (["--int8", "--fp16"], "choose one of --int8"),
        (["--fp16", "--calibration", "8"], "--calibration is for --int8"),
        (["--int8", "--epochs", "2"], "--epochs is for --prune"),
        (["--int8", "--set", "width=8"], "--set is for --distill"),
    ],
)
def test_choices_that_do_not_fit_are_told(submitting: FakeMesh, options: list[str], complaint: str) -> None:
    result = submitting.run("optimize", "mnist@stable", *options)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert "CreateJob" not in submitting.training.requests


def test_a_version_of_unknown_origin_is_not_optimised(submitting: FakeMesh) -> None:
    submitting.registry["GetModelVersion"] = lambda _request, _context: registry_pb2.GetModelVersionResponse(
        model_version=trained()
    )
    result = submitting.run("optimize", "mnist/3", "--int8")
    assert result.exit_code == 1
    assert "does not say which recipe and data set" in result.stderr


def test_before_and_after_are_under_each_other() -> None:
    result = pb.OptimizationResult(
        source="models/mnist/versions/3",
        technique="int8",
        before=pb.Evaluation(accuracy=0.98),
        after=pb.Evaluation(accuracy=0.975),
        size_bytes_before=400_000,
        size_bytes_after=100_000,
        quality_drop=0.005,
        quality_drop_max=0.01,
    )
    job = pb.Job(name="jobs/1", state=pb.JOB_STATE_SUCCEEDED, optimization=result)
    shown = text_of(job_view(job), width=80)
    assert "mnist/3" in shown
    assert "98.0" in shown
    assert "97.5" in shown
    assert "x0.25" in shown
    assert "lost 0.0050 of 0.01" in shown
