"""How a job is scheduled, spread over processes, fitted and optimised, as values. Pure; names as in the contract."""

from __future__ import annotations

import enum
from dataclasses import dataclass

QUALITY_DROP_DEFAULT = 0.01
CALIBRATION_EXAMPLES_DEFAULT = 256
PATIENCE_DEFAULT = 3
WARMUP_SHARE_DEFAULT = 0.1
PRUNING_EPOCHS_DEFAULT = 2
TEMPERATURE_DEFAULT = 4.0
TEACHER_SHARE_DEFAULT = 0.7


class Strategy(enum.StrEnum):
    """How the processes of a distributed job share the model."""

    DDP = "DDP"
    FSDP2 = "FSDP2"


class Precision(enum.StrEnum):
    """Arithmetic of the fitting."""

    FP32 = "FP32"
    BF16 = "BF16"
    FP16 = "FP16"


class Schedule(enum.StrEnum):
    """How the learning rate moves; DEFAULT is the recipe's own."""

    DEFAULT = ""
    CONSTANT = "CONSTANT"
    ONE_CYCLE = "ONE_CYCLE"
    COSINE = "COSINE"
    LINEAR = "LINEAR"


class Direction(enum.StrEnum):
    """Which values of a figure are better."""

    MAXIMIZE = "MAXIMIZE"
    MINIMIZE = "MINIMIZE"


def direction_of(metric: str) -> Direction:
    """The direction of a figure by its name: less loss and less error are better."""
    return Direction.MINIMIZE if metric.endswith(("loss", "error")) else Direction.MAXIMIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyStopping:
    """Ends a fitting when `metric` has not improved by more than `min_delta` for `patience` epochs."""

    metric: str = "validation_loss"
    patience: int = PATIENCE_DEFAULT
    min_delta: float = 0.0
    direction: Direction = Direction.MINIMIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """Common to all recipes. `clip_norm` 0: no clipping. `checkpoint_steps` 0: one at the end of each epoch."""

    precision: Precision = Precision.FP32
    schedule: Schedule = Schedule.DEFAULT
    warmup_share: float = WARMUP_SHARE_DEFAULT
    accumulation_steps: int = 1
    clip_norm: float = 0.0
    early_stopping: EarlyStopping | None = None
    checkpoint_steps: int = 0
    restore_best: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Processes (of all machines together) and how they share the model."""

    processes: int = 1
    strategy: Strategy = Strategy.DDP
    nodes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a job occupies while it runs: cores, bytes of main memory, GPUs."""

    cpus: float = 0.0
    memory_bytes: int = 0
    gpus: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """To 8-bit integers, by calibration; `method` is "minmax", "entropy" or "percentile"."""

    calibration_examples: int = CALIBRATION_EXAMPLES_DEFAULT
    method: str = "minmax"


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPrecision:
    """FP16 or BF16 inside, FP32 at the edges."""

    precision: Precision = Precision.FP16


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning:
    """Weights to zero by magnitude, a `sparsity` share of them or two of every four, then fine-tuned."""

    sparsity: float = 0.5
    two_four: bool = False
    epochs: int = PRUNING_EPOCHS_DEFAULT


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """The job's recipe as the student of the source."""

    temperature: float = TEMPERATURE_DEFAULT
    teacher_share: float = TEACHER_SHARE_DEFAULT


Technique = Quantization | MixedPrecision | Pruning | Distillation


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimization:
    """Makes a version smaller or faster. `source`: "models/{model}/versions/{number}" once accepted."""

    source: str
    technique: Technique
    quality_drop_max: float = QUALITY_DROP_DEFAULT
