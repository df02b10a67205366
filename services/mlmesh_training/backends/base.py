"""The port between the service and the place where a job's training runs. Pure values."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from mlmesh_training import documents
from mlmesh_training.jobs import Checkpoint, Evaluation, JobPhase, LogLine, Metrics, TrainedModel

TASK_FILE = "task.json"
"""In a job's folder: what to train."""
RESULT_FILE = "result.json"
"""In a job's folder: what training left. It is written last and whole; where it is, training is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTask:
    """What to train. The same task always gives the same model; `uid` names the place that outlives an attempt."""

    uid: str
    recipe: str
    dataset: str
    hyperparameters: Mapping[str, float]
    seed: int


Report = JobPhase | Metrics | LogLine | Checkpoint | Evaluation
"""What training tells while it runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Training left a model."""

    model: TrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Died:
    """The attempt ended without a model. `permanent`: the same task would end in the same way again."""

    reason: str
    permanent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """The attempt ended because it was asked to."""


Outcome = Finished | Died | Stopped


class Backend(Protocol):
    """A place where training runs."""

    async def run(
        self, task: TrainingTask, *, report: Callable[[Report], Awaitable[None]], stop: asyncio.Event
    ) -> Outcome:
        """Run one attempt, from the last complete checkpoint, to its end.

        `report` is awaited for each report, in order. Once `stop` is set the attempt is ended. When this returns,
        raises or is cancelled, nothing of the attempt runs any more.
        """
        ...

    async def discard(self, uid: str) -> None:
        """Throw away all that is kept of a task: checkpoints and model. Idempotent."""
        ...


def report_line(report: Report | Died) -> bytes:
    """A report as one line of JSON, newline included."""
    kind: str
    document: documents.Document
    match report:
        case JobPhase():
            kind, document = "phase", {"phase": str(report)}
        case Evaluation():
            kind, document = "evaluation", documents.evaluation_document(report)
        case Died():
            kind, document = "died", {"reason": report.reason, "permanent": report.permanent}
        case _:
            kind, document = documents.body_document(report)
    return documents.dumps({"kind": kind, "value": document}).encode() + b"\n"


def read_report(line: bytes) -> Report | Died:
    """A report from its line. Errors: ValueError when it is not one."""
    try:
        message = json.loads(line)
        kind, value = message["kind"], message["value"]
        if kind == "phase":
            return JobPhase(value["phase"])
        if kind == "evaluation":
            return documents.read_evaluation(value)
        if kind == "died":
            return Died(reason=str(value["reason"]), permanent=bool(value["permanent"]))
        body = documents.read_body(kind, value)
        if isinstance(body, Metrics | LogLine | Checkpoint):
            return body
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"not a report: {error!r}") from error
    raise ValueError("not a report")
