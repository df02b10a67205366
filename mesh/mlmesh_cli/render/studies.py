"""`mlmesh studies`: studies, their trials with the best marked, and how far a search is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_cli.render import text as t
from mlmesh_cli.render.status import table
from mlmesh_cli.studies import trials_in_all

BEST = "★"
_COLUMNS_MAX = 3
_STUDY_STYLES = {
    pb.STUDY_STATE_RUNNING: "cyan",
    pb.STUDY_STATE_STOPPING: "yellow",
    pb.STUDY_STATE_PUBLISHING: "cyan",
    pb.STUDY_STATE_SUCCEEDED: "green",
    pb.STUDY_STATE_FAILED: "red",
    pb.STUDY_STATE_STOPPED: "dim",
}
_TRIAL_STYLES = {
    pb.TRIAL_STATE_RUNNING: "cyan",
    pb.TRIAL_STATE_COMPLETE: "green",
    pb.TRIAL_STATE_PRUNED: "dim",
    pb.TRIAL_STATE_FAILED: "red",
}


def study_state_text(state: pb.StudyState.ValueType) -> Text:
    """A study's state, coloured."""
    return Text(t.enum_name("STUDY_STATE_", pb.StudyState.Name(state)), style=_STUDY_STYLES.get(state, "magenta"))


def trial_state_text(state: pb.TrialState.ValueType) -> Text:
    """A trial's state, coloured."""
    return Text(t.enum_name("TRIAL_STATE_", pb.TrialState.Name(state)), style=_TRIAL_STYLES.get(state, "magenta"))


def metric_name(spec: pb.StudySpec) -> str:
    """The objective, as far as the spec names it."""
    return spec.metric or "objective"


def metric_label(spec: pb.StudySpec) -> str:
    """The objective in few letters, for the head of a column: "val acc"."""
    words = {"validation": "val", "train": "train", "accuracy": "acc"}
    return " ".join(words.get(word, word) for word in metric_name(spec).split("_"))


def studies_table(studies: Iterable[pb.Study], now: datetime) -> RenderableType:
    """One row a study, newest first."""
    result = table("study", "state", "what", ">trials", ">best", "version", "started")
    for study in studies:
        counts, best = study.counts, study.best_trial
        done = counts.complete + counts.pruned + counts.failed
        result.add_row(
            t.last(study.name),
            study_state_text(study.state),
            f"{study.spec.job.recipe} on {study.spec.job.dataset}",
            f"{done}/{trials_in_all(study.spec)}",
            f"{best.value:.4g}" if study.HasField("best_trial") else "-",
            t.model_version(study.model_version) or "-",
            t.ago(study.create_time, now),
        )
    if not result.row_count:
        return Text("no studies yet: `mlmesh studies run` starts one", style="dim")
    return result


def trials_table(trials: Sequence[pb.Trial], study: pb.Study) -> RenderableType:
    """One row a trial, by number, the best marked; each hyperparameter in a column while there are few."""
    names = [dimension.name for dimension in study.spec.dimensions]
    apart = len(names) <= _COLUMNS_MAX
    columns = [f">{name}" for name in names] if apart else ["hyperparameters"]
    result = table("", ">trial", "state", ">epoch", f">{metric_label(study.spec)}", *columns)
    best = study.best_trial.number if study.HasField("best_trial") else None
    for trial in trials:
        point = trial.hyperparameters
        cells = [f"{point[name]:.4g}" for name in names if name in point]
        marked = trial.number == best
        result.add_row(
            Text(BEST if marked else " ", style="bold yellow"),
            str(trial.number),
            trial_state_text(trial.state),
            str(trial.epoch),
            f"{trial.value:.4f}" if trial.HasField("value") else "-",
            *(cells if apart else [_point(point)]),
            style="bold" if marked else None,
        )
    return result if result.row_count else Text("no trials yet", style="dim")


def counts_text(study: pb.Study) -> Text:
    """How many trials are where: "4 complete, 1 pruned, 2 running"."""
    counts = study.counts
    parts = [
        (counts.complete, "complete", "green"),
        (counts.pruned, "pruned", "dim"),
        (counts.failed, "failed", "red"),
        (counts.running, "running", "cyan"),
    ]
    text = Text()
    for count, name, style in parts:
        if count:
            text.append(f"{', ' if text else ''}{count} {name}", style=style)
    return text or Text("no trial yet", style="dim")


def study_view(study: pb.Study) -> RenderableType:
    """Where a study stands: state, counts, its best trial, the version."""
    head = Text(f"{study.name} ", style="bold") + study_state_text(study.state)
    if study.HasField("end_time"):
        took = t.unix(study.end_time) - t.unix(study.create_time)
        head.append(f" after {t.duration(took)}", style="default not bold")
    parts: list[RenderableType] = [head, counts_text(study)]
    if study.error:
        parts.append(Text(study.error, style="red"))
    if study.HasField("best_trial"):
        best = study.best_trial
        line = Text(f"{BEST} ", style="bold yellow")
        line.append(f"trial {best.number}: {metric_name(study.spec)} {best.value:.4f}", style="default bold")
        line.append(f"  {_point(best.hyperparameters)}", style="default not bold")
        parts += [line, Text(f"  {best.job}", style="dim")]
    if study.model_version:
        parts.append(Text(f"registered as {study.model_version}"))
    return Group(*parts)


def _point(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {values[name]:.4g}" for name in sorted(values))


def shown(trials: Sequence[pb.Trial], best: int | None, rows: int) -> list[pb.Trial]:
    """The trials that a live table of so many rows shows: those that run, the best, and the latest of the others."""
    if len(trials) <= rows:
        return list(trials)
    first = {trial.number for trial in trials if trial.state == pb.TRIAL_STATE_RUNNING or trial.number == best}
    for trial in reversed(trials):
        if len(first) >= rows:
            break
        first.add(trial.number)
    return [trial for trial in trials if trial.number in first][-rows:]


def live_table(trials: Sequence[pb.Trial], study: pb.Study, *, rows: int) -> RenderableType:
    """The trials worth a look while a search runs."""
    best = study.best_trial.number if study.HasField("best_trial") else None
    chosen = shown(trials, best, rows)
    result = trials_table(chosen, study)
    if len(chosen) < len(trials) and isinstance(result, Table):
        return Group(result, Text(f"… and {len(trials) - len(chosen)} more", style="dim"))
    return result
