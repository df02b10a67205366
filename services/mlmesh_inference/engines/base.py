"""The port of every engine, and how one is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mlmesh_inference.tensors import Array, Signature


class EngineError(Exception):
    """A model could not be built or run. The text is meant for whoever published the model."""


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
    """

    threads: int = 1
    concurrency: int = 1
    rows_max: int = 64
    rows_preferred: int = 8


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

    def probe(self) -> Availability:
        """Look whether it can run here. Cheap, never raises."""

    def build(self, model: Path, options: EngineOptions) -> Engine:
        """Build an engine. Blocking, may take minutes; raises EngineError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """An engine, and why it is this one."""

    engine: Engine
    reason: str


def build_preferred(kinds: Sequence[EngineKind], model: Path, options: EngineOptions) -> BuiltEngine:
    """Build with the first kind that is available and takes the model; the reason tells what was passed over.

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
            engine = kind.build(model, options)
        except EngineError as error:
            refused.append(f"{kind.name} refused the model: {error}")
            continue
        return BuiltEngine(engine=engine, reason="; ".join([probe.reason, *refused, *absent]))
    raise EngineError("; ".join(refused or absent) or "no engine is configured")
