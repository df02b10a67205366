"""The spans of a batch, written after it ran: nothing is measured for a request that is not sampled."""

from __future__ import annotations

import time
from collections.abc import Callable

from opentelemetry import trace
from opentelemetry.context import Context

from mlmesh_inference.scheduling.batcher import BatchReport
from mlmesh_runtime.telemetry import current_context, record_span, sampled, tracing


def request_trace() -> Context | None:
    """What `Batcher.submit` takes as `trace`: the context of the RPC being handled, None when it is not sampled."""
    return current_context() if tracing() and sampled() else None


class SpanTracer:
    """Writes `queue`, `batch` and `engine` under the server span of every sampled request of a batch.

    A batch belongs to several requests, so each sampled one gets its own copy, linked to the spans of its mates.

    Args:
        wall_ns, clock: two clocks in nanoseconds; their difference turns the batcher's times into Unix times.
        admits: whether one more sampled request of a model is to be traced (TraceSetting).
    """

    def __init__(
        self,
        *,
        wall_ns: Callable[[], int] = time.time_ns,
        clock: Callable[[], int] = time.monotonic_ns,
        admits: Callable[[str], bool] = lambda _model: True,
    ) -> None:
        self._wall_ns = wall_ns
        self._clock = clock
        self._admits = admits

    def batch(self, report: BatchReport, *, model: str, version: int) -> None:
        """See statistics.Tracer."""
        shift = self._wall_ns() - self._clock()
        parents = [
            item.work.trace if isinstance(item.work.trace, Context) and self._admits(model) else None
            for item in report.items
        ]
        spans = [None if parent is None else trace.get_current_span(parent).get_span_context() for parent in parents]
        attributes = {
            "mlmesh.model": model,
            "mlmesh.model_version": version,
            "mlmesh.batch.rows": report.rows,
            "mlmesh.batch.requests": len(report.items),
        }
        for item, parent, own in zip(report.items, parents, spans, strict=True):
            if parent is None:
                continue
            links = [other for other in spans if other is not None and other is not own]
            record_span("queue", start_ns=item.arrived_ns + shift, end_ns=report.formed_ns + shift, parent=parent)
            record_span(
                "batch",
                start_ns=report.formed_ns + shift,
                end_ns=report.done_ns + shift,
                parent=parent,
                links=links,
                attributes=attributes,
            )
            record_span(
                "engine",
                start_ns=report.engine_start_ns + shift,
                end_ns=report.engine_end_ns + shift,
                parent=parent,
                attributes={"mlmesh.model": model, "mlmesh.model_version": version, "mlmesh.batch.rows": report.rows},
            )
