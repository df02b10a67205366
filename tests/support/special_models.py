"""Models that are no function of one request: one that adds up a sequence, one that answers any number of times."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlmesh_inference.catalog import ReadyModel
from mlmesh_inference.engines.base import EngineFacts
from mlmesh_inference.running import Answer, Sink, Work
from mlmesh_inference.scheduling.batcher import Batcher
from mlmesh_inference.scheduling.policy import BatchPolicy
from mlmesh_inference.sequence_plan import SequencePlan
from mlmesh_inference.sequences import Sequencer
from mlmesh_inference.serving import SequenceConfig, StateConfig
from mlmesh_inference.statistics import Statistics
from mlmesh_inference.tensors import DATATYPES, Array, Signature, TensorSpec
from mlmesh_runtime.errors import InvalidInput, Unsupported

_SUM = SequenceConfig(states=(StateConfig(input="total", output="total_out"),))


def _spec(name: str, kind: str = "FP32") -> TensorSpec:
    return TensorSpec(name=name, datatype=DATATYPES[kind], shape=(-1, 1))


class _Adding:
    """y = total_out = x + total, over [N,1]."""

    name = "adding"
    concurrency = 1
    facts = EngineFacts(precision="fp32")
    signature = Signature(inputs=(_spec("x"), _spec("total")), outputs=(_spec("y"), _spec("total_out")))

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Add."""
        return [inputs["x"] + inputs["total"] for _ in outputs]

    def close(self) -> None:
        """Nothing to close."""


def summing_model(*, name: str = "sum", version: int = 1) -> ReadyModel:
    """y is the sum of all x of the sequence so far; x and y are FP32 [N,1]."""
    engine = _Adding()
    policy = BatchPolicy(limiter=False, admission=False)
    batcher = Batcher(engine, policy, Statistics(name, version), name=f"{name}/{version}")
    plan = SequencePlan.of(_SUM, engine.signature, batches=True)
    return ReadyModel(
        name=name,
        version=version,
        platform="onnxruntime_onnx",
        signature=Signature(inputs=(_spec("x"),), outputs=(_spec("y"),)),
        policy=policy,
        runner=Sequencer(batcher, plan, _SUM, name=name, batches=True),
        statistics=Statistics(name, version),
    )


class Repeating:
    """The runner of a decoupled model: n[N,1] is answered n times, with 0, 1, 2...; a negative n is an error.

    Each answer waits for `allow`, if there is one.
    """

    decoupled = True
    depth = 0
    capacity = 64

    def __init__(self) -> None:
        self.allow: asyncio.Semaphore | None = None
        self.given = self.withdrawn = 0

    def submit(self, work: Work, sink: Sink) -> None:
        """A decoupled model cannot answer this way."""
        raise Unsupported("decoupled")

    async def respond(self, work: Work) -> AsyncIterator[Answer]:
        """n answers."""
        count = int(work.inputs["n"][0, 0])
        if count < 0:
            raise InvalidInput("n must be 0 or more", field="inputs[n]")
        try:
            for number in range(count):
                if self.allow is not None:
                    await self.allow.acquire()
                self.given += 1
                yield Answer(outputs=("y",), arrays=[np.full((1, 1), number, np.int32)])
        except (GeneratorExit, asyncio.CancelledError):
            self.withdrawn += 1
            raise

    async def drain(self) -> None:
        """Nothing waits."""

    def abort(self) -> None:
        """Nothing waits."""


def repeating_model(runner: Repeating | None = None, *, name: str = "repeat", version: int = 1) -> ReadyModel:
    """A decoupled model over `Repeating`."""
    from mlmesh_inference.serving import ServingConfig

    config: Any = ServingConfig(decoupled=True)
    return ReadyModel(
        name=name,
        version=version,
        platform="onnxruntime_onnx",
        signature=Signature(inputs=(_spec("n", "INT32"),), outputs=(_spec("y", "INT32"),)),
        policy=BatchPolicy(),
        runner=runner or Repeating(),
        statistics=Statistics(name, version),
        config=config,
    )
