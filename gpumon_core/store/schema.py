"""What is remembered: the tables, for SQLite and PostgreSQL alike.

Times are integer UTC seconds, memory is MiB, power is W; NULL means that the hardware does not say.
Rollups hold whole numbers: a metric with n decimals is stored there as the value times 10^n (`scale`),
which takes a third of the space of a floating-point number.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

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

from gpumon_core.attribution.records import Program
from gpumon_core.metrics import PROCESS_METRICS, TICK_METRICS, Aggregate, Metric

# The columns of a program, in the order in which they are stored.
PROGRAM_COLUMNS = tuple(field.name for field in fields(Program))

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


def _tick_columns(metric: Metric) -> list[Column[int] | Column[float]]:
    columns = [_metric_column(metric)]
    if metric.peak:
        columns.append(Column(metric.peak, Float))
    return columns


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

# A GPU is (host, uuid); gpu_index is its last index. state: ok, lost (no longer answers), hung
# (the driver does not return from a call about it) or gone (no longer listed). last_seen is the time
# of its newest row in gpu_metrics. sampling: interval (utilization is the mean since the tick before),
# partial (over the end of that time) or point.
# energy_j has been taken since it was first seen; energy_counter_j is the driver's counter
# then, and energy_from says whether it was read there (counter) or follows from the power (power).
# energy_ahead_j was shared out before the counter could confirm it. memory_from says what used and total memory
# are: the driver's own (device), or those of a GPU that shares the machine's memory (unified).
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
    Column("sampling", Text),
    Column("energy_j", Float),
    Column("energy_counter_j", Float),
    Column("energy_from", Text),
    Column("energy_ahead_j", Float),
    Column("memory_from", Text),
    UniqueConstraint("host_id", "uuid"),
)

# Raw ticks: one row per GPU and tick, one column per metric of the catalogue that is stored with every
# tick; `<key>_max` is its highest value inside the tick. energy is gpus.energy_j at that time. recorded_ms is
# the time before the tick that it speaks of: what is missing to the tick before is a gap. NULL in rows of
# versions that did not record it.
gpu_metrics = Table(
    "gpu_metrics",
    metadata,
    Column("gpu_id", ForeignKey("gpus.id"), nullable=False),
    Column("timestamp_epoch", BigInteger, nullable=False),
    *(column for metric in TICK_METRICS for column in _tick_columns(metric)),
    Column("recorded_ms", Integer),
    PrimaryKeyConstraint("gpu_id", "timestamp_epoch"),
    sqlite_with_rowid=False,
)

# The other metrics, each when it changed.
gpu_changes = Table(
    "gpu_changes",
    metadata,
    Column("gpu_id", ForeignKey("gpus.id"), nullable=False),
    Column("metric", Text, nullable=False),
    Column("timestamp_epoch", BigInteger, nullable=False),
    Column("value", Float),
    PrimaryKeyConstraint("gpu_id", "metric", "timestamp_epoch"),
    sqlite_with_rowid=False,
)


# The settings that say for how long a row is stored: GPUMON_RETENTION_RAW_DAYS, _MINUTE_DAYS, _HOUR_DAYS.
RetentionLevel = Literal["raw", "minute", "hour"]


@dataclass(frozen=True, slots=True)
class Tier:
    """A resolution of the rollups: buckets of `seconds`, made from the tier before it (or raw ticks),
    and deleted when `retention` says."""

    table: Table
    seconds: int
    retention: RetentionLevel


def scale(metric: Metric) -> int:
    """What a metric's numbers are multiplied by in the rollups."""
    return int(10**metric.decimals)


def known_ms(metric: Metric) -> str:
    """The rollups' column that says in how much of the recorded time a metric had a value, where not in all."""
    return f"{metric.key}_known_ms"


def _rollup(name: str) -> Table:
    return Table(
        name,
        metadata,
        Column("gpu_id", ForeignKey("gpus.id"), nullable=False),
        # The bucket's first second.
        Column("timestamp_epoch", BigInteger, nullable=False),
        # How many ticks are in it.
        Column("samples", Integer, nullable=False),
        *(
            Column(metric.key + suffix, Integer)
            for metric in TICK_METRICS
            if metric.aggregate is not Aggregate.COUNTER
            for suffix in ("", "_min", "_max")
        ),
        # Counters: their value at the bucket's end.
        *(Column(metric.key, BigInteger) for metric in TICK_METRICS if metric.aggregate is Aggregate.COUNTER),
        # How much of its time was recorded, and in how much of that a metric had a value (NULL: in all of it).
        Column("recorded_ms", Integer),
        *(
            Column(known_ms(metric), Integer)
            for metric in TICK_METRICS
            if metric.aggregate is not Aggregate.COUNTER
        ),
        PrimaryKeyConstraint("gpu_id", "timestamp_epoch"),
        sqlite_with_rowid=False,
    )


