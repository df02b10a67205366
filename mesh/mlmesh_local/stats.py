"""Observed traffic shares, from the counters of every Envoy that sends requests. Pure but for the parsing of JSON.

Envoy counts since its start; a sidecar that restarts begins at zero. Differences are added up here, so a window may
span restarts, and a sidecar that was polled before it ended loses nothing.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

HISTORY_S = 600.0
# Only what is read: clusters of the outbound direction and the gRPC filter's counters, reports that were dropped.
STATS_REQUEST = (
    "/stats?format=json&type=Counters&usedonly"
    "&filter=%5Ecluster%5C.outbound%5C%7C.*%5C.grpc%5C.%7C%5Eaccess_logs%5C..*%5C.logs_dropped%24"
)
_COUNTER = re.compile(r"^cluster\.outbound\|(\d+)\|([^|]*)\|(.+?)\.grpc\.(?:.*\.)?(total|success|failure)$")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Destination:
    """A subset of a service, at a service port; ``subset`` is empty where none is named."""

    host: str
    subset: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Requests, and those of them that ended with another gRPC status than OK."""

    requests: int = 0
    failures: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(requests=self.requests + other.requests, failures=self.failures + other.failures)

    def __sub__(self, other: Counts) -> Counts:
        return Counts(requests=self.requests - other.requests, failures=self.failures - other.failures)


Totals = Mapping[Destination, Counts]
_Key = TypeVar("_Key")


def parse_counters(body: bytes) -> dict[Destination, Counts]:
    """Counts by destination from Envoy's ``/stats?format=json``. Raises ValueError on anything else."""
    requests: dict[Destination, int] = {}
    successes: dict[Destination, int] = {}
    for item in json.loads(body).get("stats", ()):
        found = _COUNTER.match(item.get("name", ""))
        if not found:
            continue
        port, subset, host, kind = found.groups()
        destination = Destination(host=host, subset=subset, port=int(port))
        if kind == "total":
            requests[destination] = requests.get(destination, 0) + int(item["value"])
        elif kind == "success":
            successes[destination] = successes.get(destination, 0) + int(item["value"])
    return {
        # total counts at the end of a call, too; success is subtracted because failure appears with the first one.
        destination: Counts(requests=total, failures=max(0, total - successes.get(destination, 0)))
        for destination, total in requests.items()
    }


def parse_dropped(body: bytes) -> int:
    """Reports of requests that an Envoy dropped because it could not send them fast enough."""
    found = json.loads(body).get("stats", ())
    return sum(int(item["value"]) for item in found if item.get("name", "").endswith(".logs_dropped"))


@dataclass(slots=True)
class Window(Generic[_Key]):
    """Counts by key over the last minutes. Times are seconds of one monotonic clock."""

    history_s: float = HISTORY_S
    _totals: dict[_Key, Counts] = field(default_factory=dict)
    _samples: deque[tuple[float, dict[_Key, Counts]]] = field(default_factory=deque)

    def __contains__(self, key: _Key) -> bool:
        return key in self._totals

    def __len__(self) -> int:
        return len(self._totals)

    def add(self, key: _Key, counts: Counts) -> None:
        """Count more of a key."""
        self._totals[key] = self._totals.get(key, Counts()) + counts

    def begin(self, now_s: float) -> None:
        """Forget all that was counted."""
        self._totals = {}
        self._samples = deque([(now_s, {})])

    def sample(self, now_s: float) -> None:
        """Remember the totals at a time; call it every second or so."""
        self._samples.append((now_s, dict(self._totals)))
        while len(self._samples) > 2 and self._samples[1][0] <= now_s - self.history_s:
            self._samples.popleft()

    def observed(self, now_s: float, window_s: float) -> dict[_Key, Counts]:
        """Counts of the window that ends now. A window longer than the history gives all of it."""
        start: Mapping[_Key, Counts] = {}
        for time_s, totals in self._samples:
            if time_s > now_s - window_s:
                break
            start = totals
        differences = {key: total - start.get(key, Counts()) for key, total in self._totals.items()}
        return {key: counts for key, counts in differences.items() if counts.requests > 0}


@dataclass(slots=True)
class Traffic:
    """Counts of all sidecars over time. Times are seconds of one monotonic clock."""

    history_s: float = HISTORY_S
    _last: dict[str, dict[Destination, Counts]] = field(default_factory=dict)
    _window: Window[Destination] = field(init=False)

    def __post_init__(self) -> None:
        self._window = Window(history_s=self.history_s)

    def record(self, source: str, counters: Totals) -> None:
        """Take the counters of one sidecar. A counter that went back means that it restarted."""
        before = self._last.get(source, {})
        restarted = any(counters.get(key, Counts()).requests < old.requests for key, old in before.items())
        for destination, now in counters.items():
            old = Counts() if restarted else before.get(destination, Counts())
            self._window.add(destination, now - old)
        self._last[source] = dict(counters)

    def restarted(self, source: str) -> None:
        """A sidecar ended: its counters begin at zero, also when they will be higher at the next look."""
        self._last.pop(source, None)

    def sample(self, now_s: float) -> None:
        """Remember the totals at a time; call it once after every round of ``record``."""
        self._window.sample(now_s)

    def begin(self, now_s: float) -> None:
        """Forget what was counted so far; counters go on from what they were when last recorded."""
        self._window.begin(now_s)

    def observed(self, now_s: float, window_s: float) -> dict[Destination, Counts]:
        """Counts of the window that ends now. A window longer than the history gives all of it."""
        return self._window.observed(now_s, window_s)


def shares(counts: Totals, host: str, port: int | None = None) -> dict[str, float]:
    """Share of each subset among a host's requests, 0 to 1; empty without requests."""
    mine = {key: value.requests for key, value in counts.items() if key.host == host and port in (None, key.port)}
    total = sum(mine.values())
    result: dict[str, float] = {}
    for key, requests in mine.items():
        result[key.subset] = result.get(key.subset, 0.0) + requests / total
    return result
