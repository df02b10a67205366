"""How fast an engine is, and whether a request can be answered in time.

A request whose end can be foreseen to be late is refused before it costs anything, as Clockwork does (A. Gujarati et
al., "Serving DNNs like Clockwork", OSDI 2020). What is foreseen: the batches ahead of it take their turns on the
instances, each as long as full batches took lately; then its own batch.

Times are averaged, and their uncertainty added, as TCP does for its timer (V. Jacobson, SIGCOMM 1988; RFC 6298):
smoothed mean and smoothed mean deviation with gains 1/8 and 1/4, and four deviations on top. So a request is refused
rather too early than too late, which costs no throughput: it is refused only while others keep the engine busy. With a
free instance and nothing waiting nobody is refused, whatever the estimate: that is how a wrong one is corrected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

_DEVIATIONS: Final = 4
_UNSEEN_DEVIATION: Final = 0.25
"""Deviation of a time known from warm-up only, as a share of it."""


class Pace:
    """Time of one batch, by its rows.

    Args:
        preferred: rows of a full batch.
        seconds: median time by rows as measured at warm-up; empty when nothing was.
    """

    def __init__(self, preferred: int, seconds: Mapping[int, float] | None = None) -> None:
        self._preferred = preferred
        self._means: dict[int, float] = {}
        self._deviations: dict[int, float] = {}
        for rows, time_s in (seconds or {}).items():
            bucket = rows.bit_length()
            self._means[bucket] = time_s * 1e9
            self._deviations[bucket] = time_s * 1e9 * _UNSEEN_DEVIATION
        self.full_ns = 0.0
        """Time of a full batch; 0 as long as nothing is known."""
        self.margin_ns = 0.0
        """What a foreseen time may be wrong by."""
        self._refresh()

    def observe(self, rows: int, took_ns: int) -> None:
        """A batch took so long, from being formed to being done."""
        bucket = rows.bit_length()
        mean = self._means.get(bucket)
        if mean is None:
            self._means[bucket], self._deviations[bucket] = float(took_ns), took_ns / 2
        else:
            error = took_ns - mean
            self._means[bucket] = mean + error / 8
            self._deviations[bucket] += (abs(error) - self._deviations[bucket]) / 4
        self._refresh()

    def batch_ns(self, rows: int) -> float:
        """Time of a batch of about this many rows; 0 when nothing is known."""
        bucket = rows.bit_length()
        known = self._means.get(bucket)
        if known is not None or not self._means:
            return known or 0.0
        larger = [other for other in self._means if other > bucket]
        if larger:
            # No smaller batch takes longer.
            return self._means[min(larger)]
        # Twice the rows take at most twice the time.
        most = max(self._means)
        return self._means[most] * float(1 << min(bucket - most, 16))

    def _refresh(self) -> None:
        bucket = self._preferred.bit_length()
        self.full_ns = self.batch_ns(self._preferred)
        deviation = self._deviations.get(bucket)
        self.margin_ns = _DEVIATIONS * (self.full_ns * _UNSEEN_DEVIATION if deviation is None else deviation)


def end_ns(
    pace: Pace, *, now_ns: int, rows_ahead: int, rows: int, full_rows: int, ends_ns: Sequence[float], instances: int
) -> float:
    """When a request that comes now would be answered, its uncertainty not counted.

    Args:
        rows_ahead: rows that run before it. rows: its own. full_rows: rows of a full batch.
        ends_ns: when the running batches are expected to end. instances: batches that run at once.
    """
    before = rows_ahead // full_rows
    free = sorted(max(end, now_ns) for end in ends_ns)
    slots = [float(now_ns)] * (instances - len(free)) + free
    turn, place = divmod(before, instances)
    own = pace.full_ns if rows_ahead else pace.batch_ns(rows)
    return slots[place] + turn * pace.full_ns + own
