"""The Prometheus metrics of model versions, made when somebody scrapes.

Nothing is counted here: `statistics` keeps the numbers, as plain ones, and this shows them. That keeps locks, label
look-ups and one call a request off the hot path.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mlmesh_runtime.telemetry import REGISTRY

if TYPE_CHECKING:
    from mlmesh_inference.statistics import Statistics

TIME_BOUNDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Upper bounds of times in seconds."""
ROW_BOUNDS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Upper bounds of a batch's rows."""

_LABELS: Final = ("model", "version")


class _Versions(Collector):
    """Shows every version that is there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Whoever forgets to hide its numbers must not keep them for ever.
        self._shown: weakref.WeakValueDictionary[int, Statistics] = weakref.WeakValueDictionary()

    def add(self, statistics: Statistics) -> None:
        with self._lock:
            self._shown[id(statistics)] = statistics

    def remove(self, statistics: Statistics) -> None:
        with self._lock:
            self._shown.pop(id(statistics), None)

    def describe(self) -> Iterator[Metric]:
        """Names and labels, without numbers: a registry refuses the same name twice."""
        return iter(_families())

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        with self._lock:
            # The latest of a version that was loaded anew while the one before it still drains.
            shown = {(one.model, one.version): one for one in self._shown.values()}
        families = _families()
        waits, engine, rows, requests, depth, limit, busy, tenant_rows, tenant_waits, tenant_refused, memory = families[
            :11
        ]
        sequences, states = families[11:]
        for one in shown.values():
            labels = (one.model, str(one.version))
            for number, level in sorted(one.levels.copy().items()):
                of_level = (*labels, str(number))
                waits.add_metric(of_level, _buckets(TIME_BOUNDS, level.waits), level.waited_ns / 1e9)
                for outcome, count in level.outcomes.copy().items():
                    requests.add_metric((*of_level, outcome), count)
            engine.add_metric(labels, _buckets(TIME_BOUNDS, one.engine_times), one.engine_ns / 1e9)
            rows.add_metric(labels, _buckets(ROW_BOUNDS, one.batch_rows), one.rows)
            busy.add_metric(labels, one.engine_ns / 1e9)
            if one.depth is not None:
                depth.add_metric(labels, one.depth())
            limit.add_metric(labels, one.concurrency_limit)
            for name, tenant in one.tenants.copy().items():
                of_tenant = (*labels, name)
                tenant_rows.add_metric(of_tenant, tenant.rows)
                tenant_waits.add_metric(of_tenant, tenant.waited_ns / 1e9)
                tenant_refused.add_metric(of_tenant, tenant.refused)
            for use in one.memory:
                memory.add_metric((*labels, use.kind, str(use.device)), use.size_bytes)
            if one.sequences is not None:
                live, state_bytes = one.sequences()
                sequences.add_metric(labels, live)
                states.add_metric(labels, state_bytes)
        yield from families


def _families() -> tuple[
    HistogramMetricFamily,
    HistogramMetricFamily,
    HistogramMetricFamily,
    CounterMetricFamily,
    GaugeMetricFamily,
    GaugeMetricFamily,
    CounterMetricFamily,
    CounterMetricFamily,
    CounterMetricFamily,
    CounterMetricFamily,
    GaugeMetricFamily,
    GaugeMetricFamily,
    GaugeMetricFamily,
]:
    name = "mlmesh_inference_"
    tenant = (*_LABELS, "tenant")
    return (
        HistogramMetricFamily(
            f"{name}queue_seconds", "Time that a request waited for an engine.", labels=(*_LABELS, "priority")
        ),
        HistogramMetricFamily(f"{name}engine_seconds", "Time of one batch in the engine.", labels=_LABELS),
        HistogramMetricFamily(f"{name}batch_rows", "Rows of one batch.", labels=_LABELS),
        CounterMetricFamily(
            f"{name}requests",
            "Requests by outcome: answered, failed, refused (queue full), limited (concurrency limit), would_expire "
            "(could not have been in time), expired, cancelled.",
            labels=(*_LABELS, "priority", "outcome"),
        ),
        GaugeMetricFamily(f"{name}queue_depth", "Requests that wait for an engine.", labels=_LABELS),
        GaugeMetricFamily(f"{name}concurrency_limit", "Requests that may be inside; 0: no limit.", labels=_LABELS),
        CounterMetricFamily(f"{name}busy_seconds", "Time of all batches in the engine together.", labels=_LABELS),
        CounterMetricFamily(f"{name}tenant_rows", "Rows run for a tenant (an identity, or other).", labels=tenant),
        CounterMetricFamily(f"{name}tenant_queue_seconds", "Time that a tenant's requests waited.", labels=tenant),
        CounterMetricFamily(f"{name}tenant_refused", "Requests of a tenant that were refused.", labels=tenant),
        GaugeMetricFamily(f"{name}memory_bytes", "Memory of a version.", labels=(*_LABELS, "kind", "device")),
        GaugeMetricFamily(f"{name}sequences", "Live sequences of a stateful model.", labels=_LABELS),
        GaugeMetricFamily(f"{name}sequence_state_bytes", "Memory of the states of live sequences.", labels=_LABELS),
    )


def _buckets(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Cumulative counts by upper bound, as the exposition format has them."""
    total, found = 0, []
    for bound, count in zip((*map(float, bounds), float("inf")), tuple(counts), strict=True):
        total += count
        found.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
    return found


_VERSIONS: Final = _Versions()
REGISTRY.register(_VERSIONS)


def show(statistics: Statistics) -> None:
    """Show a version's numbers from now on."""
    _VERSIONS.add(statistics)


def hide(statistics: Statistics) -> None:
    """Show them no more."""
    _VERSIONS.remove(statistics)
