from __future__ import annotations

import io

from rich.console import Console

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_cli.progress import JobProgress, figures
from mlmesh_cli.render import training as view
from tests.support.cli import NOW, at
from tests.unit.cli.conftest import text_of


def _evaluation() -> pb.Evaluation:
    evaluation = pb.Evaluation(
        accuracy=0.95, precision=0.94, recall=0.96, f1=0.955, loss=0.1234, labels=["cat", "dog"], examples=200
    )
    evaluation.export_max_abs_diff = 1.5e-6
    evaluation.confusion_matrix.add(counts=[90, 10])
    evaluation.confusion_matrix.add(counts=[0, 100])
    return evaluation


def test_the_evaluation_has_every_measure() -> None:
    text = text_of(view.evaluation_table(_evaluation()))
    for wanted in ("95.0 %", "94.0 %", "96.0 %", "95.5 %", "0.1234", "200", "1.5e-06"):
        assert wanted in text


def test_the_confusion_matrix_has_a_row_a_true_class() -> None:
    lines = text_of(view.confusion_table(_evaluation())).splitlines()
    cat = next(line for line in lines if line.strip().startswith("cat")).split()
    dog = next(line for line in lines if line.strip().startswith("dog")).split()
    assert cat == ["cat", "90", "10", "90.0", "%"]
    assert dog == ["dog", "·", "100", "100.0", "%"]


def test_a_class_without_examples_has_no_recall() -> None:
    evaluation = pb.Evaluation(labels=["a"])
    evaluation.confusion_matrix.add(counts=[0])
    assert ["a", "·", "-"] in [line.split() for line in text_of(view.confusion_table(evaluation)).splitlines()]


def test_a_failed_job_says_why() -> None:
    job = pb.Job(name="jobs/1", state=pb.JOB_STATE_FAILED, error="loss is not a number")
    job.start_time.CopyFrom(at(0))
    job.end_time.CopyFrom(at(12))
    text = text_of(view.job_view(job))
    assert "jobs/1 failed after 12 s" in text
    assert "loss is not a number" in text


def test_jobs_are_listed() -> None:
    job = pb.Job(name="jobs/1", state=pb.JOB_STATE_SUCCEEDED, attempts=2, model_version="models/m/versions/4")
    job.spec.recipe, job.spec.dataset = "cnn", "mnist"
    job.evaluation.accuracy = 0.5
    job.create_time.CopyFrom(at(-60))
    text = text_of(view.jobs_table([job], NOW))
    for wanted in ("jobs/1", "succeeded", "cnn", "mnist", "50.0 %", "m/4", "1 min ago"):
        assert wanted in text


def test_recipes_show_bounds() -> None:
    recipe = pb.Recipe(name="cnn", description="A network.", datasets=["mnist"])
    recipe.hyperparameters.add(name="epochs", default_value=3, min_value=1, max_value=100, description="Passes.")
    text = text_of(view.recipes_view([recipe]))
    assert next(line for line in text.splitlines() if "epochs" in line).split() == [
        "epochs",
        "3",
        "1",
        "100",
        "Passes.",
    ]


def test_figures_of_a_metrics_event() -> None:
    assert figures({"train_loss": 0.5, "validation_accuracy": 0.9, "other": 1}) == "loss 0.500  val acc 90.0 %"


def _draw(events: list[pb.WatchJobResponse], *, logs: bool = False) -> str:
    stream = io.StringIO()
    with JobProgress(Console(file=stream, width=160, force_terminal=False), "a model", logs=logs) as progress:
        for event in events:
            progress.update(event)
    return stream.getvalue()


def test_progress_ends_at_a_hundred_per_cent_with_the_last_figures() -> None:
    running = pb.WatchJobResponse(sequence=1)
    running.job.state, running.job.phase = pb.JOB_STATE_RUNNING, pb.JOB_PHASE_TRAINING
    metrics = pb.WatchJobResponse(sequence=2)
    metrics.metrics.progress.CopyFrom(pb.Progress(epoch=1, epochs=2, step=50, steps=100))
    metrics.metrics.values["train_loss"] = 0.25
    done = pb.WatchJobResponse(sequence=3)
    done.job.state = pb.JOB_STATE_SUCCEEDED
    half = _draw([running, metrics])
    assert "50%" in half
    assert "epoch 1/2  loss 0.250" in half
    whole = _draw([running, metrics, done])
    assert "100%" in whole
    assert "succeeded  loss 0.250" in whole


def test_warnings_are_shown_and_info_lines_on_request() -> None:
    info, warning = pb.WatchJobResponse(), pb.WatchJobResponse()
    info.log.severity, info.log.message = "info", "a quiet line"
    warning.log.severity, warning.log.message = "warning", "a loud [line]"
    quiet = _draw([info, warning])
    assert "a loud [line]" in quiet
    assert "a quiet line" not in quiet
    assert "a quiet line" in _draw([info, warning], logs=True)


def test_calibration_and_latency_are_shown_where_they_were_measured() -> None:
    assert "ECE" not in text_of(view.evaluation_table(_evaluation()))
    evaluation = _evaluation()
    evaluation.calibration.expected_error, evaluation.calibration.brier = 0.0321, 0.0716
    for size, median_us in ((1, 50), (32, 1200)):
        latency = evaluation.latency.add(batch_size=size)
        latency.median.FromMicroseconds(median_us)
        latency.p95.FromMicroseconds(2 * median_us)
    text = text_of(view.job_view(pb.Job(name="jobs/1", evaluation=evaluation)))
    for wanted in ("ECE", "0.0321", "Brier", "0.0716", "0.05 ms alone (p95 0.1)", "1.2 ms for 32 (p95 2.4)"):
        assert wanted in text


def test_a_regressor_has_errors_and_neither_accuracy_nor_a_matrix() -> None:
    evaluation = pb.Evaluation(examples=90, loss=2704.0)
    errors = evaluation.regression
    errors.r2, errors.root_mean_squared_error, errors.mean_absolute_error = 0.5141, 52.0, 42.5
    job = pb.Job(name="jobs/1", state=pb.JOB_STATE_SUCCEEDED, evaluation=evaluation)
    text = text_of(view.job_view(job))
    for wanted in ("R²", "0.5141", "RMSE", "52", "MAE", "42.5", "90"):
        assert wanted in text
    assert "accuracy" not in text
    assert "predicted" not in text
    assert "R² 0.514" in text_of(view.jobs_table([job], NOW))


def test_a_matrix_wider_than_a_terminal_is_left_to_the_picture() -> None:
    evaluation = pb.Evaluation(labels=[str(index) for index in range(40)])
    for _ in range(40):
        evaluation.confusion_matrix.add(counts=[1] * 40)
    assert "predicted" not in text_of(view.job_view(pb.Job(name="jobs/1", evaluation=evaluation)))


def test_a_recipe_says_what_it_takes_and_who_brings_it() -> None:
    recipe = pb.Recipe(
        name="cnn", description="Layers.", datasets=["mnist"], dataset_kind=pb.DATASET_KIND_IMAGE, distribution="x 1.0"
    )
    assert "cnn  Layers.  (data: mnist, registered image data sets)  x 1.0" in text_of(view.recipes_view([recipe]))
