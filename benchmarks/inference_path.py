"""What does the server's own Python cost a request, from its bytes to the bytes of its answer?

No sockets: encoded requests go to the direct method in bursts, as a transport hands them over, through the real batcher
to an engine that gives its input back, and come out as encoded answers. Three ways, in turns, in one process:

- plans: what the server does.
- in full: the same without plans, so every request is parsed by protobuf and checked field by field.
- typed: `plans` for a client that sends typed contents.
- awaited: the generic path of streams: protobuf messages in and out, a future and a task a request.

Reported: CPU time a request (median over rounds) for bursts of 1, 8 and 64, and the ratios, which are what travels.

    python -m benchmarks inference-path --requests 4096 --rounds 7
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import write_results
from mlmesh_inference.catalog import Catalog, ReadyModel
from mlmesh_inference.engines.base import EngineFacts
from mlmesh_inference.oip import wire
from mlmesh_inference.oip.direct import DirectInfer, DirectStreamInfer
from mlmesh_inference.oip.infer import start
from mlmesh_inference.scheduling.batcher import Batcher
from mlmesh_inference.scheduling.policy import BatchPolicy
from mlmesh_inference.statistics import Statistics
from mlmesh_inference.tensors import DATATYPES, Array, Signature, TensorSpec
from mlmesh_runtime.calls import Call
from mlmesh_runtime.errors import MeshError
from open_inference import grpc_service_pb2 as pb

BURSTS = (1, 8, 64)
WIDTH = 64
RESULTS = Path("benchmarks/results/inference_path.json")


class Echo:
    """y = x, FP32 [N,64]."""

    name = "echo"
    concurrency = 1
    facts = EngineFacts(precision="fp32")
    signature = Signature(
        inputs=(TensorSpec(name="x", datatype=DATATYPES["FP32"], shape=(-1, WIDTH)),),
        outputs=(TensorSpec(name="y", datatype=DATATYPES["FP32"], shape=(-1, WIDTH)),),
    )

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Its input."""
        return [inputs["x"] for _ in outputs]

    def close(self) -> None:
        """Nothing to close."""


