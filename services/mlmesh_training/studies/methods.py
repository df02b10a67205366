# ruff: noqa: ARG002  gRPC hands every method a context; few need it
"""The RPCs of studies: check, call, reply. A part of the service's servicer."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_runtime.errors import Overloaded
from mlmesh_runtime.identity import current_identity
from mlmesh_training.paging import page_key, page_token
from mlmesh_training.studies import convert
from mlmesh_training.studies.book import StudyBook

PAGE_SIZE_DEFAULT = 50


class StudyMethods:
    """CreateStudy to WatchStudy; the servicer sets the attributes."""

    _studies: StudyBook
    _stall_s: float

    async def CreateStudy(self, request: pb.CreateStudyRequest, context: Any) -> pb.CreateStudyResponse:
        study = await self._studies.create(
            convert.spec(request.spec), request_id=request.request_id, creator=current_identity()
        )
        return pb.CreateStudyResponse(study=convert.study(study))

    async def GetStudy(self, request: pb.GetStudyRequest, context: Any) -> pb.GetStudyResponse:
        return pb.GetStudyResponse(study=convert.study(await self._studies.get(convert.uid(request.name))))

    async def ListStudies(self, request: pb.ListStudiesRequest, context: Any) -> pb.ListStudiesResponse:
        found, key = await self._studies.page(
            size=request.page_size or PAGE_SIZE_DEFAULT, before=page_key(request.page_token)
        )
        return pb.ListStudiesResponse(studies=map(convert.study, found), next_page_token=page_token(key))

    async def ListTrials(self, request: pb.ListTrialsRequest, context: Any) -> pb.ListTrialsResponse:
        found, key = await self._studies.trials(
            convert.uid(request.parent),
            size=request.page_size or PAGE_SIZE_DEFAULT,
            after=convert.trials_key(request.page_token),
        )
        return pb.ListTrialsResponse(trials=map(convert.trial, found), next_page_token=convert.trials_token(key))

    async def StopStudy(self, request: pb.StopStudyRequest, context: Any) -> pb.StopStudyResponse:
        return pb.StopStudyResponse(study=convert.study(await self._studies.stop(convert.uid(request.name))))

    async def WatchStudy(self, request: pb.WatchStudyRequest, context: Any) -> None:
        # Written, not yielded: only so is there a bound on how long a client that does not read may hold this up.
        watching = self._studies.watch(convert.uid(request.name), from_sequence=request.from_sequence)
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
