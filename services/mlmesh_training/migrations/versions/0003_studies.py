"""Studies and their trials."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "studies",
        sa.Column("number", sa.Integer, autoincrement=True, nullable=False),
        sa.Column("uid", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("request_id", sa.String(128), nullable=True),
        sa.Column("request_digest", sa.String(64), nullable=False),
        sa.Column("first_sequence", sa.BigInteger, nullable=False),
        sa.Column("last_sequence", sa.BigInteger, nullable=False),
        sa.Column("end_time", sa.String(32), nullable=True),
        sa.Column("document", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_studies"),
        sa.UniqueConstraint("uid", name="uq_studies_uid"),
        sa.UniqueConstraint("request_id", name="uq_studies_request_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_studies_state", "studies", ["state"])
    op.create_index("ix_studies_end_time", "studies", ["end_time"])
    op.create_table(
        "trials",
        sa.Column("study", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("job", sa.String(64), nullable=True),
        sa.Column("document", sa.Text, nullable=False),
        sa.ForeignKeyConstraint(["study"], ["studies.number"], name="fk_trials_study"),
        sa.PrimaryKeyConstraint("study", "number", name="pk_trials"),
        sa.UniqueConstraint("job", name="uq_trials_job"),
    )
    op.create_table(
        "trial_values",
        sa.Column("study", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("trial", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("epoch", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("value", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(["study", "trial"], ["trials.study", "trials.number"], name="fk_trial_values_trial"),
        sa.PrimaryKeyConstraint("study", "trial", "epoch", name="pk_trial_values"),
    )
    op.create_table(
        "study_events",
        sa.Column("study", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("sequence", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("time", sa.String(32), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.ForeignKeyConstraint(["study"], ["studies.number"], name="fk_study_events_study"),
        sa.PrimaryKeyConstraint("study", "sequence", name="pk_study_events"),
    )


def downgrade() -> None:
    """Drop the tables."""
    op.drop_table("study_events")
    op.drop_table("trial_values")
    op.drop_table("trials")
    op.drop_index("ix_studies_end_time", table_name="studies")
    op.drop_index("ix_studies_state", table_name="studies")
    op.drop_table("studies")
