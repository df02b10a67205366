"""What a model version has done: counts and times for ModelStatistics, Prometheus (`metrics`), load reports and traces.

Only the event loop writes, and plain numbers are all there is to write: a request costs a few additions, a batch a few
more. Readers (scrapes come on a thread of their own) see numbers that may be of two neighbouring moments.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final, Protocol

from mlmesh_inference import metrics
from mlmesh_inference.running import Answer
from mlmesh_inference.scheduling.batcher import BatchReport
from mlmesh_inference.scheduling.queue import Pending

OUTCOMES: Final = ("answered", "failed", "refused", "limited", "would_expire", "expired", "cancelled")
TENANTS_MAX: Final = 32
"""Tenants of a version that are told apart: those that came first. All others count as OTHERS."""
OTHERS: Final = "other"
RESPONSES_MAX: Final = 64
"""Answers to one request that are told apart; later ones count as the last of these."""

_TIMES_NS: Final = tuple(int(bound * 1e9) for bound in metrics.TIME_BOUNDS)


class Tracer(Protocol):
    """Writes the spans of a batch that holds sampled requests."""

    def batch(self, report: BatchReport, *, model: str, version: int) -> None:
        """Write the spans queue, batch and engine of every sampled request."""


@dataclass(slots=True)
class Duration:
    """A number of events and their time together."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """Count events that took `ns` nanoseconds together."""
        self.count += count
        self.ns += ns


@dataclass(slots=True)
class BatchDurations:
    """What batches of one size cost."""

    input: Duration = field(default_factory=Duration)
    infer: Duration = field(default_factory=Duration)
    output: Duration = field(default_factory=Duration)


@dataclass(slots=True)
class ResponseDurations:
    """What the n-th answer to a request of a decoupled model cost, and how it ended."""

    infer: Duration = field(default_factory=Duration)
    output: Duration = field(default_factory=Duration)
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    empty: Duration = field(default_factory=Duration)
    cancel: Duration = field(default_factory=Duration)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Memory that a version holds: of the "CPU" (the host) or of a "GPU" by number."""

    kind: str
    device: int = 0
    size_bytes: int


@dataclass(slots=True)
class LevelCounts:
    """What became of the requests of one priority level. `waits` counts them by `metrics.TIME_BOUNDS`."""

    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    waits: list[int] = field(default_factory=lambda: [0] * (len(_TIMES_NS) + 1))
    waited_ns: int = 0


@dataclass(slots=True)
class TenantCounts:
    """What one tenant got: rows answered, time its requests waited together, requests turned away."""

    rows: int = 0
    requests: int = 0
    waited_ns: int = 0
    refused: int = 0


class Statistics:
    """Counts and times of one version since it was loaded; the batcher's observer.

    Args:
        model, version: names for the metrics.
        wall: the wall clock, seconds since 1970.
        tracer: writes spans; None writes none.
    """

    def __init__(
        self, model: str, version: int, *, wall: Callable[[], float] = time.time, tracer: Tracer | None = None
    ) -> None:
        self.model = model
        self.version = version
        self._wall = wall
        self.tracer = tracer
        self.last_inference_s = 0.0
        self.inference_count = 0
        self.execution_count = 0
        self.success = Duration()
        self.fail = Duration()
        self.queue = Duration()
        self.input = Duration()
        self.infer = Duration()
        self.output = Duration()
        self.batches: dict[int, BatchDurations] = {}
        self.responses: dict[int, ResponseDurations] = {}
        self.memory: tuple[MemoryUse, ...] = ()
        """What the version holds now; whoever loads it says so."""
        self.levels: dict[int, LevelCounts] = {}
        self.tenants: dict[str, TenantCounts] = {}
        self.engine_times = [0] * (len(_TIMES_NS) + 1)
        self.engine_ns = 0
        """Time in the engine, all batches together; what load reports call busy."""
        self.batch_rows = [0] * (len(metrics.ROW_BOUNDS) + 1)
        self.rows = 0
        self.depth: Callable[[], int] | None = None
        self.limit: Callable[[], int] | None = None
        self.sequences: Callable[[], tuple[int, int]] | None = None
        """Live sequences and the bytes of their states, of a stateful model."""
        metrics.show(self)

    def watch_depth(self, depth: Callable[[], int], limit: Callable[[], int] | None = None) -> None:
        """Let the queue's length be read when metrics are, and the number of requests that may be inside."""
        self.depth, self.limit = depth, limit

    @property
    def concurrency_limit(self) -> int:
        """Requests that may be inside now; 0 when nothing limits them."""
        return 0 if self.limit is None else self.limit()

    def batch_done(self, report: BatchReport) -> None:
        """See scheduling.batcher.Observer."""
        items, rows = report.items, report.rows
        count, failed = len(items), len(report.failed)
        engine_ns = report.engine_end_ns - report.engine_start_ns
        before_ns, after_ns = report.engine_start_ns - report.formed_ns, report.done_ns - report.engine_end_ns
        self.last_inference_s = self._wall()
        self._requests(items, report.formed_ns)
        self._outcomes(report)
        self.execution_count += 1
        self.rows += rows
        self.inference_count += rows - sum([item.work.rows for item in report.failed]) if failed else rows
        self.engine_times[bisect_left(_TIMES_NS, engine_ns)] += 1
        self.engine_ns += engine_ns
        self.batch_rows[bisect_left(metrics.ROW_BOUNDS, rows)] += 1
        self.input.add(before_ns * count, count)
        self.infer.add(engine_ns * count, count)
        self.output.add(after_ns * count, count)
        size = self.batches.get(rows)
        if size is None:
            size = self.batches[rows] = BatchDurations()
        size.input.add(before_ns)
        size.infer.add(engine_ns)
        size.output.add(after_ns)
        if self.tracer is not None:
            for item in items:
                if item.work.trace is not None:
                    self.tracer.batch(report, model=self.model, version=self.version)
                    break

    def _requests(self, items: Sequence[Pending], formed_ns: int) -> None:
        """Waits and shares. Mostly a batch is of one level and one tenant, so each is looked up when it changes."""
        level_number, tenant_name = -1, None
        level: LevelCounts | None = None
        tenant: TenantCounts | None = None
        together = 0
        for item in items:
            work = item.work
            if item.level != level_number or level is None:
                level_number = item.level
                level = self._level(level_number)
            if work.tenant != tenant_name or tenant is None:
                tenant_name = work.tenant
                tenant = self._tenant(tenant_name)
            waited = formed_ns - item.arrived_ns
            together += waited
            level.waits[bisect_left(_TIMES_NS, waited)] += 1
            level.waited_ns += waited
            tenant.rows += work.rows
            tenant.requests += 1
            tenant.waited_ns += waited
        self.queue.add(together, len(items))

    def _outcomes(self, report: BatchReport) -> None:
        if not report.failed:
            done_ns = report.done_ns * len(report.items) - sum([item.arrived_ns for item in report.items])
            self.success.add(done_ns, len(report.items))
            for item in report.items:
                self.levels[item.level].outcomes["answered"] += 1
            return
        failed = set(map(id, report.failed))
        for item in report.items:
            bad = id(item) in failed
            (self.fail if bad else self.success).add(report.done_ns - item.arrived_ns)
            self.levels[item.level].outcomes["failed" if bad else "answered"] += 1

    def dropped(self, item: Pending, reason: str) -> None:
        """See scheduling.batcher.Observer."""
        self.fail.add(0)
        self._level(item.level).outcomes[reason] += 1
        if reason not in {"expired", "cancelled"}:
            self._tenant(item.work.tenant).refused += 1

    def responded(self, index: int, outcome: str, *, infer_ns: int = 0, output_ns: int = 0) -> None:
        """A request of a decoupled model got its answer number `index`, counted from 0.

        Args:
            outcome: "success", "fail", "empty" (an answer without outputs) or "cancel".
            infer_ns: time since the answer before it. output_ns: time to bring it into the form that is sent.
        """
        place = min(index, RESPONSES_MAX - 1)
        found = self.responses.get(place)
        if found is None:
            found = self.responses[place] = ResponseDurations()
        found.infer.add(infer_ns)
        found.output.add(output_ns)
        getattr(found, outcome).add(infer_ns + output_ns)

    def _level(self, number: int) -> LevelCounts:
        found = self.levels.get(number)
        if found is None:
            found = self.levels[number] = LevelCounts()
        return found

    def _tenant(self, name: str) -> TenantCounts:
        found = self.tenants.get(name)
        if found is None:
            if len(self.tenants) >= TENANTS_MAX:
                name = OTHERS
                found = self.tenants.get(name)
            if found is None:
                found = self.tenants[name] = TenantCounts()
        return found

    def close(self) -> None:
        """The version is gone: its metrics go too, so a registry of many versions does not grow without end."""
        metrics.hide(self)


async def counted(
    answers: AsyncGenerator[Answer, None], statistics: Statistics, *, clock: Callable[[], int] = time.monotonic_ns
) -> AsyncGenerator[Answer, None]:
    """The same answers of a decoupled model, counted as they go. Closing it closes `answers`: cancelled then."""
    index, begun = 0, clock()
    ended = "cancel"
    try:
        async with aclosing(answers):
            async for answer in answers:
                ready = clock()
                yield answer
                taken = clock()
                outcome = "success" if answer.outputs else "empty"
                statistics.responded(index, outcome, infer_ns=ready - begun, output_ns=taken - ready)
                index, begun = index + 1, taken
        ended = ""
    except Exception:
        ended = "fail"
        raise
    finally:
        if ended:
            statistics.responded(index, ended, infer_ns=clock() - begun)
