"""Jobs are paused, resumed, retried and deleted while the runner works, and every race has one outcome."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import pytest

from mlmesh_runtime.errors import Denied, InvalidInput, MeshError, NotFound, NotReady, WrongState
from mlmesh_training import moves
from mlmesh_training.backends.base import Died, Finished, Outcome, Paused, Report, Stopped, TrainingTask
from mlmesh_training.jobs import Checkpoint, Job, JobPhase, JobState, Progress
from mlmesh_training.options import MixedPrecision, Optimization, Resources
from mlmesh_training.ports import NamedOnly
from mlmesh_training.queue import JobQueue
from mlmesh_training.retention import RetentionLimits
from mlmesh_training.schedule import Capacity
from tests.support.queues import Bench, RecordingPublisher, bench_in, last, states
from tests.support.training import PUBLICATION, ScriptedBackend, becomes, finish, model, spec

Reporting = Callable[[Report], Awaitable[None]]
PUBLISHED = spec(publication=PUBLICATION)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench_in(tmp_path) as opened:
        yield opened


class Trainer(ScriptedBackend):
    """Trains until it is told how to end; pauses when it is asked to."""

    def __init__(self) -> None:
        super().__init__(self._act)
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()

    async def _act(self, task: TrainingTask, report: Reporting, stop: asyncio.Event) -> Outcome:
        await report(JobPhase.TRAINING)
        self.begun.set()
        pause = self.pauses[task.uid]
        events = [asyncio.ensure_future(event.wait()) for event in (stop, pause, self.go_on)]
        try:
            await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for event in events:
                event.cancel()
        if stop.is_set():
            return Stopped()
        if pause.is_set():
            await report(Checkpoint(progress=Progress(epoch=1, step=5), sha256="ab"))
            return Paused()
        return Finished(model=model())


async def test_a_paused_job_gives_its_place_to_the_next_and_goes_on_when_it_is_resumed(bench: Bench) -> None:
    trainer = Trainer()
    first = await bench.queue.create(spec())
    async with bench.run(trainer):
        await trainer.begun.wait()
        assert (await bench.queue.pause(first.uid)).state is JobState.PAUSING
        paused = await bench.reaches(first, JobState.PAUSED)
        assert (paused.attempts, paused.progress.step) == (1, 5)
        trainer.go_on.set()
        second = await bench.queue.create(spec(seed=8))
        await bench.end(second)
        assert (await bench.queue.get(first.uid)).state is JobState.PAUSED
        assert (await bench.queue.resume(first.uid)).state is JobState.QUEUED
        events = await bench.end(first)
    assert states(events) == [
        *("QUEUED", "RUNNING", "RUNNING:TRAINING", "PAUSING:TRAINING", "PAUSED"),
        *("QUEUED", "RUNNING", "RUNNING:TRAINING", "SUCCEEDED"),
    ]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert trainer.attempts == [first.uid, second.uid, first.uid]
    assert [task.attempt for task in trainer.tasks if task.uid == first.uid] == [1, 2]
    assert [(a.number, a.reason, a.charged) for a in last(events).history] == [
        (1, "paused on request", False),
        (2, "", False),
    ]


async def test_a_waiting_job_is_paused_without_running(bench: Bench) -> None:
    trainer = Trainer()
    first, second = [await bench.queue.create(spec(seed=seed)) for seed in range(2)]
    async with bench.run(trainer):
        await trainer.begun.wait()
        assert (await bench.queue.pause(second.uid)).state is JobState.PAUSED
        trainer.go_on.set()
        await bench.end(first)
        assert trainer.attempts == [first.uid]
        await bench.queue.resume(second.uid)
        await bench.end(second)


async def test_a_cancellation_while_it_pauses_ends_it(bench: Bench) -> None:
    async def stubborn(task: TrainingTask, report: Reporting, stop: asyncio.Event) -> Outcome:
        await backend.pauses[task.uid].wait()
        await bench.queue.cancel(task.uid)
        await stop.wait()
        return Stopped()

    backend = ScriptedBackend(stubborn)
    job = await bench.queue.create(spec())
    async with bench.run(backend):
        await bench.reaches(job, JobState.RUNNING)
        await bench.queue.pause(job.uid)
        events = await bench.end(job)
    assert states(events)[-3:] == ["PAUSING", "CANCELLING", "CANCELLED"]


async def test_a_pause_while_it_waits_for_a_retry_frees_its_place_at_once(bench: Bench) -> None:
    async def die(task: TrainingTask, report: Reporting, stop: asyncio.Event) -> Outcome:
        return Died(reason="SIGKILL")

    job = await bench.queue.create(spec())
    async with bench.run(ScriptedBackend(die, finish), retry_s=1000.0):
        await bench.reaches(job, JobState.RETRYING)
        assert (await bench.queue.pause(job.uid)).state is JobState.PAUSED
        await bench.end(await bench.queue.create(spec(seed=8)))


@pytest.mark.parametrize(("step", "state"), [("upload", JobState.PAUSED), ("register", JobState.SUCCEEDED)])
async def test_a_pause_while_it_publishes(bench: Bench, step: str, state: JobState) -> None:
    publisher = RecordingPublisher()
    publisher.gate[step] = asyncio.Event()
    backend = ScriptedBackend(finish)
    job = await bench.queue.create(PUBLISHED)
    async with bench.run(backend, publisher):
        await publisher.reached.wait()
        assert (await bench.queue.pause(job.uid)).state is JobState.PAUSING
        if step == "register":
            publisher.gate[step].set()
        await bench.reaches(job, state)
        if state is JobState.PAUSED:
            publisher.gate.clear()
            await bench.queue.resume(job.uid)
            events = await bench.end(job)
            # What was trained is not trained again; publishing is no attempt.
            assert states(events)[-4:] == ["QUEUED", *["RUNNING:PUBLISHING"] * 2, "SUCCEEDED"]
            assert last(events).attempts == 1
    assert backend.attempts == [job.uid]


async def test_a_service_that_ends_while_a_job_pauses_has_paused_it_after_its_restart(bench: Bench) -> None:
    job = await bench.queue.create(spec())
    await bench.queue.change(job.uid, moves.started)
    await bench.queue.pause(job.uid)
    backend = ScriptedBackend(finish)
    async with bench.run(backend):
        await bench.reaches(job, JobState.PAUSED)
        assert backend.attempts == []
        await bench.queue.resume(job.uid)
        await bench.end(job)
    assert backend.attempts == [job.uid]


async def test_a_failed_job_is_retried_on_the_same_history(bench: Bench) -> None:
    async def diverge(task: TrainingTask, report: Reporting, stop: asyncio.Event) -> Outcome:
        return Died(reason="the loss became nan", permanent=True)

    backend = ScriptedBackend(diverge, finish)
    job = await bench.queue.create(spec())
    async with bench.run(backend):
        first = await bench.end(job)
        assert last(first).state is JobState.FAILED
        # Its checkpoints were kept.
        assert backend.discarded == []
        assert (await bench.queue.retry(job.uid)).state is JobState.QUEUED
        events = await bench.end(job)
        assert [e.sequence for e in events] == list(range(1, len(events) + 1))
        assert events[: len(first)] == first
        with pytest.raises(WrongState) as raised:
            await bench.queue.retry(job.uid)
    assert raised.value.reason == "JOB_NOT_RETRYABLE"
    assert states(events) == ["QUEUED", "RUNNING", "FAILED", "QUEUED", "RUNNING", "SUCCEEDED"]
    assert [(a.reason, a.charged) for a in last(events).history] == [("the loss became nan", True), ("", False)]


async def test_a_job_whose_publication_was_refused_publishes_when_it_is_retried(bench: Bench) -> None:
    publisher = RecordingPublisher(("register", Denied("not yet")))
    backend = ScriptedBackend(finish)
    job = await bench.queue.create(PUBLISHED)
    async with bench.run(backend, publisher):
        assert last(await bench.end(job)).state is JobState.FAILED
        await bench.queue.retry(job.uid)
        assert last(await bench.end(job)).state is JobState.SUCCEEDED
    assert backend.attempts == [job.uid]
    assert publisher.calls == ["upload", "register", "upload", "register", "point"]


async def test_a_deleted_job_is_gone_with_its_events_and_files(bench: Bench) -> None:
    backend = ScriptedBackend(finish)
    job = await bench.queue.create(spec(), request_id="r")
    async with bench.run(backend) as retention:
        with pytest.raises(WrongState) as raised:
            await bench.queue.delete(job.uid)
        assert raised.value.reason == "JOB_NOT_FINISHED"
        await bench.end(job)
        await becomes(lambda: backend.discarded == [job.uid])
        await bench.queue.delete(job.uid)
        with pytest.raises(NotFound):
            await bench.queue.get(job.uid)
        with pytest.raises(NotFound):
            await bench.queue.delete(job.uid)
        await retention.look()
    assert backend.discarded == [job.uid, job.uid]
    assert await bench.queue.expiry(lambda expiry: expiry.doomed()) is None
    # Its request id is free again.
    assert (await bench.queue.create(spec(), request_id="r")).uid != job.uid


async def test_a_job_that_ran_for_too_long_fails_and_says_so(bench: Bench) -> None:
    trainer = Trainer()
    limited = await bench.queue.create(spec(time_limit_s=0.05))
    async with bench.run(trainer):
        done = last(await bench.end(limited))
    assert done.state is JobState.FAILED
    assert "time limit is 0.05 s" in done.error
    assert done.run_s >= 0.05
    assert trainer.running == 0


async def test_the_time_of_earlier_attempts_counts_and_that_before_a_retry_does_not(bench: Bench) -> None:
    trainer = Trainer()
    job = await bench.queue.create(spec(time_limit_s=3600.0))
    await bench.queue.change(job.uid, moves.started)
    await bench.queue.change(job.uid, lambda job, now: (moves.ran(job, 3600.0), ()))
    async with bench.run(trainer):
        # The attempt before the restart had used up the time: the next one has none left.
        done = last(await bench.end(job))
        assert (done.state, done.run_s >= 3600.0) == (JobState.FAILED, True)
        trainer.go_on.set()
        await bench.queue.retry(job.uid)
        assert last(await bench.end(job)).state is JobState.SUCCEEDED


@pytest.mark.parametrize("days", [-4000, 4000])
async def test_a_clock_that_jumps_costs_a_running_job_nothing(bench: Bench, days: int) -> None:
    trainer = Trainer()
    job = await bench.queue.create(spec(time_limit_s=60.0))
    async with bench.run(trainer) as retention:
        await trainer.begun.wait()
        bench.clock.now += timedelta(days=days)
        await retention.look()
        trainer.go_on.set()
        done = last(await bench.end(job))
    assert done.state is JobState.SUCCEEDED
    assert 0 < done.run_s < 60
    (attempt,) = done.history
    assert attempt.end_time >= attempt.start_time


async def test_the_services_own_limit_holds_for_jobs_without_one(bench: Bench) -> None:
    job = await bench.queue.create(spec())
    async with bench.run(Trainer(), time_limit_s=0.05):
        assert "time limit is 0.05 s" in last(await bench.end(job)).error


async def test_run_time_is_told_with_the_events(bench: Bench) -> None:
    trainer = Trainer()
    job = await bench.queue.create(spec())
    async with bench.run(trainer):
        await trainer.begun.wait()
        trainer.go_on.set()
        done = last(await bench.end(job))
    assert done.run_s > 0


async def test_higher_priorities_run_first_and_positions_say_so(bench: Bench) -> None:
    low, high, middle = [await bench.queue.create(spec(priority=priority)) for priority in (0, 9, 5)]
    assert [job.queue_position for job in (low, high, middle)] == [0, 0, 1]
    positions = [(await bench.queue.get(job.uid)).queue_position for job in (low, high, middle)]
    assert positions == [2, 0, 1]
    listed, _ = await bench.queue.page(size=10, before=None)
    assert [job.queue_position for job in listed] == [1, 0, 2]
    backend = ScriptedBackend(finish)
    async with bench.run(backend):
        for job in (low, high, middle):
            await bench.end(job)
    assert backend.attempts == [high.uid, middle.uid, low.uid]
    assert (await bench.queue.get(low.uid)).queue_position == 0


async def test_jobs_share_what_there_is_and_gpus_are_given_out(bench: Bench) -> None:
    bench.queue.capacity = Capacity(total=Resources(cpus=4.0, memory_bytes=1 << 30, gpus=2), jobs_max=8)
    trainer = Trainer()
    asked = [Resources(cpus=3.0, gpus=1), Resources(cpus=2.0, gpus=1), Resources(cpus=1.0, gpus=1)]
    big, blocked, small = [await bench.queue.create(spec(resources=each)) for each in asked]
    async with bench.run(trainer):
        await becomes(lambda: trainer.running == 2)
        assert trainer.attempts == [big.uid, small.uid]
        assert [task.gpus for task in trainer.tasks] == [(0,), (1,)]
        assert [task.threads for task in trainer.tasks] == [3, 1]
        assert (await bench.queue.get(big.uid)).resources == Resources(cpus=3.0, memory_bytes=1 << 27, gpus=1)
        trainer.go_on.set()
        await bench.end(blocked)
    assert trainer.running_max == 2


async def test_what_can_never_run_is_refused_and_what_no_longer_fits_waits_and_says_so(bench: Bench) -> None:
    bench.queue.capacity = Capacity(total=Resources(cpus=2.0, memory_bytes=1 << 30))
    with pytest.raises(InvalidInput) as raised:
        await bench.queue.create(spec(resources=Resources(cpus=3.0)))
    assert raised.value.reason == "RESOURCES_TOO_LARGE"
    large, small = await bench.queue.create(spec(resources=Resources(cpus=2.0))), await bench.queue.create(spec())
    bench.queue.capacity = Capacity(total=Resources(cpus=1.0, memory_bytes=1 << 30))
    async with bench.run(ScriptedBackend(finish)):
        await bench.end(small)
        assert (await bench.queue.get(large.uid)).state is JobState.QUEUED
        events = bench.queue.watch(large.uid)
        lines = [(await anext(events)).body for _ in range(2)]
        await events.aclose()
    assert "more than this service has now" in str(lines)


class Fetching:
    """A fetcher that fails first as told."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.folders: list[Path] = []
        self.gate: asyncio.Event | None = None
        self.reached = asyncio.Event()

    async def resolve_dataset(self, reference: str) -> str:
        return reference.replace("aliases/stable", "versions/7")

    async def resolve_source(self, reference: str) -> str:
        return reference.replace("aliases/stable", "versions/7")

    async def fetch(self, job: Job, folder: Path) -> None:
        self.folders.append(folder)
        if self.failures:
            raise self.failures.pop(0)
        if self.gate is not None:
            self.reached.set()
            await self.gate.wait()


