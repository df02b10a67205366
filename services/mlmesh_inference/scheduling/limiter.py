"""How many requests may be inside at once, so that waiting stays short also for callers who set no deadlines.

The gradient limit of Netflix's concurrency-limits (2018; class GradientLimit): once a window, with `base` the time that
a request takes without waiting and `seen` the time that requests took,

    gradient = min(1, max(1/2, TOLERANCE * base / seen))
    limit   := limit + SMOOTHING * (gradient * limit + sqrt(limit) - limit)

One thing is different: `base` is not guessed from the least or from the long-term average of what requests took, but
measured, as the time of their batch in the engine. In simulation (`benchmarks/inference_limits.py`) that is what
decides. Gradient2's average comes to take a lasting overload for normal, and its limit is back at the upper bound after
ten minutes. Vegas takes the filling of batches for a queue, and goes on refusing half of 64 harmless callers after an
overload has passed. AIMD does neither, but needs a target that somebody must know for every model. In balance requests
take about TOLERANCE times their batch.

The limit never falls below what keeps every instance busy with full batches several times over, and it does not fall
while requests take less than `HARMLESS_NS`: nobody is refused for a few milliseconds.
"""

from __future__ import annotations

import math
from typing import Final

TOLERANCE: Final = 5.0
"""Waiting that is taken for normal, in times of a batch."""
HARMLESS_NS: Final = 100_000_000
WINDOW_NS: Final = 100_000_000
_SMOOTHING: Final = 0.5
_REQUESTS_MIN: Final = 8


class GradientLimiter:
    """A limit for the requests inside of one model version.

    Args:
        least, most: bounds of the limit; it begins at the upper one.
    """

    def __init__(self, *, least: int, most: int) -> None:
        self._least, self._most = min(least, most), most
        self._limit = float(most)
        self.limit = most
        """Requests that may be inside now."""
        self._window_ns = 0
        self._requests = 0
        self._seen_ns = 0
        self._base_ns = 0
        self._inside = 0

    def observe(self, now_ns: int, *, requests: int, seen_ns: int, base_ns: int, inside: int) -> None:
        """A batch was answered.

        Args:
            requests: in the batch. seen_ns: their times from arrival to answer together.
            base_ns: time of the batch in the engine. inside: requests that were inside before it was answered.
        """
        self._requests += requests
        self._seen_ns += seen_ns
        self._base_ns += base_ns * requests
        self._inside = max(self._inside, inside)
        if now_ns - self._window_ns >= WINDOW_NS and self._requests >= _REQUESTS_MIN:
            self._update()
            self._window_ns, self._requests, self._seen_ns, self._base_ns, self._inside = now_ns, 0, 0, 0, 0

    def _update(self) -> None:
        limit = self._limit
        gradient = 1.0
        if self._seen_ns > HARMLESS_NS * self._requests:
            gradient = max(0.5, min(1.0, TOLERANCE * self._base_ns / self._seen_ns))
        if gradient == 1.0 and self._inside < limit / 2:
            return  # nobody asks for more
        limit += _SMOOTHING * (gradient * limit + math.sqrt(limit) - limit)
        self._limit = max(float(self._least), min(float(self._most), limit))
        self.limit = int(self._limit)
