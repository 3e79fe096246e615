"""Metrics over any range of time, at any number of points, from the resolution that fits.

Ticks and rollups are the same story told at different lengths. A range is read from the coarsest
one that still gives half of the points asked for; where that one does not reach (its rows have been
forgotten, or not been made yet) the next coarser or finer one stands in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from gpumon_core.metrics import GPU_METRICS_BY_KEY, Aggregate, Metric
from gpumon_core.store.schema import TIERS, gpu_changes, gpu_metrics, gpus, hosts, known_ms, scale

# A pause longer than this many usual steps is a gap, not a late tick; a bucket of a rollup is never late.
GAP_STEPS = 3
GAP_BUCKETS = 1.9
# So many rows of a GPU tell well enough how much of a range was recorded.
COUNTED = 60
# Ticks that lie so many times closer than the interval says are from a time when it was shorter.
DENSER = 1.5
# A range of few points is read from at least so many rows of a GPU: what they reach beyond it is little then.
FEWEST_ROWS = 200
# Marks a point that was measured; a gap has NaN there.
THERE = "there"
# The time that a point's longest row speaks of, ms.
RECORDED = "recorded_ms"
# Times of ticks are whole seconds: two may seem to lie further apart by so much.
LABEL_S = 1.5


# Every chart asks for it, so that it is put together once: of each GPU when each table's rows begin and end.
_TABLES = [gpu_metrics, *(tier.table for tier in TIERS)]
_EDGES = (
    sa.select(
        hosts.c.interval_s,
        *(
            sa.select(edge(table.c.timestamp_epoch)).where(table.c.gpu_id == gpus.c.id).scalar_subquery()
            for table in _TABLES
            for edge in (sa.func.min, sa.func.max)
        ),
    )
    .join(hosts, hosts.c.id == gpus.c.host_id)
    .where(gpus.c.id.in_(sa.bindparam("ids", expanding=True)))
)


@dataclass(frozen=True, slots=True)
class _Resolution:
    """A table, the seconds between its rows, and the time for which it has rows."""

    table: sa.Table
    seconds: float
    first: int | None
    last: int | None

    @property
    def raw(self) -> bool:
        return self.table is gpu_metrics


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A piece of the range and where it is read from."""

    resolution: _Resolution
    start: int
    end: int


