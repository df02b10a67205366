"""How fast an engine is, and whether a request can be answered in time.

A request whose end can be foreseen to be late is refused before it costs anything, as Clockwork does (A. Gujarati et
al., "Serving DNNs like Clockwork", OSDI 2020). What is foreseen: the batches ahead of it take their turns on the
instances, each as long as full batches took lately; then its own batch.

How far that can be trusted is measured as TCP does for its timer (V. Jacobson, SIGCOMM 1988; RFC 6298): times of
batches are smoothed with gain 1/8; so are the errors of what was foreseen, whose smoothed deviation (gain 1/4) counts
four times on top. That margin is never less than an eighth of a batch, nor more than one. A tenth of the caller's time
is left for what nobody sees here: the answer's way back, and the caller's own delays; two hundredths more after each
batch with somebody who was let in and not answered in time, up to half, and a thousandth less after each batch without.
So a request is refused rather too early than too late, which costs no throughput: it is refused only while others keep
the engine busy. With a free instance and nothing waiting nobody is refused, whatever was foreseen: that is how a wrong
estimate is corrected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

USABLE_MOST: Final = 0.9
"""Share of a caller's time that may be used here when all goes well."""
USABLE_LEAST: Final = 0.5
_DEVIATIONS: Final = 4
_MARGIN_LEAST: Final = 1 / 8
"""Of a full batch."""


class Pace:
    """Time of one batch, by its rows.

    Args:
        preferred: rows of a full batch.
        seconds: median time by rows as measured at warm-up; empty when nothing was.
    """

    def __init__(self, preferred: int, seconds: Mapping[int, float] | None = None) -> None:
        self._preferred = preferred
        self._means: dict[int, float] = {}
        for rows, time_s in (seconds or {}).items():
            self._means[rows.bit_length()] = time_s * 1e9
        self._error = self._deviation = 0.0
        self.full_ns = 0.0
        """Time of a full batch; 0 as long as nothing is known."""
        self.margin_ns = 0.0
        """What a foreseen time may be wrong by."""
        self._refresh()

    def observe(self, rows: int, took_ns: int, error_ns: float | None = None) -> None:
        """A batch was answered.

        Args:
            took_ns: from being formed to being answered.
            error_ns: by how much it came later than foreseen; None when nothing was foreseen.
        """
        bucket = rows.bit_length()
        mean = self._means.get(bucket)
        self._means[bucket] = float(took_ns) if mean is None else mean + (took_ns - mean) / 8
        if error_ns is None:
            # Else a margin so wide that nothing comes near it would never be corrected.
            self._error -= self._error / 16
            self._deviation -= self._deviation / 16
        else:
            off = max(-self.full_ns, min(self.full_ns, error_ns)) - self._error
            self._error += off / 8
            self._deviation += (abs(off) - self._deviation) / 4
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
        self.full_ns = self.batch_ns(self._preferred)
        margin = self._error + _DEVIATIONS * self._deviation
        self.margin_ns = max(self.full_ns * _MARGIN_LEAST, min(self.full_ns, margin))


def end_ns(
    pace: Pace, *, now_ns: int, rows_ahead: int, mates: int, full_rows: int, ends_ns: Sequence[float], instances: int
) -> float:
    """When a request that comes now would be answered, its uncertainty not counted.

    Args:
        rows_ahead: rows that run before it. mates: its own rows and those that may share its batch.
        full_rows: rows of a full batch.
        ends_ns: when the running batches are expected to end. instances: batches that run at once.
    """
    before = rows_ahead // full_rows
    free = sorted(max(end, now_ns) for end in ends_ns)
    slots = [float(now_ns)] * (instances - len(free)) + free
    turn, place = divmod(before, instances)
    return slots[place] + turn * pace.full_ns + pace.batch_ns(min(mates, full_rows))
