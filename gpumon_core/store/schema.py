"""What is remembered: the tables, for SQLite and PostgreSQL alike.

Times are integer UTC seconds, memory is MiB, power is W; NULL means that the hardware does not say.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
)

from gpumon_core.metrics import GPU_METRICS, PROCESS_METRICS, Metric

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    }
)


def _metric_column(metric: Metric) -> Column[int] | Column[float]:
    return Column(metric.key, Integer) if metric.column == "integer" else Column(metric.key, Float)


# A host is its name. last_seen is the time of its newest tick, interval_s the seconds between ticks.
hosts = Table(
    "hosts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("source", Text, nullable=False),
    Column("driver_version", Text),
    Column("cuda_version", Text),
    Column("nvml_version", Text),
    Column("interval_s", Float, nullable=False),
    Column("first_seen", BigInteger, nullable=False),
    Column("last_seen", BigInteger, nullable=False),
)

# A GPU is (host, uuid); gpu_index is where it stood last. state: ok, lost (no longer answers)
# or gone (no longer listed). last_seen is the time of its newest row in gpu_metrics.
gpus = Table(
    "gpus",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("host_id", ForeignKey("hosts.id"), nullable=False),
    Column("uuid", Text, nullable=False),
    Column("gpu_index", SmallInteger, nullable=False),
    Column("mig_index", SmallInteger),
    Column("parent_id", ForeignKey("gpus.id")),
    Column("name", Text),
    Column("memory_total_mib", Integer),
    Column("power_limit_w", Float),
    Column("pci_bus_id", Text),
    Column("architecture", Text),
    Column("compute_capability", Text),
    Column("state", Text, nullable=False),
    Column("first_seen", BigInteger, nullable=False),
    Column("last_seen", BigInteger, nullable=False),
    UniqueConstraint("host_id", "uuid"),
)

# Raw ticks: one row per GPU and tick, one column per row of the catalogue.
gpu_metrics = Table(
    "gpu_metrics",
    metadata,
    Column("gpu_id", ForeignKey("gpus.id"), nullable=False),
    Column("timestamp_epoch", BigInteger, nullable=False),
    *(_metric_column(metric) for metric in GPU_METRICS),
    PrimaryKeyConstraint("gpu_id", "timestamp_epoch"),
    sqlite_with_rowid=False,
)

# The ledger: one row per process, which is (host, pid, start). Memory is the sum over its GPUs.
gpu_processes = Table(
    "gpu_processes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("host_id", ForeignKey("hosts.id"), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("start_key", Text),
    Column("start_time", Float),
    Column("name", Text),
    Column("username", Text),
    Column("first_seen", BigInteger, nullable=False),
    Column("last_seen", BigInteger, nullable=False),
    Column("max_memory", Integer),
    Column("avg_memory", Float),
    Column("sample_count", Integer, nullable=False),
    UniqueConstraint("host_id", "pid", "start_key"),
    # last_seen changes with every tick, so it is first_seen that is worth an index.
    Index(None, "first_seen"),
)

# The same per GPU: what one process has used of one GPU. kind is C, G, M or a sum of them.
process_gpus = Table(
    "process_gpus",
    metadata,
    Column("process_id", ForeignKey("gpu_processes.id"), nullable=False),
    Column("gpu_id", ForeignKey("gpus.id"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("first_seen", BigInteger, nullable=False),
    Column("last_seen", BigInteger, nullable=False),
    Column("max_memory", Integer),
    Column("avg_memory", Float),
    Column("sample_count", Integer, nullable=False),
    PrimaryKeyConstraint("process_id", "gpu_id"),
    Index(None, "gpu_id"),
    sqlite_with_rowid=False,
)

# One row per process, GPU and tick. Ordered by time first, so that a tick appends to one page.
process_snapshots = Table(
    "process_snapshots",
    metadata,
    Column("timestamp_epoch", BigInteger, nullable=False),
    Column("process_id", ForeignKey("gpu_processes.id"), nullable=False),
    Column("gpu_id", ForeignKey("gpus.id"), nullable=False),
    *(_metric_column(metric) for metric in PROCESS_METRICS),
    PrimaryKeyConstraint("timestamp_epoch", "process_id", "gpu_id"),
    sqlite_with_rowid=False,
)
