"""Smaller models from trained ones, with real torch and ONNX Runtime: what is won, what is lost, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from mlmesh_training import documents, export, recipes
from mlmesh_training.backends.base import TrainingTask
from mlmesh_training.backends.results import read_result
from mlmesh_training.jobs import OptimizationResult, TrainedModel
from mlmesh_training.options import (
    Distillation,
    Distribution,
    MixedPrecision,
    Optimization,
    Precision,
    Pruning,
    Quantization,
    Strategy,
    Technique,
)
from mlmesh_training.trainer import optimizing, run
from mlmesh_training.trainer.reporter import PermanentError
from tests.integration.training.test_trainer import Listener
from tests.support.training import spec

SOURCE = "models/digits/versions/1"


def task(
    folder: Path, technique: Technique | None = None, *, dataset: str = "digits", recipe: str = "cnn", **settings: float
) -> TrainingTask:
    values = recipes.resolve(spec(recipe=recipe, dataset=dataset, hyperparameters=settings))
    optimization = Optimization(source=SOURCE, technique=technique, quality_drop_max=0.02) if technique else None
    return TrainingTask(
        uid=folder.name, recipe=recipe, dataset=dataset, hyperparameters=values, seed=7, optimization=optimization
    )


def train(folder: Path, wanted: TrainingTask, source: Path | None = None) -> tuple[TrainedModel, Listener]:
    folder.mkdir(parents=True, exist_ok=True)
    if source is not None:
        shutil.copytree(source, folder / "source", dirs_exist_ok=True)
    (folder / "task.json").write_text(documents.dumps(documents.task_document(wanted)))
    listener = Listener()
    run.train(folder, listener, threads=1)
    return read_result(folder), listener


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a trained version, as the fetcher leaves them."""
    folder = tmp_path_factory.mktemp("optimizing") / "source-job"
    model, _ = train(folder, task(folder, epochs=6, width=16))
    kept = folder.parent / "source"
    for file in model.files:
        (kept / file.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / file.path, kept / file.path)
    return kept


def result_of(model: TrainedModel, listener: Listener) -> OptimizationResult:
    (told,) = listener.of(OptimizationResult)
    assert isinstance(told, OptimizationResult)
    assert model.optimization == told
    assert told.source == SOURCE
    assert told.quality_drop == pytest.approx(told.before.accuracy - told.after.accuracy)
    assert told.quality_drop <= told.quality_drop_max
    assert told.before.accuracy > 0.9
    return told