def read(
    engine: Engine, gpu_ids: Iterable[int], metrics: Sequence[str], start: int, end: int, points: int
) -> pd.DataFrame:
    """See frames.history."""
    unknown = set(metrics) - set(GPU_METRICS_BY_KEY)
    if unknown:
        raise ValueError(f"not in the catalogue: {', '.join(sorted(unknown))}")
    wanted = [GPU_METRICS_BY_KEY[key] for key in metrics]
    ticked = [metric for metric in wanted if metric.kept == "tick"]
    changing = [metric for metric in wanted if metric.kept == "change"]
    counters = [metric for metric in ticked if metric.aggregate is Aggregate.COUNTER]
    ids = sorted({int(gpu_id) for gpu_id in gpu_ids})
    columns = ["gpu_id", "timestamp_epoch", *(m.key + s for m in wanted for s in ("", "_min", "_max"))]
    points = max(1, points)
    if not ids or end < start:
        return _typed(pd.DataFrame(columns=columns))
    with engine.connect() as connection:
        resolutions = _resolutions(connection, ids)
        interval_s = resolutions[0].seconds
        told = _told(connection, resolutions, ids, start, end)
        chosen = _choose(resolutions, told, points)
        if resolutions[chosen].raw:
            resolutions[chosen] = _as_dense_as_they_are(connection, resolutions[chosen], ids, start, end, told)
            chosen = _choose(resolutions, told, points)
        parts = []
        for stretch in _stretches(resolutions, chosen, start, end):
            step = _step(stretch.resolution, told, points)
            part = _query(connection, stretch, ids, ticked, step, interval_s, end)
            parts.append((part, stretch.resolution, step))
        frames = [_with_gaps(frame, resolution, step) for frame, resolution, step in parts if len(frame)]
        if not frames:
            return _typed(pd.DataFrame(columns=columns))
        frame = pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]
        if len(frames) > 1:
            frame = frame.sort_values(["gpu_id", "timestamp_epoch"], ignore_index=True, kind="stable")
        for metric in counters:
            _difference(frame, metric.key, _stood_at(connection, metric, ids, start, parts[0][1]))
        if changing:
            # A point that is a tick is a moment; the others speak of a stretch of time.
            width = max(0 if r.raw and step <= r.seconds else step for _, r, step in parts)
            frame = _with_changes(connection, frame, ids, changing, start, end, width)
    return _typed(frame[columns])


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Numbers as they are promised; a frame of rows has them already but for its keys."""
    keys = dict.fromkeys(("gpu_id", "timestamp_epoch"), "int64")
    if frame.empty:
        return frame.astype(dict.fromkeys(frame.columns, "float64") | keys)
    for key in keys:
        frame[key] = frame[key].astype("int64")
    return frame


def _resolutions(connection: Connection, ids: list[int]) -> list[_Resolution]:
    """All of them, finest first, with the time that each has rows for."""
    rows = connection.execute(_EDGES, {"ids": ids}).all()
    interval = min((row[0] for row in rows), default=1.0)
    found = []
    for place, table in enumerate(_TABLES):
        firsts = [row[1 + 2 * place] for row in rows if row[1 + 2 * place] is not None]
        lasts = [row[2 + 2 * place] for row in rows if row[2 + 2 * place] is not None]
        seconds = interval if place == 0 else TIERS[place - 1].seconds
        found.append(_Resolution(table, seconds, min(firsts, default=None), max(lasts, default=None)))
    return found


def _told(connection: Connection, resolutions: list[_Resolution], ids: list[int], start: int, end: int) -> int:
    """The seconds of the range that there is something to tell of: an installation of yesterday, or a machine that
    is on for two hours a day, gets as many points out of a long range as one that always ran."""
    ticks = resolutions[0]
    fresh = 0
    if ticks.first is not None and ticks.last is not None:
        fresh = max(0, min(end, ticks.last) - max(start, ticks.first) + 1)
    told = fresh
    # Where the first bucket of the tier before ends.
    reach = None
    # Buckets that a range has few of tell little of its pauses.
    telling = [r for r in resolutions[1:] if COUNTED * r.seconds <= end - start] or resolutions[1:2]
    for counted in reversed(telling):
        if counted.first is None or counted.last is None:
            continue
        if reach is not None and counted.first >= max(start, reach):
            # What is told only coarsely can only be counted so.
            break
        length = int(counted.seconds)
        reach = counted.first + length
        time = counted.table.c.timestamp_epoch
        rows = (
            sa.select(sa.func.count().label("rows"))
            .where(counted.table.c.gpu_id.in_(ids), time > start - length, time <= end)
            .group_by(counted.table.c.gpu_id)
            .subquery()
        )
        most = connection.execute(sa.select(sa.func.max(rows.c.rows))).scalar() or 0
        # Ticks that are not rolled up yet stand behind the last bucket.
        told = most * length + max(0, min(fresh, min(end, ticks.last or 0) - (counted.last + length - 1)))
        if most > COUNTED:
            break
    return min(end - start, told)


def _choose(resolutions: list[_Resolution], span: int, points: int) -> int:
    """The coarsest that still has half of the points."""
    interval = resolutions[0].seconds
    fitting = [
        place
        for place, resolution in enumerate(resolutions)
        # Rollups no coarser than the ticks themselves have nothing to add.
        if (place == 0 or resolution.seconds > interval)
        and 2 * span >= max(points, FEWEST_ROWS) * resolution.seconds
    ]
    return max(fitting, default=0)


def _as_dense_as_they_are(
    connection: Connection, ticks: _Resolution, ids: list[int], start: int, end: int, told: int
) -> _Resolution:
    """The ticks as they lie in the range: they were taken more often than now where the interval was shorter."""
    time = gpu_metrics.c.timestamp_epoch
    rows = sa.select(sa.func.count().label("rows")).where(gpu_metrics.c.gpu_id.in_(ids), time.between(start, end))
    by_gpu = rows.group_by(gpu_metrics.c.gpu_id).subquery()
    most = connection.execute(sa.select(sa.func.max(by_gpu.c.rows))).scalar() or 0
    # Ticks are written by the second.
    seconds = max(1.0, told / max(1, most))
    return replace(ticks, seconds=seconds) if DENSER * seconds < ticks.seconds else ticks


def _stretches(resolutions: list[_Resolution], chosen: int, start: int, end: int) -> list[_Stretch]:
    """The range in pieces: the chosen resolution as far as it reaches, coarser ones before, finer ones after."""
    order = [chosen, *range(chosen + 1, len(resolutions)), *range(chosen - 1, -1, -1)]
    open_pieces = [(start, end)]
    found: list[_Stretch] = []
    for place in order:
        resolution = resolutions[place]
        if resolution.first is None or resolution.last is None:
            continue
        length = 1 if resolution.raw else int(resolution.seconds)
        reaches = resolution.last + length - 1
        left: list[tuple[int, int]] = []
        for begin, finish in open_pieces:
            if place > chosen and finish == end and found:
                # What is newer than the chosen resolution can only be told by a finer one.
                left.append((begin, finish))
                continue
            low, high = max(begin, resolution.first), min(finish, reaches)
            if finish < end and place != chosen:
                # What begins after this piece is told already: no bucket may reach into it.
                high = min(high, finish + 1 - length)
            if low > high:
                left.append((begin, finish))
                continue
            found.append(_Stretch(resolution, low, high))
            told_until = high if place == chosen else high - high % length + length - 1
            # A rest shorter than a point is nothing to fill.
            if low - begin >= resolutions[chosen].seconds:
                left.append((begin, low - 1))
            if finish - told_until >= resolutions[chosen].seconds:
                left.append((told_until + 1, finish))
        open_pieces = left
    return sorted(found, key=lambda stretch: stretch.start)


def _step(resolution: _Resolution, span: int, points: int) -> int:
    """Seconds of one point: whole rows of the resolution, so that every point is made of as many."""
    rows = max(1, ceil(span / (points * resolution.seconds)))
    return max(1, round(rows * resolution.seconds))


def _query(
    connection: Connection,
    stretch: _Stretch,
    ids: list[int],
    metrics: Sequence[Metric],
    step: int,
    interval_s: float,
    end: int,
) -> pd.DataFrame:
    resolution = stretch.resolution
    table = resolution.table
    time = table.c.timestamp_epoch
    start = stretch.start
    if not resolution.raw:
        # The bucket that the range begins in belongs to it.
        start -= start % int(resolution.seconds)
    grouped = step > resolution.seconds
    bucket = time - time % step if grouped else time
    columns: list[Any] = [table.c.gpu_id, bucket]
    names = ["gpu_id", "timestamp_epoch"]
    if grouped and resolution.raw:
        # Where a step holds one tick, it stands where the tick was.
        columns[1] = (sa.func.min(time) + sa.func.max(time)) / 2
    # Where each name's numbers stand in the result: what is the same is fetched once.
    places = [0, 1]
    for metric in metrics:
        for column, suffix in zip(_columns(metric, table, grouped, interval_s), ("", "_min", "_max"), strict=True):
            if column is not None:
                columns.append(column)
            names.append(metric.key + suffix)
            places.append(len(columns) - 1)
    spoken_of = table.c.recorded_ms
    columns.append(sa.func.max(spoken_of) if grouped else spoken_of)
    names.append(RECORDED)
    places.append(len(columns) - 1)
    query = sa.select(*columns).where(table.c.gpu_id.in_(ids), time >= start, time <= stretch.end)
    if not resolution.raw and end > start:
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
    frame[THERE] = 1.0
    if not resolution.raw:
        for metric in metrics:
            if metric.decimals:
                keys = [metric.key, f"{metric.key}_min", f"{metric.key}_max"]
                frame[keys] /= scale(metric)
        middle = frame["timestamp_epoch"] + step // 2
        frame["timestamp_epoch"] = middle.clip(stretch.start, end)
    return frame


def _columns(metric: Metric, table: sa.Table, grouped: bool, interval_s: float) -> list[Any]:
    """Mean, minimum and maximum of a metric; of a counter, three times where it stood at the end. None stands
    for the column before it once more."""
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
    # Means weigh the time in which there was a value.
    usual_ms: Any = sa.literal_column(str(round(1000 * interval_s)))
    weight = sa.func.coalesce(table.c.recorded_ms, usual_ms if raw else table.c.samples * usual_ms)
    if not raw:
        weight = sa.func.coalesce(table.c[known_ms(metric)], weight)
    known = sa.func.sum(sa.case((mean.is_not(None), weight)))
    average = sa.func.sum(mean * weight) * 1.0 / sa.func.nullif(known, 0)
    return [average, sa.func.min(lowest), sa.func.max(highest)]


def _with_gaps(frame: pd.DataFrame, resolution: _Resolution, step: int) -> pd.DataFrame:
    """Add a row of NaN wherever a GPU's rows lie much further apart than they usually do."""
    if len(frame) < 2:
        return frame
    times, owners = frame["timestamp_epoch"].to_numpy(), frame["gpu_id"].to_numpy()
    distance = np.diff(times, prepend=np.nan)
    distance[np.diff(owners, prepend=np.nan) != 0] = np.nan
    usual = max(float(step), float(np.nanmedian(distance)) if np.isfinite(distance).any() else 0.0)
    allowed = (GAP_STEPS if resolution.raw else GAP_BUCKETS) * usual
    # Rows of older versions do not say of how much time they speak.
    own = np.maximum(frame[RECORDED].to_numpy() / 1000 + step + LABEL_S, GAP_BUCKETS * step)
    wide = np.flatnonzero(distance > np.where(np.isnan(own), allowed, own))
    if not len(wide):
        return frame
    breaks = pd.DataFrame({"gpu_id": owners[wide], "timestamp_epoch": times[wide] - distance[wide] / 2})
    joined = pd.concat([frame, breaks], ignore_index=True)
    return joined.sort_values(["gpu_id", "timestamp_epoch"], ignore_index=True, kind="stable")


