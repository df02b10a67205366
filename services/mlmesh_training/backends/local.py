"""Training in a process of its own on this machine, one an attempt.

The process gets a session of its own (so that all it starts can be ended with it), dies with the service (the trainer
asks the kernel for that), and holds a lock on the job's folder (so that two never work on one job). It reports JSON
lines through a pipe; what it prints becomes log lines. The folder keeps what outlives an attempt: checkpoints, and at
the end `result.json` with the files that it names.

Loading torch takes longer than many a small training. So one process may be kept warm: it has loaded its libraries and
waits for a task. It is still one process an attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from mlmesh_runtime.executors import BoundedExecutor, run_blocking
from mlmesh_training.backends.base import Died, Finished, Outcome, Paused, Report, Stopped, TrainingTask
from mlmesh_training.backends.process import (
    PAUSE_SIGNAL,
    PAUSED_CODE,
    TrainerProcess,
    epitaph,
    first,
    lines,
    sweep_semaphores,
)
from mlmesh_training.backends.reports import read_report
from mlmesh_training.backends.results import prepare, read_result
from mlmesh_training.jobs import LOG_LINE_BYTES_MAX, JobPhase, LogLine

REPORT_BYTES_MAX = 1 << 20

_GONE = ".gone-"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalLimits:
    """Bounds of a local attempt."""

    stop_grace_s: float = 2.0
    """Between asking a process to end and ending it."""
    silence_s_max: float = 300.0
    """A process that reports and prints nothing for this long hangs, and is ended."""
    log_lines_max: int = 10_000
    """Log lines kept of an attempt; the rest is dropped, and a line says so."""
    collective_s: float = 120.0
    """Processes of one job wait this long for each other; then one of them hangs, and all start again."""
    threads: int = 0
    """Threads that torch may use; 0 lets the trainer take all processors it may run on."""
    warm: bool = False
    """Keep one process ready, with its libraries loaded."""


class LocalBackend:
    """Runs attempts as `python -m mlmesh_training.trainer`. An async context manager: at its end no process is left.

    Args:
        folder: one folder a job is made in it.
        executor: threads for the disk.
        environ: the environment that trainers get.
        command: how a trainer is started; arguments are added.
    """

    def __init__(
        self,
        folder: Path,
        *,
        executor: BoundedExecutor,
        environ: Mapping[str, str],
        limits: LocalLimits = LocalLimits(),
        command: Sequence[str] = (sys.executable, "-m", "mlmesh_training.trainer"),
    ) -> None:
        self._folder = folder.resolve()
        self._executor = executor
        self._environ = dict(environ)
        self._limits = limits
        self._command = tuple(command)
        self._warm: TrainerProcess | None = None

    async def __aenter__(self) -> LocalBackend:
        await self._warm_up()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        warm, self._warm = self._warm, None
        if warm is not None:
            await warm.end()

    def folder(self, uid: str) -> Path:
        """The folder of one job."""
        return self._folder / uid

    async def run(
        self,
        task: TrainingTask,
        *,
        report: Callable[[Report], Awaitable[None]],
        stop: asyncio.Event,
        pause: asyncio.Event,
    ) -> Outcome:
        """Run one attempt; see `Backend.run`."""
        folder = self.folder(task.uid)
        try:
            await run_blocking(self._executor, prepare, folder, task)
        except OSError as error:
            return Died(reason=f"cannot write the task: {error.strerror}")

        async def heard(told: Report) -> None:
            await report(told)
            if told is JobPhase.EVALUATING:
                # The fitting is over: there is a processor to spare.
                await self._warm_up()

        await report(JobPhase.LOADING_DATA)
        attempt = _Attempt(report=heard, limits=self._limits)
        async with self._process() as process:
            threads = task.threads or self._limits.threads
            order = {
                "folder": str(folder),
                "threads": threads,
                "gpus": task.gpus,
                "collective_s": self._limits.collective_s,
            }
            process.tell(json.dumps(order).encode() + b"\n")
            await attempt.follow(process, stop, pause)
        if task.distribution.processes > 1:
            await run_blocking(self._executor, sweep_semaphores, task.uid)
        await self._warm_up()
        if stop.is_set():
            return Stopped()
        return attempt.died or await self._end(folder, process.process.returncode, attempt, paused=pause.is_set())

    async def _end(self, folder: Path, code: int | None, attempt: _Attempt, *, paused: bool) -> Outcome:
        """What an attempt that ended by itself led to."""
        # A process that was asked before it could listen had nothing to lose.
        if paused and code in {PAUSED_CODE, -PAUSE_SIGNAL}:
            return Paused()
        if code:
            return Died(reason=epitaph(code, attempt.tail[-1] if attempt.tail else ""))
        try:
            return Finished(model=await run_blocking(self._executor, read_result, folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            return Died(reason=f"training left no usable result: {error}")

    async def discard(self, uid: str) -> None:
        """Remove the job's folder."""
        await run_blocking(self._executor, _remove, self.folder(uid))

    async def kept(self) -> list[str]:
        """The jobs of which something is kept."""
        return await run_blocking(
            self._executor, lambda: sorted(path.name for path in self._folder.glob("*/") if path.is_dir())
        )

    async def _warm_up(self) -> None:
        """Have a warm process, where that is wanted."""
        if self._limits.warm and (self._warm is None or not self._warm.alive):
            with contextlib.suppress(OSError):
                self._warm = await TrainerProcess.start((*self._command, "--preload"), self._environ)

    @contextlib.asynccontextmanager
    async def _process(self) -> AsyncIterator[TrainerProcess]:
        """The warm process, or a new one; all of its session is gone at the end."""
        process, self._warm = self._warm, None
        if process is None or not process.alive:
            process = await TrainerProcess.start(self._command, self._environ)
        try:
            yield process
        finally:
            await process.end()


