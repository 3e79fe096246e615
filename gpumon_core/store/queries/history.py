"""The history of metrics: any range of time, in any number of points, as a pandas DataFrame."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from gpumon_core.metrics import GPU_METRICS_BY_KEY, Aggregate, Metric
from gpumon_core.store.queries.resolution import RangePart, Resolution, pieces
from gpumon_core.store.schema import gpu_changes, gpu_metrics, gpus, known_ms, scale

# A pause longer than this many usual steps is a gap, not a late tick; a bucket of a rollup is never late.
GAP_STEPS = 3
GAP_BUCKETS = 1.9
# Marks a point that was measured; a gap has NaN here.
MEASURED = "measured"
# The time that the longest row of a point covers, ms.
RECORDED = "recorded_ms"
# Times of ticks are whole seconds: two ticks may seem to be further apart by up to this much.
LABEL_S = 1.5


def metrics_history(
    engine: Engine, gpu_ids: Iterable[int], metrics: Sequence[str], start: int, end: int, points: int
) -> pd.DataFrame:
    """The metrics of some GPUs from `start` to `end` (UTC seconds), in at most about `points` steps per GPU, and
    in at least half as many where there are enough ticks.

    Columns: gpu_id, timestamp_epoch (the middle of the step; the tick itself where a step holds one tick), and
    for each metric its mean, `<metric>_min` and `<metric>_max`, as float64. Of a counter that is its growth since
    the step before, of a metric that is stored when it changes its newest value. A step without ticks has no row.
    A gap in the recording is one row of NaN, so that a line drawn through the frame breaks there. Raises
    ValueError for a metric that the catalogue lacks, sqlalchemy.exc.DBAPIError.
    """
    unknown = set(metrics) - set(GPU_METRICS_BY_KEY)
    if unknown:
        raise ValueError(f"not in the catalogue: {', '.join(sorted(unknown))}")
    wanted = [GPU_METRICS_BY_KEY[key] for key in metrics]
    ticked = [metric for metric in wanted if metric.stored == "tick"]
    changing = [metric for metric in wanted if metric.stored == "change"]
    counters = [metric for metric in ticked if metric.aggregate is Aggregate.COUNTER]
    ids = sorted({int(gpu_id) for gpu_id in gpu_ids})
    columns = ["gpu_id", "timestamp_epoch", *(m.key + s for m in wanted for s in ("", "_min", "_max"))]
    points = max(1, points)
    if not ids or end < start:
        return _typed(pd.DataFrame(columns=columns))
    with engine.connect() as connection:
        read, interval_s = pieces(connection, ids, start, end, points)
        parts = [(piece, _query(connection, piece, ids, ticked, interval_s, end)) for piece in read]
        frames = [_with_gaps(frame, piece) for piece, frame in parts if len(frame)]
        if not frames:
            return _typed(pd.DataFrame(columns=columns))
        frame = pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]
        if len(frames) > 1:
            frame = frame.sort_values(["gpu_id", "timestamp_epoch"], ignore_index=True, kind="stable")
        for metric in counters:
            _difference(frame, metric.key, _values_at(connection, metric, ids, start, read[0].resolution))
        if changing:
            # A point that is a tick is a moment; every other point covers a step.
            width = max(0 if p.resolution.is_raw and not _is_grouped(p) else p.step_s for p in read)
            frame = _with_changes(connection, frame, ids, changing, start, end, width)
    return _typed(frame[columns])


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """The promised dtypes. A frame with rows has them already, except for its keys."""
    keys = dict.fromkeys(("gpu_id", "timestamp_epoch"), "int64")
    if frame.empty:
        return frame.astype(dict.fromkeys(frame.columns, "float64") | keys)
    for key in keys:
        frame[key] = frame[key].astype("int64")
    return frame


def _is_grouped(piece: RangePart) -> bool:
    """Whether a point is made of several rows."""
    return piece.step_s > piece.resolution.seconds


def _query(
    connection: Connection,
    piece: RangePart,
    ids: list[int],
    metrics: Sequence[Metric],
    interval_s: float,
    end: int,
) -> pd.DataFrame:
    resolution, step = piece.resolution, piece.step_s
    table = resolution.table
    time = table.c.timestamp_epoch
    start = piece.start
    if not resolution.is_raw:
        # The bucket in which the range begins belongs to it.
        start -= start % int(resolution.seconds)
    grouped = _is_grouped(piece)
    bucket = time - time % step if grouped else time
    columns: list[Any] = [table.c.gpu_id, bucket]
    names = ["gpu_id", "timestamp_epoch"]
    if grouped and resolution.is_raw:
        # Where a step holds one tick, its time is that of the tick.
        columns[1] = (sa.func.min(time) + sa.func.max(time)) / 2
    # The place of each name's numbers in the result: equal columns are fetched once.
    places = [0, 1]
    for metric in metrics:
        for column, suffix in zip(_columns(metric, table, grouped, interval_s), ("", "_min", "_max"), strict=True):
            if column is not None:
                columns.append(column)
            names.append(metric.key + suffix)
            places.append(len(columns) - 1)
    recorded_ms = table.c.recorded_ms
    columns.append(sa.func.max(recorded_ms) if grouped else recorded_ms)
    names.append(RECORDED)
    places.append(len(columns) - 1)
    query = sa.select(*columns).where(table.c.gpu_id.in_(ids), time >= start, time <= piece.end)
    if not resolution.is_raw and end > start:
        # A bucket that begins where the range ends is not in it.
        query = query.where(time < end)
    if grouped:
        query = query.group_by(table.c.gpu_id, bucket)
    # The driver's own tuples, and one array of numbers for everything: many times faster than rows
    # of SQLAlchemy's and a column of objects each.
    cursor = connection.execute(query).cursor
    rows = cursor.fetchall() if cursor is not None else []
    array = np.array(rows, dtype="float64").reshape(len(rows), len(columns))
    if len(rows):
        array = array[np.lexsort((array[:, 1], array[:, 0]))]
    frame = pd.DataFrame(array[:, places], columns=names)
    frame[MEASURED] = 1.0
    if not resolution.is_raw:
        for metric in metrics:
            if metric.decimals:
                keys = [metric.key, f"{metric.key}_min", f"{metric.key}_max"]
                frame[keys] /= scale(metric)
        middle = frame["timestamp_epoch"] + step // 2
        frame["timestamp_epoch"] = middle.clip(piece.start, end)
    return frame


def _columns(metric: Metric, table: sa.Table, grouped: bool, interval_s: float) -> list[Any]:
    """Mean, minimum and maximum of a metric; of a counter, three times its value at the end. None means the column
    before it again."""
    mean = table.c[metric.key]
    raw = table is gpu_metrics
    if metric.aggregate is Aggregate.COUNTER:
        return [sa.func.max(mean) if grouped else mean, None, None]
    peak = sa.func.coalesce(table.c[metric.peak], mean) if metric.peak and raw else None
    if raw and not grouped:
        return [mean, None, peak]
    lowest: Any = mean if raw else table.c[f"{metric.key}_min"]
    highest: Any = (mean if peak is None else peak) if raw else table.c[f"{metric.key}_max"]
    if not grouped:
        return [mean, lowest, highest]
    # Means are weighted by the time in which there was a value.
    usual_ms: Any = sa.literal_column(str(round(1000 * interval_s)))
    weight = sa.func.coalesce(table.c.recorded_ms, usual_ms if raw else table.c.samples * usual_ms)
    if not raw:
        weight = sa.func.coalesce(table.c[known_ms(metric)], weight)
    known = sa.func.sum(sa.case((mean.is_not(None), weight)))
    average = sa.func.sum(mean * weight) * 1.0 / sa.func.nullif(known, 0)
    return [average, sa.func.min(lowest), sa.func.max(highest)]


def _with_gaps(frame: pd.DataFrame, piece: RangePart) -> pd.DataFrame:
    """Add a row of NaN wherever a GPU's rows are much further apart than usual."""
    if len(frame) < 2:
        return frame
    resolution, step = piece.resolution, piece.step_s
    times, owners = frame["timestamp_epoch"].to_numpy(), frame["gpu_id"].to_numpy()
    distance = np.diff(times, prepend=np.nan)
    distance[np.diff(owners, prepend=np.nan) != 0] = np.nan
    usual = max(float(step), float(np.nanmedian(distance)) if np.isfinite(distance).any() else 0.0)
    allowed = (GAP_STEPS if resolution.is_raw else GAP_BUCKETS) * usual
    # Rows of older versions do not say how much time they cover.
    own = np.maximum(frame[RECORDED].to_numpy() / 1000 + step + LABEL_S, GAP_BUCKETS * step)
    wide = np.flatnonzero(distance > np.where(np.isnan(own), allowed, own))
    if not len(wide):
        return frame
    breaks = pd.DataFrame({"gpu_id": owners[wide], "timestamp_epoch": times[wide] - distance[wide] / 2})
    joined = pd.concat([frame, breaks], ignore_index=True)
    return joined.sort_values(["gpu_id", "timestamp_epoch"], ignore_index=True, kind="stable")


