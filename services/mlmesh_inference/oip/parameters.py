"""Parameters of requests: those that the protocol reserves, read and checked, and the rest, which are the model's.

Texts and types are those of the protocol's first implementation. `headers` and `binary_data_output` belong to the
protocol's REST side and are taken and ignored, as are parameters of tensors that nobody here knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from mlmesh_inference.running import Parameter, SequenceControl
from mlmesh_runtime.errors import InvalidInput, Unsupported
from open_inference import grpc_service_pb2 as pb

PARAMETERS_MAX: Final = 1024
"""Most parameters of a request, or of one of its tensors."""
SEQUENCE_ID_CHARS_MAX: Final = 128
PRIORITY_MAX: Final = (1 << 32) - 1
TIMEOUT_US_MAX: Final = (1 << 63) // 1000 - 1
"""A longer wait than this cannot be told in nanoseconds, and is as good as none."""

EMPTY_FINAL: Final = "triton_enable_empty_final_response"
FINAL: Final = "triton_final_response"

_INT64, _UINT64, _STRING, _BOOL = "int64_param", "uint64_param", "string_param", "bool_param"
_NUMBERS: Final = (_INT64, _UINT64)
_RESERVED: Final = frozenset(
    {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers", "binary_data_output"}
)
_REGION, _SIZE, _OFFSET = "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"

Parameters = Mapping[str, pb.InferParameter]
NO_PARAMETERS: Final[Mapping[str, Parameter]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a request's parameters ask for.

    Attributes:
        timeout_us: longest wait in the queue, 0 for none.
        priority: 1 is the most urgent, 0 the model's default.
        sequence: None for a request of no sequence.
        empty_final: whether a stream's last answer to the request may come empty.
        own: the parameters that are the model's; not to be changed.
    """

    timeout_us: int = 0
    priority: int = 0
    sequence: SequenceControl | None = None
    empty_final: bool = False
    own: Mapping[str, Parameter] = field(default_factory=lambda: NO_PARAMETERS)


NO_OPTIONS: Final = Options()


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where in shared memory a tensor lies, or is to be put: `size` bytes from `offset` of a region."""

    region: str
    offset: int
    size: int


def options(parameters: Parameters) -> Options:
    """Read the parameters of a request. Raises InvalidInput."""
    if len(parameters) > PARAMETERS_MAX:
        message = f"the request has {len(parameters)} parameters, at most {PARAMETERS_MAX} are allowed"
        raise InvalidInput(message, field="parameters")
    own: dict[str, Parameter] = {}
    for name, parameter in parameters.items():
        if name in _RESERVED or name == EMPTY_FINAL:
            continue
        if name.startswith("triton_"):
            raise InvalidInput(
                "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys "
                f"starting with 'triton_' are allowed: {EMPTY_FINAL}; got '{name[:64]}'",
                field="parameters",
            )
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise _wrong(name, "bool_param, int64_param, uint64_param, double_param or string_param")
        own[name] = getattr(parameter, choice)
    return Options(
        timeout_us=_timeout_us(parameters),
        priority=_priority(parameters),
        sequence=_sequence(parameters),
        empty_final=_flag(parameters, EMPTY_FINAL),
        own=MappingProxyType(own) if own else NO_PARAMETERS,
    )


def placement(parameters: Parameters, *, field: str) -> Placement | None:
    """Where a tensor lies in shared memory; None when it does not. `field` names it in errors.

    Raises InvalidInput for a wrong type, a negative or missing size.
    """
    if len(parameters) > PARAMETERS_MAX:
        message = f"a tensor has {len(parameters)} parameters, at most {PARAMETERS_MAX} are allowed"
        raise InvalidInput(message, field=field)
    if _REGION not in parameters:
        for name in (_SIZE, _OFFSET):
            if name in parameters:
                raise InvalidInput(f"'{name}' parameter without '{_REGION}'", field=f"{field}.parameters[{name}]")
        return None
    if parameters[_REGION].WhichOneof("parameter_choice") != _STRING or not parameters[_REGION].string_param:
        raise _wrong(_REGION, "string_param", field=field)
    if _SIZE not in parameters:
        tensor = field.partition("[")[2].rstrip("]")
        message = f"'{_SIZE}' must be specified along with '{_REGION}' parameter for tensor '{tensor}'"
        raise InvalidInput(message, field=f"{field}.parameters[{_SIZE}]")
    return Placement(
        region=parameters[_REGION].string_param,
        offset=_number(parameters, _OFFSET, field=field) if _OFFSET in parameters else 0,
        size=_number(parameters, _SIZE, field=field),
    )


def no_shared_memory(parameters: Parameters) -> None:
    """Refuse, by name, what a process without shared memory cannot do."""
    for name in parameters:
        if name.startswith("shared_memory_"):
            raise Unsupported(f"parameter '{name[:64]}': shared memory is not enabled")


def _wrong(name: str, expected: str, *, field: str = "") -> InvalidInput:
    return InvalidInput(
        f"invalid value type for '{name[:64]}' parameter, expected {expected}.",
        field=f"{field}.parameters[{name[:64]}]" if field else f"parameters[{name[:64]}]",
    )


def _number(parameters: Parameters, name: str, *, field: str = "") -> int:
    """A number of 0 or more, as int64 or uint64."""
    choice = parameters[name].WhichOneof("parameter_choice")
    if choice not in _NUMBERS:
        raise _wrong(name, "int64_param or uint64_param", field=field)
    value = int(getattr(parameters[name], choice))
    if value < 0:
        place = f"{field}.parameters[{name}]" if field else f"parameters[{name}]"
        raise InvalidInput(f"invalid value for '{name}', expected value >= 0.", field=place)
    return value


def _flag(parameters: Parameters, name: str) -> bool:
    if name not in parameters:
        return False
    if parameters[name].WhichOneof("parameter_choice") != _BOOL:
        raise _wrong(name, "bool_param")
    return parameters[name].bool_param


def _timeout_us(parameters: Parameters) -> int:
    if "timeout" not in parameters:
        return 0
    timeout_us = _number(parameters, "timeout")
    return timeout_us if timeout_us <= TIMEOUT_US_MAX else 0


def _priority(parameters: Parameters) -> int:
    """A level above the model's last is the last: the model's scheduler knows how many there are."""
    return min(_number(parameters, "priority"), PRIORITY_MAX) if "priority" in parameters else 0


def _sequence(parameters: Parameters) -> SequenceControl | None:
    start, end = _flag(parameters, "sequence_start"), _flag(parameters, "sequence_end")
    if "sequence_id" not in parameters:
        return None
    parameter = parameters["sequence_id"]
    choice = parameter.WhichOneof("parameter_choice")
    if choice in _NUMBERS:
        # An int64 is the same 64 bits: clients without uint64 send large ids as negative numbers.
        number = int(getattr(parameter, choice)) & 0xFFFF_FFFF_FFFF_FFFF
        return SequenceControl(id=number, start=start, end=end) if number else None
    if choice != _STRING:
        raise _wrong("sequence_id", "int64_param, uint64_param or string_param")
    text = parameter.string_param
    if len(text) > SEQUENCE_ID_CHARS_MAX:
        message = f"string correlation ID cannot be longer than {SEQUENCE_ID_CHARS_MAX} characters, got {len(text)}"
        raise InvalidInput(message, field="parameters[sequence_id]")
    return SequenceControl(id=text, start=start, end=end) if text else None
