"""ModelConfig, the field's own terms for how a model is served, as our values and back.

It is read from two places: the file `config.pbtxt` of a version (protobuf's text format), and the parameter `config` of
RepositoryModelLoad (the same message as JSON). What is not carried out here is refused by its name, never passed over:
a configuration that loads is one that is obeyed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from google.protobuf import json_format, text_format

from mlmesh_inference.oip import config_fields as fields
from mlmesh_inference.serving import (
    BatchingConfig,
    ControlInput,
    ControlKind,
    Fill,
    QueueConfig,
    SampleInput,
    SequenceConfig,
    ServingConfig,
    StateConfig,
    Step,
    TensorConfig,
    VersionPolicy,
    WarmupSample,
)
from mlmesh_runtime.errors import InvalidInput, Unsupported
from open_inference import model_config_pb2 as pb

CONFIG_BYTES_MAX: Final = 256 * 1024
"""Longest configuration, as text or JSON."""
INSTANCES_MAX: Final = 256
LEVELS_MAX: Final = 64
"""Most levels of priority."""
SAMPLE_RUNS_MAX: Final = 1000
"""Most runs of all warm-up samples together."""

# proto3 does not tell 0 from absent, and here it matters: 0 means that the model is not to batch.
_NO_BATCH: Final = re.compile(r"^\s*max_batch_size\s*:\s*\+?0+\s*[;,]?\s*(#.*)?$", re.MULTILINE)
_QUOTED_MAX: Final = 300


def read_text(text: bytes) -> ServingConfig:
    """Read a config.pbtxt. Raises InvalidInput, Unsupported; both name the field."""
    _check_size(len(text))
    message = pb.ModelConfig()
    try:
        decoded = text.decode()
        text_format.Parse(decoded, message)
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise _malformed(error) from None
    return from_message(message, batching_refused=_NO_BATCH.search(decoded) is not None)


def read_json(text: str) -> ServingConfig:
    """Read the `config` parameter of a load. Raises InvalidInput, Unsupported; both name the field."""
    _check_size(len(text.encode(errors="surrogatepass")))
    message = pb.ModelConfig()
    if not text.lstrip().startswith("{"):
        raise InvalidInput("the model configuration is malformed: expected an object of JSON", field="config")
    try:
        json_format.Parse(text, message, max_recursion_depth=20)
    except (json_format.ParseError, UnicodeError, RecursionError) as error:
        raise _malformed(error) from None
    return from_message(message, batching_refused=re.search(r'"max_?[bB]atch_?[sS]ize"\s*:\s*"?0', text) is not None)


def from_message(message: pb.ModelConfig, *, batching_refused: bool = False) -> ServingConfig:
    """What a configuration says. `batching_refused`: it says max_batch_size 0, which the message itself cannot tell.

    Raises InvalidInput for what is wrong, Unsupported for what is not carried out; both name the field.
    """
    fields.check_supported(message, "config")
    rows_max = fields.count(message.max_batch_size, "config.max_batch_size", 1 << 20)
    inputs = tuple(_input(entry, f"config.input[{place}]") for place, entry in enumerate(message.input))
    outputs = tuple(_output(entry, f"config.output[{place}]") for place, entry in enumerate(message.output))
    for field, tensors in (("config.input", inputs), ("config.output", outputs)):
        fields.unique([tensor.name for tensor in tensors], field)
    instances, device = _instances(message.instance_group)
    return ServingConfig(
        name=fields.text(message.name, "config.name"),
        platform=fields.text(message.platform, "config.platform"),
        backend=fields.text(message.backend, "config.backend"),
        rows_max=rows_max or (0 if batching_refused else None),
        inputs=inputs,
        outputs=outputs,
        batching=_batching(message.dynamic_batching) if message.HasField("dynamic_batching") else None,
        sequence=_sequence(message.sequence_batching) if message.HasField("sequence_batching") else None,
        steps=_steps(message.ensemble_scheduling) if message.HasField("ensemble_scheduling") else (),
        decoupled=message.model_transaction_policy.decoupled,
        versions=_versions(message.version_policy) if message.HasField("version_policy") else None,
        instances=instances,
        device=device,
        model_file=fields.file_path(message.default_model_filename, "config.default_model_filename"),
        parameters={
            fields.text(name, "config.parameters"): fields.text(value.string_value, f"config.parameters[{name[:64]}]")
            for name, value in message.parameters.items()
        },
        warmups=_warmups(message.model_warmup),
    )


def _check_size(size: int) -> None:
    if size > CONFIG_BYTES_MAX:
        raise InvalidInput(f"expected at most {CONFIG_BYTES_MAX} bytes of configuration, got {size}", field="config")


def _malformed(error: Exception) -> InvalidInput:
    text = " ".join(str(error).split())[:_QUOTED_MAX]
    return InvalidInput(f"the model configuration is malformed: {text}", field="config")


def _input(entry: pb.ModelInput, at: str) -> TensorConfig:
    if entry.format not in pb.ModelInput.Format.values():
        raise InvalidInput(f"{at}.format: {entry.format} is no format", field=f"{at}.format")
    layout = pb.ModelInput.Format.Name(entry.format).removeprefix("FORMAT_")
    dims = fields.dims_of(entry.dims, f"{at}.dims")
    if layout != "NONE" and len(dims) != 3:
        raise InvalidInput(f"{at}.dims: expected 3 dimensions of an image in {layout}, got {len(dims)}", field=at)
    return TensorConfig(
        name=fields.named(entry.name, f"{at}.name"),
        datatype=fields.datatype_of(entry.data_type, f"{at}.data_type"),
        dims=dims,
        optional=entry.optional,
        layout="" if layout == "NONE" else layout,
    )


def _output(entry: pb.ModelOutput, at: str) -> TensorConfig:
    return TensorConfig(
        name=fields.named(entry.name, f"{at}.name"),
        datatype=fields.datatype_of(entry.data_type, f"{at}.data_type"),
        dims=fields.dims_of(entry.dims, f"{at}.dims"),
        labels_file=fields.file_path(entry.label_filename, f"{at}.label_filename"),
    )


def _queue(message: pb.ModelQueuePolicy) -> QueueConfig:
    return QueueConfig(
        items_max=message.max_queue_size,
        timeout_us=min(message.default_timeout_microseconds, 1 << 62),
        timeout_override=message.allow_timeout_override,
    )


def _batching(message: pb.ModelDynamicBatching) -> BatchingConfig:
    at = "config.dynamic_batching"
    levels = fields.count(message.priority_levels, f"{at}.priority_levels", LEVELS_MAX)
    default = message.default_priority_level
    if levels and not 1 <= default <= levels:
        field = f"{at}.default_priority_level"
        raise InvalidInput(f"{field}: expected 1 to {levels}, got {default}", field=field)
    if (default or message.priority_queue_policy) and not levels:
        raise InvalidInput(f"{at}.priority_levels: expected at least 1, got 0", field=f"{at}.priority_levels")
    for level in message.priority_queue_policy:
        if not 1 <= level <= levels:
            field = f"{at}.priority_queue_policy"
            raise InvalidInput(f"{field}: expected levels 1 to {levels}, got {level}", field=field)
    for rows in message.preferred_batch_size:
        if not 0 < rows <= 1 << 20:
            field = f"{at}.preferred_batch_size"
            raise InvalidInput(f"{field}: expected 1 or more, got {rows}", field=field)
    return BatchingConfig(
        preferred_rows=tuple(message.preferred_batch_size),
        delay_us=fields.count(message.max_queue_delay_microseconds, f"{at}.max_queue_delay_microseconds", 60_000_000),
        priorities=levels,
        priority_default=default,
        queue=_queue(message.default_queue_policy) if message.HasField("default_queue_policy") else QueueConfig(),
        queues={level: _queue(policy) for level, policy in message.priority_queue_policy.items()},
    )


def _sequence(message: pb.ModelSequenceBatching) -> SequenceConfig:
    at = "config.sequence_batching"
    controls = tuple(
        _control(entry, f"{at}.control_input[{place}]") for place, entry in enumerate(message.control_input)
    )
    states = tuple(_state(entry, f"{at}.state[{place}]") for place, entry in enumerate(message.state))
    fields.unique([control.name for control in controls] + [state.input for state in states], f"{at}.state")
    fields.unique([state.output for state in states], f"{at}.state")
    fields.unique([control.kind.name for control in controls], f"{at}.control_input")
    most = message.oldest.max_candidate_sequences if message.HasField("oldest") else 0
    return SequenceConfig(
        states=states,
        controls=controls,
        idle_us=min(message.max_sequence_idle_microseconds, 1 << 62) or 1_000_000,
        sequences_max=fields.count(most, f"{at}.oldest.max_candidate_sequences", 1 << 20),
        iterative=message.iterative_sequence,
    )


def _control(entry: pb.ModelSequenceBatching.ControlInput, at: str) -> ControlInput:
    name = fields.named(entry.name, f"{at}.name")
    if len(entry.control) != 1:
        raise InvalidInput(f"{at}.control: expected 1 control, got {len(entry.control)}", field=f"{at}.control")
    control = entry.control[0]
    if control.kind not in pb.ModelSequenceBatching.Control.Kind.values():
        raise InvalidInput(f"{at}.control[0].kind: {control.kind} is no kind", field=at)
    kind = ControlKind(control.kind)
    pairs: dict[str, Sequence[Any]] = {
        "INT32": control.int32_false_true,
        "FP32": control.fp32_false_true,
        "BOOL": control.bool_false_true,
    }
    said = {datatype: values for datatype, values in pairs.items() if values}
    if kind is ControlKind.CORRELATION_ID:
        datatype = fields.datatype_of(control.data_type, f"{at}.control[0].data_type")
        if said or datatype not in {"UINT64", "INT64", "UINT32", "INT32", "BYTES"}:
            raise InvalidInput(f"{at}: a correlation id is of one 32 or 64 bit integer type or a string", field=at)
        return ControlInput(name=name, kind=kind, datatype=datatype)
    if len(said) != 1 or control.data_type != pb.TYPE_INVALID:
        raise InvalidInput(f"{at}: expected one of int32_, fp32_ and bool_false_true, got {len(said)}", field=at)
    ((datatype, values),) = said.items()
    if len(values) != 2:
        raise InvalidInput(f"{at}: expected two values, for false and for true, got {len(values)}", field=at)
    return ControlInput(name=name, kind=kind, datatype=datatype, false=values[0], true=values[1])


def _state(entry: pb.ModelSequenceBatching.State, at: str) -> StateConfig:
    if len(entry.initial_state) > 1:
        got = len(entry.initial_state)
        raise InvalidInput(f"{at}.initial_state: expected at most 1, got {got}", field=f"{at}.initial_state")
    return StateConfig(
        input=fields.named(entry.input_name, f"{at}.input_name"),
        output=fields.named(entry.output_name, f"{at}.output_name"),
        datatype=fields.datatype_of(entry.data_type, f"{at}.data_type"),
        dims=fields.dims_of(entry.dims, f"{at}.dims"),
    )


def _steps(message: pb.ModelEnsembling) -> tuple[Step, ...]:
    if not message.step:
        field = "config.ensemble_scheduling.step"
        raise InvalidInput(f"{field}: expected at least 1 step, got 0", field=field)
    return tuple(
        Step(
            model=fields.named(step.model_name, f"config.ensemble_scheduling.step[{place}].model_name"),
            # -1 and 0 both leave the choice to the server: a version's number starts at 1.
            version=max(0, step.model_version),
            inputs=dict(step.input_map),
            outputs=dict(step.output_map),
        )
        for place, step in enumerate(message.step)
    )


def _versions(message: pb.ModelVersionPolicy) -> VersionPolicy:
    at = "config.version_policy"
    match message.WhichOneof("policy_choice"):
        case "specific":
            numbers = tuple(sorted(set(message.specific.versions), reverse=True))
            if not numbers or numbers[-1] < 1:
                raise InvalidInput(f"{at}.specific: expected version numbers from 1", field=f"{at}.specific")
            return VersionPolicy(numbers=numbers)
        case "all":
            return VersionPolicy()
        case _:
            return VersionPolicy(
                latest=fields.count(message.latest.num_versions, f"{at}.latest", fields.ENTRIES_MAX) or 1
            )


def _instances(groups: Sequence[pb.ModelInstanceGroup]) -> tuple[int, str]:
    """(instances together, device)."""
    total, devices = 0, set()
    for place, group in enumerate(groups):
        at = f"config.instance_group[{place}]"
        total += fields.count(group.count, f"{at}.count", INSTANCES_MAX) or 1
        if list(group.gpus) not in ([], [0]):
            raise Unsupported(f"{at}.gpus: only GPU 0 is supported, a process serves from one")
        kind = pb.ModelInstanceGroup.KIND_GPU if group.gpus and not group.kind else group.kind
        devices.add({pb.ModelInstanceGroup.KIND_GPU: "gpu", pb.ModelInstanceGroup.KIND_CPU: "cpu"}.get(kind, ""))
    if len(devices) > 1:
        raise Unsupported("config.instance_group: groups of different kinds are not supported")
    return fields.count(total, "config.instance_group", INSTANCES_MAX), devices.pop() if devices else ""


def _warmups(samples: Sequence[pb.ModelWarmup]) -> tuple[WarmupSample, ...]:
    result = tuple(_warmup(sample, f"config.model_warmup[{place}]") for place, sample in enumerate(samples))
    runs = sum(sample.count for sample in result)
    if runs > SAMPLE_RUNS_MAX:
        message = f"config.model_warmup: expected at most {SAMPLE_RUNS_MAX} runs together, got {runs}"
        raise InvalidInput(message, field="config.model_warmup")
    return result


def _warmup(sample: pb.ModelWarmup, at: str) -> WarmupSample:
    return WarmupSample(
        name=fields.named(sample.name, f"{at}.name"),
        rows=fields.count(sample.batch_size, f"{at}.batch_size", 1 << 20),
        inputs=tuple(_sample_input(name, entry, f"{at}.inputs[{name[:64]}]") for name, entry in sample.inputs.items()),
        count=sample.count or 1,
    )


def _sample_input(name: str, entry: pb.ModelWarmup.Input, at: str) -> SampleInput:
    choice = entry.WhichOneof("input_data_type")
    fills = {"zero_data": Fill.ZEROS, "random_data": Fill.RANDOM, "input_data_file": Fill.FILE}
    if choice is None:
        raise InvalidInput(f"{at}: expected zero_data, random_data or input_data_file", field=at)
    datatype = fields.datatype_of(entry.data_type, f"{at}.data_type")
    if not datatype:
        raise InvalidInput(f"{at}.data_type: expected a data type", field=at)
    return SampleInput(
        name=fields.named(name, at),
        datatype=datatype,
        dims=fields.dims_of(entry.dims, f"{at}.dims", lowest=0),
        fill=fills[choice],
        file=fields.file_path(entry.input_data_file, f"{at}.input_data_file"),
    )
