"""The runner sees every accepted job to its end, whatever fails on the way, and does nothing twice."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from mlmesh_runtime.errors import Denied, NotReady, WrongState
from mlmesh_training import moves
from mlmesh_training.backends.base import Died, Finished, Outcome, Report, Stopped, TrainingTask
from mlmesh_training.jobs import Checkpoint, Job, JobChanged, JobPhase, JobState, LogLine, Metrics, Progress
from mlmesh_training.patience import backoff_s
from tests.support.queues import Bench, RecordingPublisher, bench_in, last, states
from tests.support.training import PUBLICATION, ScriptedBackend, becomes, evaluation, finish, model, spec

Reporting = Callable[[Report], Awaitable[None]]
PUBLISHED = spec(publication=PUBLICATION)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench_in(tmp_path) as opened:
        yield opened


async def die(task: TrainingTask, report: Reporting, stop: asyncio.Event) -> Outcome:
    return Died(reason="its process was ended by SIGKILL")


async def until_stopped(task: TrainingTask, report: Reporting, stop: asyncio.Event) -> Outcome:
    await stop.wait()
    return Stopped()


async def test_a_job_goes_from_queued_to_published(bench: Bench) -> None:
    async def act(task: TrainingTask, report: Reporting, stop: asyncio.Event) -> Outcome:
        assert (task.recipe, task.dataset, task.seed, task.hyperparameters["epochs"]) == ("cnn", "digits", 7, 2.0)
        await report(JobPhase.LOADING_DATA)
        await report(JobPhase.TRAINING)
        await report(Metrics(progress=Progress(step=1, steps=2), values={"train_loss": 1.0}))
        await report(Checkpoint(progress=Progress(epoch=1, step=2, steps=2), sha256="00"))
        await report(LogLine(severity="info", message="hello"))
        await report(JobPhase.EVALUATING)
        await report(evaluation())
        return Finished(model=model())

    publisher, backend = RecordingPublisher(), ScriptedBackend(act)
    job = await bench.queue.create(PUBLISHED)
    async with bench.run(backend, publisher):
        events = await bench.end(job)
        await becomes(lambda: backend.discarded == [job.uid])
    assert states(events) == [
        "QUEUED",
        "RUNNING",
        "RUNNING:LOADING_DATA",
        "RUNNING:TRAINING",
        "RUNNING:EVALUATING",
        "RUNNING:EVALUATING",
        "RUNNING:PUBLISHING",
        "RUNNING:PUBLISHING",
        "SUCCEEDED",
    ]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert publisher.calls == ["upload", "register", "point"]
    done = last(events)
    assert (done.model_version, done.progress.step, done.attempts) == ("models/digits/versions/1", 2, 1)
    assert [(attempt.number, attempt.reason, attempt.charged) for attempt in done.history] == [(1, "", False)]


async def test_a_dead_process_is_retried_and_watchers_see_it(bench: Bench) -> None:
    job = await bench.queue.create(spec())
    async with bench.run(ScriptedBackend(die, finish)):
        events = await bench.end(job)
    assert states(events) == ["QUEUED", "RUNNING", "RETRYING", "RUNNING", "SUCCEEDED"]
    assert last(events).attempts == 2
    assert last(events).error == ""
    assert any(
        event.body == LogLine(severity="warning", message="its process was ended by SIGKILL") for event in events
    )


async def test_the_budget_ends(bench: Bench) -> None:
    backend = ScriptedBackend(die)
    job = await bench.queue.create(spec(retries_max=1))
    async with bench.run(backend):
        events = await bench.end(job)
    assert states(events)[-3:] == ["RETRYING", "RUNNING", "FAILED"]
    assert "SIGKILL" in last(events).error
    assert len(backend.attempts) == 2


async def test_what_cannot_get_better_is_not_retried(bench: Bench) -> None:
    async def diverge(task: TrainingTask, report: Reporting, stop: asyncio.Event) -> Outcome:
        return Died(reason="the loss became nan", permanent=True)

    backend = ScriptedBackend(diverge)
    job = await bench.queue.create(spec())
    async with bench.run(backend):
        events = await bench.end(job)
    assert (last(events).state, last(events).error) == (JobState.FAILED, "the loss became nan")
    assert len(backend.attempts) == 1


async def test_jobs_run_one_at_a_time_in_the_order_they_came(bench: Bench) -> None:
    backend = ScriptedBackend(finish)
    accepted = [await bench.queue.create(spec(seed=seed)) for seed in range(5)]
    async with bench.run(backend):
        for job in accepted:
            await bench.end(job)
    assert backend.attempts == [job.uid for job in accepted]
    assert backend.running_max == 1


async def test_more_at_a_time_where_it_is_allowed(bench: Bench) -> None:
    together = asyncio.Barrier(3)

    async def meet(task: TrainingTask, report: Reporting, stop: asyncio.Event) -> Outcome:
        await together.wait()
        return Finished(model=model())

    backend = ScriptedBackend(meet)
    accepted = [await bench.queue.create(spec(seed=seed)) for seed in range(6)]
    bench.queue.capacity = dataclasses.replace(bench.queue.capacity, jobs_max=3)
    async with bench.run(backend):
        for job in accepted:
            await bench.end(job)
    assert backend.running_max == 3


async def test_cancelling_a_running_job_ends_its_process_first(bench: Bench) -> None:
    begun = asyncio.Event()

    async def act(task: TrainingTask, report: Reporting, stop: asyncio.Event) -> Outcome:
        begun.set()
        return await until_stopped(task, report, stop)

    backend = ScriptedBackend(act)
    job = await bench.queue.create(spec())
    async with bench.run(backend):
        await begun.wait()
        assert (await bench.queue.cancel(job.uid)).state is JobState.CANCELLING
        events = await bench.end(job)
        assert backend.running == 0
    assert states(events)[-2:] == ["CANCELLING", "CANCELLED"]
    # Its checkpoints are kept for a while: it may be retried.
    assert backend.discarded == []
    assert [attempt.reason for attempt in last(events).history] == ["cancelled on request"]


async def test_a_waiting_job_is_cancelled_without_running(bench: Bench) -> None:
    backend = ScriptedBackend(until_stopped, finish)
    first, second = [await bench.queue.create(spec(seed=seed)) for seed in range(2)]
    async with bench.run(backend):
        assert (await bench.queue.cancel(second.uid)).state is JobState.CANCELLED
        await bench.queue.cancel(first.uid)
        await bench.end(first)
    assert second.uid not in backend.attempts


async def test_cancelling_while_it_waits_for_a_retry(bench: Bench) -> None:
    job = await bench.queue.create(spec())
    backend = ScriptedBackend(die)
    async with bench.run(backend, retry_s=1000.0):
        async for event in bench.queue.watch(job.uid):
            if isinstance(event.body, JobChanged) and event.body.job and event.body.job.state is JobState.RETRYING:
                await bench.queue.cancel(job.uid)
        # The slot is free at once, long before the retry was due.
        other = await bench.queue.create(spec(retries_max=-1))
        assert last(await bench.end(other)).state is JobState.FAILED
    assert len(backend.attempts) == 2


async def test_a_registry_that_is_away_for_a_while_costs_nothing(bench: Bench) -> None:
    away = NotReady("connection refused")
    publisher = RecordingPublisher(("upload", away), ("upload", away), ("register", away), ("point", away))
    backend = ScriptedBackend(finish)
    job = await bench.queue.create(PUBLISHED)
    async with bench.run(backend, publisher):
        events = await bench.end(job)
    assert last(events).state is JobState.SUCCEEDED
    assert len(backend.attempts) == 1
    assert publisher.calls == [
        *("upload", "upload", "upload", "register"),
        *("upload", "register", "point"),
        # The version is there: its bytes are no longer needed.
        "point",
    ]


async def test_what_the_registry_refuses_is_the_jobs_end(bench: Bench) -> None:
    publisher = RecordingPublisher(("upload", Denied("training may not write")))
    job = await bench.queue.create(PUBLISHED)
    async with bench.run(ScriptedBackend(finish), publisher):
        events = await bench.end(job)
    assert last(events).state is JobState.FAILED
    assert "training may not write" in last(events).error
    assert publisher.calls == ["upload"]


async def test_a_registry_that_stays_away_is_given_up_in_the_end(bench: Bench) -> None:
    publisher = RecordingPublisher(*[("upload", NotReady("no"))] * 1000)
    job = await bench.queue.create(PUBLISHED)
    async with bench.run(ScriptedBackend(finish), publisher, publish_s=0.05):
        events = await bench.end(job)
    assert last(events).state is JobState.FAILED
    assert "models/digits" in last(events).error


async def test_missing_bytes_are_sent_again(bench: Bench) -> None:
    publisher = RecordingPublisher(("register", WrongState("blob is gone", reason="BLOB_NOT_FOUND")))
    job = await bench.queue.create(PUBLISHED)
    async with bench.run(ScriptedBackend(finish), publisher):
        assert last(await bench.end(job)).state is JobState.SUCCEEDED
    assert publisher.calls == ["upload", "register", "upload", "register", "point"]


async def test_publishing_lets_the_next_job_train(bench: Bench) -> None:
    publisher = RecordingPublisher()
    publisher.gate["upload"] = asyncio.Event()
    publishing = await bench.queue.create(PUBLISHED)
    training = await bench.queue.create(spec())
    async with bench.run(ScriptedBackend(finish), publisher):
        await bench.end(training)
        assert (await bench.queue.get(publishing.uid)).phase is JobPhase.PUBLISHING
        publisher.gate["upload"].set()
        await bench.end(publishing)


@pytest.mark.parametrize(("step", "state"), [("upload", JobState.CANCELLED), ("register", JobState.SUCCEEDED)])
async def test_cancelling_while_it_publishes(bench: Bench, step: str, state: JobState) -> None:
    publisher = RecordingPublisher()
    publisher.gate[step] = asyncio.Event()
    job = await bench.queue.create(PUBLISHED)
    async with bench.run(ScriptedBackend(finish), publisher):
        await publisher.reached.wait()
        assert (await bench.queue.cancel(job.uid)).state is JobState.CANCELLING
        publisher.gate[step].set()
        events = await bench.end(job)
    assert last(events).state is state
    assert ("point" in publisher.calls) == (state is JobState.SUCCEEDED)


@pytest.mark.parametrize("step", ["upload", "register", "point"])
async def test_a_service_that_ends_while_it_publishes_goes_on_after_its_restart(bench: Bench, step: str) -> None:
    first = RecordingPublisher()
    first.gate[step] = asyncio.Event()
    job = await bench.queue.create(PUBLISHED)
    async with bench.run(ScriptedBackend(finish), first):
        await first.reached.wait()
    second, backend = RecordingPublisher(), ScriptedBackend(finish)
    async with bench.run(backend, second):
        events = await bench.end(job)
    assert last(events).state is JobState.SUCCEEDED
    # Training is not repeated, the version is asked for with the same request.
    assert backend.attempts == []
    assert states(events).count("SUCCEEDED") == 1


async def test_a_service_that_ends_while_it_trains_goes_on_after_its_restart(bench: Bench) -> None:
    begun = asyncio.Event()

    async def act(task: TrainingTask, report: Reporting, stop: asyncio.Event) -> Outcome:
        begun.set()
        return await until_stopped(task, report, stop)

    running, queued = [await bench.queue.create(spec(seed=seed, retries_max=-1)) for seed in range(2)]
    backend = ScriptedBackend(act)
    async with bench.run(backend):
        await begun.wait()
    assert backend.running == 0
    backend = ScriptedBackend(finish)
    async with bench.run(backend):
        events = await bench.end(running)
        await bench.end(queued)
    assert states(events) == ["QUEUED", "RUNNING", "RETRYING", "RUNNING", "SUCCEEDED"]
    assert backend.attempts == [running.uid, queued.uid]


async def test_a_service_that_ends_while_it_cancels_has_cancelled_after_its_restart(bench: Bench) -> None:
    job = await bench.queue.create(spec())
    await bench.queue.change(job.uid, moves.started)
    await bench.queue.cancel(job.uid)
    backend = ScriptedBackend(finish)
    async with bench.run(backend):
        assert last(await bench.end(job)).state is JobState.CANCELLED
    assert backend.attempts == []


async def test_trouble_with_the_ledger_does_not_stop_the_runner(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change = bench.queue.change
    troubles = iter([NotReady("the disk is full")])

    async def act(task: TrainingTask, report: Reporting, stop: asyncio.Event) -> Outcome:
        await report(JobPhase.TRAINING)
        return Finished(model=model())

    async def troubled(uid: str, decide: Callable[..., moves.Decision]) -> Job:
        if (await bench.queue.get(uid)).state is JobState.RUNNING and (trouble := next(troubles, None)):
            raise trouble
        return await change(uid, decide)

    monkeypatch.setattr(bench.queue, "change", troubled)
    job = await bench.queue.create(spec(retries_max=-1))
    async with bench.run(ScriptedBackend(act)):
        events = await bench.end(job)
    assert states(events) == ["QUEUED", "RUNNING", "RETRYING", "RUNNING", "RUNNING:TRAINING", "SUCCEEDED"]
    assert "cut off" in caplog.text


def test_backoff_doubles_up_to_a_bound() -> None:
    assert [backoff_s(1.0, failures) for failures in (0, 1, 2, 10, 10_000)] == [1.0, 2.0, 4.0, 30.0, 30.0]