def test_int8_is_smaller_and_as_right_on_the_same_held_out_examples(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "int8"
    # Another seed than the source's: the split must still be the source's, or test examples would have been trained on.
    wanted = dataclasses.replace(task(folder, Quantization(calibration_examples=128)), seed=1234)
    model, listener = train(folder, wanted, source)
    result = result_of(model, listener)
    original = json.loads((source / "evaluation.json").read_text())
    assert result.before.confusion == tuple(map(tuple, original["confusion"]))
    assert result.technique == "int8"
    assert result.size_bytes_after < 0.5 * result.size_bytes_before
    proto = onnx.load(folder / "model.onnx")
    kinds = {node.op_type for node in proto.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    # Symmetric, which is what TensorRT takes: every zero point is 0.
    zeros = [init for init in proto.graph.initializer if init.name.endswith("_zero_point")]
    assert zeros
    assert all(not onnx.numpy_helper.to_array(zero).any() for zero in zeros)
    assert [tensor.name for tensor in model.inputs] == ["image"]
    assert [tensor.name for tensor in model.outputs] == ["logits", "probabilities"]
    assert model.metrics["size_ratio"] == result.size_bytes_after / result.size_bytes_before
    assert model.labels["optimization"] == "int8"
    assert json.loads((folder / "optimization.json").read_text())["technique"] == "int8"


def test_half_precision_keeps_its_edges(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fp16"
    model, listener = train(folder, task(folder, MixedPrecision()), source)
    result = result_of(model, listener)
    assert result.technique == "fp16"
    assert result.size_bytes_after < 0.6 * result.size_bytes_before
    assert {tensor.datatype for tensor in (*model.inputs, *model.outputs)} == {"FP32"}
    kinds = {init.data_type for init in onnx.load(folder / "model.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds
    with pytest.raises(PermanentError, match="BF16 models cannot be checked here"):
        train(tmp_path / "bf16", task(tmp_path / "bf16", MixedPrecision(precision=Precision.BF16)), source)


@pytest.mark.parametrize(
    "pruning", [Pruning(sparsity=0.6, epochs=2), Pruning(two_four=True, epochs=2)], ids=["60", "2:4"]
)
def test_pruned_weights_are_zero_in_what_is_served(source: Path, tmp_path: Path, pruning: Pruning) -> None:
    folder = tmp_path / "pruned"
    # Its hyperparameters are the source's, whatever the job says.
    model, listener = train(folder, task(folder, pruning, width=4, epochs=50), source)
    result = result_of(model, listener)
    assert result.technique == ("2:4" if pruning.two_four else "pruned")
    weights = [
        onnx.numpy_helper.to_array(init)
        for init in onnx.load(folder / "model.onnx").graph.initializer
        if len(init.dims) >= 2 and np.prod(init.dims) > 64
    ]
    assert weights
    zero = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.size for weight in weights)
    if pruning.two_four:
        assert 0.45 <= result.sparsity <= 0.5
        assert 0.45 <= zero <= 0.51
    else:
        assert result.sparsity == pytest.approx(0.6, abs=0.01)
        assert zero == pytest.approx(0.6, abs=0.03)
    assert model.labels["hyperparameters.width"] == "16"
    assert model.labels["hyperparameters.epochs"] == "2"


def test_a_small_student_learns_from_the_source(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    wanted = task(folder, Distillation(), recipe="mlp", width=24, depth=1, epochs=12, learning_rate=0.01)
    assert wanted.optimization is not None
    wanted = dataclasses.replace(wanted, optimization=dataclasses.replace(wanted.optimization, quality_drop_max=0.1))
    model, listener = train(folder, wanted, source)
    (result,) = listener.of(OptimizationResult)
    assert isinstance(result, OptimizationResult)
    assert result.technique == "distilled"
    assert result.after.accuracy > 0.85
    assert result.size_bytes_after < 0.5 * result.size_bytes_before
    # The teacher was asked: the same student without one is another model.
    plain = tmp_path / "plain"
    alone, _ = train(plain, task(plain, recipe="mlp", width=24, depth=1, epochs=12, learning_rate=0.01))
    assert {f.sha256 for f in alone.files if f.path == "model.onnx"} != {
        f.sha256 for f in model.files if f.path == "model.onnx"
    }


def test_what_lost_too_much_is_refused_with_the_figures_and_leaves_no_result(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ruined"
    with pytest.raises(
        PermanentError, match=r"pruned model is not good enough: accuracy fell by 0\.\d+, from 0\.9\d+ to"
    ):
        train(folder, task(folder, Pruning(sparsity=0.995, epochs=1)), source)
    assert not (folder / "result.json").exists()


def test_sources_that_do_not_fit_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    with pytest.raises(PermanentError, match=r"models/digits/versions/1 was trained on digits, not on mnist"):
        train(folder, task(folder, Quantization(), dataset="mnist"), source)
    with pytest.raises(PermanentError, match="was trained by recipe 'cnn', not 'mlp'"):
        train(folder, task(folder, Quantization(), recipe="mlp"), source)
    sharded = Distribution(processes=2, strategy=Strategy.FSDP2)
    with pytest.raises(PermanentError, match="cannot be sharded"):
        train(folder, dataclasses.replace(task(folder, Pruning()), distribution=sharded), source)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(source / "model.onnx", bare / "model.onnx")
    alone = tmp_path / "alone"
    with pytest.raises(
        PermanentError, match=r"was not trained here \(it has no training\.json\), so it cannot be pruned"
    ):
        train(alone, task(alone, Pruning()), bare)
    model, _ = train(tmp_path / "foreign", task(tmp_path / "foreign", Quantization()), bare)
    assert model.optimization is not None
    (bare / "model.onnx").write_bytes(b"no model")
    with pytest.raises(PermanentError, match="cannot be quantised"):
        train(tmp_path / "torn", task(tmp_path / "torn", Quantization()), bare)


def test_int8_engines_compile_for_nvidia_gpus(source: Path, tmp_path: Path) -> None:
    bindings = pytest.importorskip("tensorrt_rtx_bindings", reason="no TensorRT for RTX here")
    data = optimizing.converted(
        Optimization(source=SOURCE, technique=Quantization(calibration_examples=64)),
        (source / "model.onnx").read_bytes(),
        *run.load(source.parent / "source-job", run.read_task(source.parent / "source-job")),
    )
    logger = bindings.Logger(bindings.Logger.ERROR)
    builder = bindings.Builder(logger)
    network = builder.create_network(0)
    parser = bindings.OnnxParser(network, logger)
    assert parser.parse(data), [str(parser.get_error(index)) for index in range(parser.num_errors)]
    profile = builder.create_optimization_profile()
    profile.set_shape("image", (1, 1, 8, 8), (8, 1, 8, 8), (64, 1, 8, 8))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


def test_export_parity_is_kept_for_optimised_models(source: Path) -> None:
    """The tolerance of the export is not loosened by the wrappers."""
    assert export.DIFFERENCE_MAX == 1e-3
    assert json.loads((source / "evaluation.json").read_text())["export_max_abs_diff"] <= export.DIFFERENCE_MAX
