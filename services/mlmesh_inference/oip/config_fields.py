"""Which fields of a ModelConfig are carried out, and what their values may be; model_config reads by these.

Everything raises InvalidInput, or Unsupported for what is not carried out, and names the field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from google.protobuf.message import Message

from mlmesh_inference.tensors import ELEMENTS_MAX, RANK_MAX
from mlmesh_runtime.errors import InvalidInput, Unsupported
from open_inference import model_config_pb2 as pb

ENTRIES_MAX: Final = 1024
"""Most entries of any list or map of a configuration."""

# What is carried out, by message; everything else in a configuration is refused by name.
CARRIED_OUT: Final[Mapping[str, frozenset[str]]] = {
    message: frozenset(names.split())
    for message, names in {
        "ModelConfig": "name platform backend version_policy max_batch_size input output dynamic_batching "
        "sequence_batching ensemble_scheduling instance_group default_model_filename parameters model_warmup "
        "model_transaction_policy optimization response_cache",
        "ModelVersionPolicy": "latest all specific",
        "ModelVersionPolicy.Latest": "num_versions",
        "ModelVersionPolicy.All": "",
        "ModelVersionPolicy.Specific": "versions",
        "ModelInput": "name data_type format dims optional",
        "ModelOutput": "name data_type dims label_filename",
        # Where staging buffers lie is the engine's own choice, and changes no answer.
        "ModelOptimizationPolicy": "input_pinned_memory output_pinned_memory",
        "ModelOptimizationPolicy.PinnedMemoryBuffer": "enable",
        "ModelDynamicBatching": "preferred_batch_size max_queue_delay_microseconds preserve_ordering priority_levels "
        "default_priority_level default_queue_policy priority_queue_policy",
        "ModelQueuePolicy": "default_timeout_microseconds allow_timeout_override max_queue_size",
        "ModelSequenceBatching": "direct oldest max_sequence_idle_microseconds control_input state iterative_sequence",
        "ModelSequenceBatching.StrategyDirect": "",
        "ModelSequenceBatching.StrategyOldest": "max_candidate_sequences preserve_ordering",
        "ModelSequenceBatching.ControlInput": "name control",
        "ModelSequenceBatching.Control": "kind int32_false_true fp32_false_true bool_false_true data_type",
        "ModelSequenceBatching.State": "input_name output_name data_type dims initial_state",
        "ModelSequenceBatching.InitialState": "data_type dims zero_data name",
        "ModelEnsembling": "step",
        "ModelEnsembling.Step": "model_name model_version input_map output_map",
        "ModelInstanceGroup": "name kind count gpus",
        "ModelParameter": "string_value",
        "ModelWarmup": "name batch_size inputs count",
        "ModelWarmup.Input": "data_type dims zero_data random_data input_data_file",
        "ModelTransactionPolicy": "decoupled",
        # Only to say no: {"enable": false} is what NVIDIA's own configurations may hold.
        "ModelResponseCache": "",
    }.items()
}

_FILE: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127}){0,7}$")
_TEXT_MAX: Final = 4096


def check_supported(message: Message, path: str) -> None:
    """Refuse, by its path, the first field that is set and not carried out; and lists that are too long."""
    name = message.DESCRIPTOR.full_name.removeprefix("inference.")
    carried_out = CARRIED_OUT.get(name, frozenset())
    for field, value in message.ListFields():
        at = f"{path}.{field.name}"
        if field.name not in carried_out:
            raise Unsupported(f"{at} is not supported: leave it out")
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if (is_map or isinstance(value, Sequence)) and not isinstance(value, str | bytes) and len(value) > ENTRIES_MAX:
            raise InvalidInput(f"{at}: expected at most {ENTRIES_MAX} entries, got {len(value)}", field=at)
        if field.message_type is None:
            continue
        if is_map:
            for key in value:
                if isinstance(value[key], Message):
                    check_supported(value[key], f"{at}[{str(key)[:64]}]")
        elif isinstance(value, Message):
            check_supported(value, at)
        else:
            for place, entry in enumerate(value):
                check_supported(entry, f"{at}[{place}]")


def text(text: str, field: str) -> str:
    """A text of bounded length."""
    if len(text) > _TEXT_MAX:
        raise InvalidInput(f"{field}: expected at most {_TEXT_MAX} characters, got {len(text)}", field=field)
    return text


def named(text: str, field: str) -> str:
    """A name."""
    if not 0 < len(text) <= 256:
        raise InvalidInput(f"{field}: expected a name of 1 to 256 characters, got {len(text)}", field=field)
    return text


def file_path(path: str, field: str) -> str:
    """A relative path that stays in the version's folder, or ""."""
    if path and not _FILE.fullmatch(path):
        raise InvalidInput(f"{field}: {path[:64]!r} is no relative path of a version's file", field=field)
    return path


def count(value: int, field: str, most: int) -> int:
    """A number of 0 to `most`."""
    if not 0 <= value <= most:
        raise InvalidInput(f"{field}: expected 0 to {most}, got {value}", field=field)
    return value


def unique(names: Sequence[str], field: str) -> None:
    """Names that are there once."""
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) != len(names) else set()
    if twice:
        raise InvalidInput(f"{field}: '{min(twice)}' is there twice", field=field)


def datatype_of(value: int, field: str) -> str:
    """The protocol's name of a data type, "" for none."""
    if value == pb.TYPE_INVALID:
        return ""
    if value not in pb.DataType.values():
        raise InvalidInput(f"{field}: {value} is no data type", field=field)
    name = pb.DataType.Name(pb.DataType.ValueType(value)).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name


def data_type(datatype: str) -> pb.DataType.ValueType:
    """The configuration's name of one of the protocol's datatypes; TYPE_INVALID for ""."""
    if not datatype:
        return pb.TYPE_INVALID
    return pb.DataType.Value("TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}")


def dims_of(dims: Sequence[int], field: str, *, lowest: int = -1) -> tuple[int, ...]:
    """Dimensions, each of `lowest` or more."""
    if len(dims) > RANK_MAX:
        raise InvalidInput(f"{field}: expected at most {RANK_MAX} dimensions, got {len(dims)}", field=field)
    for dim in dims:
        if dim < lowest or dim > ELEMENTS_MAX:
            raise InvalidInput(f"{field}: expected {lowest} to {ELEMENTS_MAX}, got {dim}", field=field)
    return tuple(dims)
