"""From ModelInferRequest to what a runner takes. Everything is checked before anything is allocated.

The texts are those that the protocol's clients compare; see the module's functions for the rule each one enforces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from mlmesh_inference.catalog import ReadyModel
from mlmesh_inference.oip.parameters import (
    NO_OPTIONS,
    Options,
    Placement,
    no_shared_memory,
    options,
    placement,
)
from mlmesh_inference.oip.wire import PACKED, unpacked
from mlmesh_inference.tensors import (
    Array,
    TensorSpec,
    datatype,
    decode_raw,
    decode_typed,
    element_count,
    show,
)
from mlmesh_runtime.errors import InvalidInput
from open_inference import grpc_service_pb2 as pb

TENSORS_MAX: Final = 1024
"""Most inputs or outputs of a request."""
CLASSES_MAX: Final = 1 << 20

_FIELD_TYPES: Final = {
    "bool_contents": "BOOL",
    "int_contents": "INT32",
    "int64_contents": "INT64",
    "uint_contents": "UINT32",
    "uint64_contents": "UINT64",
    "fp32_contents": "FP32",
    "fp64_contents": "FP64",
    "bytes_contents": "BYTES",
}

_Input = pb.ModelInferRequest.InferInputTensor
_Output = pb.ModelInferRequest.InferRequestedOutputTensor


class Window(Protocol):
    """Room for one output in shared memory. It stays usable for as long as somebody holds it."""

    def __len__(self) -> int:
        """Bytes that fit."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Put data at its start. Raises InvalidInput where it does not fit."""


class Regions(Protocol):
    """Registered shared memory, as requests use it. Looks at `CURRENT` for who asks."""

    def read(self, region: str, offset: int, size: int) -> memoryview:
        """`size` bytes of a region, from `offset` of what was registered.

        Raises NotFound for an unknown region, InvalidInput for what lies outside of it, Denied.
        """

    def window(self, region: str, offset: int, size: int) -> Window:
        """The same place, to put an output into."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request that is in order.

    Attributes:
        inputs: arrays by name. outputs: names wanted, in that order. rows: size of the batch dimension, 1 without.
        classes: by output, how many of the best classes are wanted instead of the tensor.
        placed: by output, where in shared memory it is to be put.
        options: what the request's own parameters ask for.
        typed: whether to answer in typed contents, as the request came; always_raw: not even then.
    """

    inputs: Mapping[str, Array]
    outputs: tuple[str, ...]
    rows: int
    classes: Mapping[str, int]
    typed: bool
    options: Options = NO_OPTIONS
    placed: Mapping[str, tuple[Placement, Window]] = field(default_factory=dict)
    always_raw: bool = False


def read(
    message: pb.ModelInferRequest, model: ReadyModel, regions: Regions | None = None, *, always_raw: bool = False
) -> Request:
    """Check and convert.

    Args:
        regions: registered shared memory; without it, parameters that ask for it are refused.
        always_raw: answer in raw contents whatever came, as Triton does.

    Raises InvalidInput (INVALID_FIELD, SHAPE_MISMATCH) or Unsupported.
    """
    asked = options(message.parameters) if message.parameters else NO_OPTIONS
    inputs, typed = _inputs(message, model, regions)
    if len(inputs) != len(model.inputs):
        _check_missing(inputs, model)
    placed: dict[str, tuple[Placement, Window]] = {}
    if message.outputs:
        outputs, classes = _outputs(message.outputs, model, regions, placed)
    else:
        outputs, classes = model.output_names, {}
    return Request(
        inputs=inputs,
        outputs=outputs,
        rows=_rows(inputs, model) if model.policy.batches else 1,
        classes=classes,
        typed=typed,
        options=asked,
        placed=placed,
        always_raw=always_raw,
    )


def _inputs(message: pb.ModelInferRequest, model: ReadyModel, regions: Regions | None) -> tuple[dict[str, Array], bool]:
    """Arrays by name, and whether any came in typed contents."""
    raw = _raw(message, model, regions)
    if len(message.inputs) > len(model.inputs):
        raise InvalidInput(
            f"expected {len(model.inputs)} inputs but got {len(message.inputs)} inputs for model '{model.name}'. Got "
            f"input(s) {_listed([tensor.name for tensor in message.inputs[: len(model.inputs) + 8]])}; unexpected "
            f"inference input {_listed([t.name for t in message.inputs if t.name not in model.inputs][:8])}",
            field="inputs",
        )
    inputs: dict[str, Array] = {}
    typed = False
    for tensor in message.inputs:
        spec = _spec(tensor, inputs, model)
        place = _placement(tensor, regions) if tensor.parameters else None
        shape = tensor.shape
        if raw is not None or place is not None:
            # MLServer's client sets the field and puts nothing into it.
            if tensor.HasField("contents") and tensor.contents.ByteSize():
                used = "raw_input_contents" if place is None else "shared memory"
                raise InvalidInput(
                    f"contents field must not be specified when using {used} for '{spec.name}' for model "
                    f"'{model.name}'",
                    field=f"inputs[{spec.name}].contents",
                )
            _check_shape(shape, spec, model)
            data: bytes | memoryview
            if place is not None and regions is not None:
                # What is wrong with the size is told by the decoder, in the protocol's words.
                data = regions.read(place.region, place.offset, place.size)
            else:
                data = next(raw) if raw is not None else b""
            inputs[spec.name] = decode_raw(spec.datatype, shape, data, tensor=spec.name, model=model.name)
        else:
            _check_shape(shape, spec, model)
            typed = typed or tensor.HasField("contents")
            inputs[spec.name] = _typed(tensor, spec, model)
    return inputs, typed


