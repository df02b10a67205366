"""What versions are searched by, and their signatures."""

import json
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_INDEXES = (
    ("versions", ["create_time", "revision"]),
    ("versions", ["model", "create_time", "revision"]),
    ("versions", ["creator", "revision"]),
    ("versions", ["digest", "revision"]),
    ("versions", ["size_bytes", "revision"]),
    ("versions", ["stage", "revision"]),
    ("aliases", ["alias", "model", "version"]),
)
_BATCH = 1000
_START_CHARS = 100


def upgrade() -> None:
    """Apply, and take out of what is stored what a later insert would have."""
    version_metrics = op.create_table(
        "version_metrics",
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        _owner("version_metrics", "revision", "versions.revision"),
        sa.PrimaryKeyConstraint("revision", "name", name=op.f("pk_version_metrics")),
    )
    op.create_index(op.f("ix_version_metrics_name_value_revision"), "version_metrics", ["name", "value", "revision"])
    op.create_index(
        op.f("ix_version_metrics_model_name_value_revision"), "version_metrics", ["model", "name", "value", "revision"]
    )
    version_terms = _terms_table("version_terms", sa.Column("revision", sa.BigInteger(), nullable=False))
    version_texts = op.create_table(
        "version_texts",
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("folded", sa.Text(), nullable=False),
        _owner("version_texts", "revision", "versions.revision"),
        sa.PrimaryKeyConstraint("revision", name=op.f("pk_version_texts")),
    )
    model_terms = _terms_table("model_terms", sa.Column("model", sa.Text(), nullable=False))
    model_texts = op.create_table(
        "model_texts",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("folded", sa.Text(), nullable=False),
        _owner("model_texts", "model", "models.id"),
        sa.PrimaryKeyConstraint("model", name=op.f("pk_model_texts")),
    )
    op.create_table(
        "version_signatures",
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("bundle", sa.Text(), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.Column("creator", sa.Text(), nullable=False),
        _owner("version_signatures", "revision", "versions.revision"),
        sa.PrimaryKeyConstraint("revision", "digest", name=op.f("pk_version_signatures")),
    )
    for table, columns in _INDEXES:
        op.create_index(op.f(f"ix_{table}_{'_'.join(columns)}"), table, columns)
    for row in _stored("versions", "revision", "model", "manifest"):
        _index_version(row, version_metrics, version_terms, version_texts)
    for row in _stored("models", "id", "labels", "description"):
        labels = [(f"labels.{key}", value) for key, value in json.loads(row.labels).items()]
        _fill(model_terms, [{"model": row.id, **term} for term in _rows(labels)])
        _fill(model_texts, [{"model": row.id, "folded": row.description.casefold()}] if row.description else [])


def downgrade() -> None:
    """Undo."""
    for table, columns in _INDEXES:
        op.drop_index(op.f(f"ix_{table}_{'_'.join(columns)}"), table)
    for table in (
        "version_signatures",
        "model_texts",
        "model_terms",
        "version_texts",
        "version_terms",
        "version_metrics",
    ):
        op.drop_table(table)


def _owner(table: str, column: str, target: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [target], name=op.f(f"fk_{table}_{column}"), ondelete="CASCADE")


def _terms_table(name: str, key: sa.Column[Any]) -> sa.Table:
    table = op.create_table(
        name,
        key,
        sa.Column("field", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("start", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        _owner(name, key.name, "versions.revision" if key.name == "revision" else "models.id"),
        sa.PrimaryKeyConstraint(key.name, "field", "position", name=op.f(f"pk_{name}")),
    )
    op.create_index(op.f(f"ix_{name}_field_start_{key.name}"), name, ["field", "start", key.name])
    return table


def _stored(table: str, key: str, *columns: str) -> Iterator[sa.Row[Any]]:
    """Rows by key, some at a time: manifests of 100,000 versions do not fit everywhere."""
    source = sa.table(table, *(sa.column(name) for name in (key, *columns)))
    query = sa.select(source).order_by(source.c[key]).limit(_BATCH)
    rows = op.get_bind().execute(query).all()
    while rows:
        yield from rows
        rows = op.get_bind().execute(query.where(source.c[key] > getattr(rows[-1], key))).all()


def _index_version(row: sa.Row[Any], metrics: sa.Table, terms: sa.Table, texts: sa.Table) -> None:
    manifest = json.loads(row.manifest)
    lineage = manifest["lineage"]
    found = [(f"labels.{key}", value) for key, value in manifest["labels"].items()]
    found += [(f"lineage.{key}", value) for key, value in lineage.items() if key != "parents" and value]
    found += [("lineage.parents", parent) for parent in lineage["parents"]]
    found += [("artifacts.path", artifact["path"]) for artifact in manifest["artifacts"]]
    figures = manifest["metrics"].items()
    _fill(terms, [{"revision": row.revision, **term} for term in _rows(found)])
    _fill(metrics, [{"revision": row.revision, "name": k, "value": v, "model": row.model} for k, v in figures])
    if manifest["description"]:
        _fill(texts, [{"revision": row.revision, "folded": manifest["description"].casefold()}])


def _rows(terms: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for position, (field, value) in enumerate(terms):
        yield {"field": field, "position": position, "start": value[:_START_CHARS], "value": value}


def _fill(table: sa.Table, rows: list[dict[str, Any]]) -> None:
    if rows:
        op.bulk_insert(table, rows)
