"""A trained model as ONNX, checked to answer as the trained one does before anybody may publish it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mlmesh_runtime.chunks import fsync_directory
from mlmesh_training.jobs import File, Tensor

if TYPE_CHECKING:
    from mlmesh_training.trainer.definition import Axis

OPSET = 20
BATCH_MAX_TRACED = 4096
PARITY_BATCHES = (1, 3, 64)
DIFFERENCE_MAX = 1e-3
"""Largest difference of a logit allowed between trained and exported model; of a regressor's value, in standard
deviations of its target."""
MEDIA_TYPE = "application/onnx"

Array = npt.NDArray[Any]
Axes = Mapping[str, "Mapping[int, Axis]"]
Session = Callable[[Sequence[Array]], list[Array]]
"""Answers inputs, in the order of the model's, with all outputs."""


class ExportError(Exception):
    """The exported model is not valid, or does not answer as the trained one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A request, and what the trained model answers to it: arrays, inputs and outputs in the model's order."""

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """An ONNX file, its inputs and outputs, and the largest difference of an output to the trained model."""

    file: File
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    max_abs_diff: float


def preload() -> None:
    """Import what the export needs, which takes seconds; harmless beside a running fit."""
    import onnx  # noqa: F401, PLC0415
    import onnxruntime  # noqa: F401, PLC0415
    import onnxscript  # noqa: F401, PLC0415
    from torch.onnx._internal.exporter import _core  # noqa: F401, PLC0415


def rehearse() -> None:
    """Export a tiny model to nowhere, so that the exporter has built its tables before the first real one."""
    preload()
    _program(nn.Linear(2, 2), (torch.zeros(2, 2),), input_names=("x",), output_names=("y",), axes={})


def export(
    model: nn.Module,
    cases: Sequence[Case],
    path: Path,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    axes: Axes | None = None,
    difference_max: float = DIFFERENCE_MAX,
) -> Exported:
    """Write the served model to path and check it.

    Args:
        model: the module that is served; see `Definition.serving`.
        cases: what `cases` gives. The last one is traced, too: at least two examples, no dimension of size 1.
        axes: dynamic dimensions beside the batch.
        difference_max: largest difference of the first output allowed.

    The file's inputs and outputs have these names, all with a dynamic batch. Errors: ExportError, OSError.
    """
    # Two examples: with one, the tracer would take the batch for a constant.
    example = tuple(torch.from_numpy(each[:2]) for each in cases[-1].inputs)
    proto = _program(model, example, input_names=input_names, output_names=output_names, axes=axes or {})
    _strip(proto)
    data = proto.SerializeToString(deterministic=True)
    inputs, outputs = check(data)
    names = tuple(tensor.name for tensor in (*inputs, *outputs))
    if names != (*input_names, *output_names):
        raise ExportError(f"its inputs and outputs are {', '.join(names)}")
    difference = parity(data, cases, difference_max=difference_max)
    return Exported(
        file=write_file(path, data, media_type=MEDIA_TYPE), inputs=inputs, outputs=outputs, max_abs_diff=difference
    )


