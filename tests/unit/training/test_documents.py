"""What the ledger and the pipe carry comes back as it was."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_training import documents
from mlmesh_training.backends.base import Died
from mlmesh_training.backends.lines import LineSplitter
from mlmesh_training.backends.reports import read_report, report_line
from mlmesh_training.jobs import (
    Checkpoint,
    EventBody,
    JobChanged,
    JobPhase,
    JobState,
    LogLine,
    Metrics,
    Progress,
)
from tests.support.training import PUBLICATION, START, evaluation, job, model, spec

FULL = dataclasses.replace(
    job(spec=spec(publication=PUBLICATION)),
    state=JobState.RUNNING,
    phase=JobPhase.PUBLISHING,
    progress=Progress(epoch=1, epochs=2, step=3, steps=4),
    evaluation=evaluation(),
    trained=model(),
    registering=True,
    start_time=START,
    creator="spiffe://cluster.local/ns/mlmesh/sa/operator",
)
BODIES: list[EventBody] = [
    JobChanged(job=FULL),
    Metrics(progress=Progress(step=1, steps=2), values={"train_loss": 0.1, "learning_rate": 1e-9}),
    LogLine(severity="error", message="a\nb \u2028 \x00"),
    Checkpoint(progress=Progress(epoch=1), sha256="ab"),
]


@pytest.mark.parametrize("value", [job(), FULL])
def test_jobs_come_back(value: object) -> None:
    text = documents.dumps(documents.job_document(value))  # type: ignore[arg-type]
    assert documents.read_job(json.loads(text)) == value


@pytest.mark.parametrize("body", BODIES)
def test_events_come_back(body: EventBody) -> None:
    kind, document = documents.body_document(body)
    assert documents.read_body(kind, json.loads(documents.dumps(document))) == body


@pytest.mark.parametrize(
    "report", [JobPhase.TRAINING, *BODIES[1:], evaluation(), Died(reason="x", permanent=True)], ids=str
)
def test_reports_come_back_on_one_line(report: object) -> None:
    line = report_line(report)  # type: ignore[arg-type]
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert read_report(line) == report


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"kind":"phase","value":{"phase":"DANCING"}}',
        b'{"kind":"job","value":{}}',
        b'{"kind":"metrics","value":{"progress":{"epoch":1,"x":2},"values":{}}}',
        b'{"kind":"metrics","value":{"progress":{},"values":{"a":"b"}}}',
        b'{"kind":"evaluation","value":{}}',
    ],
)
def test_what_is_no_report_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a report"):
        read_report(line)


@given(st.binary(max_size=300), st.lists(st.integers(1, 40), max_size=30))
def test_lines_do_not_depend_on_how_the_bytes_arrive(data: bytes, sizes: list[int]) -> None:
    splitter = LineSplitter(1000)
    found, at = [], 0
    for size in [*sizes, len(data) + 1]:
        found += list(splitter.feed(data[at : at + size]))
        at += size
    found += list(splitter.end())
    expected = data.split(b"\n")
    if expected[-1] == b"":
        expected.pop()
    assert found == [line.removesuffix(b"\r") for line in expected]


def test_a_line_without_end_is_cut_and_its_rest_dropped() -> None:
    splitter = LineSplitter(10)
    lines = [line for _ in range(100) for line in splitter.feed(b"x" * 999)]
    assert not lines
    assert list(splitter.feed(b"x\nnext\n")) == [b"x" * 10, b"next"]
