"""A registry as its own process on a loopback port, and a client of it that keeps its word with real gRPC."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh.registry.v1.registry_pb2_grpc import ModelRegistryServiceStub
from mlmesh_runtime.channel import MeshChannel, mesh_error, open_channel
from mlmesh_runtime.chunks import Chunk, crc32c
from mlmesh_runtime.errors import MeshError
from tests.support.server import Process, spawn

if TYPE_CHECKING:
    from mlmesh.registry.v1.registry_pb2_grpc import ModelRegistryServiceAsyncStub


@contextlib.contextmanager
def running(
    data_dir: Path, *, env: Mapping[str, str] | None = None, python: Sequence[str] = (sys.executable, "-u")
) -> Iterator[tuple[Process, str]]:
    """`python -m mlmesh_registry` that listens; the process and its address. Killed at the end."""
    variables = {"MLMESH_LISTEN": "127.0.0.1:0", "MLMESH_DATA_DIR": str(data_dir), "MLMESH_GRACE_S": "5", **(env or {})}
    with spawn("-m", "mlmesh_registry", env=variables, python=python) as process:
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


@dataclass(frozen=True, slots=True)
class Client:
    """The stub, and what tests do with it often."""

    channel: MeshChannel

    @property
    def stub(self) -> ModelRegistryServiceAsyncStub:
        """The generated stub."""
        return ModelRegistryServiceStub(self.channel)

    async def start(self, data: bytes, request_id: str = "") -> pb.StartUploadResponse:
        """StartUpload for bytes."""
        digest = hashlib.sha256(data).hexdigest()
        return await self.stub.StartUpload(
            pb.StartUploadRequest(size_bytes=len(data), sha256=digest, request_id=request_id)
        )

    async def send(self, upload: str, chunks: Iterable[Chunk]) -> pb.Upload:
        """UploadChunks."""

        async def requests() -> AsyncIterator[pb.UploadChunksRequest]:
            for chunk in chunks:
                yield pb.UploadChunksRequest(upload=upload, offset=chunk.offset, data=chunk.data, crc32c=chunk.crc32c)

        return (await self.stub.UploadChunks(requests())).upload

    async def put(self, data: bytes, *, request_id: str = "", chunk_bytes: int = 1 << 20) -> pb.Blob:
        """Upload bytes, going on from what is committed."""
        started = await self.start(data, request_id)
        if started.HasField("blob"):
            return started.blob
        name = started.upload.name
        if rest := pieces(data, started.upload.committed_bytes, chunk_bytes):
            await self.send(name, rest)
        return (await self.stub.FinishUpload(pb.FinishUploadRequest(name=name))).blob

    async def get(self, blob: str, offset: int = 0, limit_bytes: int = 0) -> bytes:
        """DownloadBlob, every checksum and offset checked."""
        parts: list[bytes] = []
        position = offset
        request = pb.DownloadBlobRequest(name=blob, offset=offset, limit_bytes=limit_bytes)
        async for part in self.stub.DownloadBlob(request):
            assert (part.offset, part.crc32c) == (position, crc32c(part.data))
            assert (part.blob_size_bytes > 0) == (position == offset) or not part.data
            parts.append(part.data)
            position += len(part.data)
        return b"".join(parts)

    async def create_model(self, model_id: str = "m", request_id: str = "") -> pb.Model:
        """CreateModel."""
        return (await self.stub.CreateModel(pb.CreateModelRequest(model_id=model_id, request_id=request_id))).model

    async def publish(
        self, blob: str, model_id: str = "m", *, request_id: str = "", description: str = ""
    ) -> pb.ModelVersion:
        """CreateModelVersion with one file."""
        version = pb.ModelVersion(
            artifacts=[pb.Artifact(path="model.onnx", blob=blob, media_type="application/onnx")],
            metrics={"accuracy": 0.75},
            description=description,
        )
        request = pb.CreateModelVersionRequest(
            parent=f"models/{model_id}", model_version=version, request_id=request_id
        )
        return (await self.stub.CreateModelVersion(request)).model_version

    async def move(self, alias: str, version: int, etag: str = "", model_id: str = "m") -> pb.ModelAlias:
        """SetModelAlias."""
        request = pb.SetModelAliasRequest(
            name=f"models/{model_id}/aliases/{alias}", version=f"models/{model_id}/versions/{version}", etag=etag
        )
        return (await self.stub.SetModelAlias(request)).alias


def pieces(data: bytes, offset: int = 0, chunk_bytes: int = 1 << 20) -> list[Chunk]:
    """Bytes from an offset on, in chunks."""
    return [
        Chunk(at, data[at : at + chunk_bytes], crc32c(data[at : at + chunk_bytes]))
        for at in range(offset, len(data), chunk_bytes)
    ]
