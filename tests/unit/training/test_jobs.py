"""Jobs move only as the contract says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh.training.v1 import training_pb2
from mlmesh_runtime.errors import Conflict, WrongState
from mlmesh_training import jobs, moves
from mlmesh_training.jobs import Checkpoint, Job, JobChanged, JobPhase, JobState, LogLine, Metrics, Progress
from mlmesh_training.moves import Decision
from tests.support.training import PUBLICATION, START, evaluation, job, model, optimization, spec

LATER = START + timedelta(seconds=90)

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
    "failed_charged": lambda job, now: moves.failed(job, "no", now, charged=True),
    "time_ran_out": lambda job, now: moves.time_ran_out(moves.ran(job, job.run_s + 1), 1.0, now),
    "publishing_resumed": lambda job, now: moves.publishing_resumed(job),
    "optimized": lambda job, now: moves.optimized(job, optimization()),
    "pause_requested": moves.pause_requested,
    "paused": moves.paused,
    "resume_requested": moves.resume_requested,
    "retry_requested": moves.retry_requested,
    "files_dropped": lambda job, now: moves.files_dropped(job),
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
        except (WrongState, Conflict):
            continue
        assert after.state is now.state or after.state in jobs.LEGAL[now.state]
        # Every change of state or phase is told, and a final job is touched again by RetryJob alone.
        assert (after.state, after.phase) == (now.state, now.phase) or JobChanged() in events
        if now.final and move != "retry_requested":
            assert (dataclasses.replace(after, files=now.files), events) == (now, ())
        assert (after.end_time is not None) == after.final
        assert after.phase is JobPhase.NONE or after.state in {
            JobState.RUNNING,
            JobState.CANCELLING,
            JobState.PAUSING,
        }
        # An attempt that has begun is one that runs, or stands in the history; nothing runs while it waits or rests.
        running = after.attempt_time is not None
        assert len(after.history) + running == min(after.attempts, jobs.ATTEMPTS_KEPT + running)
        assert not running or after.state in {JobState.RUNNING, JobState.CANCELLING, JobState.PAUSING}
        assert [attempt.number for attempt in after.history] == sorted({attempt.number for attempt in after.history})
        assert after.run_s >= now.run_s
        now = after
        assert now.failures <= now.spec.retries + 1


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


def trained_and_publishing(**changes: Any) -> Job:
    now, _ = moves.trained(running(spec=spec(publication=PUBLICATION), **changes), model(), START)
    return now


def test_a_job_that_does_not_run_is_paused_at_once_and_a_running_one_when_its_process_ended() -> None:
    assert moves.pause_requested(job(), START)[0].state is JobState.PAUSED
    retrying, _ = moves.process_died(running(), "x", START)
    assert moves.pause_requested(retrying, START)[0].state is JobState.PAUSED
    asked, _ = moves.pause_requested(running(), START)
    assert asked.state is JobState.PAUSING
    assert moves.pause_requested(asked, START) == (asked, ())
    paused, _ = moves.paused(asked, LATER)
    assert paused.state is JobState.PAUSED
    assert moves.pause_requested(paused, START) == (paused, ())
    assert paused.failures == 0
    (attempt,) = paused.history
    assert (attempt.reason, attempt.charged, attempt.start_time, attempt.end_time) == (
        "paused on request",
        False,
        START,
        LATER,
    )


def test_a_paused_job_goes_back_into_the_queue_and_what_is_not_paused_says_so() -> None:
    asked, _ = moves.pause_requested(running(), START)
    with pytest.raises(Conflict) as raised:
        moves.resume_requested(asked, START)
    assert raised.value.reason == "JOB_NOT_PAUSED"
    paused, _ = moves.paused(asked, START)
    resumed, _ = moves.resume_requested(paused, START)
    assert resumed.state is JobState.QUEUED
    for same in (resumed, running(), moves.process_died(running(), "x", START)[0]):
        assert moves.resume_requested(same, START) == (same, ())
    for ended in (moves.succeeded(running(), START)[0], moves.cancel_requested(running(), START)[0]):
        for ask in (moves.resume_requested, moves.pause_requested):
            with pytest.raises(WrongState) as refused:
                ask(ended, START)
            assert refused.value.reason == "JOB_FINISHED"


def test_a_cancellation_overtakes_a_pause() -> None:
    pausing, _ = moves.pause_requested(running(), START)
    asked, _ = moves.cancel_requested(pausing, START)
    assert asked.state is JobState.CANCELLING
    assert moves.paused(asked, START)[0].state is JobState.CANCELLED
    paused, _ = moves.paused(pausing, START)
    assert moves.cancel_requested(paused, START)[0].state is JobState.CANCELLED


def test_however_an_attempt_ends_that_was_to_pause_its_job_is_paused_or_ended() -> None:
    pausing, _ = moves.pause_requested(running(), START)
    died, _ = moves.process_died(pausing, "SIGKILL", START)
    assert (died.state, died.failures, died.error) == (JobState.PAUSED, 1, "SIGKILL")
    assert moves.interrupted(pausing, START)[0].state is JobState.PAUSED
    assert moves.failed(pausing, "nan", START, charged=True)[0].state is JobState.FAILED
    assert moves.trained(pausing, model(), START)[0].state is JobState.SUCCEEDED
    last_try, _ = moves.pause_requested(running(spec=spec(retries_max=-1)), START)
    assert moves.process_died(last_try, "x", START)[0].state is JobState.FAILED


def test_a_job_that_is_to_pause_when_it_has_trained_publishes_after_it_is_resumed() -> None:
    pausing, _ = moves.pause_requested(running(spec=spec(publication=PUBLICATION)), START)
    paused, _ = moves.trained(pausing, model(), START)
    assert (paused.state, paused.trained) == (JobState.PAUSED, model())
    queued, _ = moves.resume_requested(paused, START)
    again, _ = moves.publishing_resumed(queued)
    assert (again.state, again.phase, again.attempts) == (JobState.RUNNING, JobPhase.PUBLISHING, 1)


def test_a_version_that_is_being_registered_is_not_paused_any_more() -> None:
    begun, _ = moves.registration_begun(trained_and_publishing())
    pausing, _ = moves.pause_requested(begun, START)
    # The service restarts here, and still finishes what may exist already.
    assert moves.interrupted(pausing, START) == (pausing, ())
    assert moves.succeeded(pausing, START)[0].state is JobState.SUCCEEDED
    stopped, _ = moves.pause_requested(trained_and_publishing(), START)
    with pytest.raises(WrongState, match="PAUSING"):
        moves.registration_begun(stopped)


def test_a_retry_gives_a_fresh_budget_and_keeps_the_history() -> None:
    now = job(spec=spec(retries_max=1))
    for _ in range(2):
        now, _ = moves.started(now, START)
        now, _ = moves.process_died(moves.ran(now, now.run_s + 5), "SIGKILL", START)
    assert now.state is JobState.FAILED
    again, events = moves.retry_requested(now, START)
    assert (again.state, again.failures, again.attempts, again.error, again.end_time) == (
        *(JobState.QUEUED, 0, 2, ""),
        None,
    )
    assert (again.run_s, again.spared_s) == (10.0, 10.0)
    assert [attempt.charged for attempt in again.history] == [True, True]
    assert JobChanged() in events
    assert moves.retry_requested(again, START) == (again, ())
    again, _ = moves.started(again, START)
    assert moves.process_died(again, "x", START)[0].state is JobState.RETRYING


def test_a_retry_keeps_what_was_trained_for_as_long_as_its_files_are_there() -> None:
    failed, _ = moves.failed(trained_and_publishing(), "denied", START)
    assert moves.retry_requested(failed, START)[0].trained == model()
    bare, _ = moves.files_dropped(failed)
    again, _ = moves.retry_requested(bare, START)
    assert (again.trained, again.registering, again.evaluation, again.generation) == (None, False, None, 1)
    # A version that is registered stays, also without files: only its aliases are left to move.
    known = dataclasses.replace(bare, model_version="models/digits/versions/1")
    assert moves.retry_requested(known, START)[0].trained == model()


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (moves.succeeded(running(), START)[0], "JOB_NOT_RETRYABLE"),
        (moves.pause_requested(running(), START)[0], "JOB_NOT_RETRYABLE"),
        (moves.pause_requested(job(), START)[0], "JOB_NOT_RETRYABLE"),
        (moves.cancel_requested(running(), START)[0], "JOB_NOT_FINISHED"),
    ],
    ids=["succeeded", "pausing", "paused", "cancelling"],
)
def test_what_cannot_be_retried_says_so(now: Job, reason: str) -> None:
    with pytest.raises(WrongState) as raised:
        moves.retry_requested(now, START)
    assert raised.value.reason == reason


def test_only_what_has_ended_is_deleted_and_loses_its_files() -> None:
    for now in (job(), running(), moves.pause_requested(job(), START)[0]):
        with pytest.raises(WrongState) as raised:
            moves.deletable(now)
        assert raised.value.reason == "JOB_NOT_FINISHED"
        assert moves.files_dropped(now) == (now, ())
    moves.deletable(moves.cancel_requested(job(), START)[0])


def test_an_attempt_of_which_nobody_saw_the_end_ends_where_it_was_last_noted() -> None:
    now = moves.ran(running(), 3.5)
    assert now.run_s == 3.5
    assert moves.ran(now, 1.0) == now
    after, _ = moves.interrupted(now, START + timedelta(days=9))
    assert after.history[-1].end_time == START + timedelta(seconds=3.5)
    # The clock was set back meanwhile: an attempt does not end before it began.
    after, _ = moves.interrupted(now, START - timedelta(days=9))
    assert after.history[-1].end_time == START


def test_a_job_beyond_its_time_fails_and_says_so() -> None:
    late, _ = moves.time_ran_out(moves.ran(running(), 60.2), 60.0, START)
    assert (late.state, late.failures) == (JobState.FAILED, 0)
    assert late.error == "its attempts ran for 60 s, its time limit is 60 s"
    assert late.history[-1].reason == late.error


def test_the_last_hundred_attempts_are_kept() -> None:
    now = job(spec=spec(retries_max=100))
    for _ in range(3):
        while not now.final:
            now, _ = moves.started(now, START)
            now, _ = moves.process_died(now, "x", START)
        now, _ = moves.retry_requested(now, START)
    assert now.attempts == 303
    assert [attempt.number for attempt in now.history] == list(range(204, 304))
