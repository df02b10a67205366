"""Scheduling, fitting and optimisation between the contract's messages and our values; absent ones take defaults."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_training import options
from mlmesh_training.options import (
    Direction,
    Distillation,
    Distribution,
    EarlyStopping,
    FitOptions,
    MixedPrecision,
    Optimization,
    Precision,
    Pruning,
    Quantization,
    Resources,
    Schedule,
    Strategy,
)


def resources(message: pb.Resources) -> Resources:
    """What a job asks for; 0 stays 0."""
    return Resources(cpus=message.cpus, memory_bytes=message.memory_bytes, gpus=message.gpus)


def resources_message(value: Resources) -> pb.Resources:
    """What a job asks for or occupies."""
    return pb.Resources(cpus=value.cpus, memory_bytes=value.memory_bytes, gpus=value.gpus)


def distribution(message: pb.Distribution) -> Distribution:
    """How a job is spread."""
    return Distribution(
        processes=message.processes or 1,
        strategy=Strategy.FSDP2 if message.strategy == pb.STRATEGY_FSDP2 else Strategy.DDP,
        nodes=message.nodes or 1,
    )


def distribution_message(value: Distribution) -> pb.Distribution:
    """How a job is spread."""
    return pb.Distribution(
        processes=value.processes, strategy=pb.Strategy.Value(f"STRATEGY_{value.strategy}"), nodes=value.nodes
    )


def fit(message: pb.FitOptions) -> FitOptions:
    """How a job is fitted."""
    return FitOptions(
        precision=precision(message.precision, Precision.FP32),
        schedule=Schedule(_name(pb.Schedule.Name(message.schedule), "SCHEDULE_")),
        warmup_share=message.warmup_share or options.WARMUP_SHARE_DEFAULT,
        accumulation_steps=message.accumulation_steps or 1,
        clip_norm=message.clip_norm,
        early_stopping=_early_stopping(message.early_stopping) if message.HasField("early_stopping") else None,
        checkpoint_steps=message.checkpoint_steps,
        restore_best=message.restore_best,
    )


def fit_message(value: FitOptions) -> pb.FitOptions:
    """How a job is fitted."""
    message = pb.FitOptions(
        precision=pb.Precision.Value(f"PRECISION_{value.precision}"),
        schedule=pb.Schedule.Value(f"SCHEDULE_{value.schedule or 'UNSPECIFIED'}"),
        warmup_share=value.warmup_share,
        accumulation_steps=value.accumulation_steps,
        clip_norm=value.clip_norm,
        checkpoint_steps=value.checkpoint_steps,
        restore_best=value.restore_best,
    )
    if (stopping := value.early_stopping) is not None:
        message.early_stopping.CopyFrom(
            pb.EarlyStopping(
                metric=stopping.metric,
                patience=stopping.patience,
                min_delta=stopping.min_delta,
                direction=direction_message(stopping.direction),
            )
        )
    return message


def optimization(message: pb.Optimization) -> Optimization:
    """What is done to an existing version."""
    technique: options.Technique
    match message.WhichOneof("technique"):
        case "quantization":
            asked = message.quantization
            technique = Quantization(
                calibration_examples=asked.calibration_examples or options.CALIBRATION_EXAMPLES_DEFAULT,
                method=asked.method or "minmax",
            )
        case "mixed_precision":
            technique = MixedPrecision(precision=precision(message.mixed_precision.precision, Precision.FP16))
        case "pruning":
            technique = Pruning(
                sparsity=message.pruning.sparsity,
                two_four=message.pruning.two_four,
                epochs=message.pruning.epochs or options.PRUNING_EPOCHS_DEFAULT,
            )
        case _:
            technique = Distillation(
                temperature=message.distillation.temperature or options.TEMPERATURE_DEFAULT,
                teacher_share=message.distillation.teacher_share or options.TEACHER_SHARE_DEFAULT,
            )
    return Optimization(
        source=message.source,
        technique=technique,
        quality_drop_max=message.quality_drop_max or options.QUALITY_DROP_DEFAULT,
    )


def optimization_message(value: Optimization) -> pb.Optimization:
    """What is done to an existing version."""
    message = pb.Optimization(source=value.source, quality_drop_max=value.quality_drop_max)
    match value.technique:
        case Quantization(calibration_examples=examples, method=method):
            message.quantization.CopyFrom(pb.Quantization(calibration_examples=examples, method=method))
        case MixedPrecision(precision=inside):
            message.mixed_precision.precision = pb.Precision.Value(f"PRECISION_{inside}")
        case Pruning(sparsity=sparsity, two_four=two_four, epochs=epochs):
            message.pruning.CopyFrom(pb.Pruning(sparsity=sparsity, two_four=two_four, epochs=epochs))
        case Distillation(temperature=temperature, teacher_share=share):
            message.distillation.CopyFrom(pb.Distillation(temperature=temperature, teacher_share=share))
    return message


def precision(value: pb.Precision.ValueType, default: Precision) -> Precision:
    """An arithmetic."""
    return Precision(_name(pb.Precision.Name(value), "PRECISION_") or default)


def direction(value: pb.Direction.ValueType, metric: str) -> Direction:
    """Which values are better; what is not set follows from the figure's name."""
    return Direction(_name(pb.Direction.Name(value), "DIRECTION_") or options.direction_of(metric))


def direction_message(value: Direction) -> pb.Direction.ValueType:
    """Which values are better."""
    return pb.Direction.Value(f"DIRECTION_{value}")


def duration(seconds: float) -> Duration:
    """A length of time."""
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def seconds(message: Duration) -> float:
    """A length of time."""
    return message.ToNanoseconds() / 1e9


def _early_stopping(message: pb.EarlyStopping) -> EarlyStopping:
    metric = message.metric or "validation_loss"
    return EarlyStopping(
        metric=metric,
        patience=message.patience or options.PATIENCE_DEFAULT,
        min_delta=message.min_delta,
        direction=direction(message.direction, metric),
    )


def _name(name: str, prefix: str) -> str:
    """The value's name; empty for UNSPECIFIED."""
    return "" if name.endswith("_UNSPECIFIED") else name.removeprefix(prefix)
