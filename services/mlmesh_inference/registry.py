"""The registry as this process's client sees it: changes in order, and bytes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Final

import grpc

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh.registry.v1 import registry_pb2_grpc as stubs
from mlmesh_inference.desired import ModelFile, VersionRecord
from mlmesh_inference.events import AliasDeleted, AliasMoved, Bookmark, Event, Named, Published, Withdrawn
from mlmesh_inference.tensors import DATATYPES, Signature, TensorSpec
from mlmesh_runtime.channel import NO_DEADLINE, mesh_error
from mlmesh_runtime.chunks import Chunk

DOWNLOAD_DEADLINE_S: Final = 600.0
"""Bound on one DownloadBlob; a fetch that is cut goes on from where it was."""


NOT_SERVED = (".safetensors", ".png")
"""Weights that training starts from, and pictures: as large as the model, and never needed to answer."""


class RegistryClient:
    """Reads the registry over a channel. Errors are MeshError, as the registry meant them."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = stubs.ModelRegistryServiceStub(channel)

    async def watch(self, from_revision: int) -> AsyncGenerator[Event]:
        """Changes from a revision, 0 for the present state first. Ends only by an error."""
        call = self._stub.WatchModels(pb.WatchModelsRequest(from_revision=from_revision), timeout=NO_DEADLINE)
        try:
            async for message in call:
                event = _event(message)
                if event is not None:
                    yield event
        except grpc.aio.AioRpcError as error:
            raise mesh_error(error) from error
        finally:
            call.cancel()

    async def download(self, file: ModelFile, offset: int) -> AsyncGenerator[Chunk]:
        """Bytes of a blob from an offset, in order."""
        request = pb.DownloadBlobRequest(name=f"blobs/sha256-{file.sha256}", offset=offset)
        call = self._stub.DownloadBlob(request, timeout=DOWNLOAD_DEADLINE_S)
        try:
            async for message in call:
                yield Chunk(message.offset, message.data, message.crc32c)
        except grpc.aio.AioRpcError as error:
            raise mesh_error(error) from error
        finally:
            call.cancel()


def _event(message: pb.WatchModelsResponse) -> Event | None:
    kind = message.WhichOneof("event")
    revision = message.revision
    if kind == "model_version":
        return _published(message.model_version, revision)
    if kind == "alias":
        model, alias = _parts(message.alias.name)
        return AliasMoved(revision=revision, model=model, alias=alias, version=_number(message.alias.version))
    if kind == "deleted_model_version":
        model, number = _parts(message.deleted_model_version.name)
        return Withdrawn(revision=revision, model=model, version=int(number))
    if kind in {"model", "deleted_model"}:
        # Its versions were announced as deleted before; what it holds never changes.
        told = message.model if kind == "model" else message.deleted_model
        # Compiled engines of models are kept as models of their own; see sharing.
        servable = told.kind != pb.MODEL_KIND_DATASET and told.labels.get("mlmesh-kind") != "engines"
        return Named(revision=revision, model=told.name.removeprefix("models/"), servable=servable)
    if kind == "deleted_alias":
        model, alias = _parts(message.deleted_alias.name)
        return AliasDeleted(revision=revision, model=model, alias=alias)
    return Bookmark(revision=revision) if kind == "bookmark" else None


def _published(version: pb.ModelVersion, revision: int) -> Published:
    model, number = _parts(version.name)
    try:
        record = VersionRecord(
            model=model,
            version=int(number),
            files=tuple(
                ModelFile(
                    path=artifact.path, sha256=artifact.blob.removeprefix("blobs/sha256-"), size=artifact.size_bytes
                )
                for artifact in version.artifacts
                if not artifact.path.endswith(NOT_SERVED)
            ),
            signature=_signature(version.signature) if version.HasField("signature") else None,
            labels=dict(version.labels),
            quarantined=version.stage == pb.VERSION_STAGE_QUARANTINED,
        )
    except (ValueError, KeyError) as error:
        return Published(revision=revision, record=None, problem=f"{version.name}: {error}")
    return Published(revision=revision, record=record)


def _signature(signature: pb.ModelSignature) -> Signature:
    return Signature(
        inputs=tuple(_tensor(spec) for spec in signature.inputs),
        outputs=tuple(_tensor(spec) for spec in signature.outputs),
    )


def _tensor(spec: pb.TensorSpec) -> TensorSpec:
    return TensorSpec(name=spec.name, datatype=DATATYPES[spec.datatype], shape=tuple(spec.shape))


def _parts(name: str) -> tuple[str, str]:
    """("mnist", "3") of "models/mnist/versions/3", ("mnist", "stable") of "models/mnist/aliases/stable"."""
    pieces = name.split("/")
    return (pieces[1], pieces[3]) if len(pieces) == 4 else ("", "")


def _number(name: str) -> int:
    number = _parts(name)[1]
    return int(number) if number.isascii() and number.isdigit() else 0
