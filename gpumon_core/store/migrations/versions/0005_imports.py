"""What was taken over from the original program.

A revision is history: it spells its tables out and is never changed once released.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "imports",
        sa.Column("gpu_id", sa.Integer, nullable=False),
        sa.Column("first", sa.BigInteger, nullable=False),
        sa.Column("last", sa.BigInteger, nullable=False),
        sa.Column("ticks", sa.Integer, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("imported_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("gpu_id", "first", name="pk_imports"),
        sa.ForeignKeyConstraint(["gpu_id"], ["gpus.id"], name="fk_imports_gpu_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "imported_files",
        sa.Column("gpu_id", sa.Integer, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("source_index", sa.Integer, nullable=False),
        sa.Column("until", sa.BigInteger, nullable=False),
        sa.Column("imported_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("gpu_id", "source", "source_index", name="pk_imported_files"),
        sa.ForeignKeyConstraint(["gpu_id"], ["gpus.id"], name="fk_imported_files_gpu_id"),
        sqlite_with_rowid=False,
    )
