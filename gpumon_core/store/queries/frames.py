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
from gpumon_core.metrics import TICK_COLUMNS
from gpumon_core.store.accounting import PROCESS_KEYS
from gpumon_core.store.queries import current
from gpumon_core.store.queries.history import read as read_history
from gpumon_core.store.schema import (
    PROGRAM_COLUMNS,
    TIERS,
    gpu_metrics,
    gpu_processes,
    gpus,
    hosts,
    process_snapshots,
    programs,
    recorder_health,
)

# A process's state is written at least this often, with some room for a late tick: accounts.HEARTBEAT_S.
LOOK_BACK_S = 900
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
    """now.hosts as a frame."""
    return pd.DataFrame(_columns(current.HOST_COLUMNS, current.hosts(engine), ()))


def gpu_table(engine: Engine, gone: bool = False) -> pd.DataFrame:
    """now.gpus as a frame, whose metrics are float64 with NaN."""
    return as_gpu_table(current.gpus(engine, gone))


def as_gpu_table(rows: Sequence[current.Row]) -> pd.DataFrame:
    """Rows of now.gpus as gpu_table has them."""
    return pd.DataFrame(_columns(current.GPU_COLUMNS, rows, (*TICK_COLUMNS, *current.CHANGE_KEYS)))


def gpu_ids(engine: Engine) -> list[int]:
    """The ids of all GPUs that were ever seen, those that are gone included."""
    with engine.connect() as connection:
        return list(connection.execute(sa.select(gpus.c.id).order_by(gpus.c.id)).scalars())


def _columns(names: Sequence[str], rows: Sequence[current.Row], numbers: Iterable[str]) -> dict[str, Any]:
    """Rows as columns by name, of which `numbers` are float64 with NaN."""
    wanted = set(numbers)
    return {
        name: np.array(values, dtype="float64") if name in wanted else _plain(values)
        for name in names
        for values in ([row[name] for row in rows],)
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
    """now.processes as a frame: numbers that may be missing are float64 with NaN, texts None."""
    table = _columns(current.PROCESS_COLUMNS, current.processes(engine), current.PROCESS_NUMBERS)
    for name in PROGRAM_COLUMNS:
        table[name] = pd.Series(table[name], dtype="object")
    return pd.DataFrame(table)


def process_life(
    engine: Engine, process_id: int, start: int | None = None, end: int | None = None, recorded: bool = False
) -> pd.DataFrame:
    """One process at every tick that is still kept, between `start` and `end` (or all its life).

    With `recorded`, there is also recorded_ms, the time that the tick speaks of. Columns: gpu_id, timestamp_epoch,
    memory (MiB), sm_utilization, memory_utilization, encoder_utilization, decoder_utilization (%), as float64.
    Only ticks at which it was there have rows.
    """
    numbers = [*PROCESS_KEYS, *(["recorded_ms"] if recorded else [])]
    columns = ["gpu_id", "timestamp_epoch", *numbers]
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
        ticked = sa.select(gpu_metrics.c.timestamp_epoch, gpu_metrics.c.recorded_ms).where(
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
    return _numbers(life, *numbers).astype({"gpu_id": "int64", "timestamp_epoch": "int64"})


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
