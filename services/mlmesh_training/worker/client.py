"""The training service as a worker sees it: files both ways, and one stream of reports and commands.

Every step is tried again until it works: a worker outlives restarts of the service and of the network between them. One
whose job is gone is ended by the cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc

from mlmesh.training.v1 import worker_pb2 as pb
from mlmesh.training.v1.worker_pb2_grpc import TrainingWorkerServiceStub
from mlmesh_runtime.channel import NO_DEADLINE, mesh_error
from mlmesh_runtime.chunks import VerifyingWriter, read_chunks, sha256_of
from mlmesh_runtime.errors import Conflict, Corrupt, Denied, InvalidInput, MeshError, NotFound, WrongState
from mlmesh_runtime.executors import BoundedExecutor, run_blocking

T = TypeVar("T")
logger = logging.getLogger(__name__)

TOKEN_HEADER = "mlmesh-job-token"  # noqa: S105
FILE_S = 3600.0
"""Longest time for one file."""
UNSTORED_MAX = 1000
"""Reports that may wait for their acknowledgement before the worker is held up."""
_RETRY_S = 1.0
_HOPELESS = (Denied, InvalidInput, WrongState, NotFound)


class TrainingClient:
    """One job's view of the training service.

    Args:
        channel: to the service.
        job: "jobs/{job}".
        worker: this worker's own name for its life.
        executor: threads for the disk.

    Errors of all methods: Denied, InvalidInput, NotFound: what trying again cannot mend.
    """

    def __init__(
        self, channel: grpc.aio.Channel, *, job: str, token: str, worker: str, executor: BoundedExecutor
    ) -> None:
        self._stub = TrainingWorkerServiceStub(channel)
        self._job = job
        self._metadata = ((TOKEN_HEADER, token),)
        self._worker = worker
        self._executor = executor
        self.reports = Reports()

    async def task(self) -> pb.GetWorkerTaskResponse:
        """What to do, and the files to fetch first."""

        async def get() -> pb.GetWorkerTaskResponse:
            return await self._stub.GetWorkerTask(
                pb.GetWorkerTaskRequest(name=self._job), metadata=self._metadata, timeout=60
            )

        return await _again(get)

    async def fetch(self, file: pb.WorkerFile, folder: Path) -> None:
        """Have a file, whole and verified; what is here of it already is not fetched again."""
        place = folder / file.path
        here = await run_blocking(self._executor, lambda: sha256_of(place) if place.is_file() else None)
        if here != (file.sha256, file.size_bytes):
            await _again(lambda: self._fetch(file, place))

    async def _fetch(self, file: pb.WorkerFile, place: Path) -> None:
        writer = await run_blocking(self._executor, VerifyingWriter, place, file.sha256, file.size_bytes)
        try:
            request = pb.DownloadWorkerFileRequest(name=self._job, path=file.path, offset=writer.committed)
            async for chunk in self._stub.DownloadWorkerFile(request, metadata=self._metadata, timeout=FILE_S):
                await run_blocking(self._executor, writer.write, chunk.offset, chunk.data, chunk.crc32c)
            await run_blocking(self._executor, writer.finish)
        finally:
            writer.close()

    async def bring(self, folder: Path, path: str) -> None:
        """Store a file with the service."""
        sha256, size_bytes = await run_blocking(self._executor, sha256_of, folder / path)
        file = pb.WorkerFile(path=path, size_bytes=size_bytes, sha256=sha256)
        offset = 0

        async def send() -> None:
            nonlocal offset
            try:
                await self._stub.UploadWorkerFile(
                    self._chunks(folder / path, file, offset), metadata=self._metadata, timeout=FILE_S
                )
            except grpc.aio.AioRpcError as error:
                failure = mesh_error(error)
                if isinstance(failure, Conflict):
                    # A part of it is there: go on from where it ends.
                    offset = int(failure.metadata.get("committed_bytes", 0))
                raise failure from error

        await _again(send)

    async def _chunks(self, path: Path, file: pb.WorkerFile, offset: int) -> AsyncIterator[pb.UploadWorkerFileRequest]:
        chunks = read_chunks(path, offset=offset)
        first = await run_blocking(self._executor, next, chunks, None)
        request = pb.UploadWorkerFileRequest(name=self._job, file=file, offset=offset)
        while first is not None:
            request.offset, request.data, request.crc32c = first.offset, first.data, first.crc32c
            yield request
            request = pb.UploadWorkerFileRequest()
            first = await run_blocking(self._executor, next, chunks, None)
        if request.name:
            yield request

    async def report(self, command: Callable[[int], None]) -> None:
        """Send reports until `reports.close()` and all are stored; calls `command` with each command that comes."""
        while not self.reports.done:
            await _again(lambda: self._stream(command))

    async def _stream(self, command: Callable[[int], None]) -> None:
        first = pb.ReportProgressRequest(name=self._job, worker=self._worker)

        async def requests() -> AsyncIterator[pb.ReportProgressRequest]:
            yield first
            async with contextlib.aclosing(self.reports.unstored()) as unstored:
                async for sequence, line in unstored:
                    yield pb.ReportProgressRequest(sequence=sequence, report=line)

        call = self._stub.ReportProgress(requests(), metadata=self._metadata, timeout=NO_DEADLINE)
        async for reply in call:
            self.reports.stored(reply.acknowledged_sequence)
            command(reply.command)


class Reports:
    """Reports that are not known to be stored yet, in order. Lives on one event loop."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, str]] = deque()
        self._last = 0
        self._closed = False
        self._changed = asyncio.Event()

    @property
    def done(self) -> bool:
        """Whether nothing more comes and all is stored."""
        return self._closed and not self._waiting

    async def put(self, line: str) -> None:
        """Add one; waits while too many are not stored."""
        while len(self._waiting) >= UNSTORED_MAX:
            await self._changed.wait()
        self._last += 1
        self._waiting.append((self._last, line))
        self._wake()

    def close(self) -> None:
        """Nothing more comes."""
        self._closed = True
        self._wake()

    def stored(self, sequence: int) -> None:
        """All up to this one are stored."""
        while self._waiting and self._waiting[0][0] <= sequence:
            self._waiting.popleft()
        self._wake()

    async def flushed(self) -> None:
        """Wait until all is stored."""
        while self._waiting:
            await self._changed.wait()

    async def unstored(self) -> AsyncGenerator[tuple[int, str], None]:
        """Each report from the oldest that is not stored on, as they come; ends when nothing more comes."""
        sent = self._waiting[0][0] - 1 if self._waiting else self._last
        while True:
            changed = self._changed
            for item in [item for item in self._waiting if item[0] > sent]:
                yield item
                sent = item[0]
            if self._closed and sent == self._last:
                return
            if sent == self._last:
                await changed.wait()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


async def _again(step: Callable[[], Awaitable[T]]) -> T:
    """A step until it works; what trying again cannot mend is raised."""
    delay_s = _RETRY_S
    while True:
        try:
            return await step()
        except grpc.aio.AioRpcError as error:
            failure: MeshError = mesh_error(error)
        except MeshError as error:
            failure = error
        if isinstance(failure, _HOPELESS) and not _passing(failure):
            raise failure
        logger.warning("the training service does not answer well", extra={"error": failure.message})
        await asyncio.sleep(0 if isinstance(failure, Conflict) else delay_s)
        delay_s = min(30.0, delay_s * 2) if not isinstance(failure, Conflict | Corrupt) else _RETRY_S


def _passing(failure: Any) -> bool:
    """Whether a refusal passes: an earlier upload of the same file whose connection is not known to be dead yet."""
    return bool(failure.reason == "WRITER_BUSY")
