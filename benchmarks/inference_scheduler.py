"""What does scheduling cost a request, and what does sharing between instances bring?

    python -m benchmarks inference-scheduler

*Queue*: CPU time a request of being queued and taken in batches of eight, with as many others waiting, in nanoseconds:

- plain: a deque and nothing else: the first come, first served queue that this scheduler replaced.
- alike: the real queue in the ordinary case: one level, one tenant, one shape, deadlines in order.
- deadlines: deadlines at random. tenants: sixteen. levels: four. shapes: thirty-two. all: all of that.

*Batcher*: CPU time a request from `submit` to its answer, with an engine that does nothing, statistics included, for
requests that come in bursts.

*Instances*: two of them, closed loops of callers, virtual time; a batch takes 2.2 ms and 4.2 ms a row (MiniLM of 32
tokens on a core, measured). A batch takes all that waits (up to 64), up to eight, or up to its instance's share.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import heapq
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.harness import write_results
from mlmesh_inference.engines.base import EngineFacts
from mlmesh_inference.running import Work
from mlmesh_inference.scheduling.batcher import Batcher
from mlmesh_inference.scheduling.policy import BatchPolicy
from mlmesh_inference.scheduling.queue import BatchQueue, Pending
from mlmesh_inference.statistics import Statistics
from mlmesh_inference.tensors import DATATYPES, Array, Signature, TensorSpec

DEPTHS = (8, 256, 4096)
BURSTS = (1, 8, 64)


class Waiting:
    """A sink that nobody has given up."""

    def done(self) -> bool:
        """Never."""
        return False


def items(kind: str, count: int) -> list[Pending]:
    """Requests that differ in what `kind` says."""
    generator, sink = random.Random(1), Waiting()  # noqa: S311
    made = []
    for number in range(count):
        everything = kind == "all"
        tenant = f"tenant-{generator.randrange(16)}" if everything or kind == "tenants" else ""
        made.append(
            Pending(
                work=Work(inputs={}, outputs=("y",), tenant=tenant),
                sink=sink,  # type: ignore[arg-type]
                shape_key=generator.randrange(32) if everything or kind == "shapes" else 0,
                arrived_ns=0,
                level=generator.randrange(1, 5) if everything or kind == "levels" else 1,
                order_ns=generator.randrange(1 << 40) if everything or kind == "deadlines" else number + 1,
            )
        )
    return made


def queue_ns(kind: str, depth: int, count: int = 20_000) -> float:
    """Nanoseconds a request through the queue, with `depth` others in it."""
    policy = BatchPolicy(rows_preferred=8, levels=4)
    made = items(kind, count + depth)
    real = BatchQueue(policy)
    add: Callable[[Pending], Any] = real.add
    take: Callable[[], Sequence[Pending]] = lambda: real.take(0)[0]  # noqa: E731
    if kind == "plain":
        plain: deque[Pending] = deque()
        add, take = plain.append, lambda: [plain.popleft() for _ in range(min(8, len(plain)))]
    for item in made[:depth]:
        add(item)
    gc.collect()
    begun, out = time.process_time(), 0
    for number, item in enumerate(made[depth:], start=1):
        add(item)
        while out + 8 <= number:
            out += len(take())
    return (time.process_time() - begun) / count * 1e9


class Nothing:
    """y is something, FP32 [N,4]; takes no time."""

    name = "nothing"
    concurrency = 1
    facts = EngineFacts(precision="fp32")
    signature = Signature(
        inputs=(TensorSpec(name="x", datatype=DATATYPES["FP32"], shape=(-1, 4)),),
        outputs=(TensorSpec(name="y", datatype=DATATYPES["FP32"], shape=(-1, 4)),),
    )

    def __init__(self) -> None:
        self._made = [np.zeros((rows, 4), np.float32) for rows in range(65)]

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Zeros."""
        return [self._made[len(inputs["x"])] for _ in outputs]

    def close(self) -> None:
        """Nothing to close."""


class Counting:
    """A sink of a burst."""

    __slots__ = ("_answered", "_burst", "_future")

    def __init__(self, burst: list[int], future: asyncio.Future[None]) -> None:
        self._burst, self._future, self._answered = burst, future, False

    def done(self) -> bool:
        """Whether it was answered."""
        return self._answered

    def answer(self, arrays: Sequence[Array]) -> None:  # noqa: ARG002
        """One less to wait for."""
        self._answered = True
        self._burst[0] -= 1
        if not self._burst[0]:
            self._future.set_result(None)

    def fail(self, error: Exception) -> None:
        """None does."""
        raise error


