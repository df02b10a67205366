"""How loaded an inference process is, from the numbers that statistics keep anyway."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from mlmesh_inference.catalog import ReadyModel
from mlmesh_runtime.orca import LoadReport

SPAN_S: Final = 0.5
"""Shares and rates are over at least this long."""
_NAMED_MAX: Final = 32
"""Versions that are named in a report: the busiest."""


class Models(Protocol):
    """What the meter asks of a catalog."""

    def ready_models(self) -> list[ReadyModel]:
        """Every version that answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the process has used and may use: seconds of CPU, CPUs, bytes of memory, bytes there are (0: unknown)."""

    cpu_s: float
    cpus: int
    memory_bytes: int
    memory_most_bytes: int


@dataclass(slots=True, kw_only=True)
class _Counted:
    """What a version had done when somebody looked last."""

    engine_ns: int
    ended: int
    failed: int


class LoadMeter:
    """Makes load reports. Utilisation is that of the most loaded version: share of its instances' time in the engine,
    and how full its queue is, together; so 0.5 is half busy, 1 busy without waiting, and up to 2 the fuller its queue.

    Args:
        models: what answers. usage: of the process. clock: seconds of a clock that never goes back.
    """

    def __init__(
        self,
        models: Models,
        *,
        usage: Callable[[], Usage] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = models
        self._usage = usage or process_usage
        self._clock = clock
        self._at = clock()
        self._used = self._usage()
        self._before: dict[tuple[str, int], _Counted] = {}
        self._busy: dict[tuple[str, int], float] = {}
        self._cpu = self._rate = self._errors = 0.0

    def report(self) -> LoadReport:
        """How loaded the process is now; queues as they are, shares and rates since the last look."""
        self._look()
        worst, fill_most, busy_most = 0.0, 0.0, 0.0
        versions: list[tuple[float, str, float, float]] = []
        for model in self._models.ready_models():
            runner = model.runner
            fill = min(1.0, runner.depth / runner.capacity) if runner.capacity else 0.0
            busy = self._busy.get((model.name, model.version), 0.0)
            worst, fill_most, busy_most = max(worst, busy + fill), max(fill_most, fill), max(busy_most, busy)
            versions.append((busy + fill, f"mlmesh.{model.name}/{model.version}", fill, busy))
        metrics: dict[str, float] = {}
        for _, name, fill, busy in sorted(versions, reverse=True)[:_NAMED_MAX]:
            metrics[f"{name}.queue_fill"] = fill
            metrics[f"{name}.engine_busy"] = busy
        used = self._used
        return LoadReport(
            utilization=worst,
            cpu=self._cpu,
            memory=used.memory_bytes / used.memory_most_bytes if used.memory_most_bytes else 0.0,
            rate_per_s=self._rate,
            errors_per_s=self._errors,
            utilizations={"mlmesh.queue_fill": fill_most, "mlmesh.engine_busy": busy_most},
            metrics=metrics,
        )

    def _look(self) -> None:
        now = self._clock()
        span = now - self._at
        if span < SPAN_S:
            return
        used = self._usage()
        ended = failed = 0
        counted: dict[tuple[str, int], _Counted] = {}
        self._busy = {}
        for model in self._models.ready_models():
            key, statistics = (model.name, model.version), model.statistics
            found = _Counted(
                engine_ns=statistics.engine_ns,
                ended=statistics.success.count + statistics.fail.count,
                failed=statistics.fail.count,
            )
            before = self._before.get(key) or _Counted(engine_ns=0, ended=0, failed=0)
            counted[key] = found
            # A batch counts when it ends, so one that took longer than the span would count for more than all of it.
            busy = (found.engine_ns - before.engine_ns) / 1e9 / span / max(model.concurrency, 1)
            self._busy[key] = min(1.0, max(0.0, busy))
            ended += found.ended - before.ended
            failed += found.failed - before.failed
        self._cpu = max(0.0, used.cpu_s - self._used.cpu_s) / span / max(used.cpus, 1)
        self._rate, self._errors = ended / span, failed / span
        self._at, self._used, self._before = now, used, counted


def process_usage(root: Path = Path("/")) -> Usage:
    """Of this process. Memory is what it may use by its control group, or what the machine has; 0 where nobody says."""
    times = os.times()
    return Usage(
        cpu_s=times.user + times.system,
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=_resident_bytes(root),
        memory_most_bytes=_memory_most_bytes(root),
    )


def _resident_bytes(root: Path) -> int:
    try:
        return int((root / "proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _memory_most_bytes(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return 0
    try:
        return min(machine, int((root / "sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no group, or "max"
        return machine
