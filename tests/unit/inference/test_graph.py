"""The outline of a model file, read without loading it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.graph import IntegerGuard, read_graph
from mlmesh_inference.tensors import DATATYPES, Signature, TensorSpec
from tests.support import network_models, onnx_models


def outline(path: Path, data: bytes):  # type: ignore[no-untyped-def]
    path.write_bytes(data)
    return read_graph(path)


@pytest.mark.parametrize(
    "data", [network_models.perceptron(), network_models.embedder(), network_models.convolutions(), onnx_models.add()]
)
def test_it_says_what_onnx_itself_says(data: bytes, tmp_path: Path) -> None:
    graph = outline(tmp_path / "m.onnx", data)
    model = onnx.load_from_string(data)
    assert [node.operator for node in graph.nodes] == [node.op_type for node in model.graph.node]
    assert [node.inputs for node in graph.nodes] == [tuple(node.input) for node in model.graph.node]
    arrays = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    assert {name: weight.dims for name, weight in graph.weights.items()} == {n: a.shape for n, a in arrays.items()}
    assert graph.weight_bytes == sum(array.nbytes for array in arrays.values())
    assert graph.opsets == {"": 20}
    assert graph.precision == "fp32"
    assert graph.floats


def test_inputs_have_their_dimensions_names(tmp_path: Path) -> None:
    graph = outline(tmp_path / "m.onnx", network_models.embedder())
    assert graph.inputs == {"ids": ("batch", "sequence"), "mask": ("batch", "sequence")}


def test_an_index_is_bounded_by_its_table_and_a_mask_is_not(tmp_path: Path) -> None:
    assert outline(tmp_path / "m.onnx", network_models.embedder(vocabulary=50)).index_bounds() == {"ids": 50}


def test_weights_in_another_file_are_named(tmp_path: Path) -> None:
    model = onnx.load_from_string(network_models.perceptron(features=256, hidden=64))
    onnx.save(model, str(tmp_path / "m.onnx"), save_as_external_data=True, location="weights.bin", size_threshold=1024)
    graph = read_graph(tmp_path / "m.onnx")
    assert graph.weights["w1"].external == "weights.bin"
    assert graph.weights["w1"].size == 256 * 64 * 4
    assert graph.weights["b1"].external == ""


def test_the_precision_is_that_of_most_weights(tmp_path: Path) -> None:
    model = onnx.load_from_string(network_models.perceptron())
    for weight in model.graph.initializer:
        if weight.name in ("w1", "w2"):
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), weight.name))
    graph = outline(tmp_path / "m.onnx", model.SerializeToString())
    assert graph.precision == "fp16"
    assert not graph.floats


@pytest.mark.parametrize(
    "data",
    [b"", b"this is no model", b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x02\x0a\x05", b"\x00" * 20, b"\xff" * 40, b"\x3b"],
)
def test_what_is_no_model_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        outline(tmp_path / "m.onnx", data)


DATA = network_models.perceptron(features=4, hidden=4, classes=2)


@settings(max_examples=150, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, len(DATA) - 1), st.integers(0, 255)), min_size=1, max_size=8),
    size=st.integers(1, len(DATA)),
)
def test_damaged_bytes_are_read_or_refused_and_nothing_else(
    changes: list[tuple[int, int]], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    damaged = bytearray(DATA)
    for place, value in changes:
        damaged[place] = value
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(damaged[:size])
    try:
        graph = read_graph(path)
    except EngineError:
        return
    assert graph.weight_bytes >= 0


def test_an_impossible_shape_is_refused_before_anything_is_made_of_it(tmp_path: Path) -> None:
    model = onnx.load_from_string(DATA)
    model.graph.initializer[0].dims[:] = [1 << 40, 1 << 40]
    with pytest.raises(EngineError, match="'w1' has an impossible shape"):
        outline(tmp_path / "m.onnx", model.SerializeToString())


def test_integers_that_an_engine_cannot_take_are_refused_by_name(tmp_path: Path) -> None:
    graph = outline(tmp_path / "m.onnx", network_models.embedder(vocabulary=50))
    whole = DATATYPES["INT64"]
    specs = tuple(TensorSpec(name=name, datatype=whole, shape=(-1, -1)) for name in ("ids", "mask"))
    guard = IntegerGuard(graph, Signature(inputs=specs, outputs=()))
    guard.check({"ids": np.array([[-50, 49]]), "mask": np.array([[1, 1 << 30]])})
    guard.check({"ids": np.zeros((0, 3), np.int64), "mask": np.zeros((0, 3), np.int64)})
    with pytest.raises(EngineError, match="'ids' has a value that is not from -50 to 49"):
        guard.check({"ids": np.array([[0, 50]]), "mask": np.array([[1, 1]])})
    with pytest.raises(EngineError, match="'mask' has a value that is not from -2147483648 to 2147483647"):
        guard.check({"ids": np.array([[0, 1]]), "mask": np.array([[1, 1 << 31]])})
