"""The port of every engine: four methods, and facts.

`EngineKind.probe` looks whether a library can run here, `EngineKind.build` makes an engine of a model file,
`Engine.run` answers a batch, `Engine.close` gives everything back. All else that an engine says of itself is a value
that was read back from it: see `EngineFacts`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from mlmesh_inference.tensors import Array, Signature, TensorSpec

PRECISIONS: Final = ("fp32", "bf16", "fp16")
"""Precisions that may be declared. A model that is quantised or of half precision itself is served as it is."""


class EngineError(Exception):
    """A model could not be built or run. The text is meant for whoever published the model."""


class MemorySource(enum.Enum):
    """How `EngineFacts.memory_bytes` was found; the text is for people."""

    UNKNOWN = "not known"
    WEIGHTS = "sum of the weights"
    RESIDENT = "growth of the process's memory while it was built and warmed up"
    DEVICE = "memory taken on the device"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What an engine is, read back from it and never from the request.

    Attributes:
        precision: of the arithmetic that most of its time goes to: "fp32", "bf16", "fp16", "int8", ...
        device: "cpu", "cuda:0 NVIDIA H100".
        memory_bytes: of host and device together, memory_source: how that was found.
    """

    precision: str = ""
    device: str = "cpu"
    memory_bytes: int = 0
    memory_source: MemorySource = MemorySource.UNKNOWN


class Engine(Protocol):
    """A model ready to run.

    Attributes of an implementation are set once; `run` may be called from `concurrency` threads at a time and no more.
    """

    @property
    def name(self) -> str:
        """Name of the engine kind, such as "onnxruntime-cpu"."""

    @property
    def signature(self) -> Signature:
        """Inputs and outputs, read from the model itself."""

    @property
    def concurrency(self) -> int:
        """How many `run` calls may be under way at once."""

    @property
    def facts(self) -> EngineFacts:
        """What it is."""

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run one batch. Inputs have the signature's dtypes; results come in the order of `outputs`.

        Blocking; raises EngineError. The arrays returned belong to the caller.
        """

    def close(self) -> None:
        """Give memory back. No `run` is under way or follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What an engine may use.

    Attributes:
        threads: threads of one `run` on the CPU.
        concurrency: `run` calls at once.
        rows_max: most rows of a batch, rows_preferred: rows of a usual one; a GPU engine is tuned for these.
        precision: of PRECISIONS; an engine that cannot compute in it refuses the model.
        parameters: the model's own (ServingConfig.parameters under "mlmesh.", without that) that one engine knows, such
            as "dims" and "tf32" of TensorRT.
    """

    threads: int = 1
    concurrency: int = 1
    rows_max: int = 64
    rows_preferred: int = 8
    precision: str = "fp32"
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Availability:
    """Whether an engine kind can run here, why, and the version of its library ("" when not installed)."""

    available: bool
    reason: str
    version: str = ""


class EngineKind(Protocol):
    """A library that builds engines from a model file."""

    @property
    def name(self) -> str:
        """Name of the kind."""

    @property
    def precisions(self) -> tuple[str, ...]:
        """Of PRECISIONS: what it can be asked to compute an FP32 model in."""

    def probe(self) -> Availability:
        """Look whether it can run here. Cheap, never raises."""

    def build(self, model: Path, options: EngineOptions) -> Engine:
        """Build an engine. Blocking, may take minutes; raises EngineError."""


def no_rows(spec: TensorSpec) -> Array:
    """The answer to a batch of no rows, for engines that take none. Free dimensions beside the batch are 0."""
    return np.empty((0, *(max(dim, 0) for dim in spec.shape[1:])), spec.datatype.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """An engine, and why it is this one."""

    engine: Engine
    reason: str


def build_preferred(
    kinds: Sequence[EngineKind], model: Path, options: EngineOptions, *, precision: str = "fp32"
) -> BuiltEngine:
    """Build with the first kind that is available and takes the model; the reason tells what was passed over.

    Args:
        precision: that the very first kind is asked for; the others are asked for that of the options.

    Raises EngineError with the refusals when none takes it.
    """
    absent: list[str] = []
    refused: list[str] = []
    for kind in kinds:
        probe = kind.probe()
        if not probe.available:
            absent.append(f"{kind.name}: {probe.reason}")
            continue
        try:
            engine = kind.build(model, replace(options, precision=precision) if kind is kinds[0] else options)
        except EngineError as error:
            refused.append(f"{kind.name} refused the model: {error}")
            continue
        return BuiltEngine(engine=engine, reason="; ".join([probe.reason, *refused, *absent]))
    raise EngineError("; ".join(refused or absent) or "no engine is configured")
