"""One attempt on this machine: the files come, the trainer runs as beside the service, what it leaves goes back.

The trainer's reports pass through. Before a checkpoint is reported its file is stored with the service, so what a
watcher hears of can be resumed from, whatever becomes of this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlmesh_runtime.executors import BoundedExecutor, run_blocking
from mlmesh_training import documents
from mlmesh_training.backends.base import RESULT_FILE, TASK_FILE, Died
from mlmesh_training.backends.kubernetes.hub import PAUSED_REPORT
from mlmesh_training.backends.process import TrainerProcess, epitaph, lines
from mlmesh_training.backends.reports import read_report, report_line
from mlmesh_training.jobs import LOG_LINE_BYTES_MAX, Checkpoint, LogLine
from mlmesh_training.worker.client import TrainingClient

logger = logging.getLogger(__name__)

PAUSED_EXIT = 75
"""What the trainer ends with when it stored a checkpoint because it was asked to pause (EX_TEMPFAIL)."""
REPORT_BYTES_MAX = 1 << 20
_LINES_MAX = 10_000
TRAINER = (sys.executable, "-m", "mlmesh_training.trainer")


class Attempt:
    """Runs the trainer in `folder` for one worker.

    Args:
        reporting: whether this machine reports and brings files; of several, one does.
        environ: the trainer's environment.
    """

    def __init__(
        self,
        client: TrainingClient,
        folder: Path,
        *,
        reporting: bool,
        executor: BoundedExecutor,
        environ: Mapping[str, str],
        command: Sequence[str] = TRAINER,
    ) -> None:
        self._client = client
        self._folder = folder
        self._reporting = reporting
        self._executor = executor
        self._environ = dict(environ)
        self._command = tuple(command)
        self._process: TrainerProcess | None = None
        self._pausing = False
        self._tail: deque[str] = deque(maxlen=5)
        self._died: Died | None = None

    def pause(self) -> None:
        """Have the trainer store a checkpoint and end. Safe to call at any time."""
        self._pausing = True
        if self._process is not None and self._process.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.process.pid, signal.SIGUSR1)

    async def run(self) -> int:
        """Fetch, train, bring back; the trainer's exit code, PAUSED_EXIT when it was paused."""
        task = await self._client.task()
        await run_blocking(self._executor, self._write_task, task.task)
        for file in task.files:
            await self._client.fetch(file, self._folder)
        process = self._process = await TrainerProcess.start(self._command, self._environ)
        try:
            process.tell(json.dumps({"folder": str(self._folder), "threads": task.threads}).encode() + b"\n")
            if self._pausing:
                self.pause()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._hear_reports(process))
                group.create_task(self._hear_prints(process))
            code = await process.process.wait()
        finally:
            await process.end()
        await self._tell_end(code)
        return code

    def _write_task(self, text: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / TASK_FILE).write_text(text)

    async def _tell_end(self, code: int) -> None:
        if not self._reporting:
            return
        if code == 0:
            model = documents.read_model(json.loads((self._folder / RESULT_FILE).read_bytes()))
            for file in model.files:
                await self._client.bring(self._folder, file.path)
            # Last: where it is, training is done.
            await self._client.bring(self._folder, RESULT_FILE)
        elif code == PAUSED_EXIT:
            await self._bring_checkpoints()
            await self._client.reports.put(PAUSED_REPORT)
        else:
            died = self._died or Died(reason=epitaph(code, self._tail[-1] if self._tail else ""))
            await self._client.reports.put(report_line(died).decode().rstrip("\n"))
        await self._client.reports.flushed()

    async def _hear_reports(self, process: TrainerProcess) -> None:
        async for line in lines(process.reports, line_bytes_max=REPORT_BYTES_MAX):
            try:
                report = read_report(line)
            except ValueError:
                logger.warning("the trainer wrote what is no report", extra={"bytes": len(line)})
                continue
            if isinstance(report, Died):
                self._died = report
            elif self._reporting:
                if isinstance(report, Checkpoint):
                    await self._bring_checkpoints()
                await self._client.reports.put(line.decode())

    async def _hear_prints(self, process: TrainerProcess) -> None:
        count = 0
        async for line in lines(process.prints, line_bytes_max=LOG_LINE_BYTES_MAX):
            text = line.decode("utf-8", "replace").rstrip()
            if not text:
                continue
            sys.stderr.write(f"{text}\n")
            self._tail.append(text)
            count += 1
            if self._reporting and count <= _LINES_MAX:
                line_of = LogLine(severity="info", message=text)
                await self._client.reports.put(report_line(line_of).decode().rstrip("\n"))

    async def _bring_checkpoints(self) -> None:
        """Store the newest checkpoint; an older one may be removed by the trainer at any moment."""
        found = sorted(self._folder.glob("checkpoint-*.pt"), reverse=True)
        for path in found[:1]:
            with contextlib.suppress(FileNotFoundError):
                await self._client.bring(self._folder, path.name)
