"""Where bytes are and what is known of them."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    for column in (
        sa.Column("format", sa.Text(), nullable=False, server_default=""),
        sa.Column("location", sa.Text(), nullable=False, server_default=""),
        sa.Column("damaged", sa.Boolean(), nullable=False, server_default=sa.false()),
    ):
        op.add_column("blobs", column)
    op.create_index(op.f("ix_blobs_format"), "blobs", ["format"])
    op.create_table(
        "blob_blocks",
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("first_block", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("digests", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["sha256"], ["blobs.sha256"], name=op.f("fk_blob_blocks_sha256"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("sha256", "first_block", name=op.f("pk_blob_blocks")),
    )
    op.create_table(
        "upload_parts",
        sa.Column("upload", sa.Text(), nullable=False),
        sa.Column("start", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["upload"], ["uploads.id"], name=op.f("fk_upload_parts_upload"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("upload", "start", name=op.f("pk_upload_parts")),
    )
    # What was stored of an upload under way was one file, of the upload's name.
    op.execute(
        "INSERT INTO upload_parts (upload, start, size_bytes, key) "
        "SELECT id, 0, committed_bytes, id FROM uploads WHERE NOT finished AND committed_bytes > 0"
    )


def downgrade() -> None:
    """Undo. Bytes that are at a place of their own are not found after it."""
    op.drop_table("upload_parts")
    op.drop_table("blob_blocks")
    op.drop_index(op.f("ix_blobs_format"), "blobs")
    for column in ("damaged", "location", "format"):
        op.drop_column("blobs", column)
