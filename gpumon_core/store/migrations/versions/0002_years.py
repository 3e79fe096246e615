"""Everything else: all metrics, rollups, changes, usage by the hour, the recorder's health.

A revision is history: it spells its tables out and is never changed once released.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TICK_COLUMNS = {
    "utilization_max": sa.Float,
    "power_max": sa.Float,
    "memory_utilization_max": sa.Float,
    "graphics_clock": sa.Integer,
    "video_clock": sa.Integer,
    "memory_temperature": sa.Float,
    "encoder_utilization": sa.Float,
    "decoder_utilization": sa.Float,
    "jpeg_utilization": sa.Float,
    "ofa_utilization": sa.Float,
    "graphics_activity": sa.Float,
    "sm_activity": sa.Float,
    "sm_occupancy": sa.Float,
    "tensor_activity": sa.Float,
    "dram_activity": sa.Float,
    "pcie_tx": sa.Float,
    "pcie_rx": sa.Float,
    "nvlink_tx": sa.Float,
    "nvlink_rx": sa.Float,
    "energy": sa.Float,
}
ROLLED_UP = (
    "temperature",
    "utilization",
    "memory",
    "power",
    "memory_utilization",
    "fan_speed",
    "sm_clock",
    "memory_clock",
    "graphics_clock",
    "video_clock",
    "memory_temperature",
    "encoder_utilization",
    "decoder_utilization",
    "jpeg_utilization",
    "ofa_utilization",
    "graphics_activity",
    "sm_activity",
    "sm_occupancy",
    "tensor_activity",
    "dram_activity",
    "pcie_tx",
    "pcie_rx",
    "nvlink_tx",
    "nvlink_rx",
)
PROCESS_COLUMNS = (
    "sm_utilization",
    "memory_utilization",
    "encoder_utilization",
    "decoder_utilization",
)


def upgrade() -> None:
    for name, kind in TICK_COLUMNS.items():
        op.add_column("gpu_metrics", sa.Column(name, kind))
    op.add_column("gpus", sa.Column("sampling", sa.Text))
    op.add_column("gpus", sa.Column("energy_j", sa.Float))
    op.add_column("gpus", sa.Column("energy_counter_j", sa.Float))
    op.add_column("gpus", sa.Column("energy_from", sa.Text))
    op.create_table(
        "gpu_changes",
        sa.Column("gpu_id", sa.Integer, nullable=False),
        sa.Column("metric", sa.Text, nullable=False),
        sa.Column("timestamp_epoch", sa.BigInteger, nullable=False),
        sa.Column("value", sa.Float),
        sa.PrimaryKeyConstraint("gpu_id", "metric", "timestamp_epoch", name="pk_gpu_changes"),
        sa.ForeignKeyConstraint(["gpu_id"], ["gpus.id"], name="fk_gpu_changes_gpu_id"),
        sqlite_with_rowid=False,
    )
    for table in ("gpu_20s", "gpu_minutes", "gpu_5min", "gpu_20min", "gpu_hours", "gpu_4h"):
        op.create_table(
            table,
            sa.Column("gpu_id", sa.Integer, nullable=False),
            sa.Column("timestamp_epoch", sa.BigInteger, nullable=False),
            sa.Column("samples", sa.Integer, nullable=False),
            *(sa.Column(key + suffix, sa.Integer) for key in ROLLED_UP for suffix in ("", "_min", "_max")),
            sa.Column("energy", sa.BigInteger),
            sa.PrimaryKeyConstraint("gpu_id", "timestamp_epoch", name=f"pk_{table}"),
            sa.ForeignKeyConstraint(["gpu_id"], ["gpus.id"], name=f"fk_{table}_gpu_id"),
            sqlite_with_rowid=False,
        )
    op.add_column("process_gpus", sa.Column("active", sa.SmallInteger, nullable=False, server_default="0"))
    op.add_column("process_gpus", sa.Column("memory", sa.Integer))
    op.add_column("process_snapshots", sa.Column("present", sa.SmallInteger, nullable=False, server_default="1"))
    for name in PROCESS_COLUMNS:
        op.add_column("process_gpus", sa.Column(name, sa.Integer))
        op.add_column("process_snapshots", sa.Column(name, sa.Integer))
    for name in ("name", "username", "pid"):
        op.create_index(f"ix_gpu_processes_{name}", "gpu_processes", [name])
    op.create_index(
        "ix_process_gpus_active",
        "process_gpus",
        ["gpu_id"],
        sqlite_where=sa.text("active = 1"),
        postgresql_where=sa.text("active = 1"),
    )
    op.create_table(
        "process_hours",
        sa.Column("timestamp_epoch", sa.BigInteger, nullable=False),
        sa.Column("process_id", sa.Integer, nullable=False),
        sa.Column("gpu_id", sa.Integer, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("busy_s", sa.Float, nullable=False),
        sa.Column("memory_mib_s", sa.Float, nullable=False),
        sa.Column("energy_j", sa.Float, nullable=False),
        sa.Column("max_memory", sa.Integer),
        sa.Column("estimated", sa.SmallInteger, nullable=False),
        sa.PrimaryKeyConstraint("timestamp_epoch", "process_id", "gpu_id", name="pk_process_hours"),
        sa.ForeignKeyConstraint(["process_id"], ["gpu_processes.id"], name="fk_process_hours_process_id"),
        sa.ForeignKeyConstraint(["gpu_id"], ["gpus.id"], name="fk_process_hours_gpu_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "recorder_health",
        sa.Column("host_id", sa.Integer, nullable=False),
        sa.Column("timestamp_epoch", sa.BigInteger, nullable=False),
        sa.Column("ticks", sa.Integer, nullable=False),
        sa.Column("skipped", sa.Integer, nullable=False),
        sa.Column("failed", sa.Integer, nullable=False),
        sa.Column("dropped", sa.Integer, nullable=False),
        sa.Column("buffered", sa.Integer, nullable=False),
        sa.Column("duration_ms", sa.Float),
        sa.Column("duration_max_ms", sa.Float),
        sa.Column("database_bytes", sa.BigInteger),
        sa.Column("last_error", sa.Text),
        sa.PrimaryKeyConstraint("host_id", "timestamp_epoch", name="pk_recorder_health"),
        sa.ForeignKeyConstraint(["host_id"], ["hosts.id"], name="fk_recorder_health_host_id"),
        sqlite_with_rowid=False,
    )
