"""What was used: of every GPU by the hour, of every process in its life; model sessions.

A revision is history: it spells its tables out and is never changed once released.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

KEY = ("timestamp_epoch", "process_id", "gpu_id", "program_id")
HOURS = ("seconds", "busy_s", "memory_mib_s", "energy_j", "max_memory", "estimated")


def upgrade() -> None:
    op.add_column("programs", sa.Column("last_used", sa.BigInteger))
    # Looked up by (host, pid, start) alone, which has an index of its own.
    op.drop_index("ix_gpu_processes_pid", "gpu_processes")
    op.add_column("gpu_processes", _number("seconds"))
    for name in ("seconds", "busy_s", "energy_j", "sm_percent_s", "sm_told_s"):
        op.add_column("process_gpus", _number(name))
    op.add_column("process_gpus", sa.Column("max_sm", sa.SmallInteger))
    op.add_column("process_gpus", sa.Column("estimated", sa.SmallInteger, nullable=False, server_default="0"))
    op.add_column("process_gpus", sa.Column("last_busy", sa.BigInteger))
    # An average without a weight would be forgotten with the next sample.
    for table in ("gpu_processes", "process_gpus"):
        op.execute(f"UPDATE {table} SET seconds = last_seen - first_seen")
    _key_hours_by_program()
    op.create_table(
        "gpu_usage",
        sa.Column("timestamp_epoch", sa.BigInteger, nullable=False),
        sa.Column("gpu_id", sa.Integer, nullable=False),
        *(
            sa.Column(name, sa.Float, nullable=False)
            for name in (
                *("seconds", "busy_s", "held_s", "unattributed_s"),
                *("energy_j", "idle_j", "unattributed_j", "unrecorded_j"),
            )
        ),
        sa.PrimaryKeyConstraint("timestamp_epoch", "gpu_id", name="pk_gpu_usage"),
        sa.ForeignKeyConstraint(["gpu_id"], ["gpus.id"], name="fk_gpu_usage_gpu_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "model_sessions",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("process_id", sa.Integer, nullable=False),
        sa.Column("gpu_id", sa.Integer, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("first_seen", sa.BigInteger, nullable=False),
        sa.Column("last_seen", sa.BigInteger, nullable=False),
        sa.Column("max_memory", sa.Integer),
        sa.Column("avg_memory", sa.Float),
        sa.Column("sample_count", sa.Integer, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("active", sa.SmallInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_model_sessions"),
        sa.ForeignKeyConstraint(["process_id"], ["gpu_processes.id"], name="fk_model_sessions_process_id"),
        sa.ForeignKeyConstraint(["gpu_id"], ["gpus.id"], name="fk_model_sessions_gpu_id"),
    )
    op.create_index("ix_model_sessions_process_id", "model_sessions", ["process_id"])
    op.create_index("ix_model_sessions_first_seen", "model_sessions", ["first_seen"])


def _number(name: str) -> sa.Column[float]:
    return sa.Column(name, sa.Float, nullable=False, server_default="0")


def _key_hours_by_program() -> None:
    """Hours are separate for each program that a process ran in them."""
    if op.get_bind().dialect.name != "sqlite":
        op.add_column("process_hours", sa.Column("program_id", sa.Integer, nullable=False, server_default="0"))
        op.add_column("process_hours", _number("idle_s"))
        op.execute(
            "UPDATE process_hours h SET program_id = p.program_id FROM gpu_processes p "
            "WHERE p.id = h.process_id AND p.program_id IS NOT NULL"
        )
        op.drop_constraint("pk_process_hours", "process_hours", type_="primary")
        op.create_primary_key("pk_process_hours", "process_hours", list(KEY))
        return
    # SQLite cannot change a key: the table is made anew.
    op.rename_table("process_hours", "process_hours_before")
    op.create_table(
        "process_hours",
        sa.Column("timestamp_epoch", sa.BigInteger, nullable=False),
        sa.Column("process_id", sa.Integer, nullable=False),
        sa.Column("gpu_id", sa.Integer, nullable=False),
        sa.Column("program_id", sa.Integer, nullable=False, server_default="0"),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("busy_s", sa.Float, nullable=False),
        _number("idle_s"),
        sa.Column("memory_mib_s", sa.Float, nullable=False),
        sa.Column("energy_j", sa.Float, nullable=False),
        sa.Column("max_memory", sa.Integer),
        sa.Column("estimated", sa.SmallInteger, nullable=False),
        sa.PrimaryKeyConstraint(*KEY, name="pk_process_hours"),
        sa.ForeignKeyConstraint(["process_id"], ["gpu_processes.id"], name="fk_process_hours_process_id"),
        sa.ForeignKeyConstraint(["gpu_id"], ["gpus.id"], name="fk_process_hours_gpu_id"),
        sqlite_with_rowid=False,
    )
    names = ", ".join(HOURS)
    op.execute(
        f"INSERT INTO process_hours (timestamp_epoch, process_id, gpu_id, program_id, {names}) "
        f"SELECT h.timestamp_epoch, h.process_id, h.gpu_id, coalesce(p.program_id, 0), "
        f"{', '.join('h.' + name for name in HOURS)} FROM process_hours_before h "
        "JOIN gpu_processes p ON p.id = h.process_id ORDER BY 1, 2, 3"
    )
    op.drop_table("process_hours_before")
