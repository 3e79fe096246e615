"""Reads the history, as pandas DataFrames.

Every function takes an engine from `database.open_for_reading`. Times in frames are integer UTC
seconds; a page turns them into the viewer's time zone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from gpumon_core.metrics import GPU_METRICS, GPU_METRICS_BY_KEY
from gpumon_core.store.schema import (
    gpu_metrics,
    gpu_processes,
    gpus,
    hosts,
    process_gpus,
    process_snapshots,
)

# A pause longer than this many usual steps is a gap, not a late tick.
GAP_STEPS = 3


def _frame(engine: Engine, query: sa.Select[tuple[object, ...]]) -> pd.DataFrame:
    with engine.connect() as connection:
        result = connection.execute(query)
        columns = list(result.keys())
        return pd.DataFrame.from_records(result.all(), columns=columns)


def host_table(engine: Engine) -> pd.DataFrame:
    """One row per host, by name: the columns of `hosts`."""
    return _frame(engine, sa.select(hosts).order_by(hosts.c.name))


def gpu_table(engine: Engine) -> pd.DataFrame:
    """One row per GPU that is not gone, in the driver's order: the columns of `gpus`, `host`,
    `host_last_seen`, and the catalogue's metrics at the GPU's newest tick (NaN where not offered)."""
    query = (
        sa.select(
            gpus,
            hosts.c.name.label("host"),
            hosts.c.last_seen.label("host_last_seen"),
            *(gpu_metrics.c[metric.key] for metric in GPU_METRICS),
        )
        .join(hosts, hosts.c.id == gpus.c.host_id)
        .outerjoin(
            gpu_metrics,
            sa.and_(gpu_metrics.c.gpu_id == gpus.c.id, gpu_metrics.c.timestamp_epoch == gpus.c.last_seen),
        )
        .where(gpus.c.state != "gone")
        .order_by(hosts.c.name, gpus.c.gpu_index, sa.func.coalesce(gpus.c.mig_index, -1))
    )
    frame = _frame(engine, query)
    keys = [metric.key for metric in GPU_METRICS]
    frame[keys] = frame[keys].astype("float64")
    return frame


def history(
    engine: Engine, gpu_ids: Iterable[int], metrics: Sequence[str], start: int, end: int, points: int
) -> pd.DataFrame:
    """The metrics of some GPUs from `start` to `end`, in at most about `points` steps per GPU.

    Columns: gpu_id, timestamp_epoch (the middle of the step; the tick itself where a step holds
    one tick), and for each metric its mean, `<metric>_min` and `<metric>_max`, as float64. A step
    without ticks has no row; a gap in the recording is one row of NaN, so that a line drawn
    through the frame breaks there.
    """
    unknown = set(metrics) - set(GPU_METRICS_BY_KEY)
    if unknown:
        raise ValueError(f"not in the catalogue: {', '.join(sorted(unknown))}")
    ids = list(gpu_ids)
    step = max(1, -(-(end - start) // max(1, points)))
    time = gpu_metrics.c.timestamp_epoch
    # Steps stand still on the clock, so that a live chart moves instead of wobbling.
    bucket = time - time % step
    middle = (sa.func.min(time) + sa.func.max(time)) / 2
    query = (
        sa.select(
            gpu_metrics.c.gpu_id,
            middle.label("timestamp_epoch"),
            *(
                function(gpu_metrics.c[key]).label(key + suffix)
                for key in metrics
                for function, suffix in ((sa.func.avg, ""), (sa.func.min, "_min"), (sa.func.max, "_max"))
            ),
        )
        .where(gpu_metrics.c.gpu_id.in_(ids), time >= start, time <= end)
        .group_by(gpu_metrics.c.gpu_id, bucket)
        .order_by(gpu_metrics.c.gpu_id, sa.literal_column("2"))
    )
    frame = _frame(engine, query)
    values = [column for column in frame.columns if column not in ("gpu_id", "timestamp_epoch")]
    frame[values] = frame[values].astype("float64")
    frame["timestamp_epoch"] = frame["timestamp_epoch"].astype("int64")
    return _with_gaps(frame, step)


def _with_gaps(frame: pd.DataFrame, step: int) -> pd.DataFrame:
    """Add a row of NaN wherever a GPU's rows lie much further apart than they usually do."""
    if len(frame) < 2:
        return frame
    distance = frame["timestamp_epoch"].diff().where(frame["gpu_id"].eq(frame["gpu_id"].shift()))
    usual = distance.groupby(frame["gpu_id"]).transform("median").clip(lower=step)
    gaps = frame.loc[distance > GAP_STEPS * usual, ["gpu_id", "timestamp_epoch"]]
    if gaps.empty:
        return frame
    before = (gaps["timestamp_epoch"] - distance[gaps.index] / 2).astype("int64")
    breaks = gaps.assign(timestamp_epoch=before)
    return pd.concat([frame, breaks]).sort_values(["gpu_id", "timestamp_epoch"], ignore_index=True)