def cases(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    *,
    input_names: Sequence[str],
    axes: Axes | None = None,
    batches: Sequence[int] = PARITY_BATCHES,
) -> list[Case]:
    """Requests of several batch sizes and, where there are further axes, of their least and middle size, with answers.

    Args:
        model: the module that is served, in evaluation mode, on the CPU.
        inputs: held-out examples; repeated where a batch is larger. The last case is all of them.
    """
    count, known = len(inputs[0]), axes or {}
    given = [tuple(each[torch.arange(size) % count] for each in inputs) for size in batches]
    sizes = {
        axis: inputs[list(input_names).index(name)].shape[dimension]
        for name, dynamic in known.items()
        for dimension, axis in dynamic.items()
    }
    for axis, whole in sizes.items():
        given += [
            _narrowed(inputs, input_names, known, axis.name, size, batch=min(3, count))
            for size in sorted({axis.low, (axis.low + whole) // 2})
            if axis.low <= size < whole
        ]
    return [_case(model, each) for each in (*given, tuple(inputs))]


def parity(data: bytes, cases: Sequence[Case], *, difference_max: float = DIFFERENCE_MAX) -> float:
    """Largest difference of the first output between the ONNX model and the trained one.

    Errors: ExportError when it is beyond difference_max, a class changes, or probabilities are not those of the logits.
    """
    run = session(data)
    largest = 0.0
    for case in cases:
        size = len(case.inputs[0])
        answers = run(case.inputs)
        for answer, expected in zip(answers, case.outputs, strict=True):
            if answer.shape != expected.shape or not np.isfinite(answer).all():
                raise ExportError(f"batch of {size}: unexpected shape {answer.shape} or values that are not finite")
        largest = max(largest, float(np.abs(answers[0] - case.outputs[0]).max()))
        if largest > difference_max or _changed(answers[0], case.outputs[0], difference_max):
            raise ExportError(f"batch of {size}: outputs differ by up to {largest:.3g}, allowed are {difference_max:g}")
        for answer, expected in zip(answers[1:], case.outputs[1:], strict=True):
            if not np.allclose(answer, expected, atol=max(1e-4, difference_max)):
                raise ExportError(f"batch of {size}: a further output, such as the probabilities, is another")
    return largest


def session(data: bytes, *, threads: int = 0) -> Session:
    """The model in ONNX Runtime on the processor. `threads` 0: as many as there are cores."""
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    made = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in made.get_inputs()]

    def run(inputs: Sequence[Array]) -> list[Array]:
        answers: list[Array] = made.run(None, dict(zip(names, inputs, strict=True)))
        return answers

    return run


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


def write_file(path: Path, data: bytes, *, media_type: str = "", name: str = "") -> File:
    """Write a file that is whole and durable or not there. `name`: its path in the version, where not the file's name.

    Errors: OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
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
    digest = hashlib.sha256(data).hexdigest()
    return File(path=name or path.name, sha256=digest, size_bytes=len(data), media_type=media_type)


def _program(
    model: nn.Module,
    example: tuple[torch.Tensor, ...],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    axes: Axes,
) -> Any:
    """The model as an ONNX ModelProto. Errors: ExportError."""
    batch = torch.export.Dim("batch", min=1, max=BATCH_MAX_TRACED)
    known: dict[str, Any] = {}

    def dimensions(name: str) -> dict[int, Any]:
        for axis in axes.get(name, {}).values():
            known.setdefault(axis.name, torch.export.Dim(axis.name, min=axis.low, max=axis.high))
        return {0: batch, **{at: known[axis.name] for at, axis in axes.get(name, {}).items()}}

    # The exporter gives outputs the names that are asked for without a look at its own values' names, and so makes
    # models with two values of one name. Names that no value has are given first, and changed afterwards.
    asked = [f"mlmesh__output_{index}" for index in range(len(output_names))]
    try:
        with _quiet(), torch.inference_mode(False):
            program = torch.onnx.export(
                _Positional(model, len(example)).eval(),
                example,
                dynamo=True,
                input_names=list(input_names),
                output_names=asked,
                dynamic_shapes=(tuple(dimensions(name) for name in input_names),),
                opset_version=OPSET,
                external_data=False,
                optimize=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"the exporter cannot express it: {str(error).splitlines()[0]}") from error
    if program is None:
        raise ExportError("the exporter gave nothing")
    proto = program.model_proto
    if len(proto.graph.output) != len(output_names):
        raise ExportError(f"it has {len(proto.graph.output)} outputs, expected {', '.join(output_names)}")
    _rename(proto, dict(zip(asked, output_names, strict=True)))
    return proto


class _Positional(nn.Module):
    """The model behind a signature with as many positional inputs as it has, which is what shapes are given for."""

    def __init__(self, model: nn.Module, inputs: int) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.model(*inputs[: self.inputs])


def _rename(proto: Any, names: Mapping[str, str]) -> None:
    """Give values new names; a value that has one of them already gets another."""
    graph = proto.graph
    taken = {value for node in graph.node for value in (*node.input, *node.output)}
    taken |= {value.name for value in (*graph.input, *graph.initializer, *graph.value_info)}
    inputs = {value.name for value in graph.input}
    if both := inputs & set(names.values()):
        raise ExportError(f"an input and an output are both called {', '.join(both)}")
    moved = {name: f"{name}__inner" for name in names.values() if name in taken}
    if clash := taken & set(moved.values()):
        raise ExportError(f"the model has values called {', '.join(sorted(clash))}")
    changes = {**moved, **names}
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [changes.get(value, value) for value in values]
    for value in (*graph.output, *graph.value_info, *graph.initializer):
        value.name = changes.get(value.name, value.name)


def _narrowed(
    inputs: Sequence[torch.Tensor], names: Sequence[str], axes: Axes, axis: str, size: int, *, batch: int
) -> tuple[torch.Tensor, ...]:
    """The first examples, with every dimension of an axis cut to a size."""
    cut = []
    for name, each in zip(names, inputs, strict=True):
        part = each[:batch]
        for dimension, known in axes.get(name, {}).items():
            if known.name == axis:
                part = part.narrow(dimension, 0, size)
        cut.append(part.contiguous())
    return tuple(cut)


def _case(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Case:
    with torch.no_grad():
        answers = model(*inputs)
    outputs = answers if isinstance(answers, tuple | list) else (answers,)
    return Case(inputs=tuple(each.numpy() for each in inputs), outputs=tuple(each.numpy() for each in outputs))


def _changed(answers: Array, expected: Array, difference_max: float) -> bool:
    """Whether a class changed although two logits are not as near as the difference allowed."""
    if answers.ndim != 2 or answers.shape[1] < 2:
        return False
    top = np.sort(expected, axis=1)[:, -2:]
    changed = answers.argmax(1) != expected.argmax(1)
    return bool((changed & (top[:, 1] - top[:, 0] > 2 * difference_max)).any())


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
