"""`mlmesh datasets`: what is looked at before it is sent, what is sent, and what is shown."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from mlmesh.registry.v1 import registry_pb2 as registry
from mlmesh.training.v1 import training_pb2 as training
from mlmesh_cli.datasets import dataset_reference, default_model
from mlmesh_cli.errors import CliError
from tests.unit.cli.conftest import FakeMesh, abort

HOUSES = "rooms,district,price\n3,north,100\n4,south,150\n"


@pytest.fixture
def taking(mesh: FakeMesh) -> FakeMesh:
    """A registry that takes a data set."""

    def created(request: registry.CreateModelVersionRequest, _context: Any) -> registry.CreateModelVersionResponse:
        version = registry.ModelVersion()
        version.CopyFrom(request.model_version)
        version.name = f"{request.parent}/versions/2"
        mesh.registry["GetModelVersion"] = lambda _request, _context: registry.GetModelVersionResponse(
            model_version=version
        )
        return registry.CreateModelVersionResponse(model_version=version)

    def started(request: registry.StartUploadRequest, _context: Any) -> registry.StartUploadResponse:
        blob = registry.Blob(name=f"blobs/sha256-{request.sha256}", size_bytes=request.size_bytes)
        return registry.StartUploadResponse(blob=blob)

    mesh.registry["CreateModel"] = lambda _request, _context: registry.CreateModelResponse()
    mesh.registry["StartUpload"] = started
    mesh.registry["ListModelVersions"] = lambda _request, _context: registry.ListModelVersionsResponse()
    mesh.registry["ListModelAliases"] = lambda _request, _context: registry.ListModelAliasesResponse()
    mesh.registry["SetModelAlias"] = lambda _request, _context: registry.SetModelAliasResponse()
    mesh.registry["CreateModelVersion"] = created
    return mesh


def safetensors(path: Path, **tensors: Any) -> Path:
    from safetensors.numpy import save_file

    save_file(tensors, path)
    return path


def test_a_table_is_registered_with_what_the_recipe_has_to_know(taking: FakeMesh, tmp_path: Path) -> None:
    path = tmp_path / "houses.csv"
    path.write_text(HOUSES)
    result = taking.run(
        "datasets", "register", str(path), "--name", "houses", "--kind", "tabular", "--target", "price",
        "--alias", "latest", "--label", "team=sales", "--description", "sold last year", "-o", "json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["name"] == "models/houses/versions/2"
    (made,) = taking.registry.requests["CreateModel"]
    assert (made.model_id, made.kind) == ("houses", registry.MODEL_KIND_DATASET)
    (request,) = taking.registry.requests["CreateModelVersion"]
    version = request.model_version
    digest = hashlib.sha256(HOUSES.encode()).hexdigest()
    assert [(each.path, each.blob) for each in version.artifacts] == [("data.csv", f"blobs/sha256-{digest}")]
    assert dict(version.labels) == {"kind": "tabular", "target": "price", "examples": "2", "team": "sales"}
    assert version.description == "sold last year"
    (moved,) = taking.registry.requests["SetModelAlias"]
    assert (moved.name, moved.version) == ("models/houses/aliases/latest", "models/houses/versions/2")


def test_images_and_texts_are_registered(taking: FakeMesh, tmp_path: Path) -> None:
    images = safetensors(
        tmp_path / "animals.safetensors", image=np.zeros((5, 8, 8), np.uint8), target=np.zeros(5, np.int64)
    )
    texts = tmp_path / "reviews.jsonl"
    texts.write_text('{"text": "good", "label": "yes"}\n\n{"text": "bad", "label": 0}\n')
    for path, kind, extra in ((images, "image", ["--classes", "cat,dog"]), (texts, "text", [])):
        result = taking.run("datasets", "register", str(path), "-n", "x", "-k", kind, *extra)
        assert result.exit_code == 0, result.stderr
    sent = [request.model_version for request in taking.registry.requests["CreateModelVersion"]]
    assert [each.artifacts[0].path for each in sent] == ["data.safetensors", "data.jsonl"]
    assert dict(sent[0].labels) == {"kind": "image", "examples": "5", "shape": "8x8", "classes": "cat,dog"}
    assert dict(sent[1].labels) == {"kind": "text", "examples": "2"}


@pytest.mark.parametrize(
    ("name", "content", "options", "said"),
    [
        ("a.csv", HOUSES, ["-k", "tabular", "--target", "prize"], "its header has rooms, district, price; prize"),
        ("a.csv", "a,b\n1\n", ["-k", "tabular", "--target", "b"], "line 2 has 1 values, the header 2"),
        ("a.csv", HOUSES, ["-k", "text"], "label, text is missing"),
        ("a.jsonl", '{"text": "x"}\n', ["-k", "text"], "line 1"),
        ("a.jsonl", "what\n", ["-k", "text"], "line 1"),
        ("a.safetensors", "\x00" * 20, ["-k", "image"], "no safetensors file"),
    ],
)
def test_a_file_that_no_recipe_could_read_is_not_sent(
    taking: FakeMesh, tmp_path: Path, name: str, content: str, options: list[str], said: str
) -> None:
    (tmp_path / name).write_text(content)
    result = taking.run("datasets", "register", str(tmp_path / name), "-n", "x", *options)
    assert result.exit_code == 1
    assert said in " ".join(result.stderr.split())
    assert "StartUpload" not in taking.registry.requests


@pytest.mark.parametrize(
    "options", [["-k", "tabular"], ["-k", "text", "--target", "a"], ["-k", "image"], ["-k", "sound"], ["-k", "text"]]
)
def test_wrong_usage_is_said_as_such(taking: FakeMesh, tmp_path: Path, options: list[str]) -> None:
    name = "x/1" if options == ["-k", "text"] else "x"
    (tmp_path / "a.csv").write_text("text,label\na,b\n")
    result = taking.run("datasets", "register", str(tmp_path / "a.csv"), "-n", name, *options)
    assert result.exit_code == 2, result.stderr


def test_the_name_of_a_model_is_not_taken_for_a_data_set(taking: FakeMesh, tmp_path: Path) -> None:
    taking.registry["CreateModel"] = lambda _request, context: abort(
        context, grpc.StatusCode.ALREADY_EXISTS, "taken", reason="MODEL_EXISTS"
    )
    taking.registry["GetModel"] = lambda _request, _context: registry.GetModelResponse(
        model=registry.Model(name="models/mnist", kind=registry.MODEL_KIND_MODEL)
    )
    (tmp_path / "a.csv").write_text(HOUSES)
    result = taking.run(
        "datasets", "register", str(tmp_path / "a.csv"), "-n", "mnist", "-k", "tabular", "--target", "price"
    )
    assert result.exit_code == 1
    assert "holds models, not data sets" in result.stderr


def test_named_and_registered_data_sets_are_listed(mesh: FakeMesh) -> None:
    named = training.Dataset(
        name="wine", kind=training.DATASET_KIND_TABULAR, example_shape=[13], classes=["a", "b"], distribution="d"
    )
    mesh.training["ListDatasets"] = lambda _request, _context: training.ListDatasetsResponse(datasets=[named])
    mesh.registry["ListModels"] = lambda _request, _context: registry.ListModelsResponse(
        models=[
            registry.Model(name="models/houses", kind=registry.MODEL_KIND_DATASET, latest_version=3),
            registry.Model(name="models/prices", kind=registry.MODEL_KIND_MODEL),
        ]
    )
    mesh.registry["ListModelAliases"] = lambda _request, _context: registry.ListModelAliasesResponse(
        aliases=[registry.ModelAlias(name="models/houses/aliases/latest", version="models/houses/versions/3")]
    )
    shown = mesh.run("datasets", "list").stdout
    for wanted in ("wine", "tabular", "13", "a, b", "houses", "latest → 3"):
        assert wanted in shown
    assert "prices" not in shown
    value = json.loads(mesh.run("datasets", "list", "-o", "json").stdout)
    assert [each["name"] for each in value["named"]] == ["wine"]
    assert [each["name"] for each in value["registered"]] == ["models/houses"]


def test_data_sets_are_named_as_models_are() -> None:
    assert dataset_reference("mnist") == "mnist"
    assert dataset_reference("houses/3") == "models/houses/versions/3"
    assert dataset_reference("houses@latest") == "models/houses/aliases/latest"
    assert dataset_reference("models/houses/versions/3") == "models/houses/versions/3"
    with pytest.raises(CliError):
        dataset_reference("houses/latest")
    assert default_model("cnn", "mnist") == "models/mnist"
    assert default_model("regression", "models/houses/versions/3") == "models/houses-regression"
