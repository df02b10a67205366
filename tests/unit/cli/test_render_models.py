from __future__ import annotations

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_cli.render import models as view
from tests.support.cli import NOW, at
from tests.unit.cli.conftest import text_of


def _version() -> pb.ModelVersion:
    version = pb.ModelVersion(
        name="models/mnist/versions/3", digest="sha256-ab", create_time=at(-60), aliases=["models/mnist/aliases/stable"]
    )
    version.creator = "spiffe://cluster.local/ns/mlmesh/sa/training"
    version.metrics.update({"accuracy": 0.97, "f1_macro": 0.96})
    version.artifacts.add(path="model.onnx", blob="blobs/sha256-00", size_bytes=2048)
    version.signature.inputs.add(name="image", datatype="FP32", shape=[-1, 1, 28, 28])
    version.lineage.job = "jobs/7"
    return version


def test_models_show_where_aliases_point() -> None:
    models = [pb.Model(name="models/mnist", latest_version=3, description="digits\nmore"), pb.Model(name="models/new")]
    alias = pb.ModelAlias(name="models/mnist/aliases/stable", version="models/mnist/versions/2")
    text = text_of(view.models_table(models, [alias], NOW))
    mnist = next(line for line in text.splitlines() if "mnist" in line)
    assert "stable → 2" in mnist
    assert "digits" in mnist
    assert "more" not in text
    assert " - " in next(line for line in text.splitlines() if "new" in line)


def test_versions_show_measures_size_and_origin() -> None:
    text = text_of(view.versions_table([_version()], NOW))
    for wanted in ("mnist/3", "stable", "97.0 %", "96.0 %", "2.0 KiB", "jobs/7", "1 min ago", "training"):
        assert wanted in text


def test_a_version_shows_its_signature_with_free_dimensions() -> None:
    text = text_of(view.version_view(_version(), NOW))
    assert "[?, 1, 28, 28]" in text
    assert "blobs/sha256-00" in text
    assert "by spiffe://cluster.local/ns/mlmesh/sa/training" in text


def test_a_model_shows_etags_to_move_aliases_with() -> None:
    alias = pb.ModelAlias(name="models/mnist/aliases/stable", version="models/mnist/versions/2", etag="e7")
    text = text_of(view.model_view(pb.Model(name="models/mnist"), [alias], [_version()], NOW))
    assert "e7" in text
    assert "mnist/3" in text