@dataclass(slots=True, kw_only=True)
class _Attempt:
    """Follows one process: its reports, its prints, its end."""

    report: Callable[[Report], Awaitable[None]]
    limits: LocalLimits
    died: Died | None = None
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=5))
    _heard: float = 0.0

    async def follow(self, process: TrainerProcess, stop: asyncio.Event, pause: asyncio.Event) -> None:
        """Until the process has ended and everything it said is reported."""
        self._heard = asyncio.get_running_loop().time()
        ended = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._outlive(process, ended))
            group.create_task(self._end(process, stop, ended))
            group.create_task(self._pause(process, pause, ended))
            group.create_task(self._hear_reports(process))
            group.create_task(self._hear_prints(process))

    async def _outlive(self, process: TrainerProcess, ended: asyncio.Event) -> None:
        await process.process.wait()
        ended.set()
        # What it started must not keep the pipes open.
        process.signal(signal.SIGKILL)

    async def _end(self, process: TrainerProcess, stop: asyncio.Event, ended: asyncio.Event) -> None:
        """End the process when it is asked to stop, or hangs."""
        loop = asyncio.get_running_loop()
        while not ended.is_set() and not stop.is_set():
            quiet_until = self._heard + self.limits.silence_s_max
            if loop.time() >= quiet_until:
                self.died = Died(reason=f"its process was silent for {self.limits.silence_s_max:g} s and was ended")
                process.signal(signal.SIGKILL)
                return
            await first(ended, stop, timeout_s=quiet_until - loop.time())
        if not ended.is_set():
            process.signal(signal.SIGTERM)
            await first(ended, timeout_s=self.limits.stop_grace_s)
            if not ended.is_set():
                process.signal(signal.SIGKILL)

    async def _pause(self, process: TrainerProcess, pause: asyncio.Event, ended: asyncio.Event) -> None:
        """Ask the process to pause; it ends by itself then, or when it hangs."""
        await first(pause, ended, timeout_s=None)
        if not ended.is_set():
            process.ask(PAUSE_SIGNAL)

    async def _hear_reports(self, process: TrainerProcess) -> None:
        async for line in lines(process.reports, line_bytes_max=REPORT_BYTES_MAX):
            self._heard = asyncio.get_running_loop().time()
            try:
                report = read_report(line)
            except ValueError as error:
                await self.report(LogLine(severity="warning", message=f"unreadable report: {error}"))
                continue
            if isinstance(report, Died):
                self.died = report
            else:
                await self.report(report)

    async def _hear_prints(self, process: TrainerProcess) -> None:
        count = 0
        async for line in lines(process.prints, line_bytes_max=LOG_LINE_BYTES_MAX):
            self._heard = asyncio.get_running_loop().time()
            text = line.decode("utf-8", "replace").rstrip()
            if not text:
                continue
            self.tail.append(text)
            count += 1
            if count < self.limits.log_lines_max:
                await self.report(LogLine(severity="info", message=text))
            elif count == self.limits.log_lines_max:
                await self.report(LogLine(severity="warning", message="too many log lines; the rest is dropped"))


def _remove(folder: Path) -> None:
    """Remove a folder: out of the way first, in one step, so that what a kill leaves is never taken for a job's."""
    gone = folder if folder.name.startswith(_GONE) else folder.with_name(_GONE + folder.name)
    if gone != folder:
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
