"""What a configuration makes of a model's own signature, and where the two do not go together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlmesh_inference.configured import (
    ConfigError,
    batched,
    labels_of,
    read_labels,
    rows_bounds,
    sample,
    served_signature,
)
from mlmesh_inference.serving import BatchingConfig, Fill, SampleInput, ServingConfig, TensorConfig, WarmupSample
from mlmesh_inference.tensors import DATATYPES, Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(
        TensorSpec(name="x", datatype=DATATYPES["FP32"], shape=(-1, 4)),
        TensorSpec(name="text", datatype=DATATYPES["BYTES"], shape=(-1, -1), optional=True),
    ),
    outputs=(TensorSpec(name="y", datatype=DATATYPES["FP32"], shape=(-1, -1)),),
)


def said(*inputs: TensorConfig, outputs: tuple[TensorConfig, ...] = (), rows_max: int | None = None) -> ServingConfig:
    return ServingConfig(inputs=inputs, outputs=outputs, rows_max=rows_max)


def test_nothing_said_changes_nothing() -> None:
    assert served_signature(ServingConfig(), SIGNATURE) == SIGNATURE
    assert batched(ServingConfig(), SIGNATURE)


def test_a_free_dimension_is_narrowed() -> None:
    served = served_signature(said(outputs=(TensorConfig(name="y", dims=(10,)),), rows_max=8), SIGNATURE)
    assert served.outputs[0].shape == (-1, 10)


def test_an_optional_input_becomes_required_or_stays() -> None:
    assert not served_signature(said(TensorConfig(name="text")), SIGNATURE).inputs[1].optional
    assert served_signature(said(TensorConfig(name="text", optional=True)), SIGNATURE).inputs[1].optional


@pytest.mark.parametrize(
    "config",
    [said(rows_max=0), said(TensorConfig(name="x", dims=(-1, 4)), outputs=(TensorConfig(name="y", dims=(-1, 3)),))],
)
def test_a_model_may_be_told_not_to_batch(config: ServingConfig) -> None:
    assert not batched(config, SIGNATURE)
    served = served_signature(config, SIGNATURE)
    assert served.inputs[0].shape == (-1, 4)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (said(TensorConfig(name="z")), "the configuration says input 'z', the model has ['x', 'text']"),
        (said(TensorConfig(name="x", datatype="INT8")), "'x' is INT8, the model says FP32"),
        (said(TensorConfig(name="x", dims=(5,)), rows_max=1), "has dims [5] beside the batch dimension"),
        (said(TensorConfig(name="x", dims=(-1,)), rows_max=1), "has dims [-1]"),
        (said(TensorConfig(name="x", optional=True)), "cannot do without it"),
    ],
)
def test_what_the_model_contradicts_is_refused(config: ServingConfig, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        served_signature(config, SIGNATURE)
    assert text in str(caught.value)


def test_batching_needs_a_free_first_dimension() -> None:
    fixed = Signature(inputs=(TensorSpec(name="x", datatype=DATATYPES["FP32"], shape=(1, 4)),), outputs=())
    with pytest.raises(ConfigError, match="no free first dimension"):
        batched(said(rows_max=4), fixed)


def test_rows() -> None:
    assert rows_bounds(ServingConfig(), rows_max=64, rows_preferred=8) == (64, 8)
    assert rows_bounds(said(rows_max=4), rows_max=64, rows_preferred=8) == (4, 4)
    asked = ServingConfig(rows_max=32, batching=BatchingConfig(preferred_rows=(4, 16)))
    assert rows_bounds(asked, rows_max=64, rows_preferred=8) == (32, 16)
    with pytest.raises(ConfigError, match="MLMESH_BATCH_ROWS_MAX"):
        rows_bounds(said(rows_max=65), rows_max=64, rows_preferred=8)
    with pytest.raises(ConfigError, match="preferred_batch_size is 16"):
        rows_bounds(ServingConfig(rows_max=8, batching=asked.batching), rows_max=64, rows_preferred=8)


def test_labels_are_an_outputs_own_or_everybodys(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a\nb\n")
    (tmp_path / "own.txt").write_text("c\n")
    config = ServingConfig(outputs=(TensorConfig(name="y", labels_file="own.txt"),))
    labels = read_labels(tmp_path, config)
    assert (labels_of(labels, "y"), labels_of(labels, "z")) == (("c",), ("a", "b"))
    assert labels_of({}, "z") == ()
    with pytest.raises(ConfigError, match=r"no file 'gone\.txt'"):
        read_labels(tmp_path, ServingConfig(outputs=(TensorConfig(name="y", labels_file="gone.txt"),)))


def _entry(fill: Fill, *, datatype: str = "FP32", dims: tuple[int, ...] = (4,), file: str = "") -> SampleInput:
    return SampleInput(name="x", datatype=datatype, dims=dims, fill=fill, file=file)


def test_samples(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    zeros, random, read = (
        sample(WarmupSample(name="w", rows=2, inputs=(entry,)), SIGNATURE, tmp_path, batches=True)["x"]
        for entry in (_entry(Fill.ZEROS), _entry(Fill.RANDOM), _entry(Fill.FILE, file="x.bin"))
    )
    assert zeros.shape == random.shape == read.shape == (2, 4)
    assert not zeros.any()
    assert random.any()
    assert read.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (WarmupSample(name="w", rows=1), "gives inputs []"),
        (WarmupSample(name="w", inputs=(_entry(Fill.ZEROS),)), "needs a batch_size"),
        (WarmupSample(name="w", rows=1, inputs=(_entry(Fill.ZEROS, datatype="INT8"),)), "is INT8"),
        (WarmupSample(name="w", rows=1, inputs=(_entry(Fill.FILE, file="gone"),)), "no such file 'gone'"),
        (WarmupSample(name="w", rows=1, inputs=(_entry(Fill.FILE, file="short"),)), "byte size mismatch"),
        (WarmupSample(name="w", rows=1 << 20, inputs=(_entry(Fill.ZEROS, dims=(1024,)),)), "bytes"),
    ],
)
def test_samples_that_do_not_go_with_the_model(given: WarmupSample, text: str, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"1")
    with pytest.raises(ConfigError) as caught:
        sample(given, SIGNATURE, tmp_path, batches=True)
    assert text in str(caught.value)
