"""Makes the coarser resolutions from the finer ones, a little at a time. Means weigh time, not ticks.

Every tier is made from the one before it, the first ones from raw ticks. A bucket is always computed
whole, from everything that is there: doing it again gives the same, a run that was broken off is
continued by the next, and the newest bucket is renewed until it is complete.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from gpumon_core.metrics import TICK_METRICS, Aggregate, Metric
from gpumon_core.store.schema import TIERS, Tier, gpu_metrics, known_ms, scale

# How much source time one transaction takes in: so that a tick never waits long for its turn.
STEP_BUCKETS = 120
STEP_S = 3600
PAUSE_S = 0.005


@dataclass(frozen=True, slots=True)
class _Run:
    """The newest row of a tier's source when the tier was renewed last, and of the table that said it was due."""

    source: int
    due: int


class Progress:
    """When each tier was renewed last, by the names of its source and of the tier.

    For a recorder, which alone writes the rows of its host. Without it every run renews every tier.
    """

    def __init__(self) -> None:
        self.runs: dict[str, _Run] = {}

    def forget(self) -> None:
        """Renew every tier at the next run: somebody else may have written."""
        self.runs.clear()


def roll_up(
    engine: Engine,
    host: str,
    rewritten_from: int | None = None,
    stopping: threading.Event | None = None,
    progress: Progress | None = None,
) -> int:
    """Bring every tier of this host's GPUs up to its newest tick; how many buckets were written.

    `rewritten_from` is a time from which on ticks may have been added behind newer ones. With `progress` a tier is
    renewed only when the one that it is made from has a new row; one that is coarser than five minutes, when five
    minutes have begun: its newest bucket has what was recorded until then. Raises sqlalchemy.exc.DBAPIError.
    """
    stopping = stopping or threading.Event()
    progress = progress or Progress()
    with engine.connect() as connection:
        rows = connection.execute(_EDGES, {"host": host}).all()
    if not rows:
        return 0
    host_id, interval_s = rows[0].host_id, rows[0].interval_s
    newest = dict(zip(_NAMES, map(_latest, list(zip(*rows, strict=True))[2:]), strict=True))
    written = 0
    source: sa.Table = gpu_metrics
    for tier in TIERS:
        # Ticks that are further apart than this tier's buckets need no such tier.
        if tier.retention == "raw" and 2 * interval_s > tier.seconds:
            continue
        last = newest[source.name]
        if last is None:
            break
        place = f"{source.name} {tier.table.name}"
        before = progress.runs.get(place)
        due = (newest[_FIVE_MINUTES.table.name] if tier.seconds > _FIVE_MINUTES.seconds else None) or last
        if rewritten_from is not None or before is None or due != before.due:
            values = {"host": host_id, "interval_ms": round(1000 * interval_s)}
            start = _start(engine, source, newest[tier.table.name], rewritten_from, host_id)
            if start is None:
                # Retention has deleted the source since the look at its end.
                break
            if before is not None:
                # An import may have made a newer bucket meanwhile, while the one before was not complete.
                start = min(start, before.source)
            written += _fill(engine, tier, source, start, last, values, stopping)
            if stopping.is_set():
                break
            progress.runs[place] = _Run(last, due)
            newest[tier.table.name] = max(newest[tier.table.name] or 0, last - last % tier.seconds)
        # The twenty seconds are a side road: minutes are made from the ticks themselves.
        if tier.retention != "raw":
            source = tier.table
    return written


_FIVE_MINUTES = next(tier for tier in TIERS if tier.seconds == 300)
_NAMES = [gpu_metrics.name, *(tier.table.name for tier in TIERS)]
# One look at the key's end per GPU and table; max() over all GPUs would read all rows.
_EDGES = sa.text(
    "SELECT hosts.id AS host_id, hosts.interval_s, "
    + ", ".join(f"(SELECT max(timestamp_epoch) FROM {name} WHERE gpu_id = gpus.id)" for name in _NAMES)
    + " FROM hosts JOIN gpus ON gpus.host_id = hosts.id WHERE hosts.name = :host"
)


def _latest(times: Sequence[int | None]) -> int | None:
    return max((time for time in times if time is not None), default=None)


def _start(
    engine: Engine, source: sa.Table, newest: int | None, rewritten_from: int | None, host_id: int
) -> int | None:
    """Where a tier has to be made from: its newest bucket, or what was rewritten; None where nothing is left."""
    if newest is not None and rewritten_from is None:
        return newest
    query = sa.text(
        f"SELECT (SELECT min(timestamp_epoch) FROM {source.name} WHERE gpu_id = gpus.id) FROM gpus "
        "WHERE host_id = :host"
    )
    with engine.connect() as connection:
        times: list[int] = [
            time for time in connection.execute(query, {"host": host_id}).scalars() if time is not None
        ]
    first = min(times, default=None)
    if first is None or newest is None or rewritten_from is None:
        return first
    return min(newest, max(first, rewritten_from))


