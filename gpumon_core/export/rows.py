"""The columns of every table of the database in a file.

Their titles and units follow from the schema and the catalogue: a new table needs no line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from gpumon_core.export.formats import RowChunk, Type
from gpumon_core.format import gpu_label
from gpumon_core.metrics import GPU_METRICS_BY_KEY, PROCESS_METRICS, Metric
from gpumon_core.store.bulk import Row
from gpumon_core.store.schema import TIERS, gpu_metrics, gpu_processes, gpus, hosts, scale

# Columns that are times, in UTC seconds, and those that are yes or no.
MOMENTS = {
    *("timestamp_epoch", "first_seen", "last_seen", "last_used", "last_busy", "start_time"),
    *("first", "last", "until", "imported_at"),
}
FLAGS = {"active", "present", "estimated"}
# The end of a column's name -> its unit; the longest end comes first.
SUFFIXES = {"_mib_s": "MiB s", "_mib": "MiB", "_ms": "ms", "_s": "s", "_j": "J", "_w": "W", "_bytes": "bytes"}
# Columns whose titles and units do not follow from their names.
TITLES: Mapping[str, tuple[str, str | None]] = {
    "timestamp_epoch": ("Time", None),
    "start_time": ("Started", None),
    "pid": ("PID", None),
    "name": ("Name", None),
    "username": ("User", None),
    "id": ("Id in gpumon", None),
    "gpu_id": ("GPU id in gpumon", None),
    "host_id": ("Host id in gpumon", None),
    "process_id": ("Process id in gpumon", None),
    "program_id": ("Program id in gpumon", None),
    "parent_id": ("Parent's id in gpumon", None),
    "uuid": ("UUID", None),
    "gpu_index": ("GPU index", None),
    "mig_index": ("MIG index", None),
    "pci_bus_id": ("PCI bus id", None),
    "cuda_version": ("CUDA version", None),
    "nvml_version": ("NVML version", None),
    "energy_counter_j": ("Driver's energy counter", "J"),
    "kind": ("Type", None),
    "samples": ("Samples", None),
    "sample_count": ("Samples", None),
    "seconds": ("Counted", "s"),
    "max_memory": ("Maximum memory", "MiB"),
    "avg_memory": ("Average memory", "MiB"),
    "memory_mib_s": ("Memory held", "MiB s"),
    "max_sm": ("SM maximum", "%"),
    "sm_percent_s": ("SM utilization times seconds", "% s"),
    "sm_told_s": ("SM utilization told for", "s"),
}
PROCESS_METRICS_BY_KEY = {metric.key: metric for metric in PROCESS_METRICS}
EXTREMES = {"": "", "_min": ", lowest", "_max": ", highest"}
ROLLUPS = {tier.table.name for tier in TIERS}
FIRST = ("time", "host", "gpu")
# Ids come last: they are for joining tables, not for reading.
LAST = ("gpu_id", "host_id", "process_id", "program_id", "parent_id", "id")


@dataclass(frozen=True, slots=True)
class Names:
    """What hosts (by id) and GPUs (by id) are called."""

    hosts: Mapping[int, str]
    gpu_hosts: Mapping[int, str]
    gpus: Mapping[int, str]


def read_names(engine: Engine) -> Names:
    """The names in a database. Raises sqlalchemy.exc.DBAPIError."""
    query = sa.select(gpus.c.id, gpus.c.gpu_index, gpus.c.mig_index, hosts.c.name).join(
        hosts, hosts.c.id == gpus.c.host_id
    )
    with engine.connect() as connection:
        machines = {row.id: row.name for row in connection.execute(sa.select(hosts.c.id, hosts.c.name))}
        found = connection.execute(query).all()
    labels = {row.id: gpu_label(row.gpu_index, row.mig_index) for row in found}
    return Names(machines, {row.id: row.name for row in found}, labels)


@dataclass(frozen=True, slots=True)
class StoredColumn:
    """A column of a file.

    key: its name in JSON. source: what a query selects. named: for an id, the names that replace it.
    """

    key: str
    title: str
    type: Type
    source: sa.ColumnElement[Any]
    unit: str | None = None
    named: Callable[[Names], Mapping[int, str]] | None = None

    @property
    def header(self) -> str:
        """The title with its unit, as in the pages' downloads."""
        return self.title if self.unit is None else f"{self.title} ({self.unit})"


