"""What is taken out of versions and models when they are written, so that they are found by it."""

from collections.abc import Iterable, Iterator

from mlmesh_registry import tables
from mlmesh_registry.database import Write
from mlmesh_registry.schema import LINEAGE
from mlmesh_registry.sql import START_CHARS, folded
from mlmesh_registry.versions import Content, Model, Version


def index_version(write: Write, version: Version) -> None:
    """Make a version findable; to be called once, in the transaction that inserted it."""
    connection, key = write.connection, version.revision
    if terms := [{"revision": key, **row} for row in _rows(_version_terms(version.content))]:
        connection.execute(tables.version_terms.insert(), terms)
    if metrics := [
        {"revision": key, "name": name, "value": float(value), "model": version.model}
        for name, value in version.content.metrics.items()
    ]:
        connection.execute(tables.version_metrics.insert(), metrics)
    if version.content.description:
        row = {"revision": key, "folded": folded(version.content.description)}
        connection.execute(tables.version_texts.insert(), row)


def index_model(write: Write, model: Model) -> None:
    """Make a model findable; to be called in the transaction that inserted or changed it."""
    connection = write.connection
    for table in (tables.model_terms, tables.model_texts):
        connection.execute(table.delete().where(table.c.model == model.id))
    labels = ((f"labels.{key}", value) for key, value in model.labels.items())
    if terms := [{"model": model.id, **row} for row in _rows(labels)]:
        connection.execute(tables.model_terms.insert(), terms)
    if model.description:
        connection.execute(tables.model_texts.insert(), {"model": model.id, "folded": folded(model.description)})


def _version_terms(content: Content) -> Iterator[tuple[str, str]]:
    for key, value in content.labels.items():
        yield f"labels.{key}", value
    for name in LINEAGE:
        if value := getattr(content.lineage, name, ""):
            yield f"lineage.{name}", value
    for parent in content.lineage.parents:
        yield "lineage.parents", parent
    for artifact in content.artifacts:
        yield "artifacts.path", artifact.path


def _rows(terms: Iterable[tuple[str, str]]) -> Iterator[dict[str, str | int]]:
    for position, (field, value) in enumerate(terms):
        yield {"field": field, "position": position, "start": value[:START_CHARS], "value": value}
