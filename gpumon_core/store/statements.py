"""The statements that every transaction of a recorder has, compiled once, and the rows that they are given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect

from gpumon_core.metrics import TICK_COLUMNS, TICK_METRICS, Aggregate
from gpumon_core.store.accounting import LEDGER, PROCESS_KEYS, USAGE, WORK, Use
from gpumon_core.store.bulk import Bulk, Row, adding, replacing, setting, upsert
from gpumon_core.store.schema import (
    gpu_changes,
    gpu_metrics,
    gpu_processes,
    gpu_usage,
    gpus,
    hosts,
    model_sessions,
    process_gpus,
    process_hours,
    process_snapshots,
)

# Of a row of process_hours, what is added up.
SUMS = ("seconds", "busy_s", "idle_s", "memory_mib_s", "energy_j")


@dataclass(slots=True)
class NewRows:
    """What the ticks of one transaction make."""

    metrics: list[Row] = field(default_factory=list)
    # Of seconds that have a row already.
    again: list[Row] = field(default_factory=list)
    changes: list[Row] = field(default_factory=list)
    snapshots: list[Row] = field(default_factory=list)
    unrecorded: list[Row] = field(default_factory=list)
    # What has come or gone is settled at once.
    moved: dict[tuple[int, int], Use] = field(default_factory=dict)


class Statements:
    """Each is run for many rows at once."""

    def __init__(self, dialect: Dialect) -> None:
        columns = ["gpu_id", "timestamp_epoch", *TICK_COLUMNS, "recorded_ms"]
        self.add_metrics = Bulk(dialect, gpu_metrics.insert(), columns)
        self.merge_metrics = Bulk(dialect, _merging(dialect), columns)
        columns = ["gpu_id", "metric", "timestamp_epoch", "value"]
        self.add_changes = Bulk(dialect, replacing(dialect, gpu_changes), columns)
        columns = ["timestamp_epoch", "process_id", "gpu_id", *PROCESS_KEYS, "present"]
        self.add_snapshots = Bulk(dialect, replacing(dialect, process_snapshots), columns)
        meter = ["last_seen", "energy_j", "energy_counter_j", "energy_from", "energy_ahead_j"]
        self.set_gpus = setting(dialect, gpus, meter)
        # Only where the row is as this writer left it.
        self.set_host = setting(dialect, hosts, ["last_seen"], ["id", "name", "last_seen"])
        self.set_processes = setting(dialect, gpu_processes, LEDGER)
        pair = [*LEDGER, "active", *WORK, *PROCESS_KEYS]
        self.set_pairs = setting(dialect, process_gpus, pair, ["process_id", "gpu_id"])
        self.add_hours = hours_bulk(dialect)
        columns = ["timestamp_epoch", "gpu_id", *USAGE]
        self.add_usage = Bulk(dialect, adding(dialect, gpu_usage), columns)
        self.set_sessions = setting(dialect, model_sessions, [*LEDGER, "active"])


def _merging(dialect: Dialect) -> Any:
    """An INSERT into gpu_metrics that is merged with a row of the same second: means by time, maxima."""
    statement = upsert(dialect, gpu_metrics)
    new, old = statement.excluded, gpu_metrics.c
    old_ms = sa.func.coalesce(old.recorded_ms, new.recorded_ms)
    values: dict[str, Any] = {"recorded_ms": old_ms + new.recorded_ms}
    for metric in TICK_METRICS:
        key = metric.key
        highest = [metric.peak] if metric.peak else []
        if metric.aggregate is Aggregate.COUNTER:
            highest.append(key)
        else:
            mean = (
                (old[key] * old_ms + new[key] * new.recorded_ms)
                * sa.literal_column("1.0")
                / (old_ms + new.recorded_ms)
            )
            if metric.column == "integer":
                mean = sa.cast(sa.func.round(mean), sa.Integer)
            values[key] = sa.func.coalesce(mean, new[key], old[key])
        for name in highest:
            values[name] = sa.case(
                (new[name] > old[name], new[name]), else_=sa.func.coalesce(old[name], new[name])
            )
    keys = ["gpu_id", "timestamp_epoch"]
    return statement.on_conflict_do_update(index_elements=keys, set_=values)


def hours_bulk(dialect: Dialect) -> Bulk:
    """Adds to process_hours: its key, SUMS, max_memory and estimated."""
    hour = upsert(dialect, process_hours)
    new, old = hour.excluded, process_hours.c
    values = {name: old[name] + new[name] for name in SUMS}
    for name in ("max_memory", "estimated"):
        known = sa.func.coalesce(old[name], new[name])
        values[name] = sa.case((new[name] > known, new[name]), else_=known)
    keys = ["timestamp_epoch", "process_id", "gpu_id", "program_id"]
    statement = hour.on_conflict_do_update(index_elements=keys, set_=values)
    return Bulk(dialect, statement, [*keys, *SUMS, "max_memory", "estimated"])
