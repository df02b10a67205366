"""Jobs and events as JSON documents, the form in which the ledger keeps them and the trainer reports them. Pure.

Documents carry no version: a field added later gets a default, and migrations rewrite what that cannot express.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from mlmesh_training.jobs import (
    Checkpoint,
    Evaluation,
    EventBody,
    File,
    Job,
    JobChanged,
    JobPhase,
    JobSpec,
    JobState,
    LogLine,
    Metrics,
    Progress,
    Publication,
    Tensor,
    TrainedModel,
)

Document = dict[str, Any]


def dumps(document: Mapping[str, Any]) -> str:
    """Canonical JSON: sorted keys, no spaces. Two equal documents are the same text."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def job_document(job: Job) -> Document:
    """A job as plain values."""
    return _fields(job)


def spec_document(spec: JobSpec) -> Document:
    """A spec as plain values."""
    return _fields(spec)


def model_document(model: TrainedModel) -> Document:
    """A trained model as plain values."""
    return _fields(model)


def evaluation_document(evaluation: Evaluation) -> Document:
    """An evaluation as plain values."""
    return _fields(evaluation)


def read_job(document: Mapping[str, Any]) -> Job:
    """A job from its document. Errors: KeyError, TypeError, ValueError when it is not one."""
    values = dict(document)
    values["spec"] = read_spec(values["spec"])
    values["state"] = JobState(values["state"])
    values["phase"] = JobPhase(values["phase"])
    values["progress"] = Progress(**values["progress"])
    for name in ("create_time", "start_time", "end_time"):
        values[name] = None if values[name] is None else read_time(values[name])
    if values["evaluation"] is not None:
        values["evaluation"] = read_evaluation(values["evaluation"])
    if values["trained"] is not None:
        values["trained"] = read_model(values["trained"])
    return Job(**values)


def read_spec(document: Mapping[str, Any]) -> JobSpec:
    """A spec from its document."""
    values = dict(document)
    if values["publication"] is not None:
        publication = dict(values["publication"])
        publication["aliases"] = tuple(publication["aliases"])
        values["publication"] = Publication(**publication)
    return JobSpec(**values)


def read_evaluation(document: Mapping[str, Any]) -> Evaluation:
    """An evaluation from its document."""
    values = dict(document)
    values["labels"] = tuple(values["labels"])
    values["confusion"] = tuple(tuple(int(count) for count in row) for row in values["confusion"])
    return Evaluation(**values)


def read_model(document: Mapping[str, Any]) -> TrainedModel:
    """A trained model from its document."""
    values = dict(document)
    values["files"] = tuple(File(**file) for file in values["files"])
    for name in ("inputs", "outputs"):
        values[name] = tuple(
            Tensor(name=tensor["name"], datatype=tensor["datatype"], shape=tuple(tensor["shape"]))
            for tensor in values[name]
        )
    values["evaluation"] = read_evaluation(values["evaluation"])
    return TrainedModel(**values)


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
    values = dict(document)
    if kind == "job":
        return JobChanged(job=read_job(values))
    if kind == "log":
        return LogLine(severity=str(values["severity"]), message=str(values["message"]))
    progress = Progress(**values["progress"])
    if kind == "metrics":
        return Metrics(progress=progress, values={str(k): float(v) for k, v in values["values"].items()})
    if kind == "checkpoint":
        return Checkpoint(progress=progress, sha256=str(values["sha256"]))
    raise ValueError(f"no event of kind {kind!r}")


def read_time(text: str) -> datetime:
    """A timestamp from its document; always UTC."""
    return datetime.fromisoformat(text).astimezone(UTC)


def _fields(value: Any) -> Document:
    return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _fields(value)
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
