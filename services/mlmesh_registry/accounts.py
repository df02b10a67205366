"""Quotas and the audit log, as they are asked for.

Errors: NotFound (MODEL_NOT_FOUND), Conflict (ETAG_MISMATCH), InvalidInput.
"""

from collections.abc import Sequence
from dataclasses import asdict

import sqlalchemy as sa

from mlmesh_registry import names, quotas
from mlmesh_registry.audit import AuditEntry, root
from mlmesh_registry.database import Database, Write
from mlmesh_registry.events import from_micros
from mlmesh_registry.lookups import check_etag_if_given
from mlmesh_registry.paging import make_token, page_size, read_token
from mlmesh_registry.quotas import ALL, Limits, Quota
from mlmesh_registry.tables import audit_entries
from mlmesh_runtime.errors import NotFound

_ENTRIES = audit_entries.c


class Accounts:
    """Part of SqlModelStore. Quotas are of a model, or (None) of the whole registry."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get_quota(self, model_id: str | None) -> Quota:
        """Read limits and use."""
        return await self._database.read(lambda connection: _quota(connection, model_id))

    async def set_quota(self, model_id: str | None, limits: Limits, *, etag: str, actor: str) -> Quota:
        """Replace limits, by compare-and-set when an etag is given. To those that are set is a no-op."""
        quotas.check_limits(limits, model_id or ALL)

        def transact(write: Write) -> Quota:
            before = _quota(write.connection, model_id)
            check_etag_if_given(f"the quota of {before.name}", before.etag, etag)
            if before.limits == limits:
                return before
            after = quotas.put_limits(write, before, limits)
            write.audit("SetQuota", after.name, asdict(limits))
            return after

        return await self._database.write(transact, actor=actor)

    async def list_audit(
        self, *, from_sequence: int, resource: str, actor: str, size: int, token: str
    ) -> tuple[Sequence[AuditEntry], str]:
        """One page, oldest first, from a sequence on; of a resource and what is below it, of an actor ("": all)."""
        asked = f"audit of {resource!r} by {actor!r} from {from_sequence}"
        size, after = page_size(size), read_token(token, asked, int)
        first = max(from_sequence, int(after[0]) + 1 if after else 1)
        query = audit_entries.select().where(_ENTRIES.sequence >= first).order_by(_ENTRIES.sequence).limit(size + 1)
        if actor:
            query = query.where(_ENTRIES.actor == actor)
        if resource := resource.rstrip("/"):
            query = query.where(_below(resource))
        found = await self._database.read(lambda connection: connection.execute(query).all())
        entries = [
            AuditEntry(
                sequence=row.sequence,
                time=from_micros(row.time),
                actor=row.actor,
                method=row.method,
                resource=row.resource,
                detail=row.detail,
                previous_digest=row.previous_digest,
                digest=row.digest,
            )
            for row in found[:size]
        ]
        return entries, make_token(asked, entries[-1].sequence) if len(found) > size else ""


def _below(resource: str) -> sa.ColumnElement[bool]:
    """The resource itself and what is below it, by the index of its first two segments where it has them."""
    start = sa.func.substr(_ENTRIES.resource, 1, len(resource) + 1) == f"{resource}/"
    itself = sa.or_(_ENTRIES.resource == resource, start)
    return sa.and_(_ENTRIES.root == root(resource), itself) if "/" in resource else itself


def _quota(connection: sa.Connection, model_id: str | None) -> Quota:
    found = quotas.find(connection, model_id or ALL)
    if found is None:
        raise NotFound(f"{names.model_name(model_id or ALL)} not found", reason="MODEL_NOT_FOUND")
    return found
