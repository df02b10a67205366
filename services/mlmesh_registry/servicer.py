# ruff: noqa: ARG002  gRPC hands every method a context; few need it
"""The RPCs: check, call, reply. Field rules were checked by protovalidate, errors are mapped by the runtime."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh.registry.v1.registry_pb2_grpc import ModelRegistryServiceServicer
from mlmesh_registry import convert, names
from mlmesh_registry.artifacts import Artifacts
from mlmesh_registry.ledger import Blob
from mlmesh_registry.store import SqlModelStore
from mlmesh_registry.watch import ChangeFeed, too_slow
from mlmesh_runtime.chunks import Chunk
from mlmesh_runtime.errors import InvalidInput, MeshError
from mlmesh_runtime.identity import current_identity

_READ_ON_S = 1.0
_READ_ON_ITEMS = 16


class RegistryServicer(ModelRegistryServiceServicer):
    """Implements mlmesh.registry.v1.ModelRegistryService.

    Args:
        stall_s: a watcher that takes no event for this long is ended.
    """

    def __init__(self, store: SqlModelStore, artifacts: Artifacts, feed: ChangeFeed, *, stall_s: float) -> None:
        self._store = store
        self._artifacts = artifacts
        self._feed = feed
        self._stall_s = stall_s

    async def CreateModel(self, request: pb.CreateModelRequest, context: Any) -> pb.CreateModelResponse:
        model = await self._store.create_model(
            request.model_id,
            description=request.description,
            labels=dict(request.labels),
            request_id=request.request_id,
            actor=current_identity(),
        )
        return pb.CreateModelResponse(model=convert.model(model))

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        return pb.GetModelResponse(model=convert.model(await self._store.get_model(names.parse_model(request.name))))

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        models, token = await self._store.list_models(size=request.page_size, token=request.page_token)
        return pb.ListModelsResponse(models=map(convert.model, models), next_page_token=token)

    async def UpdateModel(self, request: pb.UpdateModelRequest, context: Any) -> pb.UpdateModelResponse:
        model = await self._store.update_model(
            names.parse_model(request.name),
            description=request.description if request.HasField("description") else None,
            labels=dict(request.labels),
            etag=request.etag,
            actor=current_identity(),
        )
        return pb.UpdateModelResponse(model=convert.model(model))

    async def CreateModelVersion(
        self, request: pb.CreateModelVersionRequest, context: Any
    ) -> pb.CreateModelVersionResponse:
        version = await self._store.create_version(
            names.parse_model(request.parent, "parent"),
            convert.content(request.model_version),
            request_id=request.request_id,
            actor=current_identity(),
        )
        return pb.CreateModelVersionResponse(model_version=convert.version(version))

    async def GetModelVersion(self, request: pb.GetModelVersionRequest, context: Any) -> pb.GetModelVersionResponse:
        version = await self._store.get_version(names.parse_version_or_alias(request.name))
        return pb.GetModelVersionResponse(model_version=convert.version(version))

    async def ListModelVersions(
        self, request: pb.ListModelVersionsRequest, context: Any
    ) -> pb.ListModelVersionsResponse:
        versions, token = await self._store.list_versions(
            names.parse_parent(request.parent), size=request.page_size, token=request.page_token
        )
        return pb.ListModelVersionsResponse(model_versions=map(convert.version, versions), next_page_token=token)

    async def SetModelAlias(self, request: pb.SetModelAliasRequest, context: Any) -> pb.SetModelAliasResponse:
        alias = await self._store.set_alias(
            names.parse_alias(request.name),
            names.parse_version(request.version, "version"),
            etag=request.etag,
            actor=current_identity(),
        )
        return pb.SetModelAliasResponse(alias=convert.alias(alias))

    async def ListModelAliases(self, request: pb.ListModelAliasesRequest, context: Any) -> pb.ListModelAliasesResponse:
        aliases, token = await self._store.list_aliases(
            names.parse_parent(request.parent), size=request.page_size, token=request.page_token
        )
        return pb.ListModelAliasesResponse(aliases=map(convert.alias, aliases), next_page_token=token)

    async def DeleteModelAlias(self, request: pb.DeleteModelAliasRequest, context: Any) -> pb.DeleteModelAliasResponse:
        await self._store.delete_alias(names.parse_alias(request.name), etag=request.etag, actor=current_identity())
        return pb.DeleteModelAliasResponse()

    # The stubs' type knows generators only; gRPC and our runtime also take a coroutine that writes.
    async def WatchModels(self, request: pb.WatchModelsRequest, context: Any) -> None:  # type: ignore[override]
        model_id = names.parse_parent(request.parent or names.ALL_MODELS)
        sent = request.from_revision - 1
        # Written, not yielded: only so is there a bound on how long a client that does not read may hold this up.
        async with aclosing(self._feed.watch(request.from_revision, model_id)) as events:
            async for event in events:
                try:
                    async with asyncio.timeout(self._stall_s):
                        await context.write(convert.event(event))
                except TimeoutError as error:
                    raise too_slow(f"took no event for {self._stall_s:g} s", sent) from error
                sent = event.revision

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
        blob = await self._artifacts.finish(names.parse_upload(request.name))
        return pb.FinishUploadResponse(blob=convert.blob(blob))

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
