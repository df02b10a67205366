"""Stages, gates, alias moves, deletion, quotas and the audit log."""

import json
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_BATCH = 1000


def upgrade() -> None:
    """Apply, and fill in what is known of what is stored."""
    _models()
    _versions()
    _blobs()
    _alias_moves()
    _audit()
    _quotas()


def _models() -> None:
    for column in (
        sa.Column("kind", sa.Text(), nullable=False, server_default="MODEL"),
        sa.Column("gates", sa.Text(), nullable=False, server_default="[]"),
        sa.Column("delete_time", sa.BigInteger(), nullable=True),
        sa.Column("purge_time", sa.BigInteger(), nullable=True),
    ):
        op.add_column("models", column)
    op.create_index(op.f("ix_models_purge_time"), "models", ["purge_time"])


def _versions() -> None:
    for column in (
        sa.Column("stage", sa.Text(), nullable=False, server_default="ACTIVE"),
        sa.Column("stage_reason", sa.Text(), nullable=False, server_default=""),
        sa.Column("meta_revision", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("meta_time", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("meta_actor", sa.Text(), nullable=False, server_default=""),
        sa.Column("verify_time", sa.BigInteger(), nullable=True),
        sa.Column("corrupt_time", sa.BigInteger(), nullable=True),
        sa.Column("delete_time", sa.BigInteger(), nullable=True),
        sa.Column("purge_time", sa.BigInteger(), nullable=True),
        sa.Column("deleted_with_model", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False, server_default="0"),
    ):
        op.add_column("versions", column)
    op.execute("UPDATE versions SET meta_revision = revision, meta_time = create_time, meta_actor = creator")
    versions = sa.table("versions", sa.column("revision"), sa.column("manifest"), sa.column("size_bytes"))
    for row in _stored(versions):
        size = sum(artifact["size_bytes"] for artifact in json.loads(row.manifest)["artifacts"])
        op.execute(versions.update().where(versions.c.revision == row.revision).values(size_bytes=size))
    op.create_index(op.f("ix_versions_meta_revision"), "versions", ["meta_revision"], unique=True)
    op.create_index(op.f("ix_versions_model_meta_revision"), "versions", ["model", "meta_revision"])
    op.create_index(op.f("ix_versions_purge_time"), "versions", ["purge_time"])


def _stored(versions: sa.TableClause) -> Iterator[Any]:
    """Rows by revision, some at a time: manifests of 100,000 versions do not fit everywhere."""
    query = sa.select(versions.c.revision, versions.c.manifest).order_by(versions.c.revision).limit(_BATCH)
    rows = op.get_bind().execute(query).all()
    while rows:
        yield from rows
        rows = op.get_bind().execute(query.where(versions.c.revision > rows[-1].revision)).all()


def _blobs() -> None:
    op.add_column("blobs", sa.Column("unused_since", sa.BigInteger(), nullable=True))
    op.execute(
        "UPDATE blobs SET unused_since = create_time "
        "WHERE NOT EXISTS (SELECT 1 FROM version_blobs WHERE version_blobs.sha256 = blobs.sha256)"
    )
    op.create_index(op.f("ix_blobs_unused_since"), "blobs", ["unused_since"])
    op.drop_index(op.f("ix_version_blobs_sha256"), "version_blobs")
    op.create_index(op.f("ix_version_blobs_sha256_model_number"), "version_blobs", ["sha256", "model", "number"])
    op.create_table(
        "condemned_blobs",
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("location", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("time", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", "location", name=op.f("pk_condemned_blobs")),
    )
    op.create_index(op.f("ix_uploads_sha256"), "uploads", ["sha256"])
    op.create_index(op.f("ix_uploads_finished_size_bytes"), "uploads", ["finished", "size_bytes"])


def _alias_moves() -> None:
    op.create_table(
        "alias_moves",
        sa.Column("revision", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("alias", sa.Text(), nullable=False),
        sa.Column("from_version", sa.BigInteger(), nullable=True),
        sa.Column("to_version", sa.BigInteger(), nullable=True),
        sa.Column("time", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("gate_results", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("revision", name=op.f("pk_alias_moves")),
    )
    op.create_index(op.f("ix_alias_moves_model_alias_revision"), "alias_moves", ["model", "alias", "revision"])
    op.create_index(op.f("ix_alias_moves_model_revision"), "alias_moves", ["model", "revision"])
    # Where an alias pointed before this table was there, nobody knows: its history begins where it is.
    op.execute(
        "INSERT INTO alias_moves (revision, model, alias, from_version, to_version, time, actor, reason, gate_results) "
        "SELECT revision, model, alias, NULL, version, update_time, updater, '', '[]' FROM aliases"
    )


def _audit() -> None:
    op.add_column("log_head", sa.Column("audit_sequence", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("log_head", sa.Column("audit_digest", sa.Text(), nullable=False, server_default="0" * 64))
    op.create_table(
        "audit_entries",
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("time", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("resource", sa.Text(), nullable=False),
        sa.Column("root", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("previous_digest", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_audit_entries")),
    )
    op.create_index(op.f("ix_audit_entries_root_sequence"), "audit_entries", ["root", "sequence"])
    op.create_index(op.f("ix_audit_entries_actor_sequence"), "audit_entries", ["actor", "sequence"])


def _quotas() -> None:
    op.create_table(
        "quotas",
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("bytes_max", sa.BigInteger(), nullable=False),
        sa.Column("versions_max", sa.BigInteger(), nullable=False),
        sa.Column("models_max", sa.BigInteger(), nullable=False),
        sa.Column("bytes_used", sa.BigInteger(), nullable=False),
        sa.Column("versions_used", sa.BigInteger(), nullable=False),
        sa.Column("models_used", sa.BigInteger(), nullable=False),
        sa.Column("changes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("scope", name=op.f("pk_quotas")),
    )
    op.execute(
        "INSERT INTO quotas "
        "(scope, bytes_max, versions_max, models_max, bytes_used, versions_used, models_used, changes) "
        "SELECT '-', 0, 0, 0, (SELECT COALESCE(SUM(size_bytes), 0) FROM blobs), "
        "(SELECT COUNT(*) FROM versions), (SELECT COUNT(*) FROM models), 0"
    )
    op.execute(
        "INSERT INTO quotas "
        "(scope, bytes_max, versions_max, models_max, bytes_used, versions_used, models_used, changes) "
        "SELECT models.id, 0, 0, 0, COALESCE((SELECT SUM(blobs.size_bytes) FROM blobs WHERE blobs.sha256 IN "
        "(SELECT version_blobs.sha256 FROM version_blobs WHERE version_blobs.model = models.id)), 0), "
        "(SELECT COUNT(*) FROM versions WHERE versions.model = models.id), 0, 0 FROM models"
    )
