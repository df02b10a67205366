"""The training service as its own process, with a registry as its own process: the RPCs keep what the contract says."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import numpy as np
import onnxruntime
import pytest
from google.protobuf.duration_pb2 import Duration

from mlmesh.registry.v1 import registry_pb2
from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_runtime.channel import mesh_error
from mlmesh_runtime.errors import (
    AlreadyExists,
    Conflict,
    InvalidInput,
    NotFound,
    Overloaded,
    RevisionLost,
    WrongState,
)
from tests.support import registry_process
from tests.support.training import becomes
from tests.support.training_process import (
    CANCELLED,
    PAUSED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    Client,
    connected,
    gapless,
    last,
    refused,
    running,
    spec,
    states,
)

PUBLICATION = pb.Publication(model="models/digits", aliases=["stable"], description="first")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with registry_process.running(tmp_path_factory.mktemp("registry")) as (_, address):
        yield address


@pytest.fixture(scope="module")
def training(registry: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("training")
    with running(folder, registry=registry, env={"MLMESH_TRAINING_THREADS": "1"}) as (_, address):
        yield address, folder


@pytest.fixture
async def client(training: tuple[str, Path]) -> AsyncIterator[Client]:
    async with connected(training[0]) as opened:
        yield opened


async def test_a_model_is_trained_measured_exported_and_registered(
    client: Client, registry: str, training: tuple[str, Path], tmp_path: Path
) -> None:
    asked = spec(publication=PUBLICATION)
    job = await client.create(asked, "story")
    assert (job.state, job.last_sequence, job.spec) == (pb.JOB_STATE_QUEUED, 1, asked)
    events = await client.end(job.name)
    done = last(events)
    assert done.state == SUCCEEDED, done.error
    assert gapless(events)
    assert states(events) == ["QUEUED", "RUNNING", "SUCCEEDED"]
    phases = [pb.JobPhase.Name(e.job.phase)[10:] for e in events if e.WhichOneof("event") == "job"]
    assert list(dict.fromkeys(phases)) == [
        *("UNSPECIFIED", "LOADING_DATA", "TRAINING", "EVALUATING", "EXPORTING", "PUBLISHING")
    ]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds.count("checkpoint") == 3
    figures = [event.metrics for event in events if event.WhichOneof("event") == "metrics"]
    assert figures[-1].progress == done.progress
    assert (done.progress.epoch, done.progress.step) == (done.progress.epochs, done.progress.steps)
    assert {"train_loss", "train_accuracy", "learning_rate", "examples_per_second"} < set(figures[-1].values)
    assert done.evaluation.accuracy > 0.8
    assert sum(sum(row.counts) for row in done.evaluation.confusion_matrix) == done.evaluation.examples == 359
    assert done == await client.get(job.name)
    # The folder is gone: what counts is in the registry.
    await becomes(lambda: not list((training[1] / "jobs").glob("*/")))
    # The same request again is answered as the first time, and trains nothing.
    assert await client.create(asked, "story") == job
    async with registry_process.connected(registry) as models:
        name = f"{PUBLICATION.model}/aliases/stable"
        version = (await models.stub.GetModelVersion(registry_pb2.GetModelVersionRequest(name=name))).model_version
        files = {artifact.path: await models.get(artifact.blob) for artifact in version.artifacts}
    assert version.name == done.model_version == "models/digits/versions/1"
    assert version.metrics["accuracy"] == done.evaluation.accuracy
    assert version.lineage.job == job.name
    assert set(files) >= {"model.onnx", "evaluation.json", "labels.txt"}
    assert files["labels.txt"].decode().split() == list(done.evaluation.labels)
    session = onnxruntime.InferenceSession(files["model.onnx"], providers=["CPUExecutionProvider"])
    assert session.run(["logits"], {"image": np.zeros((3, 1, 8, 8), np.float32)})[0].shape == (3, 10)


async def test_a_running_job_is_cancelled_and_a_cut_watch_is_taken_up_without_gap_or_repeat(
    client: Client, training: tuple[str, Path]
) -> None:
    job = await client.create(spec(hyperparameters={"epochs": 500.0}, publication=PUBLICATION))
    seen: list[pb.WatchJobResponse] = []
    while not seen or not seen[-1].HasField("job") or seen[-1].job.state != CANCELLED:
        async with contextlib.aclosing(client.watch(job.name, seen[-1].sequence + 1 if seen else 0)) as events:
            async for event in events:
                seen.append(event)
                if len(seen) == 12:
                    assert (await client.cancel(job.name)).state == pb.JOB_STATE_CANCELLING
                if len(seen) % 4 == 0:
                    break
    assert states(seen) == ["QUEUED", "RUNNING", "CANCELLING", "CANCELLED"]
    assert gapless(seen)
    assert seen == await client.end(job.name)
    assert (await client.cancel(job.name)).state == CANCELLED
    assert await client.end(job.name, seen[-1].sequence + 1) == []
    async with refused(RevisionLost, "SEQUENCE_LOST"):
        await client.end(job.name, seen[-1].sequence + 2)
    # What a retry would go on from stays, until nobody can retry it any more.
    assert list((training[1] / "jobs").glob("*/"))
    await client.delete(job.name)
    await becomes(lambda: not list((training[1] / "jobs").glob("*/")))
    for call in (client.get, client.delete, client.retry, client.end):
        async with refused(NotFound, "JOB_NOT_FOUND"):
            await call(job.name)


async def test_a_paused_job_goes_on_where_it_was_and_a_failed_one_is_tried_again(client: Client) -> None:
    asked = spec(
        hyperparameters={"epochs": 30.0},
        priority=5,
        labels={"team": "vision"},
        resources=pb.Resources(memory_bytes=1 << 28),
        time_limit=Duration(seconds=600),
        fit=pb.FitOptions(clip_norm=1.0, early_stopping=pb.EarlyStopping(patience=30)),
    )
    job = await client.create(asked, "paused")
    assert (job.resources.memory_bytes, job.resources.cpus > 0, job.resolved_dataset) == (1 << 28, True, "digits")
    assert (job.spec.labels, job.spec.time_limit.seconds, job.spec.fit.clip_norm) == (asked.labels, 600, 1.0)
    assert (job.spec.fit.early_stopping.patience, job.spec.fit.early_stopping.metric) == (30, "validation_loss")
    async for event in client.watch(job.name):
        if event.HasField("checkpoint"):
            break
    async with refused(WrongState, "JOB_NOT_FINISHED"):
        await client.delete(job.name)
    asked_to = await client.pause(job.name)
    assert asked_to.state == pb.JOB_STATE_PAUSING
    with contextlib.suppress(grpc.aio.AioRpcError):  # It may have paused already.
        async with refused(Conflict, "JOB_NOT_PAUSED"):
            await client.resume(job.name)
    paused = await client.reaches(job.name, PAUSED)
    assert 0 < paused.progress.epoch < 30
    assert [attempt.reason for attempt in paused.attempt_history] == ["paused on request"]
    assert paused.run_duration.ToNanoseconds() > 0
    assert (await client.list(states=[PAUSED]))[0].name == job.name
    assert (await client.pause(job.name)).state == PAUSED
    assert (await client.resume(job.name)).state in {QUEUED, RUNNING}
    resumed = await client.reaches(job.name, RUNNING, paused.last_sequence + 1)
    assert resumed.attempts == 2
    # Ended on request, it is put back, and goes on once more.
    await client.cancel(job.name)
    cancelled = last(await client.end(job.name))
    assert cancelled.state == CANCELLED
    async with refused(WrongState, "JOB_FINISHED"):
        await client.resume(job.name)
    again = await client.retry(job.name)
    assert again.state == QUEUED or again.attempts == 3
    events = await client.end(job.name)
    done = last(events)
    assert done.state == SUCCEEDED, done.error
    assert gapless(events)
    told = states(events)
    assert told[:5] == ["QUEUED", "RUNNING", "PAUSING", "PAUSED", "QUEUED"]
    assert told[-3:] == ["QUEUED", "RUNNING", "SUCCEEDED"]
    # The curve goes on over pause and retry: every epoch once, but for the one that the cancellation cut.
    epochs = [event.checkpoint.progress.epoch for event in events if event.HasField("checkpoint")]
    assert epochs == sorted(epochs)
    assert done.progress.epoch == 30
    assert [attempt.charged for attempt in done.attempt_history] == [False, False, False]
    async with refused(WrongState, "JOB_NOT_RETRYABLE"):
        await client.retry(job.name)


async def test_what_never_fits_is_refused_by_the_field(client: Client) -> None:
    for field, fields in {
        "spec.resources.cpus": {"resources": pb.Resources(cpus=4000)},
        "spec.resources.memory_bytes": {"resources": pb.Resources(memory_bytes=1 << 60)},
        "spec.distribution.nodes": {"distribution": pb.Distribution(processes=2, nodes=2)},
    }.items():
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.create(spec(**fields))
        error = mesh_error(raised.value)
        assert isinstance(error, InvalidInput)
        assert (error.reason, error.violations[0].field) == ("RESOURCES_TOO_LARGE", field)


async def test_jobs_are_listed_by_state_and_the_queue_says_who_is_next(client: Client) -> None:
    running = await client.create(spec(hyperparameters={"epochs": 500.0}))
    await client.reaches(running.name, RUNNING)
    low, high = [await client.create(spec(seed=seed, priority=seed)) for seed in (1, 2)]
    assert (low.queue_position, high.queue_position) == (0, 0)
    listed = await client.list(states=[QUEUED])
    assert [(job.name, job.queue_position) for job in listed] == [(high.name, 0), (low.name, 1)]
    assert [job.name for job in await client.list(states=[RUNNING, QUEUED])] == [high.name, low.name, running.name]
    assert await client.list(study="studies/none") == []
    async with refused(InvalidInput, "INVALID_FIELD"):
        await client.list(states=[pb.JOB_STATE_UNSPECIFIED])
    for job in (low, high, running):
        await client.cancel(job.name)
        await client.end(job.name)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (pb.JobSpec(recipe="transformer", dataset="digits"), "UNKNOWN_RECIPE"),
        (pb.JobSpec(recipe="cnn", dataset="imagenet"), "UNKNOWN_DATASET"),
        (pb.JobSpec(recipe="cnn", dataset="digits", hyperparameters={"epochs": 0}), "INVALID_FIELD"),
        (pb.JobSpec(recipe="cnn", dataset="digits", hyperparameters={"epochs": float("nan")}), "INVALID_FIELD"),
        (pb.JobSpec(recipe="cnn", dataset="digits", hyperparameters={"epochs": float("inf")}), "INVALID_FIELD"),
        (pb.JobSpec(recipe="cnn", dataset="digits", hyperparameters={"epohcs": 1}), "INVALID_FIELD"),
        (pb.JobSpec(recipe="cnn", dataset="digits", hyperparameters={str(n): 1 for n in range(65)}), "INVALID_FIELD"),
        (pb.JobSpec(recipe="cnn", dataset="digits", seed=-1), "INVALID_FIELD"),
        (pb.JobSpec(recipe="cnn", dataset="digits", retries_max=101), "INVALID_FIELD"),
        (pb.JobSpec(recipe="", dataset="digits"), "INVALID_FIELD"),
        (pb.JobSpec(recipe="cnn" * 100, dataset="digits"), "INVALID_FIELD"),
        (pb.JobSpec(recipe="cnn", dataset="digits", publication=pb.Publication(model="../x")), "INVALID_FIELD"),
        (
            pb.JobSpec(recipe="cnn", dataset="digits", publication=pb.Publication(model="models/m", aliases=["A"])),
            "INVALID_FIELD",
        ),
    ],
)
async def test_impossible_jobs_are_refused(client: Client, bad: pb.JobSpec, reason: str) -> None:
    async with refused(InvalidInput, reason):
        await client.create(bad)


async def test_a_request_without_a_spec_is_refused(client: Client) -> None:
    async with refused(InvalidInput, "INVALID_FIELD"):
        await client.stub.CreateJob(pb.CreateJobRequest())


async def test_errors_of_names_and_states(client: Client) -> None:
    job = await client.create(spec(hyperparameters={"epochs": 500.0}), "other")
    async with refused(AlreadyExists, "REQUEST_ID_REUSED"):
        await client.create(spec(seed=99), "other")
    await client.cancel(job.name)
    for call in (client.get, client.cancel, client.end):
        async with refused(NotFound, "JOB_NOT_FOUND"):
            await call("jobs/nobody")
        async with refused(InvalidInput, "INVALID_FIELD"):
            await call("models/m")
    async with refused(InvalidInput, "INVALID_FIELD"):
        await client.stub.ListJobs(pb.ListJobsRequest(page_token="nonsense"))
    await client.end(job.name)


async def test_a_job_that_ended_well_cannot_be_cancelled(client: Client) -> None:
    done = (await client.stub.ListJobs(pb.ListJobsRequest(page_size=1000))).jobs
    finished = next(job for job in done if job.state == SUCCEEDED)
    async with refused(WrongState, "JOB_FINISHED"):
        await client.cancel(finished.name)


async def test_jobs_are_listed_in_pages_newest_first(client: Client) -> None:
    everything = (await client.stub.ListJobs(pb.ListJobsRequest())).jobs
    times = [job.create_time.ToNanoseconds() for job in everything]
    assert times == sorted(times, reverse=True)
    paged: list[pb.Job] = []
    token = ""
    while True:
        page = await client.stub.ListJobs(pb.ListJobsRequest(page_size=2, page_token=token))
        paged += page.jobs
        token = page.next_page_token
        if not token:
            break
    assert paged == list(everything)


async def test_recipes_say_what_can_be_set(client: Client) -> None:
    recipes = (await client.stub.ListRecipes(pb.ListRecipesRequest())).recipes
    datasets = {found.name for found in (await client.stub.ListDatasets(pb.ListDatasetsRequest())).datasets}
    by_name = {recipe.name: recipe for recipe in recipes}
    assert list(by_name) == sorted(by_name)
    assert {"cnn", "mlp"} <= set(by_name)
    assert set(by_name["cnn"].datasets) == set(by_name["mlp"].datasets) == {"digits", "mnist"}
    for recipe in recipes:
        assert set(recipe.datasets) <= datasets
        for known in recipe.hyperparameters:
            assert known.min_value <= known.default_value <= known.max_value
            assert known.description


async def test_a_watch_without_a_deadline_is_fine_and_other_calls_need_one(training: tuple[str, Path]) -> None:
    async with grpc.aio.insecure_channel(training[0]) as bare:
        client = Client(bare)  # type: ignore[arg-type]
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.get("jobs/nobody")
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.stub.WatchJob(pb.WatchJobRequest(name="jobs/nobody")).read()
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_full_queue_refuses_and_two_services_do_not_share_a_folder(tmp_path: Path) -> None:
    with running(tmp_path, env={"MLMESH_TRAINING_QUEUE_ITEMS_MAX": "1", "MLMESH_TRAINING_WARM": "0"}) as (
        process,
        address,
    ):
        async with connected(address) as client:
            first = await client.create(spec(hyperparameters={"epochs": 500.0}))
            async for event in client.watch(first.name):
                if event.HasField("job") and event.job.state == pb.JOB_STATE_RUNNING:
                    break
            waiting = await client.create(spec())
            async with refused(Overloaded, "QUEUE_FULL"):
                await client.create(spec())
            assert (await client.cancel(waiting.name)).state == CANCELLED
        with pytest.raises(AssertionError, match="another training service"), running(tmp_path):
            pass
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


def test_the_service_and_its_unit_tests_need_no_torch() -> None:
    program = (
        "import sys, mlmesh_training.__main__, mlmesh_training.evaluate; "
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'sklearn', 'optuna'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
