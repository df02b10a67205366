"""A training process and its pipes: started in a session of its own, ended with all that it started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlmesh_training.backends.lines import LineSplitter

PAUSE_SIGNAL = signal.SIGUSR1
"""Asks a training process to write a checkpoint and end."""
PAUSED_CODE = 75
"""The exit code of one that did (EX_TEMPFAIL of sysexits.h: not done, go on later)."""

_SEMAPHORES = Path("/dev/shm")  # noqa: S108 - where glibc keeps them (man 7 sem_overview)


@dataclass(slots=True, kw_only=True)
class TrainerProcess:
    """A process that reads one line, its task, and then reports through a pipe of its own until it ends.

    Attributes:
        reports: the lines that it reports.
        prints: what it writes to stdout and stderr.
    """

    process: asyncio.subprocess.Process
    reports: asyncio.StreamReader
    prints: asyncio.StreamReader
    transports: tuple[asyncio.ReadTransport, ...]
    task_fd: int

    @classmethod
    async def start(cls, command: Sequence[str], environ: Mapping[str, str]) -> TrainerProcess:
        """Start `command --report-fd N --parent PID`. Errors: OSError."""
        ours: list[int] = []
        theirs: list[int] = []
        try:
            for _ in range(2):
                reading, writing = os.pipe()
                ours.append(reading)
                theirs.append(writing)
            reading, writing = os.pipe()
            ours.append(writing)
            theirs.append(reading)
            report, printed, task = theirs
            process = await asyncio.create_subprocess_exec(
                *command,
                *("--report-fd", str(report), "--parent", str(os.getpid())),
                stdin=task,
                stdout=printed,
                stderr=printed,
                pass_fds=(report,),
                start_new_session=True,
                env=environ,
            )
        except BaseException:
            for fd in ours:
                os.close(fd)
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        (reports, first_pipe), (prints, second_pipe) = await _reader(ours[0]), await _reader(ours[1])
        return cls(
            process=process,
            reports=reports,
            prints=prints,
            transports=(first_pipe, second_pipe),
            task_fd=ours[2],
        )

    @property
    def alive(self) -> bool:
        """Whether it has not ended yet, as far as is known."""
        return self.process.returncode is None

    def tell(self, line: bytes) -> None:
        """Give it its task: one line, then the end of its input. The line must fit into a pipe (64 KiB)."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.task_fd, line)
        self._close_task()

    def ask(self, number: signal.Signals) -> None:
        """Send a signal to it alone."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and to all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    async def end(self) -> None:
        """Kill what still runs and wait for it, even while being cancelled: nothing of it may be left."""
        if self.alive:
            self.signal(signal.SIGKILL)
        waiting = asyncio.ensure_future(self.process.wait())
        cancelled = False
        while not waiting.done():
            try:
                await asyncio.shield(waiting)
            except asyncio.CancelledError:
                cancelled = True
        for transport in self.transports:
            transport.close()
        self._close_task()
        if cancelled:
            raise asyncio.CancelledError

    def _close_task(self) -> None:
        fd, self.task_fd = self.task_fd, -1
        if fd >= 0:
            os.close(fd)


async def _reader(fd: int) -> tuple[asyncio.StreamReader, asyncio.ReadTransport]:
    """Read a pipe; its transport owns the descriptor from here on."""
    reader = asyncio.StreamReader()
    pipe = os.fdopen(fd, "rb", buffering=0)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    return reader, transport


async def lines(reader: asyncio.StreamReader, *, line_bytes_max: int) -> AsyncIterator[bytes]:
    """Lines of a pipe until its end, each cut at a bound."""
    splitter = LineSplitter(line_bytes_max)
    while data := await reader.read(1 << 16):
        for line in splitter.feed(data):
            yield line
    for line in splitter.end():
        yield line


async def first(*events: asyncio.Event, timeout_s: float | None) -> None:
    """Wait until one of the events is set, or for so long; None: without an end."""
    async with asyncio.TaskGroup() as group:
        waiters = [group.create_task(event.wait()) for event in events]
        await asyncio.wait(
            waiters,
            timeout=timeout_s if timeout_s is None else max(0.0, timeout_s),
            return_when=asyncio.FIRST_COMPLETED,
        )
        for waiter in waiters:
            waiter.cancel()


def epitaph(returncode: int, last_words: str) -> str:
    """How a process ended, for a person."""
    if returncode < 0:
        with contextlib.suppress(ValueError):
            return f"its process was ended by {signal.Signals(-returncode).name}"
        return f"its process was ended by signal {-returncode}"
    return f"its process ended with exit code {returncode}{': ' if last_words else ''}{last_words}"


def semaphore_prefix(uid: str) -> str:
    """What the names of a job's semaphores begin with."""
    return f"/mlmesh-{uid}"


def sweep_semaphores(uid: str) -> None:
    """Remove the semaphores of a job whose processes were killed; the kernel keeps them until somebody does."""
    for path in _SEMAPHORES.glob(f"sem.{semaphore_prefix(uid)[1:]}-*"):
        path.unlink(missing_ok=True)
