"""Model files that are refused before any library sees them, and real ones that pass."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.inspection import DEPTH_MAX, inspect

GIB = 1 << 30


def model(
    initializers: list[Any] | None = None, nodes: list[Any] | None = None, domains: tuple[str, ...] = ()
) -> onnx.ModelProto:
    """y = x @ w, FP32 [batch, 4] to [batch, 2], with more of what is asked for."""
    weights = [numpy_helper.from_array(np.ones((4, 2), np.float32), "w")] if initializers is None else initializers
    graph = helper.make_graph(
        nodes if nodes is not None else [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        weights,
    )
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def outside(location: str, *, offset: str = "0", length: str = "32", name: str = "w") -> Any:
    """A weight [4, 2] FP32 in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4, 2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=value)
    return tensor


def refused(path: Path, content: bytes | onnx.ModelProto, *, weight_bytes_max: int = GIB) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    with pytest.raises(EngineError) as caught:
        inspect(path, weight_bytes_max=weight_bytes_max)
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "version" / "model.onnx" if (tmp_path / "version").mkdir() is None else tmp_path


def test_an_honest_model_passes(path: Path) -> None:
    path.write_bytes(model().SerializeToString())
    found = inspect(path, weight_bytes_max=32)
    assert (found.nodes, found.tensors, found.weight_bytes, found.external) == (1, 1, 32, frozenset())


def test_what_is_something_else_is_named(path: Path, tmp_path: Path) -> None:
    archive = tmp_path / "a.pt"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("archive/data.pkl", pickle.dumps({}))
    assert "zip archive" in refused(path, archive.read_bytes())
    assert "pickle" in refused(path, pickle.dumps({"weights": [1.0]}))
    assert "executable" in refused(path, b"\x7fELF" + bytes(100))
    assert "empty" in refused(path, b"")
    assert "no well-formed ONNX model" in refused(path, b"hello, this is text\n" * 10)


def test_bytes_must_be_what_shape_and_type_say(path: Path) -> None:
    short = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 2], raw_data=bytes(31))
    assert "has 31 bytes, 32 were expected" in refused(path, model([short]))
    absurd = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 31, 1 << 31], raw_data=bytes(32))
    assert "impossible shape" in refused(path, model([absurd]))
    negative = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[-4, -2], raw_data=bytes(32))
    assert "impossible shape" in refused(path, model([negative]))
    deep = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1] * 100, raw_data=bytes(4))
    assert "too many dimensions" in refused(path, model([deep]))
    # Shapes whose bytes come from elsewhere still count against the bound.
    large = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 20, 1 << 10])
    assert "more than 1073741824 bytes" in refused(path, model([large]))


@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../secret.bin", "a/../../secret.bin", "..\\secret.bin", "", "nobody.bin", "link.bin/x"]
)
def test_weights_elsewhere_are_refused(path: Path, location: str) -> None:
    (path.parent.parent / "secret.bin").write_bytes(bytes(32))
    assert "which is not a file of the model" in refused(path, model([outside(location)]))


def test_a_folder_that_leads_out_is_refused(path: Path) -> None:
    (path.parent.parent / "out").mkdir()
    (path.parent.parent / "out" / "w.bin").write_bytes(bytes(32))
    (path.parent / "in").symlink_to(path.parent.parent / "out")
    assert "which is not a file of the model" in refused(path, model([outside("in/w.bin")]))


def test_ranges_must_be_there(path: Path) -> None:
    (path.parent / "w.bin").write_bytes(bytes(40))
    path.write_bytes(model([outside("w.bin", offset="8")]).SerializeToString())
    assert inspect(path, weight_bytes_max=GIB).external == {"w.bin"}
    for offset, length in (("9", "32"), ("-8", "32"), ("0", "31"), ("99999999999999999999", "32"), ("x", "32")):
        assert "it is not" in refused(path, model([outside("w.bin", offset=offset, length=length)]))


def test_nested_graphs_and_constants_are_walked(path: Path) -> None:
    def branch(inner: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph([inner], "b", [], [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)])

    bad = helper.make_node("Constant", [], ["o"], value=outside("/etc/passwd"))
    nested = helper.make_node("If", ["c"], ["o"], then_branch=branch(bad), else_branch=branch(bad))
    assert "/etc/passwd" in refused(path, model(nodes=[nested]))
    deep = helper.make_node("Identity", ["x"], ["o"])
    for _ in range(DEPTH_MAX + 1):
        deep = helper.make_node("If", ["c"], ["o"], then_branch=branch(deep), else_branch=branch(deep))
    assert f"more than {DEPTH_MAX} deep" in refused(path, model(nodes=[deep]))


def test_unknown_domains_are_named(path: Path) -> None:
    strange = helper.make_node("Run", ["x"], ["y"], domain="com.evil")
    assert "'com.evil'" in refused(path, model(nodes=[strange], domains=("com.evil",)))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 40),
)
def test_mutations_are_refused_or_pass_and_nothing_else(path: Path, changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(model().SerializeToString())
    for place, value in changes:
        data[place % len(data)] = value
    path.write_bytes(bytes(data[: len(data) - cut]))
    try:
        inspect(path, weight_bytes_max=GIB)
    except EngineError:
        return
