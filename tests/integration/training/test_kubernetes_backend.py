"""Training on a cluster: TrainJobs against Kubernetes' own API server, workers as real processes over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from mlmesh.training.v1 import worker_pb2, worker_pb2_grpc
from mlmesh_runtime.channel import open_channel
from mlmesh_runtime.errors import InvalidInput
from mlmesh_runtime.executors import BoundedExecutor
from mlmesh_runtime.server import Service
from mlmesh_training.backends.base import Died, Finished, Outcome, Paused, Report, Stopped, TrainingTask
from mlmesh_training.backends.kubernetes.backend import KubernetesBackend, KubernetesLimits
from mlmesh_training.backends.kubernetes.cluster import Cluster
from mlmesh_training.backends.kubernetes.hub import WorkerHub
from mlmesh_training.backends.kubernetes.objects import Placement, job_name, train_job
from mlmesh_training.jobs import Checkpoint, JobPhase, LogLine, Metrics
from mlmesh_training.options import Distribution, Resources
from mlmesh_training.worker_servicer import TOKEN_HEADER, WorkerServicer
from tests.support.kubernetes import NAMESPACE, ApiServer, Nodes, api_server
from tests.support.server import serving

UID = "mlp-digits-0123456789"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with api_server(tmp_path_factory.mktemp("kubernetes")) as server:
        yield server


def task(*, epochs: int = 3, seed: int = 0) -> TrainingTask:
    values = {"epochs": epochs, "batch_size": 64, "learning_rate": 0.005, "weight_decay": 1e-4, "dropout": 0.2}
    values |= {"label_smoothing": 0.0, "shift": 0, "width": 32, "depth": 1}
    return TrainingTask(uid=UID, recipe="mlp", dataset="digits", hyperparameters=values, seed=seed, threads=1)


@dataclass
class Attempts:
    """A backend, and what its attempts report."""

    backend: KubernetesBackend
    nodes: Nodes
    api: ApiServer
    address: str
    hub: WorkerHub
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    pause: asyncio.Event = field(default_factory=asyncio.Event)
    reports: list[Report] = field(default_factory=list)
    came: asyncio.Event = field(default_factory=asyncio.Event)

    async def report(self, report: Report) -> None:
        self.reports.append(report)
        self.came.set()

    async def run(self, wanted: TrainingTask) -> Outcome:
        self.stop.clear()
        self.pause.clear()
        return await self.backend.run(wanted, report=self.report, stop=self.stop, pause=self.pause)

    async def until(self, wanted: Callable[[Report], bool], count: int = 1) -> None:
        """Wait until so many such reports came."""
        async with asyncio.timeout(90):
            while sum(map(wanted, self.reports)) < count:
                self.came.clear()
                await self.came.wait()

    @property
    def name(self) -> str:
        return job_name(UID)

    def train_job(self) -> dict[str, Any]:
        (found,) = self.api.train_jobs()
        return found


@pytest.fixture
async def attempts(api: ApiServer, tmp_path: Path) -> AsyncIterator[Attempts]:
    executor = BoundedExecutor("disk", workers_max=4)
    hub = WorkerHub(os.urandom(32))
    service = Service(
        add=worker_pb2_grpc.add_TrainingWorkerServiceServicer_to_server,
        servicer=WorkerServicer(hub, executor, threads=1, file_bytes_max=1 << 30),
        descriptor=worker_pb2.DESCRIPTOR.services_by_name["TrainingWorkerService"],
        deadline_exempt={"ReportProgress"},
    )
    async with serving(service) as server, Cluster(NAMESPACE, kubeconfig=str(api.kubeconfig)) as cluster:
        placement = Placement(namespace=NAMESPACE, image="mlmesh/training:test", target=server.address)
        backend = KubernetesBackend(
            tmp_path / "jobs",
            cluster=cluster,
            hub=hub,
            placement=placement,
            executor=executor,
            limits=KubernetesLimits(pause_s=30, delete_s=30),
        )
        with Nodes(api, environ={"OMP_NUM_THREADS": "1"}) as nodes:
            try:
                yield Attempts(backend=backend, nodes=nodes, api=api, address=server.address, hub=hub)
            finally:
                await backend.discard(UID)
                async with asyncio.timeout(30):
                    while api.train_jobs():  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
    executor.shutdown()


def epochs_of(reports: list[Report]) -> list[int]:
    return [each.progress.epoch for each in reports if isinstance(each, Checkpoint)]


async def test_a_job_runs_as_a_trainjob_and_the_same_stream_comes_back(attempts: Attempts) -> None:
    outcome = await attempts.run(task())
    assert isinstance(outcome, Finished), outcome
    assert outcome.model.evaluation.accuracy > 0.8
    phases = [each for each in attempts.reports if isinstance(each, JobPhase)]
    assert phases == [JobPhase.LOADING_DATA, JobPhase.TRAINING, JobPhase.EVALUATING, JobPhase.EXPORTING]
    assert epochs_of(attempts.reports) == [1, 2, 3]
    assert any(isinstance(each, Metrics) and "train_loss" in each.values for each in attempts.reports)
    lines = [each.message for each in attempts.reports if isinstance(each, LogLine)]
    assert f"TrainJob {attempts.name}: running" in lines
    # What the pod left is here, where the publisher looks for it.
    folder = attempts.backend.folder(UID)
    assert {file.path for file in outcome.model.files} <= {
        path.relative_to(folder).as_posix() for path in folder.rglob("*")
    }
    conditions = attempts.train_job()["status"]["conditions"]
    assert [(each["type"], each["status"]) for each in conditions] == [("Complete", "True")]


async def test_pause_suspends_and_resume_goes_on_from_the_checkpoint(attempts: Attempts) -> None:
    running = asyncio.ensure_future(attempts.run(task(epochs=300)))
    await attempts.until(lambda each: isinstance(each, Checkpoint), 2)
    attempts.pause.set()
    assert isinstance(await running, Paused)
    found = attempts.train_job()
    assert found["spec"]["suspend"] is True
    assert attempts.nodes.pids(attempts.name) == []
    done = epochs_of(attempts.reports)
    assert 2 <= done[-1] < 300

    assert isinstance(await attempts.run(task(epochs=300)), Finished)
    again = attempts.train_job()
    assert again["metadata"]["uid"] == found["metadata"]["uid"]
    assert again["spec"]["suspend"] is False
    # Nothing was trained twice: the pod of the second part began where the first ended, on a disk of its own.
    epochs = epochs_of(attempts.reports)
    assert epochs[-1] == 300
    assert sorted(set(epochs)) == list(range(1, 301))
    # The checkpoint of a pause may be within an epoch.
    assert len(epochs) <= 301


async def test_a_killed_pod_is_told_and_the_next_attempt_resumes(attempts: Attempts) -> None:
    running = asyncio.ensure_future(attempts.run(task(epochs=40)))
    await attempts.until(lambda each: isinstance(each, Checkpoint), 3)
    for pid in attempts.nodes.pids(attempts.name):
        os.killpg(pid, signal.SIGKILL)
    outcome = await running
    assert isinstance(outcome, Died), outcome
    assert not outcome.permanent
    assert "FailedJobs" in outcome.reason
    before = epochs_of(attempts.reports)[-1]
    attempts.reports.clear()
    assert isinstance(await attempts.run(task(epochs=40)), Finished)
    assert epochs_of(attempts.reports)[0] >= before


async def test_a_service_that_comes_back_goes_on_with_the_same_pods(attempts: Attempts) -> None:
    running = asyncio.ensure_future(attempts.run(task(epochs=60)))
    await attempts.until(lambda each: isinstance(each, Checkpoint), 2)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    pods = attempts.nodes.pids(attempts.name)
    assert pods
    outcome = await attempts.run(task(epochs=60))
    assert isinstance(outcome, Finished), outcome
    assert len(attempts.nodes.started) == 1
    assert epochs_of(attempts.reports) == list(range(1, 61))


async def test_two_machines_fit_one_model(attempts: Attempts) -> None:
    wanted = dataclasses.replace(task(epochs=4), distribution=Distribution(processes=2, nodes=2))
    outcome = await attempts.run(wanted)
    assert isinstance(outcome, Finished), outcome
    assert outcome.model.evaluation.accuracy > 0.8
    # Both pods took part, and one of them spoke.
    assert sorted(rank for _, rank in attempts.nodes.started) == [0, 1]
    assert epochs_of(attempts.reports) == [1, 2, 3, 4]


async def test_stop_deletes_the_trainjob_and_its_pods(attempts: Attempts) -> None:
    running = asyncio.ensure_future(attempts.run(task(epochs=400)))
    await attempts.until(lambda each: isinstance(each, Checkpoint))
    attempts.stop.set()
    assert isinstance(await running, Stopped)
    assert attempts.api.train_jobs() == []
    assert attempts.nodes.pids(attempts.name) == []


async def test_what_we_create_is_what_the_schema_knows(api: ApiServer) -> None:
    placement = Placement(namespace=NAMESPACE, image="mlmesh/training:test", queue="team", runtime="torch-distributed")
    wanted = train_job(task(), Resources(cpus=2, memory_bytes=1 << 30, gpus=1), placement, "token")
    wanted["metadata"]["name"] = "schema"
    # Strict: a field that the schema does not know would be an error, not dropped.
    made = api.call("POST", f"{api.jobs}?fieldValidation=Strict", wanted)
    try:
        assert made["spec"]["trainer"] == wanted["spec"]["trainer"]
        template = made["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]
        assert template == wanted["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]
    finally:
        api.call("DELETE", f"{api.jobs}/schema")


async def test_an_object_that_the_api_server_refuses_is_told_with_its_words(api: ApiServer) -> None:
    async with Cluster(NAMESPACE, kubeconfig=str(api.kubeconfig)) as cluster:
        wanted = train_job(task(), Resources(), Placement(namespace=NAMESPACE, image="i"), "token")
        wanted["spec"]["runtimeRef"] = {"kind": "ClusterTrainingRuntime"}
        with pytest.raises(InvalidInput, match=r"spec\.runtimeRef\.name"):
            await cluster.create(wanted)


async def test_workers_of_other_jobs_and_of_no_attempt_are_refused(attempts: Attempts) -> None:
    async with open_channel(attempts.address) as channel:
        stub = worker_pb2_grpc.TrainingWorkerServiceStub(channel)
        request = worker_pb2.GetWorkerTaskRequest(name=f"jobs/{UID}")
        for token, code in (
            ("", grpc.StatusCode.PERMISSION_DENIED),
            (attempts.hub.token("another"), grpc.StatusCode.PERMISSION_DENIED),
            (attempts.hub.token(UID), grpc.StatusCode.UNAVAILABLE),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.GetWorkerTask(request, metadata=((TOKEN_HEADER, token),))
            assert refused.value.code() is code
