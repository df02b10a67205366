"""Jobs, tasks and events as JSON documents: how the ledger keeps them and how trainers and service tell them. Pure.

Documents carry no version: a field added later gets a default, and migrations rewrite what that cannot express. A field
that was added to a spec later is left out while it has its default, so that old and new documents of the same spec are
the same text (request ids are compared by it).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import types
import typing
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

from mlmesh_training.backends.base import TrainingTask
from mlmesh_training.jobs import (
    Checkpoint,
    Evaluation,
    EventBody,
    Job,
    JobChanged,
    JobSpec,
    LogLine,
    Metrics,
    OptimizationResult,
    TrainedModel,
)
from mlmesh_training.options import Technique

Document = dict[str, Any]
_T = TypeVar("_T")
# Dataclasses of which several stand in the same place: their documents say which they are.
_TAGGED = typing.get_args(Technique)
_ADDED = ("priority", "resources", "distribution", "fit", "time_limit_s", "optimization", "labels")


def dumps(document: Mapping[str, Any]) -> str:
    """Canonical JSON: sorted keys, no spaces. Two equal documents are the same text."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def job_document(job: Job) -> Document:
    """A job as plain values."""
    return cast(Document, _plain(job))


def spec_document(spec: JobSpec) -> Document:
    """A spec as plain values."""
    return cast(Document, _plain(spec))


def task_document(task: TrainingTask) -> Document:
    """A task as plain values."""
    return cast(Document, _plain(task))


def model_document(model: TrainedModel) -> Document:
    """A trained model as plain values."""
    return cast(Document, _plain(model))


def evaluation_document(evaluation: Evaluation) -> Document:
    """An evaluation as plain values."""
    return cast(Document, _plain(evaluation))


def optimization_document(result: OptimizationResult) -> Document:
    """What an optimisation measured as plain values."""
    return cast(Document, _plain(result))


def read_job(document: Mapping[str, Any]) -> Job:
    """A job from its document. Errors: KeyError, TypeError, ValueError when it is not one."""
    return _read(Job, document)


def read_spec(document: Mapping[str, Any]) -> JobSpec:
    """A spec from its document."""
    return _read(JobSpec, document)


def read_task(document: Mapping[str, Any]) -> TrainingTask:
    """A task from its document. Errors: KeyError, TypeError, ValueError when it is not one."""
    return _read(TrainingTask, document)


def read_evaluation(document: Mapping[str, Any]) -> Evaluation:
    """An evaluation from its document."""
    return _read(Evaluation, document)


def read_optimization(document: Mapping[str, Any]) -> OptimizationResult:
    """What an optimisation measured from its document."""
    return _read(OptimizationResult, document)


def read_model(document: Mapping[str, Any]) -> TrainedModel:
    """A trained model from its document."""
    return _read(TrainedModel, document)


def body_document(body: EventBody) -> tuple[str, Document]:
    """An event's kind and its plain values."""
    match body:
        case JobChanged(job=Job() as job):
            return "job", job_document(job)
        case Metrics():
            return "metrics", _plain(body)
        case LogLine():
            return "log", _plain(body)
        case Checkpoint():
            return "checkpoint", _plain(body)
    raise ValueError("a change of a job without the job")


def read_body(kind: str, document: Mapping[str, Any]) -> EventBody:
    """An event from its kind and document. Errors: KeyError, TypeError, ValueError when it is not one."""
    match kind:
        case "job":
            return JobChanged(job=read_job(document))
        case "log":
            return _read(LogLine, document)
        case "metrics":
            return _read(Metrics, document)
        case "checkpoint":
            return _read(Checkpoint, document)
    raise ValueError(f"no event of kind {kind!r}")


def read_time(text: str) -> datetime:
    """A timestamp from its document; always UTC."""
    return datetime.fromisoformat(text).astimezone(UTC)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, JobSpec):
            fields = {name: item for name, item in fields.items() if name not in _ADDED or item != _defaults()[name]}
        return ({"kind": type(value).__name__} if isinstance(value, _TAGGED) else {}) | _items(fields)
    if isinstance(value, enum.StrEnum):
        return str(value)
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _items(fields: Mapping[str, Any]) -> Document:
    return {name: _plain(item) for name, item in fields.items()}


@functools.cache
def _defaults() -> Mapping[str, Any]:
    spec = JobSpec(recipe="", dataset="")
    return {name: getattr(spec, name) for name in _ADDED}


@functools.cache
def _fields(kind: Any) -> Mapping[str, Any]:
    """Types of a dataclass's fields, by name."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _read(kind: type[_T], document: Any) -> _T:
    """A dataclass from its document; every value is brought to the type of its field."""
    if not isinstance(document, Mapping):
        raise TypeError(f"{kind.__name__}: expected an object, got {type(document).__name__}")
    types_of = _fields(cast(Any, kind))
    return kind(**{name: _value(types_of[name], item) for name, item in document.items()})


def _value(kind: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in {types.UnionType, typing.Union}:
        return _one_of(arguments, value)
    if origin is tuple:
        return tuple(_value(arguments[0], item) for item in value)
    if origin is not None:
        return {str(key): _value(arguments[1], item) for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _read(cast(type[Any], kind), value)
    if kind is datetime:
        return read_time(value)
    if kind is str and not isinstance(value, str):
        raise TypeError(f"expected a string, got {type(value).__name__}")
    return kind(value)


def _one_of(kinds: tuple[Any, ...], value: Any) -> Any:
    """None where that is allowed; else the one dataclass, or the one of several that the document names."""
    if value is None and type(None) in kinds:
        return None
    present = [kind for kind in kinds if kind is not type(None)]
    if len(present) == 1:
        return _value(present[0], value)
    rest = dict(value)
    name = rest.pop("kind")
    for kind in present:
        if kind.__name__ == name:
            return _read(kind, rest)
    raise ValueError(f"no {' or '.join(kind.__name__ for kind in present)}: {name!r}")