def _fill(
    engine: Engine,
    tier: Tier,
    source: sa.Table,
    start: int,
    last: int,
    values: dict[str, int],
    stopping: threading.Event,
) -> int:
    """Make the buckets of a tier from `start` to `last`; how many were written."""
    start -= start % tier.seconds
    step = max(STEP_S, STEP_BUCKETS * tier.seconds)
    statement = _statement(tier, source)
    written = 0
    while start <= last:
        end = min(start + step, last - last % tier.seconds + tier.seconds)
        with engine.begin() as connection:
            written += connection.execute(statement, {"start": start, "end": end, **values}).rowcount
        start = end
        if start <= last and stopping.wait(PAUSE_S):
            break
    return written


def renew(connection: Connection, host_id: int, source: sa.Table, start: int, end: int, interval_s: float) -> None:
    """Make every tier that follows from `source` (gpu_metrics or a tier's table) anew from `start` to `end`.

    All in the caller's transaction. Raises sqlalchemy.exc.DBAPIError.
    """
    tables = [gpu_metrics, *(tier.table for tier in TIERS)]
    for tier in TIERS[tables.index(source) :]:
        if tier.retention == "raw" and 2 * interval_s > tier.seconds:
            continue
        first, last = start - start % tier.seconds, end - end % tier.seconds + tier.seconds
        values = {"start": first, "end": last, "host": host_id, "interval_ms": round(1000 * interval_s)}
        connection.execute(_statement(tier, source), values)
        if tier.retention != "raw":
            source = tier.table


@lru_cache(maxsize=32)
def _statement(tier: Tier, source: sa.Table) -> sa.TextClause:
    """INSERT ... SELECT ... GROUP BY bucket, of the GPUs of :host between :start and :end.

    Text, because as objects these few hundred columns would be a tenth of the recorder's memory. Every name
    in it comes from the catalogue.
    """
    bucket = f"timestamp_epoch - timestamp_epoch % {tier.seconds}"
    raw = source is gpu_metrics
    columns = {
        "gpu_id": "gpu_id",
        "timestamp_epoch": bucket,
        "samples": "count(*)" if raw else "sum(samples)",
        "recorded_ms": f"sum({_recorded_ms(raw)})",
    }
    for metric in TICK_METRICS:
        columns |= _raw(metric) if raw else _coarser(metric)
    renewed = ", ".join(
        f"{name} = excluded.{name}" for name in columns if name not in ("gpu_id", "timestamp_epoch")
    )
    return sa.text(
        f"INSERT INTO {tier.table.name} ({', '.join(columns)}) SELECT {', '.join(columns.values())} "
        f"FROM {source.name} WHERE gpu_id IN (SELECT id FROM gpus WHERE host_id = :host) "
        f"AND timestamp_epoch >= :start AND timestamp_epoch < :end GROUP BY gpu_id, {bucket} "
        f"ON CONFLICT (gpu_id, timestamp_epoch) DO UPDATE SET {renewed}"
    ).bindparams(sa.bindparam("interval_ms", type_=sa.Integer))


def _recorded_ms(raw: bool) -> str:
    """How much time a row speaks of; of rows of versions that did not record it, what their ticks usually are."""
    return "coalesce(recorded_ms, :interval_ms)" if raw else "coalesce(recorded_ms, samples * :interval_ms)"


def _whole(expression: str) -> str:
    return f"CAST(round({expression}) AS BIGINT)"


def _raw(metric: Metric) -> dict[str, str]:
    """What ticks become: the mean of their means, the highest of their maxima."""
    key, times = metric.key, scale(metric)
    if metric.aggregate is Aggregate.COUNTER:
        return {key: _whole(f"max({key})")}
    highest = f"coalesce({metric.peak}, {key})" if metric.peak else key
    return {
        **_mean(metric, f"{key} * {times}", _recorded_ms(raw=True), _recorded_ms(raw=True)),
        f"{key}_min": _whole(f"min({key}) * {times}"),
        f"{key}_max": _whole(f"max({highest}) * {times}"),
    }


def _coarser(metric: Metric) -> dict[str, str]:
    """What buckets become."""
    key = metric.key
    if metric.aggregate is Aggregate.COUNTER:
        return {key: f"max({key})"}
    recorded = _recorded_ms(raw=False)
    return {
        **_mean(metric, key, f"coalesce({known_ms(metric)}, {recorded})", recorded),
        f"{key}_min": f"min({key}_min)",
        f"{key}_max": f"max({key}_max)",
    }


def _mean(metric: Metric, value: str, weight: str, recorded: str) -> dict[str, str]:
    """A mean over the time in which there was a value, and how long that was where it was not all of the time."""
    known = f"sum(CASE WHEN {metric.key} IS NOT NULL THEN {weight} ELSE 0 END)"
    return {
        metric.key: _whole(f"sum({value} * 1.0 * {weight}) / nullif({known}, 0)"),
        known_ms(metric): f"nullif({known}, sum({recorded}))",
    }