async def batcher_us(burst: int, requests: int) -> float:
    """Microseconds of CPU a request, from `submit` to its answer."""
    loop = asyncio.get_running_loop()
    counts = Statistics("nothing", 1)
    batcher = Batcher(Nothing(), BatchPolicy(rows_preferred=8), counts, name="nothing/1")
    inputs, outputs = {"x": np.zeros((1, 4), np.float32)}, ("y",)
    gc.collect()
    begun = time.process_time()
    for _ in range(requests // burst):
        future, left = loop.create_future(), [burst]
        for _ in range(burst):
            work = Work(inputs=inputs, outputs=outputs, deadline_ns=time.monotonic_ns() + 10_000_000_000)
            batcher.submit(work, Counting(left, future))
        await future
    used = (time.process_time() - begun) / requests * 1e6
    await batcher.drain()
    counts.close()
    return used


def instances(callers: int, most: int, *, share: bool, count: int = 4000) -> dict[str, float]:
    """Rows a second and latencies of two instances in virtual time."""
    generator = random.Random(1)  # noqa: S311
    now, number, free, running = 0.0, callers, 2, 0
    events: list[tuple[float, int, list[float]]] = [(generator.random(), each, []) for each in range(callers)]
    waiting: deque[float] = deque()
    latencies: list[float] = []
    heapq.heapify(events)
    while len(latencies) < count:
        now, _, batch = heapq.heappop(events)
        if not batch:
            waiting.append(now)
        else:
            free, running = free + 1, running - len(batch)
        for arrived in batch:
            latencies.append(now - arrived)
            number += 1
            heapq.heappush(events, (now + generator.expovariate(1.0), number, []))
        while waiting and free and (not events or events[0][0] > now):
            size = min(most, len(waiting), -(-(len(waiting) + running) // 2) if share else most)
            taken = [waiting.popleft() for _ in range(size)]
            free, running, number = free - 1, running + size, number + 1
            took = (2.2 + 4.2 * size) * max(0.5, generator.gauss(1, 0.1))
            heapq.heappush(events, (now + took, number, taken))
    latencies.sort()
    return {
        "rows_per_s": len(latencies) / now * 1000,
        "p50_ms": latencies[len(latencies) // 2],
        "p99_ms": latencies[len(latencies) * 99 // 100],
    }


def main(arguments: list[str]) -> None:
    """Measures, prints tables, writes JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks inference-scheduler", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16_384)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/inference_scheduler.json"))
    options = parser.parse_args(arguments)
    console, results = Console(width=100), dict[str, Any]()
    table = Table("queue, ns a request", *(f"{depth} wait" for depth in DEPTHS))
    for kind in ("plain", "alike", "deadlines", "tenants", "levels", "shapes", "all"):
        found = {depth: min(queue_ns(kind, depth) for _ in range(options.rounds)) for depth in DEPTHS}
        results[f"queue {kind}"] = {str(depth): round(value) for depth, value in found.items()}
        table.add_row(kind, *(f"{value:.0f}" for value in found.values()))
    console.print(table)
    table = Table("batcher", *(f"bursts of {burst}" for burst in BURSTS))
    used = {
        burst: statistics.median(asyncio.run(batcher_us(burst, options.requests)) for _ in range(options.rounds))
        for burst in BURSTS
    }
    results["batcher us"] = {str(burst): round(value, 2) for burst, value in used.items()}
    table.add_row("CPU us a request", *(f"{value:.1f}" for value in used.values()))
    console.print(table)
    table = Table("callers", "all that waits: rows/s, p50, p99 ms", "up to eight", "its share of eight")
    for callers in (4, 8, 12, 16, 32, 64):
        ways = [instances(callers, most, share=share) for most, share in ((64, False), (8, False), (8, True))]
        results[f"instances {callers}"] = dict(zip(("all", "eight", "share"), ways, strict=True))
        cells = [f"{way['rows_per_s']:.0f}, {way['p50_ms']:.0f}, {way['p99_ms']:.0f}" for way in ways]
        table.add_row(str(callers), *cells)
    console.print(table)
    write_results(options.output, results)
