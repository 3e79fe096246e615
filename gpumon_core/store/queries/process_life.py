"""One process over its life, tick by tick or in the steps of a chart, as pandas DataFrames."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from gpumon_core.metrics import PROCESS_METRICS
from gpumon_core.store.accounting import PROCESS_KEYS
from gpumon_core.store.queries.frames import fetch
from gpumon_core.store.queries.history import GAP_STEPS, LABEL_S
from gpumon_core.store.queries.occupancy import HOUR_S, LOOK_BACK_S, hour_of, ticks_are_stored
from gpumon_core.store.schema import gpu_metrics, gpu_processes, process_hours, process_snapshots

# A life no longer than this is read from the ticks, a longer one from the hours.
FROM_TICKS_S = 6 * HOUR_S


def _span(engine: Engine, process_id: int) -> tuple[int, int] | None:
    """When a process was first and last seen (UTC seconds); None where the ledger does not know it."""
    this = gpu_processes.c
    with engine.connect() as connection:
        row = connection.execute(sa.select(this.first_seen, this.last_seen).where(this.id == process_id)).first()
    return None if row is None else (row.first_seen, row.last_seen)


def ticks(
    engine: Engine, process_id: int, start: int | None = None, end: int | None = None, recorded: bool = False
) -> pd.DataFrame:
    """One process at every tick that is still stored, between `start` and `end` (or over all its life).

    Columns: gpu_id, timestamp_epoch, memory (MiB), sm_utilization, memory_utilization, encoder_utilization,
    decoder_utilization (%), as float64, and with `recorded` also recorded_ms, the time that the tick covers. Only
    ticks at which the process was on the GPU have rows.
    """
    numbers = [*PROCESS_KEYS, *(["recorded_ms"] if recorded else [])]
    columns = ["gpu_id", "timestamp_epoch", *numbers]
    span = _span(engine, process_id)
    if span is None:
        return pd.DataFrame(columns=columns)
    first, last = span
    begin = first if start is None else max(start, first)
    finish = last if end is None else min(end, last)
    time = process_snapshots.c.timestamp_epoch
    rows = fetch(
        engine,
        sa.select(process_snapshots)
        .where(time >= begin - LOOK_BACK_S, time <= finish, process_snapshots.c.process_id == process_id)
        .order_by(time),
    )
    parts = []
    for gpu_id, states in rows.groupby("gpu_id"):
        of_gpu = sa.select(gpu_metrics.c.timestamp_epoch, gpu_metrics.c.recorded_ms).where(
            gpu_metrics.c.gpu_id == int(str(gpu_id)),
            gpu_metrics.c.timestamp_epoch >= begin,
            gpu_metrics.c.timestamp_epoch <= finish,
        )
        times = fetch(engine, of_gpu.order_by(gpu_metrics.c.timestamp_epoch))
        # A row holds from its time on: each tick takes the newest one that is not later.
        at_ticks = pd.merge_asof(times, states, on="timestamp_epoch", tolerance=LOOK_BACK_S)
        parts.append(at_ticks[at_ticks["present"] == 1])
    if not parts:
        return pd.DataFrame(columns=columns)
    life = pd.concat(parts, ignore_index=True)[columns]
    life[numbers] = life[numbers].astype("float64")
    return life.astype({"gpu_id": "int64", "timestamp_epoch": "int64"})


def steps(engine: Engine, process_id: int, points: int) -> tuple[pd.DataFrame, bool]:
    """One process over its life, in about `points` steps per GPU, and whether these are means of hours.

    Columns: gpu_id, timestamp_epoch, and for each process metric its mean, `<metric>_min` and `<metric>_max`, as
    float64. The SM utilization of an hour is the process's part of the GPU's busy time. Ticks are read where all
    of them are still stored. One row of NaN marks the time in which the process was not on the GPU, or
    nothing was recorded.
    """
    span = _span(engine, process_id)
    if span is None:
        return _by_hours(engine, process_id, 0, 0), True
    first, last = span
    long = last - first > FROM_TICKS_S
    if long or not ticks_are_stored(engine, first):
        return _by_hours(engine, process_id, first, last), True
    life = ticks(engine, process_id, recorded=True)
    if life.empty:
        return _by_hours(engine, process_id, first, last), True
    step = max(1, (last - first) // max(1, points))
    bucket = life["timestamp_epoch"] - life["timestamp_epoch"] % step
    grouped = life.drop(columns="timestamp_epoch").groupby([life["gpu_id"], bucket.rename("timestamp_epoch")])
    keys = [metric.key for metric in PROCESS_METRICS]
    parts = {key: grouped[key].mean() for key in keys}
    parts |= {f"{key}_min": grouped[key].min() for key in keys} | {
        f"{key}_max": grouped[key].max() for key in keys
    }
    parts["recorded_s"] = grouped["recorded_ms"].max() / 1000
    return _with_gaps(pd.DataFrame(parts).reset_index(), step=step), False


def _by_hours(engine: Engine, process_id: int, first_seen: int, last_seen: int) -> pd.DataFrame:
    hours = process_hours.c
    query = (
        sa.select(
            hours.gpu_id,
            hour_of(hours.timestamp_epoch).label("timestamp_epoch"),
            *(sa.func.sum(hours[name]).label(name) for name in ("seconds", "busy_s", "memory_mib_s")),
            sa.func.max(hours.max_memory).label("memory_max"),
        )
        # The table is ordered by time: without these two the database would read all of it.
        .where(
            hours.process_id == process_id,
            hours.timestamp_epoch > first_seen - HOUR_S,
            hours.timestamp_epoch <= last_seen,
        )
        .group_by(hours.gpu_id, hour_of(hours.timestamp_epoch))
        .order_by(hours.gpu_id, hour_of(hours.timestamp_epoch))
    )
    frame = fetch(engine, query).astype({"gpu_id": "int64", "timestamp_epoch": "int64"})
    seconds = frame["seconds"].astype("float64").where(lambda length: length > 0)
    frame["memory"] = frame.pop("memory_mib_s") / seconds
    frame["sm_utilization"] = 100 * frame.pop("busy_s") / seconds
    frame["memory_max"] = frame["memory_max"].astype("float64")
    # Where the driver reported no memory, it is not known, and not 0.
    frame["memory"] = frame["memory"].where(frame["memory_max"].notna())
    for metric in PROCESS_METRICS:
        for name in (metric.key, f"{metric.key}_min", f"{metric.key}_max"):
            if name not in frame:
                frame[name] = frame.get(metric.key, np.nan)
    return _with_gaps(frame.drop(columns="seconds"), HOUR_S)


def _with_gaps(frame: pd.DataFrame, longest: float | None = None, step: float = 0.0) -> pd.DataFrame:
    """Add a row of NaN between two rows of a GPU that are further apart than `longest` seconds, so that a line
    breaks there. Without `longest`, the limit is what a row covers (recorded_s) and a step, or, where that is not
    known, a few times what is usual in the frame."""
    apart = frame.groupby("gpu_id")["timestamp_epoch"].diff()
    allowed: Any = longest
    if longest is None:
        own = frame.pop("recorded_s") + step + LABEL_S
        allowed = own.fillna(GAP_STEPS * apart.median())
    wide = apart > allowed
    gaps = frame.loc[wide, ["gpu_id", "timestamp_epoch"]]
    gaps["timestamp_epoch"] -= (apart[wide] / 2).astype("int64")
    joined: pd.DataFrame = pd.concat([frame, gaps])
    return joined.sort_values(["gpu_id", "timestamp_epoch"], ignore_index=True)
