"""Priorities, resources and retention of jobs."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def columns() -> tuple[sa.Column[Any], ...]:
    """What the scheduler and the retention look for."""
    return (
        sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
        sa.Column("cpus", sa.Float, nullable=False, server_default="0"),
        sa.Column("memory_bytes", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("gpus", sa.Integer, nullable=False, server_default="0"),
        sa.Column("processes", sa.Integer, nullable=False, server_default="1"),
        sa.Column("passed", sa.Integer, nullable=False, server_default="0"),
        sa.Column("light", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("study", sa.String(80), nullable=False, server_default=""),
        sa.Column("end_time", sa.String(32), nullable=True),
        sa.Column("files", sa.Boolean, nullable=False, server_default=sa.false()),
    )


INDEXES = {
    "ix_jobs_state_number": ("state", "number"),
    "ix_jobs_state_priority": ("state", "priority", "number"),
    "ix_jobs_study_state_number": ("study", "state", "number"),
    "ix_jobs_end_time": ("end_time",),
    "ix_jobs_files_end_time": ("files", "end_time"),
}


def upgrade() -> None:
    """Columns for what is looked for; events no longer point at their job, which may be deleted before them."""
    for column in columns():
        op.add_column("jobs", column)
    op.execute("UPDATE jobs SET end_time = json_extract(document, '$.end_time')")
    op.execute("UPDATE jobs SET files = 1 WHERE state IN ('RUNNING', 'RETRYING', 'CANCELLING')")
    op.drop_index("ix_jobs_state", table_name="jobs")
    for name, of in INDEXES.items():
        op.create_index(name, "jobs", list(of))
    with op.batch_alter_table("events") as events:
        events.drop_constraint("fk_events_job", type_="foreignkey")
    op.create_table(
        "doomed",
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("uid", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_doomed"),
    )


def downgrade() -> None:
    """Undo."""
    op.execute("DELETE FROM events WHERE job NOT IN (SELECT number FROM jobs)")
    op.drop_table("doomed")
    with op.batch_alter_table("events") as events:
        events.create_foreign_key("fk_events_job", "jobs", ["job"], ["number"])
    for name in INDEXES:
        op.drop_index(name, table_name="jobs")
    op.create_index("ix_jobs_state", "jobs", ["state"])
    for column in reversed(columns()):
        op.drop_column("jobs", column.name)