REGISTERED = spec(
    optimization=Optimization(source="models/digits/aliases/stable", technique=MixedPrecision()), retries_max=-1
)


def fetching(queue: JobQueue, fetcher: Fetching) -> Fetching:
    queue._fetcher = fetcher
    return fetcher


async def test_files_are_fetched_before_the_attempt_and_aliases_meant_what_they_meant_then(bench: Bench) -> None:
    fetcher = fetching(bench.queue, Fetching(NotReady("away"), NotReady("away")))
    backend = ScriptedBackend(finish)
    job = await bench.queue.create(REGISTERED)
    assert (job.resolved_dataset, job.resolved_source) == ("digits", "models/digits/versions/7")
    async with bench.run(backend, fetcher=fetcher):
        done = last(await bench.end(job))
    assert done.state is JobState.SUCCEEDED
    assert fetcher.folders == [Path("/nowhere") / job.uid] * 3
    (task,) = backend.tasks
    assert task.optimization is not None
    assert (task.dataset, task.dataset_version, task.optimization.source) == ("digits", "", job.resolved_source)
    # A registry that is away costs no attempt.
    assert (done.attempts, done.spec) == (1, REGISTERED)


@pytest.mark.parametrize(
    ("error", "said"),
    [(NotFound("no such version"), "no such version"), (OSError(28, "No space left on device"), "No space left")],
)
async def test_files_that_cannot_be_had_end_the_job(bench: Bench, error: Exception, said: str) -> None:
    fetcher = fetching(bench.queue, Fetching(error))
    backend = ScriptedBackend(finish)
    job = await bench.queue.create(REGISTERED)
    async with bench.run(backend, fetcher=fetcher):
        done = last(await bench.end(job))
    assert done.state is JobState.FAILED
    assert said in done.error
    assert backend.attempts == []


