"""Training in a process of its own on this machine, one an attempt.

The process gets a session of its own (so that all it starts can be ended with it), dies with the service (the trainer
asks the kernel for that), and holds a lock on the job's folder (so that two never work on one job). It reports JSON
lines through a pipe; what it prints becomes log lines. The folder keeps what outlives an attempt: checkpoints, and at
the end `result.json` with the files that it names.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlmesh_runtime.chunks import sha256_of
from mlmesh_runtime.executors import BoundedExecutor, run_blocking

from mlmesh_training import documents
from mlmesh_training.backends.base import (
    RESULT_FILE,
    TASK_FILE,
    Died,
    Finished,
    Outcome,
    Report,
    Stopped,
    TrainingTask,
    read_report,
)
from mlmesh_training.backends.lines import LineSplitter
from mlmesh_training.jobs import LOG_LINE_BYTES_MAX, LogLine, TrainedModel

REPORT_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalLimits:
    """Bounds of a local attempt."""

    stop_grace_s: float = 2.0
    """Between asking a process to end and ending it."""
    silence_s_max: float = 300.0
    """A process that reports and prints nothing for this long hangs, and is ended."""
    log_lines_max: int = 10_000
    """Log lines kept of an attempt; the rest is dropped, and a line says so."""
    threads: int = 0
    """Threads that torch may use; 0 lets the trainer take all processors it may run on."""


class LocalBackend:
    """Runs attempts as `python -m mlmesh_training.trainer`.

    Args:
        folder: one folder a job is made in it.
        executor: threads for the disk.
        environ: the environment that trainers get.
    """

    def __init__(
        self,
        folder: Path,
        *,
        executor: BoundedExecutor,
        environ: Mapping[str, str],
        limits: LocalLimits = LocalLimits(),
    ) -> None:
        self._folder = folder.resolve()
        self._executor = executor
        self._environ = dict(environ)
        self._limits = limits

    def folder(self, uid: str) -> Path:
        """The folder of one job."""
        return self._folder / uid

    async def run(
        self, task: TrainingTask, *, report: Callable[[Report], Awaitable[None]], stop: asyncio.Event
    ) -> Outcome:
        """Run one attempt; see `Backend.run`."""
        folder = self.folder(task.uid)
        try:
            await run_blocking(self._executor, _prepare, folder, task)
        except OSError as error:
            return Died(reason=f"cannot write the task: {error.strerror}")
        attempt = _Attempt(report=report, limits=self._limits)
        async with self._process(folder, attempt) as process:
            await attempt.follow(process, stop)
        if stop.is_set():
            return Stopped()
        if attempt.died is not None:
            return attempt.died
        if process.returncode != 0:
            return Died(reason=_epitaph(process.returncode or 0, attempt.tail))
        try:
            return Finished(model=await run_blocking(self._executor, read_result, folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            return Died(reason=f"training left no usable result: {error}")

    async def discard(self, uid: str) -> None:
        """Remove the job's folder."""
        await run_blocking(self._executor, shutil.rmtree, self.folder(uid), ignore_errors=True)

    async def kept(self) -> list[str]:
        """The jobs of which something is kept."""
        names = await run_blocking(self._executor, lambda: sorted(path.name for path in self._folder.glob("*/")))
        return list(names)

    @contextlib.asynccontextmanager
    async def _process(self, folder: Path, attempt: _Attempt) -> AsyncIterator[asyncio.subprocess.Process]:
        """A trainer process with its pipe connected; all of its session is gone at the end."""
        reading, writing = os.pipe()
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "mlmesh_training.trainer", "--folder", str(folder)),
                    *(
                        "--report-fd",
                        str(writing),
                        "--parent",
                        str(os.getpid()),
                        "--threads",
                        str(self._limits.threads),
                    ),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=(writing,),
                    start_new_session=True,
                    env=self._environ,
                )
            finally:
                os.close(writing)
            try:
                await attempt.connect(pipe)
                yield process
            finally:
                if process.returncode is None:
                    _signal_session(process.pid, signal.SIGKILL)
                await _reaped(process)
                attempt.disconnect()


