"""From ModelInferRequest to what the batcher takes. Everything is checked before anything is allocated.

The texts are those that the protocol's clients compare; see the module's functions for the rule each one enforces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mlmesh_inference.batcher import check_rows
from mlmesh_inference.catalog import ReadyModel
from mlmesh_inference.tensors import Array, TensorSpec, datatype, decode_raw, decode_typed, element_count, show
from mlmesh_runtime.errors import InvalidInput, Unsupported
from open_inference import grpc_service_pb2 as pb

TENSORS_MAX: Final = 1024
"""Most inputs or outputs of a request."""
CLASSES_MAX: Final = 1 << 20

_EMPTY_FINAL: Final = "triton_enable_empty_final_response"
_CONTENTS: Final = tuple(field.name for field in pb.InferTensorContents.DESCRIPTOR.fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request that is in order.

    Attributes:
        inputs: arrays by name. outputs: names wanted, in that order. rows: size of the batch dimension, 1 without.
        classes: by output, how many of the best classes are wanted instead of the tensor.
        timeout_us: longest wait in the queue, 0 for none.
        typed: whether to answer in typed contents, as the request came.
    """

    inputs: Mapping[str, Array]
    outputs: tuple[str, ...]
    rows: int
    classes: Mapping[str, int]
    timeout_us: int
    typed: bool


def read(message: pb.ModelInferRequest, model: ReadyModel) -> Request:
    """Check and convert. Raises InvalidInput (INVALID_FIELD, SHAPE_MISMATCH) or Unsupported."""
    timeout_us = _parameters(message.parameters) if message.parameters else 0
    raw = message.raw_input_contents
    inputs, typed = _raw_inputs(message, raw, model) if raw else _typed_inputs(message, model)
    if len(inputs) != len(model.inputs):
        _check_missing(inputs, model)
    outputs, classes = _outputs(message.outputs, model) if message.outputs else (model.output_names, {})
    return Request(
        inputs=inputs,
        outputs=outputs,
        rows=_rows(inputs, model) if model.policy.batches else 1,
        classes=classes,
        timeout_us=timeout_us,
        typed=typed,
    )


def _raw_inputs(
    message: pb.ModelInferRequest, raw: Sequence[bytes], model: ReadyModel
) -> tuple[dict[str, Array], bool]:
    if len(raw) != len(message.inputs):
        raise InvalidInput(
            f"expected {len(message.inputs)} raw_input_contents for model '{model.name}', one an input, got {len(raw)}",
            field="raw_input_contents",
            reason="SHAPE_MISMATCH",
        )
    inputs: dict[str, Array] = {}
    for tensor, content in zip(message.inputs, raw, strict=True):
        spec = _spec(tensor, inputs, model)
        if tensor.HasField("contents"):
            raise InvalidInput(
                f"contents field must not be specified when using raw_input_contents for '{spec.name}' for model "
                f"'{model.name}'",
                field=f"inputs[{spec.name}].contents",
            )
        shape = tensor.shape
        _check_shape(shape, spec, model)
        inputs[spec.name] = decode_raw(spec.datatype, shape, content, tensor=spec.name, model=model.name)
    return inputs, False


def _typed_inputs(message: pb.ModelInferRequest, model: ReadyModel) -> tuple[dict[str, Array], bool]:
    inputs: dict[str, Array] = {}
    typed = False
    for tensor in message.inputs:
        spec = _spec(tensor, inputs, model)
        _check_shape(tensor.shape, spec, model)
        typed = typed or tensor.HasField("contents")
        values = _contents(tensor, spec, model)
        inputs[spec.name] = decode_typed(spec.datatype, tensor.shape, values, tensor=spec.name, model=model.name)
    return inputs, typed


def _spec(tensor: pb.ModelInferRequest.InferInputTensor, seen: Mapping[str, Array], model: ReadyModel) -> TensorSpec:
    """The model's idea of an input, when name, datatype and parameters of the request's go with it."""
    name = tensor.name
    spec = model.inputs.get(name)
    if spec is None:
        raise InvalidInput(f"unexpected inference input '{name[:256]}' for model '{model.name}'", field="inputs")
    if name in seen:
        raise InvalidInput(f"input '{name}' already exists in request", field=f"inputs[{name}]")
    if tensor.datatype != spec.datatype.name:
        datatype(tensor.datatype, tensor=name)
        raise InvalidInput(
            f"inference input '{name}' data-type is '{tensor.datatype}', but model '{model.name}' expects "
            f"'{spec.datatype.name}'",
            field=f"inputs[{name}].datatype",
        )
    if tensor.parameters:
        _no_shared_memory(tensor.parameters)
    return spec


