"""The tables, as SQLAlchemy Core. Alembic migrations make them; a test compares the two.

Only types that SQLite and PostgreSQL share: text, big integers, booleans. Times are microseconds since the epoch (UTC).
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    false,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# One row. Taking the next revision locks it, so revisions are handed out in commit order whatever the database.
log_head = Table(
    "log_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("revision", BigInteger, nullable=False),
    # Of the last audit entry: it tells when entries were cut off the log's end.
    Column("audit_sequence", BigInteger, nullable=False, server_default="0"),
    Column("audit_digest", Text, nullable=False, server_default="0" * 64),
)

# The log that watchers follow; old entries are dropped, the head is not.
changes = Table(
    "changes",
    metadata,
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    Column("time", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Index(None, "model", "revision"),
)

models = Table(
    "models",
    metadata,
    Column("id", Text, primary_key=True),
    Column("description", Text, nullable=False),
    Column("labels", Text, nullable=False),
    Column("create_time", BigInteger, nullable=False),
    Column("update_time", BigInteger, nullable=False),
    Column("creator", Text, nullable=False),
    Column("updater", Text, nullable=False),
    Column("revision", BigInteger, nullable=False, unique=True),
    Column("latest_version", BigInteger, nullable=False),
    Column("kind", Text, nullable=False, server_default="MODEL"),
    Column("gates", Text, nullable=False, server_default="[]"),
    Column("delete_time", BigInteger),
    Column("purge_time", BigInteger),
    Index(None, "purge_time"),
)

versions = Table(
    "versions",
    metadata,
    Column("model", Text, ForeignKey("models.id"), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("digest", Text, nullable=False),
    Column("manifest", Text, nullable=False),
    Column("create_time", BigInteger, nullable=False),
    Column("creator", Text, nullable=False),
    Column("revision", BigInteger, nullable=False, unique=True),
    Column("stage", Text, nullable=False, server_default="ACTIVE"),
    Column("stage_reason", Text, nullable=False, server_default=""),
    # Of the last change that watchers were told: publication, stage, deletion.
    Column("meta_revision", BigInteger, nullable=False, server_default="0"),
    Column("meta_time", BigInteger, nullable=False, server_default="0"),
    Column("meta_actor", Text, nullable=False, server_default=""),
    Column("verify_time", BigInteger),
    # Since when its bytes are known to be others than those published; absent while they are not.
    Column("corrupt_time", BigInteger),
    Column("delete_time", BigInteger),
    Column("purge_time", BigInteger),
    Column("deleted_with_model", Boolean, nullable=False, server_default=false()),
    Column("size_bytes", BigInteger, nullable=False, server_default="0"),
    Index(None, "model", "revision"),
    Index(None, "meta_revision", unique=True),
    Index(None, "model", "meta_revision"),
    Index(None, "purge_time"),
)

blobs = Table(
    "blobs",
    metadata,
    Column("sha256", Text, primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("create_time", BigInteger, nullable=False),
    # Since when no version uses it: its arrival, or the purge of the last that did; absent while one does.
    Column("unused_since", BigInteger),
    # What its bytes are (formats.Format), "none" where they are none of the allowed; empty: not looked at yet.
    Column("format", Text, nullable=False, server_default=""),
    # The upload that brought the bytes and part of their place, so that no two arrivals share one; empty: an old place.
    Column("location", Text, nullable=False, server_default=""),
    # Whether they were found to be other bytes, or gone; a new upload of the right ones is then let in.
    Column("damaged", Boolean, nullable=False, server_default=false()),
    Index(None, "unused_since"),
    Index(None, "format"),
)

# SHA-256 of every MiB of a blob, 32 bytes each, 1024 a row: what a range is verified by.
blob_blocks = Table(
    "blob_blocks",
    metadata,
    Column("sha256", Text, ForeignKey("blobs.sha256", ondelete="CASCADE"), primary_key=True),
    Column("first_block", BigInteger, primary_key=True, autoincrement=False),
    Column("digests", LargeBinary, nullable=False),
)

# Blobs that are no more, but whose bytes may still be: removed after the commit that says so. The same bytes that come
# again have another place, so nothing that is wanted is removed with them.
condemned_blobs = Table(
    "condemned_blobs",
    metadata,
    Column("sha256", Text, primary_key=True),
    Column("location", Text, primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("time", BigInteger, nullable=False),
)

# Which versions use which blob: what makes a blob worth keeping.
version_blobs = Table(
    "version_blobs",
    metadata,
    Column("model", Text, primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("sha256", Text, ForeignKey("blobs.sha256"), primary_key=True),
    ForeignKeyConstraint(["model", "number"], ["versions.model", "versions.number"]),
    Index(None, "sha256", "model", "number"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("model", Text, primary_key=True),
    Column("alias", Text, primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("update_time", BigInteger, nullable=False),
    Column("updater", Text, nullable=False),
    Column("revision", BigInteger, nullable=False, unique=True),
    ForeignKeyConstraint(["model", "version"], ["versions.model", "versions.number"]),
    Index(None, "model", "version"),
)

# Every move and removal of an alias; it goes when its model is purged.
alias_moves = Table(
    "alias_moves",
    metadata,
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    Column("model", Text, nullable=False),
    Column("alias", Text, nullable=False),
    Column("from_version", BigInteger),
    Column("to_version", BigInteger),
    Column("time", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("gate_results", Text, nullable=False),
    Index(None, "model", "alias", "revision"),
    Index(None, "model", "revision"),
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", Text, primary_key=True),
    Column("sha256", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("committed_bytes", BigInteger, nullable=False),
    Column("finished", Boolean, nullable=False),
    Column("create_time", BigInteger, nullable=False),
    Column("expire_time", BigInteger, nullable=False),
    Column("creator", Text, nullable=False),
    Index(None, "expire_time"),
    Index(None, "sha256"),
    Index(None, "finished", "size_bytes"),
)

# Where the committed bytes of an upload under way are, by where each run of them starts.
upload_parts = Table(
    "upload_parts",
    metadata,
    Column("upload", Text, ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True),
    Column("start", BigInteger, primary_key=True, autoincrement=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("key", Text, nullable=False),
)

# First answers, so that a repeated request gets the same one. Written in the transaction that they answer for.
requests = Table(
    "requests",
    metadata,
    Column("actor", Text, primary_key=True),
    Column("method", Text, primary_key=True),
    Column("request_id", Text, primary_key=True),
    Column("fingerprint", Text, nullable=False),
    Column("answer", Text, nullable=False),
    Column("time", BigInteger, nullable=False),
    Index(None, "time"),
)

# What is searched: values taken out of manifests when a version or a model is written, so that filters and orders have
# indexes. A version is meant by its revision, which is unique and never changes.

for _columns in (
    (versions.c.create_time, versions.c.revision),
    (versions.c.model, versions.c.create_time, versions.c.revision),
    (versions.c.creator, versions.c.revision),
    (versions.c.digest, versions.c.revision),
    (versions.c.size_bytes, versions.c.revision),
    (versions.c.stage, versions.c.revision),
    (aliases.c.alias, aliases.c.model, aliases.c.version),
):
    Index(None, *_columns)

# Figures. The model is repeated, so that the best of one model are found without looking at those of the others.
version_metrics = Table(
    "version_metrics",
    metadata,
    Column("revision", BigInteger, ForeignKey("versions.revision", ondelete="CASCADE"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("value", Double, nullable=False),
    Column("model", Text, nullable=False),
    Index(None, "name", "value", "revision"),
    Index(None, "model", "name", "value", "revision"),
)

# Labels, lineage and paths of files: field is "labels.team", "lineage.job", "lineage.parents" or "artifacts.path". The
# index has the start of a value only, because PostgreSQL's have room for 2,700 bytes.
version_terms = Table(
    "version_terms",
    metadata,
    Column("revision", BigInteger, ForeignKey("versions.revision", ondelete="CASCADE"), primary_key=True),
    Column("field", Text, primary_key=True),
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    Column("start", Text, nullable=False),
    Column("value", Text, nullable=False),
    Index(None, "field", "start", "revision"),
)

# Descriptions without case, for words; apart, because a search reads all of them.
version_texts = Table(
    "version_texts",
    metadata,
    Column("revision", BigInteger, ForeignKey("versions.revision", ondelete="CASCADE"), primary_key=True),
    Column("folded", Text, nullable=False),
)

model_terms = Table(
    "model_terms",
    metadata,
    Column("model", Text, ForeignKey("models.id", ondelete="CASCADE"), primary_key=True),
    Column("field", Text, primary_key=True),
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    Column("start", Text, nullable=False),
    Column("value", Text, nullable=False),
    Index(None, "field", "start", "model"),
)

model_texts = Table(
    "model_texts",
    metadata,
    Column("model", Text, ForeignKey("models.id", ondelete="CASCADE"), primary_key=True),
    Column("folded", Text, nullable=False),
)

# Signatures over versions; digest is the bundle's, so that the same bundle is stored once.
version_signatures = Table(
    "version_signatures",
    metadata,
    Column("revision", BigInteger, ForeignKey("versions.revision", ondelete="CASCADE"), primary_key=True),
    Column("digest", Text, primary_key=True),
    Column("position", BigInteger, nullable=False),
    Column("bundle", Text, nullable=False),
    Column("create_time", BigInteger, nullable=False),
    Column("creator", Text, nullable=False),
)

# What was changed by whom, each entry chained to the one before. `root` is the first two segments of the resource.
audit_entries = Table(
    "audit_entries",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("time", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
    Column("method", Text, nullable=False),
    Column("resource", Text, nullable=False),
    Column("root", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("previous_digest", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Index(None, "root", "sequence"),
    Index(None, "actor", "sequence"),
)

# Limits and use of each model, and of all ("-"), kept up with every change of what they count. 0 is no limit.
quotas = Table(
    "quotas",
    metadata,
    Column("scope", Text, primary_key=True),
    Column("bytes_max", BigInteger, nullable=False),
    Column("versions_max", BigInteger, nullable=False),
    Column("models_max", BigInteger, nullable=False),
    Column("bytes_used", BigInteger, nullable=False),
    Column("versions_used", BigInteger, nullable=False),
    Column("models_used", BigInteger, nullable=False),
    Column("changes", BigInteger, nullable=False),
)
