# ruff: noqa: ARG002  gRPC hands every method a context; few need it
"""The RPCs: check, call, reply. Field rules were checked by protovalidate, errors are mapped by the runtime."""

from typing import Any

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh.registry.v1.registry_pb2_grpc import ModelRegistryServiceServicer
from mlmesh_registry import convert, convert_gates, names
from mlmesh_registry.artifacts import Artifacts
from mlmesh_registry.garbage import Garbage
from mlmesh_registry.search import Search
from mlmesh_registry.serve_lifecycle import LifecycleMethods
from mlmesh_registry.serve_records import AliasMethods, RecordMethods
from mlmesh_registry.serve_search import SearchMethods, SignatureMethods
from mlmesh_registry.serve_uploads import UploadMethods
from mlmesh_registry.serve_watch import Messages, WatchMethods
from mlmesh_registry.signatures import Signatures
from mlmesh_registry.store import SqlModelStore
from mlmesh_registry.verification import Verification
from mlmesh_registry.watch import ChangeFeed
from mlmesh_runtime.identity import current_identity


# The stubs' type knows generators only; gRPC and our runtime also take a coroutine that writes, as WatchModels is.
class RegistryServicer(  # type: ignore[misc]
    AliasMethods,
    LifecycleMethods,
    RecordMethods,
    SearchMethods,
    SignatureMethods,
    WatchMethods,
    UploadMethods,
    ModelRegistryServiceServicer,
):
    """Implements mlmesh.registry.v1.ModelRegistryService.

    Args:
        stall_s: a watcher that takes no event for this long is ended.
    """

    def __init__(
        self,
        store: SqlModelStore,
        artifacts: Artifacts,
        feed: ChangeFeed,
        *,
        search: Search,
        signatures: Signatures,
        garbage: Garbage,
        verification: Verification,
        stall_s: float,
    ) -> None:
        self._store = store
        self._search = search
        self._signatures = signatures
        self._garbage = garbage
        self._verification = verification
        self._artifacts = artifacts
        self._feed = feed
        self._messages = Messages()
        self._stall_s = stall_s

    async def CreateModel(self, request: pb.CreateModelRequest, context: Any) -> pb.CreateModelResponse:
        model = await self._store.create_model(
            request.model_id,
            description=request.description,
            labels=dict(request.labels),
            request_id=request.request_id,
            actor=current_identity(),
            kind=convert.kind_of(request.kind),
            gates=convert_gates.gates(request.gates, "gates"),
        )
        return pb.CreateModelResponse(model=convert.model(model))

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        return pb.GetModelResponse(model=convert.model(await self._store.get_model(names.parse_model(request.name))))

    async def UpdateModel(self, request: pb.UpdateModelRequest, context: Any) -> pb.UpdateModelResponse:
        model = await self._store.update_model(
            names.parse_model(request.name),
            description=request.description if request.HasField("description") else None,
            labels=dict(request.labels),
            etag=request.etag,
            actor=current_identity(),
            gates=convert_gates.gates(request.gates.gates, "gates.gates") if request.HasField("gates") else None,
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
