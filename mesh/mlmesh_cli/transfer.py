"""Files to and from the registry, in chunks with checksums; a cut transfer goes on where it ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_cli.errors import CliError, rpc_failure
from mlmesh_runtime.chunks import VerifyingWriter, read_chunks, sha256_of

if TYPE_CHECKING:
    from mlmesh.registry.v1.registry_pb2_grpc import ModelRegistryServiceAsyncStub


# Bytes done, bytes in all.
Progress = Callable[[int, int], None]


def _quiet(_done: int, _all: int) -> None:
    pass


_CUTS_MAX = 5
_PAUSE_S = 0.5
_CUT = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED})
_TRANSFER_DEADLINE_S = 3600.0


async def upload(stub: ModelRegistryServiceAsyncStub, path: Path, progress: Progress = _quiet) -> pb.Blob:
    """Uploads a file unless the registry has its bytes already.

    The upload is known by the file's digest: repeated after the command was killed, it goes on where it ended, and two
    that upload the same bytes at once do so together.

    Returns:
        The blob.

    Raises:
        CliError: the file changed while it was sent.
        grpc.aio.AioRpcError: the registry refused, or was cut off more than five times without getting on.
    """
    digest, size = await asyncio.to_thread(sha256_of, path)
    request = pb.StartUploadRequest(size_bytes=size, sha256=digest, request_id=f"upload-{digest}")
    started = await stub.StartUpload(request)
    if started.HasField("blob"):
        progress(size, size)
        return started.blob
    name, committed, cuts = started.upload.name, started.upload.committed_bytes, 0
    while committed < size:
        before = committed
        try:
            call = stub.UploadChunks(_chunks(name, path, committed, size, progress), timeout=_TRANSFER_DEADLINE_S)
            committed = (await call).upload.committed_bytes
            if committed < size:
                raise CliError(f"{path} changed while it was sent", "upload it again", reason="FILE_CHANGED")
        except grpc.aio.AioRpcError as error:
            if not _goes_on(error) or cuts == _CUTS_MAX:
                raise
            await asyncio.sleep(_PAUSE_S)
            committed = (await stub.GetUpload(pb.GetUploadRequest(name=name))).upload.committed_bytes
            cuts = 0 if committed > before else cuts + 1
    # In an object store the whole is put together now.
    return (await stub.FinishUpload(pb.FinishUploadRequest(name=name), timeout=_TRANSFER_DEADLINE_S)).blob


def _goes_on(error: grpc.aio.AioRpcError) -> bool:
    # Somebody else who sends the same bytes was faster: there is less left to do.
    return error.code() in _CUT or rpc_failure(error).reason == "UPLOAD_OFFSET_MISMATCH"


async def _chunks(
    upload_name: str, path: Path, offset: int, size: int, progress: Progress
) -> AsyncIterator[pb.UploadChunksRequest]:
    chunks = read_chunks(path, offset=offset)
    reading = asyncio.ensure_future(asyncio.to_thread(next, chunks, None))
    try:
        while (chunk := await reading) is not None:
            # While this one is sent the next is read.
            reading = asyncio.ensure_future(asyncio.to_thread(next, chunks, None))
            yield pb.UploadChunksRequest(upload=upload_name, offset=chunk.offset, data=chunk.data, crc32c=chunk.crc32c)
            progress(chunk.offset + len(chunk.data), size)
    finally:
        await asyncio.wait({reading})


async def download(
    stub: ModelRegistryServiceAsyncStub,
    artifact: pb.Artifact,
    path: Path,
    progress: Progress = _quiet,
) -> None:
    """Downloads an artifact to a path, which appears whole and verified or not at all.

    Raises:
        mlmesh_runtime.errors.MeshError: the bytes are not those promised, or there is no room.
        grpc.aio.AioRpcError: the registry refused, or was cut off more than five times.
    """
    digest = artifact.blob.removeprefix("blobs/sha256-")
    writer = await asyncio.to_thread(VerifyingWriter, path, digest, artifact.size_bytes)
    with writer:
        for cut in range(_CUTS_MAX + 1):
            request = pb.DownloadBlobRequest(name=artifact.blob, offset=writer.committed)
            try:
                chunks = stub.DownloadBlob(request, timeout=_TRANSFER_DEADLINE_S)
                await _write(writer, chunks, artifact.size_bytes, progress)
                break
            except grpc.aio.AioRpcError as error:
                if error.code() not in _CUT or cut == _CUTS_MAX:
                    raise
                await asyncio.sleep(_PAUSE_S)
        await asyncio.to_thread(writer.finish)


async def _write(
    writer: VerifyingWriter, chunks: AsyncIterable[pb.DownloadBlobResponse], size: int, progress: Progress
) -> None:
    """Writes chunks as they come; while one is written the next is received."""
    writing: asyncio.Future[int] | None = None
    try:
        async for chunk in chunks:
            if writing is not None:
                progress(await writing, size)
            writing = asyncio.ensure_future(asyncio.to_thread(writer.write, chunk.offset, chunk.data, chunk.crc32c))
    finally:
        if writing is not None:
            progress(await writing, size)
