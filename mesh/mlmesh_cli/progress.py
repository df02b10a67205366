"""Live progress of a training job."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_cli.render import text as t
from mlmesh_cli.render.training import FINAL_STATES, phase_name

_FIGURES = (
    ("train_loss", "loss"),
    ("train_accuracy", "acc"),
    ("train_error", "error"),
    ("validation_loss", "val loss"),
    ("validation_accuracy", "val acc"),
    ("validation_error", "val error"),
)


def figures(values: dict[str, float]) -> str:
    """The measures of a metrics event as one short text: "loss 0.123  acc 96.1 %  val acc 95.8 %"."""
    parts = []
    for name, label in _FIGURES:
        if name in values:
            value = values[name]
            parts.append(f"{label} {t.percent(value)}" if name.endswith("accuracy") else f"{label} {value:.3f}")
    return "  ".join(parts)


class JobProgress:
    """A progress bar fed with a job's events.

    Args:
        console: where it is drawn.
        title: what is being trained.
        logs: whether info lines of the job are shown; warnings and errors always are.
    """

    def __init__(self, console: Console, title: str, *, logs: bool = False) -> None:
        self._logs = logs
        self._values: dict[str, float] = {}
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._progress.add_task(title, total=None, note="queued")
        self._attempt = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, event: pb.WatchJobResponse) -> None:
        """Draws one event."""
        if event.HasField("metrics"):
            self._values.update(event.metrics.values)
            self._draw(event.metrics.progress, figures(self._values))
        elif event.HasField("job"):
            self._job(event.job)
        elif event.HasField("log") and (self._logs or event.log.severity != "info"):
            style = {"warning": "yellow", "error": "red"}.get(event.log.severity, "dim")
            self._progress.console.print(Text(event.log.message, style=style))

    def _job(self, job: pb.Job) -> None:
        state = t.enum_name("JOB_STATE_", pb.JobState.Name(job.state))
        if job.state in FINAL_STATES:
            self._progress.update(self._task, note=_join(state, figures(self._values)))
            if job.state == pb.JOB_STATE_SUCCEEDED:
                self._progress.update(self._task, total=1, completed=1)
            return
        self._attempt = f"attempt {job.attempts}" if job.attempts > 1 else ""
        if job.state == pb.JOB_STATE_QUEUED:
            ahead = f"{job.queue_position} ahead" if job.queue_position else ""
            self._progress.update(self._task, note=_join(state, ahead))
        elif job.state == pb.JOB_STATE_PAUSED:
            self._progress.update(self._task, note=f"paused; `mlmesh jobs resume {job.name}` goes on")
        elif job.state != pb.JOB_STATE_RUNNING:
            self._progress.update(self._task, note=_join(state, job.error))
        elif job.phase == pb.JOB_PHASE_TRAINING and job.progress.steps:
            self._draw(job.progress, figures(self._values))
        else:
            self._progress.update(
                self._task, note=_join(self._attempt, phase_name(job.phase) or state, figures(self._values))
            )

    def _draw(self, progress: pb.Progress, note: str) -> None:
        epoch = f"epoch {progress.epoch}/{progress.epochs}" if progress.epochs else ""
        self._progress.update(
            self._task,
            total=progress.steps or None,
            completed=progress.step,
            note=_join(self._attempt, epoch, note),
        )


def _join(*parts: str) -> str:
    return "  ".join(part for part in parts if part)
