"""`mlmesh train`: jobs, recipes, what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_cli.render import text as t
from mlmesh_cli.render.status import table

_STATE_STYLES = {
    pb.JOB_STATE_QUEUED: "yellow",
    pb.JOB_STATE_RUNNING: "cyan",
    pb.JOB_STATE_RETRYING: "yellow",
    pb.JOB_STATE_CANCELLING: "yellow",
    pb.JOB_STATE_SUCCEEDED: "green",
    pb.JOB_STATE_FAILED: "red",
    pb.JOB_STATE_CANCELLED: "dim",
    pb.JOB_STATE_PAUSING: "yellow",
    pb.JOB_STATE_PAUSED: "blue",
}
CONFUSION_CLASSES_MAX = 24
"""Beyond so many classes the matrix is wider than a terminal; plots/confusion_matrix.png has it."""
FINAL_STATES = frozenset({pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED})


def state_text(state: pb.JobState.ValueType) -> Text:
    """A job's state, coloured."""
    return Text(t.enum_name("JOB_STATE_", pb.JobState.Name(state)), style=_STATE_STYLES.get(state, "magenta"))


def phase_name(phase: pb.JobPhase.ValueType) -> str:
    """What a job is at, in words; empty when it does not run."""
    return "" if not phase else t.enum_name("JOB_PHASE_", pb.JobPhase.Name(phase))


def jobs_table(jobs: Iterable[pb.Job], now: datetime) -> RenderableType:
    """One row a job, newest first."""
    result = table("job", "state", "recipe", "data", ">epoch", ">quality", "version", "submitted", ">attempts")
    for job in jobs:
        measured = job.HasField("evaluation")
        result.add_row(
            job.name,
            state_text(job.state),
            job.spec.recipe,
            job.spec.dataset,
            f"{job.progress.epoch}/{job.progress.epochs}",
            quality(job.evaluation) if measured else "-",
            t.model_version(job.model_version) or "-",
            t.ago(job.create_time, now),
            str(job.attempts),
        )
    return result if result.row_count else Text("no jobs yet: `mlmesh train` submits one", style="dim")


def quality(evaluation: pb.Evaluation) -> str:
    """The figure that says most: accuracy of a classifier, explained variance of a regressor."""
    if evaluation.HasField("regression"):
        return f"R² {evaluation.regression.r2:.3f}"
    return t.percent(evaluation.accuracy)


def evaluation_table(evaluation: pb.Evaluation) -> Table:
    """The measures on held-out data, in one row."""
    common = (f"{evaluation.examples:,}", f"{evaluation.export_max_abs_diff:.1e}")
    if evaluation.HasField("regression"):
        errors = evaluation.regression
        result = table(">R²", ">RMSE", ">MAE", ">examples", ">ONNX max |diff|")
        result.add_row(
            f"{errors.r2:.4f}",
            f"{errors.root_mean_squared_error:.4g}",
            f"{errors.mean_absolute_error:.4g}",
            *common,
        )
        return result
    measured = evaluation.HasField("calibration")
    columns = [">accuracy", ">precision", ">recall", ">F1", ">loss", *([">ECE", ">Brier"] if measured else [])]
    result = table(*columns, ">examples", ">ONNX max |diff|")
    calibration = evaluation.calibration
    result.add_row(
        *(t.percent(v) for v in (evaluation.accuracy, evaluation.precision, evaluation.recall, evaluation.f1)),
        f"{evaluation.loss:.4f}",
        *([f"{calibration.expected_error:.4f}", f"{calibration.brier:.4f}"] if measured else []),
        *common,
    )
    return result


def optimization_table(result: pb.OptimizationResult) -> Table:
    """An optimised model under its source: quality, size, speed, and what was lost of what was allowed."""
    found = table("", ">quality", ">size", ">alone", ">zero weights")
    rows = (
        (t.model_version(result.source), result.before, result.size_bytes_before, ""),
        (result.technique, result.after, result.size_bytes_after, t.percent(result.sparsity)),
    )
    for name, measured, size, zero in rows:
        alone = [f"{t.seconds(each.median) * 1e3:.3g} ms" for each in measured.latency if each.batch_size == 1]
        found.add_row(name, quality(measured), t.size(size), alone[0] if alone else "-", zero)
    allowed = result.quality_drop <= result.quality_drop_max
    lost = Text(f"lost {result.quality_drop:.4f} of {result.quality_drop_max:g}", style="green" if allowed else "red")
    found.add_row("", lost, f"x{result.size_bytes_after / max(1, result.size_bytes_before):.2f}", "", "")
    return found


