"""Between the contract's messages and our values. Field rules were checked by protovalidate before."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_runtime.errors import InvalidInput
from mlmesh_training import convert_options as options
from mlmesh_training import jobs
from mlmesh_training.datasets import Dataset
from mlmesh_training.jobs import Job, JobSpec, JobState, Progress, Publication
from mlmesh_training.options import Distribution, FitOptions, Resources
from mlmesh_training.recipes import Recipe


def spec(message: pb.JobSpec) -> JobSpec:
    """A spec as it was asked."""
    publication = None
    if message.HasField("publication"):
        asked = message.publication
        publication = Publication(model=asked.model, aliases=tuple(asked.aliases), description=asked.description)
    return JobSpec(
        recipe=message.recipe,
        dataset=message.dataset,
        hyperparameters=dict(message.hyperparameters),
        seed=message.seed,
        retries_max=message.retries_max,
        publication=publication,
        priority=message.priority,
        resources=options.resources(message.resources),
        distribution=options.distribution(message.distribution),
        fit=options.fit(message.fit),
        time_limit_s=options.seconds(message.time_limit),
        optimization=options.optimization(message.optimization) if message.HasField("optimization") else None,
        labels=dict(message.labels),
    )


def states(values: Iterable[pb.JobState.ValueType]) -> frozenset[JobState]:
    """States to look for. Errors: InvalidInput for one that is not set."""
    names = {pb.JobState.Name(value).removeprefix("JOB_STATE_") for value in values}
    if "UNSPECIFIED" in names:
        raise InvalidInput("states: JOB_STATE_UNSPECIFIED is no state; leave states empty for all", field="states")
    return frozenset(map(JobState, names))


def uid(name: str) -> str:
    """The uid in "jobs/{uid}"."""
    return name.removeprefix("jobs/")


def job(value: Job) -> pb.Job:
    """A job as the contract shows it."""
    message = pb.Job(
        name=value.name,
        spec=spec_message(value.spec),
        state=pb.JobState.Value(f"JOB_STATE_{value.state}"),
        phase=pb.JobPhase.Value(f"JOB_PHASE_{value.phase or 'UNSPECIFIED'}"),
        progress=_progress(value.progress),
        model_version=value.model_version,
        attempts=value.attempts,
        error=value.error,
        create_time=time(value.create_time),
        start_time=time(value.start_time),
        end_time=time(value.end_time),
        creator=value.creator,
        last_sequence=value.last_sequence,
        attempt_history=map(_attempt, value.history),
        run_duration=options.duration(value.run_s),
        study=value.study,
        resources=options.resources_message(value.resources),
        queue_position=value.queue_position,
        resolved_dataset=value.resolved_dataset,
    )
    if value.evaluation is not None:
        message.evaluation.CopyFrom(evaluation(value.evaluation))
    if value.optimization is not None:
        message.optimization.CopyFrom(_optimization_result(value.optimization))
    return message


def event(value: jobs.Event) -> pb.WatchJobResponse:
    """One event of a job."""
    message = pb.WatchJobResponse(sequence=value.sequence, time=time(value.time))
    match value.body:
        case jobs.JobChanged(job=Job() as changed):
            message.job.CopyFrom(job(changed))
        case jobs.Metrics(progress=progress, values=values):
            message.metrics.progress.CopyFrom(_progress(progress))
            message.metrics.values.update(values)
        case jobs.LogLine(severity=severity, message=text):
            message.log.severity, message.log.message = severity, text
        case jobs.Checkpoint(progress=progress, sha256=sha256):
            message.checkpoint.progress.CopyFrom(_progress(progress))
            message.checkpoint.sha256 = sha256
    return message


def evaluation(value: jobs.Evaluation) -> pb.Evaluation:
    """What was measured on held-out data."""
    message = pb.Evaluation(
        accuracy=value.accuracy,
        precision=value.precision,
        recall=value.recall,
        f1=value.f1,
        loss=value.loss,
        labels=value.labels,
        confusion_matrix=[pb.ConfusionRow(counts=row) for row in value.confusion],
        examples=value.examples,
        export_max_abs_diff=value.export_max_abs_diff,
        latency=[
            pb.Latency(
                batch_size=measured.batch_size,
                median=options.duration(measured.median_s),
                p95=options.duration(measured.p95_s),
                requests=measured.requests,
            )
            for measured in value.latency
        ],
    )
    if (calibration := value.calibration) is not None:
        message.calibration.CopyFrom(
            pb.Calibration(
                expected_error=calibration.expected_error,
                max_error=calibration.max_error,
                brier=calibration.brier,
                bins=[
                    pb.CalibrationBin(examples=each.examples, confidence=each.confidence, accuracy=each.accuracy)
                    for each in calibration.bins
                ],
            )
        )
    if (errors := value.regression) is not None:
        message.regression.CopyFrom(
            pb.RegressionErrors(
                mean_absolute_error=errors.mean_absolute_error,
                root_mean_squared_error=errors.root_mean_squared_error,
                r2=errors.r2,
            )
        )
    return message


def recipe(value: Recipe) -> pb.Recipe:
    """A recipe with its hyperparameters."""
    return pb.Recipe(
        name=value.name,
        description=value.description,
        datasets=value.datasets,
        hyperparameters=[
            pb.HyperparameterSpec(
                name=known.name,
                description=known.description,
                default_value=known.default,
                min_value=known.low,
                max_value=known.high,
                integer=known.integer,
                log_scale=known.log_scale,
            )
            for known in value.hyperparameters
        ],
        task=pb.Task.Value(f"TASK_{value.task}"),
        dataset_kind=pb.DatasetKind.Value(f"DATASET_KIND_{value.dataset_kind}"),
        distribution=value.distribution,
    )


def dataset(value: Dataset) -> pb.Dataset:
    """A named data set."""
    return pb.Dataset(
        name=value.name,
        description=value.description,
        kind=pb.DatasetKind.Value(f"DATASET_KIND_{value.kind}"),
        example_shape=value.example_shape,
        classes=value.classes,
        distribution=value.distribution,
    )


def spec_message(value: JobSpec) -> pb.JobSpec:
    """A spec as the contract shows it: what was left to the defaults as a whole stays absent."""
    message = pb.JobSpec(
        recipe=value.recipe,
        dataset=value.dataset,
        hyperparameters=value.hyperparameters,
        seed=value.seed,
        retries_max=value.retries_max,
        priority=value.priority,
        labels=value.labels,
    )
    if value.resources != Resources():
        message.resources.CopyFrom(options.resources_message(value.resources))
    if value.distribution != Distribution():
        message.distribution.CopyFrom(options.distribution_message(value.distribution))
    if value.fit != FitOptions():
        message.fit.CopyFrom(options.fit_message(value.fit))
    if value.time_limit_s:
        message.time_limit.CopyFrom(options.duration(value.time_limit_s))
    if value.optimization is not None:
        message.optimization.CopyFrom(options.optimization_message(value.optimization))
    if value.publication is not None:
        message.publication.CopyFrom(
            pb.Publication(
                model=value.publication.model,
                aliases=value.publication.aliases,
                description=value.publication.description,
            )
        )
    return message


def _progress(value: Progress) -> pb.Progress:
    return pb.Progress(epoch=value.epoch, epochs=value.epochs, step=value.step, steps=value.steps)


def _attempt(value: jobs.Attempt) -> pb.Attempt:
    return pb.Attempt(
        number=value.number,
        start_time=time(value.start_time),
        end_time=time(value.end_time),
        reason=value.reason,
        charged=value.charged,
    )


def _optimization_result(value: jobs.OptimizationResult) -> pb.OptimizationResult:
    return pb.OptimizationResult(
        source=value.source,
        technique=value.technique,
        before=evaluation(value.before),
        after=evaluation(value.after),
        size_bytes_before=value.size_bytes_before,
        size_bytes_after=value.size_bytes_after,
        sparsity=value.sparsity,
        quality_drop=value.quality_drop,
        quality_drop_max=value.quality_drop_max,
    )


def time(value: datetime | None) -> Timestamp | None:
    """A moment; None stays absent."""
    if value is None:
        return None
    message = Timestamp()
    message.FromDatetime(value)
    return message