# Steps small enough that a chart of any length reads a few thousand rows a GPU at most.
TIERS = (
    Tier(_rollup("gpu_20s"), 20, "raw"),
    Tier(_rollup("gpu_minutes"), 60, "minute"),
    Tier(_rollup("gpu_5min"), 300, "minute"),
    Tier(_rollup("gpu_20min"), 1200, "minute"),
    Tier(_rollup("gpu_hours"), 3600, "hour"),
    Tier(_rollup("gpu_4h"), 14400, "hour"),
)

# What processes run, once for all that run the same: the fields of attribution.records.Program. digest
# distinguishes two of them. last_used is when a process was last said to run it, or to run it no more.
programs = Table(
    "programs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("digest", Text, nullable=False, unique=True),
    *(Column(name, Text) for name in PROGRAM_COLUMNS),
    Column("last_used", BigInteger),
)

# The ledger: one row per process, which is (host, pid, start). Memory is the sum over its GPUs, its
# average weighted by time; seconds is how long it was seen.
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
    Column("program_id", ForeignKey("programs.id")),
    Column("first_seen", BigInteger, nullable=False),
    Column("last_seen", BigInteger, nullable=False),
    Column("max_memory", Integer),
    Column("avg_memory", Float),
    Column("sample_count", Integer, nullable=False),
    Column("seconds", Float, nullable=False, server_default="0"),
    UniqueConstraint("host_id", "pid", "start_key"),
    # last_seen changes with every tick, so it is first_seen that is worth an index.
    Index(None, "first_seen"),
    Index(None, "name"),
    Index(None, "username"),
    Index(None, "program_id"),
)

# The same per GPU: what one process has used of one GPU. kind is C, G, M or a sum of them. Where
# active is 1 it was on the GPU at the host's newest tick, with these metrics. busy_s and energy_j are
# its parts of the GPU's (see process_hours); sm_percent_s / sm_told_s is the mean of the SM utilization that
# the driver reported. last_busy is when it last did something, or came.
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
    Column("active", SmallInteger, nullable=False, server_default="0"),
    Column("seconds", Float, nullable=False, server_default="0"),
    Column("busy_s", Float, nullable=False, server_default="0"),
    Column("energy_j", Float, nullable=False, server_default="0"),
    Column("sm_percent_s", Float, nullable=False, server_default="0"),
    Column("sm_told_s", Float, nullable=False, server_default="0"),
    Column("max_sm", SmallInteger),
    Column("estimated", SmallInteger, nullable=False, server_default="0"),
    Column("last_busy", BigInteger),
    *(_metric_column(metric) for metric in PROCESS_METRICS),
    PrimaryKeyConstraint("process_id", "gpu_id"),
    Index(None, "gpu_id"),
    sqlite_with_rowid=False,
)

_active = Index("ix_process_gpus_active", process_gpus.c.gpu_id, sqlite_where=process_gpus.c.active == 1)


def for_postgresql() -> None:
    """Say to PostgreSQL too that the index of active processes is a partial one.

    To name a dialect is to load it, and a recorder on SQLite does without its two megabytes.
    """
    _active.dialect_options["postgresql"]["where"] = process_gpus.c.active == 1


# What a process did on a GPU from this tick on, until its next row: a row is written when something
# changes, and now and then besides (accounts.HEARTBEAT_S). present is 0 at the first tick without it.
# Ordered by time first, so that a tick appends to one page.
process_snapshots = Table(
    "process_snapshots",
    metadata,
    Column("timestamp_epoch", BigInteger, nullable=False),
    Column("process_id", ForeignKey("gpu_processes.id"), nullable=False),
    Column("gpu_id", ForeignKey("gpus.id"), nullable=False),
    *(_metric_column(metric) for metric in PROCESS_METRICS),
    Column("present", SmallInteger, nullable=False, server_default="1"),
    PrimaryKeyConstraint("timestamp_epoch", "process_id", "gpu_id"),
    sqlite_with_rowid=False,
)

