"""Jobs move only as the contract says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh.training.v1 import training_pb2
from mlmesh_runtime.errors import WrongState
from mlmesh_training import jobs, moves
from mlmesh_training.jobs import Checkpoint, Job, JobChanged, JobPhase, JobState, LogLine, Metrics, Progress
from mlmesh_training.moves import Decision
from tests.support.training import PUBLICATION, START, evaluation, job, model, spec

MOVES: dict[str, Callable[[Job, datetime], Decision]] = {
    "started": moves.started,
    "entered": lambda job, now: moves.entered(job, JobPhase.TRAINING),
    "measured": lambda job, now: moves.measured(job, Metrics(progress=Progress(step=1), values={"train_loss": 1.0})),
    "checkpointed": lambda job, now: moves.checkpointed(job, Checkpoint(progress=Progress(epoch=1), sha256="00")),
    "evaluated": lambda job, now: moves.evaluated(job, evaluation()),
    "trained": lambda job, now: moves.trained(job, model(), now),
    "registration_begun": lambda job, now: moves.registration_begun(job),
    "registered": lambda job, now: moves.registered(job, "models/digits/versions/1"),
    "succeeded": moves.succeeded,
    "failed": lambda job, now: moves.failed(job, "no", now),
    "process_died": lambda job, now: moves.process_died(job, "SIGKILL", now),
    "interrupted": moves.interrupted,
    "cancel_requested": moves.cancel_requested,
    "cancelled": moves.cancelled,
}


def test_states_and_phases_are_those_of_the_contract() -> None:
    states = {f"JOB_STATE_{state}" for state in JobState} | {"JOB_STATE_UNSPECIFIED"}
    phases = {f"JOB_PHASE_{phase or 'UNSPECIFIED'}" for phase in JobPhase}
    assert states == set(training_pb2.JobState.keys())
    assert phases == set(training_pb2.JobPhase.keys())
    assert set(jobs.LEGAL) == set(JobState)
    assert not jobs.LEGAL[JobState.SUCCEEDED]
    # Only RetryJob brings these back.
    assert jobs.LEGAL[JobState.FAILED] == jobs.LEGAL[JobState.CANCELLED] == {JobState.QUEUED}


@given(st.lists(st.sampled_from(sorted(MOVES)), max_size=30), st.booleans(), st.integers(-1, 3))
def test_whatever_happens_only_legal_moves_are_made(moves: list[str], publish: bool, retries: int) -> None:
    now = job(spec=spec(publication=PUBLICATION if publish else None, retries_max=retries))
    for move in moves:
        try:
            after, events = MOVES[move](now, START)
        except WrongState:
            continue
        assert after.state is now.state or after.state in jobs.LEGAL[now.state]
        # Every change of state or phase is told, and a final job is never touched again.
        assert (after.state, after.phase) == (now.state, now.phase) or JobChanged() in events
        if now.final:
            assert (after, events) == (now, ())
        assert (after.end_time is not None) == after.final
        assert after.phase is JobPhase.NONE or after.state in {JobState.RUNNING, JobState.CANCELLING}
        now = after
    assert now.failures <= now.spec.retries + 1
    assert now.attempts >= now.failures - 1 or moves


def running(**changes: Any) -> Job:
    now, _ = moves.started(job(**changes), START)
    return now


@pytest.mark.parametrize(("asked", "attempts"), [(0, 3), (-1, 1), (1, 2), (5, 6)])
def test_the_retry_budget_bounds_the_attempts(asked: int, attempts: int) -> None:
    now = job(spec=spec(retries_max=asked))
    while not now.final:
        now, _ = moves.started(now, START)
        now, _ = moves.process_died(now, "its process was ended by SIGKILL", START)
    assert now.state is JobState.FAILED
    assert now.attempts == attempts
    assert "SIGKILL" in now.error
    assert f"after {attempts} attempts" in now.error


def test_a_restart_of_the_service_costs_the_job_nothing_as_long_as_it_gets_on() -> None:
    now = job(spec=spec(retries_max=-1))
    for _ in range(3 * jobs.INTERRUPTIONS_MAX):
        now, _ = moves.started(now, START)
        now, _ = moves.checkpointed(now, Checkpoint(progress=Progress(epoch=1), sha256="00"))
        now, _ = moves.interrupted(now, START)
        assert now.state is JobState.RETRYING
    assert now.failures == 0


def test_a_job_that_always_takes_the_service_with_it_is_given_up() -> None:
    now = job()
    for _ in range(jobs.INTERRUPTIONS_MAX + 1):
        now, _ = moves.started(now, START)
        now, _ = moves.interrupted(now, START)
    assert now.state is JobState.FAILED
    assert "without a checkpoint" in now.error


def test_a_queued_or_retrying_job_is_cancelled_at_once_and_a_running_one_when_its_process_ended() -> None:
    assert moves.cancel_requested(job(), START)[0].state is JobState.CANCELLED
    retrying, _ = moves.process_died(running(), "x", START)
    assert moves.cancel_requested(retrying, START)[0].state is JobState.CANCELLED
    asked, _ = moves.cancel_requested(running(), START)
    assert asked.state is JobState.CANCELLING
    assert moves.cancel_requested(asked, START) == (asked, ())
    # However the process ends now, the job is cancelled.
    for ended in (
        moves.process_died(asked, "x", START),
        moves.failed(asked, "x", START),
        moves.interrupted(asked, START),
    ):
        assert ended[0].state is JobState.CANCELLED


def test_what_was_cancelled_stays_cancelled_and_what_ended_otherwise_cannot_be() -> None:
    cancelled, _ = moves.cancel_requested(job(), START)
    assert moves.cancel_requested(cancelled, START) == (cancelled, ())
    for ended in (moves.succeeded(running(), START)[0], moves.failed(running(), "x", START)[0]):
        with pytest.raises(WrongState) as raised:
            moves.cancel_requested(ended, START)
        assert raised.value.reason == "JOB_FINISHED"


def test_a_version_that_is_being_registered_is_not_cancelled_any_more() -> None:
    now, _ = moves.trained(running(spec=spec(publication=PUBLICATION)), model(), START)
    assert now.phase is JobPhase.PUBLISHING
    stopped, _ = moves.cancel_requested(now, START)
    with pytest.raises(WrongState, match="CANCELLING"):
        moves.registration_begun(stopped)
    begun, _ = moves.registration_begun(now)
    stopped, _ = moves.cancel_requested(begun, START)
    # The service restarts here, and still finishes what may exist already.
    stopped, _ = moves.interrupted(stopped, START)
    assert stopped.state is JobState.CANCELLING
    registered, _ = moves.registered(stopped, "models/digits/versions/4")
    assert moves.succeeded(registered, START)[0].state is JobState.SUCCEEDED


def test_without_a_publication_a_trained_job_has_succeeded() -> None:
    now, events = moves.trained(running(), model(), START)
    assert now.state is JobState.SUCCEEDED
    assert now.evaluation == evaluation()
    assert events == (JobChanged(),)


def test_a_restart_leaves_a_job_that_only_publishes_as_it_is() -> None:
    now, _ = moves.trained(running(spec=spec(publication=PUBLICATION)), model(), START)
    assert moves.interrupted(now, START) == (now, ())


@pytest.mark.parametrize("text", ["x" * 9000, "é" * 5000, "線" * 3000])
def test_long_lines_are_cut_on_a_character(text: str) -> None:
    line = moves.shortened(LogLine(severity="info", message=text))
    assert len(line.message.encode()) <= jobs.LOG_LINE_BYTES_MAX
    assert line.message[:-1] == text[: len(line.message) - 1]


def test_a_cancelled_job_hears_nothing_more_from_its_process() -> None:
    now = dataclasses.replace(job(), state=JobState.CANCELLED)
    assert moves.measured(now, Metrics(progress=Progress(step=9), values={})) == (now, ())
    assert moves.logged(now, LogLine(severity="info", message="late")) == (now, ())
