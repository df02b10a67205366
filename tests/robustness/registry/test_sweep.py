"""kill -9 before every write, fsync, link and removal of upload, refusal, cancel, publish and collection."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.robustness.registry import sweep

SHARDS = 2
MEMORY = Path("/dev/shm")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory, where that is to be had: a kill loses nothing of what the kernel has, so no disk is waited for."""
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="mlmesh-sweep-", dir=MEMORY) as made:
        yield Path(made)


@pytest.mark.timeout(600)
def test_a_kill_before_any_call_loses_and_half_shows_nothing(folder: Path, repository: Path) -> None:
    path = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
    shards = []
    for shard in range(SHARDS):
        (folder / str(shard)).mkdir()
        command = [sys.executable, sweep.__file__, str(folder / str(shard)), str(shard + 1), str(SHARDS)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        shards.append(subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, text=True, **pipes))  # type: ignore[call-overload]
    try:
        ended = [process.communicate(timeout=580) for process in shards]
    finally:
        for process in shards:
            process.kill()
    points = [json.loads(line) for output, _ in ended for line in output.splitlines()]
    # Each shard went on until the story came to its end unkilled.
    assert [point["exit"] for point in points if not point["before"]] == [0] * SHARDS, ended
    assert all(point["exit"] == -9 for point in points if point["before"])
    assert [point for point in points if not point["whole"]] == [], ended
    before = [point["before"] for point in points]
    assert {kind for kind in before if kind} == {*sweep.CALLS, "begin", "committed"}
    assert len(points) > 100
