"""What a model version has done: counts and times for ModelStatistics, Prometheus and traces.

Only the event loop writes and reads, so plain numbers suffice. Prometheus children are looked up once a version.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from prometheus_client import Counter, Gauge, Histogram

from mlmesh_inference.scheduling.batcher import BatchReport
from mlmesh_inference.scheduling.queue import Pending
from mlmesh_runtime.telemetry import REGISTRY

_TIMES: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_LABELS: Final = ("model", "version")

QUEUE_SECONDS: Final = Histogram(
    "mlmesh_inference_queue_seconds",
    "Time that a request waited for an engine.",
    _LABELS,
    buckets=_TIMES,
    registry=REGISTRY,
)
ENGINE_SECONDS: Final = Histogram(
    "mlmesh_inference_engine_seconds",
    "Time of one batch in the engine.",
    _LABELS,
    buckets=_TIMES,
    registry=REGISTRY,
)
BATCH_ROWS: Final = Histogram(
    "mlmesh_inference_batch_rows",
    "Rows of one batch.",
    _LABELS,
    buckets=_ROWS,
    registry=REGISTRY,
)
REQUESTS: Final = Counter(
    "mlmesh_inference_requests",
    "Requests by outcome: answered, failed, refused (queue full), expired, cancelled.",
    (*_LABELS, "outcome"),
    registry=REGISTRY,
)
QUEUE_DEPTH: Final = Gauge(
    "mlmesh_inference_queue_depth", "Requests that wait for an engine.", _LABELS, registry=REGISTRY
)
_OUTCOMES: Final = ("answered", "failed", "refused", "expired", "cancelled")


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
        self._tracer = tracer
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
        labels = (model, str(version))
        self._queue_seconds = QUEUE_SECONDS.labels(*labels)
        self._engine_seconds = ENGINE_SECONDS.labels(*labels)
        self._batch_rows = BATCH_ROWS.labels(*labels)
        self._outcomes = {outcome: REQUESTS.labels(*labels, outcome) for outcome in _OUTCOMES}

    def watch_depth(self, depth: Callable[[], int]) -> None:
        """Let the queue's length be read when metrics are."""
        QUEUE_DEPTH.labels(self.model, str(self.version)).set_function(depth)

    def batch_done(self, report: BatchReport) -> None:
        """See scheduling.batcher.Observer."""
        items, failed = len(report.items), len(report.failed)
        engine_ns = report.engine_end_ns - report.engine_start_ns
        self.last_inference_s = self._wall()
        self._requests(report.items, report.failed, report.formed_ns, report.done_ns)
        self._engine_seconds.observe(engine_ns / 1e9)
        self._batch_rows.observe(report.rows)
        self._outcomes["answered"].inc(items - failed)
        self.execution_count += 1
        if failed:
            self._outcomes["failed"].inc(failed)
        self.inference_count += report.rows - sum(item.work.rows for item in report.failed)
        before_ns, after_ns = report.engine_start_ns - report.formed_ns, report.done_ns - report.engine_end_ns
        self.input.add(before_ns * items, items)
        self.infer.add(engine_ns * items, items)
        self.output.add(after_ns * items, items)
        size = self.batches.setdefault(report.rows, BatchDurations())
        size.input.add(before_ns)
        size.infer.add(engine_ns)
        size.output.add(after_ns)
        if self._tracer is not None and any(item.work.trace is not None for item in report.items):
            self._tracer.batch(report, model=self.model, version=self.version)

    def _requests(self, items: Sequence[Pending], failed: Sequence[Pending], formed_ns: int, done_ns: int) -> None:
        for item in items:
            waited = formed_ns - item.arrived_ns
            self.queue.add(waited)
            self._queue_seconds.observe(waited / 1e9)
            (self.fail if item in failed else self.success).add(done_ns - item.arrived_ns)

    def dropped(self, item: Pending, reason: str) -> None:  # noqa: ARG002  the port names the request too
        """See scheduling.batcher.Observer."""
        self.fail.add(0)
        self._outcomes[reason].inc()

    def close(self) -> None:
        """The version is gone: its metrics go too, so a registry of many versions does not grow without end."""
        labels = (self.model, str(self.version))
        for metric in (QUEUE_SECONDS, ENGINE_SECONDS, BATCH_ROWS, QUEUE_DEPTH):
            metric.remove(*labels)
        for outcome in _OUTCOMES:
            REQUESTS.remove(*labels, outcome)
