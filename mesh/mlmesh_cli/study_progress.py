"""Live progress of a study: a bar over its trials and a table of those worth a look."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_cli.render.studies import counts_text, live_table, study_state_text
from mlmesh_cli.studies import FINAL_STATES, trials_in_all

_ROWS = 12
_BAR_COLUMNS = 24


class StudyProgress:
    """A bar and a table fed with a study's events.

    Args:
        console: where they are drawn.
        title: the study's name.
    """

    def __init__(self, console: Console, title: str) -> None:
        self._study = pb.Study(name=title)
        self._trials: dict[int, pb.Trial] = {}
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=_BAR_COLUMNS),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task(title, total=None)
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, vertical_overflow="crop")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def update(self, event: pb.WatchStudyResponse) -> None:
        """Takes one event."""
        if event.HasField("trial"):
            self._trials[event.trial.number] = event.trial
        elif event.HasField("study"):
            study = self._study = event.study
            counts = study.counts
            done = counts.complete + counts.pruned + counts.failed
            ended = study.state in FINAL_STATES
            self._bar.update(self._task, total=done if ended else trials_in_all(study.spec), completed=done)

    def _render(self) -> RenderableType:
        trials = [self._trials[number] for number in sorted(self._trials)]
        status = counts_text(self._study)
        if self._study.state:
            status = study_state_text(self._study.state) + Text(": ", style="default") + status
        return Group(live_table(trials, self._study, rows=_ROWS), self._bar, status)
