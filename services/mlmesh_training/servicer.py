# ruff: noqa: ARG002  gRPC hands every method a context; few need it
"""The RPCs: check, call, reply. Field rules were checked by protovalidate, errors are mapped by the runtime."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh.training.v1.training_pb2_grpc import TrainingServiceServicer as Base
from mlmesh_runtime.errors import Overloaded
from mlmesh_runtime.identity import current_identity
from mlmesh_training import convert
from mlmesh_training.datasets import DATASETS
from mlmesh_training.paging import page_key, page_token
from mlmesh_training.queue import JobQueue
from mlmesh_training.recipes import known
from mlmesh_training.studies.book import StudyBook
from mlmesh_training.studies.methods import StudyMethods

PAGE_SIZE_DEFAULT = 50


# The stubs' types know generators only; see WatchJob.
class TrainingServicer(StudyMethods, Base):  # type: ignore[misc]
    """Implements mlmesh.training.v1.TrainingService.

    Args:
        stall_s: a watcher that takes no event for this long is ended.
    """

    def __init__(self, queue: JobQueue, studies: StudyBook, *, stall_s: float) -> None:
        self._queue = queue
        self._studies = studies
        self._stall_s = stall_s

    async def CreateJob(self, request: pb.CreateJobRequest, context: Any) -> pb.CreateJobResponse:
        job = await self._queue.create(
            convert.spec(request.spec), request_id=request.request_id, creator=current_identity()
        )
        return pb.CreateJobResponse(job=convert.job(job))

    async def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.GetJobResponse:
        return pb.GetJobResponse(job=convert.job(await self._queue.get(convert.uid(request.name))))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:
        found, key = await self._queue.page(
            size=request.page_size or PAGE_SIZE_DEFAULT,
            before=page_key(request.page_token),
            states=convert.states(request.states),
            study=request.study,
        )
        return pb.ListJobsResponse(jobs=map(convert.job, found), next_page_token=page_token(key))

    async def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> pb.CancelJobResponse:
        return pb.CancelJobResponse(job=convert.job(await self._queue.cancel(convert.uid(request.name))))

    async def PauseJob(self, request: pb.PauseJobRequest, context: Any) -> pb.PauseJobResponse:
        return pb.PauseJobResponse(job=convert.job(await self._queue.pause(convert.uid(request.name))))

    async def ResumeJob(self, request: pb.ResumeJobRequest, context: Any) -> pb.ResumeJobResponse:
        return pb.ResumeJobResponse(job=convert.job(await self._queue.resume(convert.uid(request.name))))

    async def RetryJob(self, request: pb.RetryJobRequest, context: Any) -> pb.RetryJobResponse:
        return pb.RetryJobResponse(job=convert.job(await self._queue.retry(convert.uid(request.name))))

    async def DeleteJob(self, request: pb.DeleteJobRequest, context: Any) -> pb.DeleteJobResponse:
        await self._queue.delete(convert.uid(request.name))
        return pb.DeleteJobResponse()

    # The stubs' type knows generators only; gRPC and our runtime also take a coroutine that writes.
    async def WatchJob(self, request: pb.WatchJobRequest, context: Any) -> None:  # type: ignore[override]
        # Written, not yielded: only so is there a bound on how long a client that does not read may hold this up.
        watching = self._queue.watch(convert.uid(request.name), from_sequence=request.from_sequence)
        async with aclosing(watching) as events:
            async for event in events:
                try:
                    async with asyncio.timeout(self._stall_s):
                        await context.write(convert.event(event))
                except TimeoutError as error:
                    raise Overloaded(
                        f"took no event for {self._stall_s:g} s; watch again from sequence {event.sequence}",
                        reason="WATCHER_TOO_SLOW",
                    ) from error

    async def ListRecipes(self, request: pb.ListRecipesRequest, context: Any) -> pb.ListRecipesResponse:
        return pb.ListRecipesResponse(recipes=[convert.recipe(recipe) for _, recipe in sorted(known().items())])

    async def ListDatasets(self, request: pb.ListDatasetsRequest, context: Any) -> pb.ListDatasetsResponse:
        return pb.ListDatasetsResponse(datasets=[convert.dataset(found) for _, found in sorted(DATASETS.items())])
