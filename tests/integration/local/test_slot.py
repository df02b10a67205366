"""Keeping real processes running."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from mlmesh_local.backoff import Backoff
from mlmesh_local.changes import Changes
from mlmesh_local.process import Child, Command, tail
from mlmesh_local.slot import Slot


class Kept:
    """A slot that runs a shell command."""

    def __init__(self, folder: Path, script: str, session: Callable[[Child], Awaitable[None]] | None = None) -> None:
        self.changes = Changes()
        self.log = folder / "a.log"
        self.folder = folder
        self.slot = Slot(
            "a",
            command=lambda: Command(argv=["sh", "-c", script], environ=os.environ, folder=folder, log=self.log),
            session=session or self._nothing,
            changed=self.changes.notify,
            backoff=Backoff(first_s=0.01, longest_s=0.02),
        )

    async def _nothing(self, child: Child) -> None:
        pass

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            await self.changes.until(condition)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Slot]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.slot.run())
            yield self.slot
            await self.slot.stop(5)
            await task


def wait_gone(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(timeout=30)


async def test_what_ends_is_started_again(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "echo once >> starts; echo to the log; exit 3")
    async with kept.running() as slot:
        await kept.until(lambda: slot.failures >= 3)
        assert slot.last_exit == "exit code 3"
        assert slot.restarts >= 2
    assert len((tmp_path / "starts").read_text().split()) >= 3
    assert tail(kept.log).startswith("to the log")


async def test_kill_9_is_noticed_and_told(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "exec sleep infinity")
    async with kept.running() as slot:
        await kept.until(lambda: slot.pid > 0)
        first = slot.pid
        os.kill(first, signal.SIGKILL)
        await kept.until(lambda: slot.pid not in {0, first})
        assert slot.last_exit == "killed by SIGKILL"


async def test_stop_waits_for_an_orderly_end_and_takes_children_along(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "trap 'echo bye > bye; exit 0' TERM; sleep infinity & echo $! > child; wait")
    async with kept.running() as slot:
        await kept.until(lambda: slot.pid > 0)
        child = tmp_path / "child"
        async with asyncio.timeout(30):
            while not child.exists() or not child.read_text():  # noqa: ASYNC110  (another process)
                await asyncio.sleep(0.01)
        await slot.stop(5)
        assert slot.pid == 0
    assert (tmp_path / "bye").read_text() == "bye\n"
    wait_gone(int(child.read_text()))


async def test_what_does_not_end_is_killed_after_its_grace(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "trap '' TERM; echo up > up; while true; do sleep 1; done")
    async with kept.running() as slot:
        await kept.until(lambda: slot.pid > 0)
        async with asyncio.timeout(30):
            while not (tmp_path / "up").exists():  # noqa: ASYNC110  (another process)
                await asyncio.sleep(0.01)
        await slot.stop(0.1)
        assert slot.last_exit == "killed by SIGKILL"


async def test_a_program_that_is_missing_is_told_and_tried_again(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "")
    command = Command(argv=["no-such-program"], environ=os.environ, folder=tmp_path, log=kept.log)
    slot = kept.slot = Slot(
        "a", command=lambda: command, session=kept._nothing, changed=kept.changes.notify, backoff=Backoff(first_s=0.01)
    )
    async with kept.running():
        await kept.until(lambda: slot.failures >= 2)
    assert "cannot start no-such-program: No such file" in tail(kept.log)


async def test_a_broken_probe_does_not_end_what_it_watches(tmp_path: Path) -> None:
    async def broken(child: Child) -> None:
        raise RuntimeError("probe")

    kept = Kept(tmp_path, "exec sleep infinity", broken)
    async with kept.running() as slot:
        await kept.until(lambda: slot.pid > 0)
        first = slot.pid
        await asyncio.sleep(0.05)
        assert slot.pid == first


@pytest.mark.skipif(sys.platform != "linux", reason="the signal of a dead parent is Linux's")
def test_children_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = f"""
import asyncio, os
from pathlib import Path
from mlmesh_local.process import Command, start
async def main():
    folder = Path("{tmp_path}")
    child = await start(Command(argv=["sleep", "infinity"], environ=os.environ, folder=folder, log=folder / "log"))
    print(child.pid, flush=True)
    os.kill(os.getpid(), 9)
asyncio.run(main())
"""
    parent = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=20)
    assert parent.returncode == -signal.SIGKILL
    wait_gone(int(parent.stdout))
