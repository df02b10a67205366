"""What MLflow's files, tags and signatures become, without a server."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mlmesh_cli.errors import CliError
from mlmesh_cli.importing import Source
from mlmesh_cli.mlflow import MlflowServer, RemoteFile
from mlmesh_cli.mlflow_mapping import aliases_of, choose, labels_of, metrics_of, model_id_of, path_of, signature_of
from mlmesh_cli.onnx_files import make_whole, outside_files

ONNX = {"flavors": {"onnx": {"data": "model.onnx"}, "python_function": {"loader_module": "mlflow.onnx"}}}


def files(*paths: str, size: int = 5) -> list[RemoteFile]:
    return [RemoteFile(path=path, size_bytes=size) for path in paths]


def test_an_onnx_flavour_takes_its_file_and_texts() -> None:
    listed = files("MLmodel", "model.onnx", "conda.yaml", "requirements.txt", "x.PKL", "a b.json", "data.bin")
    chosen, path, left_out = choose(ONNX, listed)
    assert path == "model.onnx"
    assert [file.path for file in chosen] == ["MLmodel", "model.onnx", "requirements.txt"]
    assert [why.partition(":")[0] for why in left_out] == ["conda.yaml", "x.PKL", "'a b.json'", "data.bin"]
    assert "pickle" in left_out[1]


def test_texts_that_are_empty_or_large_stay() -> None:
    listed = [*files("model.onnx"), *files("big.json", size=1 << 30), *files("none.txt", size=0)]
    assert [file.path for file in choose(ONNX, listed)[0]] == ["model.onnx"]


@pytest.mark.parametrize(
    ("mlmodel", "paths", "problem"),
    [
        ({"flavors": {"sklearn": {}, "python_function": {}}}, ["MLmodel", "model.pkl"], "model.pkl would run"),
        ({"flavors": {"pytorch": {}}}, ["data/model.pth"], "data/model.pth would run"),
        ({}, ["MLmodel"], "flavours: none"),
        ({"flavors": ["onnx"]}, ["model.onnx"], "flavours: none"),
        (ONNX, ["MLmodel"], "'model.onnx', which is not there"),
    ],
)
def test_what_may_not_be_stored_is_refused_by_name(mlmodel: dict[str, Any], paths: list[str], problem: str) -> None:
    with pytest.raises(CliError) as refused:
        choose(mlmodel, files(*paths))
    assert problem in refused.value.problem


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a//b", ".hidden", "a/../b", "a\nb", "", "x" * 300])
def test_paths_that_lead_elsewhere_are_refused(path: str) -> None:
    with pytest.raises(CliError):
        path_of(path)


def test_signatures_of_tensors_and_columns() -> None:
    signature = signature_of(
        {
            "signature": {
                "inputs": '[{"name": "x", "type": "tensor", "tensor-spec": {"dtype": "float16", "shape": [-1, 3]}},'
                ' {"type": "long", "name": "age"}, {"type": "datetime", "name": "when"}, 7]',
                "outputs": '[{"type": "tensor", "tensor-spec": {"dtype": "<U5", "shape": [-1]}}, {"type": "double"}]',
            }
        }
    )
    assert [(t.name, t.datatype, [*t.shape]) for t in signature.inputs] == [
        ("x", "FP16", [-1, 3]),
        ("age", "INT64", [-1]),
    ]
    assert [(t.name, t.datatype) for t in signature.outputs] == [("output_0", "BYTES"), ("output_1", "FP64")]


@pytest.mark.parametrize("found", [None, "x", {}, {"inputs": None}, {"inputs": "{"}, {"inputs": "{}"}, {"inputs": 3}])
def test_signatures_that_say_nothing(found: Any) -> None:
    assert not signature_of({"signature": found}).inputs


def test_tags_metrics_and_aliases() -> None:
    labels, no_labels = labels_of({"a": "b", "mlflow.user": "x", "": "y", "k" * 200: "z", "long": "v" * 5000})
    assert (labels, len(no_labels)) == ({"a": "b"}, 3)
    many, left_out = labels_of({str(n): "" for n in range(100)})
    assert (len(many), len(left_out)) == (64, 36)
    metrics, no_metrics = metrics_of({"a": 1.0, "b": math.nan, "c": math.inf, "d" * 200: 1.0})
    assert (metrics, len(no_metrics)) == ({"a": 1.0}, 3)
    assert aliases_of(["Champion", "champion", "2nd", "the best!"])[0] == ("champion", "the-best")
    assert model_id_of("models.My Model_v2 ") == "models-my-model-v2"
    with pytest.raises(CliError):
        model_id_of("模型")


def test_versions_as_people_name_them() -> None:
    assert Source.parse("models:/a/b/3") == Source(name="a/b", version="3")
    assert Source.parse("My Model@Champion") == Source(name="My Model", alias="Champion")
    for wrong in ("a", "a/x", "/3", "a/0", ""):
        with pytest.raises(CliError):
            Source.parse(wrong)


@pytest.mark.parametrize("url", ["x", "file:///etc/passwd", "http://", "https://u:p@host", "http://host?x=1"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(CliError):
        MlflowServer(url)


def _with_outside(folder: Path, location: str) -> Path:
    """An ONNX file whose matrix lies elsewhere."""
    matrix = numpy_helper.from_array(np.ones((4, 2), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [matrix],
    )
    tensor = graph.initializer[0]
    (folder / "w.data").write_bytes(tensor.raw_data)
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    path = folder / "model.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def test_tensors_beside_a_file_are_taken_into_it(tmp_path: Path) -> None:
    path = _with_outside(tmp_path, "w.data")
    assert outside_files(path) == {"w.data"}
    make_whole(path)
    (tmp_path / "w.data").unlink()
    assert outside_files(path) == set()
    whole = onnx.load(str(path))
    assert numpy_helper.to_array(whole.graph.initializer[0]).tolist() == [[1, 1]] * 4
    before = path.read_bytes()
    make_whole(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "missing.data"])
def test_tensors_elsewhere_are_not_read(tmp_path: Path, location: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(bytes(32))
    path = _with_outside(tmp_path / "in", location)
    with pytest.raises(CliError, match="cannot be made one file"):
        make_whole(path)


def test_what_is_no_onnx_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"hello")
    with pytest.raises(CliError, match="not an ONNX"):
        outside_files(tmp_path / "x")
