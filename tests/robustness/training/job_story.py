"""Clients' story with jobs that can be told again after any interruption, and what must hold of a service at any time.

As a program (`python job_story.py FOLDER`) it tells the story to a queue and runner of its own and says on stdout what
was acknowledged, one JSON array a line; it is what gets killed. Training is scripted, and counted: what starts writes a
line into `FOLDER/starts`, what is done with training another. All else is the service's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlmesh_runtime.errors import NotFound, WrongState
from mlmesh_runtime.executors import Executors, run_blocking
from mlmesh_training.backends.base import Died, Finished, Outcome, Paused, Report, Stopped, TrainingTask
from mlmesh_training.backends.local import LocalBackend
from mlmesh_training.jobs import FINAL, Checkpoint, Job, JobChanged, JobPhase, JobState, Progress
from mlmesh_training.ledger import SqlJobLedger
from mlmesh_training.queue import JobQueue, Wakeups
from mlmesh_training.retention import Retention, RetentionLimits, sweep
from mlmesh_training.runner import Runner, RunnerLimits
from tests.support.queues import RecordingPublisher, migrated
from tests.support.training import model, spec

Told = Callable[..., None]
# One job a seed: the first goes through, the second is paused while it trains, the third while it waits, the fourth
# fails and is retried, the fifth is cancelled and deleted.
THROUGH, PAUSED, WAITED, FAILED, DELETED = range(5)


class CountingBackend(LocalBackend):
    """Trains in no time, and leaves a line for each start and each end."""

    def __init__(self, data_dir: Path, **arguments: Any) -> None:
        super().__init__(data_dir / "jobs", environ={}, **arguments)
        self._marks = data_dir / "starts"
        self._live: set[str] = set()

    async def run(
        self,
        task: TrainingTask,
        *,
        report: Callable[[Report], Awaitable[None]],
        stop: asyncio.Event,
        pause: asyncio.Event,
    ) -> Outcome:
        assert task.uid not in self._live, "two attempts of one job at once"
        self._live.add(task.uid)
        folder = self.folder(task.uid)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._mark("start", task)
            await report(JobPhase.TRAINING)
            checkpoint = folder / "checkpoint"
            if not checkpoint.exists():
                checkpoint.with_suffix(".part").write_text("1")
                checkpoint.with_suffix(".part").rename(checkpoint)
            await report(Checkpoint(progress=Progress(epoch=1, epochs=2), sha256="ab"))
            if task.seed == PAUSED and not (folder / "paused").exists():
                (folder / "paused").touch()
                await pause.wait()
            if stop.is_set():
                return Stopped()
            if pause.is_set():
                return Paused()
            if task.seed == FAILED and not (folder / "failed").exists():
                (folder / "failed").touch()
                return Died(reason="the loss became nan", permanent=True)
            self._mark("done", task)
            return Finished(model=model())
        finally:
            self._live.discard(task.uid)

    def _mark(self, what: str, task: TrainingTask) -> None:
        with self._marks.open("a") as file:
            file.write(json.dumps([what, task.uid, task.attempt]) + "\n")


class Service:
    """A queue, a runner and a retention on the ledger in a folder, as the training service has them."""

    def __init__(self, queue: JobQueue, retention: Retention) -> None:
        self.queue = queue
        self.retention = retention


@contextlib.asynccontextmanager
async def serving(data_dir: Path) -> AsyncIterator[Service]:
    """A service for the length of a block."""
    path = _prepared(data_dir)
    wakeups = Wakeups()
    ledger = SqlJobLedger(
        f"sqlite:///{path}", clock=lambda: datetime.now(UTC), on_commit=lambda uid, _: wakeups.announce(uid)
    )
    async with Executors({"ledger": 1, "disk": 1}) as executors:
        queue = JobQueue(
            ledger,
            executor=executors["ledger"],
            wakeups=wakeups,
            clock=lambda: datetime.now(UTC),
            new_uid=lambda: secrets.token_hex(5),
        )
        backend = CountingBackend(data_dir, executor=executors["disk"])
        await sweep(queue, present=await backend.kept(), discard=backend.discard)
        retention = Retention(queue, discard=backend.discard, clock=lambda: datetime.now(UTC), limits=RetentionLimits())
        runner = Runner(
            queue,
            backend=backend,
            publisher=RecordingPublisher(),
            retention=retention,
            limits=RunnerLimits(retry_s=0.0),
        )
        try:
            async with asyncio.TaskGroup() as group:
                running = [group.create_task(runner.run()), group.create_task(retention.run())]
                yield Service(queue, retention)
                for task in running:
                    task.cancel()
        finally:
            await run_blocking(executors["ledger"], ledger.close)


def _prepared(data_dir: Path) -> Path:
    data_dir.mkdir(parents=True, exist_ok=True)
    path = data_dir / "training.sqlite"
    if not path.exists():
        # In one step: migrations are not what is killed here.
        path.with_suffix(".new").write_bytes(migrated())
        path.with_suffix(".new").rename(path)
    return path


async def tell(service: Service, told: Told) -> None:
    """Submit five jobs and see each to its end; every step may have been done before."""
    queue = service.queue
    uids = []
    for seed in range(5):
        with contextlib.suppress(NotFound):
            job = await queue.create(spec(seed=seed, retries_max=-1), request_id=f"job {seed}")
            uids.append(job.uid)
            told("accepted", seed, job.uid)
            if seed == WAITED:
                waiting = await queue.get(job.uid)
                if waiting.state is JobState.QUEUED and not waiting.attempts:
                    told("paused", job.uid, (await _pause(queue, job.uid)).state)
    await _end(queue, uids[THROUGH], told)

    paused = await _until(queue, uids[PAUSED], {JobState.RUNNING, JobState.PAUSED, *FINAL})
    if paused.state is JobState.RUNNING:
        await _pause(queue, paused.uid)
        paused = await _until(queue, paused.uid, {JobState.PAUSED, *FINAL})
        told("paused", paused.uid, paused.state)
    for seed in (PAUSED, WAITED):
        if (await queue.get(uids[seed])).state is JobState.PAUSED:
            told("resumed", uids[seed], (await queue.resume(uids[seed])).state)
        await _end(queue, uids[seed], told)

    failed = await _until(queue, uids[FAILED], FINAL)
    if failed.state is JobState.FAILED:
        told("retried", failed.uid, (await queue.retry(failed.uid)).state)
    await _end(queue, failed.uid, told)

    with contextlib.suppress(NotFound):
        with contextlib.suppress(WrongState):  # It may have ended already.
            await queue.cancel(uids[DELETED])
        await _until(queue, uids[DELETED], FINAL)
        await queue.delete(uids[DELETED])
        told("deleted", uids[DELETED])
        await service.retention.look()
    told("end")


async def _pause(queue: JobQueue, uid: str) -> Job:
    """The job after it was asked to pause, or as it ended: training that waited before a kill does not wait again."""
    try:
        return await queue.pause(uid)
    except WrongState as refusal:
        if refusal.reason != "JOB_FINISHED":
            raise
        return await _until(queue, uid, FINAL)


async def _end(queue: JobQueue, uid: str, told: Told) -> None:
    job = await _until(queue, uid, {JobState.SUCCEEDED})
    told("ended", uid, job.state)


async def _until(queue: JobQueue, uid: str, wanted: set[JobState] | frozenset[JobState]) -> Job:
    """The job, once its present state is one of these."""
    start = 0
    while True:
        job = await queue.get(uid)
        if job.state in wanted:
            return job
        start = max(start, job.last_sequence + 1)
        async with asyncio.timeout(20), contextlib.aclosing(queue.watch(uid, from_sequence=start)) as events:
            async for event in events:
                if isinstance(event.body, JobChanged):
                    break


async def check(service: Service, data_dir: Path, acknowledged: list[list[Any]]) -> None:
    """What must hold: nothing acknowledged is lost, no training is done twice, histories are whole and legal."""
    queue = service.queue
    deleted = {fact[1] for fact in acknowledged if fact[0] == "deleted"}
    listed, _ = await queue.page(size=1000, before=None)
    known = {job.uid: job for job in listed}
    for kind, *facts in acknowledged:
        match kind:
            case "accepted":
                seed, uid = facts
                assert (uid in known) != (uid in deleted) or seed == DELETED, f"{uid} is lost"
            case "ended":
                assert known[facts[0]].state == facts[1], "what was told as ended has not"
            case "resumed" | "retried":
                assert known[facts[0]].state is not JobState.PAUSED
                assert known[facts[0]].state is not JobState.FAILED
            case "deleted":
                assert facts[0] not in known
    seeds = [job.spec.seed for job in listed]
    assert len(set(seeds)) == len(seeds), "a job was accepted twice"
    starts, done = _marks(data_dir)
    for job in listed:
        events = [event async for event in _history(queue, job)]
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        told = [event.body.job for event in events if isinstance(event.body, JobChanged) and event.body.job]
        assert (told[-1].state, told[-1].attempts) == (job.state, job.attempts)
        # Each start is an attempt that the ledger knew of before it began.
        assert starts[job.uid] <= job.attempts
        # Training that was told as done is never done again; one that a kill left untold may be.
        assert done[job.uid] <= 1 + sum(attempt.reason != "" for attempt in job.history)
        if job.state is JobState.SUCCEEDED:
            assert job.history[-1].reason == ""
            assert [attempt.reason for attempt in job.history].count("") == 1


async def _history(queue: JobQueue, job: Job) -> AsyncIterator[Any]:
    async with contextlib.aclosing(queue.watch(job.uid)) as events:
        async for event in events:
            yield event
            if event.sequence >= job.last_sequence:
                return


def _marks(data_dir: Path) -> tuple[Counter[str], Counter[str]]:
    path = data_dir / "starts"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return (
        Counter(uid for what, uid, _ in lines if what == "start"),
        Counter(uid for what, uid, _ in lines if what == "done"),
    )


def _say(*fact: object) -> None:
    os.write(1, json.dumps(fact).encode() + b"\n")


async def _main(data_dir: Path) -> None:
    async with serving(data_dir) as service:
        await tell(service, _say)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1])))
