"""How much time every row speaks of; what is not known; energy that was shared out ahead of the counter.

A revision is history: it spells its tables out and is never changed once released.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

TIERS = ("gpu_20s", "gpu_minutes", "gpu_5min", "gpu_20min", "gpu_hours", "gpu_4h")
METRICS = (
    *("temperature", "utilization", "memory", "power", "memory_utilization", "fan_speed", "sm_clock"),
    *("memory_clock", "graphics_clock", "video_clock", "memory_temperature", "encoder_utilization"),
    *("decoder_utilization", "jpeg_utilization", "ofa_utilization", "graphics_activity", "sm_activity"),
    *("sm_occupancy", "tensor_activity", "dram_activity", "pcie_tx", "pcie_rx", "nvlink_tx", "nvlink_rx"),
)


def upgrade() -> None:
    op.add_column("gpus", sa.Column("energy_ahead_j", sa.Float))
    op.add_column("gpus", sa.Column("memory_from", sa.Text))
    op.add_column("gpu_usage", sa.Column("unknown_s", sa.Float, nullable=False, server_default="0"))
    op.add_column("gpu_metrics", sa.Column("recorded_ms", sa.Integer))
    for table in TIERS:
        op.add_column(table, sa.Column("recorded_ms", sa.Integer))
        for metric in METRICS:
            op.add_column(table, sa.Column(f"{metric}_known_ms", sa.Integer))
