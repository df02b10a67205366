"""What is taken out of versions and models when they are written, so that they are found by it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from mlmesh_registry import tables
from mlmesh_registry.database import Write
from mlmesh_registry.schema import LINEAGE
from mlmesh_registry.sql import START_CHARS, folded
from mlmesh_registry.versions import Content, Model, Version

Rows = Mapping[sa.Table, Sequence[Mapping[str, Any]]]


def index_version(write: Write, version: Version) -> None:
    """Make a version findable; to be called once, in the transaction that inserted it."""
    _insert(write, version_rows(version))


def index_model(write: Write, model: Model) -> None:
    """Make a model findable; to be called in the transaction that inserted or changed it."""
    for table in (tables.model_terms, tables.model_texts):
        write.connection.execute(table.delete().where(table.c.model == model.id))
    _insert(write, model_rows(model))


def version_rows(version: Version) -> Rows:
    """Rows by which a version is found."""
    owner, content = {"revision": version.revision}, version.content
    metrics = [
        {**owner, "name": name, "value": float(value), "model": version.model}
        for name, value in content.metrics.items()
    ]
    return {
        tables.version_terms: [{**owner, **row} for row in _rows(_version_terms(content))],
        tables.version_metrics: metrics,
        tables.version_texts: [{**owner, "folded": folded(content.description)}] if content.description else [],
    }


def model_rows(model: Model) -> Rows:
    """Rows by which a model is found."""
    owner, labels = {"model": model.id}, ((f"labels.{key}", value) for key, value in model.labels.items())
    return {
        tables.model_terms: [{**owner, **row} for row in _rows(labels)],
        tables.model_texts: [{**owner, "folded": folded(model.description)}] if model.description else [],
    }


def _insert(write: Write, found: Rows) -> None:
    for table, rows in found.items():
        if rows:
            write.connection.execute(table.insert(), rows)


def _version_terms(content: Content) -> Iterator[tuple[str, str]]:
    for key, value in content.labels.items():
        yield f"labels.{key}", value
    for name in LINEAGE:
        if value := getattr(content.lineage, name):
            yield f"lineage.{name}", value
    for parent in content.lineage.parents:
        yield "lineage.parents", parent
    for artifact in content.artifacts:
        yield "artifacts.path", artifact.path


def _rows(terms: Iterable[tuple[str, str]]) -> Iterator[dict[str, str | int]]:
    for position, (field, value) in enumerate(terms):
        yield {"field": field, "position": position, "start": value[:START_CHARS], "value": value}
