"""Between the contract's messages of studies and our values. Field rules were checked by protovalidate before."""

from __future__ import annotations

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_runtime.errors import InvalidInput
from mlmesh_training import convert
from mlmesh_training.options import Direction
from mlmesh_training.studies.space import Dimension
from mlmesh_training.studies.study import Event, Pruner, Sampler, Study, StudyChanged, StudySpec, Trial, TrialChanged


def spec(message: pb.StudySpec) -> StudySpec:
    """A spec as it was asked."""
    return StudySpec(
        job=convert.spec(message.job),
        dimensions=tuple(_dimension(dimension) for dimension in message.dimensions),
        sampler=Sampler(_name(pb.Sampler.Name(message.sampler), "SAMPLER_", default="TPE")),
        pruner=Pruner(_name(pb.Pruner.Name(message.pruner), "PRUNER_", default="NONE")),
        metric=message.metric,
        direction=Direction(asked) if (asked := _name(pb.Direction.Name(message.direction), "DIRECTION_")) else None,
        trials_max=message.trials_max,
        parallel_max=message.parallel_max,
        seed=message.seed,
        failures_max=message.failures_max,
    )


def uid(name: str) -> str:
    """The uid in "studies/{uid}"."""
    return name.removeprefix("studies/")


def study(value: Study) -> pb.Study:
    """A study as the contract shows it."""
    message = pb.Study(
        name=value.name,
        spec=_spec(value),
        state=pb.StudyState.Value(f"STUDY_STATE_{value.state}"),
        counts=pb.TrialCounts(
            running=value.counts.running,
            complete=value.counts.complete,
            pruned=value.counts.pruned,
            failed=value.counts.failed,
        ),
        model_version=value.model_version,
        error=value.error,
        create_time=convert.time(value.create_time),
        end_time=convert.time(value.end_time),
        creator=value.creator,
        last_sequence=value.last_sequence,
    )
    if value.best is not None:
        message.best_trial.CopyFrom(trial(value.best))
    return message


def trial(value: Trial) -> pb.Trial:
    """A trial as the contract shows it."""
    return pb.Trial(
        number=value.number,
        job=f"jobs/{value.job}" if value.job else "",
        state=pb.TrialState.Value(f"TRIAL_STATE_{value.state}"),
        hyperparameters=value.hyperparameters,
        value=value.value,
        epoch=value.epoch,
        create_time=convert.time(value.create_time),
        end_time=convert.time(value.end_time),
    )


def event(value: Event) -> pb.WatchStudyResponse:
    """One event of a study."""
    message = pb.WatchStudyResponse(sequence=value.sequence, time=convert.time(value.time))
    match value.body:
        case StudyChanged(study=Study() as changed):
            message.study.CopyFrom(study(changed))
        case TrialChanged(trial=Trial() as moved):
            message.trial.CopyFrom(trial(moved))
    return message


def trials_key(token: str) -> int:
    """The number after which a page of trials begins, -1 for the first page. Errors: InvalidInput."""
    if not token:
        return -1
    head, _, number = token.partition("-")
    if head != "after" or not (number.isascii() and number.isdigit()) or len(number) > 9:
        raise InvalidInput("page_token: not a token of this list; start without one", field="page_token")
    return int(number)


def trials_token(key: int | None) -> str:
    """The token of the page of trials that goes on after a number; empty for none."""
    return "" if key is None else f"after-{key}"


def _spec(known: Study) -> pb.StudySpec:
    """What was asked, with what the choices mean that were left open."""
    value = known.spec
    return pb.StudySpec(
        job=convert.spec_message(value.job),
        dimensions=[
            pb.SearchDimension(
                name=dimension.name,
                min_value=dimension.low,
                max_value=dimension.high,
                step=dimension.step,
                log_scale=dimension.log,
                values=dimension.values,
            )
            for dimension in value.dimensions
        ],
        sampler=pb.Sampler.Value(f"SAMPLER_{value.sampler}"),
        pruner=pb.Pruner.Value(f"PRUNER_{value.pruner}"),
        metric=known.metric,
        direction=pb.Direction.Value(f"DIRECTION_{known.direction}"),
        trials_max=value.trials_max,
        parallel_max=value.parallel_max,
        seed=value.seed,
        failures_max=value.failures_max,
    )


def _dimension(message: pb.SearchDimension) -> Dimension:
    return Dimension(
        name=message.name,
        low=message.min_value if message.HasField("min_value") else None,
        high=message.max_value if message.HasField("max_value") else None,
        step=message.step,
        log=message.log_scale,
        values=tuple(message.values),
    )


def _name(name: str, prefix: str, *, default: str = "") -> str:
    """An enum's value without its prefix; the default where it is not set."""
    short = name.removeprefix(prefix)
    return default if short == "UNSPECIFIED" else short
