# ruff: noqa: ARG002  gRPC hands every method a context; few need it
"""The RPCs that list models and versions, and those of signatures."""

from typing import Any

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_registry import convert, names
from mlmesh_registry.search import Asked, Search
from mlmesh_registry.signatures import Signatures, VersionSignature
from mlmesh_runtime.identity import current_identity


class SearchMethods:
    """Part of RegistryServicer."""

    _search: Search

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        models, token = await self._search.list_models(_asked(request))
        return pb.ListModelsResponse(models=map(convert.model, models), next_page_token=token)

    async def ListModelVersions(
        self, request: pb.ListModelVersionsRequest, context: Any
    ) -> pb.ListModelVersionsResponse:
        versions, token = await self._search.list_versions(names.parse_parent(request.parent), _asked(request))
        return pb.ListModelVersionsResponse(model_versions=map(convert.version, versions), next_page_token=token)


class SignatureMethods:
    """Part of RegistryServicer."""

    _signatures: Signatures

    async def AddModelVersionSignature(
        self, request: pb.AddModelVersionSignatureRequest, context: Any
    ) -> pb.AddModelVersionSignatureResponse:
        version = names.parse_version(request.parent, "parent")
        signature = await self._signatures.add(version, request.bundle, actor=current_identity())
        return pb.AddModelVersionSignatureResponse(signature=_signature(signature))

    async def ListModelVersionSignatures(
        self, request: pb.ListModelVersionSignaturesRequest, context: Any
    ) -> pb.ListModelVersionSignaturesResponse:
        found = await self._signatures.list(names.parse_version(request.parent, "parent"))
        return pb.ListModelVersionSignaturesResponse(signatures=map(_signature, found))


def _asked(request: pb.ListModelsRequest | pb.ListModelVersionsRequest) -> Asked:
    return Asked(
        size=request.page_size,
        token=request.page_token,
        filter=request.filter,
        order_by=request.order_by,
        show_deleted=request.show_deleted,
    )


def _signature(value: VersionSignature) -> pb.VersionSignature:
    return pb.VersionSignature(
        bundle=value.bundle,
        key_id=value.key_id,
        valid=not value.problem,
        problem=value.problem,
        create_time=convert.timestamp(value.create_time),
        creator=value.creator,
    )
