"""Reads the history, as pandas DataFrames.

Every function takes an engine from `database.open_for_reading`. Times in frames are integer UTC
seconds; a page turns them into the viewer's time zone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from gpumon_core.format import gpu_label
from gpumon_core.metrics import CHANGE_METRICS, PROCESS_METRICS, TICK_COLUMNS
from gpumon_core.store.history import read as read_history
from gpumon_core.store.schema import (
    PROGRAM_COLUMNS,
    TIERS,
    gpu_changes,
    gpu_metrics,
    gpu_processes,
    gpus,
    hosts,
    process_gpus,
    process_snapshots,
    programs,
    recorder_health,
)

PROCESS_KEYS = [metric.key for metric in PROCESS_METRICS]
# A process's state is written at least this often, with some room for a late tick: accounts.HEARTBEAT_S.
LOOK_BACK_S = 900
# What was on a GPU that does not answer now is not known to be there still.
ANSWERS = gpus.c.last_seen == hosts.c.last_seen
# So many programs are named one by one; for more, all are read.
FEW = 5000


def fetch(source: Engine | Connection, query: sa.Select[Any]) -> pd.DataFrame:
    """The rows of a query, under the names of its columns. Raises sqlalchemy.exc.DBAPIError."""
    if isinstance(source, Engine):
        with source.connect() as connection:
            return fetch(connection, query)
    result = source.execute(query)
    columns = list(result.keys())
    return pd.DataFrame.from_records(result.all(), columns=columns)


def host_table(engine: Engine) -> pd.DataFrame:
    """One row per host, by name: the columns of `hosts`."""
    with engine.connect() as connection:
        result = connection.execute(sa.select(hosts).order_by(hosts.c.name))
        names = list(result.keys())
        return pd.DataFrame(_columns(names, result.all(), ()))


# What pages ask for with every tick is put together once, and without pandas, whose joins of a few rows take
# longer than all the queries.
_GPUS_NOW = (
    sa.select(
        gpus,
        hosts.c.name.label("host"),
        hosts.c.last_seen.label("host_last_seen"),
        hosts.c.interval_s.label("host_interval_s"),
        *(gpu_metrics.c[key] for key in TICK_COLUMNS),
    )
    .join(hosts, hosts.c.id == gpus.c.host_id)
    .outerjoin(
        gpu_metrics,
        sa.and_(gpu_metrics.c.gpu_id == gpus.c.id, gpu_metrics.c.timestamp_epoch == gpus.c.last_seen),
    )
    .order_by(hosts.c.name, gpus.c.gpu_index, sa.func.coalesce(gpus.c.mig_index, -1))
)
_GPUS_LISTED = _GPUS_NOW.where(gpus.c.state != "gone")
_KEYS = sa.union_all(*(sa.select(sa.literal(metric.key).label("metric")) for metric in CHANGE_METRICS)).subquery()
# A look into the index for each: what has changed in years need not be read.
_CHANGES_NOW = sa.select(
    gpus.c.id,
    _KEYS.c.metric,
    sa.select(gpu_changes.c.value)
    .where(gpu_changes.c.gpu_id == gpus.c.id, gpu_changes.c.metric == _KEYS.c.metric)
    .order_by(gpu_changes.c.timestamp_epoch.desc())
    .limit(1)
    .scalar_subquery(),
).join(_KEYS, sa.true())
_PROCESSES_NOW = (
    sa.select(
        process_gpus.c.process_id,
        process_gpus.c.gpu_id,
        hosts.c.name.label("host"),
        gpus.c.gpu_index,
        gpus.c.mig_index,
        gpus.c.name.label("gpu_name"),
        gpus.c.memory_total_mib,
        gpu_processes.c.pid,
        gpu_processes.c.name,
        gpu_processes.c.username,
        gpu_processes.c.start_time,
        process_gpus.c.kind,
        *(process_gpus.c[key] for key in PROCESS_KEYS),
        process_gpus.c.first_seen,
        hosts.c.last_seen,
        process_gpus.c.max_memory,
        process_gpus.c.avg_memory,
        process_gpus.c.sample_count,
        *(programs.c[name] for name in PROGRAM_COLUMNS),
        process_gpus.c.last_seen.label("settled"),
    )
    .select_from(process_gpus)
    .join(gpus, gpus.c.id == process_gpus.c.gpu_id)
    .join(hosts, hosts.c.id == gpus.c.host_id)
    .join(gpu_processes, gpu_processes.c.id == process_gpus.c.process_id)
    .outerjoin(programs, programs.c.id == gpu_processes.c.program_id)
    .where(process_gpus.c.active == 1, ANSWERS)
)
_PROCESS_NUMBERS = (*PROCESS_KEYS, "max_memory", "avg_memory", "memory_total_mib", "mig_index", "start_time")


def gpu_table(engine: Engine, gone: bool = False) -> pd.DataFrame:
    """One row per GPU, in the driver's order, those that are gone only on demand: the columns of `gpus`, `host`,
    `host_last_seen`, `host_interval_s`, and the catalogue's metrics as they are now (NaN where not offered)."""
    with engine.connect() as connection:
        result = connection.execute(_GPUS_NOW if gone else _GPUS_LISTED)
        names = list(result.keys())
        rows = result.all()
        changes = {(gpu_id, metric): value for gpu_id, metric, value in connection.execute(_CHANGES_NOW)}
    table = _columns(names, rows, TICK_COLUMNS)
    ids = table["id"]
    for metric in CHANGE_METRICS:
        values = [changes.get((gpu_id, metric.key)) for gpu_id in ids]
        table[metric.key] = np.array(values, dtype="float64")
    return pd.DataFrame(table)