# What a process used of a GPU in each half hour (its first second) while it ran that program (0 where that is
# unknown). seconds it was there; busy_s, its part of the GPU's busy time (a GPU at 100 % for a second is 1),
# split by SM utilization; idle_s, time in which it did nothing for longer than GPUMON_IDLE_MINUTES; memory held,
# in MiB times seconds; its part of the GPU's energy. Where the driver does not distinguish processes, nor the
# clients of MPS, the GPU's use is split by memory: estimated is 1.
process_hours = Table(
    "process_hours",
    metadata,
    Column("timestamp_epoch", BigInteger, nullable=False),
    Column("process_id", ForeignKey("gpu_processes.id"), nullable=False),
    Column("gpu_id", ForeignKey("gpus.id"), nullable=False),
    Column("program_id", Integer, nullable=False, server_default="0"),
    Column("seconds", Float, nullable=False),
    Column("busy_s", Float, nullable=False),
    Column("idle_s", Float, nullable=False, server_default="0"),
    Column("memory_mib_s", Float, nullable=False),
    Column("energy_j", Float, nullable=False),
    Column("max_memory", Integer),
    Column("estimated", SmallInteger, nullable=False),
    PrimaryKeyConstraint("timestamp_epoch", "process_id", "gpu_id", "program_id"),
    sqlite_with_rowid=False,
)

# What a GPU did in each half hour: the seconds that were recorded, those of them in which it was busy (its
# utilization times the time), and those in which it was not although a process that computes held it; its
# energy, and of that what it took while nothing ran (idle_j), what belongs to no known process
# (unattributed_j, as unattributed_s of busy_s), and what it took while nobody recorded (unrecorded_j). In
# unknown_s of the recorded seconds the driver said nothing of its utilization: neither busy nor held nor free.
gpu_usage = Table(
    "gpu_usage",
    metadata,
    Column("timestamp_epoch", BigInteger, nullable=False),
    Column("gpu_id", ForeignKey("gpus.id"), nullable=False),
    Column("seconds", Float, nullable=False),
    Column("busy_s", Float, nullable=False),
    Column("held_s", Float, nullable=False),
    Column("unattributed_s", Float, nullable=False),
    Column("energy_j", Float, nullable=False),
    Column("idle_j", Float, nullable=False),
    Column("unattributed_j", Float, nullable=False),
    Column("unrecorded_j", Float, nullable=False),
    Column("unknown_s", Float, nullable=False, server_default="0"),
    PrimaryKeyConstraint("timestamp_epoch", "gpu_id"),
    sqlite_with_rowid=False,
)

# A model on a GPU from when its server loaded it to when it dropped it; active is 1 while it is loaded.
model_sessions = Table(
    "model_sessions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("process_id", ForeignKey("gpu_processes.id"), nullable=False),
    Column("gpu_id", ForeignKey("gpus.id"), nullable=False),
    Column("model", Text, nullable=False),
    Column("first_seen", BigInteger, nullable=False),
    Column("last_seen", BigInteger, nullable=False),
    Column("max_memory", Integer),
    Column("avg_memory", Float),
    Column("sample_count", Integer, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("active", SmallInteger, nullable=False),
    Index(None, "process_id"),
    Index(None, "first_seen"),
)

# What was taken over from the original program: stretches of a GPU's history without a tick of our own, from
# their first tick to their last. source is the file's name, imported_at when it was read. The processes of such
# a stretch have a start_key that begins with IMPORTED.
imports = Table(
    "imports",
    metadata,
    Column("gpu_id", ForeignKey("gpus.id"), nullable=False),
    Column("first", BigInteger, nullable=False),
    Column("last", BigInteger, nullable=False),
    Column("ticks", Integer, nullable=False),
    Column("source", Text, nullable=False),
    Column("imported_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("gpu_id", "first"),
    sqlite_with_rowid=False,
)
IMPORTED = "imported "

# Up to when another program's file was read for a GPU, whatever of it was new. source is the file's path,
# source_index what the GPU is called in it, until the time of the last tick that was looked at.
imported_files = Table(
    "imported_files",
    metadata,
    Column("gpu_id", ForeignKey("gpus.id"), nullable=False),
    Column("source", Text, nullable=False),
    Column("source_index", Integer, nullable=False),
    Column("until", BigInteger, nullable=False),
    Column("imported_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("gpu_id", "source", "source_index"),
    sqlite_with_rowid=False,
)

# How the recorder itself fared, minute by minute.
recorder_health = Table(
    "recorder_health",
    metadata,
    Column("host_id", ForeignKey("hosts.id"), nullable=False),
    Column("timestamp_epoch", BigInteger, nullable=False),
    Column("ticks", Integer, nullable=False),
    Column("skipped", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("dropped", Integer, nullable=False),
    Column("buffered", Integer, nullable=False),
    Column("duration_ms", Float),
    Column("duration_max_ms", Float),
    Column("database_bytes", BigInteger),
    Column("last_error", Text),
    PrimaryKeyConstraint("host_id", "timestamp_epoch"),
    sqlite_with_rowid=False,
)