def _stood_at(
    connection: Connection, metric: Metric, ids: list[int], start: int, resolution: _Resolution
) -> dict[int, float]:
    """Where a counter stood at the beginning of a range, by the GPU's id.

    In a pause it grew evenly; before a GPU was first seen it stood at 0.
    """
    # A bucket says how the counter stood at its end.
    length = 0 if resolution.raw else int(resolution.seconds)
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
    stood: dict[int, float] = {}
    for gpu_id, first_seen, then, value, later, later_value in connection.execute(query):
        if value is None:
            if later_value is not None:
                stood[gpu_id] = 0.0 if first_seen >= later - length else float(later_value)
        elif later_value is None or later <= then:
            stood[gpu_id] = float(value)
        else:
            part = max(0.0, first - length - then) / (later - then)
            stood[gpu_id] = value + (later_value - value) * min(1.0, part)
    return stood


def _difference(frame: pd.DataFrame, key: str, before: Mapping[int, float]) -> None:
    """Turn a counter into what it grew by since the point before it, or since `before`: where it stood then."""
    # Where the clock was set back, times that lie apart stand beside each other: a counter only grows.
    standing = frame[key].groupby(frame["gpu_id"]).cummax().groupby(frame["gpu_id"]).ffill()
    earlier = standing.groupby(frame["gpu_id"]).shift()
    earlier = earlier.fillna(frame["gpu_id"].map(before))
    grown = (standing - earlier).where(frame[key].notna()).clip(lower=0)
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
    """With the metrics that are kept when they change: at each point the value that held then."""
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
    known = frame[THERE].notna().to_numpy()
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
    # Put in one by one, many columns would leave a frame in pieces, of which pandas warns.
    return pd.concat([frame, pd.DataFrame(columns, index=frame.index)], axis=1)


def _held(
    changed: np.ndarray[Any, Any], values: np.ndarray[Any, Any], moments: np.ndarray[Any, Any], half: float
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What held `half` seconds after some moments, and the least and the most since as long before; NaN before the
    first change. Shape: 3, moments."""
    first = np.searchsorted(changed, moments - half, "right") - 1
    last = np.searchsorted(changed, moments + half, "right") - 1
    found = np.where(last >= 0, values[last], np.nan)
    held = np.array([found, found, found])
    # Most points lie between two changes.
    for place in np.flatnonzero((last > first) & (last >= 0)):
        window = values[max(0, first[place]) : last[place] + 1]
        held[1:, place] = window.min(), window.max()
    return held
