"""What workers say, on its way through the agent to the service: reports, and what they print.

Reports go through one socket that keeps messages whole, so that a worker killed in the middle of one tears nothing.
Prints go through a pipe a worker, and come out as lines that begin with its rank. Both outlive a restart of workers.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import IO, cast

from mlmesh_training.backends.base import Died
from mlmesh_training.backends.lines import LineSplitter
from mlmesh_training.backends.reports import read_report
from mlmesh_training.jobs import LOG_LINE_BYTES_MAX, LogLine
from mlmesh_training.trainer.reporter import Reporter

_MESSAGE_BYTES_MAX = 1 << 18
_FLUSH = b"flush"


@dataclass(frozen=True, kw_only=True)
class Wires:
    """The workers' ends; multiprocessing hands them over."""

    reports: socket.socket
    prints: tuple[Connection, ...]

    def attach(self, local_rank: int) -> Reporter:
        """Print into the pipe of this worker from now on; its reporter."""
        for standard in (1, 2):
            os.dup2(self.prints[local_rank].fileno(), standard)
        for each in self.prints:
            each.close()
        return Reporter(cast("IO[bytes]", _Whole(self.reports)))


class _Whole:
    """Writes each report as one message."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def write(self, data: bytes) -> int:
        return self._end.send(data)


class Silent(Reporter):
    """For ranks other than the first: all would report the same."""

    def __init__(self) -> None:
        super().__init__(cast("IO[bytes]", None))

    def send(self, report: object) -> None:
        """Nothing."""


class Exchange:
    """The agent's end: passes on what workers report and print, until all of them have gone.

    Args:
        workers: how many there are.
        reporter: takes their reports.
        write: takes their prints, line by line.
    """

    def __init__(self, workers: int, reporter: Reporter, *, write: Callable[[bytes], None] | None = None) -> None:
        self._reporter = reporter
        self._write = write or _write
        self._reports, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pipes = [Pipe(duplex=False) for _ in range(workers)]
        self._prints = [reading for reading, _ in pipes]
        self.wires = Wires(reports=theirs, prints=tuple(writing for _, writing in pipes))
        self.died: Died | None = None
        self._flushed = threading.Event()
        self._threads = [
            threading.Thread(target=self._pass_reports, name="reports", daemon=True),
            threading.Thread(target=self._pass_prints, name="prints", daemon=True),
        ]

    def __enter__(self) -> Exchange:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the last of what was said; all workers must have ended."""
        self.wires.reports.close()
        for pipe in self.wires.prints:
            pipe.close()
        for thread in self._threads:
            thread.join()
        self._reports.close()
        for reading in self._prints:
            reading.close()

    def flush(self) -> None:
        """Wait until every report sent so far was taken."""
        self._flushed.clear()
        self.wires.reports.send(_FLUSH)
        self._flushed.wait()

    def _pass_reports(self) -> None:
        while message := self._reports.recv(_MESSAGE_BYTES_MAX):
            if message == _FLUSH:
                self._flushed.set()
                continue
            try:
                report = read_report(message)
            except ValueError as error:
                report = LogLine(severity="warning", message=f"unreadable report of a worker: {error}")
            if isinstance(report, Died):
                self.died = self.died if self.died and self.died.permanent else report
            else:
                self._reporter.send(report)

    def _pass_prints(self) -> None:
        splitters = {pipe: LineSplitter(LOG_LINE_BYTES_MAX) for pipe in self._prints}
        with selectors.DefaultSelector() as selector:
            for rank, pipe in enumerate(self._prints):
                selector.register(pipe, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    pipe, rank = cast("Connection", key.fileobj), key.data
                    data = os.read(pipe.fileno(), 1 << 16)
                    lines = splitters[pipe].feed(data) if data else splitters[pipe].end()
                    for line in lines:
                        self._write(b"[rank %d] %s\n" % (rank, line))
                    if not data:
                        selector.unregister(pipe)


def _write(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()
