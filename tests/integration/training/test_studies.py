"""Studies of the training service as its own process, with a registry as its own process: what the contract says."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

pytest.importorskip("optuna")

from mlmesh.registry.v1 import registry_pb2
from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_runtime.channel import mesh_error
from mlmesh_runtime.errors import AlreadyExists, InvalidInput, NotFound, Overloaded, RevisionLost, WrongState
from tests.support import registry_process
from tests.support.training import becomes
from tests.support.training_process import Client, connected, refused, running, spec

RATES = pb.SearchDimension(name="learning_rate", min_value=1e-4, max_value=1e-1, log_scale=True)
WIDTHS = pb.SearchDimension(name="width", values=[8, 16])
HUGE = pb.SearchDimension(name="width", values=[9e9])
PUBLICATION = pb.Publication(model="models/searched", aliases=["best"], description="found by a study")
FINAL = {pb.STUDY_STATE_SUCCEEDED, pb.STUDY_STATE_FAILED, pb.STUDY_STATE_STOPPED}
# Beside each other on two processors, one thread each.
TWO = {"MLMESH_TRAINING_THREADS": "1", "MLMESH_TRAINING_JOBS_MAX": "2"}
COLD = {**TWO, "MLMESH_TRAINING_WARM": "0"}


def study_spec(*, epochs: float = 2.0, publish: bool = False, **fields: Any) -> pb.StudySpec:
    """A small study: trials of a second."""
    job = spec("mlp", hyperparameters={"epochs": epochs})
    if publish:
        job.publication.CopyFrom(PUBLICATION)
    dimensions = fields.pop("dimensions", [RATES, WIDTHS])
    return pb.StudySpec(job=job, dimensions=dimensions, seed=fields.pop("seed", 5), **fields)


async def create(client: Client, asked: pb.StudySpec, request_id: str = "") -> pb.Study:
    return (await client.stub.CreateStudy(pb.CreateStudyRequest(spec=asked, request_id=request_id))).study


async def get(client: Client, name: str) -> pb.Study:
    return (await client.stub.GetStudy(pb.GetStudyRequest(name=name))).study


async def stop(client: Client, name: str) -> pb.Study:
    return (await client.stub.StopStudy(pb.StopStudyRequest(name=name))).study


async def watch(client: Client, name: str, start: int = 0) -> AsyncGenerator[pb.WatchStudyResponse]:
    async for event in client.stub.WatchStudy(pb.WatchStudyRequest(name=name, from_sequence=start), timeout=170):
        yield event


async def end(client: Client, name: str) -> list[pb.WatchStudyResponse]:
    return [event async for event in watch(client, name)]


async def trials(client: Client, name: str, *, size: int = 0) -> list[pb.Trial]:
    found: list[pb.Trial] = []
    token = ""
    while True:
        page = await client.stub.ListTrials(pb.ListTrialsRequest(parent=name, page_size=size, page_token=token))
        found += page.trials
        token = page.next_page_token
        if not token:
            return found


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with registry_process.running(tmp_path_factory.mktemp("registry")) as (_, address):
        yield address


@pytest.fixture(scope="module")
def training(registry: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("training")
    environment = {**TWO, "MLMESH_TRAINING_STUDIES_MAX": "2"}
    with running(folder, registry=registry, env=environment) as (_, address):
        yield address, folder


@pytest.fixture
async def client(training: tuple[str, Path]) -> AsyncIterator[Client]:
    async with connected(training[0]) as opened:
        yield opened


@pytest.mark.timeout(400)
async def test_a_grid_is_searched_side_by_side_and_the_best_is_published_with_its_lineage(
    client: Client, registry: str, training: tuple[str, Path]
) -> None:
    rates = pb.SearchDimension(name="learning_rate", values=[0.0001, 0.01])
    width = pb.SearchDimension(name="width", min_value=16, max_value=16, step=1)
    asked = study_spec(publish=True, sampler=pb.SAMPLER_GRID, dimensions=[rates, width], parallel_max=2)
    accepted = await create(client, asked, "grid")
    assert (accepted.state, accepted.last_sequence) == (pb.STUDY_STATE_RUNNING, 1)
    filled = {"pruner": pb.PRUNER_NONE, "metric": "validation_accuracy", "direction": pb.DIRECTION_MAXIMIZE}
    assert accepted.spec == pb.StudySpec(**filled, **{field.name: value for field, value in asked.ListFields()})
    events = await end(client, accepted.name)
    done = events[-1].study
    assert done.state == pb.STUDY_STATE_SUCCEEDED, done.error
    assert done == await get(client, accepted.name)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    found = await trials(client, done.name, size=1)
    assert [trial.number for trial in found] == [0, 1]
    points = [dict(trial.hyperparameters) for trial in found]
    assert sorted(points, key=str) == [{"learning_rate": rate, "width": 16.0} for rate in rates.values]
    assert all(trial.state == pb.TRIAL_STATE_COMPLETE and trial.epoch == 2 for trial in found)
    assert done.counts == pb.TrialCounts(complete=2)
    assert done.best_trial == max(found, key=lambda trial: trial.value)
    # They ran side by side.
    assert max(event.study.counts.running for event in events if event.HasField("study")) == 2
    jobs = [await client.get(trial.job) for trial in found]
    assert max(job.start_time.ToNanoseconds() for job in jobs) < min(job.end_time.ToNanoseconds() for job in jobs)
    for job in jobs:
        assert (job.study, job.spec.HasField("publication"), job.model_version) == (done.name, False, "")
    listed = (await client.stub.ListJobs(pb.ListJobsRequest(study=done.name))).jobs
    assert {job.name for job in listed} == {trial.job for trial in found}
    # Asked again, it is answered as the first time.
    assert await create(client, asked, "grid") == accepted
    async with registry_process.connected(registry) as models:
        name = f"{PUBLICATION.model}/aliases/best"
        version = (await models.stub.GetModelVersion(registry_pb2.GetModelVersionRequest(name=name))).model_version
    assert version.name == done.model_version == "models/searched/versions/1"
    assert (version.lineage.study, version.lineage.job) == (done.name, done.best_trial.job)
    assert version.labels["study.trials_complete"] == "2"
    assert version.description.startswith("found by a study\n\nBest of 2 trials")
    await becomes(lambda: not list((training[1] / "jobs").glob("*/")))


async def test_a_watch_that_was_cut_is_taken_up_without_gap_or_repeat_and_a_stop_ends_it(client: Client) -> None:
    accepted = await create(client, study_spec(epochs=400.0, trials_max=50, parallel_max=2))
    seen: list[pb.WatchStudyResponse] = []
    while not seen or seen[-1].study.state not in FINAL:
        start = seen[-1].sequence + 1 if seen else 0
        async with contextlib.aclosing(watch(client, accepted.name, start)) as events:
            async for event in events:
                seen.append(event)
                if len(seen) == 12:
                    assert (await stop(client, accepted.name)).state == pb.STUDY_STATE_STOPPING
                if len(seen) % 4 == 0:
                    break
    done = seen[-1].study
    assert done.state == pb.STUDY_STATE_STOPPED
    assert done.counts.running == 0
    assert seen == await end(client, accepted.name)
    assert [event.sequence for event in seen] == list(range(1, len(seen) + 1))
    assert await stop(client, accepted.name) == done
    for trial in await trials(client, accepted.name):
        assert (await client.get(trial.job)).state == pb.JOB_STATE_CANCELLED
    async with refused(RevisionLost, "SEQUENCE_LOST"):
        async for _ in watch(client, accepted.name, seen[-1].sequence + 2):
            pass


async def test_a_bad_trial_is_pruned_by_the_figures_of_its_training(client: Client) -> None:
    """A rate at which nothing is learned, second of two: its many epochs are not waited for."""
    order = pb.SearchDimension(name="learning_rate", values=[1e-6, 0.01])
    asked = study_spec(epochs=8.0, sampler=pb.SAMPLER_GRID, pruner=pb.PRUNER_MEDIAN, dimensions=[order])
    events = await end(client, (await create(client, asked)).name)
    done = events[-1].study
    assert done.state == pb.STUDY_STATE_SUCCEEDED, done.error
    found = await trials(client, done.name)
    assert [trial.hyperparameters["learning_rate"] for trial in found][-1] == 1e-6, "in the order of this seed"
    assert found[1].state == pb.TRIAL_STATE_PRUNED
    assert found[1].epoch < 8
    job = await client.get(found[1].job)
    assert job.state == pb.JOB_STATE_CANCELLED
    lines = [event.log.message for event in await client.end(job.name) if event.HasField("log")]
    assert any(line.startswith("pruned after epoch") for line in lines)


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"dimensions": []}, "spec.dimensions", "INVALID_FIELD"),
        ({"dimensions": [pb.SearchDimension(name="depht")]}, "spec.dimensions[0].name", "INVALID_FIELD"),
        ({"dimensions": [RATES, RATES]}, "spec.dimensions[1].name", "INVALID_FIELD"),
        ({"sampler": pb.SAMPLER_GRID}, "spec.dimensions[0].step", "INVALID_FIELD"),
        ({"dimensions": [HUGE]}, "spec.dimensions[0].values[0]", "INVALID_FIELD"),
        ({"trials_max": -1}, "spec.trials_max", "INVALID_FIELD"),
        ({"job": {"recipe": "transformer"}}, "spec.job.recipe", "UNKNOWN_RECIPE"),
        ({"job": {"dataset": "imagenet"}}, "spec.job.dataset", "UNKNOWN_DATASET"),
        ({"job": {"hyperparameters": {"epochs": 0}}}, "spec.job.hyperparameters['epochs']", "INVALID_FIELD"),
        ({"job": {"resources": pb.Resources(gpus=4000)}}, "spec.job.resources.gpus", "RESOURCES_TOO_LARGE"),
    ],
)  # fmt: skip
async def test_impossible_studies_are_refused_and_the_field_is_named(
    client: Client, changes: dict[str, Any], field: str, reason: str
) -> None:
    asked = study_spec(**{name: value for name, value in changes.items() if name != "job"})
    asked.job.MergeFrom(pb.JobSpec(**changes.get("job", {})))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await create(client, asked)
    error = mesh_error(raised.value)
    assert isinstance(error, InvalidInput)
    assert error.reason == reason
    assert field in {violation.field for violation in error.violations}


async def test_errors_of_names_states_and_bounds(client: Client) -> None:
    long = study_spec(epochs=400.0)
    first, second = await create(client, long, "first"), await create(client, long, "second")
    async with refused(Overloaded, "STUDIES_TOO_MANY"):
        await create(client, long, "third")
    assert await create(client, long, "first") == first
    async with refused(AlreadyExists, "REQUEST_ID_REUSED"):
        await create(client, study_spec(epochs=3.0), "first")
    for name in (first.name, second.name):
        await stop(client, name)
        await end(client, name)
    for call in (get, stop, end, trials):
        async with refused(NotFound, "STUDY_NOT_FOUND"):
            await call(client, "studies/nobody")
        async with refused(InvalidInput, "INVALID_FIELD"):
            await call(client, "jobs/x")
    everything = (await client.stub.ListStudies(pb.ListStudiesRequest())).studies
    succeeded = next(study for study in everything if study.state == pb.STUDY_STATE_SUCCEEDED)
    async with refused(WrongState, "STUDY_FINISHED"):
        await stop(client, succeeded.name)
    for request in (pb.ListStudiesRequest(page_token="x"), pb.ListStudiesRequest(page_token="after-1")):
        async with refused(InvalidInput, "INVALID_FIELD"):
            await client.stub.ListStudies(request)
    async with refused(InvalidInput, "INVALID_FIELD"):
        await client.stub.ListTrials(pb.ListTrialsRequest(parent=first.name, page_token="before-1"))
    paged: list[pb.Study] = []
    token = ""
    while True:
        page = await client.stub.ListStudies(pb.ListStudiesRequest(page_size=2, page_token=token))
        paged += page.studies
        token = page.next_page_token
        if not token:
            break
    assert paged == list(everything)
    times = [study.create_time.ToNanoseconds() for study in everything]
    assert times == sorted(times, reverse=True)


@pytest.mark.timeout(400)
async def test_killed_in_the_middle_again_and_again_the_study_goes_on_with_every_trial_once(
    registry: str, tmp_path: Path
) -> None:
    chance = random.Random(20261122)  # noqa: S311 - moments, not secrets
    asked = study_spec(publish=True, trials_max=3, parallel_max=2, pruner=pb.PRUNER_HYPERBAND)
    asked.job.publication.model = "models/survivor"
    name, seen = "", list[pb.WatchStudyResponse]()
    for _ in range(2):
        with running(tmp_path, registry=registry, env=COLD) as (service, address):
            async with connected(address) as client:
                name = (await create(client, asked, "once")).name
                target = len(seen) + chance.randint(1, 3)
                async with contextlib.aclosing(watch(client, name, len(seen) + 1)) as events:
                    async for event in events:
                        seen.append(event)
                        if len(seen) >= target:
                            break
                await asyncio.sleep(chance.uniform(0.0, 0.3))
                service.signal(signal.SIGKILL)
                service.wait()
    with running(tmp_path, registry=registry, env=COLD) as (_, address):
        async with connected(address) as client:
            history = await end(client, name)
            done = history[-1].study
            found = await trials(client, name)
            jobs = (await client.stub.ListJobs(pb.ListJobsRequest(page_size=1000))).jobs
            studies = (await client.stub.ListStudies(pb.ListStudiesRequest())).studies
    assert done.state == pb.STUDY_STATE_SUCCEEDED, done.error
    assert [study.name for study in studies] == [name]
    # What was told before a kill is what happened.
    assert history[: len(seen)] == seen
    assert [event.sequence for event in history] == list(range(1, done.last_sequence + 1))
    assert [trial.number for trial in found] == [0, 1, 2]
    assert sorted(trial.job for trial in found) == sorted(job.name for job in jobs)
    for trial in found:
        told = [event.trial for event in history if event.HasField("trial") and event.trial.number == trial.number]
        assert told[-1] == trial
        assert {each.job for each in told} == {trial.job}
        assert [each.epoch for each in told] == sorted(each.epoch for each in told)
        assert trial.state in {pb.TRIAL_STATE_COMPLETE, pb.TRIAL_STATE_PRUNED}
    complete = [trial for trial in found if trial.state == pb.TRIAL_STATE_COMPLETE]
    assert done.best_trial == max(complete, key=lambda trial: trial.value)
    async with registry_process.connected(registry) as models:
        versions = await models.stub.ListModelVersions(registry_pb2.ListModelVersionsRequest(parent="models/survivor"))
    assert [version.name for version in versions.model_versions] == [done.model_version]