def latency_text(evaluation: pb.Evaluation) -> Text:
    """How fast the exported model answers, in a line: "ONNX on the processor: 0.05 ms alone, 0.4 ms for 32"."""
    parts = []
    for each in evaluation.latency:
        median, p95 = t.seconds(each.median) * 1e3, t.seconds(each.p95) * 1e3
        of = "alone" if each.batch_size == 1 else f"for {each.batch_size}"
        parts.append(f"{median:.3g} ms {of} (p95 {p95:.3g})")
    return Text(f"answers in {', '.join(parts)} on the processor that trained it", style="dim")


def confusion_table(evaluation: pb.Evaluation) -> Table:
    """The confusion matrix: a row a true class, a column a predicted one, the diagonal green, mistakes red."""
    labels = list(evaluation.labels) or [str(i) for i in range(len(evaluation.confusion_matrix))]
    result = table("true \\ predicted", *(f">{label}" for label in labels), ">recall")
    for index, row in enumerate(evaluation.confusion_matrix):
        total = sum(row.counts)
        cells = [_confusion_cell(count, diagonal=column == index) for column, count in enumerate(row.counts)]
        recall = t.percent(row.counts[index] / total) if total else "-"
        result.add_row(Text(labels[index], style="bold"), *cells, recall)
    return result


def _confusion_cell(count: int, *, diagonal: bool) -> Text:
    if not count:
        return Text("·", style="dim")
    return Text(str(count), style="green" if diagonal else "red")


def job_view(job: pb.Job) -> RenderableType:
    """How a job ended: state, measures, confusion matrix, version."""
    head = Text(f"{job.name} ", style="bold") + state_text(job.state)
    took = (
        t.unix(job.end_time) - t.unix(job.start_time) if job.HasField("end_time") and job.HasField("start_time") else 0
    )
    if took > 0:
        head.append(f" after {t.duration(took)}", style="default not bold")
    if job.model_version:
        head.append(f", registered as {job.model_version}", style="default not bold")
    parts: list[RenderableType] = [head]
    if job.error:
        parts.append(Text(job.error, style="red"))
    if job.HasField("optimization"):
        parts.append(optimization_table(job.optimization))
    if job.HasField("evaluation"):
        parts.append(evaluation_table(job.evaluation))
        if job.evaluation.latency:
            parts.append(latency_text(job.evaluation))
        if 0 < len(job.evaluation.confusion_matrix) <= CONFUSION_CLASSES_MAX:
            parts.append(confusion_table(job.evaluation))
    return Group(*parts)


def _data(recipe: pb.Recipe) -> str:
    kind = t.enum_name("DATASET_KIND_", pb.DatasetKind.Name(recipe.dataset_kind))
    registered = [f"registered {kind} data sets"] if recipe.dataset_kind else []
    return ", ".join([*recipe.datasets, *registered])


def recipes_view(recipes: Iterable[pb.Recipe]) -> RenderableType:
    """Each recipe with its data sets and hyperparameters."""
    parts: list[RenderableType] = []
    for recipe in recipes:
        head = Text(recipe.name, style="bold cyan")
        head.append(f"  {recipe.description}  (data: {_data(recipe)})", style="default not bold")
        if recipe.distribution:
            head.append(f"  {recipe.distribution}", style="dim not bold")
        result = table("hyperparameter", ">default", ">least", ">most", "what it does")
        for spec in recipe.hyperparameters:
            figures = (spec.default_value, spec.min_value, spec.max_value)
            result.add_row(spec.name, *(f"{v:g}" for v in figures), spec.description)
        parts += [head, result]
    return Group(*parts)