@pytest.mark.parametrize("ask", ["pause", "cancel"])
async def test_fetching_ends_when_the_job_is_to(bench: Bench, ask: str) -> None:
    fetcher = fetching(bench.queue, Fetching())
    fetcher.gate = asyncio.Event()
    backend = ScriptedBackend(finish)
    job = await bench.queue.create(REGISTERED)
    async with bench.run(backend, fetcher=fetcher):
        await fetcher.reached.wait()
        await getattr(bench.queue, ask)(job.uid)
        await bench.reaches(job, JobState.PAUSED if ask == "pause" else JobState.CANCELLED)
    assert backend.attempts == []


async def test_a_repeated_request_is_answered_without_asking_the_registry_again(bench: Bench) -> None:
    fetching(bench.queue, Fetching())
    job = await bench.queue.create(REGISTERED, request_id="r")
    bench.queue._fetcher = NamedOnly()
    assert await bench.queue.create(REGISTERED, request_id="r") == job


async def test_old_jobs_go_with_their_files_and_events(bench: Bench) -> None:
    kept = RetentionLimits(kept_s=1000.0, finished_kept_s=100_000.0, finished_max=3)
    backend = ScriptedBackend(finish)
    jobs = [await bench.queue.create(spec(seed=seed)) for seed in range(5)]
    failed = await bench.queue.create(spec(seed=9, resources=Resources(cpus=0.5)))
    await bench.queue.change(failed.uid, moves.started)
    await bench.queue.change(failed.uid, lambda job, now: moves.failed(job, "no", now))
    async with bench.run(backend, kept=kept) as retention:
        for job in jobs:
            await bench.end(job)
        await becomes(lambda: len(backend.discarded) == 5)
        await retention.look()
        # The oldest three beyond the bound are gone, with what was left of them.
        listed, _ = await bench.queue.page(size=10, before=None)
        assert len(listed) == 3
        backend.discarded.clear()
        bench.clock.now += timedelta(seconds=2000)
        await retention.look()
        bench.clock.now += timedelta(seconds=200_000)
        await retention.look()
        assert (await bench.queue.page(size=10, before=None))[0] == []


