"""What a model takes of the host's memory, and giving it back to the system."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

_STATUS: Final = Path("/proc/self/status")


def resident_bytes() -> int:
    """Memory of this process that is nobody else's and no file's (RssAnon), 0 where the system does not say."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        function: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    return function


def release_unused() -> None:
    """Ask the allocator for pages that are free to go back to the system.

    glibc keeps them otherwise: after MiniLM is unloaded, 100 of the 120 MB that it took. Without glibc nothing happens.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@dataclass(slots=True, kw_only=True, eq=False)
class Measurement:
    """A growth that is being measured. `alone` turns false when another began meanwhile: they cannot be told apart."""

    before: int
    alone: bool = True


class GrowthMeter:
    """Growth of resident memory over spans that must not overlap to mean anything. Any thread may use it."""

    def __init__(self, resident: Callable[[], int] = resident_bytes) -> None:
        self._resident = resident
        self._open: set[Measurement] = set()
        self._lock = threading.Lock()

    def begin(self) -> Measurement:
        """Start a span. End it with `end` or `cancel`."""
        with self._lock:
            made = Measurement(before=self._resident(), alone=not self._open)
            for other in self._open:
                other.alone = False
            self._open.add(made)
        return made

    def end(self, measurement: Measurement) -> int | None:
        """Bytes that came since, None when the span overlapped another or the system does not say."""
        with self._lock:
            self._open.discard(measurement)
            now = self._resident()
        return max(0, now - measurement.before) if measurement.alone and now else None

    def cancel(self, measurement: Measurement) -> None:
        """Forget a span; harmless after `end`."""
        with self._lock:
            self._open.discard(measurement)
