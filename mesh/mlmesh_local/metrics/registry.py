"""Counts what Envoys report, under Istio's labels, in bounded memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from mlmesh_local.metrics.calls import HttpCall, Peers, TcpReport
from mlmesh_local.metrics.directory import Directory
from mlmesh_local.metrics.labels import peer_labels, security_policy
from mlmesh_local.metrics.names import BUCKETS, STANDARD, Metric
from mlmesh_local.metrics.overrides import PLAIN, Plan, Plans, Tags

SERIES_MAX = 2_000
"""Most label sets; what would need another one is dropped and counted."""
STREAMS_MAX = 20_000
"""Most open streams and connections whose counts are followed while they run."""
PEERS_MAX = 20_000
STREAM_SILENT_S = 60.0
"""A stream that Envoy did not speak of for so long is over: it speaks every few seconds."""

_METRICS = {metric.name: metric for metric in STANDARD}
_HTTP = tuple(m for m in STANDARD if "response_code" in m.labels)
_MESSAGES = tuple(m for m in STANDARD if m.selector.startswith("GRPC_"))
_TCP = tuple(m for m in STANDARD if m.selector.startswith("TCP_"))


class Distribution:
    """A histogram: counts by bucket (the last is beyond all bounds), their sum."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.total = 0

    def add(self, value: int) -> None:
        """Count a value."""
        self.counts[bisect_left(BUCKETS, value)] += 1
        self.total += value

    def merge(self, other: Distribution) -> None:
        """Add another one."""
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


@dataclass(eq=False, slots=True)
class Peer:
    """Who called whom, and what Telemetry makes of its metrics. One object for equal values: a key by identity."""

    labels: tuple[str, ...]
    plan: Plan


class HttpSeries:
    """Requests of one label set."""

    __slots__ = ("duration", "peer", "received", "sent", "tags", "values")

    def __init__(self, peer: Peer, values: tuple[str, ...], tags: Tags) -> None:
        self.peer = peer
        self.values = (*peer.labels, *values)
        self.tags = tags
        self.duration = Distribution()
        self.received = Distribution()
        self.sent = Distribution()


class CountSeries:
    """Messages, or bytes and connections, of one label set: a number a metric."""

    __slots__ = ("counts", "metrics", "peer", "tags", "values")

    def __init__(self, peer: Peer, metrics: tuple[Metric, ...], values: tuple[str, ...], tags: Tags) -> None:
        self.peer = peer
        self.metrics = metrics
        self.values = (*peer.labels, *values)
        self.tags = tags
        self.counts = [0] * len(metrics)


Series = HttpSeries | CountSeries


@dataclass(slots=True)
class _Open:
    received: int
    sent: int
    seen_s: float


