"""ONNX Runtime with every datatype, the choice among engines, and what keeps TensorRT from running here."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlmesh_inference.engines import cuda, tensorrt, tensorrt_api
from mlmesh_inference.engines.base import (
    Availability,
    EngineError,
    EngineOptions,
    build_preferred,
)
from mlmesh_inference.engines.onnx import OnnxKind
from mlmesh_inference.engines.tensorrt import TensorRTKind
from mlmesh_inference.tensors import DATATYPES
from tests.support import onnx_models
from tests.support.inference import onnx_engine, rows


def _sample(kind: str) -> Any:
    if kind == "BYTES":
        array = np.empty((2, 2), object)
        array[:] = [[b"", b"a\x00b"], ["grüß".encode(), b"x"]]
        return array
    return np.array([[0, 1], [1, 0]]).astype(DATATYPES[kind].dtype)


# ONNX Runtime takes strings in no run that gives BF16.
@pytest.mark.parametrize("left_out", ["BF16", "BYTES"])
def test_every_datatype_goes_through(left_out: str, tmp_path: Path) -> None:
    kinds = sorted(set(DATATYPES) - {left_out})
    engine = onnx_engine(tmp_path / "model.onnx", onnx_models.identity(kinds))
    assert [spec.datatype.name for spec in engine.signature.inputs] == kinds
    assert engine.signature.batches
    inputs = {f"in_{kind}": _sample(kind) for kind in kinds}
    results = engine.run(inputs, [f"out_{kind}" for kind in kinds])
    for kind, result in zip(kinds, results, strict=True):
        assert result.dtype == DATATYPES[kind].dtype, kind
        assert result.tolist() == _sample(kind).tolist(), kind
    engine.close()


@pytest.mark.parametrize("kind", sorted(DATATYPES))
def test_no_rows_go_through(kind: str, tmp_path: Path) -> None:
    engine = onnx_engine(tmp_path / "model.onnx", onnx_models.identity([kind]))
    (result,) = engine.run({f"in_{kind}": _sample(kind)[:0]}, [f"out_{kind}"])
    assert result.shape == (0, 2)
    assert result.dtype == DATATYPES[kind].dtype


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    engine = onnx_engine(tmp_path / "model.onnx", onnx_models.identity(["BYTES"]))
    array = np.empty((1, 1), object)
    array[0, 0] = b"\xff\xfe"
    with pytest.raises(EngineError, match="utf-8"):
        engine.run({"in_BYTES": array}, ["out_BYTES"])


def test_strings_in_and_bf16_out_are_refused_when_built(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="BYTES"):
        onnx_engine(tmp_path / "model.onnx", onnx_models.identity(["BYTES", "BF16"]))


def test_a_model_of_fixed_shape_does_not_batch(tmp_path: Path) -> None:
    assert not onnx_engine(tmp_path / "model.onnx", onnx_models.fixed()).signature.batches


def test_one_session_runs_from_several_threads(tmp_path: Path) -> None:
    engine = onnx_engine(tmp_path / "model.onnx", onnx_models.add(), concurrency=4)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: engine.run({"x": rows(float(n))}, ["y"])[0][0, 0], range(64)))
    assert results == [n + 1.0 for n in range(64)]


def test_files_outside_of_the_versions_folder_are_not_read(tmp_path: Path) -> None:
    """A model may keep its weights in files beside it; a path that climbs out of its folder must not be followed."""
    import onnx

    model = onnx.load_from_string(onnx_models.classes())
    secret = tmp_path / "secret.bin"
    weights = model.graph.initializer[0]
    secret.write_bytes(weights.raw_data)
    onnx.external_data_helper.set_external_data(weights, location="../secret.bin")
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    folder = tmp_path / "m" / "1"
    folder.mkdir(parents=True)
    with pytest.raises(EngineError):
        onnx_engine(folder / "model.onnx", model.SerializeToString())


@pytest.mark.parametrize("data", [b"", b"\x80\x03pickle", b"\x00" * 100, onnx_models.add()[:-20]])
def test_what_is_no_model_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        onnx_engine(tmp_path / "model.onnx", data)
    assert str(tmp_path) not in str(caught.value)


class Kind:
    """An engine kind that answers what it is told."""

    precisions = ("fp32",)

    def __init__(self, name: str, *, available: bool = True, refuses: str = "") -> None:
        self.name = name
        self._available = available
        self._refuses = refuses

    def probe(self) -> Availability:
        return Availability(available=self._available, reason=f"{self.name} says so")

    def build(self, model: Path, options: EngineOptions) -> Any:
        if self._refuses:
            raise EngineError(self._refuses)
        return self.name


def test_the_first_engine_that_can_is_taken_and_says_why() -> None:
    kinds = [Kind("a", available=False), Kind("b", refuses="no such operator"), Kind("c"), Kind("d")]
    built = build_preferred(kinds, Path("model.onnx"), EngineOptions())
    assert built.engine == "c"
    assert built.reason == "c says so; b refused the model: no such operator; a: a says so"


def test_when_none_can_the_refusals_are_told() -> None:
    kinds = [Kind("a", available=False), Kind("b", refuses="no such operator")]
    with pytest.raises(EngineError, match=r"^b refused the model: no such operator$"):
        build_preferred(kinds, Path("model.onnx"), EngineOptions())
    with pytest.raises(EngineError, match=r"^a: a says so$"):
        build_preferred(kinds[:1], Path("model.onnx"), EngineOptions())


def test_onnx_runtime_is_available_with_its_version() -> None:
    probe = OnnxKind().probe()
    assert probe.available
    assert probe.version


def test_tensorrt_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: str) -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(cuda.ctypes, "CDLL", missing)
    probe = TensorRTKind().probe()
    assert not probe.available
    assert probe.reason == "no NVIDIA driver here (libcuda.so.1 is missing)"


def test_tensorrt_without_its_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = cuda.Gpu(ordinal=0, name="NVIDIA H100", capability=(9, 0))
    monkeypatch.setattr(tensorrt, "find_gpu", lambda _ordinal: gpu)

    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(tensorrt_api.importlib, "import_module", absent)
    probe = TensorRTKind().probe()
    assert not probe.available
    assert "NVIDIA H100 is here, but no TensorRT package can be imported" in probe.reason
    assert "tensorrt_rtx" in probe.reason
