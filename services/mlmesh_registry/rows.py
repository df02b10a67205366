"""Rows to values and back: the queries of the model store, each inside its caller's transaction."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from mlmesh_registry import conditions, indexing, tables
from mlmesh_registry.database import Write
from mlmesh_registry.events import Change, DeletedVersion, from_micros, to_micros
from mlmesh_registry.names import AliasName
from mlmesh_registry.versions import Alias, Model, Version, canonical, content_from, manifest

Row = sa.Row[Any]


def model(connection: sa.Connection, model_id: str) -> Model | None:
    """One model."""
    row = connection.execute(tables.models.select().where(tables.models.c.id == model_id)).one_or_none()
    return None if row is None else _model(row)


def models_of(connection: sa.Connection, ids: Iterable[str]) -> Sequence[Model]:
    """Models by id, in no order."""
    return [_model(row) for row in connection.execute(tables.models.select().where(tables.models.c.id.in_([*ids])))]


def insert_model(write: Write, new: Model) -> None:
    """Add a model."""
    write.connection.execute(
        tables.models.insert().values(
            id=new.id,
            description=new.description,
            labels=_json(new.labels),
            create_time=to_micros(new.create_time),
            update_time=to_micros(new.update_time),
            creator=write.actor,
            updater=write.actor,
            revision=new.revision,
            latest_version=new.latest_version,
            kind=new.kind,
            gates=gates_json(new),
        )
    )
    indexing.index_model(write, new)


def update_model(write: Write, after: Model) -> None:
    """Replace what an update may change."""
    write.connection.execute(
        tables.models.update()
        .where(tables.models.c.id == after.id)
        .values(
            description=after.description,
            labels=_json(after.labels),
            update_time=to_micros(after.update_time),
            updater=write.actor,
            revision=after.revision,
            gates=gates_json(after),
            delete_time=_micros(after.delete_time),
            purge_time=_micros(after.purge_time),
        )
    )
    indexing.index_model(write, after)


def version(connection: sa.Connection, model_id: str, number: int) -> Version | None:
    """One version with its aliases."""
    column = tables.versions.c
    query = tables.versions.select().where(column.model == model_id, column.number == number)
    found = _versions(connection, connection.execute(query))
    return found[0] if found else None


def versions_of(connection: sa.Connection, revisions: Iterable[int]) -> Sequence[Version]:
    """Versions by the revisions at which they appeared, in no order."""
    return _versions(
        connection, connection.execute(tables.versions.select().where(tables.versions.c.revision.in_([*revisions])))
    )


def insert_version(write: Write, new: Version) -> None:
    """Add a version, what it uses, and count its model up."""
    write.connection.execute(
        tables.versions.insert().values(
            model=new.model,
            number=new.number,
            digest=new.digest,
            manifest=_json(manifest(new.content)),
            create_time=to_micros(new.create_time),
            creator=new.creator,
            revision=new.revision,
            meta_revision=new.meta_revision,
            meta_time=to_micros(new.create_time),
            meta_actor=new.creator,
            size_bytes=new.size_bytes,
        )
    )
    used = sorted({artifact.sha256 for artifact in new.content.artifacts})
    write.connection.execute(
        tables.version_blobs.insert(),
        [{"model": new.model, "number": new.number, "sha256": sha256} for sha256 in used],
    )
    write.connection.execute(
        tables.models.update().where(tables.models.c.id == new.model).values(latest_version=new.number)
    )
    indexing.index_version(write, new)


def update_version(write: Write, after: Version) -> None:
    """Replace the stage or the deletion of a version, which is a change that watchers are told."""
    write.connection.execute(
        tables.versions.update()
        .where(tables.versions.c.revision == after.revision)
        .values(
            stage=after.stage,
            stage_reason=after.stage_reason,
            delete_time=_micros(after.delete_time),
            purge_time=_micros(after.purge_time),
            meta_revision=after.meta_revision,
            meta_time=to_micros(write.now),
            meta_actor=write.actor,
        )
    )


def verified(write: Write, after: Version) -> None:
    """Replace what verifications found out; watchers are not told."""
    write.connection.execute(
        tables.versions.update()
        .where(tables.versions.c.revision == after.revision)
        .values(verify_time=_micros(after.verify_time), corrupt_time=_micros(after.corrupt_time))
    )


def quarantine(write: Write, found: Sequence[Version]) -> None:
    """Replace the stages of versions whose bytes were found corrupt; of some only that they were has changed."""
    if not found:
        return
    column = tables.versions.c
    moved = column.meta_revision != sa.bindparam("new_revision")
    statement = (
        tables.versions.update()
        .where(column.revision == sa.bindparam("which"))
        .values(
            corrupt_time=to_micros(write.now),
            stage="QUARANTINED",
            stage_reason=sa.bindparam("reason"),
            meta_revision=sa.bindparam("new_revision"),
            meta_time=sa.case((moved, to_micros(write.now)), else_=column.meta_time),
            meta_actor=sa.case((moved, write.actor), else_=column.meta_actor),
        )
    )
    values = [
        {"which": each.revision, "reason": each.stage_reason, "new_revision": each.meta_revision} for each in found
    ]
    write.connection.execute(statement, values)


def live_versions(connection: sa.Connection, model_id: str, limit: int | None) -> Sequence[Any]:
    """Model, number, digest and revision of versions that are not deleted, by number."""
    column = tables.versions.c
    query = sa.select(column.model, column.number, column.digest, column.revision)
    query = query.where(column.model == model_id, column.delete_time.is_(None)).order_by(column.number)
    return connection.execute(query.limit(limit)).all()


def delete_with_model(write: Write, taken_along: Sequence[DeletedVersion]) -> None:
    """Hide versions together with their model."""
    _set_standing(
        write,
        [
            {
                "which": each.revision,
                "meta_revision": each.meta_revision,
                "delete_time": to_micros(each.delete_time),
                "purge_time": to_micros(each.purge_time),
            }
            for each in taken_along
        ],
        with_model=True,
    )


def undelete_with_model(write: Write, back: Sequence[Version]) -> None:
    """Bring versions back together with their model."""
    values = [
        {"which": each.revision, "meta_revision": each.meta_revision, "delete_time": None, "purge_time": None}
        for each in back
    ]
    _set_standing(write, values, with_model=False)


def taken_along(connection: sa.Connection, model_id: str, limit: int) -> Sequence[Version]:
    """Versions that were deleted together with their model, by number."""
    column = tables.versions.c
    query = tables.versions.select().where(column.model == model_id, column.deleted_with_model.is_(True))
    return _versions(connection, connection.execute(query.order_by(column.number).limit(limit)))


def versions_with(
    connection: sa.Connection, sha256: str, after: tuple[str, int] | None, limit: int
) -> Sequence[Version]:
    """Versions that use a blob, deleted or not, by model and number, behind one."""
    used, column = tables.version_blobs.c, tables.versions.c
    query = tables.versions.select().join(
        tables.version_blobs, sa.and_(used.model == column.model, used.number == column.number)
    )
    query = query.where(used.sha256 == sha256).order_by(used.model, used.number).limit(limit)
    if after is not None:
        query = query.where(sa.tuple_(used.model, used.number) > sa.tuple_(*after))
    return _versions(connection, connection.execute(query))


def _set_standing(write: Write, values: Sequence[Mapping[str, Any]], *, with_model: bool) -> None:
    if not values:
        return
    statement = (
        tables.versions.update()
        .where(tables.versions.c.revision == sa.bindparam("which"))
        .values(
            meta_revision=sa.bindparam("meta_revision"),
            delete_time=sa.bindparam("delete_time"),
            purge_time=sa.bindparam("purge_time"),
            meta_time=to_micros(write.now),
            meta_actor=write.actor,
            deleted_with_model=with_model,
        )
    )
    write.connection.execute(statement, list(values))


def alias(connection: sa.Connection, name: AliasName) -> Alias | None:
    """One alias."""
    column = tables.aliases.c
    query = tables.aliases.select().where(column.model == name.model, column.alias == name.alias)
    row = connection.execute(query).one_or_none()
    return None if row is None else _alias(row)


def aliases(
    connection: sa.Connection, model_id: str | None, after: tuple[Any, ...] | None, limit: int
) -> Sequence[Alias]:
    """Aliases by model and name, behind one."""
    column = tables.aliases.c
    query = tables.aliases.select().order_by(column.model, column.alias).limit(limit)
    if model_id is not None:
        query = query.where(column.model == model_id)
    if after is not None:
        query = query.where(sa.tuple_(column.model, column.alias) > sa.tuple_(*after))
    return [_alias(row) for row in connection.execute(query)]


def put_alias(write: Write, after: Alias) -> None:
    """Create or move an alias."""
    delete_alias(write, AliasName(model=after.model, alias=after.alias))
    write.connection.execute(
        tables.aliases.insert().values(
            model=after.model,
            alias=after.alias,
            version=after.version,
            update_time=to_micros(after.update_time),
            updater=after.updater,
            revision=after.revision,
        )
    )


def delete_alias(write: Write, name: AliasName) -> None:
    """Remove an alias."""
    column = tables.aliases.c
    write.connection.execute(tables.aliases.delete().where(column.model == name.model, column.alias == name.alias))


def present(connection: sa.Connection, model_id: str | None, after: int, upto: int, limit: int) -> Sequence[Change]:
    """Rows of all three kinds last changed at a revision in (after, upto], by it, at most limit, as changes.

    Those that are deleted are not there.
    """

    def query(table: sa.Table, owner: sa.Column[Any], changed: sa.Column[Any]) -> sa.Select[Any]:
        chosen = table.select().where(changed > after, changed <= upto).order_by(changed).limit(limit)
        if "delete_time" in table.c:
            chosen = chosen.where(table.c.delete_time.is_(None))
        return chosen if model_id is None else chosen.where(owner == model_id)

    model, version, alias = tables.models.c, tables.versions.c, tables.aliases.c
    models_found = connection.execute(query(tables.models, model.id, model.revision))
    versions_found = connection.execute(query(tables.versions, version.model, version.meta_revision)).all()
    made = {row.revision: (row.meta_time, row.meta_actor) for row in versions_found}
    aliases_found = connection.execute(query(tables.aliases, alias.model, alias.revision))
    found = [
        *(_change(row.revision, row.update_time, row.updater, _model(row)) for row in models_found),
        *(_change(each.meta_revision, *made[each.revision], each) for each in _versions(connection, versions_found)),
        *(_change(row.revision, row.update_time, row.updater, _alias(row)) for row in aliases_found),
    ]
    return sorted(found, key=lambda change: change.revision)[:limit]


def _change(revision: int, micros: int, actor: str, subject: Model | Version | Alias) -> Change:
    return Change(revision=revision, time=from_micros(micros), actor=actor, subject=subject)


def _model(row: Row) -> Model:
    return Model(
        id=row.id,
        description=row.description,
        labels=json.loads(row.labels),
        create_time=from_micros(row.create_time),
        update_time=from_micros(row.update_time),
        revision=row.revision,
        latest_version=row.latest_version,
        kind=row.kind,
        gates=tuple(conditions.gate_from(gate) for gate in json.loads(row.gates)),
        delete_time=_time(row.delete_time),
        purge_time=_time(row.purge_time),
    )


def _alias(row: Row) -> Alias:
    return Alias(
        model=row.model,
        alias=row.alias,
        version=row.version,
        update_time=from_micros(row.update_time),
        updater=row.updater,
        revision=row.revision,
    )


def _versions(connection: sa.Connection, result: Iterable[Row]) -> Sequence[Version]:
    found = list(result)
    names: dict[tuple[str, int], list[str]] = {}
    column = tables.aliases.c
    # Aliases are few: those of the models on the page are read at once, by an index.
    query = sa.select(column.model, column.version, column.alias).where(column.model.in_({row.model for row in found}))
    for row in connection.execute(query.order_by(column.alias)) if found else ():
        names.setdefault((row.model, row.version), []).append(row.alias)
    return [
        Version(
            model=row.model,
            number=row.number,
            content=content_from(json.loads(row.manifest)),
            digest=row.digest,
            create_time=from_micros(row.create_time),
            creator=row.creator,
            revision=row.revision,
            stage=row.stage,
            stage_reason=row.stage_reason,
            meta_revision=row.meta_revision,
            verify_time=_time(row.verify_time),
            corrupt_time=_time(row.corrupt_time),
            delete_time=_time(row.delete_time),
            purge_time=_time(row.purge_time),
            aliases=tuple(names.get((row.model, row.number), ())),
        )
        for row in found
    ]


def _time(micros: int | None) -> datetime | None:
    return None if micros is None else from_micros(micros)


def _micros(time: datetime | None) -> int | None:
    return None if time is None else to_micros(time)


def gates_json(model: Model) -> str:
    """Gates as they are stored."""
    return canonical([conditions.plain(gate) for gate in model.gates]).decode()


def _json(value: Mapping[str, Any]) -> str:
    return canonical(dict(value)).decode()