def _values_at(
    connection: Connection, metric: Metric, ids: list[int], start: int, resolution: Resolution
) -> dict[int, float]:
    """The value of a counter at the beginning of a range, by the GPU's id.

    In a pause it is taken to have grown evenly; before a GPU was first seen it was 0.
    """
    # A bucket has the value of the counter at its end.
    length = 0 if resolution.is_raw else int(resolution.seconds)
    first = start - start % max(1, length)
    before, after = resolution.table.alias("before"), resolution.table.alias("after")

    def edge(which: Any, table: Any, where: Any) -> Any:
        time = resolution.table.c.timestamp_epoch
        newest = sa.select(which(time)).where(resolution.table.c.gpu_id == gpus.c.id, where(time))
        return sa.and_(table.c.gpu_id == gpus.c.id, table.c.timestamp_epoch == newest.scalar_subquery())

    key = metric.key
    query = (
        sa.select(
            *(gpus.c.id, gpus.c.first_seen, before.c.timestamp_epoch, before.c[key]),
            *(after.c.timestamp_epoch, after.c[key]),
        )
        .select_from(gpus)
        .outerjoin(before, edge(sa.func.max, before, lambda time: time < first))
        .outerjoin(after, edge(sa.func.min, after, lambda time: time >= first))
        .where(gpus.c.id.in_(ids))
    )
    found: dict[int, float] = {}
    for gpu_id, first_seen, then, value, later, later_value in connection.execute(query):
        if value is None:
            if later_value is not None:
                found[gpu_id] = 0.0 if first_seen >= later - length else float(later_value)
        elif later_value is None or later <= then:
            found[gpu_id] = float(value)
        else:
            part = max(0.0, first - length - then) / (later - then)
            found[gpu_id] = value + (later_value - value) * min(1.0, part)
    return found