def active_processes(engine: Engine) -> pd.DataFrame:
    """The processes of every host's newest tick, one row per process and GPU, most memory first.

    Columns: process_id, gpu_id, host, gpu_index, mig_index, gpu_name, memory_total_mib, pid, name,
    username, kind, memory (MiB), first_seen, last_seen, max_memory, avg_memory (MiB), sample_count.
    """
    query = (
        sa.select(
            process_snapshots.c.process_id,
            process_snapshots.c.gpu_id,
            hosts.c.name.label("host"),
            gpus.c.gpu_index,
            gpus.c.mig_index,
            gpus.c.name.label("gpu_name"),
            gpus.c.memory_total_mib,
            gpu_processes.c.pid,
            gpu_processes.c.name,
            gpu_processes.c.username,
            process_gpus.c.kind,
            process_snapshots.c.memory,
            process_gpus.c.first_seen,
            process_gpus.c.last_seen,
            process_gpus.c.max_memory,
            process_gpus.c.avg_memory,
            process_gpus.c.sample_count,
        )
        .select_from(hosts)
        .join(process_snapshots, process_snapshots.c.timestamp_epoch == hosts.c.last_seen)
        .join(gpus, sa.and_(gpus.c.id == process_snapshots.c.gpu_id, gpus.c.host_id == hosts.c.id))
        .join(gpu_processes, gpu_processes.c.id == process_snapshots.c.process_id)
        .join(
            process_gpus,
            sa.and_(
                process_gpus.c.process_id == process_snapshots.c.process_id,
                process_gpus.c.gpu_id == process_snapshots.c.gpu_id,
            ),
        )
        .order_by(sa.func.coalesce(process_snapshots.c.memory, 0).desc(), gpu_processes.c.pid)
    )
    return _numbers(_frame(engine, query), "memory", "max_memory", "avg_memory", "memory_total_mib", "mig_index")


def process_history(
    engine: Engine,
    gpu_ids: Sequence[int] | None = None,
    text: str = "",
    users: Sequence[str] | None = None,
    start: int | None = None,
    end: int | None = None,
    limit: int | None = None,
) -> pd.DataFrame:
    """The ledger, newest first: one row per process that was seen between `start` and `end`.

    `gpu_ids` and `users` keep what is in them (None keeps all); `text` is looked for in the name,
    case-insensitively, and compared with the PID. Columns: process_id, host, gpus (a text such as
    "0, 3"), pid, name, username, kind, first_seen, last_seen, lifetime_s, max_memory, avg_memory
    (MiB, summed over the process's GPUs), sample_count, running (bool).
    """
    conditions: list[sa.ColumnElement[bool]] = []
    if gpu_ids is not None:
        used = sa.select(process_gpus.c.process_id).where(process_gpus.c.gpu_id.in_(list(gpu_ids)))
        conditions.append(gpu_processes.c.id.in_(used))
    if users is not None:
        conditions.append(gpu_processes.c.username.in_(list(users)))
    if start is not None:
        conditions.append(gpu_processes.c.last_seen >= start)
    if end is not None:
        conditions.append(gpu_processes.c.first_seen <= end)
    if text := text.strip():
        matches = gpu_processes.c.name.icontains(text, autoescape=True)
        if text.isdecimal():
            matches = sa.or_(matches, sa.cast(gpu_processes.c.pid, sa.Text) == str(int(text)))
        conditions.append(matches)
    chosen = (
        sa.select(
            gpu_processes.c.id.label("process_id"),
            hosts.c.name.label("host"),
            gpu_processes.c.pid,
            gpu_processes.c.name,
            gpu_processes.c.username,
            gpu_processes.c.first_seen,
            gpu_processes.c.last_seen,
            (gpu_processes.c.last_seen - gpu_processes.c.first_seen).label("lifetime_s"),
            gpu_processes.c.max_memory,
            gpu_processes.c.avg_memory,
            gpu_processes.c.sample_count,
            (gpu_processes.c.last_seen == hosts.c.last_seen).label("running"),
        )
        .join(hosts, hosts.c.id == gpu_processes.c.host_id)
        .where(*conditions)
        .order_by(gpu_processes.c.first_seen.desc(), gpu_processes.c.id.desc())
    )
    if limit is not None:
        chosen = chosen.limit(limit)
    frame = _frame(engine, chosen)
    places = _frame(
        engine,
        sa.select(process_gpus.c.process_id, process_gpus.c.kind, gpus.c.gpu_index, gpus.c.mig_index)
        .join(gpus, gpus.c.id == process_gpus.c.gpu_id)
        .where(process_gpus.c.process_id.in_(sa.select(chosen.subquery().c.process_id)))
        .order_by(process_gpus.c.process_id, gpus.c.gpu_index, gpus.c.mig_index),
    )
    labels = gpu_labels(places["gpu_index"], places["mig_index"])
    grouped = places.assign(label=labels).groupby("process_id", sort=False)
    texts = grouped.agg(gpus=("label", ", ".join), kind=("kind", _join_kinds))
    frame = frame.merge(texts, how="left", left_on="process_id", right_index=True)
    frame["running"] = frame["running"].astype(bool)
    return _numbers(frame, "max_memory", "avg_memory")


def usernames(engine: Engine) -> list[str]:
    """Every user in the ledger, by name."""
    query = sa.select(gpu_processes.c.username).where(gpu_processes.c.username.is_not(None)).distinct()
    with engine.connect() as connection:
        return sorted(connection.execute(query).scalars())


def gpu_labels(index: pd.Series, mig_index: pd.Series) -> pd.Series:
    """How a GPU is called where space is short: "3", or "3:1" for its MIG instance 1."""
    instance = mig_index.map(lambda number: "" if pd.isna(number) else f":{int(number)}")
    return index.astype(str) + instance.astype(str)


def _join_kinds(kinds: Iterable[str]) -> str:
    letters = {letter for kind in kinds for letter in kind.split("+")}
    return "+".join(letter for letter in "MCG" if letter in letters)


def _numbers(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Columns that may hold NULL, as float64 with NaN."""
    frame[list(columns)] = frame[list(columns)].astype("float64")
    return frame
