"""What processes run: command, container, job, workload, model.

A revision is history: it spells its tables out and is never changed once released.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

COLUMNS = (
    *("executable", "command", "working_directory", "parents"),
    *("container_engine", "container_id", "container_name", "container_image"),
    *("pod", "namespace", "unit", "job_id", "job_name", "job_user"),
    *("notebook", "workload", "category", "model"),
)


def upgrade() -> None:
    op.create_table(
        "programs",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        *(sa.Column(name, sa.Text) for name in COLUMNS),
        sa.PrimaryKeyConstraint("id", name="pk_programs"),
        sa.UniqueConstraint("digest", name="uq_programs_digest"),
    )
    with op.batch_alter_table("gpu_processes") as table:
        table.add_column(sa.Column("program_id", sa.Integer))
        table.create_foreign_key("fk_gpu_processes_program_id", "programs", ["program_id"], ["id"])
    op.create_index("ix_gpu_processes_program_id", "gpu_processes", ["program_id"])