class MeshMetrics:
    """Counters since the mesh was started: a sidecar that restarts loses none. ``clock`` gives monotonic seconds."""

    def __init__(self, *, clock: Callable[[], float], series_max: int = SERIES_MAX) -> None:
        self._clock = clock
        self._series_max = series_max
        self._directory = Directory()
        self._plans = Plans()
        self._known: dict[Peers, Peer] = {}
        self._peers: dict[tuple[tuple[str, ...], Plan], Peer] = {}
        self._series: dict[tuple[object, ...], Series] = {}
        self._open: dict[tuple[object, ...], _Open] = {}
        self.entries = 0
        self.dropped: dict[str, int] = {"label_sets": 0, "unknown_proxy": 0, "envoy": 0}

    def describe(self, directory: Directory, plans: Plans | None = None) -> None:
        """What the world is like from now on. Counts so far keep their labels."""
        self._directory = directory
        self._plans = plans or Plans()
        self._known.clear()

    @property
    def series(self) -> Iterable[Series]:
        """All label sets, in the order in which they appeared."""
        return self._series.values()

    def knows(self, node_id: str) -> bool:
        """Whether there is a proxy of that name."""
        return node_id in self._directory.nodes

    def refused(self, entries: int) -> None:
        """Entries came from nobody who is known."""
        self.dropped["unknown_proxy"] += entries

    def lost(self, entries: int) -> None:
        """An Envoy dropped entries because it could not send them fast enough."""
        self.dropped["envoy"] += entries

    def http(self, call: HttpCall) -> None:
        """Count a request, or what an open one has sent so far."""
        self.entries += 1
        peer = self._peer(call.peers)
        if peer.plan.disabled:
            return
        if call.grpc:
            self._messages(call, peer)
        if not call.ended:
            return
        tags = peer.plan.evaluate(call) if peer.plan.expressions else ()
        protocol, status = ("grpc", call.grpc_status) if call.grpc else ("http", -1)
        policy = security_policy(call.peers)
        key = (peer, protocol, call.code, status, call.flags, policy, tags)
        series = self._series.get(key)
        if series is None:
            values = (protocol, str(call.code), str(status) if status >= 0 else "", call.flags, policy)
            series = self._add(key, HttpSeries(peer, values, tags))
        if isinstance(series, HttpSeries):
            series.duration.add(call.duration_ms)
            series.received.add(call.received_bytes)
            series.sent.add(call.sent_bytes)

    def tcp(self, report: TcpReport) -> None:
        """Count a connection's begin, bytes and end."""
        self.entries += 1
        peer = self._peer(report.peers)
        policy = security_policy(report.peers)
        flags = report.flags if report.ended else "-"
        key = (peer, "tcp", flags, policy)
        before = self._advance(report, report.received_bytes, report.sent_bytes)
        series = self._series.get(key)
        if series is None:
            series = self._add(key, CountSeries(peer, _TCP, ("tcp", flags, policy), ()))
        if not isinstance(series, CountSeries):
            return
        counts = series.counts
        counts[0] += report.sent_bytes - (before.sent if before else 0)
        counts[1] += report.received_bytes - (before.received if before else 0)
        counts[2] += before is None
        counts[3] += report.ended

    def _messages(self, call: HttpCall, peer: Peer) -> None:
        before = self._advance(call, call.received_messages, call.sent_messages)
        received = call.received_messages - (before.received if before else 0)
        sent = call.sent_messages - (before.sent if before else 0)
        if not received and not sent:
            return
        tags = peer.plan.evaluate(call) if peer.plan.expressions else ()
        key = (peer, "messages", tags)
        series = self._series.get(key)
        if series is None:
            series = self._add(key, CountSeries(peer, _MESSAGES, (), tags))
        if isinstance(series, CountSeries):
            series.counts[0] += received
            series.counts[1] += sent

    def _advance(self, report: HttpCall | TcpReport, received: int, sent: int) -> _Open | None:
        """What was counted of this stream before. Remembered while it is open."""
        key = (report.peers.node, report.peers.role, report.stream)
        if report.ended:
            return self._open.pop(key, None) if self._open else None
        now_s = self._clock()
        before = self._open.get(key)
        if before is None and len(self._open) >= STREAMS_MAX:
            self.sweep()
            if len(self._open) >= STREAMS_MAX:
                # Its end will be counted at its end.
                return _Open(received, sent, now_s)
        self._open[key] = _Open(received, sent, now_s)
        return before

    def sweep(self) -> None:
        """Forget streams of which Envoys no longer speak: their sidecar was killed."""
        limit_s = self._clock() - STREAM_SILENT_S
        self._open = {key: value for key, value in self._open.items() if value.seen_s >= limit_s}

    def _peer(self, peers: Peers) -> Peer:
        known = self._known.get(peers)
        if known is None:
            if len(self._known) >= PEERS_MAX:
                self._known.clear()
            if len(self._peers) >= PEERS_MAX:
                # Applications may call ever other hosts; what is counted stays one label set.
                counted = {series.peer for series in self._series.values()}
                self._peers = {key: peer for key, peer in self._peers.items() if peer in counted}
            plan = self._plans.of(peers.node, peers.role) or PLAIN
            labels = peer_labels(self._directory, peers)
            known = self._peers.setdefault((labels, plan), Peer(labels, plan))
            self._known[peers] = known
        return known

    def _add(self, key: tuple[object, ...], series: Series) -> Series | None:
        if len(self._series) >= self._series_max:
            self.dropped["label_sets"] += 1
            return None
        self._series[key] = series
        return series


@dataclass(frozen=True, slots=True)
class Sample:
    """A label set of one metric with what it counted."""

    metric: str
    labels: tuple[tuple[str, str], ...]
    value: int | Distribution


def samples(metrics: Iterable[Series]) -> Iterator[Sample]:
    """Every metric of every label set as Telemetry wants them; equal label sets are one."""
    merged: dict[tuple[str, tuple[tuple[str, str], ...]], int | Distribution] = {}
    for series in metrics:
        for metric, value in _values(series):
            labels = series.peer.plan.labels(metric, series.values, series.tags)
            if labels is None:
                continue
            key = (metric.name, labels)
            before = merged.get(key)
            if isinstance(value, Distribution):
                total = Distribution()
                if isinstance(before, Distribution):
                    total.merge(before)
                total.merge(value)
                merged[key] = total
            else:
                merged[key] = value + (before if isinstance(before, int) else 0)
    order = {metric.name: index for index, metric in enumerate(STANDARD)}
    for (name, labels), value in sorted(merged.items(), key=lambda item: (order[item[0][0]], item[0][1])):
        yield Sample(name, labels, value)


def _values(series: Series) -> Iterator[tuple[Metric, int | Distribution]]:
    if isinstance(series, CountSeries):
        yield from zip(series.metrics, series.counts, strict=True)
        return
    found: tuple[int | Distribution, ...] = (sum(series.duration.counts), series.duration, series.received, series.sent)
    yield from zip(_HTTP, found, strict=True)
