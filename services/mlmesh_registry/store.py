"""Models, versions and aliases in SQL: every method is one transaction.

Errors are those of the contract, with its reasons: NotFound (MODEL_NOT_FOUND, MODEL_VERSION_NOT_FOUND,
MODEL_ALIAS_NOT_FOUND), AlreadyExists (MODEL_EXISTS, REQUEST_ID_REUSED), Conflict (ETAG_MISMATCH), WrongState
(BLOB_NOT_FOUND), InvalidInput, Overloaded (DISK_FULL).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import sqlalchemy as sa

from mlmesh_registry import names, rows, tables
from mlmesh_registry.database import Database, Write
from mlmesh_registry.events import Change, DeletedAlias, decode, encode, from_micros, to_micros
from mlmesh_registry.names import AliasName, VersionName
from mlmesh_registry.paging import make_token, page_size, read_token
from mlmesh_registry.requests import first_answer, remember
from mlmesh_registry.versions import (
    Alias,
    Content,
    Model,
    Version,
    check_content,
    check_labels,
    check_text,
    digest,
    fingerprint,
    manifest,
)
from mlmesh_runtime.errors import AlreadyExists, Conflict, InvalidInput, NotFound, RevisionLost, WrongState


class SqlModelStore:
    """The truth about models. `actor` is the SPIFFE id of the caller, empty outside a mesh."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create_model(
        self, model_id: str, *, description: str, labels: Mapping[str, str], request_id: str, actor: str
    ) -> Model:
        """Register a name. The same request_id with the same content gives the first answer again."""
        names.model_id(model_id)
        check_text(description, "description")
        check_labels(labels)
        same = fingerprint(model_id, description, dict(labels))

        def transact(write: Write) -> Model:
            if answer := first_answer(write, "CreateModel", request_id, same):
                return cast(Model, decode("model", answer))
            if rows.model(write.connection, model_id) is not None:
                raise AlreadyExists(f"{names.model_name(model_id)} exists", reason="MODEL_EXISTS")
            model = Model(
                id=model_id,
                description=description,
                labels=dict(labels),
                create_time=write.now,
                update_time=write.now,
                revision=write.next_revision(),
            )
            rows.insert_model(write, model)
            write.record(model.revision, model)
            remember(write, "CreateModel", request_id, same, encode(model)[1])
            return model

        return await self._database.write(transact, actor=actor)

    async def get_model(self, model_id: str) -> Model:
        """Read one model."""
        return await self._database.read(lambda connection: _model(connection, model_id))

    async def list_models(self, *, size: int, token: str) -> tuple[Sequence[Model], str]:
        """One page by name, and the token of the next ("" on the last page)."""
        size, after = page_size(size), read_token(token, "models", str)
        found = await self._database.read(lambda connection: rows.models(connection, after, size + 1))
        more = make_token("models", found[size - 1].id) if len(found) > size else ""
        return found[:size], more

    async def update_model(
        self, model_id: str, *, description: str | None, labels: Mapping[str, str], etag: str, actor: str
    ) -> Model:
        """Replace description (unless None) and labels (unless empty) by compare-and-set."""
        if description is not None:
            check_text(description, "description")
        check_labels(labels)

        def transact(write: Write) -> Model:
            before = _model(write.connection, model_id)
            _check_etag(before.name, before.etag, etag)
            wanted = replace(
                before,
                description=before.description if description is None else description,
                labels=dict(labels) if labels else before.labels,
            )
            if wanted == before:
                return before
            after = replace(wanted, update_time=write.now, revision=write.next_revision())
            rows.update_model(write, after)
            write.record(after.revision, after)
            return after

        return await self._database.write(transact, actor=actor)

    async def create_version(self, model_id: str, content: Content, *, request_id: str, actor: str) -> Version:
        """Publish the next version of a model. All its blobs must be here; artifact sizes are filled in."""
        check_content(content)
        same = fingerprint(model_id, manifest(content))

        def transact(write: Write) -> Version:
            if answer := first_answer(write, "CreateModelVersion", request_id, same):
                first = _version(write.connection, VersionName(model=model_id, number=answer["number"]))
                return replace(first, aliases=())
            number = _model(write.connection, model_id).latest_version + 1
            complete = _with_sizes(write.connection, content)
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
            write.record(version.revision, version)
            remember(write, "CreateModelVersion", request_id, same, {"number": number})
            return version

        return await self._database.write(transact, actor=actor)

    async def get_version(self, name: VersionName | AliasName) -> Version:
        """Read one version by number or by alias."""

        def transact(connection: sa.Connection) -> Version:
            _model(connection, name.model)
            if isinstance(name, VersionName):
                return _version(connection, name)
            alias = rows.alias(connection, name)
            if alias is None:
                raise NotFound(f"{name} not found", reason="MODEL_ALIAS_NOT_FOUND")
            return _version(connection, VersionName(model=name.model, number=alias.version))

        return await self._database.read(transact)

    async def list_versions(self, model_id: str | None, *, size: int, token: str) -> tuple[Sequence[Version], str]:
        """One page, newest first, of a model or (None) of all."""
        query = f"versions of {model_id or '-'}"
        size, after = page_size(size), read_token(token, query, int)

        def transact(connection: sa.Connection) -> Sequence[Version]:
            if model_id is not None:
                _model(connection, model_id)
            return rows.versions(connection, model_id, after, size + 1)

        found = await self._database.read(transact)
        more = make_token(query, found[size - 1].revision) if len(found) > size else ""
        return found[:size], more

    async def set_alias(self, name: AliasName, version: VersionName, *, etag: str, actor: str) -> Alias:
        """Create (empty etag) or move an alias by compare-and-set; to where it points already is a no-op."""
        if version.model != name.model:
            raise InvalidInput("version: of another model than the alias", field="version")

        def transact(write: Write) -> Alias:
            _model(write.connection, name.model)
            before = rows.alias(write.connection, name)
            _check_etag(str(name), before.etag if before else "", etag)
            _version(write.connection, version)
            if before is not None and before.version == version.number:
                return before
            after = Alias(
                model=name.model,
                alias=name.alias,
                version=version.number,
                update_time=write.now,
                updater=write.actor,
                revision=write.next_revision(),
            )
            rows.put_alias(write, after)
            write.record(after.revision, after)
            return after

        return await self._database.write(transact, actor=actor)

    async def list_aliases(self, model_id: str | None, *, size: int, token: str) -> tuple[Sequence[Alias], str]:
        """One page by name, of a model or (None) of all."""
        query = f"aliases of {model_id or '-'}"
        size, after = page_size(size), read_token(token, query, str, str)

        def transact(connection: sa.Connection) -> Sequence[Alias]:
            if model_id is not None:
                _model(connection, model_id)
            return rows.aliases(connection, model_id, after, size + 1)

        found = await self._database.read(transact)
        more = make_token(query, found[size - 1].model, found[size - 1].alias) if len(found) > size else ""
        return found[:size], more

    async def delete_alias(self, name: AliasName, *, etag: str, actor: str) -> None:
        """Remove an alias by compare-and-set."""

        def transact(write: Write) -> None:
            _model(write.connection, name.model)
            before = rows.alias(write.connection, name)
            if before is None:
                raise NotFound(f"{name} not found", reason="MODEL_ALIAS_NOT_FOUND")
            _check_etag(str(name), before.etag, etag)
            rows.delete_alias(write, name)
            gone = DeletedAlias(model=name.model, alias=name.alias, version=before.version)
            write.record(write.next_revision(), gone)

        await self._database.write(transact, actor=actor)

    async def quarantine_blob(self, sha256: str, reason: str) -> Sequence[Version]:
        """Quarantine every version that uses a blob whose bytes are not those published; those that were not yet."""
        raise NotImplementedError

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


