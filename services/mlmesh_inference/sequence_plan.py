"""What the configuration of a sequence model comes to: which tensors are states, which are controls.

States are the model's memory between two requests of a sequence, controls tell it where in the sequence it is; callers
see neither. The terms are those of Triton's `ModelSequenceBatching`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.running import SequenceControl, Work
from mlmesh_inference.serving import ControlInput, ControlKind, SequenceConfig, StateConfig
from mlmesh_inference.tensors import DATATYPES, Array, Datatype, Signature, TensorSpec, object_array, show
from mlmesh_runtime.errors import InvalidInput

_IDS = ("INT64", "UINT64", "INT32", "UINT32", "BYTES")


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A state that goes from one request of a sequence to the next: `shape` includes a batch dimension of 1."""

    input: str
    output: str
    datatype: Datatype
    shape: tuple[int, ...]

    def zeros(self) -> Array:
        """What a sequence begins with."""
        if self.datatype.itemsize:
            return np.zeros(self.shape, self.datatype.dtype)
        return object_array([b""] * int(np.prod(self.shape)), self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A control input: its two values as arrays; a CORRELATION_ID has neither."""

    input: str
    kind: ControlKind
    datatype: Datatype
    shape: tuple[int, ...]
    false: Array
    true: Array

    def value(self, control: SequenceControl) -> Array:
        """What the model is given for a request. Raises InvalidInput for an id that the model cannot take."""
        if self.kind is ControlKind.CORRELATION_ID:
            return self._id(control.id)
        told = {ControlKind.START: control.start, ControlKind.READY: True, ControlKind.END: control.end}
        return self.true if told[self.kind] else self.false

    def _id(self, value: int | str) -> Array:
        if self.datatype.itemsize == 0:
            return object_array([str(value).encode()] * int(np.prod(self.shape)), self.shape)
        bounds = np.iinfo(self.datatype.dtype)
        if not isinstance(value, int) or not bounds.min <= value <= bounds.max:
            raise InvalidInput(
                f"the model takes correlation ids as {self.datatype.name}, got "
                f"{'a text' if isinstance(value, str) else value}",
                field="parameters[sequence_id]",
            )
        return np.full(self.shape, value, self.datatype.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequencePlan:
    """What a configuration comes to for one model.

    Attributes:
        states, controls: what the sequencer gives and takes.
        signature: what callers see: neither controls nor the inputs of states. The output of a state is left out too,
            unless `outputs` of the configuration name it.
    """

    states: tuple[State, ...]
    controls: tuple[Control, ...]
    signature: Signature

    @classmethod
    def of(
        cls, config: SequenceConfig, signature: Signature, *, batches: bool, outputs: Sequence[str] = ()
    ) -> SequencePlan:
        """Hold a configuration against the model's signature. Raises EngineError that names what does not fit."""
        inputs = {spec.name: spec for spec in signature.inputs}
        results = {spec.name: spec for spec in signature.outputs}
        states = tuple(_state(state, inputs, results, batches=batches) for state in config.states)
        controls = tuple(_control(control, inputs, batches=batches) for control in config.controls)
        hidden = {state.input for state in states} | {control.input for control in controls}
        if len(hidden) != len(states) + len(controls):
            raise EngineError("sequence_batching: two states or controls are given to the same input")
        kept = {state.output for state in states} - set(outputs)
        return cls(
            states=states,
            controls=controls,
            signature=Signature(
                inputs=tuple(spec for spec in signature.inputs if spec.name not in hidden),
                outputs=tuple(spec for spec in signature.outputs if spec.name not in kept),
            ),
        )

    @property
    def state_bytes(self) -> int:
        """Memory of the state of one sequence."""
        return sum(array.nbytes for array in self.zeros().values())

    def zeros(self) -> dict[str, Array]:
        """The state of a sequence that begins, by input."""
        return {state.input: state.zeros() for state in self.states}

    def inputs(self, work: Work, state: Mapping[str, Array], control: SequenceControl) -> dict[str, Array]:
        """All that the model wants for a request."""
        given = {item.input: item.value(control) for item in self.controls}
        return {**work.inputs, **given, **state}

    def wanted(self, outputs: tuple[str, ...]) -> tuple[str, ...]:
        """Outputs to ask the model for: the caller's, then states that are not among them."""
        return (*outputs, *(state.output for state in self.states if state.output not in outputs))

    def states_of(self, wanted: Sequence[str], arrays: Sequence[Array]) -> dict[str, Array]:
        """The next state, by input, copied out of the batch. Raises EngineError for one that is not what it must be."""
        found = dict(zip(wanted, arrays, strict=True))
        result = {}
        for state in self.states:
            array = found[state.output]
            if array.shape != state.shape or array.dtype != state.datatype.dtype:
                raise EngineError(
                    f"state '{state.output}' is {array.dtype}{show(array.shape)}, expected "
                    f"{state.datatype.name}{show(state.shape)}"
                )
            result[state.input] = array.copy()
        return result


def _state(
    config: StateConfig, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec], *, batches: bool
) -> State:
    where = f"sequence_batching.state '{config.input}'"
    source, target = outputs.get(config.output), inputs.get(config.input)
    if target is None:
        raise EngineError(f"{where}: the model has no input '{config.input}'")
    if source is None:
        raise EngineError(f"{where}: the model has no output '{config.output}'")
    if source.datatype is not target.datatype or config.datatype not in ("", target.datatype.name):
        raise EngineError(
            f"{where}: input is {target.datatype.name}, output '{config.output}' is {source.datatype.name}"
            + (f", the configuration says {config.datatype}" if config.datatype else "")
        )
    own = target.shape[1:] if batches else target.shape
    dims = config.dims or own
    for said in (own, source.shape[1:] if batches else source.shape):
        if len(said) != len(dims) or any(-1 != have != want for have, want in zip(said, dims, strict=True)):
            raise EngineError(f"{where}: dims {show(dims)} do not fit the model's {show(said)}")
    if -1 in dims:
        raise EngineError(f"{where}: dims {show(dims)} must be known: a sequence begins with zeros of them")
    return State(
        input=config.input,
        output=config.output,
        datatype=target.datatype,
        shape=(1, *dims) if batches else tuple(dims),
    )


def _control(config: ControlInput, inputs: Mapping[str, TensorSpec], *, batches: bool) -> Control:
    where = f"sequence_batching.control_input '{config.name}'"
    spec = inputs.get(config.name)
    if spec is None:
        raise EngineError(f"{where}: the model has no such input")
    if spec.datatype.name != config.datatype or config.datatype not in DATATYPES:
        raise EngineError(f"{where}: it is {spec.datatype.name}, the configuration says {config.datatype}")
    if spec.datatype.itemsize == 0 and config.kind is not ControlKind.CORRELATION_ID:
        raise EngineError(f"{where}: {config.kind.name} cannot be BYTES")
    if config.kind is ControlKind.CORRELATION_ID and spec.datatype.name not in _IDS:
        raise EngineError(
            f"{where}: a correlation id cannot be {spec.datatype.name}, expected one of {', '.join(_IDS)}"
        )
    shape = tuple(1 if dim == -1 else dim for dim in spec.shape)
    if batches and shape[:1] != (1,):
        raise EngineError(f"{where}: its shape {show(spec.shape)} has no batch dimension")
    values = spec.datatype.dtype if spec.datatype.itemsize else np.dtype("u1")
    return Control(
        input=config.name,
        kind=config.kind,
        datatype=spec.datatype,
        shape=shape,
        false=np.full(shape, config.false, values),
        true=np.full(shape, config.true, values),
    )
