"""OpenVINO and torch, held against ONNX Runtime: the real libraries, where they are installed."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mlmesh_inference.engines.base import Engine, EngineError, EngineKind, EngineOptions
from mlmesh_inference.engines.graph import read_graph
from mlmesh_inference.engines.kinds import engine_kinds
from mlmesh_inference.engines.onnx import OnnxCudaKind, OnnxKind
from mlmesh_inference.engines.openvino import OpenVinoKind
from mlmesh_inference.engines.parity import difference, tolerance
from mlmesh_inference.engines.samples import Samples
from mlmesh_inference.engines.torch import TorchKind
from tests.support import network_models, onnx_models

KINDS = {kind.name: kind for kind in (OpenVinoKind(), TorchKind())}
MODELS = {
    "perceptron": network_models.perceptron(),
    "convolutions": network_models.convolutions(),
    "embedder": network_models.embedder(),
    "classes": onnx_models.classes(),
}


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> EngineKind:
    found = KINDS[request.param]
    if not found.probe().available:
        pytest.skip(found.probe().reason)
    return found


def built(kind: EngineKind, path: Path, data: bytes, **options: object) -> Engine:
    path.write_bytes(data)
    return kind.build(path, EngineOptions(concurrency=2, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_answers_as_onnx_runtime_does(kind: EngineKind, model: str, precision: str, tmp_path: Path) -> None:
    engine = built(kind, tmp_path / "m.onnx", MODELS[model], precision=precision)
    reference = OnnxKind().build(tmp_path / "m.onnx", EngineOptions())
    assert engine.signature == reference.signature
    if model != "embedder":  # nothing in it is a multiplication of matrices
        assert engine.facts.precision == precision
    assert engine.facts.memory_bytes > 0
    names = [spec.name for spec in reference.signature.outputs]
    samples = Samples(reference.signature, read_graph(tmp_path / "m.onnx"), batches=True)
    for rows, length in ((1, 5), (3, 5), (8, 9)):
        inputs = samples.make(rows, length)
        expected, found = reference.run(inputs, names), engine.run(inputs, names)
        assert difference(reference.signature.outputs, expected, found).relative <= tolerance(precision)
        assert [array.dtype for array in found] == [array.dtype for array in expected]
    engine.close()


def test_an_answer_belongs_to_the_caller(kind: EngineKind, tmp_path: Path) -> None:
    engine = built(kind, tmp_path / "m.onnx", onnx_models.identity(("FP32",)))
    x = np.ones((2, 3), np.float32)
    x.flags.writeable = False
    (first,) = engine.run({"in_FP32": x}, ["out_FP32"])
    engine.run({"in_FP32": x * 2}, ["out_FP32"])
    np.testing.assert_array_equal(first, x)
    first += 1
    assert (x == 1).all()


def test_datatypes_go_through_as_they_are(kind: EngineKind, tmp_path: Path) -> None:
    kinds = ("BOOL", "UINT8", "INT8", "INT32", "FP16", "BF16", "FP32")
    engine = built(kind, tmp_path / "m.onnx", onnx_models.identity(kinds))
    specs = {spec.name: spec for spec in engine.signature.inputs}
    inputs = {f"in_{name}": np.array([[0, 1, 1]]).astype(specs[f"in_{name}"].datatype.dtype) for name in kinds}
    inputs["in_BF16"] = np.array([[0x3F80, 0xC000, 0x0000]], np.uint16)
    outputs = engine.run(inputs, [f"out_{name}" for name in kinds])
    for name, array in zip(kinds, outputs, strict=True):
        np.testing.assert_array_equal(array, inputs[f"in_{name}"])


def test_no_rows_give_no_rows(kind: EngineKind, tmp_path: Path) -> None:
    engine = built(kind, tmp_path / "m.onnx", MODELS["convolutions"])
    (result,) = engine.run({"image": np.zeros((0, 1, 8, 8), np.float32)}, ["logits"])
    assert (result.shape, result.dtype) == ((0, 4), np.dtype(np.float32))


def test_an_index_beyond_the_table_fails_and_the_next_request_does_not(kind: EngineKind, tmp_path: Path) -> None:
    engine = built(kind, tmp_path / "m.onnx", MODELS["embedder"])
    mask = np.ones((1, 2), np.int64)
    with pytest.raises(EngineError, match="'ids' has a value that is not from -50 to 49"):
        engine.run({"ids": np.array([[0, 50]]), "mask": mask}, ["embedding"])
    (result,) = engine.run({"ids": np.array([[0, -1]]), "mask": mask}, ["embedding"])
    (same,) = engine.run({"ids": np.array([[0, 49]]), "mask": mask}, ["embedding"])
    np.testing.assert_array_equal(result, same)


def test_several_threads_at_once_get_their_own_answers(kind: EngineKind, tmp_path: Path) -> None:
    engine = built(kind, tmp_path / "m.onnx", onnx_models.add(width=4, plus=1.0))

    def ask(number: int) -> bool:
        x = np.full((1 + number % 5, 4), float(number), np.float32)
        return bool((engine.run({"x": x}, ["y"])[0] == number + 1).all())

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(ask, range(200)))


@pytest.mark.parametrize("data", [b"this is no model", b""])
def test_what_is_no_model_is_refused_without_its_path(kind: EngineKind, data: bytes, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        built(kind, tmp_path / "m.onnx", data)
    assert str(tmp_path) not in str(caught.value)


def test_a_precision_it_does_not_have_is_refused(kind: EngineKind, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="is not asked for fp16 here"):
        built(kind, tmp_path / "m.onnx", MODELS["perceptron"], precision="fp16")


def model_of(operator: str, **attributes: object) -> bytes:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"], **attributes)], "m", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def test_torch_refuses_by_name_what_it_does_not_translate(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(EngineError, match="operators that are not translated: Softplus"):
        built(TorchKind(), path, model_of("Softplus"))
    with pytest.raises(EngineError, match="attribute direction of Relu is not translated"):
        built(TorchKind(), path, model_of("Relu", direction=1))
    old = onnx.load_from_string(MODELS["perceptron"])
    old.opset_import[0].version = 11
    with pytest.raises(EngineError, match="opset 11 is not translated, only 13 to 24"):
        built(TorchKind(), path, old.SerializeToString())
    with pytest.raises(EngineError, match="a type that torch is not given"):
        built(TorchKind(), path, onnx_models.identity(("BYTES",)))


def test_openvino_refuses_integers_of_64_bits_that_come_out(tmp_path: Path) -> None:
    if not OpenVinoKind().probe().available:
        pytest.skip(OpenVinoKind().probe().reason)
    with pytest.raises(EngineError, match="output 'out_INT64' is i64, which it does not compute in"):
        built(OpenVinoKind(), tmp_path / "m.onnx", onnx_models.identity(("INT64",)))


def test_probing_imports_no_library() -> None:
    """A server that does not use them must not pay for them."""
    code = (
        "import sys; from mlmesh_inference.engines.kinds import engine_kinds\n"
        "for kind in engine_kinds(): kind.probe()\n"
        "print([name for name in ('torch', 'openvino', 'onnx', 'tensorrt') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_kind_says_whether_it_can_run_and_why() -> None:
    for each in engine_kinds():
        found = each.probe()
        assert found.reason, each.name
        assert found.version or not found.available, each.name


def test_the_cuda_provider_is_there_or_says_what_is_missing(tmp_path: Path) -> None:
    found = OnnxCudaKind().probe()
    if found.available:
        engine = built(OnnxCudaKind(), tmp_path / "m.onnx", MODELS["perceptron"])
        assert engine.facts.device.startswith("cuda:0")
    else:
        assert "CUDA" in found.reason or "NVIDIA" in found.reason
        with pytest.raises(EngineError):
            built(OnnxCudaKind(), tmp_path / "m.onnx", MODELS["perceptron"])
