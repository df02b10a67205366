# ruff: noqa: ARG002  gRPC hands every method a context; few need it
"""The RPCs of aliases and their history, of quotas and of the audit log."""

from typing import Any

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_registry import convert, convert_gates, convert_records, names
from mlmesh_registry.store import SqlModelStore
from mlmesh_runtime.identity import current_identity


class AliasMethods:
    """Part of RegistryServicer."""

    _store: SqlModelStore

    async def SetModelAlias(self, request: pb.SetModelAliasRequest, context: Any) -> pb.SetModelAliasResponse:
        moved = await self._store.move_alias(
            names.parse_alias(request.name),
            names.parse_version(request.version, "version"),
            etag=request.etag,
            actor=current_identity(),
            reason=request.reason,
            validate_only=request.validate_only,
        )
        alias = None if moved.alias is None else convert.alias(moved.alias)
        return pb.SetModelAliasResponse(alias=alias, gate_results=map(convert_gates.gate_result, moved.results))

    async def ListModelAliases(self, request: pb.ListModelAliasesRequest, context: Any) -> pb.ListModelAliasesResponse:
        aliases, token = await self._store.list_aliases(
            names.parse_parent(request.parent), size=request.page_size, token=request.page_token
        )
        return pb.ListModelAliasesResponse(aliases=map(convert.alias, aliases), next_page_token=token)

    async def DeleteModelAlias(self, request: pb.DeleteModelAliasRequest, context: Any) -> pb.DeleteModelAliasResponse:
        await self._store.delete_alias(names.parse_alias(request.name), etag=request.etag, actor=current_identity())
        return pb.DeleteModelAliasResponse()

    async def ListModelAliasMoves(
        self, request: pb.ListModelAliasMovesRequest, context: Any
    ) -> pb.ListModelAliasMovesResponse:
        model_id, alias = names.parse_model_or_alias(request.parent)
        moves, token = await self._store.list_moves(model_id, alias, size=request.page_size, token=request.page_token)
        return pb.ListModelAliasMovesResponse(moves=map(convert_records.alias_move, moves), next_page_token=token)


class RecordMethods:
    """Part of RegistryServicer."""

    _store: SqlModelStore

    async def GetQuota(self, request: pb.GetQuotaRequest, context: Any) -> pb.GetQuotaResponse:
        quota = await self._store.get_quota(names.parse_parent(request.name or names.ALL_MODELS, "name"))
        return pb.GetQuotaResponse(quota=convert_records.quota(quota))

    async def SetQuota(self, request: pb.SetQuotaRequest, context: Any) -> pb.SetQuotaResponse:
        quota = await self._store.set_quota(
            names.parse_parent(request.quota.name, "quota.name"),
            convert_records.limits(request.quota),
            etag=request.etag,
            actor=current_identity(),
        )
        return pb.SetQuotaResponse(quota=convert_records.quota(quota))

    async def ListAuditEntries(self, request: pb.ListAuditEntriesRequest, context: Any) -> pb.ListAuditEntriesResponse:
        entries, token = await self._store.list_audit(
            from_sequence=request.from_sequence,
            resource=request.resource,
            actor=request.actor,
            size=request.page_size,
            token=request.page_token,
        )
        return pb.ListAuditEntriesResponse(entries=map(convert_records.audit_entry, entries), next_page_token=token)
