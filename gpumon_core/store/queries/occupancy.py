"""Processes and models on the GPUs over time, for the lanes and areas under charts, as pandas DataFrames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from gpumon_core.metrics import CLOCKS_EVENT_REASONS
from gpumon_core.store.queries.current import ANSWERS
from gpumon_core.store.queries.frames import fetch
from gpumon_core.store.queries.history import GAP_STEPS, LABEL_S
from gpumon_core.store.schema import (
    gpu_changes,
    gpu_metrics,
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
# A range no longer than this is read from the ticks, a longer one from the hours.
FROM_TICKS_S = HOUR_S
# In a range no longer than this, processes are found by the hours of the ledger.
LONGEST_BY_HOURS_S = 8 * 24 * HOUR_S
OTHER_PROCESSES = -1
# Every process's state is written at least this often, with some room for a late tick: accounting.HEARTBEAT_S.
LOOK_BACK_S = 900


def lanes(
    engine: Engine, gpu_ids: Sequence[int], start: int, end: int, of: Literal["process", "model"], most: int
) -> pd.DataFrame:
    """The processes, or the models that servers had loaded, on some GPUs between `start` and `end` (UTC seconds):
    at most `most`, those that held most memory for longest.

    One row per process (or session) and GPU, the GPUs in the order given, then by time. Columns: gpu_id,
    process_id, first, last (UTC seconds), running, pid, name, username, workload, model, memory (MiB, its
    average), max_memory, share (of the GPU's memory, 0 to 1; NaN where not known), found (how many there are in
    all).
    """
    table = process_gpus if of == "process" else model_sessions
    running, last = _running(table), _last_seen(table)
    # What is drawn: from when to when within the range, and how much memory.
    begins = sa.case((table.c.first_seen > start, table.c.first_seen), else_=start)
    ends = sa.case((last < end, last), else_=end)
    weight = sa.func.coalesce(table.c.avg_memory, table.c.max_memory, 0) * (ends - begins + 1)
    place: sa.FromClause = table
    where: sa.FromClause = table
    if of == "process" and end - start <= LONGEST_BY_HOURS_S:
        where = _about(start, end)
        # With the sum SQLite does not read everything that ever was on these GPUs.
        same = sa.and_(table.c.process_id == where.c.process_id, table.c.gpu_id + 0 == where.c.gpu_id)
        place = where.join(table, same)
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
        .select_from(place)
        .join(gpus, gpus.c.id == where.c.gpu_id)
        .join(hosts, hosts.c.id == gpus.c.host_id)
        .where(where.c.gpu_id.in_(list(gpu_ids)), table.c.first_seen <= end, last >= start)
        # Equals have one order, or bars would come and go with every drawing.
        .order_by(weight.desc(), table.c.first_seen, table.c.process_id, table.c.gpu_id)
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
    order = {gpu_id: position for position, gpu_id in enumerate(gpu_ids)}
    frame = frame.assign(order=frame["gpu_id"].map(order)).sort_values(["order", "first", "process_id"])
    return frame.drop(columns=["order", "memory_total_mib"]).reset_index(drop=True)


def _about(start: int, end: int) -> sa.Subquery:
    """The processes and GPUs that run now, or have an hour of the ledger in the range. There is no index by
    last_seen, but the hours are in the order of time, and are stored as long as the processes."""
    hours = process_hours.c
    # The first tick of an hour is about the hour before, too.
    within = sa.and_(hours.timestamp_epoch > start - 2 * HOUR_S, hours.timestamp_epoch <= end)
    running = sa.select(process_gpus.c.process_id, process_gpus.c.gpu_id).where(process_gpus.c.active == 1)
    return running.union(sa.select(hours.process_id, hours.gpu_id).where(within)).subquery()


def _running(table: sa.Table) -> sa.ColumnElement[bool]:
    """Whether a row of process_gpus or model_sessions is of now. On a GPU that does not answer it is not known
    whether anything still runs."""
    return sa.and_(table.c.active == 1, ANSWERS)


def _last_seen(table: sa.Table) -> sa.ColumnElement[int]:
    """When it was last seen. A row of what still runs is updated now and then only: it was seen just now."""
    return sa.case((_running(table), hosts.c.last_seen), else_=table.c.last_seen)


def memory_by_process(
    engine: Engine, gpu_ids: Sequence[int], start: int, end: int, points: int, most: int
) -> pd.DataFrame:
    """The GPU memory of each process between `start` and `end`, summed over some GPUs, step by step.

    Columns: timestamp_epoch (the beginning of a step; all steps are of equal length), and one for each of the
    `most` largest processes, by its id, the largest first, and OTHER_PROCESSES where there are more; MiB as
    float64. A step has the memory that was held at its beginning. Within an hour, and where the ticks are still
    stored, the values are those of the ticks, and there are none where nothing was recorded. Otherwise they are
    the means of the hours, between the first and the last tick of a process.
    """
    step = max(1, -(-(end - start) // max(1, points)))
    count = max(1, -(-(end - start) // step))
    by_tick = end - start <= FROM_TICKS_S and ticks_are_stored(engine, start - LOOK_BACK_S)
    pieces = (_from_ticks if by_tick else _from_hours)(engine, gpu_ids, start, end)
    if not len(pieces):
        return pd.DataFrame({"timestamp_epoch": pd.Series(dtype="int64")})
    first = np.clip(np.ceil((pieces["from"].to_numpy() - start) / step), 0, count).astype("int64")
    last = np.clip(np.ceil((pieces["to"].to_numpy() - start) / step), 0, count).astype("int64")
    ids, columns = np.unique(pieces["process_id"].to_numpy("int64"), return_inverse=True)
    # A process that came and went between two steps is in the step in which it began, with its maximum.
    unseen = np.bincount(columns, weights=last - first)[columns] == 0
    brief = pieces[unseen].groupby(["process_id", "gpu_id"])["memory"].idxmax().to_numpy()
    first[brief] = np.clip(first[brief] - 1, 0, count - 1)
    last[brief] = first[brief] + 1
    memory = pieces["memory"].to_numpy()
    order = np.argsort(-np.bincount(columns, weights=memory * (last - first)), kind="stable")
    # All others share one column, the last.
    place = np.empty(len(ids), dtype="int64")
    place[order] = np.arange(len(ids)).clip(max=most)
    # What begins and what ends at each step: the sum up to a step is what is held in it.
    grid = np.zeros((count + 1, most + 1))
    np.add.at(grid, (first, place[columns]), memory)
    np.add.at(grid, (last, place[columns]), -memory)
    held = np.cumsum(grid[:count], axis=0).clip(min=0).round(1)
    names = [*(int(number) for number in ids[order[:most]]), *([OTHER_PROCESSES] if len(ids) > most else [])]
    table: dict[Any, Any] = {"timestamp_epoch": start + step * np.arange(count, dtype="int64")}
    return pd.DataFrame(table | {name: held[:, at] for at, name in enumerate(names) if held[:, at].any()})


def ticks_are_stored(engine: Engine, since: int) -> bool:
    """Whether every tick of processes from `since` on (UTC seconds) is still stored, and not only their hours."""
    oldest = sa.select(
        sa.select(sa.func.min(process_snapshots.c.timestamp_epoch)).scalar_subquery().label("tick"),
        sa.select(sa.func.min(gpu_processes.c.first_seen)).scalar_subquery().label("ever"),
    )
    with engine.connect() as connection:
        tick, ever = connection.execute(oldest).one()
    # The ledger is stored longer than the ticks: where both begin together, nothing was deleted.
    return tick is not None and (tick <= since or ever is None or tick <= ever)


def _numbers(engine: Engine, query: sa.Select[Any], names: Sequence[str]) -> pd.DataFrame:
    """The rows of a query of numbers, as float64: the driver's own tuples, many times faster than SQLAlchemy's."""
    with engine.connect() as connection:
        cursor = connection.execute(query).cursor
        rows = cursor.fetchall() if cursor is not None else []
    return pd.DataFrame(np.array(rows, dtype="float64").reshape(len(rows), len(names)), columns=list(names))


def _from_ticks(engine: Engine, gpu_ids: Sequence[int], start: int, end: int) -> pd.DataFrame:
    """Pieces of constant memory: process_id, gpu_id, from, to, memory."""
    table = process_snapshots.c
    query = sa.select(table.process_id, table.gpu_id, table.timestamp_epoch, table.memory, table.present).where(
        table.timestamp_epoch >= start - LOOK_BACK_S,
        table.timestamp_epoch <= end,
        table.gpu_id.in_(list(gpu_ids)),
    )
    frame = _numbers(engine, query, ("process_id", "gpu_id", "from", "memory", "present"))
    frame = frame.sort_values(["process_id", "gpu_id", "from"], kind="stable")
    # A row holds until the next one of its process on that GPU.
    frame["to"] = frame.groupby(["process_id", "gpu_id"], sort=False)["from"].shift(-1).fillna(np.inf)
    frame = frame[(frame["present"] == 1) & frame["memory"].notna()]
    # It also ends where the GPU has no ticks: in a gap nothing is known.
    frame = frame.merge(_ticked(engine, gpu_ids, start, end), on="gpu_id")
    frame["from"] = frame[["from", "since"]].max(axis=1)
    frame["to"] = frame[["to", "until"]].min(axis=1)
    return frame[(frame["to"] > frame["from"]) & (frame["to"] > start)].reset_index(drop=True)


def _ticked(engine: Engine, gpu_ids: Sequence[int], start: int, end: int) -> pd.DataFrame:
    """When GPUs were recorded without a gap: gpu_id, since, until (the second after the last tick)."""
    time = gpu_metrics.c.timestamp_epoch
    usual_ms = 1000 * GAP_STEPS * hosts.c.interval_s
    gpu: dict[str, Any] = {"partition_by": gpu_metrics.c.gpu_id, "order_by": time}
    ticks = (
        sa.select(
            gpu_metrics.c.gpu_id,
            time,
            (time - sa.func.lag(time).over(**gpu)).label("before"),
            (sa.func.lead(time).over(**gpu) - time).label("after"),
            gpu_metrics.c.recorded_ms.label("before_ms"),
            sa.func.lead(gpu_metrics.c.recorded_ms).over(**gpu).label("after_ms"),
        )
        .where(gpu_metrics.c.gpu_id.in_(list(gpu_ids)), time >= start - LOOK_BACK_S, time <= end)
        .subquery()
    )
    # A tick says how much time before it it covers; where it does not, the present interval is taken.
    begins, ends = (
        sa.case(
            (ticks.c[side].is_(None), 1),
            (1000 * ticks.c[side] > sa.func.coalesce(ticks.c[f"{side}_ms"] + 1000 * LABEL_S, usual_ms), 1),
            else_=0,
        )
        for side in ("before", "after")
    )
    query = (
        sa.select(ticks.c.gpu_id, ticks.c.timestamp_epoch, begins, ends)
        .join(gpus, gpus.c.id == ticks.c.gpu_id)
        .join(hosts, hosts.c.id == gpus.c.host_id)
        .where(sa.or_(begins == 1, ends == 1))
        .order_by(ticks.c.gpu_id, ticks.c.timestamp_epoch)
    )
    edges = _numbers(engine, query, ("gpu_id", "at", "begins", "ends"))
    # Each beginning is followed by its end, which may be the same tick.
    opened, closed = edges[edges["begins"] == 1], edges[edges["ends"] == 1]
    return pd.DataFrame(
        {
            "gpu_id": opened["gpu_id"].to_numpy(),
            "since": opened["at"].to_numpy(),
            "until": closed["at"].to_numpy() + 1,
        }
    )


def _from_hours(engine: Engine, gpu_ids: Sequence[int], start: int, end: int) -> pd.DataFrame:
    """Pieces of constant memory: process_id, gpu_id, from, to, memory."""
    hours = process_hours.c
    query = (
        sa.select(
            *(hours.process_id, hours.gpu_id, hour_of(hours.timestamp_epoch), hours.memory_mib_s, hours.seconds),
            *(process_gpus.c.first_seen, _last_seen(process_gpus)),
        )
        .join(
            process_gpus,
            sa.and_(process_gpus.c.process_id == hours.process_id, process_gpus.c.gpu_id == hours.gpu_id),
        )
        .join(gpus, gpus.c.id == hours.gpu_id)
        .join(hosts, hosts.c.id == gpus.c.host_id)
        .where(
            hours.timestamp_epoch > start - HOUR_S,
            hours.timestamp_epoch <= end,
            hours.gpu_id.in_(list(gpu_ids)),
        )
    )
    names = ("process_id", "gpu_id", "hour", "memory_mib_s", "seconds", "first_seen", "last_seen")
    frame = _numbers(engine, query, names)
    # The ledger has two rows an hour, and one more where the process began to run another program.
    same = ["process_id", "gpu_id", "hour"]
    if frame.duplicated(same).any():
        first = dict.fromkeys(("first_seen", "last_seen"), "first")
        frame = frame.groupby(same, as_index=False).agg({"memory_mib_s": "sum", "seconds": "sum"} | first)
    frame["memory"] = frame["memory_mib_s"] / frame["seconds"].where(frame["seconds"] > 0)
    frame["from"] = frame["hour"].clip(lower=frame["first_seen"])
    frame["to"] = (frame["hour"] + HOUR_S).clip(upper=frame["last_seen"] + 1)
    there = (frame["to"] > frame["from"]) & (frame["to"] > start) & (frame["from"] <= end)
    return frame[there & frame["memory"].notna()].reset_index(drop=True)


def hour_of(moment: sa.ColumnElement[int]) -> sa.ColumnElement[int]:
    """The first second of the hour. Without a parameter, or PostgreSQL could not group by it."""
    return moment - moment % sa.literal_column(str(HOUR_S), sa.BigInteger)


def throttling(engine: Engine, gpu_id: int, start: int, end: int) -> pd.DataFrame:
    """Why a GPU's clocks were not higher between `start` and `end`: one row per reason and period.

    Columns: reason (of metrics.CLOCKS_EVENT_REASONS), first, last (UTC seconds). There are no rows for the time
    after the GPU's newest tick.
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
    with engine.connect() as connection:
        ticks = sa.select(sa.func.max(gpu_metrics.c.timestamp_epoch)).where(gpu_metrics.c.gpu_id == gpu_id)
        # The ticks of a GPU that has been gone for long are deleted.
        known = sa.func.coalesce(ticks.scalar_subquery(), gpus.c.last_seen)
        newest = connection.execute(sa.select(known).where(gpus.c.id == gpu_id)).scalar()
    until = min(end, start if newest is None else int(newest))
    rows = []
    for reason in CLOCKS_EVENT_REASONS:
        since: float | None = None
        for moment, value in [*changes, (float(until), 0.0)]:
            on = not np.isnan(value) and bool(int(value) & reason.bit)
            if on and since is None:
                since = max(moment, start)
            elif not on and since is not None:
                if moment >= since:
                    rows.append((reason.label, int(since), int(moment)))
                since = None
    return pd.DataFrame(rows, columns=["reason", "first", "last"])
