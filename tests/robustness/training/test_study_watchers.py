"""A watcher of a study that does not keep up is ended, with where to go on; the study does not wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh.training.v1 import training_pb2_grpc
from mlmesh_runtime.channel import mesh_error
from mlmesh_runtime.errors import Overloaded
from mlmesh_runtime.server import Service as Served
from mlmesh_training.jobs import Publication
from mlmesh_training.queue import WATCH_PAGE_ITEMS
from mlmesh_training.servicer import TrainingServicer
from mlmesh_training.studies import study as steps
from mlmesh_training.studies.study import Event
from tests.support import server as servers
from tests.support.studies import study_spec
from tests.support.studies_service import Service, serving


async def goes_on(service: Service, uid: str, trials: int) -> None:
    """Trials begin and end: four events each."""
    for _ in range(trials):
        study = await service.book.change(uid, partial(steps.chosen, hyperparameters={"width": 8.0}))
        number = study.chosen - 1
        await service.book.change_trial(uid, number, partial(steps.begun, job=f"job-{number}"))
        await service.book.change_trial(uid, number, partial(steps.failed, reason="for the sake of it"))


async def test_one_whose_events_were_dropped_before_it_read_them_is_ended(tmp_path: Path) -> None:
    async with serving(tmp_path, running=False, events_max=WATCH_PAGE_ITEMS) as service:
        study = await service.book.create(study_spec(trials_max=200, failures_max=500))
        async with aclosing(service.book.watch(study.uid)) as events:
            assert (await anext(events)).sequence == 1
            await goes_on(service, study.uid, 40)
            with pytest.raises(Overloaded) as raised:
                async for _ in events:
                    pass
        assert raised.value.reason == "WATCHER_TOO_SLOW"


@asynccontextmanager
async def served(service: Service, *, stall_s: float) -> AsyncIterator[str]:
    """The RPCs over the book."""
    described = pb.DESCRIPTOR.services_by_name["TrainingService"]
    rpcs = Served(
        add=training_pb2_grpc.add_TrainingServiceServicer_to_server,
        servicer=TrainingServicer(service.queue, service.book, stall_s=stall_s),
        descriptor=described,
        deadline_exempt={"WatchStudy"},
    )
    async with servers.serving(rpcs, grace_s=0.1) as server:
        yield server.address


def noted(service: Service) -> asyncio.Event:
    """Set when a watch ends before the study's last event was taken."""
    ended, watch = asyncio.Event(), service.book.watch

    async def watching(uid: str, *, from_sequence: int = 0) -> AsyncGenerator[Event]:
        try:
            async for event in watch(uid, from_sequence=from_sequence):
                yield event
        except GeneratorExit:
            ended.set()
            raise

    service.book.watch = watching  # type: ignore[method-assign]
    return ended


async def read_on(call: Any) -> None:
    """All that is left of a stream, by its reads."""
    while await call.read():
        pass


async def test_one_that_takes_nothing_is_ended_and_another_is_not_held_up(tmp_path: Path) -> None:
    # Long enough that what is not taken soon fills all that lies between.
    publication = Publication(model="models/m", description="x" * 60_000)
    async with serving(tmp_path, running=False) as service, served(service, stall_s=0.3) as address:
        study = await service.book.create(
            study_spec(trials_max=200, failures_max=500, job={"publication": publication})
        )
        await goes_on(service, study.uid, 60)
        await service.book.stop(study.uid)
        await service.book.change(study.uid, steps.closed)
        async with grpc.aio.insecure_channel(address) as channel:
            stub = training_pb2_grpc.TrainingServiceStub(channel)
            request = pb.WatchStudyRequest(name=study.name)
            idle, ended = cast(Any, stub.WatchStudy(request)), noted(service)
            assert (await idle.read()).sequence == 1
            taken = [event.sequence async for event in stub.WatchStudy(request)]
            assert taken == list(range(1, 244))
            async with asyncio.timeout(20):
                await ended.wait()
            # The status comes behind what was written before.
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await read_on(idle)
    error = mesh_error(raised.value)
    assert error.reason == "WATCHER_TOO_SLOW"
    assert "watch again from sequence" in error.message
