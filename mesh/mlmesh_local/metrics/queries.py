"""What the last seconds or minutes were like: rates, shares, errors and latencies by labels of one's choice.

history = History(metrics, clock=time.monotonic)
history.tick()                                                   # every few seconds
rows = history.query(60.0, by=("destination_workload",), where={"reporter": "destination"})
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mlmesh_local.metrics.names import BUCKETS, HTTP_LABELS, PEER_LABELS
from mlmesh_local.metrics.registry import CountSeries, HttpSeries, MeshMetrics, Series

TICK_S = 2.0
TICKS_MAX = 300
HISTORY_S = TICK_S * TICKS_MAX

_Counts = tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class Row:
    """One group of label values over a window. Rates are a second, durations milliseconds, shares 0 to 1.

    ``statuses`` counts requests by gRPC status number ("0"), or by HTTP status ("http 503").
    """

    labels: Mapping[str, str]
    requests: int = 0
    errors: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    durations: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    messages_received: int = 0
    messages_sent: int = 0
    share: float = 0.0

    def quantile_ms(self, quantile: float) -> float:
        """A quantile of the durations, as Prometheus' histogram_quantile gives it; 0 without requests."""
        total = sum(self.durations)
        if not total:
            return 0.0
        rank, seen, low = quantile * total, 0, 0.0
        for bound, count in zip(BUCKETS, self.durations, strict=False):
            if count and seen + count >= rank:
                return low + (bound - low) * (rank - seen) / count
            seen, low = seen + count, float(bound)
        return float(BUCKETS[-1])


class History:
    """Differences of the counters over time, bounded. ``clock`` gives monotonic seconds."""

    def __init__(self, metrics: MeshMetrics, *, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._last: dict[Series, _Counts] = {}
        self._ticks: deque[tuple[float, dict[Series, _Counts]]] = deque(maxlen=TICKS_MAX)
        self._began_s = clock()

    def tick(self) -> None:
        """Close an interval."""
        self._ticks.append((self._clock(), self._since_last()))
        self._last = {series: _counts(series) for series in self._metrics.series}

    def _since_last(self) -> dict[Series, _Counts]:
        changed: dict[Series, _Counts] = {}
        for series in self._metrics.series:
            now, before = _counts(series), self._last.get(series)
            if now != before:
                changed[series] = _minus(now, before) if before else now
        return changed

    def query(self, window_s: float, *, by: Sequence[str], where: Mapping[str, str]) -> tuple[float, list[Row]]:
        """Seconds that are covered (less than asked for when the mesh is younger), and a row a group, busiest first."""
        now_s = self._clock()
        covered_s = min(window_s, HISTORY_S, max(now_s - self._began_s, 0.001))
        intervals = [changed for ended_s, changed in self._ticks if ended_s > now_s - covered_s]
        rows: dict[tuple[str, ...], Row] = {}
        for changed in [*intervals, self._since_last()]:
            for series, counts in changed.items():
                _count(rows, series, counts, by, where)
        total = sum(row.requests for row in rows.values())
        for row in rows.values():
            row.share = row.requests / total if total else 0.0
        return covered_s, sorted(
            rows.values(), key=lambda row: (-row.requests, -row.messages_sent, [*row.labels.values()])
        )


def _count(
    rows: dict[tuple[str, ...], Row], series: Series, counts: _Counts, by: Sequence[str], where: Mapping[str, str]
) -> None:
    http = isinstance(series, HttpSeries)
    if isinstance(series, CountSeries) and series.metrics[0].selector.startswith("TCP_"):
        return
    labels = dict(zip(HTTP_LABELS if http else PEER_LABELS, series.values, strict=True))
    # Messages have no status: by one, or of one, they cannot be told.
    if any(name not in labels for name in by) or any(labels.get(name) != value for name, value in where.items()):
        return
    group = tuple(labels.get(name, "") for name in by)
    row = rows.setdefault(group, Row(labels=dict(zip(by, group, strict=True))))
    if not http:
        row.messages_received += counts[0]
        row.messages_sent += counts[1]
        return
    requests = sum(counts)
    row.requests += requests
    row.durations = [mine + new for mine, new in zip(row.durations, counts, strict=True)]
    status, failed = _status(labels)
    row.statuses[status] = row.statuses.get(status, 0) + requests
    row.errors += requests if failed else 0


def _status(labels: Mapping[str, str]) -> tuple[str, bool]:
    if labels["request_protocol"] == "grpc":
        status = labels["grpc_response_status"]
        return status or "none", status != "0"
    code = labels["response_code"]
    return f"http {code}", code == "0" or code >= "500"


def _counts(series: Series) -> _Counts:
    return tuple(series.duration.counts if isinstance(series, HttpSeries) else series.counts)


def _minus(now: _Counts, before: _Counts) -> _Counts:
    return tuple(one - two for one, two in zip(now, before, strict=True))


def unknown_labels(names: Iterable[str]) -> list[str]:
    """Those of the names that are no label of a request."""
    return [name for name in names if name not in HTTP_LABELS]
