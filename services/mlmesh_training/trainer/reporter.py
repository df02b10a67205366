"""What the training process tells the service: JSON lines into a pipe."""

from __future__ import annotations

import threading
from typing import IO

from mlmesh_training.backends.base import Died, Report
from mlmesh_training.backends.reports import report_line


class PermanentError(Exception):
    """Training cannot succeed: the same task would end in the same way again."""


class Reporter:
    """Writes reports, each in one piece. When the pipe is full it waits: the service is never flooded."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def send(self, report: Report | Died) -> None:
        """Send one report. Errors: BrokenPipeError when the service has gone."""
        view = memoryview(report_line(report))
        with self._lock:
            while view:
                view = view[self._pipe.write(view) :]
