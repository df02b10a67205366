"""The wheel: the one under test, or one built from a copy of the tree (a build writes stubs, so never in the tree)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
INSTALLED = os.environ.get("MLMESH_TEST_WHEEL") == "1"

_SOURCES = ("protos", "services", "mesh", "manifests", "pyproject.toml", "README.md", "LICENSE")


def uv() -> Path:
    """The uv that `make install` brings, or one on PATH; skips the test where there is none."""
    for candidate in (Path(sys.executable).parent / "uv", ROOT / ".venv" / "bin" / "uv"):
        if candidate.exists():
            return candidate
    found = shutil.which("uv")
    if found is None:
        pytest.skip("uv is not here: `make install` brings it")
    return Path(found)


def build(folder: Path) -> Path:
    """The wheel that the suite runs against, or a new one built under `folder`."""
    if INSTALLED:
        (wheel,) = (ROOT / "build" / "wheel").glob("*.whl")
        return wheel
    tree = folder / "tree"
    ignore = shutil.ignore_patterns("*_pb2*", "*.binpb", "__pycache__")
    for name in _SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, tree / name)
    run(uv(), "build", "--quiet", "--wheel", "--out-dir", folder / "wheel", tree)
    (wheel,) = (folder / "wheel").glob("*.whl")
    return wheel


def environment(folder: Path, *requirements: str) -> Path:
    """A new virtual environment with these requirements and nothing else; the path of its Python."""
    python = folder / "bin" / "python"
    run(uv(), "venv", "--quiet", "--python", sys.executable, folder)
    run(uv(), "pip", "install", "--quiet", "--python", python, *requirements)
    return python


def run(program: Path | str, *arguments: Path | str, cwd: Path | None = None, timeout_s: float = 150.0) -> str:
    """What the program printed, run without this process's Python environment. Fails the test when it fails."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "MLMESH_"))}
    done = subprocess.run(
        [str(program), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=cwd,
        env=environ,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        pytest.fail(f"{Path(program).name} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout
