"""The training service on a cluster, as a process: a job outlives it, and the watch goes on where it was."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_runtime.errors import InvalidInput
from tests.support.kubernetes import NAMESPACE, ApiServer, Nodes, api_server, free_port
from tests.support.server import spawn
from tests.support.training_process import SUCCEEDED, connected, refused, running, spec, states

JOB = spec("mlp", hyperparameters={"epochs": 80, "width": 32})


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with api_server(tmp_path_factory.mktemp("kubernetes")) as server:
        yield server


def environment(api: ApiServer, address: str) -> dict[str, str]:
    return {
        "MLMESH_LISTEN": address,
        "MLMESH_TRAINING_BACKEND": "kubernetes",
        "MLMESH_TRAINING_KUBECONFIG": str(api.kubeconfig),
        "MLMESH_TRAINING_KUBERNETES_NAMESPACE": NAMESPACE,
        "MLMESH_TRAINING_KUBERNETES_IMAGE": "mlmesh/training:test",
        "MLMESH_TRAINING_KUBERNETES_TARGET": address,
        "MLMESH_TRAINING_THREADS": "1",
    }


async def test_a_job_outlives_kill_9_of_the_service_and_is_run_once(api: ApiServer, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    env = environment(api, address)
    with Nodes(api, environ={"OMP_NUM_THREADS": "1"}) as nodes:
        with running(tmp_path / "data", env=env) as (process, _):
            async with connected(address) as client:
                job = await client.create(JOB, request_id="once")
                seen: list[int] = []
                async for event in client.watch(job.name):
                    seen.append(event.sequence)
                    if event.HasField("checkpoint") and event.checkpoint.progress.epoch >= 2:
                        break
            process.popen.send_signal(signal.SIGKILL)
            process.popen.wait()
        with running(tmp_path / "data", env=env):
            async with connected(address) as client:
                again = await client.create(JOB, request_id="once")
                assert again.name == job.name
                events = [event async for event in client.watch(job.name, seen[-1] + 1)]
            async with asyncio.timeout(30):
                # What is left of a job that is done goes a moment after it.
                while api.train_jobs():  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        assert [event.sequence for event in events] == list(range(seen[-1] + 1, events[-1].sequence + 1))
        assert events[-1].job.state == SUCCEEDED, events[-1].job.error
        assert events[-1].job.evaluation.accuracy > 0.9
        # The pods of the first attempt went on: nothing was started twice.
        assert len(nodes.started) == 1
        assert "RETRYING" in states(events)


async def test_several_machines_are_taken_here_and_nowhere_else(api: ApiServer, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    spread = pb.Distribution(processes=4, nodes=2)
    with running(tmp_path / "local") as (_, local):
        async with connected(local) as client, refused(InvalidInput, "RESOURCES_TOO_LARGE"):
            await client.create(spec("mlp", distribution=spread))
    with running(tmp_path / "data", env=environment(api, address)):
        async with connected(address) as client:
            job = await client.create(spec("mlp", distribution=spread))
            async for event in client.watch(job.name):
                if event.HasField("log") and "pending" in event.log.message:
                    break
            (made,) = api.train_jobs()
            trainer = made["spec"]["trainer"]
            assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 2)
            await client.cancel(job.name)
            with Nodes(api, environ={}):
                events = [event async for event in client.watch(job.name)]
            assert events[-1].job.state == pb.JOB_STATE_CANCELLED


def test_what_is_missing_is_told_in_a_line(tmp_path: Path) -> None:
    env = {
        "MLMESH_DATA_DIR": str(tmp_path),
        "MLMESH_LISTEN": "127.0.0.1:0",
        "MLMESH_TRAINING_BACKEND": "kubernetes",
        "MLMESH_TRAINING_KUBERNETES_IMAGE": "mlmesh/training:test",
        "MLMESH_TRAINING_KUBERNETES_NAMESPACE": NAMESPACE,
    }
    with spawn("-m", "mlmesh_training", env=env) as process:
        assert process.popen.wait(60) == 2
        assert "needs a pod's service account or MLMESH_TRAINING_KUBECONFIG" in process.log()
