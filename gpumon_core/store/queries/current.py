"""What is now: the newest tick of every host, as plain rows.

Pages ask for it with every tick. For a few rows with many columns pandas needs five times as long as the query, so
these are no frames; `frames` has the same as frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from gpumon_core.metrics import CHANGE_METRICS, TICK_COLUMNS
from gpumon_core.store import schema
from gpumon_core.store.accounting import PROCESS_KEYS
from gpumon_core.store.schema import (
    PROGRAM_COLUMNS,
    gpu_changes,
    gpu_metrics,
    gpu_processes,
    process_gpus,
    process_snapshots,
    programs,
)

# The values of a row by the names of its columns; what is not known is None.
NamedRow = dict[str, Any]

CHANGE_KEYS = [metric.key for metric in CHANGE_METRICS]
# Whether a GPU answers now. It is not known whether a process still runs on one that does not.
ANSWERS = schema.gpus.c.last_seen == schema.hosts.c.last_seen

# These queries are built once.
_HOSTS = sa.select(schema.hosts).order_by(schema.hosts.c.name)
_GPUS_NOW = (
    sa.select(
        schema.gpus,
        schema.hosts.c.name.label("host"),
        schema.hosts.c.last_seen.label("host_last_seen"),
        schema.hosts.c.interval_s.label("host_interval_s"),
        *(gpu_metrics.c[key] for key in TICK_COLUMNS),
    )
    .join(schema.hosts, schema.hosts.c.id == schema.gpus.c.host_id)
    .outerjoin(
        gpu_metrics,
        sa.and_(
            gpu_metrics.c.gpu_id == schema.gpus.c.id, gpu_metrics.c.timestamp_epoch == schema.gpus.c.last_seen
        ),
    )
    .order_by(schema.hosts.c.name, schema.gpus.c.gpu_index, sa.func.coalesce(schema.gpus.c.mig_index, -1))
)
_GPUS_LISTED = _GPUS_NOW.where(schema.gpus.c.state != "gone")
_KEYS = sa.union_all(*(sa.select(sa.literal(metric.key).label("metric")) for metric in CHANGE_METRICS)).subquery()
# One look into the index for each metric: the changes of years need not be read.
_CHANGES_NOW = sa.select(
    schema.gpus.c.id,
    _KEYS.c.metric,
    sa.select(gpu_changes.c.value)
    .where(gpu_changes.c.gpu_id == schema.gpus.c.id, gpu_changes.c.metric == _KEYS.c.metric)
    .order_by(gpu_changes.c.timestamp_epoch.desc())
    .limit(1)
    .scalar_subquery(),
).join(_KEYS, sa.true())
_PROCESSES_NOW = (
    sa.select(
        process_gpus.c.process_id,
        process_gpus.c.gpu_id,
        schema.hosts.c.name.label("host"),
        schema.gpus.c.gpu_index,
        schema.gpus.c.mig_index,
        schema.gpus.c.name.label("gpu_name"),
        schema.gpus.c.memory_total_mib,
        gpu_processes.c.pid,
        gpu_processes.c.name,
        gpu_processes.c.username,
        gpu_processes.c.start_time,
        process_gpus.c.kind,
        *(process_gpus.c[key] for key in PROCESS_KEYS),
        process_gpus.c.first_seen,
        schema.hosts.c.last_seen,
        process_gpus.c.max_memory,
        process_gpus.c.avg_memory,
        process_gpus.c.sample_count,
        *(programs.c[name] for name in PROGRAM_COLUMNS),
        process_gpus.c.last_seen.label("settled"),
    )
    .select_from(process_gpus)
    .join(schema.gpus, schema.gpus.c.id == process_gpus.c.gpu_id)
    .join(schema.hosts, schema.hosts.c.id == schema.gpus.c.host_id)
    .join(gpu_processes, gpu_processes.c.id == process_gpus.c.process_id)
    .outerjoin(programs, programs.c.id == gpu_processes.c.program_id)
    .where(process_gpus.c.active == 1, ANSWERS)
)
_SNAPSHOTS = (
    sa.select(
        process_snapshots.c.process_id,
        process_snapshots.c.gpu_id,
        *(process_snapshots.c[key] for key in PROCESS_KEYS),
    )
    .where(
        process_snapshots.c.timestamp_epoch > sa.bindparam("since"),
        process_snapshots.c.gpu_id.in_(sa.bindparam("gpu_ids", expanding=True)),
    )
    .order_by(process_snapshots.c.timestamp_epoch)
)
PROCESS_NUMBERS = (*PROCESS_KEYS, "max_memory", "avg_memory", "memory_total_mib", "mig_index", "start_time")

HOST_COLUMNS = tuple(_HOSTS.selected_columns.keys())
GPU_COLUMNS = (*_GPUS_NOW.selected_columns.keys(), *CHANGE_KEYS)
# Without the last, which is only used here: until when the row is up to date.
PROCESS_COLUMNS = tuple(_PROCESSES_NOW.selected_columns.keys())[:-1]


def hosts(engine: Engine) -> list[NamedRow]:
    """One row per host, by name: the columns of `hosts`. Raises sqlalchemy.exc.DBAPIError."""
    with engine.connect() as connection:
        return _rows(connection, _HOSTS)


def gpus(engine: Engine, gone: bool = False) -> list[NamedRow]:
    """One row per GPU, in the driver's order; with `gone` also those that are gone. The columns of `gpus`, `host`,
    `host_last_seen`, `host_interval_s`, and the present values of the catalogue's metrics. Raises
    sqlalchemy.exc.DBAPIError."""
    with engine.connect() as connection:
        rows = _rows(connection, _GPUS_NOW if gone else _GPUS_LISTED)
        changes = {(gpu_id, key): value for gpu_id, key, value in connection.execute(_CHANGES_NOW).all()}
    for row in rows:
        row |= {key: changes.get((row["id"], key)) for key in CHANGE_KEYS}
    return rows


def processes(engine: Engine) -> list[NamedRow]:
    """The processes of every host's newest tick, one row per process and GPU, most memory first.

    Columns: process_id, gpu_id, host, gpu_index, mig_index, gpu_name, memory_total_mib, pid, name,
    username, start_time, kind, memory (MiB), sm_utilization, memory_utilization, encoder_utilization,
    decoder_utilization (%), first_seen, last_seen, max_memory, avg_memory (MiB), sample_count, and those of
    `programs`. Raises sqlalchemy.exc.DBAPIError.
    """
    with engine.connect() as connection:
        rows = _rows(connection, _PROCESSES_NOW)
        newest = _newest_snapshots(connection, rows)
    for row in rows:
        changed = newest.get((row["process_id"], row["gpu_id"]))
        if changed is not None:
            row.update(zip(PROCESS_KEYS, changed, strict=True))
        known = [memory for memory in (row["max_memory"], row["memory"]) if memory is not None]
        row["max_memory"] = max(known, default=None)
        del row["settled"]
    rows.sort(key=lambda row: (-(row["memory"] or 0), row["pid"]))
    return rows


def _rows(connection: Connection, query: sa.Select[Any]) -> list[NamedRow]:
    result = connection.execute(query)
    names = tuple(result.keys())
    return [dict(zip(names, row, strict=True)) for row in result.all()]


def _newest_snapshots(connection: Connection, rows: Sequence[NamedRow]) -> dict[tuple[int, int], tuple[Any, ...]]:
    """What has changed since the processes' rows were last updated, by process and GPU."""
    if not rows:
        return {}
    chosen = {"since": min(row["settled"] for row in rows), "gpu_ids": list({row["gpu_id"] for row in rows})}
    found = connection.execute(_SNAPSHOTS, chosen).all()
    return {(process_id, gpu_id): tuple(values) for process_id, gpu_id, *values in found}
