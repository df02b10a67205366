"""Models and versions in SQL, and the log of their changes: every method is one transaction.

Aliases, stages and deletion, quotas and the audit log are in modules of their own. Errors are those of the contract,
with its reasons: NotFound (MODEL_NOT_FOUND, MODEL_VERSION_NOT_FOUND, MODEL_ALIAS_NOT_FOUND), AlreadyExists
(MODEL_EXISTS, REQUEST_ID_REUSED), Conflict (ETAG_MISMATCH), WrongState (BLOB_NOT_FOUND, FORMAT_NOT_ALLOWED,
MODEL_DELETED), Overloaded (QUOTA_EXCEEDED, DISK_FULL), InvalidInput.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import sqlalchemy as sa

from mlmesh_registry import conditions, names, quotas, references, rows, tables
from mlmesh_registry.accounts import Accounts
from mlmesh_registry.aliasing import Aliases, KeyIds, no_key_ids
from mlmesh_registry.conditions import Gate, check_gates
from mlmesh_registry.database import Database, Write
from mlmesh_registry.events import Change, decode, encode, from_micros, to_micros
from mlmesh_registry.ledger import FORMAT_NONE
from mlmesh_registry.lifecycle import Lifecycle
from mlmesh_registry.lookups import check_etag, live_model, model_of, version_of
from mlmesh_registry.names import AliasName, VersionName
from mlmesh_registry.requests import first_answer, remember
from mlmesh_registry.versions import (
    Content,
    Model,
    ModelKind,
    Version,
    check_content,
    check_labels,
    check_text,
    digest,
    fingerprint,
    manifest,
)
from mlmesh_runtime.errors import AlreadyExists, NotFound, RevisionLost, WrongState

DELETED_KEPT = timedelta(days=30)


class SqlModelStore(Aliases, Lifecycle, Accounts):
    """The truth about models. `actor` is the SPIFFE id of the caller, empty outside a mesh.

    Args:
        deleted_kept: how long what is deleted can be brought back.
        valid_key_ids: which trusted keys signed a version, for gates that ask.
    """

    def __init__(
        self, database: Database, *, deleted_kept: timedelta = DELETED_KEPT, valid_key_ids: KeyIds = no_key_ids
    ) -> None:
        Aliases.__init__(self, database, valid_key_ids)
        Lifecycle.__init__(self, database, deleted_kept)
        Accounts.__init__(self, database)

    async def create_model(
        self,
        model_id: str,
        *,
        description: str,
        labels: Mapping[str, str],
        request_id: str,
        actor: str,
        kind: ModelKind = "MODEL",
        gates: Sequence[Gate] = (),
    ) -> Model:
        """Register a name. The same request_id with the same content gives the first answer again."""
        names.model_id(model_id)
        check_text(description, "description")
        check_labels(labels)
        check_gates(gates)
        # Fingerprints of requests that came before there were kinds and gates are still good.
        later = [kind, [conditions.plain(gate) for gate in gates]] if gates or kind != "MODEL" else []
        same = fingerprint(model_id, description, dict(labels), *later)

        def transact(write: Write) -> Model:
            if answer := first_answer(write, "CreateModel", request_id, same):
                return cast(Model, decode("model", answer))
            if (there := rows.model(write.connection, model_id)) is not None:
                deleted = "; it is deleted, and its name taken until it is purged" if there.delete_time else ""
                raise AlreadyExists(f"{names.model_name(model_id)} exists{deleted}", reason="MODEL_EXISTS")
            quotas.add_model(write, model_id)
            model = Model(
                id=model_id,
                description=description,
                labels=dict(labels),
                create_time=write.now,
                update_time=write.now,
                revision=write.next_revision(),
                kind=kind,
                gates=tuple(gates),
            )
            rows.insert_model(write, model)
            write.record(model.revision, model)
            write.audit("CreateModel", model.name, _told(model))
            remember(write, "CreateModel", request_id, same, encode(model)[1])
            return model

        return await self._database.write(transact, actor=actor)

    async def get_model(self, model_id: str) -> Model:
        """Read one model, deleted or not."""
        return await self._database.read(lambda connection: model_of(connection, model_id))

    async def update_model(
        self,
        model_id: str,
        *,
        description: str | None,
        labels: Mapping[str, str],
        etag: str,
        actor: str,
        gates: Sequence[Gate] | None = None,
    ) -> Model:
        """Replace description and gates (unless None) and labels (unless empty) by compare-and-set."""
        if description is not None:
            check_text(description, "description")
        check_labels(labels)
        check_gates(gates or (), "gates.gates")

        def transact(write: Write) -> Model:
            before = live_model(write.connection, model_id)
            check_etag(before.name, before.etag, etag)
            wanted = replace(
                before,
                description=before.description if description is None else description,
                labels=dict(labels) if labels else before.labels,
                gates=before.gates if gates is None else tuple(gates),
            )
            if wanted == before:
                return before
            after = replace(wanted, update_time=write.now, revision=write.next_revision())
            rows.update_model(write, after)
            write.record(after.revision, after)
            changed = [name for name in ("description", "labels", "gates") if _differ(name, before, after)]
            write.audit("UpdateModel", after.name, {"changed": changed, **_told(after)})
            return after

        return await self._database.write(transact, actor=actor)

    async def create_version(self, model_id: str, content: Content, *, request_id: str, actor: str) -> Version:
        """Publish the next version of a model. All its blobs must be here; artifact sizes are filled in."""
        check_content(content)
        same = fingerprint(model_id, manifest(content))

        def transact(write: Write) -> Version:
            if answer := first_answer(write, "CreateModelVersion", request_id, same):
                return _as_first(version_of(write.connection, VersionName(model=model_id, number=answer["number"])))
            number = live_model(write.connection, model_id).latest_version + 1
            complete = _with_sizes(write.connection, content)
            sizes = {artifact.sha256: artifact.size_bytes for artifact in complete.artifacts}
            quotas.add_version(write, model_id, sizes)
            revision = write.next_revision()
            version = Version(
                model=model_id,
                number=number,
                content=complete,
                digest=digest(complete),
                create_time=write.now,
                creator=write.actor,
                revision=revision,
                meta_revision=revision,
            )
            rows.insert_version(write, version)
            references.used(write, sizes)
            write.record(version.revision, version)
            detail = {"digest": version.digest, "size_bytes": version.size_bytes, "revision": revision}
            write.audit("CreateModelVersion", version.name, detail)
            remember(write, "CreateModelVersion", request_id, same, {"number": number})
            return version

        return await self._database.write(transact, actor=actor)

    async def get_version(self, name: VersionName | AliasName) -> Version:
        """Read one version by number or by alias, deleted or not."""

        def transact(connection: sa.Connection) -> Version:
            model_of(connection, name.model)
            if isinstance(name, VersionName):
                return version_of(connection, name)
            alias = rows.alias(connection, name)
            if alias is None:
                raise NotFound(f"{name} not found", reason="MODEL_ALIAS_NOT_FOUND")
            return version_of(connection, VersionName(model=name.model, number=alias.version))

        return await self._database.read(transact)

    async def head(self) -> int:
        """Revision of the last change, 0 before the first."""
        return await self._database.read(_head)

    async def present_state(self, model_id: str | None, *, after: int, upto: int, limit: int) -> Sequence[Change]:
        """What is there now and last changed at a revision in (after, upto], in revision order, as changes.

        Pages need not be of one moment: what changes between two pages leaves the range and is found in the log.
        """
        return await self._database.read(lambda connection: rows.present(connection, model_id, after, upto, limit))

    async def changes_after(self, revision: int, *, model_id: str | None, limit: int) -> tuple[Sequence[Change], int]:
        """Logged changes behind a revision, at most limit, and the revision up to which that is all.

        Errors: RevisionLost (REVISION_LOST) when the next change is no longer kept, or the revision is yet to come.
        """

        def transact(connection: sa.Connection) -> tuple[Sequence[Change], int]:
            head = _head(connection)
            oldest = connection.execute(sa.select(sa.func.min(tables.changes.c.revision))).scalar() or head + 1
            if not oldest - 1 <= revision <= head:
                raise RevisionLost(
                    f"revision {revision + 1} is not among those kept, {oldest} to {head}; watch again from 0",
                    reason="REVISION_LOST",
                    metadata={"oldest_revision": str(oldest), "head_revision": str(head)},
                )
            log = tables.changes.c
            query = sa.select(tables.changes).where(log.revision > revision).order_by(log.revision).limit(limit)
            if model_id is not None:
                query = query.where(log.model == model_id)
            found = [
                Change(
                    revision=row.revision,
                    time=from_micros(row.time),
                    actor=row.actor,
                    subject=decode(row.kind, json.loads(row.subject)),
                )
                for row in connection.execute(query)
            ]
            return found, found[-1].revision if len(found) == limit else head

        return await self._database.read(transact)

    async def forget_requests(self, *, keep_s: float) -> None:
        """Drop first answers that are older than any retry."""

        def transact(write: Write) -> None:
            oldest = to_micros(write.now) - int(keep_s * 1e6)
            write.connection.execute(tables.requests.delete().where(tables.requests.c.time < oldest))

        await self._database.write(transact)


def _head(connection: sa.Connection) -> int:
    return int(connection.execute(sa.select(tables.log_head.c.revision)).scalar_one())


def _told(model: Model) -> dict[str, Any]:
    """What the audit log keeps of a model."""
    return {
        "kind": model.kind,
        "labels": dict(model.labels),
        "gates": [conditions.plain(gate) for gate in model.gates],
        "revision": model.revision,
    }


def _differ(name: str, before: Model, after: Model) -> bool:
    return bool(getattr(before, name) != getattr(after, name))


def _as_first(version: Version) -> Version:
    """As it was answered first: just published."""
    return replace(
        version,
        aliases=(),
        stage="ACTIVE",
        stage_reason="",
        meta_revision=version.revision,
        verify_time=None,
        corrupt_time=None,
        delete_time=None,
        purge_time=None,
    )


def _with_sizes(connection: sa.Connection, content: Content) -> Content:
    """Fill in the sizes of the artifacts, whose blobs must be here, whole, and of a format that may be stored."""
    wanted = {artifact.sha256 for artifact in content.artifacts}
    here = {
        row.sha256: row for row in connection.execute(tables.blobs.select().where(tables.blobs.c.sha256.in_(wanted)))
    }
    for artifact in content.artifacts:
        blob, row = names.blob_name(artifact.sha256), here.get(artifact.sha256)
        if row is None or row.damaged:
            text = f"{artifact.path}: {blob} is not here{' whole' if row else ''}; upload it first"
            raise WrongState(text, reason="BLOB_NOT_FOUND", metadata={"blob": blob})
        if row.format == FORMAT_NONE:
            text = f"{artifact.path}: {blob} is none of the formats that may be stored"
            raise WrongState(text, reason="FORMAT_NOT_ALLOWED", metadata={"blob": blob})
    return replace(
        content, artifacts=tuple(replace(each, size_bytes=here[each.sha256].size_bytes) for each in content.artifacts)
    )
