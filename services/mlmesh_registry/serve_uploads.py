# ruff: noqa: ARG002  gRPC hands every method a context; few need it
"""RPCs of uploads and blobs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_registry import convert, names
from mlmesh_registry.artifacts import Artifacts
from mlmesh_registry.ledger import Blob
from mlmesh_runtime.chunks import Chunk
from mlmesh_runtime.errors import InvalidInput, MeshError
from mlmesh_runtime.identity import current_identity

_READ_ON_S = 1.0
_READ_ON_ITEMS = 16


class UploadMethods:
    """Part of RegistryServicer."""

    _artifacts: Artifacts

    async def StartUpload(self, request: pb.StartUploadRequest, context: Any) -> pb.StartUploadResponse:
        started = await self._artifacts.start(
            request.sha256, request.size_bytes, request_id=request.request_id, actor=current_identity()
        )
        if isinstance(started, Blob):
            return pb.StartUploadResponse(blob=convert.blob(started))
        return pb.StartUploadResponse(upload=convert.upload(started))

    async def UploadChunks(
        self, request_iterator: AsyncIterator[pb.UploadChunksRequest], context: Any
    ) -> pb.UploadChunksResponse:
        try:
            return await self._take_in(request_iterator)
        except MeshError:
            await _read_on(request_iterator)
            raise

    async def _take_in(self, request_iterator: AsyncIterator[pb.UploadChunksRequest]) -> pb.UploadChunksResponse:
        async for first in request_iterator:
            upload_id = names.parse_upload(first.upload, "upload")
            async with self._artifacts.appending(upload_id) as live:
                await live.append(_chunk(first))
                async for request in request_iterator:
                    if request.upload not in ("", first.upload):
                        raise InvalidInput("upload: another one than in the first message", field="upload")
                    await live.append(_chunk(request))
            return pb.UploadChunksResponse(upload=convert.upload(await self._artifacts.upload(upload_id)))
        # Nothing was sent, so nothing is told; an empty file is uploaded so.
        return pb.UploadChunksResponse()

    async def GetUpload(self, request: pb.GetUploadRequest, context: Any) -> pb.GetUploadResponse:
        upload = await self._artifacts.upload(names.parse_upload(request.name))
        return pb.GetUploadResponse(upload=convert.upload(upload))

    async def FinishUpload(self, request: pb.FinishUploadRequest, context: Any) -> pb.FinishUploadResponse:
        blob = await self._artifacts.finish(names.parse_upload(request.name), actor=current_identity())
        return pb.FinishUploadResponse(blob=convert.blob(blob))

    async def CancelUpload(self, request: pb.CancelUploadRequest, context: Any) -> pb.CancelUploadResponse:
        await self._artifacts.cancel(names.parse_upload(request.name), actor=current_identity())
        return pb.CancelUploadResponse()

    async def GetBlob(self, request: pb.GetBlobRequest, context: Any) -> pb.GetBlobResponse:
        return pb.GetBlobResponse(blob=convert.blob(await self._artifacts.blob(names.parse_blob(request.name))))

    async def DownloadBlob(
        self, request: pb.DownloadBlobRequest, context: Any
    ) -> AsyncIterator[pb.DownloadBlobResponse]:
        sha256 = names.parse_blob(request.name)
        chunks = self._artifacts.read(sha256, offset=request.offset, limit_bytes=request.limit_bytes)
        async with aclosing(chunks):
            async for chunk, blob in chunks:
                # Only the first chunk tells the size.
                size_bytes = blob.size_bytes if chunk.offset == request.offset else 0
                yield pb.DownloadBlobResponse(
                    offset=chunk.offset, data=chunk.data, crc32c=chunk.crc32c, blob_size_bytes=size_bytes
                )


async def _read_on(requests: AsyncIterator[pb.UploadChunksRequest]) -> None:
    """Take in a little more of a stream that is about to be refused.

    A gRPC aio client that is told the end while it writes reports INTERNAL ("Internal error from Core") and loses the
    status; most streams end within this bound, and their clients learn the reason.
    """
    with suppress(TimeoutError, StopAsyncIteration):
        async with asyncio.timeout(_READ_ON_S):
            for _ in range(_READ_ON_ITEMS):
                with suppress(MeshError):
                    await anext(requests)


def _chunk(request: pb.UploadChunksRequest) -> Chunk:
    return Chunk(request.offset, request.data, request.crc32c)
