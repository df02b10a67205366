"""Which limit for the requests inside? Published algorithms on a simulated engine that batches, in virtual time.

    python -m benchmarks inference-limits

Two instances take batches of up to eight rows; a batch takes 2.2 ms and 4.2 ms a row (MiniLM of 32 tokens on one core,
measured), give or take a tenth. Requests have no deadlines: with deadlines, admission decides long before a limit does.

- *64 callers*: a closed loop. Nothing is wrong, so nobody should be refused.
- *three times too much*: an open loop at three times capacity. Waiting should stay bounded, and throughput whole.
- *the same after ten times as long*: only the end is counted. Is the overload taken for normal by then?
- *64 callers after an overload*: both, the open loop for the first third; only the last third is counted. Do those who
  did nothing wrong still pay?
- *slower by half*: an open loop at 0.9 of capacity; after a third of the time every batch takes twice as long for a
  third. The limit should fall, and come back.

Limits: none but the queue's (256); AIMD (target 250 ms, back off to 0.9); Vegas and Gradient2 as in Netflix's
concurrency-limits (formulas and defaults from their documentation, the code is ours); and ours: gradient over the
measured time of a batch. All begin at the upper bound. What is shown: share refused, throughput by capacity, latency
of those answered, final limit.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from benchmarks.harness import write_results
from mlmesh_inference.scheduling.limiter import GradientLimiter

INSTANCES, CAP, FIXED_MS, ROW_MS, QUEUE = 2, 8, 2.2, 4.2, 256
CAPACITY_PER_S = INSTANCES * CAP / (FIXED_MS + CAP * ROW_MS) * 1000


class Limiter(Protocol):
    """What the simulation asks of a limit."""

    @property
    def limit(self) -> int:
        """Requests that may be inside."""

    def answered(self, now_ms: float, latencies_ms: list[float], base_ms: float, inside: int) -> None:
        """A batch was answered."""


@dataclass(slots=True)
class Unlimited:
    """Only the queue's bound."""

    limit: int = 1 << 30

    def answered(self, now_ms: float, latencies_ms: list[float], base_ms: float, inside: int) -> None:
        """Nothing to learn."""


@dataclass(slots=True)
class Ours:
    """The limiter of the product."""

    inner: GradientLimiter = field(
        default_factory=lambda: GradientLimiter(least=4 * INSTANCES * CAP, most=QUEUE + INSTANCES * CAP)
    )

    @property
    def limit(self) -> int:
        """Requests that may be inside."""
        return self.inner.limit

    def answered(self, now_ms: float, latencies_ms: list[float], base_ms: float, inside: int) -> None:
        """A batch was answered."""
        seen, count = int(sum(latencies_ms) * 1e6), len(latencies_ms)
        self.inner.observe(int(now_ms * 1e6), requests=count, seen_ns=seen, base_ns=int(base_ms * 1e6), inside=inside)


@dataclass(slots=True)
class Windowed:
    """An algorithm that looks once a 100 ms at the average latency; `next_limit(limit, seen, inside)` decides."""

    next_limit: Callable[[float, float, int], float]
    size: float = QUEUE + INSTANCES * CAP
    most: float = QUEUE + INSTANCES * CAP
    least: float = 20.0
    begun_ms: float = 0.0
    seen: list[float] = field(default_factory=list)
    inside: int = 0

    @property
    def limit(self) -> int:
        """Requests that may be inside."""
        return int(self.size)

    def answered(self, now_ms: float, latencies_ms: list[float], base_ms: float, inside: int) -> None:  # noqa: ARG002
        """A batch was answered."""
        self.seen += latencies_ms
        self.inside = max(self.inside, inside)
        if now_ms - self.begun_ms >= 100 and len(self.seen) >= 8:
            average = sum(self.seen) / len(self.seen)
            self.size = max(self.least, min(self.most, self.next_limit(self.size, average, self.inside)))
            self.begun_ms, self.seen, self.inside = now_ms, [], 0


def aimd() -> Windowed:
    """Additive increase, multiplicative decrease, by a fixed target."""

    def decide(limit: float, seen: float, inside: int) -> float:
        if seen > 250:
            return limit * 0.9
        return limit + 1 if inside * 2 >= limit else limit

    return Windowed(decide)


def vegas() -> Windowed:
    """TCP Vegas: the queue is limit * (1 - least / seen), to be kept between 3 and 6 times log10(limit)."""
    least = math.inf

    def decide(limit: float, seen: float, inside: int) -> float:
        nonlocal least
        least = min(least, seen)
        if inside < limit / 2:
            return limit
        queue, step = limit * (1 - least / seen), max(1.0, math.log10(limit))
        if queue <= step:
            return limit + 6 * step
        if queue < 3 * step:
            return limit + step
        return limit - step if queue > 6 * step else limit

    return Windowed(decide)


def gradient2() -> Windowed:
    """Long-term average by short-term one, over an exponential average of 600 windows; four more than that."""
    long = 0.0

    def decide(limit: float, seen: float, inside: int) -> float:
        nonlocal long
        long = seen if not long else long + (seen - long) * 2 / 601
        if long / seen > 2:
            long *= 0.95
        if inside < limit / 2:
            return limit
        gradient = max(0.5, min(1.0, 1.5 * long / seen))
        return limit * 0.8 + (limit * gradient + 4) * 0.2

    return Windowed(decide)


LIMITS: dict[str, Callable[[], Limiter]] = {
    "none": Unlimited,
    "AIMD": aimd,
    "Vegas": vegas,
    "Gradient2": gradient2,
    "gradient over the batch": Ours,
}


