"""What was found out about engines and models, kept on disk: a process that starts again does not measure again.

One file a verdict, named by a digest of all that it depends on: the model's bytes, the engines with their versions, the
processor, the batches. Nobody but this process writes there, and a file that cannot be read is no verdict. Everything
here blocks: call it on an executor.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

from mlmesh_inference.engines.selection import Trial

FORMAT: Final = 1
FILES_MAX: Final = 1000
"""Verdicts kept; the longest unused go first."""


@cache
def processor() -> str:
    """Model of the CPU, and how many of them this process may use."""
    name = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith("flags")), "")
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
        # Machines in a cloud call quite different processors by one name.
        name = f"{name} {hashlib.sha256(flags.encode()).hexdigest()[:12]}"
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()} {name} x {cpus}"


def verdict_key(facts: Mapping[str, Any]) -> str:
    """Digest of plain values that a verdict depends on, the processor and the format included."""
    text = json.dumps({"format": FORMAT, "processor": processor(), **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class VerdictStore:
    """Verdicts under one folder, made when the first is kept."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def get(self, key: str) -> tuple[Trial, ...] | None:
        """What was found, None when nothing was."""
        path = self._root / f"{key}.json"
        try:
            trials = tuple(Trial.from_json(each) for each in json.loads(path.read_text()))
            os.utime(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return trials or None

    def put(self, key: str, trials: tuple[Trial, ...]) -> None:
        """Keep a verdict: whole or not at all. Raises OSError."""
        self._root.mkdir(parents=True, exist_ok=True)
        path = self._root / f"{key}.json"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps([trial.to_json() for trial in trials]))
        temporary.replace(path)
        self._sweep()

    def _sweep(self) -> None:
        files = sorted(self._root.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for path in files[: max(0, len(files) - FILES_MAX)]:
            path.unlink(missing_ok=True)
