"""What is recorded, as pandas DataFrames: hosts, GPUs and processes now, and what the database holds.

Every function takes an engine from `database.open_for_reading`. Times in frames are integer UTC
seconds; a page shows them in the viewer's time zone.
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
from gpumon_core.store.queries import current
from gpumon_core.store.schema import (
    PROGRAM_COLUMNS,
    TIERS,
    gpu_metrics,
    gpus,
    hosts,
    programs,
    recorder_health,
)

# Up to this many programs are asked for by their ids; for more, all are read.
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
    """current.hosts as a frame."""
    return pd.DataFrame(_columns(current.HOST_COLUMNS, current.hosts(engine), ()))


def gpu_table(engine: Engine, gone: bool = False) -> pd.DataFrame:
    """current.gpus as a frame, whose metrics are float64 with NaN."""
    rows = current.gpus(engine, gone)
    return pd.DataFrame(_columns(current.GPU_COLUMNS, rows, (*TICK_COLUMNS, *current.CHANGE_KEYS)))


def gpu_ids(engine: Engine) -> list[int]:
    """The ids of all GPUs that were ever seen, including those that are gone."""
    with engine.connect() as connection:
        return list(connection.execute(sa.select(gpus.c.id).order_by(gpus.c.id)).scalars())


def _columns(names: Sequence[str], rows: Sequence[current.NamedRow], numbers: Iterable[str]) -> dict[str, Any]:
    """Rows as columns by name; those in `numbers` are float64 with NaN."""
    wanted = set(numbers)
    return {
        name: np.array(values, dtype="float64") if name in wanted else _plain(values)
        for name in names
        for values in ([row[name] for row in rows],)
    }


def _plain(column: Sequence[Any]) -> Any:
    """A column whose texts may be missing: with None for them, because a NaN of pandas' counts as true."""
    return pd.Series(column, dtype="object") if any(isinstance(value, str) for value in column) else list(column)


def active_processes(engine: Engine) -> pd.DataFrame:
    """current.processes as a frame: numbers that may be missing are float64 with NaN, texts None."""
    table = _columns(current.PROCESS_COLUMNS, current.processes(engine), current.PROCESS_NUMBERS)
    for name in PROGRAM_COLUMNS:
        table[name] = pd.Series(table[name], dtype="object")
    return pd.DataFrame(table)


def resolutions(engine: Engine) -> pd.DataFrame:
    """What is stored at each resolution, finest first.

    Columns: seconds (0 for raw ticks), retention (raw, minute or hour: which of the settings applies), first, last
    (UTC seconds, NaN where nothing is stored).
    """
    rows = []
    tables = [(gpu_metrics, 0, "raw"), *((tier.table, tier.seconds, tier.retention) for tier in TIERS)]
    with engine.connect() as connection:
        for table, seconds, retention in tables:
            # The first and last entry of each GPU in the index: min() over the table would read all of it.
            edges = [
                sa.select(edge(table.c.timestamp_epoch)).where(table.c.gpu_id == gpus.c.id).scalar_subquery()
                for edge in (sa.func.min, sa.func.max)
            ]
            found = connection.execute(sa.select(*edges)).all()
            firsts = [first for first, _ in found if first is not None]
            lasts = [last for _, last in found if last is not None]
            rows.append((seconds, retention, min(firsts, default=None), max(lasts, default=None)))
    return _numbers(pd.DataFrame(rows, columns=["seconds", "retention", "first", "last"]), "first", "last")


def health_history(engine: Engine, host: str, start: int, end: int) -> pd.DataFrame:
    """The state of a host's recorder, minute by minute: the columns of `recorder_health`."""
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
    """The frame with the columns of `programs` instead of program_id."""
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
