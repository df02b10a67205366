"""How fast a model answers, measured with bounds on how long that may take. Pure: the model and the clock are given."""

from __future__ import annotations

import math
from collections.abc import Callable

from mlmesh_training.jobs import Latency

REQUESTS_MIN, REQUESTS_MAX = 3, 200
WARM_UPS = 2
SECONDS_MAX = 0.3
"""For one batch size; a model whose REQUESTS_MIN requests take longer gets the time that they take."""


def measure(answer: Callable[[], object], *, batch_size: int, clock: Callable[[], float]) -> Latency:
    """Time requests, one after another, after a warm-up.

    Args:
        answer: one request of this batch size.
        clock: seconds, monotonic.
    """
    for _ in range(WARM_UPS):
        answer()
    taken: list[float] = []
    began = clock()
    while len(taken) < REQUESTS_MIN or (len(taken) < REQUESTS_MAX and clock() - began < SECONDS_MAX):
        before = clock()
        answer()
        taken.append(clock() - before)
    taken.sort()
    return Latency(
        batch_size=batch_size,
        median_s=percentile(taken, 0.5),
        p95_s=percentile(taken, 0.95),
        requests=len(taken),
    )


def percentile(ordered: list[float], share: float) -> float:
    """The nearest-rank percentile of ordered values."""
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]
