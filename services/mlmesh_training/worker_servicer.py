# ruff: noqa: ARG002  gRPC hands every method a context; few need it
"""The RPCs of workers on other machines: check the token, call, reply."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from mlmesh.training.v1 import worker_pb2 as pb
from mlmesh.training.v1.worker_pb2_grpc import TrainingWorkerServiceServicer
from mlmesh_runtime.calls import metadata_value
from mlmesh_runtime.chunks import Chunk
from mlmesh_runtime.errors import InvalidInput
from mlmesh_runtime.executors import BoundedExecutor, run_blocking
from mlmesh_training import convert
from mlmesh_training.backends.base import TASK_FILE
from mlmesh_training.backends.kubernetes import files
from mlmesh_training.backends.kubernetes.hub import Command, Session, WorkerHub, not_ready

TOKEN_HEADER = "mlmesh-job-token"  # noqa: S105
_COMMANDS = {
    Command.NONE: pb.WORKER_COMMAND_UNSPECIFIED,
    Command.PAUSE: pb.WORKER_COMMAND_PAUSE,
    Command.STOP: pb.WORKER_COMMAND_STOP,
}


class WorkerServicer(TrainingWorkerServiceServicer):
    """Implements mlmesh.training.v1.TrainingWorkerService.

    Args:
        executor: threads for the disk.
        threads: of torch in a worker's process; 0 lets it take all.
        file_bytes_max: largest file that a worker may bring.
    """

    def __init__(self, hub: WorkerHub, executor: BoundedExecutor, *, threads: int, file_bytes_max: int) -> None:
        self._hub = hub
        self._executor = executor
        self._threads = threads
        self._file_bytes_max = file_bytes_max

    async def GetWorkerTask(self, request: pb.GetWorkerTaskRequest, context: Any) -> pb.GetWorkerTaskResponse:
        folder = self._session(request.name).folder
        task = await run_blocking(self._executor, (folder / TASK_FILE).read_text)
        needed = await run_blocking(self._executor, files.needed, folder)
        return pb.GetWorkerTaskResponse(
            task=task,
            files=[pb.WorkerFile(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256) for file in needed],
            threads=self._threads,
        )

    async def DownloadWorkerFile(
        self, request: pb.DownloadWorkerFileRequest, context: Any
    ) -> AsyncIterator[pb.DownloadWorkerFileResponse]:
        folder = self._session(request.name).folder
        chunks = await run_blocking(self._executor, files.chunks, folder, request.path, request.offset)
        while chunk := await run_blocking(self._executor, next, chunks, None):
            yield pb.DownloadWorkerFileResponse(offset=chunk.offset, data=chunk.data, crc32c=chunk.crc32c)

    async def UploadWorkerFile(
        self, request_iterator: AsyncIterator[pb.UploadWorkerFileRequest], context: Any
    ) -> pb.UploadWorkerFileResponse:
        first = await anext(aiter(request_iterator), None)
        if first is None:
            raise InvalidInput("name: nothing was sent", field="name")
        folder = self._session(first.name).folder
        file = files.JobFile(path=first.file.path, size_bytes=first.file.size_bytes, sha256=first.file.sha256)
        bringing = await run_blocking(
            self._executor, lambda: files.Bringing(folder, file, bytes_max=self._file_bytes_max)
        )
        try:
            await run_blocking(self._executor, bringing.write, _chunk(first))
            async for request in request_iterator:
                await run_blocking(self._executor, bringing.write, _chunk(request))
            await run_blocking(self._executor, bringing.finish)
        finally:
            bringing.close()
        return pb.UploadWorkerFileResponse()

    # The stubs' type knows generators only; gRPC and our runtime also take a coroutine that writes.
    async def ReportProgress(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.ReportProgressRequest], context: Any
    ) -> None:
        first = await anext(aiter(request_iterator), None)
        if first is None or not first.worker:
            raise InvalidInput("worker: the first message must name the job and the worker", field="worker")
        session = self._session(first.name)
        connection = _Connection(session, first.worker, context)
        session.workers += 1
        try:
            async with asyncio.TaskGroup() as group:
                ordering = group.create_task(connection.order())
                await connection.take(first)
                async for request in request_iterator:
                    await connection.take(request)
                ordering.cancel()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            session.workers -= 1

    def _session(self, name: str) -> Session:
        return self._hub.session(convert.uid(name), metadata_value(TOKEN_HEADER) or "")


class _Connection:
    """One worker's stream: acknowledges what is stored, and passes on commands as they come."""

    def __init__(self, session: Session, worker: str, context: Any) -> None:
        self._session = session
        self._worker = worker
        self._context = context
        self._stored = 0
        self._turn = asyncio.Lock()

    async def take(self, request: pb.ReportProgressRequest) -> None:
        """Store a report and acknowledge it."""
        if request.sequence:
            self._stored = await self._session.store(self._worker, request.sequence, request.report)
            await self._tell()

    async def order(self) -> None:
        """Tell the command now and whenever it changes. Errors: NotReady (ATTEMPT_NOT_READY) at the end."""
        while not self._session.over:
            await self._tell()
            await self._session.changes()
        raise not_ready(self._session.uid)

    async def _tell(self) -> None:
        async with self._turn:
            await self._context.write(
                pb.ReportProgressResponse(acknowledged_sequence=self._stored, command=_COMMANDS[self._session.command])
            )


def _chunk(request: pb.UploadWorkerFileRequest) -> Chunk:
    return Chunk(request.offset, request.data, request.crc32c)
