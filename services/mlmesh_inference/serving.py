"""How a model is to be served, as values: what a version's config.pbtxt or the override of a load says.

The terms are those of Triton's ModelConfig, which is what such files are written in; `oip.model_config` converts.
A model without a configuration gets `ServingConfig()`: everything is worked out from the model and the process.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

CONFIG_FILE: Final = "config.pbtxt"
"""File of a version with its configuration: ModelConfig in protobuf's text format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorConfig:
    """An input or output as the configuration declares it; `dims` leave the batch dimension out where there is one.

    `datatype` is the protocol's name ("FP32", "BYTES"), "" when the file does not say. `layout` tells clients how an
    image lies in an input, "NHWC" or "NCHW"; nothing is changed by it.
    """

    name: str
    datatype: str = ""
    dims: tuple[int, ...] = ()
    optional: bool = False
    layout: str = ""
    labels_file: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueConfig:
    """Bounds of a queue; 0 leaves a bound to the process.

    Attributes:
        items_max: requests that may wait.
        timeout_us: longest wait of a request that asks for none. timeout_override: whether requests may say their own.
    """

    items_max: int = 0
    timeout_us: int = 0
    timeout_override: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingConfig:
    """dynamic_batching. `priorities` 0 means that the model has no levels; level 1 is the most urgent."""

    preferred_rows: tuple[int, ...] = ()
    delay_us: int = 0
    priorities: int = 0
    priority_default: int = 0
    queue: QueueConfig = field(default_factory=QueueConfig)
    queues: Mapping[int, QueueConfig] = field(default_factory=dict)


class ControlKind(enum.Enum):
    """What a control input of a sequence model tells it."""

    START = 0
    READY = 1
    END = 2
    CORRELATION_ID = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlInput:
    """A control input: `false` and `true` are its two values; CORRELATION_ID carries the id in `datatype`."""

    name: str
    kind: ControlKind
    datatype: str = "FP32"
    false: float = 0
    true: float = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StateConfig:
    """An implicit state: what `output` gave is the `input` of the sequence's next request; first it is zeros."""

    input: str
    output: str
    datatype: str = ""
    dims: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceConfig:
    """sequence_batching. A sequence that nobody continues for `idle_us` is forgotten; at most `sequences_max` live."""

    states: tuple[StateConfig, ...] = ()
    controls: tuple[ControlInput, ...] = ()
    idle_us: int = 1_000_000
    sequences_max: int = 0
    iterative: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One node of an ensemble: a model by name and version (0: its default), or a built-in step "mlmesh.NAME".

    `inputs` and `outputs` map the step's own tensor names to the ensemble's.
    """

    model: str
    version: int = 0
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)


class Fill(enum.Enum):
    """What an input of a warm-up sample holds."""

    ZEROS = 0
    RANDOM = 1
    FILE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleInput:
    """An input of a warm-up sample. `dims` leave the batch dimension out; `file` is the version's, raw contents."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    fill: Fill = Fill.ZEROS
    file: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupSample:
    """A request that runs `count` times before the version is ready. `rows` is 0 for a model that does not batch."""

    name: str
    rows: int = 0
    inputs: tuple[SampleInput, ...] = ()
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionPolicy:
    """Which versions are served: the `latest` highest numbers, those of `numbers`, or all when neither is said."""

    latest: int = 0
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    """Everything a version may say about how it is served. 0, "" and empty mean: not said.

    Attributes:
        name: of the model, when said. platform, backend: Triton's terms ("onnxruntime_onnx", "ensemble").
        rows_max: most rows of a batch (max_batch_size); None when not said, 0 for a model that does not batch.
        versions: which versions an override of a load asks for; a version's own file may name itself only.
        instances: engine instances, the sum of instance_group counts. device: "cpu" or "gpu" when they are bound to it.
        steps: of an ensemble. decoupled: any number of answers to a request.
        parameters: the file's own, as text; names under "mlmesh." are ours (engine, precision, tolerance).
        model_file: of default_model_filename.
        warmups: samples to warm up with, beside those that every model gets.
    """

    name: str = ""
    platform: str = ""
    backend: str = ""
    rows_max: int | None = None
    inputs: tuple[TensorConfig, ...] = ()
    outputs: tuple[TensorConfig, ...] = ()
    batching: BatchingConfig | None = None
    sequence: SequenceConfig | None = None
    steps: tuple[Step, ...] = ()
    decoupled: bool = False
    versions: VersionPolicy | None = None
    instances: int = 0
    device: str = ""
    model_file: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)
    warmups: tuple[WarmupSample, ...] = ()

    @property
    def engine(self) -> str:
        """Engine asked for ("onnxruntime", "openvino", "torch", "tensorrt"), by our parameter or by Triton's backend.

        "" leaves the choice to the policy. A backend that is not one of them stays as it is, to be refused by name.
        """
        said = self.parameter("engine") or self.backend or self.platform.partition("_")[0]
        return {"auto": "", "pytorch": "torch", "ensemble": ""}.get(said, said)

    def parameter(self, name: str) -> str:
        """Value of our own parameter "mlmesh.NAME", "" when the file does not say it."""
        return self.parameters.get(f"mlmesh.{name}", "")
