"""The figures of each epoch, kept beside the checkpoints for the pictures at the end."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mlmesh_training.backends.base import Died, Report
from mlmesh_training.jobs import Metrics
from mlmesh_training.trainer.reporter import Reporter

HISTORY_FILE = "history.jsonl"


class Recorder(Reporter):
    """Passes reports on, and keeps the figures at the end of each epoch in the folder, over restarts.

    Args:
        on_figures: called at each report of figures.
    """

    def __init__(self, reporter: Reporter, folder: Path, *, on_figures: Callable[[], None] = lambda: None) -> None:
        self._reporter = reporter
        self._path = folder / HISTORY_FILE
        self._on_figures = on_figures
        self._keeping = threading.Lock()

    def send(self, report: Report | Died) -> None:
        """Send one report. Errors: BrokenPipeError when the service has gone."""
        if isinstance(report, Metrics):
            self._on_figures()
            if any(name.startswith("validation_") for name in report.values):
                self._keep({"epoch": float(report.progress.epoch), **report.values})
        self._reporter.send(report)

    def epochs(self) -> Sequence[Mapping[str, float]]:
        """Figures of each epoch, in order. Of one that was fitted again after a restart, the latest."""
        found: dict[float, Mapping[str, float]] = {}
        with contextlib.suppress(OSError):
            for line in self._path.read_text().splitlines():
                # The last line may be torn.
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    figures = json.loads(line)
                    found[float(figures["epoch"])] = figures
        return [found[epoch] for epoch in sorted(found)]

    def _keep(self, figures: Mapping[str, float]) -> None:
        # A picture is not worth the job: on a full disk it goes on without.
        with self._keeping, contextlib.suppress(OSError), self._path.open("a") as file:
            # A line of its own, also where the one before is torn.
            file.write(f"\n{json.dumps(figures)}\n")
