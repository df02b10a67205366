"""Between the contract's messages and our values. Field rules were checked by protovalidate before."""

from __future__ import annotations

from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_training import jobs
from mlmesh_training.jobs import Job, JobSpec, Progress, Publication
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
    )


def uid(name: str) -> str:
    """The uid in "jobs/{uid}"."""
    return name.removeprefix("jobs/")


def job(value: Job) -> pb.Job:
    """A job as the contract shows it."""
    message = pb.Job(
        name=value.name,
        spec=_spec(value.spec),
        state=pb.JobState.Value(f"JOB_STATE_{value.state}"),
        phase=pb.JobPhase.Value(f"JOB_PHASE_{value.phase or 'UNSPECIFIED'}"),
        progress=_progress(value.progress),
        model_version=value.model_version,
        attempts=value.attempts,
        error=value.error,
        create_time=_time(value.create_time),
        start_time=_time(value.start_time),
        end_time=_time(value.end_time),
        creator=value.creator,
        last_sequence=value.last_sequence,
    )
    if value.evaluation is not None:
        message.evaluation.CopyFrom(_evaluation(value.evaluation))
    return message


def event(value: jobs.Event) -> pb.WatchJobResponse:
    """One event of a job."""
    message = pb.WatchJobResponse(sequence=value.sequence, time=_time(value.time))
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
            )
            for known in value.hyperparameters
        ],
    )


def _spec(value: JobSpec) -> pb.JobSpec:
    message = pb.JobSpec(
        recipe=value.recipe,
        dataset=value.dataset,
        hyperparameters=value.hyperparameters,
        seed=value.seed,
        retries_max=value.retries_max,
    )
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


def _evaluation(value: jobs.Evaluation) -> pb.Evaluation:
    return pb.Evaluation(
        accuracy=value.accuracy,
        precision=value.precision,
        recall=value.recall,
        f1=value.f1,
        loss=value.loss,
        labels=value.labels,
        confusion_matrix=[pb.ConfusionRow(counts=row) for row in value.confusion],
        examples=value.examples,
        export_max_abs_diff=value.export_max_abs_diff,
    )


def _time(value: datetime | None) -> Timestamp | None:
    if value is None:
        return None
    message = Timestamp()
    message.FromDatetime(value)
    return message