async def test_files_that_somebody_needs_are_kept(bench: Bench) -> None:
    needed = {"x"}

    async def is_needed(uid: str) -> bool:
        return uid in needed

    backend = ScriptedBackend(finish)
    job = await bench.queue.create(spec())
    needed.add(job.uid)
    async with bench.run(backend) as retention:
        retention._needed = is_needed
        await bench.end(job)
        await retention.look()
        assert backend.discarded == []
        assert (await bench.queue.get(job.uid)).files
        needed.clear()
        await retention.look()
        assert backend.discarded == [job.uid]
        assert not (await bench.queue.get(job.uid)).files


async def test_a_job_is_not_started_while_its_files_go(bench: Bench) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    class Slow(ScriptedBackend):
        async def discard(self, uid: str) -> None:
            begun.set()
            await go_on.wait()
            await super().discard(uid)

    async def diverge(task: TrainingTask, report: Reporting, stop: asyncio.Event) -> Outcome:
        return Died(reason="nan", permanent=True)

    backend = Slow(diverge, finish)
    job = await bench.queue.create(spec())
    async with bench.run(backend, kept=RetentionLimits(kept_s=1e-9)) as retention, asyncio.TaskGroup() as group:
        await bench.end(job)
        looking = group.create_task(retention.look())
        await begun.wait()
        assert (await bench.queue.retry(job.uid)).state is JobState.QUEUED
        other = await bench.queue.create(spec(seed=8))
        await bench.end(other)
        assert backend.attempts == [job.uid, other.uid]
        go_on.set()
        await looking
        assert last(await bench.end(job)).state is JobState.SUCCEEDED


async def test_a_disk_that_is_full_while_files_go_is_tried_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    troubles: list[MeshError] = [NotReady("no room")]
    looked = asyncio.Event()
    async with bench.run(ScriptedBackend(finish), kept=RetentionLimits(look_s=0.01)) as retention:
        look = retention.look

        async def troubled() -> None:
            if troubles:
                raise troubles.pop()
            await look()
            looked.set()

        monkeypatch.setattr(retention, "look", troubled)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(retention.run())
            await asyncio.wait_for(looked.wait(), 10)
            running.cancel()
    assert "cannot remove" in caplog.text
