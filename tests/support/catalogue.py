"""Registries with many versions in them, made quickly: the rows that publishing makes, without the bytes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from mlmesh_registry import tables
from mlmesh_registry.backends import Backend
from mlmesh_registry.database import Database
from mlmesh_registry.events import to_micros
from mlmesh_registry.indexing import model_rows, version_rows
from mlmesh_registry.postgresql import PostgresBackend, parse_url
from mlmesh_registry.sqlite import SqliteBackend
from mlmesh_registry.versions import Content, Model, Version, canonical, digest, manifest
from mlmesh_runtime.executors import Executors

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
_BATCH = 2000


@contextlib.contextmanager
def catalogue(folder: Path, url: str = "") -> Iterator[Backend]:
    """An empty registry's database: SQLite in a folder, or PostgreSQL by URL."""
    backend: Backend = PostgresBackend(parse_url(url)) if url else SqliteBackend(folder / "registry.sqlite")
    pools = Executors({"writer": 1, "readers": 1})
    database = Database(
        backend,
        writer=pools["writer"],
        readers=pools["readers"],
        clock=lambda: BEGIN,
        changes_kept=1,
        on_commit=lambda _changes: None,
    )
    try:
        database.migrate()
        yield backend
    finally:
        database.close()


def version(model: str, number: int, revision: int, content: Content, **fields: Any) -> Version:
    """A version, published one second after the one with the revision before."""
    made = {"create_time": BEGIN + timedelta(seconds=revision), "creator": "", "meta_revision": revision, **fields}
    return Version(model=model, number=number, revision=revision, content=content, digest=digest(content), **made)


def model(name: str, revision: int, **fields: Any) -> Model:
    """A model."""
    time = BEGIN + timedelta(seconds=revision)
    return Model(id=name, revision=revision, **{"create_time": time, "update_time": time, **fields})


def fill(connection: sa.Connection, models: Sequence[Model], versions: Iterator[Version] | Sequence[Version]) -> None:
    """Store models and versions with everything that they are found by."""
    _insert(connection, models, _model_row, model_rows)
    batch: list[Version] = []
    last = max((each.revision for each in models), default=0)
    for each in versions:
        batch.append(each)
        last = max(last, each.revision)
        if len(batch) == _BATCH:
            _insert(connection, batch, _version_row, version_rows)
            batch.clear()
    _insert(connection, batch, _version_row, version_rows)
    connection.execute(tables.log_head.update().values(revision=last))


def sha256(text: str) -> str:
    """Hex SHA-256 of text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _insert(
    connection: sa.Connection,
    items: Sequence[Any],
    row: Callable[[Any], dict[str, Any]],
    found_by: Callable[[Any], Any],
) -> None:
    if not items:
        return
    collected: dict[sa.Table, list[Any]] = {
        tables.models if isinstance(items[0], Model) else tables.versions: [row(item) for item in items]
    }
    for item in items:
        for table, rows in found_by(item).items():
            collected.setdefault(table, []).extend(rows)
    for table, rows in collected.items():
        if rows:
            connection.execute(table.insert(), rows)


def _micros(time: datetime | None) -> int | None:
    return None if time is None else to_micros(time)


def _version_row(item: Version) -> dict[str, Any]:
    return {
        "model": item.model,
        "number": item.number,
        "digest": item.digest,
        "manifest": canonical(manifest(item.content)).decode(),
        "create_time": to_micros(item.create_time),
        "creator": item.creator,
        "revision": item.revision,
        "stage": item.stage,
        "meta_revision": item.meta_revision,
        "meta_time": to_micros(item.create_time),
        "verify_time": _micros(item.verify_time),
        "delete_time": _micros(item.delete_time),
        "purge_time": _micros(item.purge_time),
        "size_bytes": item.size_bytes,
    }


def _model_row(item: Model) -> dict[str, Any]:
    return {
        "id": item.id,
        "description": item.description,
        "labels": canonical(dict(item.labels)).decode(),
        "create_time": to_micros(item.create_time),
        "update_time": to_micros(item.update_time),
        "creator": "",
        "updater": "",
        "revision": item.revision,
        "latest_version": item.latest_version,
        "kind": item.kind,
        "delete_time": _micros(item.delete_time),
        "purge_time": _micros(item.purge_time),
    }
