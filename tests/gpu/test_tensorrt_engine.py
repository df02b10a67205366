"""TensorRT for real. Compiling needs one of its packages; running needs an NVIDIA GPU too. Both are skipped visibly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mlmesh_inference.engines.base import Engine, EngineError, EngineOptions, build_preferred
from mlmesh_inference.engines.onnx import OnnxKind
from mlmesh_inference.engines.tensorrt import TensorRTKind, compile_plan, load_module
from mlmesh_inference.loading import warm_up
from mlmesh_inference.scheduling.policy import BatchPolicy
from tests.support import onnx_models

OPTIONS = EngineOptions(rows_max=32, rows_preferred=8)
HALVES = ["FP16", "BF16", "FP32", "INT32", "INT64", "INT8", "BOOL"]

_PROBE = TensorRTKind().probe()
needs_gpu = pytest.mark.skipif(not _PROBE.available, reason=f"TensorRT cannot run here: {_PROBE.reason}")


@pytest.fixture(scope="module")
def trt() -> ModuleType:
    """The package; compiling for a GPU that is not here works with tensorrt_rtx."""
    try:
        module = load_module()
    except EngineError as error:
        pytest.skip(f"TensorRT cannot compile here: {error}")
    if not _PROBE.available and not module.__name__.startswith("tensorrt_rtx"):
        pytest.skip(f"{module.__name__} compiles only on a GPU: {_PROBE.reason}")
    return module


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "data",
    [onnx_models.add(), onnx_models.classes(), onnx_models.fixed(), onnx_models.identity(HALVES, ("batch", 3))],
    ids=["add", "classes", "fixed", "halves"],
)
def test_models_compile(data: bytes, trt: ModuleType, tmp_path: Path) -> None:
    assert compile_plan(trt, write(tmp_path / "model.onnx", data), OPTIONS).nbytes > 0


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"this is no model", "cannot read it"), (onnx_models.identity(["FP32"]), "free dimension beside the batch")],
)
def test_what_does_not_compile_says_why(data: bytes, text: str, trt: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=text):
        compile_plan(trt, write(tmp_path / "model.onnx", data), OPTIONS)


@pytest.fixture
def classes(tmp_path: Path) -> Iterator[tuple[Engine, Engine]]:
    """The same model on TensorRT and on ONNX Runtime."""
    path = write(tmp_path / "model.onnx", onnx_models.classes())
    fast, reference = TensorRTKind().build(path, OPTIONS), OnnxKind().build(path, OPTIONS)
    yield fast, reference
    fast.close()
    reference.close()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("count", [1, 2, 7, 8, 31, 32])
def test_answers_are_those_of_onnx_runtime(count: int, classes: tuple[Engine, Engine]) -> None:
    x = np.random.default_rng(count).standard_normal((count, 64)).astype(np.float32)
    fast, reference = (engine.run({"x": x}, ["scores"])[0] for engine in classes)
    # TensorRT may multiply FP32 in TF32, which keeps ten bits of the fraction.
    np.testing.assert_allclose(fast, reference, rtol=2e-2, atol=5e-2)
    assert (fast.argmax(1) == reference.argmax(1)).mean() > 0.9


@pytest.mark.gpu
@needs_gpu
def test_results_stay_what_they_were(classes: tuple[Engine, Engine]) -> None:
    engine, _ = classes
    first = engine.run({"x": np.ones((4, 64), np.float32)}, ["scores"])[0]
    before = first.copy()
    engine.run({"x": np.zeros((32, 64), np.float32)}, ["scores"])
    np.testing.assert_array_equal(first, before)


@pytest.mark.gpu
@needs_gpu
def test_no_rows(classes: tuple[Engine, Engine]) -> None:
    assert classes[0].run({"x": np.empty((0, 64), np.float32)}, ["scores"])[0].shape == (0, 10)


@pytest.mark.gpu
@needs_gpu
def test_every_datatype_that_it_has(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", onnx_models.identity(HALVES, ("batch", 3)))
    engine = TensorRTKind().build(path, OPTIONS)
    inputs = {
        spec.name: np.array([[0, 1, 1], [1, 0, 1]]).astype(spec.datatype.dtype) for spec in engine.signature.inputs
    }
    for name, array in zip(HALVES, engine.run(inputs, [f"out_{kind}" for kind in HALVES]), strict=True):
        np.testing.assert_array_equal(array, inputs[f"in_{name}"], err_msg=name)
    engine.close()


@pytest.mark.gpu
@needs_gpu
def test_it_is_preferred_warms_up_and_says_why(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", onnx_models.add())
    built = build_preferred([TensorRTKind(), OnnxKind()], path, OPTIONS)
    assert built.engine.name == "tensorrt"
    assert "runs on" in built.reason
    warm_up(built.engine, BatchPolicy(rows_max=32, rows_preferred=8))
    built.engine.close()


@pytest.mark.gpu
@needs_gpu
def test_what_it_refuses_goes_to_onnx_runtime(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", onnx_models.identity(["FP32"]))
    built = build_preferred([TensorRTKind(), OnnxKind()], path, OPTIONS)
    assert built.engine.name == "onnxruntime-cpu"
    assert "free dimension" in built.reason
    built.engine.close()


@pytest.mark.gpu
@needs_gpu
def test_building_and_closing_many_times_gives_the_memory_back(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", onnx_models.add(width=1 << 16))
    for _ in range(20):
        engine = TensorRTKind().build(path, EngineOptions(rows_max=256, rows_preferred=8))
        engine.run({"x": np.ones((256, 1 << 16), np.float32)}, ["y"])
        engine.close()
