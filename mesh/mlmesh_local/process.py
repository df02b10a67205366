"""Child processes: they never outlive the supervisor, each is a process group, their output goes to a bounded file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

LOG_BYTES_MAX = 8 * 1024 * 1024
TAIL_BYTES = 16 * 1024
# Every child carries it, so that leftovers of a killed supervisor are found whatever their process tree looks like.
MARK = "MLMESH_STATE_DIR"
_BECOME = Path(__file__).with_name("_become.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What to run, where, and where its output goes (both streams, appended)."""

    argv: Sequence[str]
    environ: Mapping[str, str]
    folder: Path
    log: Path


class Child:
    """A running child. ``await child.wait()`` gives its exit code, negative for a signal."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid
        self.started = time.monotonic()

    async def wait(self) -> int:
        """Wait for the end; whatever the child started in its group is killed then."""
        code = await self._process.wait()
        self._signal_group(signal.SIGKILL)
        return code

    def terminate(self) -> None:
        """Ask it to end (SIGTERM to the leader; it ends its own children in its own order)."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """End the whole group now."""
        self._signal_group(signal.SIGKILL)

    async def stop(self, grace_s: float) -> int:
        """SIGTERM, then after ``grace_s`` SIGKILL. Gives the exit code. On cancellation the group is killed."""
        self.terminate()
        try:
            async with asyncio.timeout(grace_s):
                return await self.wait()
        except TimeoutError:
            self.kill()
            return await self.wait()
        except asyncio.CancelledError:
            self.kill()
            raise

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


async def start(command: Command) -> Child:
    """Start a child in a session of its own: Ctrl-C in a terminal reaches only the supervisor, which drains.

    Its log goes on where it was: `rotate_all` keeps it bounded.
    """
    command.log.parent.mkdir(parents=True, exist_ok=True)
    with command.log.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            str(_BECOME),
            str(os.getpid()),
            *command.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=command.folder,
            env=dict(command.environ),
            start_new_session=True,
        )
    return Child(process)


def rotate(log: Path, bytes_max: int = LOG_BYTES_MAX) -> bool:
    """Move a log's content to ``<log>.1`` when it is larger than ``bytes_max``; gives whether it did.

    Copied and truncated, because the writer keeps the file open (for append, so it goes on at the new end).
    """
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size <= bytes_max:
            return False
        with log.open("r+b") as source, log.with_name(log.name + ".1").open("wb") as target:
            # A writer that outruns the rotation loses the oldest part, not the disk.
            source.seek(max(0, source.seek(0, os.SEEK_END) - bytes_max))
            while part := source.read(1 << 20):
                target.write(part)
            source.truncate(0)
        return True
    return False


def rotate_all(folder: Path, bytes_max: int = LOG_BYTES_MAX) -> None:
    """Rotate the logs of a folder; one that cannot be is looked at again the next time."""
    for path in folder.glob("*.log"):
        # The supervisor's own log rotates itself.
        if path.name != "supervisor.log":
            with contextlib.suppress(OSError):
                rotate(path, bytes_max)


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log, for messages."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    return ""


def leftovers(state_dir: Path) -> list[psutil.Process]:
    """Processes of this user that belong to a mesh in ``state_dir`` and are not this process or its parents."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid not in own and process.environ().get(MARK) == str(state_dir):
                found.append(process)
    return found


def kill_leftovers(state_dir: Path, timeout_s: float = 5.0) -> int:
    """Kill what a supervisor that was killed left behind; gives how many there were."""
    found = leftovers(state_dir)
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(found, timeout=timeout_s)
    return len(found)
