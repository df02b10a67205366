"""The training service as its own process, and a client of it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh.training.v1.training_pb2_grpc import TrainingServiceStub
from mlmesh_runtime.channel import MeshChannel, mesh_error, open_channel
from mlmesh_runtime.errors import MeshError
from tests.support.server import Process, spawn

if TYPE_CHECKING:
    from mlmesh.training.v1.training_pb2_grpc import TrainingServiceAsyncStub

SUCCEEDED, FAILED, CANCELLED = pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED
QUEUED, RUNNING, PAUSED = pb.JOB_STATE_QUEUED, pb.JOB_STATE_RUNNING, pb.JOB_STATE_PAUSED
WATCH_S = 120.0


@contextlib.contextmanager
def running(
    data_dir: Path,
    *,
    registry: str = "127.0.0.1:1",
    env: Mapping[str, str] | None = None,
    python: Sequence[str] = (sys.executable, "-u"),
) -> Iterator[tuple[Process, str]]:
    """`python -m mlmesh_training` that listens; the process and its address. Killed at the end."""
    variables = {
        "MLMESH_LISTEN": "127.0.0.1:0",
        "MLMESH_DATA_DIR": str(data_dir),
        "MLMESH_GRACE_S": "1",
        "MLMESH_REGISTRY_TARGET": registry,
        "MLMESH_TRAINING_RETRY_S": "0.05",
        **(env or {}),
    }
    with spawn("-m", "mlmesh_training", env=variables, python=python) as process:
        yield process, process.listening()


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[Client]:
    """A client for the length of a block."""
    async with open_channel(address) as channel:
        yield Client(channel)


@contextlib.asynccontextmanager
async def refused(kind: type[MeshError], reason: str) -> AsyncIterator[None]:
    """The block ends with this error, told by status and ErrorInfo."""
    with pytest.raises(grpc.aio.AioRpcError) as told:
        yield
    error = mesh_error(told.value)
    assert (type(error), error.reason) == (kind, reason), told.value


def spec(recipe: str = "cnn", dataset: str = "digits", **fields: Any) -> pb.JobSpec:
    """A small job: a second or two of fitting."""
    values = {"epochs": 3.0, "width": 8.0, "batch_size": 32.0, **fields.pop("hyperparameters", {})}
    return pb.JobSpec(recipe=recipe, dataset=dataset, hyperparameters=values, seed=fields.pop("seed", 7), **fields)


class Client:
    """The RPCs in as few words as a test wants."""

    def __init__(self, channel: MeshChannel) -> None:
        self.stub: TrainingServiceAsyncStub = TrainingServiceStub(channel)

    async def create(self, spec: pb.JobSpec, request_id: str = "") -> pb.Job:
        """CreateJob."""
        return (await self.stub.CreateJob(pb.CreateJobRequest(spec=spec, request_id=request_id))).job

    async def get(self, name: str) -> pb.Job:
        """GetJob."""
        return (await self.stub.GetJob(pb.GetJobRequest(name=name))).job

    async def cancel(self, name: str) -> pb.Job:
        """CancelJob."""
        return (await self.stub.CancelJob(pb.CancelJobRequest(name=name))).job

    async def pause(self, name: str) -> pb.Job:
        """PauseJob."""
        return (await self.stub.PauseJob(pb.PauseJobRequest(name=name))).job

    async def resume(self, name: str) -> pb.Job:
        """ResumeJob."""
        return (await self.stub.ResumeJob(pb.ResumeJobRequest(name=name))).job

    async def retry(self, name: str) -> pb.Job:
        """RetryJob."""
        return (await self.stub.RetryJob(pb.RetryJobRequest(name=name))).job

    async def delete(self, name: str) -> None:
        """DeleteJob."""
        await self.stub.DeleteJob(pb.DeleteJobRequest(name=name))

    async def list(self, **fields: Any) -> list[pb.Job]:
        """ListJobs, one page."""
        return list((await self.stub.ListJobs(pb.ListJobsRequest(**fields))).jobs)

    async def reaches(self, name: str, state: pb.JobState.ValueType, start: int = 0) -> pb.Job:
        """The job as it was when it first was in a state, from a sequence on."""
        async with contextlib.aclosing(self.watch(name, start)) as events:
            async for event in events:
                if event.HasField("job") and event.job.state == state:
                    return event.job
        raise AssertionError(f"{name} never was {pb.JobState.Name(state)}")

    async def watch(
        self, name: str, start: int = 0, *, timeout: float = WATCH_S
    ) -> AsyncGenerator[pb.WatchJobResponse]:
        """WatchJob."""
        request = pb.WatchJobRequest(name=name, from_sequence=start)
        async for event in self.stub.WatchJob(request, timeout=timeout):
            yield event

    async def end(self, name: str, start: int = 0) -> list[pb.WatchJobResponse]:
        """Every event up to the end."""
        return [event async for event in self.watch(name, start)]


def last(events: list[pb.WatchJobResponse]) -> pb.Job:
    """The job as of its last event."""
    assert events[-1].WhichOneof("event") == "job"
    return events[-1].job


def states(events: list[pb.WatchJobResponse]) -> list[str]:
    """States in order, each once a stay."""
    found: list[str] = []
    for event in events:
        if event.WhichOneof("event") == "job":
            name = pb.JobState.Name(event.job.state).removeprefix("JOB_STATE_")
            if not found or found[-1] != name:
                found.append(name)
    return found


def gapless(events: list[pb.WatchJobResponse]) -> bool:
    """Whether sequences count up from 1."""
    return [event.sequence for event in events] == list(range(1, len(events) + 1))