def _check_shape(shape: Sequence[int], spec: TensorSpec, model: ReadyModel) -> None:
    element_count(shape, tensor=spec.name)
    expected = spec.shape
    if len(shape) == len(expected):
        for dim, want in zip(shape, expected, strict=True):
            if want not in (dim, -1):
                break
        else:
            return
    raise InvalidInput(
        f"unexpected shape for input '{spec.name}' for model '{model.name}'. Expected {show(expected)}, "
        f"got {show(shape)}",
        field=f"inputs[{spec.name}].shape",
        reason="SHAPE_MISMATCH",
    )


def _contents(tensor: pb.ModelInferRequest.InferInputTensor, spec: TensorSpec, model: ReadyModel) -> Sequence[Any]:
    """The one typed field that the datatype prescribes; data in any other is refused."""
    wanted = spec.datatype.contents
    if tensor.HasField("contents"):
        for name in _CONTENTS:
            if name != wanted and getattr(tensor.contents, name):
                raise InvalidInput(
                    f"unexpected explicit tensor data for input tensor '{spec.name}' for model '{model.name}' in "
                    f"{name}, expected datatype '{spec.datatype.name}'"
                    + (f" in {wanted}" if wanted else " as raw_input_contents"),
                    field=f"inputs[{spec.name}].contents",
                )
        if wanted:
            values: Sequence[Any] = getattr(tensor.contents, wanted)
            return values
    if 0 not in tensor.shape:
        raise InvalidInput(
            f"unable to find data for input tensor '{spec.name}' for model '{model.name}' in request.",
            field=f"inputs[{spec.name}]",
        )
    return ()


def _check_missing(inputs: Mapping[str, Array], model: ReadyModel) -> None:
    missing = [spec.name for spec in model.signature.inputs if spec.name not in inputs and not spec.optional]
    if missing:
        raise InvalidInput(
            f"expected {len(model.inputs)} inputs but got {len(inputs)} inputs for model '{model.name}'. "
            f"Got input(s) {sorted(inputs)}, but missing required input(s) {missing}. "
            "Please provide all required input(s).",
            field="inputs",
        )


def _rows(inputs: Mapping[str, Array], model: ReadyModel) -> int:
    """The common first dimension."""
    rows = -1
    for name, array in inputs.items():
        if rows not in (-1, array.shape[0]):
            raise InvalidInput(
                f"input '{name}' batch size does not match other inputs for '{model.name}': expected {rows}, got "
                f"{array.shape[0]}",
                field=f"inputs[{name}].shape",
                reason="SHAPE_MISMATCH",
            )
        rows = array.shape[0]
    check_rows(rows, model.policy, model=model.name)
    return rows


def _outputs(
    wanted: Sequence[pb.ModelInferRequest.InferRequestedOutputTensor], model: ReadyModel
) -> tuple[tuple[str, ...], dict[str, int]]:
    names: list[str] = []
    classes: dict[str, int] = {}
    for output in wanted:
        if output.name not in model.outputs:
            message = f"unexpected inference output '{output.name[:256]}' for model '{model.name}'"
            raise InvalidInput(message, field="outputs")
        if output.name in names:
            raise InvalidInput(f"output '{output.name}' already exists in request", field=f"outputs[{output.name}]")
        names.append(output.name)
        if output.parameters:
            _no_shared_memory(output.parameters)
            if count := _classes(output, model):
                classes[output.name] = count
    return tuple(names), classes


def _classes(output: pb.ModelInferRequest.InferRequestedOutputTensor, model: ReadyModel) -> int:
    if "classification" not in output.parameters:
        return 0
    value = output.parameters["classification"]
    field = f"outputs[{output.name}].parameters[classification]"
    if value.WhichOneof("parameter_choice") != "int64_param" or not 0 < value.int64_param <= CLASSES_MAX:
        raise InvalidInput("'classification' parameter must be a positive int64", field=field)
    if model.outputs[output.name].datatype.name in {"BYTES", "BF16"}:
        kind = model.outputs[output.name].datatype.name
        raise InvalidInput(f"output '{output.name}' is {kind}, which has no classes", field=field)
    return value.int64_param


def _no_shared_memory(parameters: Mapping[str, pb.InferParameter]) -> None:
    for name in parameters:
        if name.startswith("shared_memory_"):
            raise Unsupported(f"parameter '{name}': shared memory is not implemented")


def _parameters(parameters: Mapping[str, pb.InferParameter]) -> int:
    """Check the request's own parameters; gives the timeout in microseconds."""
    for name in parameters:
        if name.startswith("triton_") and name != _EMPTY_FINAL:
            raise InvalidInput(
                f"parameter keys starting with 'triton_' are reserved for Triton usage: '{name[:64]}'",
                field="parameters",
            )
    if "timeout" not in parameters:
        return 0
    value = parameters["timeout"]
    choice = value.WhichOneof("parameter_choice")
    if choice not in {"int64_param", "uint64_param"} or (timeout := int(getattr(value, choice))) < 0:
        message = "'timeout' parameter must be microseconds, 0 or more, as int64 or uint64"
        raise InvalidInput(message, field="parameters[timeout]")
    return timeout
