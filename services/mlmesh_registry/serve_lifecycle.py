# ruff: noqa: ARG002  gRPC hands every method a context; few need it
"""The RPCs of stages, deletion, verification and garbage."""

from typing import Any

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_registry import convert, convert_gates, convert_records, names
from mlmesh_registry.garbage import Garbage
from mlmesh_registry.store import SqlModelStore
from mlmesh_registry.verification import Verification
from mlmesh_runtime.identity import current_identity


class LifecycleMethods:
    """Part of RegistryServicer."""

    _store: SqlModelStore
    _verification: Verification
    _garbage: Garbage

    async def DeleteModel(self, request: pb.DeleteModelRequest, context: Any) -> pb.DeleteModelResponse:
        model = await self._store.delete_model(
            names.parse_model(request.name), etag=request.etag, force=request.force, actor=current_identity()
        )
        return pb.DeleteModelResponse(model=convert.model(model))

    async def UndeleteModel(self, request: pb.UndeleteModelRequest, context: Any) -> pb.UndeleteModelResponse:
        model = await self._store.undelete_model(names.parse_model(request.name), actor=current_identity())
        return pb.UndeleteModelResponse(model=convert.model(model))

    async def SetModelVersionStage(
        self, request: pb.SetModelVersionStageRequest, context: Any
    ) -> pb.SetModelVersionStageResponse:
        version = await self._store.set_stage(
            names.parse_version(request.name),
            convert.stage_of(request.stage),
            reason=request.reason,
            etag=request.etag,
            actor=current_identity(),
        )
        return pb.SetModelVersionStageResponse(model_version=convert.version(version))

    async def DeleteModelVersion(
        self, request: pb.DeleteModelVersionRequest, context: Any
    ) -> pb.DeleteModelVersionResponse:
        name = names.parse_version(request.name)
        version = await self._store.delete_version(name, etag=request.etag, actor=current_identity())
        return pb.DeleteModelVersionResponse(model_version=convert.version(version))

    async def UndeleteModelVersion(
        self, request: pb.UndeleteModelVersionRequest, context: Any
    ) -> pb.UndeleteModelVersionResponse:
        version = await self._store.undelete_version(names.parse_version(request.name), actor=current_identity())
        return pb.UndeleteModelVersionResponse(model_version=convert.version(version))

    async def VerifyModelVersion(
        self, request: pb.VerifyModelVersionRequest, context: Any
    ) -> pb.VerifyModelVersionResponse:
        name = names.parse_version_or_alias(request.name)
        return convert_records.verified(await self._verification.verify(name, actor=current_identity()))

    async def CollectGarbage(self, request: pb.CollectGarbageRequest, context: Any) -> pb.CollectGarbageResponse:
        grace = convert_gates.timedelta_of(request.grace, "grace") if request.HasField("grace") else None
        report = await self._garbage.collect(grace=grace, dry_run=request.dry_run, actor=current_identity())
        return convert_records.garbage(report, dry_run=request.dry_run)
