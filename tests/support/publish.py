"""Publish models in a real registry process, by its own RPCs."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncIterator, Mapping
from types import TracebackType

import grpc

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh.registry.v1 import registry_pb2_grpc as stubs
from mlmesh_runtime.chunks import CHUNK_BYTES, crc32c


class Publisher:
    """A client of a registry at an address."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self.stub = stubs.ModelRegistryServiceStub(self._channel)

    async def __aenter__(self) -> Publisher:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def upload(self, data: bytes) -> str:
        """Upload bytes; their blob's name."""
        request = pb.StartUploadRequest(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        started = await self.stub.StartUpload(request, timeout=10)
        if started.HasField("blob"):
            return str(started.blob.name)

        async def chunks() -> AsyncIterator[pb.UploadChunksRequest]:
            for offset in range(0, len(data), CHUNK_BYTES):
                piece = data[offset : offset + CHUNK_BYTES]
                yield pb.UploadChunksRequest(
                    upload=started.upload.name, offset=offset, data=piece, crc32c=crc32c(piece)
                )

        await self.stub.UploadChunks(chunks(), timeout=30)
        finished = await self.stub.FinishUpload(pb.FinishUploadRequest(name=started.upload.name), timeout=10)
        return str(finished.blob.name)

    async def publish(
        self,
        model: str,
        data: bytes,
        *,
        signature: pb.ModelSignature | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> int:
        """Publish a version of a model (made when missing); its number."""
        try:
            await self.stub.CreateModel(pb.CreateModelRequest(model_id=model, request_id=uuid.uuid4().hex), timeout=10)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                raise
        artifacts = [
            pb.Artifact(path=path, blob=await self.upload(content))
            for path, content in {"model.onnx": data, **(files or {})}.items()
        ]
        version = pb.ModelVersion(artifacts=artifacts, signature=signature)
        request = pb.CreateModelVersionRequest(
            parent=f"models/{model}", model_version=version, request_id=uuid.uuid4().hex
        )
        created = await self.stub.CreateModelVersion(request, timeout=10)
        return int(created.model_version.name.rpartition("/")[2])

    async def alias(self, model: str, alias: str, version: int) -> None:
        """Create or move an alias."""
        listed = await self.stub.ListModelAliases(pb.ListModelAliasesRequest(parent=f"models/{model}"), timeout=10)
        name = f"models/{model}/aliases/{alias}"
        etag = next((found.etag for found in listed.aliases if found.name == name), "")
        request = pb.SetModelAliasRequest(name=name, version=f"models/{model}/versions/{version}", etag=etag)
        await self.stub.SetModelAlias(request, timeout=10)
