"""Tables of the ledger. Migrations create them; `tests` compare the two."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)

jobs = sa.Table(
    "jobs",
    metadata,
    # Order of acceptance: what is listed newest first and run oldest first.
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("uid", sa.String(64), nullable=False, unique=True),
    sa.Column("state", sa.String(16), nullable=False),
    # Null where the caller sent no request id.
    sa.Column("request_id", sa.String(128), nullable=True, unique=True),
    # SHA-256 over who asked for what: the same request id must come with the same.
    sa.Column("request_digest", sa.String(64), nullable=False),
    # The oldest event kept; older ones were dropped to keep the ledger bounded.
    sa.Column("first_sequence", sa.BigInteger, nullable=False),
    sa.Column("last_sequence", sa.BigInteger, nullable=False),
    sa.Column("document", sa.Text, nullable=False),
    # What the scheduler looks at, so that it need not read the documents of all that waits.
    sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
    sa.Column("cpus", sa.Float, nullable=False, server_default="0"),
    sa.Column("memory_bytes", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("gpus", sa.Integer, nullable=False, server_default="0"),
    sa.Column("processes", sa.Integer, nullable=False, server_default="1"),
    sa.Column("passed", sa.Integer, nullable=False, server_default="0"),
    # Only publishing is left.
    sa.Column("light", sa.Boolean, nullable=False, server_default=sa.false()),
    # "studies/{study}", or empty.
    sa.Column("study", sa.String(80), nullable=False, server_default=""),
    # ISO 8601 in UTC, which sorts as the moments do; null until it has ended.
    sa.Column("end_time", sa.String(32), nullable=True),
    # Whether something of it is kept in its folder.
    sa.Column("files", sa.Boolean, nullable=False, server_default=sa.false()),
    # In each state, newest first; in the order of the queue; of each study; the oldest ends; whose files may go.
    sa.Index("ix_jobs_state_number", "state", "number"),
    sa.Index("ix_jobs_state_priority", "state", "priority", "number"),
    sa.Index("ix_jobs_study_state_number", "study", "state", "number"),
    sa.Index("ix_jobs_end_time", "end_time"),
    sa.Index("ix_jobs_files_end_time", "files", "end_time"),
    sqlite_autoincrement=True,
)

events = sa.Table(
    "events",
    metadata,
    # A job's number; its events outlive it for a while when it is deleted (below).
    sa.Column("job", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("time", sa.String(32), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("document", sa.Text, nullable=False),
)

# Studies: the same form as jobs, with trials and their values epoch by epoch in rows of their own.

studies = sa.Table(
    "studies",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("uid", sa.String(64), nullable=False, unique=True),
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("request_id", sa.String(128), nullable=True, unique=True),
    sa.Column("request_digest", sa.String(64), nullable=False),
    sa.Column("first_sequence", sa.BigInteger, nullable=False),
    sa.Column("last_sequence", sa.BigInteger, nullable=False),
    # ISO 8601 in UTC, which sorts as the moments do; null until it has ended.
    sa.Column("end_time", sa.String(32), nullable=True, index=True),
    sa.Column("document", sa.Text, nullable=False),
    sqlite_autoincrement=True,
)

trials = sa.Table(
    "trials",
    metadata,
    sa.Column("study", sa.Integer, sa.ForeignKey("studies.number"), primary_key=True, autoincrement=False),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("state", sa.String(16), nullable=False),
    # Null until its job is accepted.
    sa.Column("job", sa.String(64), nullable=True, unique=True),
    sa.Column("document", sa.Text, nullable=False),
)

trial_values = sa.Table(
    "trial_values",
    metadata,
    sa.Column("study", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("value", sa.Double, nullable=False),
    sa.ForeignKeyConstraint(["study", "trial"], ["trials.study", "trials.number"], name="fk_trial_values_trial"),
)

study_events = sa.Table(
    "study_events",
    metadata,
    sa.Column("study", sa.Integer, sa.ForeignKey("studies.number"), primary_key=True, autoincrement=False),
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("time", sa.String(32), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("document", sa.Text, nullable=False),
)

# Jobs that are deleted, of which events or files may still be there. Numbers are never used again.
doomed = sa.Table(
    "doomed",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("uid", sa.String(64), nullable=False),
)