def _model(connection: sa.Connection, model_id: str) -> Model:
    model = rows.model(connection, model_id)
    if model is None:
        raise NotFound(f"{names.model_name(model_id)} not found", reason="MODEL_NOT_FOUND")
    return model


def _version(connection: sa.Connection, name: VersionName) -> Version:
    version = rows.version(connection, name.model, name.number)
    if version is None:
        raise NotFound(f"{name} not found", reason="MODEL_VERSION_NOT_FOUND")
    return version


def _check_etag(name: str, present: str, given: str) -> None:
    if given == present:
        return
    if not present:
        text = f"{name} is not there any more; to create it, send no etag"
    elif not given:
        text = f"{name} is there already; to move it, send its etag"
    else:
        text = f"{name} has moved on since the etag was read; read it again"
    raise Conflict(text, reason="ETAG_MISMATCH", metadata={"etag": present})


def _with_sizes(connection: sa.Connection, content: Content) -> Content:
    wanted = {artifact.sha256 for artifact in content.artifacts}
    query = sa.select(tables.blobs.c.sha256, tables.blobs.c.size_bytes).where(tables.blobs.c.sha256.in_(wanted))
    sizes = {row.sha256: row.size_bytes for row in connection.execute(query)}
    for artifact in content.artifacts:
        if artifact.sha256 not in sizes:
            blob = names.blob_name(artifact.sha256)
            text = f"{artifact.path}: {blob} is not here; upload it first"
            raise WrongState(text, reason="BLOB_NOT_FOUND", metadata={"blob": blob})
    return replace(content, artifacts=tuple(replace(a, size_bytes=sizes[a.sha256]) for a in content.artifacts))
