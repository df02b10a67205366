"""Reports as the lines that a training process writes. Pure."""

from __future__ import annotations

import json

from mlmesh_training import documents
from mlmesh_training.backends.base import Died, Report
from mlmesh_training.jobs import Checkpoint, Evaluation, JobPhase, LogLine, Metrics, OptimizationResult


def report_line(report: Report | Died) -> bytes:
    """A report as one line of JSON, newline included."""
    kind: str
    document: documents.Document
    match report:
        case JobPhase():
            kind, document = "phase", {"phase": str(report)}
        case Evaluation():
            kind, document = "evaluation", documents.evaluation_document(report)
        case OptimizationResult():
            kind, document = "optimization", documents.optimization_document(report)
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
        if kind == "optimization":
            return documents.read_optimization(value)
        if kind == "died":
            return Died(reason=str(value["reason"]), permanent=bool(value["permanent"]))
        body = documents.read_body(kind, value)
        if isinstance(body, Metrics | LogLine | Checkpoint):
            return body
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"not a report: {error!r}") from error
    raise ValueError("not a report")