@dataclass(slots=True, kw_only=True)
class _Attempt:
    """Follows one process: its reports, its prints, its end."""

    report: Callable[[Report], Awaitable[None]]
    limits: LocalLimits
    died: Died | None = None
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=5))
    _reports: asyncio.StreamReader = field(default_factory=asyncio.StreamReader)
    _transport: asyncio.ReadTransport | None = None
    _heard: float = 0.0

    async def connect(self, pipe: object) -> None:
        """Read reports from this end of the pipe."""
        loop = asyncio.get_running_loop()
        protocol = asyncio.StreamReaderProtocol(self._reports)
        self._transport, _ = await loop.connect_read_pipe(lambda: protocol, pipe)
        self._heard = loop.time()

    def disconnect(self) -> None:
        """Close the pipe."""
        if self._transport is not None:
            self._transport.close()

    async def follow(self, process: asyncio.subprocess.Process, stop: asyncio.Event) -> None:
        """Until the process has ended and everything it said is reported."""
        async with asyncio.TaskGroup() as group:
            ended = asyncio.Event()
            group.create_task(self._end(process, stop, ended))
            group.create_task(self._listen(process, ended))
            group.create_task(self._hear_reports())
            group.create_task(self._hear_prints(process))

    async def _listen(self, process: asyncio.subprocess.Process, ended: asyncio.Event) -> None:
        await process.wait()
        ended.set()
        # What it started must not keep the pipes open.
        _signal_session(process.pid, signal.SIGKILL)

    async def _end(self, process: asyncio.subprocess.Process, stop: asyncio.Event, ended: asyncio.Event) -> None:
        """End the process when it is asked to stop, or hangs."""
        loop = asyncio.get_running_loop()
        while not ended.is_set() and not stop.is_set():
            quiet_until = self._heard + self.limits.silence_s_max
            if loop.time() >= quiet_until:
                self.died = Died(reason=f"its process was silent for {self.limits.silence_s_max:g} s and was ended")
                _signal_session(process.pid, signal.SIGKILL)
                return
            await _first(ended, stop, timeout_s=quiet_until - loop.time())
        if not ended.is_set():
            _signal_session(process.pid, signal.SIGTERM)
            await _first(ended, timeout_s=self.limits.stop_grace_s)
            if not ended.is_set():
                _signal_session(process.pid, signal.SIGKILL)

    async def _hear_reports(self) -> None:
        async for line in self._lines(self._reports, REPORT_BYTES_MAX):
            try:
                report = read_report(line)
            except ValueError as error:
                await self.report(LogLine(severity="warning", message=f"unreadable report: {error}"))
                continue
            if isinstance(report, Died):
                self.died = report
            else:
                await self.report(report)

    async def _hear_prints(self, process: asyncio.subprocess.Process) -> None:
        count = 0
        assert process.stdout is not None  # noqa: S101 - asked for above
        async for line in self._lines(process.stdout, LOG_LINE_BYTES_MAX):
            text = line.decode("utf-8", "replace").rstrip()
            if not text:
                continue
            self.tail.append(text)
            count += 1
            if count < self.limits.log_lines_max:
                await self.report(LogLine(severity="info", message=text))
            elif count == self.limits.log_lines_max:
                await self.report(LogLine(severity="warning", message="too many log lines; the rest is dropped"))

    async def _lines(self, reader: asyncio.StreamReader, line_bytes_max: int) -> AsyncIterator[bytes]:
        splitter = LineSplitter(line_bytes_max)
        while data := await reader.read(1 << 16):
            self._heard = asyncio.get_running_loop().time()
            for line in splitter.feed(data):
                yield line
        for line in splitter.end():
            yield line


def read_result(folder: Path) -> TrainedModel:
    """What a finished training left, each file verified against its digest.

    Errors: OSError, ValueError, KeyError, TypeError when it is not whole.
    """
    model = documents.read_model(json.loads((folder / RESULT_FILE).read_bytes()))
    for file in model.files:
        found = sha256_of(folder / file.path)
        if found != (file.sha256, file.size_bytes):
            raise ValueError(f"{file.path} is not what was exported ({found[1]} bytes, expected {file.size_bytes})")
    return model


def _prepare(folder: Path, task: TrainingTask) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "recipe": task.recipe,
        "dataset": task.dataset,
        "hyperparameters": dict(task.hyperparameters),
        "seed": task.seed,
    }
    (folder / TASK_FILE).write_text(documents.dumps(document))


def _epitaph(returncode: int, tail: deque[str]) -> str:
    if returncode < 0:
        with contextlib.suppress(ValueError):
            return f"its process was ended by {signal.Signals(-returncode).name}"
        return f"its process was ended by signal {-returncode}"
    said = f": {tail[-1]}" if tail else ""
    return f"its process ended with exit code {returncode}{said}"


def _signal_session(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


async def _reaped(process: asyncio.subprocess.Process) -> None:
    """Wait for a killed process, even while being cancelled: it ends at once, and nothing of it may be left."""
    waiting = asyncio.ensure_future(process.wait())
    cancelled = False
    while not waiting.done():
        try:
            await asyncio.shield(waiting)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


async def _first(*events: asyncio.Event, timeout_s: float) -> None:
    """Wait until one of the events is set, or for so long."""
    async with asyncio.TaskGroup() as group:
        waiters = [group.create_task(event.wait()) for event in events]
        await asyncio.wait(waiters, timeout=max(0.0, timeout_s), return_when=asyncio.FIRST_COMPLETED)
        for waiter in waiters:
            waiter.cancel()
