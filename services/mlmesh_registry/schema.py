"""Which fields the lists of versions and of models have, by the names of the contract's messages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from mlmesh_registry import tables
from mlmesh_registry.comparing import Clause
from mlmesh_registry.fields import (
    Aliases,
    EnumColumn,
    Field,
    Figure,
    NamesOf,
    NumberColumn,
    Prose,
    Term,
    Terms,
    TextColumn,
)

LINEAGE = (
    "job",
    "dataset",
    "dataset_fingerprint",
    "code_digest",
    "environment_digest",
    "study",
    "source_uri",
)
"""Parts of the lineage that are one text each."""

STAGES = ("ACTIVE", "DEPRECATED", "QUARANTINED")
KINDS = ("MODEL", "DATASET")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """A list's fields.

    Attributes:
        key: column that names a row of the list, and by which it is ordered where nothing else decides.
        newest_first: whether it is ordered from the greatest key down when no order is asked for.
        model_id: the model that all of the list belongs to, None for a list of all models.
        fields: by dotted path.
        maps: fields with free keys, by the path before the key.
        prose: what words alone are looked for in.
    """

    key: sa.Column[Any]
    newest_first: bool
    model_id: str | None
    fields: Mapping[str, Field]
    maps: Mapping[str, Callable[[str], Field]]
    prose: Prose

    @property
    def table(self) -> sa.Table:
        """The list's own table."""
        table = self.key.table
        assert isinstance(table, sa.Table)  # noqa: S101  a column of a table
        return table

    @property
    def names(self) -> str:
        """All fields, for a person."""
        return ", ".join([*self.fields, *(f"{name}.KEY" for name in self.maps)])

    def field(self, path: tuple[str, ...]) -> Field | None:
        """Find a field by its path; a key of a map may hold dots."""
        if len(path) > 1 and path[0] in self.maps:
            return self.maps[path[0]](".".join(path[1:]))
        return self.fields.get(".".join(path))


def version_schema(model_id: str | None) -> Schema:
    """Fields of the versions of a model, or (None) of all."""
    table, terms, metrics = tables.versions, tables.version_terms, tables.version_metrics
    column, key = table.c, table.c.revision
    keys = sa.select(key).correlate(None)
    prose = Prose(key=key, table=tables.version_texts, also=(column.model,))

    def of_model(rows: sa.FromClause) -> tuple[Clause, ...]:
        return () if model_id is None else (rows.c.model == model_id,)

    name = sa.literal("models/") + column.model + "/versions/" + sa.cast(column.number, sa.Text)
    return Schema(
        key=key,
        newest_first=True,
        model_id=model_id,
        prose=prose,
        maps={
            "labels": lambda label: Term(key=key, table=terms, name=f"labels.{label}"),
            "metrics": lambda metric: Figure(key=key, table=metrics, name=metric, scope=of_model),
        },
        fields={
            "name": TextColumn(column=name),
            "model": TextColumn(column=column.model, keys=keys),
            "number": NumberColumn(column=column.number),
            "stage": EnumColumn(column=column.stage, names=STAGES, keys=keys),
            "creator": TextColumn(column=column.creator, keys=keys),
            "create_time": NumberColumn(column=column.create_time, time=True, keys=keys),
            "verify_time": NumberColumn(column=column.verify_time, time=True),
            "delete_time": NumberColumn(column=column.delete_time, time=True),
            "digest": TextColumn(column=column.digest, keys=keys),
            "description": prose,
            "size_bytes": NumberColumn(column=column.size_bytes, keys=keys),
            "revision": NumberColumn(column=key, keys=keys),
            "labels": NamesOf(key=key, table=terms, column="field", prefix="labels."),
            "metrics": NamesOf(key=key, table=metrics, column="name"),
            "aliases": Aliases(versions=table, aliases=tables.aliases),
            **{f"lineage.{part}": Term(key=key, table=terms, name=f"lineage.{part}", absent="") for part in LINEAGE},
            "lineage.parents": Terms(key=key, table=terms, name="lineage.parents"),
            "artifacts.path": Terms(key=key, table=terms, name="artifacts.path"),
        },
    )


def model_schema() -> Schema:
    """Fields of the models."""
    table, terms = tables.models, tables.model_terms
    column, key = table.c, table.c.id
    prose = Prose(key=key, table=tables.model_texts, also=(key,))
    return Schema(
        key=key,
        newest_first=False,
        model_id=None,
        prose=prose,
        maps={"labels": lambda label: Term(key=key, table=terms, name=f"labels.{label}")},
        fields={
            "name": TextColumn(column=sa.literal("models/") + key),
            "id": TextColumn(column=key, keys=sa.select(key).correlate(None)),
            "kind": EnumColumn(column=column.kind, names=KINDS),
            "creator": TextColumn(column=column.creator),
            "create_time": NumberColumn(column=column.create_time, time=True),
            "update_time": NumberColumn(column=column.update_time, time=True),
            "delete_time": NumberColumn(column=column.delete_time, time=True),
            "description": prose,
            "latest_version": NumberColumn(column=column.latest_version),
            "labels": NamesOf(key=key, table=terms, column="field", prefix="labels."),
        },
    )