def columns(table: sa.Table) -> list[StoredColumn]:
    """The columns of a file of a table: time, host and GPU first, ids last."""
    found = []
    for column in table.columns:
        found += [*_instead(table, column), _column(table, column)]
    # Python's sort is stable: the others stay in their order.
    return sorted(found, key=lambda one: FIRST.index(one.key) if one.key in FIRST else 9 + (one.key in LAST))


def history_columns(metrics: Sequence[str]) -> list[StoredColumn]:
    """The columns of a file of metrics_history: the time, the GPU, and each metric's mean, lowest and highest."""
    time, gpu_id = gpu_metrics.c.timestamp_epoch, gpu_metrics.c.gpu_id
    found = [_column(gpu_metrics, time), *_instead(gpu_metrics, gpu_id)]
    for metric in map(GPU_METRICS_BY_KEY.__getitem__, metrics):
        found += [
            StoredColumn(metric.key + suffix, metric.label + title, Type.NUMBER, time, metric.unit)
            for suffix, title in EXTREMES.items()
        ]
    return found


def _instead(table: sa.Table, column: sa.Column[Any]) -> list[StoredColumn]:
    """For an id in the table, the columns that name the same."""
    if column.name == "gpu_id":
        return [
            StoredColumn("host", "Host", Type.TEXT, column, named=lambda names: names.gpu_hosts),
            StoredColumn("gpu", "GPU", Type.TEXT, column, named=lambda names: names.gpus),
        ]
    if column.name == "host_id":
        return [StoredColumn("host", "Host", Type.TEXT, column, named=lambda names: names.hosts)]
    if column.name == "process_id":
        return [_column(gpu_processes, gpu_processes.c[name]) for name in ("pid", "name", "username")]
    return []


def _column(table: sa.Table, column: sa.Column[Any]) -> StoredColumn:
    name = column.name
    title, unit, source = (*_called(table, name), column)
    metric, suffix = _metric(table, name)
    if metric is not None:
        title, unit = metric.label + EXTREMES[suffix], metric.unit
        if table.name in ROLLUPS and scale(metric) != 1:
            return StoredColumn(name, title, Type.NUMBER, sa.cast(source, sa.Double) / float(scale(metric)), unit)
    key = {"timestamp_epoch": "time", "username": "user", "kind": "type"}.get(name, name)
    return StoredColumn(key, title, _type(column), source, unit)


def _type(column: sa.Column[Any]) -> Type:
    if column.name in MOMENTS:
        return Type.MOMENT
    if column.name in FLAGS:
        return Type.FLAG
    if isinstance(column.type, sa.Integer):
        return Type.WHOLE
    return Type.NUMBER if isinstance(column.type, sa.Float) else Type.TEXT


def _metric(table: sa.Table, name: str) -> tuple[Metric | None, str]:
    """The metric of a column, and which of the metric's values it is."""
    catalogue = PROCESS_METRICS_BY_KEY if "process_id" in table.c else GPU_METRICS_BY_KEY
    # energy_j, or the memory over a process's life, is no metric: the table has no column of that key.
    for suffix in EXTREMES:
        key = name.removesuffix(suffix) if suffix else name
        if name.endswith(suffix) and key in catalogue and key in table.c:
            return catalogue[key], suffix
    return None, ""


def _called(table: sa.Table, name: str) -> tuple[str, str | None]:
    if name in TITLES:
        return TITLES[name]
    for suffix, unit in SUFFIXES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix).replace("_", " ").capitalize(), unit
    return name.replace("_", " ").capitalize(), None


def piece(shown: Sequence[StoredColumn], rows: list[Row], names: Names) -> RowChunk:
    """Rows as a piece of a file."""
    # The key of the table follows the shown columns.
    columns = zip(*rows, strict=True) if rows else [()] * len(shown)
    return [_values(one, values, names) for one, values in zip(shown, columns, strict=False)]


def _values(column: StoredColumn, values: Sequence[Any], names: Names) -> Sequence[Any]:
    if column.named is not None:
        return list(map(column.named(names).get, values))
    return list(map({0: False, 1: True}.get, values)) if column.type == Type.FLAG else values