def _raw(message: pb.ModelInferRequest, model: ReadyModel, regions: Regions | None) -> Iterator[bytes] | None:
    """Raw contents in order, one for every input that is not in shared memory; None when there are none at all."""
    raw = message.raw_input_contents
    if not raw:
        return None
    expected = len(message.inputs)
    if regions is not None:
        expected -= sum("shared_memory_region" in tensor.parameters for tensor in message.inputs)
    if len(raw) != expected:
        lacking = (
            f"unable to find data for input tensor '{message.inputs[len(raw)].name[:256]}' for model '{model.name}' in "
            "request. "
            if len(raw) < expected
            else ""
        )
        raise InvalidInput(
            f"{lacking}expected {expected} raw_input_contents for model '{model.name}', one an input, got {len(raw)}",
            field="raw_input_contents",
            reason="SHAPE_MISMATCH",
        )
    return iter(raw)


def _placement(tensor: _Input | _Output, regions: Regions | None) -> Placement | None:
    if regions is None:
        no_shared_memory(tensor.parameters)
        return None
    kind = "inputs" if isinstance(tensor, _Input) else "outputs"
    return placement(tensor.parameters, field=f"{kind}[{tensor.name}]")


def _spec(tensor: _Input, seen: Mapping[str, Array], model: ReadyModel) -> TensorSpec:
    """The model's idea of an input, when name and datatype of the request's go with it."""
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


def _typed(tensor: _Input, spec: TensorSpec, model: ReadyModel) -> Array:
    """The values of the one typed field that the datatype prescribes; data in any other is refused."""
    kind = spec.datatype
    if tensor.HasField("contents"):
        for found, _ in tensor.contents.ListFields():
            if found.name != kind.contents:
                raise InvalidInput(
                    f"unexpected explicit tensor data for input tensor '{spec.name}' for model '{model.name}' of type "
                    f"'{_FIELD_TYPES[found.name]}', expected datatype '{kind.name}'"
                    + (f" in {kind.contents}" if kind.contents else " as raw_input_contents"),
                    field=f"inputs[{spec.name}].contents",
                )
        if kind.contents:
            values: Sequence[Any] = getattr(tensor.contents, kind.contents)
            count = element_count(tensor.shape, tensor=spec.name)
            if kind.contents in PACKED and len(values) == count > 0:
                array = unpacked(kind, tensor.shape, count, tensor.contents.SerializeToString())
                if array is not None:
                    return array
            return decode_typed(kind, tensor.shape, values, tensor=spec.name, model=model.name)
    if 0 not in tensor.shape:
        raise InvalidInput(
            f"unable to find data for input tensor '{spec.name}' for model '{model.name}' in request.",
            field=f"inputs[{spec.name}]",
        )
    return decode_typed(kind, tensor.shape, (), tensor=spec.name, model=model.name)


def _check_missing(inputs: Mapping[str, Array], model: ReadyModel) -> None:
    missing = [spec.name for spec in model.signature.inputs if spec.name not in inputs and not spec.optional]
    if missing:
        raise InvalidInput(
            f"expected {len(model.inputs)} inputs but got {len(inputs)} inputs for model '{model.name}'. "
            f"Got input(s) {_listed(sorted(inputs))}, but missing required input(s) {_listed(missing)}. "
            "Please provide all required input(s).",
            field="inputs",
        )


def _listed(names: Sequence[str]) -> str:
    """Names as the protocol's first implementation lists them."""
    return "[" + ",".join([f"'{name[:256]}'" for name in names]) + "]"


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
    if rows < 0:
        return 1  # every input is optional, and none came
    if rows > model.policy.rows_max:
        raise InvalidInput(
            f"inference request batch-size must be <= {model.policy.rows_max} for '{model.name}', got {rows}",
            field="inputs",
            reason="SHAPE_MISMATCH",
        )
    return rows


def _outputs(
    wanted: Sequence[_Output],
    model: ReadyModel,
    regions: Regions | None,
    placed: dict[str, tuple[Placement, Window]],
) -> tuple[tuple[str, ...], dict[str, int]]:
    names: dict[str, None] = {}
    classes: dict[str, int] = {}
    for output in wanted:
        name = output.name
        if name not in model.outputs:
            message = f"unexpected inference output '{name[:256]}' for model '{model.name}'"
            raise InvalidInput(message, field="outputs")
        if name in names:
            raise InvalidInput(f"output '{name}' already exists in request", field=f"outputs[{name}]")
        names[name] = None
        if output.parameters:
            place = _placement(output, regions)
            if place is not None and "classification" in output.parameters:
                text = "output can't set both 'shared_memory_region' and 'classification'"
                raise InvalidInput(text, field=f"outputs[{name}].parameters")
            if place is not None and regions is not None:
                placed[name] = place, regions.window(place.region, place.offset, place.size)
            if count := _classes(output, model):
                classes[name] = count
    return tuple(names), classes


def _classes(output: _Output, model: ReadyModel) -> int:
    if "classification" not in output.parameters:
        return 0
    value = output.parameters["classification"]
    field = f"outputs[{output.name}].parameters[classification]"
    if value.WhichOneof("parameter_choice") != "int64_param":
        text = "invalid value type for 'classification' parameter, expected int64_param"
        raise InvalidInput(text, field=field)
    if not 0 < value.int64_param <= CLASSES_MAX:
        text = f"invalid value for 'classification' parameter, expected >= 0 (1 to {CLASSES_MAX})"
        raise InvalidInput(text, field=field)
    if model.outputs[output.name].datatype.name in {"BYTES", "BF16"}:
        kind = model.outputs[output.name].datatype.name
        raise InvalidInput(f"output '{output.name}' is {kind}, which has no classes", field=field)
    return value.int64_param
