"""What ModelConfig answers: the configuration as it is in effect, in the field's terms.

Loading it again as an override gives the same model again.
"""

from __future__ import annotations

from mlmesh_inference.catalog import ReadyModel
from mlmesh_inference.oip.config_fields import data_type
from mlmesh_inference.serving import (
    BatchingConfig,
    ControlKind,
    Fill,
    QueueConfig,
    SequenceConfig,
    TensorConfig,
    WarmupSample,
)
from mlmesh_inference.tensors import TensorSpec
from open_inference import model_config_pb2 as pb


def config(model: ReadyModel) -> pb.ModelConfig:
    """Configuration of a model; dims leave the batch dimension out where max_batch_size is above 0."""
    said, policy = model.config, model.policy
    start = 1 if policy.batches else 0
    inputs = {tensor.name: tensor for tensor in said.inputs}
    outputs = {tensor.name: tensor for tensor in said.outputs}
    result = pb.ModelConfig(
        name=model.name,
        platform=model.platform,
        backend="" if said.steps else model.platform.partition("_")[0],
        version_policy=pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=[model.version])),
        max_batch_size=policy.rows_max if policy.batches else 0,
        input=[_input(spec, inputs.get(spec.name), start) for spec in model.signature.inputs],
        output=[_output(spec, outputs.get(spec.name), start) for spec in model.signature.outputs],
        default_model_filename=said.model_file or (model.path.name if model.path is not None else ""),
        parameters={name: pb.ModelParameter(string_value=value) for name, value in said.parameters.items()},
        model_warmup=[_warmup(sample) for sample in said.warmups],
    )
    if said.decoupled:
        result.model_transaction_policy.decoupled = True
    if not said.steps:
        result.instance_group.add(name=model.name, kind=_kind(model), count=model.concurrency)
    if said.steps:
        _steps(result.ensemble_scheduling, model)
    elif said.sequence is not None:
        _sequence(result.sequence_batching, said.sequence)
    elif policy.batches:
        _batching(result.dynamic_batching, model)
    return result


def _input(spec: TensorSpec, said: TensorConfig | None, start: int) -> pb.ModelInput:
    layout = f"FORMAT_{said.layout}" if said is not None and said.layout else "FORMAT_NONE"
    return pb.ModelInput(
        name=spec.name,
        data_type=data_type(spec.datatype.name),
        format=pb.ModelInput.Format.Value(layout),
        dims=spec.shape[start:],
        optional=spec.optional,
    )


def _output(spec: TensorSpec, said: TensorConfig | None, start: int) -> pb.ModelOutput:
    return pb.ModelOutput(
        name=spec.name,
        data_type=data_type(spec.datatype.name),
        dims=spec.shape[start:],
        label_filename=said.labels_file if said is not None else "",
    )


def _kind(model: ReadyModel) -> pb.ModelInstanceGroup.Kind.ValueType:
    on_gpu = model.platform.startswith("tensorrt")
    return pb.ModelInstanceGroup.KIND_GPU if on_gpu else pb.ModelInstanceGroup.KIND_CPU


def _batching(result: pb.ModelDynamicBatching, model: ReadyModel) -> None:
    said, policy = model.config.batching or BatchingConfig(), model.policy
    result.preferred_batch_size.extend(said.preferred_rows or (policy.rows_preferred,))
    result.max_queue_delay_microseconds = said.delay_us
    result.preserve_ordering = True
    result.priority_levels, result.default_priority_level = said.priorities, said.priority_default
    _queue(result.default_queue_policy, said.queue, policy.queue_items_max)
    for level, queue in sorted(said.queues.items()):
        _queue(result.priority_queue_policy[level], queue, queue.items_max)


def _queue(result: pb.ModelQueuePolicy, said: QueueConfig, items_max: int) -> None:
    result.default_timeout_microseconds = said.timeout_us
    result.allow_timeout_override = said.timeout_override
    result.max_queue_size = items_max


def _sequence(result: pb.ModelSequenceBatching, said: SequenceConfig) -> None:
    result.max_sequence_idle_microseconds = said.idle_us
    result.iterative_sequence = said.iterative
    if said.sequences_max:
        result.oldest.max_candidate_sequences = said.sequences_max
    else:
        result.direct.SetInParent()
    for control in said.controls:
        made = result.control_input.add(name=control.name).control.add(kind=control.kind.value)
        if control.kind is ControlKind.CORRELATION_ID:
            made.data_type = data_type(control.datatype)
        elif control.datatype == "INT32":
            made.int32_false_true.extend((int(control.false), int(control.true)))
        elif control.datatype == "BOOL":
            made.bool_false_true.extend((bool(control.false), bool(control.true)))
        else:
            made.fp32_false_true.extend((control.false, control.true))
    for state in said.states:
        result.state.add(
            input_name=state.input, output_name=state.output, data_type=data_type(state.datatype), dims=state.dims
        )


def _steps(result: pb.ModelEnsembling, model: ReadyModel) -> None:
    for step in model.config.steps:
        result.step.add(
            model_name=step.model,
            model_version=step.version or -1,
            input_map=step.inputs,
            output_map=step.outputs,
        )


def _warmup(sample: WarmupSample) -> pb.ModelWarmup:
    result = pb.ModelWarmup(name=sample.name, batch_size=sample.rows, count=sample.count)
    for entry in sample.inputs:
        made = result.inputs[entry.name]
        made.data_type = data_type(entry.datatype)
        made.dims.extend(entry.dims)
        if entry.fill is Fill.FILE:
            made.input_data_file = entry.file
        elif entry.fill is Fill.RANDOM:
            made.random_data = True
        else:
            made.zero_data = True
    return result
