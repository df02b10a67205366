"""A trained model as ONNX, checked to answer as the trained one does before anybody may publish it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mlmesh_runtime.chunks import fsync_directory
from mlmesh_training.jobs import File, Tensor

OPSET = 20
BATCH_MAX_TRACED = 4096
PARITY_BATCHES = (1, 3, 64)
DIFFERENCE_MAX = 1e-3
"""Largest difference of a logit allowed between trained and exported model."""
MEDIA_TYPE = "application/onnx"


class ExportError(Exception):
    """The exported model is not valid, or does not answer as the trained one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """An ONNX file, its inputs and outputs, and the largest difference of a logit to the trained model."""

    file: File
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    max_abs_diff: float


class _WithProbabilities(nn.Module):
    """What is served: logits, and the probabilities that they mean."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.classifier(image)
        return logits, torch.softmax(logits, dim=1)


def preload() -> None:
    """Import what the export needs, which takes seconds; harmless beside a running fit."""
    import onnx  # noqa: F401, PLC0415
    import onnxruntime  # noqa: F401, PLC0415
    import onnxscript  # noqa: F401, PLC0415
    from torch.onnx._internal.exporter import _core  # noqa: F401, PLC0415


def rehearse() -> None:
    """Export a tiny model to nowhere, so that the exporter has built its tables before the first real one."""
    preload()
    _program(nn.Linear(2, 2), torch.zeros(2, 2))


def export(model: nn.Module, images: npt.NDArray[np.float32], logits: npt.NDArray[np.float32], path: Path) -> Exported:
    """Write the model to path and check it.

    Args:
        model: from raw images, FP32 [batch, 1, height, width], to logits, FP32 [batch, classes].
        images: held-out raw images, FP32 [examples, 1, height, width].
        logits: what the trained model answers to them, FP32 [examples, classes].

    The file takes `image` and gives `logits` and `probabilities`, all with a dynamic batch.
    Errors: ExportError, OSError.
    """
    # Two examples: with one, the tracer would take the batch for a constant.
    proto = _program(model, torch.from_numpy(images[:2]))
    _strip(proto)
    data = proto.SerializeToString(deterministic=True)
    inputs, outputs = check(data)
    difference = parity(data, images, logits)
    return Exported(
        file=write_file(path, data, media_type=MEDIA_TYPE), inputs=inputs, outputs=outputs, max_abs_diff=difference
    )


def _program(model: nn.Module, example: torch.Tensor) -> Any:
    """The model with its probabilities as an ONNX ModelProto. Errors: ExportError."""
    batch = torch.export.Dim("batch", min=1, max=BATCH_MAX_TRACED)
    with _quiet(), torch.inference_mode(False):
        program = torch.onnx.export(
            _WithProbabilities(model).eval(),
            (example,),
            dynamo=True,
            input_names=["image"],
            output_names=["logits", "probabilities"],
            dynamic_shapes={"image": {0: batch}},
            opset_version=OPSET,
            external_data=False,
            optimize=True,
            verbose=False,
        )
    if program is None:
        raise ExportError("the exporter gave nothing")
    return program.model_proto


def check(data: bytes) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Check the model's structure and shapes; return its inputs and outputs. Errors: ExportError."""
    import onnx  # noqa: PLC0415

    try:
        onnx.checker.check_model(data, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(str(error)) from error
    proto = onnx.load_from_string(data)
    return (
        tuple(_tensor(value) for value in proto.graph.input),
        tuple(_tensor(value) for value in proto.graph.output),
    )


def parity(data: bytes, images: npt.NDArray[np.float32], logits: npt.NDArray[np.float32]) -> float:
    """Largest difference of a logit between the ONNX model and the trained one, over several batch sizes.

    Errors: ExportError when it is beyond DIFFERENCE_MAX, a class changes, or probabilities do not add up to 1.
    """
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    largest = 0.0
    for size in (*PARITY_BATCHES, len(images)):
        given = np.resize(np.arange(len(images)), size)
        answers, probabilities = session.run(["logits", "probabilities"], {"image": images[given]})
        if answers.shape != (size, logits.shape[1]) or not np.isfinite(answers).all():
            raise ExportError(f"batch of {size}: unexpected shape {answers.shape} or values that are not finite")
        largest = max(largest, float(np.abs(answers - logits[given]).max()))
        if not np.allclose(probabilities.sum(axis=1), 1.0, atol=1e-4):
            raise ExportError(f"batch of {size}: probabilities do not add up to 1")
        # Classes may only change where two logits are as near as the difference allowed.
        top = np.sort(logits[given], axis=1)[:, -2:]
        changed = answers.argmax(1) != logits[given].argmax(1)
        if largest > DIFFERENCE_MAX or (changed & (top[:, 1] - top[:, 0] > 2 * DIFFERENCE_MAX)).any():
            raise ExportError(f"batch of {size}: logits differ by up to {largest:.3g}, allowed are {DIFFERENCE_MAX:g}")
    return largest


def write_file(path: Path, data: bytes, *, media_type: str = "") -> File:
    """Write a file that is whole and durable or not there. Errors: OSError."""
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)
    return File(path=path.name, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data), media_type=media_type)


def _tensor(value: Any) -> Tensor:
    import onnx  # noqa: PLC0415

    kind = value.type.tensor_type
    names = {onnx.TensorProto.FLOAT: "FP32", onnx.TensorProto.FLOAT16: "FP16", onnx.TensorProto.INT64: "INT64"}
    if kind.elem_type not in names:
        raise ExportError(f"{value.name}: unexpected element type {kind.elem_type}")
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
    return Tensor(name=value.name, datatype=names[kind.elem_type], shape=shape)


def _strip(proto: Any) -> None:
    """Remove what the exporter notes for itself: paths and stack traces of this machine, which nobody serves."""
    proto.ClearField("metadata_props")
    proto.graph.ClearField("metadata_props")
    proto.graph.ClearField("doc_string")
    for item in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    for initializer in proto.graph.initializer:
        initializer.ClearField("metadata_props")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on optional packages and its own deprecations out of the job's log."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
