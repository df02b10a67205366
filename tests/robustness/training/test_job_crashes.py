"""kill -9 of the service at every kind of step of submit, pause, resume, retry and delete: no acknowledged job is lost,
no training that was told as done is done again, and the same requests again bring every job to its end.

A kill keeps the page cache, so it shows atomicity; durability is shown by the order of system calls. All calls can be
gone through, one run a call: `MLMESH_TEST_SWEEP=5 pytest ...` takes every fifth of each kind, of writes every fiftieth.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.robustness.training import job_story as story

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")

# Call number N of a kind, counted per thread; how many of a kind an undisturbed story makes.
MADE = {"fdatasync": 56, "pwrite64": 900, "rename": 10, "mkdir": 8, "rmdir": 5, "unlinkat": 6}
KILLS = [
    *(("fdatasync", number) for number in (4, 17, 26, 44)),
    *(("pwrite64", number) for number in (150, 420)),
    ("rename", 6),
    ("rmdir", 2),
]
if step := int(os.environ.get("MLMESH_TEST_SWEEP", "0")):
    KILLS = [
        (call, number)
        for call, made in MADE.items()
        for number in range(1, made + 1, step * (10 if call == "pwrite64" else 1))
    ]


def _tell(data_dir: Path, repository: Path, *strace: str) -> tuple[int, list[list[Any]]]:
    """Run the story as a program; its exit code and what it acknowledged."""
    done = subprocess.run(
        [*strace, sys.executable, story.__file__ or "", str(data_dir)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        timeout=120,
        check=False,
    )
    # The last line may be cut: then it was not heard.
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines(keepends=True) if line.endswith(b"\n")]


def _inject(what: str) -> list[str]:
    # Without --seccomp-bpf: strace 6.1 then kills at the first call or never.
    syscall = what.partition(":")[0]
    return ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={syscall}", "-e", f"inject={what}"]


async def _check_and_retell(data_dir: Path, acknowledged: list[list[Any]]) -> None:
    async with story.serving(data_dir) as service:
        await story.check(service, data_dir, acknowledged)
        # The same requests again: done once, whatever had been done before.
        await story.tell(service, lambda *fact: acknowledged.append(list(fact)))
        await story.check(service, data_dir, acknowledged)
    assert acknowledged[-1] == ["end"]
    first = {fact[1]: fact[2] for fact in acknowledged if fact[0] == "accepted" and fact[1] != story.DELETED}
    for fact in acknowledged:
        if fact[0] == "accepted" and fact[1] != story.DELETED:
            assert fact[2] == first[fact[1]], "the same request gave two jobs"
    assert list((data_dir / "jobs").iterdir()) == [], "files of jobs that need none are left"


@needs_strace
@pytest.mark.parametrize(("syscall", "count"), KILLS, ids=str)
async def test_a_kill_at_any_step_loses_no_job_and_runs_none_twice(
    tmp_path: Path, repository: Path, syscall: str, count: int
) -> None:
    data_dir = tmp_path / "data"
    kill = _inject(f"{syscall}:signal=KILL:when={count}")
    code, acknowledged = await asyncio.to_thread(_tell, data_dir, repository, *kill)
    if not step:
        assert code == -9, f"not killed, so nothing was shown: {acknowledged}"
    await _check_and_retell(data_dir, acknowledged)


@needs_strace
@pytest.mark.parametrize("count", [30])
async def test_a_sync_that_fails_is_not_believed(tmp_path: Path, repository: Path, count: int) -> None:
    data_dir = tmp_path / "data"
    fail = _inject(f"fdatasync:error=EIO:when={count}")
    _, acknowledged = await asyncio.to_thread(_tell, data_dir, repository, *fail)
    await _check_and_retell(data_dir, acknowledged)


@needs_strace
def test_a_job_is_on_the_disk_before_it_is_acknowledged(tmp_path: Path, repository: Path) -> None:
    log = tmp_path / "log"
    strace = ["strace", "-f", "-y", "-qq", "-o", str(log), "-e", "trace=pwrite64,fdatasync,write"]
    code, acknowledged = _tell(tmp_path / "data", repository, *strace)
    assert (code, acknowledged[-1]) == (0, ["end"])
    calls = [line.split(maxsplit=1)[1] for line in log.read_text(errors="replace").splitlines()]
    said = [index for index, call in enumerate(calls) if call.startswith("write(1")]
    assert len(said) == len(acknowledged)
    wal = r"\(\d+<[^>]*training\.sqlite-wal>"
    for index, fact in zip(said, acknowledged, strict=True):
        if fact[0] in {"accepted", "paused", "resumed", "retried", "deleted"}:
            before = [number for number, call in enumerate(calls[:index]) if re.match(r"fdatasync" + wal, call)]
            written = [number for number, call in enumerate(calls[:index]) if re.match(r"pwrite64" + wal, call)]
            assert before, fact
            # All that was written by then but what another job's change is writing just now.
            assert sum(number > before[-1] for number in written) <= 12, fact
