"""Requests as messages, and answers as results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np

from mlmesh_client.errors import InferenceError, invalid
from mlmesh_client.tensors import Array, TensorSpec, convert, datatype_of, outputs, raw
from open_inference import grpc_service_pb2 as pb

Inputs: TypeAlias = Mapping[str, Any] | Any
"""Tensors by name: arrays or nested lists. For a model of one input also the tensor alone."""
Parameter: TypeAlias = bool | int | float | str

FINAL: Final = "triton_final_response"
EMPTY_FINAL: Final = "triton_enable_empty_final_response"
RESUME: Final = "mlmesh_resume"
_INT64_MAX: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a server says of a model.

    Attributes:
        inputs, outputs: tensors, in the model's order. versions: those that the server has ready.
        rows_max: most rows of one request; 0 where the model has no batch dimension or the server tells none.
        decoupled: whether a request has any number of answers.
    """

    name: str
    platform: str
    versions: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    rows_max: int = 0
    decoupled: bool = False

    @property
    def batches(self) -> bool:
        """Whether every input's first dimension is a free batch dimension."""
        return bool(self.inputs) and all(spec.shape[:1] == (-1,) for spec in self.inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What a server says of itself."""

    name: str
    version: str
    extensions: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequencePlace:
    """Place of a request in a sequence of a stateful model: its id, and whether it is the first or the last."""

    id: int | str
    start: bool = False
    end: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """An answer. `result["y"]` is a tensor; it raises the error of a request that failed.

    Attributes:
        id: of the request. model, model_version: who answered.
        outputs: tensors by name; those with numbers are read-only.
        parameters: what the answer carries beside tensors.
        final: whether it is the last answer to its request; only decoupled models have others.
        error: on streams, why the request failed; None when it did not.
    """

    id: str = ""
    model: str = ""
    model_version: str = ""
    outputs: Mapping[str, Array] = field(default_factory=dict)
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    final: bool = True
    error: InferenceError | None = None

    def __getitem__(self, name: str) -> Array:
        if self.error is not None:
            raise self.error
        try:
            return self.outputs[name]
        except KeyError:
            raise KeyError(f"no output {name!r}; there are {sorted(self.outputs)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.outputs)

    def __len__(self) -> int:
        return len(self.outputs)

    def raise_for_error(self) -> Result:
        """Itself, or the error of the request."""
        if self.error is not None:
            raise self.error
        return self

    def __repr__(self) -> str:
        tensors = ", ".join(f"{name}: {array.dtype}{list(array.shape)}" for name, array in self.outputs.items())
        version = f"/{self.model_version}" if self.model_version else ""
        failed = f", error={self.error!r}" if self.error is not None else ""
        return f"Result({self.model}{version}, id={self.id!r}, {{{tensors}}}{failed})"


class EndOfStream(Exception):  # noqa: N818
    """All requests of a stream have their results, and no more will come."""


def model_of(reply: pb.ModelMetadataResponse, *, rows_max: int = 0, decoupled: bool = False) -> Model:
    """A server's metadata."""

    def specs(tensors: Any) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=t.name, datatype=t.datatype, shape=tuple(t.shape)) for t in tensors)

    return Model(
        name=reply.name,
        platform=reply.platform,
        versions=tuple(reply.versions),
        inputs=specs(reply.inputs),
        outputs=specs(reply.outputs),
        rows_max=rows_max,
        decoupled=decoupled,
    )


def request_of(
    model: Model,
    inputs: Inputs,
    *,
    version: str = "",
    request_id: str = "",
    wanted: Sequence[str] | None = None,
    parameters: Mapping[str, Parameter] | None = None,
    priority: int = 0,
    queue_timeout_s: float | None = None,
    sequence: SequencePlace | None = None,
) -> pb.ModelInferRequest:
    """A request, checked against what the model takes. Raises InvalidInput."""
    request = pb.ModelInferRequest(model_name=model.name, model_version=version, id=request_id)
    for spec, array in arrays_of(model, inputs):
        request.inputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
        request.raw_input_contents.append(raw(array, spec.datatype))
    for name in wanted or ():
        if model.outputs and name not in {spec.name for spec in model.outputs}:
            names = [spec.name for spec in model.outputs]
            raise invalid(f"model '{model.name}' has no output '{name}'; it has {names}", "outputs")
        request.outputs.add(name=name)
    for name, value in (parameters or {}).items():
        _set(request.parameters[name], name, value)
    if priority:
        request.parameters["priority"].uint64_param = priority
    if queue_timeout_s is not None:
        request.parameters["timeout"].int64_param = max(1, round(queue_timeout_s * 1e6))
    if model.decoupled:
        # Else nobody could know how many answers there are.
        request.parameters[EMPTY_FINAL].bool_param = True
    if sequence is not None:
        _set(request.parameters["sequence_id"], "sequence_id", sequence.id)
        request.parameters["sequence_start"].bool_param = sequence.start
        request.parameters["sequence_end"].bool_param = sequence.end
    return request


def arrays_of(model: Model, inputs: Inputs) -> list[tuple[TensorSpec, Array]]:
    """Inputs in the model's order, converted. Raises InvalidInput.

    Some servers (KServe, MLServer) say nothing of a model's tensors; arrays then are sent as they are.
    """
    if not model.inputs:
        return _undescribed(model, inputs)
    if not isinstance(inputs, Mapping):
        if len(model.inputs) != 1:
            names = [spec.name for spec in model.inputs]
            raise invalid(f"model '{model.name}' takes inputs {names}: give them by name", "inputs")
        inputs = {model.inputs[0].name: inputs}
    known = {spec.name: spec for spec in model.inputs}
    for name in inputs:
        if name not in known:
            raise invalid(f"model '{model.name}' has no input '{name}'; it takes {sorted(known)}", "inputs")
    # One that is missing may be optional, which only the server knows.
    return [(spec, convert(inputs[name], spec)) for name, spec in known.items() if name in inputs]


def _undescribed(model: Model, inputs: Inputs) -> list[tuple[TensorSpec, Array]]:
    if not isinstance(inputs, Mapping) or not all(isinstance(array, np.ndarray) for array in inputs.values()):
        message = f"the server does not tell what model '{model.name}' takes: give numpy arrays, by name"
        raise invalid(message, "inputs")
    specs = [TensorSpec(name=name, datatype=datatype_of(a, name), shape=a.shape) for name, a in inputs.items()]
    return [(spec, convert(inputs[spec.name], spec)) for spec in specs]


def _set(parameter: pb.InferParameter, name: str, value: Parameter) -> None:
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int) and -_INT64_MAX - 1 <= value <= _INT64_MAX:
        parameter.int64_param = value
    elif isinstance(value, int) and 0 <= value < 1 << 64:
        parameter.uint64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    elif isinstance(value, str):
        parameter.string_param = value
    else:
        kind = type(value).__name__
        raise invalid(f"parameter '{name}' is {kind}, expected bool, int of 64 bits, float or str", "parameters")


def result_of(
    response: pb.ModelInferResponse,
    *,
    request_id: str | None = None,
    final: bool = True,
    error: InferenceError | None = None,
) -> Result:
    """An answer as a result. Raises ServerError for one that cannot be read."""
    return Result(
        id=response.id if request_id is None else request_id,
        model=response.model_name,
        model_version=response.model_version,
        outputs=outputs(response) if error is None else {},
        parameters={name: _value(value) for name, value in response.parameters.items()} if response.parameters else {},
        final=final,
        error=error,
    )


def _value(parameter: pb.InferParameter) -> Parameter:
    choice = parameter.WhichOneof("parameter_choice")
    value: Parameter = getattr(parameter, choice) if choice else ""
    return value
