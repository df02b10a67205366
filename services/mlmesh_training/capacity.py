"""What this machine, or the part of it that this process may use, can be occupied with (Linux)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from mlmesh_training.options import Resources

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_DEVICES = Path("/dev")


def present(
    environ: Mapping[str, str],
    *,
    affinity: int | None = None,
    cgroup: Path = _CGROUP,
    meminfo: Path = _MEMINFO,
    devices: Path = _DEVICES,
) -> Resources:
    """Processors, bytes of main memory, GPUs.

    Processors are those that the process may run on, or its control group's quota where that is less; memory is that
    of the machine, or its control group's limit where that is less; GPUs are those of CUDA_VISIBLE_DEVICES where it is
    set, else the device files of the driver. Control groups of version 2, as inside a container, are looked at.
    """
    cpus = float(affinity if affinity is not None else len(os.sched_getaffinity(0)))
    quota, period = _numbers(cgroup / "cpu.max", 2)
    if quota and period:
        cpus = min(cpus, quota / period)
    memory = _memory(meminfo)
    (limit,) = _numbers(cgroup / "memory.max", 1)
    return Resources(cpus=cpus, memory_bytes=min(memory, limit) if limit else memory, gpus=_gpus(environ, devices))


def _gpus(environ: Mapping[str, str], devices: Path) -> int:
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        chosen = [name.strip() for name in visible.split(",") if name.strip()]
        # As the driver reads it: the first one that is none ends the list.
        return next((place for place, name in enumerate(chosen) if name == "-1"), len(chosen))
    return sum(1 for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))


def _memory(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{meminfo} does not tell MemTotal")


def _numbers(path: Path, count: int) -> tuple[int, ...]:
    """The numbers of a control file; 0 where there is none or no limit."""
    try:
        words = path.read_text().split()
    except OSError:
        words = []
    found = [int(word) if word.isdigit() else 0 for word in words[:count]]
    return tuple(found + [0] * (count - len(found)))
