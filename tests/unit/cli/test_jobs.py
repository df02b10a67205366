from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh.training.v1 import training_pb2_grpc
from mlmesh_cli.jobs import follow
from tests.unit.cli.conftest import FakeMesh


def _event(sequence: int, state: pb.JobState.ValueType = pb.JOB_STATE_RUNNING) -> pb.WatchJobResponse:
    return pb.WatchJobResponse(sequence=sequence, job=pb.Job(name="jobs/1", state=state))


async def _follow(mesh: FakeMesh) -> list[int]:
    async with grpc.aio.insecure_channel(mesh.environ["MLMESH_TRAINING_TARGET"]) as channel:
        stub = training_pb2_grpc.TrainingServiceStub(channel)
        return [event.sequence async for event in follow(stub, "jobs/1", pause_s=0)]


async def test_a_cut_watch_goes_on_where_it_ended(mesh: FakeMesh) -> None:
    def watch(request: pb.WatchJobRequest, context: Any) -> Iterator[pb.WatchJobResponse]:
        if request.from_sequence == 0:
            yield _event(1)
            yield _event(2)
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        if request.from_sequence == 3 and len(mesh.training.requests["WatchJob"]) == 2:
            return  # a proxy closed it without a word
        yield _event(3)
        yield _event(4, pb.JOB_STATE_SUCCEEDED)

    mesh.training["WatchJob"] = watch
    assert await _follow(mesh) == [1, 2, 3, 4]
    assert [request.from_sequence for request in mesh.training.requests["WatchJob"]] == [0, 3, 3]


async def test_the_history_of_a_retried_job_goes_on_after_a_final_state(mesh: FakeMesh) -> None:
    def watch(request: pb.WatchJobRequest, context: Any) -> Iterator[pb.WatchJobResponse]:
        if request.from_sequence == 0:
            yield _event(1)
            yield _event(2, pb.JOB_STATE_FAILED)
            yield _event(3, pb.JOB_STATE_QUEUED)
            yield _event(4, pb.JOB_STATE_SUCCEEDED)
            context.abort(grpc.StatusCode.UNAVAILABLE, "cut before the quiet end")

    mesh.training["WatchJob"] = watch
    assert await _follow(mesh) == [1, 2, 3, 4]
    assert [request.from_sequence for request in mesh.training.requests["WatchJob"]] == [0, 5]


async def test_a_refusal_is_not_tried_again(mesh: FakeMesh) -> None:
    def watch(_request: pb.WatchJobRequest, context: Any) -> Iterator[pb.WatchJobResponse]:
        context.abort(grpc.StatusCode.NOT_FOUND, "no such job")
        yield _event(1)

    mesh.training["WatchJob"] = watch
    with pytest.raises(grpc.aio.AioRpcError, match="no such job"):
        await _follow(mesh)
    assert len(mesh.training.requests["WatchJob"]) == 1


async def test_a_service_that_stays_away_is_given_up(mesh: FakeMesh) -> None:
    def watch(_request: pb.WatchJobRequest, context: Any) -> Iterator[pb.WatchJobResponse]:
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        yield _event(1)

    mesh.training["WatchJob"] = watch
    with pytest.raises(grpc.aio.AioRpcError, match="gone"):
        await _follow(mesh)
    assert len(mesh.training.requests["WatchJob"]) == 31
