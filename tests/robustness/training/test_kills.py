"""kill -9 of the trainer and of the service: no accepted job is lost, none runs twice, none learns anything else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_training import convert, documents, recipes
from mlmesh_training.backends.base import TrainingTask
from mlmesh_training.jobs import Evaluation
from tests.support.server import Process
from tests.support.training import alive, becomes, children
from tests.support.training_process import (
    CANCELLED,
    FAILED,
    PAUSED,
    SUCCEEDED,
    Client,
    connected,
    gapless,
    last,
    running,
    spec,
    states,
)

# Long enough to be hit in the middle, short enough to wait for.
LONG = spec(hyperparameters={"epochs": 6.0, "width": 4.0})
# One thread each: on a busy machine that is faster, and equal threads are what equal results need.
COLD = {"MLMESH_TRAINING_WARM": "0", "MLMESH_TRAINING_THREADS": "1"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """What the long job measures when nothing happens to it."""
    import io

    pytest.importorskip("torch")
    from mlmesh_training.backends.results import read_result
    from mlmesh_training.trainer import run
    from mlmesh_training.trainer.reporter import Reporter

    folder = tmp_path_factory.mktemp("undisturbed")
    asked = convert.spec(LONG)
    task = TrainingTask(
        uid=folder.name,
        recipe=asked.recipe,
        dataset=asked.dataset,
        hyperparameters=recipes.resolve(asked),
        seed=asked.seed,
    )
    (folder / "task.json").write_text(documents.dumps(documents.task_document(task)))
    run.train(folder, Reporter(io.BytesIO()), threads=1)
    return read_result(folder).evaluation


def same_measures(job: pb.Job, expected: Evaluation) -> bool:
    found = job.evaluation
    rows = tuple(tuple(row.counts) for row in found.confusion_matrix)
    return (found.accuracy, found.loss, rows) == (expected.accuracy, expected.loss, expected.confusion)


async def until_mid_epoch(client: Client, name: str, epoch: int) -> AsyncIterator[pb.WatchJobResponse]:
    """Events until the first figures that come after the checkpoint of an epoch."""
    passed = False
    async with contextlib.aclosing(client.watch(name)) as events:
        async for event in events:
            yield event
            kind = event.WhichOneof("event")
            passed = passed or (kind == "checkpoint" and event.checkpoint.progress.epoch >= epoch)
            if passed and kind == "metrics":
                return


async def test_a_killed_trainer_goes_on_from_its_checkpoint_and_learns_the_very_same(
    tmp_path: Path, undisturbed: Evaluation
) -> None:
    with running(tmp_path, env=COLD) as (service, address):
        async with connected(address) as client:
            job = await client.create(LONG)
            before = [event async for event in until_mid_epoch(client, job.name, 1)]
            (trainer,) = children(service.pid)
            os.kill(trainer, signal.SIGKILL)
            events = await client.end(job.name)
    done = last(events)
    assert done.state == SUCCEEDED, done.error
    assert gapless(events)
    assert events[: len(before)] == before
    assert states(events) == ["QUEUED", "RUNNING", "RETRYING", "RUNNING", "SUCCEEDED"]
    assert done.attempts == 2
    retrying = next(e.job for e in events if e.HasField("job") and e.job.state == pb.JOB_STATE_RETRYING)
    assert "SIGKILL" in retrying.error
    # The curve goes on: no epoch before the checkpoint is fitted again, none is left out.
    epochs = [event.checkpoint.progress.epoch for event in events if event.HasField("checkpoint")]
    assert epochs == list(range(1, 7))
    assert any(event.HasField("log") and "resumed after epoch" in event.log.message for event in events)
    assert same_measures(done, undisturbed)


async def test_a_killed_service_takes_its_trainer_along_and_its_jobs_up_again(
    tmp_path: Path, undisturbed: Evaluation
) -> None:
    with running(tmp_path, env=COLD) as (service, address):
        async with connected(address) as client:
            job = await client.create(LONG, "long")
            waiting = [await client.create(spec(seed=seed), f"waiting {seed}") for seed in range(3)]
            before = [event async for event in until_mid_epoch(client, job.name, 1)]
            asked = await client.cancel(waiting[0].name)
            assert asked.state == CANCELLED
            (trainer,) = children(service.pid)
            service.signal(signal.SIGKILL)
            service.wait()
    await becomes(lambda: not alive(trainer))
    with running(tmp_path, env=COLD) as (_, address):
        async with connected(address) as client:
            # Who did not hear the first answer asks again, and gets it.
            assert await client.create(LONG, "long") == job
            assert [await client.create(spec(seed=seed), f"waiting {seed}") for seed in range(3)] == waiting
            for queued in waiting[1:]:
                assert (await client.get(queued.name)).state == pb.JOB_STATE_QUEUED
                await client.cancel(queued.name)
            events = await client.end(job.name)
            everything = (await client.stub.ListJobs(pb.ListJobsRequest())).jobs
    done = last(events)
    assert done.state == SUCCEEDED, done.error
    assert gapless(events)
    assert events[: len(before)] == before
    assert states(events) == ["QUEUED", "RUNNING", "RETRYING", "RUNNING", "SUCCEEDED"]
    epochs = [event.checkpoint.progress.epoch for event in events if event.HasField("checkpoint")]
    # A checkpoint that was on disk but not yet told is not repeated, so at most one is missing here.
    assert epochs == sorted(set(epochs))
    assert len(epochs) >= 5
    assert same_measures(done, undisturbed)
    assert [found.name for found in everything] == [*(found.name for found in reversed(waiting)), job.name]


async def test_a_service_that_is_killed_while_a_job_pauses_has_paused_it_and_it_learns_the_very_same(
    tmp_path: Path, undisturbed: Evaluation
) -> None:
    with running(tmp_path, env=COLD) as (service, address):
        async with connected(address) as client:
            job = await client.create(LONG)
            async for _ in until_mid_epoch(client, job.name, 1):
                pass
            (trainer,) = children(service.pid)
            assert (await client.pause(job.name)).state == pb.JOB_STATE_PAUSING
            service.signal(signal.SIGKILL)
            service.wait()
    await becomes(lambda: not alive(trainer))
    with running(tmp_path, env=COLD) as (service, address):
        async with connected(address) as client:
            paused = await client.reaches(job.name, PAUSED)
            assert children(service.pid) == []
            assert [attempt.charged for attempt in paused.attempt_history] == [False]
            # What it ran for is known but for the last seconds before the kill, and is never more than it was.
            ran = paused.run_duration.ToNanoseconds() / 1e9
            (attempt,) = paused.attempt_history
            assert ran > 0
            assert abs((attempt.end_time.ToNanoseconds() - attempt.start_time.ToNanoseconds()) / 1e9 - ran) < 0.01
            await client.resume(job.name)
            events = await client.end(job.name)
    done = last(events)
    assert done.state == SUCCEEDED, done.error
    assert gapless(events)
    assert states(events) == ["QUEUED", "RUNNING", "PAUSING", "PAUSED", "QUEUED", "RUNNING", "SUCCEEDED"]
    assert same_measures(done, undisturbed)


async def test_a_trainer_that_always_dies_is_given_up(tmp_path: Path) -> None:
    with running(tmp_path, env=COLD) as (service, address):
        async with connected(address) as client:
            job = await client.create(spec(retries_max=1))
            events: list[pb.WatchJobResponse] = []
            async for event in client.watch(job.name):
                events.append(event)
                if event.HasField("job") and event.job.phase == pb.JOB_PHASE_LOADING_DATA:
                    for trainer in children(service.pid):
                        os.kill(trainer, signal.SIGKILL)
            after = children(service.pid)
    done = last(events)
    assert (done.state, done.attempts) == (FAILED, 2)
    assert "gave up after 2 attempts" in done.error
    assert "SIGKILL" in done.error
    assert states(events) == ["QUEUED", "RUNNING", "RETRYING", "RUNNING", "FAILED"]
    assert after == []


async def test_no_answered_job_is_lost_and_none_is_made_twice_however_often_the_service_is_killed(
    tmp_path: Path,
) -> None:
    chance = random.Random(20260102)  # noqa: S311 - moments, not secrets
    answered: dict[str, str] = {}
    number = 0
    for _ in range(3):
        with running(tmp_path, env=COLD) as (service, address):
            async with connected(address) as client, asyncio.TaskGroup() as group:
                killing = False
                while True:
                    request_id = f"r{number}"
                    try:
                        job = await client.create(spec(seed=number), request_id)
                    except grpc.aio.AioRpcError:
                        break  # asked again by the next round, with the same request id
                    assert answered.setdefault(request_id, job.name) == job.name
                    number += 1
                    if not killing:
                        killing = bool(group.create_task(kill_after(service, chance.uniform(0.0, 0.15))))
    with running(tmp_path, env=COLD) as (_, address):
        async with connected(address) as client:
            listed = (await client.stub.ListJobs(pb.ListJobsRequest(page_size=1000))).jobs
            seeds = [job.spec.seed for job in listed]
            assert sorted(seeds, reverse=True) == seeds, "the order of acceptance is kept"
            assert len(set(seeds)) == len(seeds)
            assert set(answered.values()) <= {job.name for job in listed}
            assert len(listed) - len(answered) <= 1, "at most the last one was stored but not answered"
            for request_id, name in list(answered.items())[:5]:
                assert (await client.create(spec(seed=int(request_id[1:])), request_id)).name == name
    assert number >= 3


async def kill_after(service: Process, seconds: float) -> None:
    """Kill at a moment that nothing in the service knows of."""
    await asyncio.sleep(seconds)
    service.signal(signal.SIGKILL)