def _difference(frame: pd.DataFrame, key: str, before: Mapping[int, float]) -> None:
    """Turn a counter into its growth since the point before, at the first point since `before`: its value then."""
    # Where the clock was set back, rows of different times are side by side; but a counter only grows.
    so_far = frame[key].groupby(frame["gpu_id"]).cummax().groupby(frame["gpu_id"]).ffill()
    earlier = so_far.groupby(frame["gpu_id"]).shift()
    earlier = earlier.fillna(frame["gpu_id"].map(before))
    grown = (so_far - earlier).where(frame[key].notna()).clip(lower=0)
    for suffix in ("", "_min", "_max"):
        frame[key + suffix] = grown


def _with_changes(
    connection: Connection,
    frame: pd.DataFrame,
    ids: list[int],
    metrics: Sequence[Metric],
    start: int,
    end: int,
    step: int,
) -> pd.DataFrame:
    """The frame with metrics that are stored when they change: at each point the value that held then."""
    keys = [metric.key for metric in metrics]
    chosen = sa.and_(gpu_changes.c.gpu_id.in_(ids), gpu_changes.c.metric.in_(keys))
    before = (
        sa.select(
            gpu_changes.c.gpu_id, gpu_changes.c.metric, sa.func.max(gpu_changes.c.timestamp_epoch).label("at")
        )
        .where(chosen, gpu_changes.c.timestamp_epoch <= start - step)
        .group_by(gpu_changes.c.gpu_id, gpu_changes.c.metric)
        .subquery()
    )
    query = (
        sa.select(gpu_changes)
        .outerjoin(
            before, sa.and_(before.c.gpu_id == gpu_changes.c.gpu_id, before.c.metric == gpu_changes.c.metric)
        )
        .where(
            chosen,
            gpu_changes.c.timestamp_epoch <= end,
            gpu_changes.c.timestamp_epoch >= sa.func.coalesce(before.c.at, start - step),
        )
        .order_by(gpu_changes.c.gpu_id, gpu_changes.c.metric, gpu_changes.c.timestamp_epoch)
    )
    series: dict[tuple[int, str], tuple[list[int], list[float]]] = {}
    for gpu_id, metric, at, value in connection.execute(query):
        times, values = series.setdefault((gpu_id, metric), ([], []))
        times.append(at)
        values.append(np.nan if value is None else value)
    owners, moments = frame["gpu_id"].to_numpy(), frame["timestamp_epoch"].to_numpy()
    half = step / 2
    known = frame[MEASURED].notna().to_numpy()
    places = {gpu_id: np.flatnonzero(owners == gpu_id) for gpu_id in ids}
    columns: dict[str, np.ndarray[Any, Any]] = {}
    for key in keys:
        result = np.full((3, len(frame)), np.nan)
        for gpu_id, mine in places.items():
            times, values = series.get((gpu_id, key), ([], []))
            if times and len(mine):
                result[:, mine] = _held(np.array(times), np.array(values), moments[mine], half)
        result[:, ~known] = np.nan
        columns |= {key + suffix: row for row, suffix in zip(result, ("", "_min", "_max"), strict=True)}
    # Added one by one, many columns would fragment the frame, and pandas would warn.
    return pd.concat([frame, pd.DataFrame(columns, index=frame.index)], axis=1)


def _held(
    changed: np.ndarray[Any, Any], values: np.ndarray[Any, Any], moments: np.ndarray[Any, Any], half: float
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The value that held `half` seconds after each moment, and the least and the greatest value since `half`
    seconds before it; NaN before the first change. Shape: 3, moments."""
    first = np.searchsorted(changed, moments - half, "right") - 1
    last = np.searchsorted(changed, moments + half, "right") - 1
    found = np.where(last >= 0, values[last], np.nan)
    held = np.array([found, found, found])
    # Most points lie between two changes.
    for place in np.flatnonzero((last > first) & (last >= 0)):
        window = values[max(0, first[place]) : last[place] + 1]
        held[1:, place] = window.min(), window.max()
    return held