@dataclass(slots=True, kw_only=True)
class World:
    """One simulated server.

    `rate_per_s` is of an open loop, `callers` of a closed one; `slow` is what a batch's time is multiplied by.
    """

    limiter: Limiter
    rate_per_s: float = 0.0
    callers: int = 0
    slow: Callable[[float], float] = lambda _now: 1.0
    rate_until_ms: float = math.inf
    counted_from_ms: float = 0.0
    random: random.Random = field(default_factory=lambda: random.Random(7))  # noqa: S311
    events: list[tuple[float, int, str, Any]] = field(default_factory=list)
    waiting: deque[tuple[float, bool]] = field(default_factory=deque)
    running: int = 0
    free: int = INSTANCES
    latencies: list[float] = field(default_factory=list)
    refused: int = 0
    number: int = 0

    def at(self, when_ms: float, kind: str, what: Any = None) -> None:
        """Something happens later."""
        self.number += 1
        heapq.heappush(self.events, (when_ms, self.number, kind, what))

    def run(self, until_ms: float) -> None:
        """Let it happen."""
        for _ in range(self.callers):
            self.at(self.random.random(), "arrives")
        if self.rate_per_s:
            self.at(0.0, "next")
        while self.events and self.events[0][0] < until_ms:
            now, _, kind, what = heapq.heappop(self.events)
            if kind == "next" and now < self.rate_until_ms:
                self.at(now + self.random.expovariate(self.rate_per_s / 1000), "next")
            if kind == "next" and now >= self.rate_until_ms:
                continue
            if kind == "done":
                self._done(now, *what)
            else:
                self._arrives(now, caller=kind == "arrives")
            if not self.events or self.events[0][0] > now:
                self._dispatch(now)

    def _arrives(self, now: float, *, caller: bool) -> None:
        inside = len(self.waiting) + self.running
        if self.free == 0 and (len(self.waiting) >= QUEUE or inside >= self.limiter.limit):
            self.refused += now >= self.counted_from_ms
            if caller:
                self.at(now + 50, "arrives")
        else:
            self.waiting.append((now, caller))

    def _dispatch(self, now: float) -> None:
        while self.waiting and self.free:
            share = -(-(len(self.waiting) + self.running) // INSTANCES)
            batch = [self.waiting.popleft() for _ in range(min(share, CAP, len(self.waiting)))]
            self.free -= 1
            self.running += len(batch)
            took = (FIXED_MS + ROW_MS * len(batch)) * self.slow(now) * max(0.5, self.random.gauss(1, 0.1))
            self.at(now + took, "done", (batch, took))

    def _done(self, now: float, batch: list[tuple[float, bool]], took: float) -> None:
        inside = len(self.waiting) + self.running
        self.free += 1
        self.running -= len(batch)
        latencies = [now - arrived for arrived, _ in batch]
        if now >= self.counted_from_ms:
            self.latencies += latencies
        self.limiter.answered(now, latencies, took, inside)
        for _, caller in batch:
            if caller:
                self.at(now + self.random.expovariate(1.0), "arrives")


def measure(limiter: Limiter, *, seconds: float, **world: Any) -> dict[str, float]:
    """One scenario with one limit."""
    it = World(limiter=limiter, **world)
    it.run(seconds * 1000)
    answered, latencies = len(it.latencies), sorted(it.latencies)
    return {
        "refused": it.refused / (answered + it.refused),
        "throughput": answered / (seconds - it.counted_from_ms / 1000) / CAPACITY_PER_S,
        "p50_ms": latencies[answered // 2],
        "p99_ms": latencies[answered * 99 // 100],
        "limit": it.limiter.limit,
    }


def scenarios(seconds: float) -> dict[str, dict[str, Any]]:
    """Their names and what differs."""
    third = seconds * 1000 / 3
    return {
        "64 callers": {"callers": 64},
        "three times too much": {"rate_per_s": 3 * CAPACITY_PER_S},
        "the same after ten times as long": {
            "seconds": 10 * seconds,
            "rate_per_s": 3 * CAPACITY_PER_S,
            "counted_from_ms": 9000 * seconds,
        },
        "64 callers after an overload": {
            "callers": 64,
            "rate_per_s": 3 * CAPACITY_PER_S,
            "rate_until_ms": third,
            "counted_from_ms": 2 * third,
        },
        "slower by half": {
            "rate_per_s": 0.9 * CAPACITY_PER_S,
            "slow": lambda now: 2.0 if third <= now < 2 * third else 1.0,
        },
    }


def main(arguments: list[str]) -> None:
    """Simulates, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks inference-limits", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="virtual time of a scenario")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/inference_limits.json"))
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    for name, world in scenarios(options.seconds).items():
        table = Table("limit", "refused", "throughput", "p50 ms", "p99 ms", "at the end", title=name)
        results[name] = {}
        for algorithm, make in LIMITS.items():
            found = results[name][algorithm] = measure(make(), **{"seconds": options.seconds, **world})
            end = "-" if found["limit"] >= 1 << 30 else f"{found['limit']:.0f}"
            table.add_row(
                algorithm,
                f"{found['refused']:.3f}",
                f"{found['throughput']:.2f}",
                f"{found['p50_ms']:.0f}",
                f"{found['p99_ms']:.0f}",
                end,
            )
        Console(width=100).print(table)
    write_results(options.output, {"capacity_per_s": CAPACITY_PER_S, "scenarios": results})
