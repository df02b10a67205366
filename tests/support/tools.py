"""Programs that `make tools` builds. A test that needs one skips, visibly, where it is missing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BUILT = ROOT / ".tools" / "bin"


def find(name: str) -> Path | None:
    """Path of the program in .tools/bin or on PATH, None where it is in neither."""
    built = BUILT / name
    if built.exists():
        return built
    found = shutil.which(name)
    return Path(found) if found else None


def require(name: str) -> Path:
    """Path of the program; skips the test where it is missing."""
    found = find(name)
    if found is None:
        pytest.skip(f"{name} is not here: `make tools` builds it")
    return found


def run(
    name: str, *arguments: str | Path, timeout_s: float = 60.0, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run the program to its end in the repository's root, output as text; skips the test where it is missing."""
    return subprocess.run(
        [str(require(name)), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )
