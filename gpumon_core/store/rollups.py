"""Makes the coarser resolutions from the finer ones, a little at a time. Means weigh time, not ticks.

Every tier is made from the one before it, the first ones from raw ticks. A bucket is always computed
whole, from everything that is there: doing it again gives the same, a run that was broken off is
continued by the next, and the newest bucket is renewed until its time is over.
"""

from __future__ import annotations

import logging
import threading
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from gpumon_core.metrics import TICK_METRICS, Aggregate, Metric
from gpumon_core.store.schema import TIERS, Tier, gpu_metrics, gpus, hosts, known_ms, scale

log = logging.getLogger(__name__)

# How much source time one transaction takes in: so that a tick never waits long for its turn.
STEP_BUCKETS = 120
STEP_S = 3600
PAUSE_S = 0.005


def roll_up(
    engine: Engine,
    host: str,
    rewritten_from: int | None = None,
    stopping: threading.Event | None = None,
) -> int:
    """Bring every tier of this host's GPUs up to its newest tick; how many buckets were written.

    `rewritten_from` is a time from which on ticks may have been added behind newer ones.
    Raises sqlalchemy.exc.DBAPIError.
    """
    stopping = stopping or threading.Event()
    with engine.connect() as connection:
        found = connection.execute(sa.select(hosts.c.id, hosts.c.interval_s).where(hosts.c.name == host)).first()
        if found is None:
            return 0
        mine = list(connection.execute(sa.select(gpus.c.id).where(gpus.c.host_id == found.id)).scalars())
    written = 0
    source: sa.Table = gpu_metrics
    for tier in TIERS:
        # Ticks that are further apart than this tier's buckets need no such tier.
        if tier.kept == "raw" and 2 * found.interval_s > tier.seconds:
            continue
        interval_ms = round(1000 * found.interval_s)
        written += _fill(engine, tier, source, found.id, mine, rewritten_from, interval_ms, stopping)
        if stopping.is_set():
            break
        # The twenty seconds are a side road: minutes are made from the ticks themselves.
        if tier.kept != "raw":
            source = tier.table
    return written


def _fill(
    engine: Engine,
    tier: Tier,
    source: sa.Table,
    host_id: int,
    mine: list[int],
    rewritten_from: int | None,
    interval_ms: int,
    stopping: threading.Event,
) -> int:
    with engine.connect() as connection:
        start = _newest(connection, tier.table, mine)
        first, last = _oldest(connection, source, mine), _newest(connection, source, mine)
    if first is None or last is None:
        return 0
    start = first if start is None else start
    if rewritten_from is not None:
        start = min(start, max(first, rewritten_from))
    start -= start % tier.seconds
    step = max(STEP_S, STEP_BUCKETS * tier.seconds)
    statement = _statement(tier, source)
    written = 0
    while start <= last:
        end = min(start + step, last - last % tier.seconds + tier.seconds)
        with engine.begin() as connection:
            values = {"start": start, "end": end, "host": host_id, "interval_ms": interval_ms}
            written += connection.execute(statement, values).rowcount
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
        if tier.kept == "raw" and 2 * interval_s > tier.seconds:
            continue
        first, last = start - start % tier.seconds, end - end % tier.seconds + tier.seconds
        values = {"start": first, "end": last, "host": host_id, "interval_ms": round(1000 * interval_s)}
        connection.execute(_statement(tier, source), values)
        if tier.kept != "raw":
            source = tier.table


def _oldest(connection: Connection, table: sa.Table, mine: list[int]) -> int | None:
    # One look at the key's beginning per GPU; min() over all of them would read them all.
    found = [_edge(connection, table, gpu_id, sa.func.min) for gpu_id in mine]
    return min((time for time in found if time is not None), default=None)


def _newest(connection: Connection, table: sa.Table, mine: list[int]) -> int | None:
    found = [_edge(connection, table, gpu_id, sa.func.max) for gpu_id in mine]
    return max((time for time in found if time is not None), default=None)


def _edge(connection: Connection, table: sa.Table, gpu_id: int, which: Any) -> int | None:
    query = sa.select(which(table.c.timestamp_epoch)).where(table.c.gpu_id == gpu_id)
    return connection.execute(query).scalar()


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
