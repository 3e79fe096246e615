"""Who was on the GPUs when: bars and areas under the charts of the same stretch of time, as pandas DataFrames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from gpumon_core.metrics import CLOCKS_EVENT_REASONS, PROCESS_METRICS
from gpumon_core.store.frames import fetch, process_life
from gpumon_core.store.schema import (
    gpu_changes,
    gpu_processes,
    gpus,
    hosts,
    model_sessions,
    process_gpus,
    process_hours,
    process_snapshots,
    programs,
)

HOUR_S = 3600
# A stretch no longer than this is read from the ticks, a longer one from the hours.
FROM_TICKS_S = HOUR_S
# A process's state is written at least this often: see frames.LOOK_BACK_S.
LOOK_BACK_S = 900
# A life no longer than this is read from the ticks, a longer one from the hours.
LIFE_FROM_TICKS_S = 6 * HOUR_S
OTHERS = -1


def lanes(
    engine: Engine, gpu_ids: Sequence[int], start: int, end: int, of: Literal["process", "model"], most: int
) -> pd.DataFrame:
    """The processes, or the models that servers had loaded, on some GPUs between `start` and `end` (UTC seconds):
    those that held most memory for longest, at most `most` of them.

    One row per process (or session) and GPU, the GPUs in the order given, then by time. Columns: gpu_id,
    process_id, first, last (UTC seconds), running, pid, name, username, workload, model, memory (MiB, its
    average), max_memory, share (of the GPU's memory, 0 to 1; NaN where not known), found (how many there were in
    all).
    """
    table = process_gpus if of == "process" else model_sessions
    running = sa.and_(table.c.active == 1, gpus.c.last_seen == hosts.c.last_seen)
    last = sa.case((running, hosts.c.last_seen), else_=table.c.last_seen)
    # What is drawn: from when to when within the stretch, and how much.
    begins = sa.case((table.c.first_seen > start, table.c.first_seen), else_=start)
    ends = sa.case((last < end, last), else_=end)
    weight = sa.func.coalesce(table.c.avg_memory, table.c.max_memory, 0) * (ends - begins + 1)
    largest = (
        sa.select(
            table.c.gpu_id,
            table.c.process_id,
            table.c.first_seen.label("first"),
            last.label("last"),
            sa.case((running, 1), else_=0).label("running"),
            sa.func.coalesce(table.c.avg_memory, table.c.max_memory).label("memory"),
            table.c.max_memory,
            gpus.c.memory_total_mib,
            (sa.null() if of == "process" else model_sessions.c.model).label("session_model"),
            sa.func.count().over().label("found"),
        )
        .join(gpus, gpus.c.id == table.c.gpu_id)
        .join(hosts, hosts.c.id == gpus.c.host_id)
        .where(table.c.gpu_id.in_(list(gpu_ids)), table.c.first_seen <= end, last >= start)
        .order_by(weight.desc())
        .limit(most)
        .subquery()
    )
    query = (
        sa.select(
            *(column for column in largest.c if column.name != "session_model"),
            *(gpu_processes.c[name] for name in ("pid", "name", "username")),
            programs.c.workload,
            sa.func.coalesce(largest.c.session_model, programs.c.model).label("model"),
        )
        .join(gpu_processes, gpu_processes.c.id == largest.c.process_id)
        .outerjoin(programs, programs.c.id == gpu_processes.c.program_id)
    )
    frame = fetch(engine, query)
    numbers = ["memory", "max_memory", "memory_total_mib"]
    frame[numbers] = frame[numbers].astype("float64")
    frame["running"] = frame["running"] == 1
    texts = ["name", "username", "workload", "model"]
    frame[texts] = frame[texts].astype("object").where(frame[texts].notna(), None)
    frame["share"] = (frame["max_memory"] / frame["memory_total_mib"]).clip(0, 1)
    place = {gpu_id: position for position, gpu_id in enumerate(gpu_ids)}
    frame = frame.assign(place=frame["gpu_id"].map(place)).sort_values(["place", "first", "process_id"])
    return frame.drop(columns=["place", "memory_total_mib"]).reset_index(drop=True)


def memory_by_process(
    engine: Engine, gpu_ids: Sequence[int], start: int, end: int, points: int, most: int
) -> pd.DataFrame:
    """How much GPU memory each process held between `start` and `end`, summed over some GPUs, step by step.

    Columns: timestamp_epoch (the beginning of a step; the steps are of equal length), and one for each of the
    `most` largest processes, by its id, the largest first, and OTHERS where there are more; MiB as float64. Within
    an hour the values are those of the ticks; of longer stretches the means of the hours, between a process's
    first and last tick.
    """
    step = max(1, -(-(end - start) // max(1, points)))
    count = max(1, -(-(end - start) // step))
    read = _from_ticks if end - start <= FROM_TICKS_S else _from_hours
    pieces = read(engine, gpu_ids, start, end)
    if not len(pieces):
        return pd.DataFrame({"timestamp_epoch": pd.Series(dtype="int64")})
    first = np.clip(np.ceil((pieces["from"].to_numpy() - start) / step), 0, count).astype("int64")
    last = np.clip(np.ceil((pieces["to"].to_numpy() - start) / step), 0, count).astype("int64")
    ids, columns = np.unique(pieces["process_id"].to_numpy(), return_inverse=True)
    # What begins and what ends at each step; the sum of both so far is what is there.
    grid = np.zeros((count + 1, len(ids)))
    memory = pieces["memory"].to_numpy()
    # Who came and went between two steps is in the step before its end; of others, what is between them is no
    # step.
    unseen = np.bincount(columns, weights=last - first)[columns] == 0
    largest = pieces.assign(unseen=unseen, memory=memory)[unseen].groupby("process_id")["memory"].idxmax()
    brief = pieces.index.isin(largest)
    first = np.where(brief, np.clip(first - 1, 0, count - 1), first)
    last = np.where(brief, first + 1, last)
    np.add.at(grid, (first, columns), memory)
    np.add.at(grid, (last, columns), -memory)
    held = np.cumsum(grid[:count], axis=0).clip(min=0)
    order = np.argsort(-held.sum(axis=0), kind="stable")
    top, rest = order[:most], order[most:]
    table: dict[Any, Any] = {"timestamp_epoch": start + step * np.arange(count, dtype="int64")}
    table |= {int(ids[column]): held[:, column].round(1) for column in top if held[:, column].any()}
    if held[:, rest].any():
        table[OTHERS] = held[:, rest].sum(axis=1).round(1)
    return pd.DataFrame(table)


def _from_ticks(engine: Engine, gpu_ids: Sequence[int], start: int, end: int) -> pd.DataFrame:
    """Pieces of constant memory: process_id, from, to, memory."""
    table = process_snapshots
    query = sa.select(
        table.c.process_id, table.c.gpu_id, table.c.timestamp_epoch, table.c.memory, table.c.present
    ).where(
        table.c.timestamp_epoch >= start - LOOK_BACK_S,
        table.c.timestamp_epoch <= end,
        table.c.gpu_id.in_(list(gpu_ids)),
    )
    with engine.connect() as connection:
        cursor = connection.execute(query).cursor
        rows = cursor.fetchall() if cursor is not None else []
    frame = pd.DataFrame(
        np.array(rows, dtype="float64").reshape(len(rows), 5),
        columns=["process_id", "gpu_id", "from", "memory", "present"],
    ).sort_values(["process_id", "gpu_id", "from"], kind="stable")
    # A row holds until its next one, and none for longer than they are apart at most.
    following = frame.groupby(["process_id", "gpu_id"], sort=False)["from"].shift(-1)
    frame["to"] = following.fillna(np.inf).clip(upper=frame["from"] + LOOK_BACK_S).clip(upper=end)
    there = (frame["present"] == 1) & frame["memory"].notna() & (frame["to"] > start)
    return frame[there].reset_index(drop=True)


def _from_hours(engine: Engine, gpu_ids: Sequence[int], start: int, end: int) -> pd.DataFrame:
    """Pieces of constant memory: process_id, from, to, memory."""
    hours = process_hours.c
    query = (
        sa.select(
            hours.process_id,
            hours.timestamp_epoch,
            sa.func.sum(hours.memory_mib_s).label("memory_mib_s"),
            sa.func.sum(hours.seconds).label("seconds"),
            process_gpus.c.first_seen,
            sa.case((process_gpus.c.active == 1, end), else_=process_gpus.c.last_seen).label("last_seen"),
        )
        .join(
            process_gpus,
            sa.and_(process_gpus.c.process_id == hours.process_id, process_gpus.c.gpu_id == hours.gpu_id),
        )
        .where(
            hours.timestamp_epoch > start - HOUR_S,
            hours.timestamp_epoch <= end,
            hours.gpu_id.in_(list(gpu_ids)),
        )
        .group_by(
            hours.process_id,
            hours.gpu_id,
            hours.timestamp_epoch,
            process_gpus.c.first_seen,
            process_gpus.c.last_seen,
            process_gpus.c.active,
        )
    )
    frame = fetch(engine, query).astype("float64")
    frame["memory"] = frame["memory_mib_s"] / frame["seconds"].where(frame["seconds"] > 0)
    frame["from"] = frame["timestamp_epoch"].clip(lower=frame["first_seen"])
    frame["to"] = (frame["timestamp_epoch"] + HOUR_S).clip(upper=frame["last_seen"] + 1)
    return frame[(frame["to"] > frame["from"]) & (frame["to"] > start) & frame["memory"].notna()].reset_index(
        drop=True
    )


def life(engine: Engine, process_id: int, points: int) -> tuple[pd.DataFrame, bool]:
    """One process over its life, in about `points` steps per GPU, and whether these are means of the hours.

    Columns: gpu_id, timestamp_epoch, and of each process metric its mean, `<metric>_min` and `<metric>_max`; the
    SM utilization of an hour is the busy time that was its part of the GPU's. Ticks are read where they are kept
    for all of it.
    """
    with engine.connect() as connection:
        span = connection.execute(
            sa.select(gpu_processes.c.first_seen, gpu_processes.c.last_seen).where(
                gpu_processes.c.id == process_id
            )
        ).first()
    if span is None or span.last_seen - span.first_seen > LIFE_FROM_TICKS_S:
        return _life_by_hours(engine, process_id), True
    ticks = process_life(engine, process_id)
    if ticks.empty:
        return _life_by_hours(engine, process_id), True
    step = max(1, (span.last_seen - span.first_seen) // max(1, points))
    bucket = ticks["timestamp_epoch"] - ticks["timestamp_epoch"] % step
    grouped = ticks.drop(columns="timestamp_epoch").groupby([ticks["gpu_id"], bucket.rename("timestamp_epoch")])
    keys = [metric.key for metric in PROCESS_METRICS]
    parts = {key: grouped[key].mean() for key in keys}
    parts |= {f"{key}_min": grouped[key].min() for key in keys} | {
        f"{key}_max": grouped[key].max() for key in keys
    }
    return pd.DataFrame(parts).reset_index(), False


def _life_by_hours(engine: Engine, process_id: int) -> pd.DataFrame:
    hours = process_hours.c
    query = (
        sa.select(
            hours.gpu_id,
            hours.timestamp_epoch,
            *(sa.func.sum(hours[name]).label(name) for name in ("seconds", "busy_s", "memory_mib_s")),
            sa.func.max(hours.max_memory).label("memory_max"),
        )
        .where(hours.process_id == process_id)
        .group_by(hours.gpu_id, hours.timestamp_epoch)
        .order_by(hours.gpu_id, hours.timestamp_epoch)
    )
    frame = fetch(engine, query).astype({"gpu_id": "int64", "timestamp_epoch": "int64"})
    seconds = frame["seconds"].astype("float64").where(lambda length: length > 0)
    frame["memory"] = frame.pop("memory_mib_s") / seconds
    frame["sm_utilization"] = 100 * frame.pop("busy_s") / seconds
    frame["memory_max"] = frame["memory_max"].astype("float64")
    for metric in PROCESS_METRICS:
        for name in (metric.key, f"{metric.key}_min", f"{metric.key}_max"):
            if name not in frame:
                frame[name] = frame.get(metric.key, np.nan)
    return frame.drop(columns="seconds")


def throttling(engine: Engine, gpu_id: int, start: int, end: int) -> pd.DataFrame:
    """Why a GPU's clocks were held down between `start` and `end`: one row per reason and stretch of time.

    Columns: reason (of metrics.CLOCKS_EVENT_REASONS), first, last (UTC seconds).
    """
    at, chosen = (
        gpu_changes.c.timestamp_epoch,
        sa.and_(gpu_changes.c.gpu_id == gpu_id, gpu_changes.c.metric == "clocks_event_reasons"),
    )
    before = sa.select(sa.func.max(at)).where(chosen, at <= start).scalar_subquery()
    query = (
        sa.select(at, gpu_changes.c.value)
        .where(chosen, at >= sa.func.coalesce(before, start), at <= end)
        .order_by(at)
    )
    changes = fetch(engine, query).to_numpy("float64")
    rows = []
    for reason in CLOCKS_EVENT_REASONS:
        since: float | None = None
        for moment, value in [*changes, (float(end), 0.0)]:
            on = not np.isnan(value) and bool(int(value) & reason.bit)
            if on and since is None:
                since = max(moment, start)
            elif not on and since is not None:
                rows.append((reason.label, int(since), int(moment)))
                since = None
    return pd.DataFrame(rows, columns=["reason", "first", "last"])