class Burst:
    """Calls that came together; done when all are answered."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.done = asyncio.get_running_loop().create_future()
        self.answers: list[bytes] = []

    def answered(self, answer: bytes) -> None:
        self.answers.append(answer)
        self.left -= 1
        if not self.left:
            self.done.set_result(None)


class DirectCall:
    """As little of a call as a transport can have."""

    __slots__ = ("_burst", "deadline_ns", "request", "streaming")

    def __init__(self, request: bytes, burst: Burst, streaming: bool) -> None:
        self.request, self._burst, self.streaming = request, burst, streaming
        self.deadline_ns = 0

    def metadata(self, name: str) -> str | None:  # noqa: ARG002
        """None was sent."""
        return None

    def context(self) -> Call:
        """Of a server that does not look at identities."""
        return Call(_Context(), "/inference.GRPCInferenceService/ModelInfer", "none")

    def done(self) -> bool:
        """The caller is patient."""
        return False

    def reply(self, *payload: Any) -> None:
        """The answer."""
        self._burst.answered(b"".join(payload))

    def send(self, *payload: Any) -> None:
        """Not of these models."""
        raise AssertionError(payload)

    def finish(self) -> None:
        """Not of these models."""
        raise AssertionError

    def fail(self, error: MeshError) -> None:
        """No request here is wrong."""
        raise error

    def generic(self) -> None:
        """Nothing is handed back."""
        raise AssertionError


class _Context:
    def time_remaining(self) -> None:
        """No deadline."""


def request(number: int, *, typed: bool = False) -> bytes:
    """An encoded request of one row."""
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, WIDTH])
    message = pb.ModelInferRequest(model_name="echo", id=f"{number}", inputs=[tensor])
    row = np.full((1, WIDTH), number, np.float32)
    if typed:
        message.inputs[0].contents.fp32_contents.extend(row[0].tolist())
    else:
        message.raw_input_contents.append(row.tobytes())
    return bytes(message.SerializeToString())


def catalog() -> Catalog:
    """With one model that answers with what it is asked."""
    engine, policy, counts = Echo(), BatchPolicy(rows_max=64, rows_preferred=64), Statistics("echo", 1)
    made = Catalog()
    made.install(
        ReadyModel(
            name="echo",
            version=1,
            platform="",
            signature=engine.signature,
            policy=policy,
            runner=Batcher(engine, policy, counts, name="echo/1"),
            statistics=counts,
        ),
        engine="echo",
        engine_reason="",
    )
    made.point("echo", default=1, aliases={})
    return made


Way = Callable[[Sequence[bytes]], Awaitable[Sequence[bytes]]]


def direct(method: Callable[[Sequence[Any]], None], *, streaming: bool) -> Way:
    """Requests through a direct method."""

    async def way(requests: Sequence[bytes]) -> Sequence[bytes]:
        burst = Burst(len(requests))
        method([DirectCall(encoded, burst, streaming) for encoded in requests])
        await burst.done
        return burst.answers

    return way


def awaited(models: Catalog) -> Way:
    """Requests by protobuf, futures and tasks."""

    async def one(encoded: bytes) -> bytes:
        response = await start(models, pb.ModelInferRequest.FromString(encoded)).finish()
        return bytes(response.SerializeToString())

    async def way(requests: Sequence[bytes]) -> Sequence[bytes]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(encoded)) for encoded in requests]
        return [task.result() for task in tasks]

    return way


async def cost_us(way: Way, burst: int, count: int, *, typed: bool) -> float:
    """CPU time a request."""
    requests = [request(number, typed=typed) for number in range(burst)]
    begun = time.process_time()
    for _ in range(max(1, count // burst)):
        await way(requests)
    return (time.process_time() - begun) / (max(1, count // burst) * burst) * 1e6


async def measure(count: int, rounds: int) -> dict[str, Any]:
    """All ways, in turns."""
    models = catalog()
    ways = {
        "plans": direct(DirectInfer(models), streaming=False),
        "plans, stream": direct(DirectStreamInfer(models), streaming=True),
        "typed": direct(DirectInfer(models), streaming=False),
        "in full": direct(DirectInfer(models, plans=False), streaming=False),
        "awaited": awaited(models),
    }
    asked = [request(number) for number in range(8)]
    expected = sorted(await ways["awaited"](asked))
    for name in ("plans", "in full"):
        for _ in range(2):
            assert sorted(await ways[name](asked)) == expected, name
    taken: dict[tuple[str, int], list[float]] = {(name, burst): [] for name in ways for burst in BURSTS}
    for number in range(rounds + 1):
        for (name, burst), costs in taken.items():
            cost = await cost_us(ways[name], burst, count, typed=name == "typed")
            if number:
                costs.append(cost)
    costs_us = {name: {burst: statistics.median(taken[name, burst]) for burst in BURSTS} for name in ways}
    models.resolve("echo", "").runner.abort()
    return {
        "requests": count,
        "rounds": rounds,
        "splitter": "native" if wire.split is not wire.split_python else "python",
        "cpu_us_per_request": {name: {str(b): round(us, 2) for b, us in by.items()} for name, by in costs_us.items()},
        "ratio_to_awaited": {
            name: {str(b): round(us / costs_us["awaited"][b], 3) for b, us in by.items()}
            for name, by in costs_us.items()
        },
    }


def main(arguments: Sequence[str]) -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(prog="inference-path", description=__doc__)
    parser.add_argument("--requests", type=int, default=4096, help="requests a way, burst and round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--splitter", choices=["native", "python"], help="default: native where it is installed")
    options = parser.parse_args(arguments)
    if options.splitter:
        native = importlib.import_module("mlmesh_front").split if options.splitter == "native" else None
        wire.split = native or wire.split_python  # type: ignore[misc]
    results = asyncio.run(measure(options.requests, options.rounds))
    print(f"CPU us a request (ratio to awaited), {results['splitter']} splitter; bursts of {BURSTS}")
    for name, by in results["cpu_us_per_request"].items():
        cells = (f"{us:8.1f} ({results['ratio_to_awaited'][name][burst]:.2f})" for burst, us in by.items())
        print(f"{name:15}", *cells)
    write_results(RESULTS, results)