def gpu_ids(engine: Engine) -> list[int]:
    """The ids of all GPUs that were ever seen, those that are gone included."""
    with engine.connect() as connection:
        return list(connection.execute(sa.select(gpus.c.id).order_by(gpus.c.id)).scalars())


def _columns(names: Sequence[str], rows: Sequence[Any], numbers: Iterable[str]) -> dict[str, Any]:
    """Rows as columns by name, of which `numbers` are float64 with NaN."""
    wanted = set(numbers)
    values = zip(*rows, strict=True) if rows else ((),) * len(names)
    return {
        name: np.array(column, dtype="float64") if name in wanted else _plain(column)
        for name, column in zip(names, values, strict=True)
    }


def _plain(column: Sequence[Any]) -> Any:
    """A column whose texts may be missing: None then, where pandas' own would be a NaN that is true."""
    return pd.Series(column, dtype="object") if any(isinstance(value, str) for value in column) else list(column)


def history(
    engine: Engine, gpu_ids: Iterable[int], metrics: Sequence[str], start: int, end: int, points: int
) -> pd.DataFrame:
    """The metrics of some GPUs from `start` to `end`, in at most about `points` steps per GPU, and at
    least half as many where so many ticks exist.

    Columns: gpu_id, timestamp_epoch (the middle of the step; the tick itself where a step holds
    one tick), and for each metric its mean, `<metric>_min` and `<metric>_max`, as float64: of a counter
    its growth since the step before, of a metric that is kept when it changes what it was last. A step
    without ticks has no row; a gap in the recording is one row of NaN, so that a line drawn
    through the frame breaks there. Raises ValueError for a metric that the catalogue lacks.
    """
    return read_history(engine, gpu_ids, metrics, start, end, points)


def active_processes(engine: Engine) -> pd.DataFrame:
    """The processes of every host's newest tick, one row per process and GPU, most memory first.

    Columns: process_id, gpu_id, host, gpu_index, mig_index, gpu_name, memory_total_mib, pid, name,
    username, start_time, kind, memory (MiB), sm_utilization, memory_utilization, encoder_utilization,
    decoder_utilization (%), first_seen, last_seen, max_memory, avg_memory (MiB), sample_count, and those of
    `programs` (None where not known).
    """
    with engine.connect() as connection:
        result = connection.execute(_PROCESSES_NOW)
        names = list(result.keys())
        rows = [list(row) for row in result]
        place = {name: position for position, name in enumerate(names)}
        newest = _newest_snapshots(connection, rows, place)
    first = place[PROCESS_KEYS[0]]
    for row in rows:
        changed = newest.get((row[0], row[1]))
        if changed is not None:
            row[first : first + len(PROCESS_KEYS)] = changed
        known = [memory for memory in (row[place["max_memory"]], row[place["memory"]]) if memory is not None]
        row[place["max_memory"]] = max(known, default=None)
    rows.sort(key=lambda row: (-(row[place["memory"]] or 0), row[place["pid"]]))
    table = _columns(names, rows, _PROCESS_NUMBERS)
    del table["settled"]
    for name in PROGRAM_COLUMNS:
        table[name] = pd.Series(table[name], dtype="object")
    return pd.DataFrame(table)


def _newest_snapshots(
    connection: Connection, rows: Sequence[Sequence[Any]], place: dict[str, int]
) -> dict[tuple[int, int], tuple[Any, ...]]:
    """What has changed since the processes' rows were last brought up to date, by process and GPU."""
    if not rows:
        return {}
    time = process_snapshots.c.timestamp_epoch
    query = (
        sa.select(
            process_snapshots.c.process_id,
            process_snapshots.c.gpu_id,
            *(process_snapshots.c[key] for key in PROCESS_KEYS),
        )
        .where(
            time > min(row[place["settled"]] for row in rows),
            process_snapshots.c.gpu_id.in_({row[1] for row in rows}),
        )
        .order_by(time)
    )
    return {(process_id, gpu_id): tuple(values) for process_id, gpu_id, *values in connection.execute(query)}


