"""Hosts, GPUs, raw ticks and the ledger of processes.

A revision is history: it spells its tables out and is never changed once released.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "hosts",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("driver_version", sa.Text),
        sa.Column("cuda_version", sa.Text),
        sa.Column("nvml_version", sa.Text),
        sa.Column("interval_s", sa.Float, nullable=False),
        sa.Column("first_seen", sa.BigInteger, nullable=False),
        sa.Column("last_seen", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_hosts"),
        sa.UniqueConstraint("name", name="uq_hosts_name"),
    )
    op.create_table(
        "gpus",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("host_id", sa.Integer, nullable=False),
        sa.Column("uuid", sa.Text, nullable=False),
        sa.Column("gpu_index", sa.SmallInteger, nullable=False),
        sa.Column("mig_index", sa.SmallInteger),
        sa.Column("parent_id", sa.Integer),
        sa.Column("name", sa.Text),
        sa.Column("memory_total_mib", sa.Integer),
        sa.Column("power_limit_w", sa.Float),
        sa.Column("pci_bus_id", sa.Text),
        sa.Column("architecture", sa.Text),
        sa.Column("compute_capability", sa.Text),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("first_seen", sa.BigInteger, nullable=False),
        sa.Column("last_seen", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_gpus"),
        sa.ForeignKeyConstraint(["host_id"], ["hosts.id"], name="fk_gpus_host_id"),
        sa.ForeignKeyConstraint(["parent_id"], ["gpus.id"], name="fk_gpus_parent_id"),
        sa.UniqueConstraint("host_id", "uuid", name="uq_gpus_host_id_uuid"),
    )
    op.create_table(
        "gpu_metrics",
        sa.Column("gpu_id", sa.Integer, nullable=False),
        sa.Column("timestamp_epoch", sa.BigInteger, nullable=False),
        sa.Column("temperature", sa.Float),
        sa.Column("utilization", sa.Float),
        sa.Column("memory", sa.Integer),
        sa.Column("power", sa.Float),
        sa.Column("memory_utilization", sa.Float),
        sa.Column("fan_speed", sa.Float),
        sa.Column("sm_clock", sa.Integer),
        sa.Column("memory_clock", sa.Integer),
        sa.PrimaryKeyConstraint("gpu_id", "timestamp_epoch", name="pk_gpu_metrics"),
        sa.ForeignKeyConstraint(["gpu_id"], ["gpus.id"], name="fk_gpu_metrics_gpu_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "gpu_processes",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("host_id", sa.Integer, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("start_key", sa.Text),
        sa.Column("start_time", sa.Float),
        sa.Column("name", sa.Text),
        sa.Column("username", sa.Text),
        sa.Column("first_seen", sa.BigInteger, nullable=False),
        sa.Column("last_seen", sa.BigInteger, nullable=False),
        sa.Column("max_memory", sa.Integer),
        sa.Column("avg_memory", sa.Float),
        sa.Column("sample_count", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_gpu_processes"),
        sa.ForeignKeyConstraint(["host_id"], ["hosts.id"], name="fk_gpu_processes_host_id"),
        sa.UniqueConstraint("host_id", "pid", "start_key", name="uq_gpu_processes_host_id_pid_start_key"),
    )
    op.create_index("ix_gpu_processes_first_seen", "gpu_processes", ["first_seen"])
    op.create_table(
        "process_gpus",
        sa.Column("process_id", sa.Integer, nullable=False),
        sa.Column("gpu_id", sa.Integer, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("first_seen", sa.BigInteger, nullable=False),
        sa.Column("last_seen", sa.BigInteger, nullable=False),
        sa.Column("max_memory", sa.Integer),
        sa.Column("avg_memory", sa.Float),
        sa.Column("sample_count", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("process_id", "gpu_id", name="pk_process_gpus"),
        sa.ForeignKeyConstraint(["process_id"], ["gpu_processes.id"], name="fk_process_gpus_process_id"),
        sa.ForeignKeyConstraint(["gpu_id"], ["gpus.id"], name="fk_process_gpus_gpu_id"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_process_gpus_gpu_id", "process_gpus", ["gpu_id"])
    op.create_table(
        "process_snapshots",
        sa.Column("timestamp_epoch", sa.BigInteger, nullable=False),
        sa.Column("process_id", sa.Integer, nullable=False),
        sa.Column("gpu_id", sa.Integer, nullable=False),
        sa.Column("memory", sa.Integer),
        sa.PrimaryKeyConstraint("timestamp_epoch", "process_id", "gpu_id", name="pk_process_snapshots"),
        sa.ForeignKeyConstraint(["process_id"], ["gpu_processes.id"], name="fk_process_snapshots_process_id"),
        sa.ForeignKeyConstraint(["gpu_id"], ["gpus.id"], name="fk_process_snapshots_gpu_id"),
        sqlite_with_rowid=False,
    )
