"""Whether a study can be done, and what its zeros and absences mean. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from types import MappingProxyType

from mlmesh_runtime.errors import FieldViolation, InvalidInput
from mlmesh_training import recipes, schedule
from mlmesh_training.options import direction_of
from mlmesh_training.schedule import Capacity
from mlmesh_training.studies import space
from mlmesh_training.studies.study import Sampler, Study, StudySpec, trials_in_all

METRIC_DEFAULT = "validation_accuracy"
METRIC_DEFAULT_REGRESSION = "validation_loss"
_EPOCHS = "epochs"


def accepted(spec: StudySpec, *, uid: str, creator: str, now: datetime, capacity: Capacity) -> Study:
    """A new study, resolved. Its data set is as asked: whoever knows the registry replaces an alias by its version.

    Args:
        capacity: what jobs may occupy; trials that never fit are refused.

    Errors: InvalidInput with reason UNKNOWN_RECIPE, UNKNOWN_DATASET, RESOURCES_TOO_LARGE or INVALID_FIELD; it names
    every field at fault.
    """
    resolved = _resolve(spec, {})
    try:
        schedule.check(spec.job, capacity)
    except InvalidInput as error:
        raise about_study(error, spec) from error
    recipe = recipes.known()[spec.job.recipe]
    known = {parameter.name: parameter for parameter in recipe.hyperparameters}
    axes = space.resolve(spec.dimensions, known, grid=spec.sampler is Sampler.GRID)
    # What a recipe forbids of several values together, it forbids at the ends of what is searched.
    ends = [_resolve(spec, corner) for corner in space.corners(axes)]
    regression = recipe.task is recipes.Task.REGRESSION
    metric = spec.metric or (METRIC_DEFAULT_REGRESSION if regression else METRIC_DEFAULT)
    return Study(
        uid=uid,
        spec=spec,
        axes=axes,
        metric=metric,
        direction=spec.direction or direction_of(metric),
        trials_max=trials_in_all(spec, axes),
        epochs_max=int(max(values.get(_EPOCHS, 1) for values in (resolved, *ends))),
        dataset=spec.job.dataset,
        create_time=now,
        creator=creator,
    )


def about_study(
    error: InvalidInput, spec: StudySpec, corner: Mapping[str, float] = MappingProxyType({})
) -> InvalidInput:
    """A complaint about a trial's job, as one about the study that would make it."""
    positions = {dimension.name: position for position, dimension in enumerate(spec.dimensions)}
    wrong = [_moved(violation, corner, positions) for violation in error.violations]
    text = "; ".join(f"{violation.field}: {violation.description}" for violation in wrong if len(wrong) > 1)
    field = wrong[0].field if wrong else ""
    return InvalidInput(
        text or error.message, field=field, reason=error.reason, violations=wrong, metadata=error.metadata
    )


def _resolve(spec: StudySpec, corner: Mapping[str, float]) -> Mapping[str, float]:
    """All hyperparameters of a trial at a corner of the space; without one those of the job as it was asked."""
    try:
        return recipes.resolve(replace(spec.job, hyperparameters={**spec.job.hyperparameters, **corner}))
    except InvalidInput as error:
        raise about_study(error, spec, corner) from error


def _moved(violation: FieldViolation, corner: Mapping[str, float], positions: Mapping[str, int]) -> FieldViolation:
    for name in corner:
        if violation.field == f"spec.hyperparameters[{name!r}]":
            return replace(violation, field=f"spec.dimensions[{positions[name]}]")
    return replace(violation, field=violation.field.replace("spec.", "spec.job.", 1))