def process_life(
    engine: Engine, process_id: int, start: int | None = None, end: int | None = None
) -> pd.DataFrame:
    """One process at every tick that is still kept, between `start` and `end` (or all its life).

    Columns: gpu_id, timestamp_epoch, memory (MiB), sm_utilization, memory_utilization,
    encoder_utilization, decoder_utilization (%), as float64. Only ticks at which it was there have rows.
    """
    columns = ["gpu_id", "timestamp_epoch", *PROCESS_KEYS]
    with engine.connect() as connection:
        span = connection.execute(
            sa.select(gpu_processes.c.first_seen, gpu_processes.c.last_seen).where(
                gpu_processes.c.id == process_id
            )
        ).first()
    if span is None:
        return pd.DataFrame(columns=columns)
    begin = span.first_seen if start is None else max(start, span.first_seen)
    finish = span.last_seen if end is None else min(end, span.last_seen)
    time = process_snapshots.c.timestamp_epoch
    rows = fetch(
        engine,
        sa.select(process_snapshots)
        .where(time >= begin - LOOK_BACK_S, time <= finish, process_snapshots.c.process_id == process_id)
        .order_by(time),
    )
    parts = []
    for gpu_id, states in rows.groupby("gpu_id"):
        ticked = sa.select(gpu_metrics.c.timestamp_epoch).where(
            gpu_metrics.c.gpu_id == int(str(gpu_id)),
            gpu_metrics.c.timestamp_epoch >= begin,
            gpu_metrics.c.timestamp_epoch <= finish,
        )
        ticks = fetch(engine, ticked.order_by(gpu_metrics.c.timestamp_epoch))
        # A row says what holds from its time on: each tick takes the newest one that is not later.
        told = pd.merge_asof(ticks, states, on="timestamp_epoch", tolerance=LOOK_BACK_S)
        parts.append(told[told["present"] == 1])
    if not parts:
        return pd.DataFrame(columns=columns)
    life = pd.concat(parts, ignore_index=True)[columns]
    return _numbers(life, *PROCESS_KEYS).astype({"gpu_id": "int64", "timestamp_epoch": "int64"})


def resolutions(engine: Engine) -> pd.DataFrame:
    """What is kept at each resolution, finest first.

    Columns: seconds (0 for raw ticks), kept (raw, minute or hour: the retention that holds for it),
    first, last (UTC seconds, NaN where there is nothing).
    """
    rows = []
    tables = [(gpu_metrics, 0, "raw"), *((tier.table, tier.seconds, tier.kept) for tier in TIERS)]
    with engine.connect() as connection:
        for table, seconds, kept in tables:
            # The key's first and last entry of each GPU: min() over the table would read it all.
            edges = [
                sa.select(edge(table.c.timestamp_epoch)).where(table.c.gpu_id == gpus.c.id).scalar_subquery()
                for edge in (sa.func.min, sa.func.max)
            ]
            found = connection.execute(sa.select(*edges)).all()
            firsts = [first for first, _ in found if first is not None]
            lasts = [last for _, last in found if last is not None]
            rows.append((seconds, kept, min(firsts, default=None), max(lasts, default=None)))
    return _numbers(pd.DataFrame(rows, columns=["seconds", "kept", "first", "last"]), "first", "last")


def health_history(engine: Engine, host: str, start: int, end: int) -> pd.DataFrame:
    """How a host's recorder fared, minute by minute: the columns of `recorder_health`."""
    query = (
        sa.select(recorder_health)
        .join(hosts, hosts.c.id == recorder_health.c.host_id)
        .where(
            hosts.c.name == host,
            recorder_health.c.timestamp_epoch >= start,
            recorder_health.c.timestamp_epoch <= end,
        )
        .order_by(recorder_health.c.timestamp_epoch)
    )
    return _numbers(fetch(engine, query), "duration_ms", "duration_max_ms", "database_bytes")


def with_programs(source: Engine | Connection, frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with the columns of `programs` in the place of program_id."""
    ids = frame["program_id"].dropna().unique().tolist()
    query = sa.select(programs.c.id.label("program_id"), *(programs.c[name] for name in PROGRAM_COLUMNS))
    if len(ids) <= FEW:
        query = query.where(programs.c.id.in_([int(number) for number in ids]))
    found = fetch(source, query).astype({"program_id": "float64"})
    merged = frame.astype({"program_id": "float64"}).merge(found, how="left", on="program_id")
    merged = merged.astype(dict.fromkeys(PROGRAM_COLUMNS, "object")).drop(columns="program_id")
    names = list(PROGRAM_COLUMNS)
    merged[names] = merged[names].where(merged[names].notna(), None)
    return merged


def gpu_labels(index: pd.Series, mig_index: pd.Series) -> pd.Series:
    """format.gpu_label of many, as text."""
    called = [gpu_label(*one) for one in zip(index.tolist(), mig_index.tolist(), strict=True)]
    return pd.Series(called, index=index.index, dtype="str")


def _numbers(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Columns that may hold NULL, as float64 with NaN."""
    frame[list(columns)] = frame[list(columns)].astype("float64")
    return frame
