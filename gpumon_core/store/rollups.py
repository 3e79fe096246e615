"""Makes the coarser resolutions from the finer ones, a little at a time.

Every tier is made from the one before it, the first ones from raw ticks. A bucket is always computed
whole, from everything that is there: doing it again gives the same, a run that was broken off is
continued by the next, and the newest bucket is renewed until its time is over.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from gpumon_core.metrics import TICK_METRICS, Aggregate, Metric
from gpumon_core.store.bulk import upsert
from gpumon_core.store.schema import TIERS, Tier, gpu_metrics, gpus, hosts, scale

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
        query = sa.select(gpus.c.id).join(hosts, hosts.c.id == gpus.c.host_id).where(hosts.c.name == host)
        mine = list(connection.execute(query).scalars())
        interval = connection.execute(sa.select(hosts.c.interval_s).where(hosts.c.name == host)).scalar() or 1.0
    written = 0
    if not mine:
        return 0
    source: sa.Table = gpu_metrics
    for tier in TIERS:
        # Ticks that are further apart than this tier's buckets need no such tier.
        if tier.kept == "raw" and 2 * interval > tier.seconds:
            continue
        written += _fill(engine, tier, source, mine, rewritten_from, stopping)
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
    mine: list[int],
    rewritten_from: int | None,
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
    statement = _statement(engine, tier, source)
    written = 0
    while start <= last:
        end = min(start + step, last - last % tier.seconds + tier.seconds)
        with engine.begin() as connection:
            written += connection.execute(statement, {"start": start, "end": end, "mine": mine}).rowcount
        start = end
        if start <= last and stopping.wait(PAUSE_S):
            break
    return written


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


_statements: dict[tuple[str, str, str], Any] = {}


def _statement(engine: Engine, tier: Tier, source: sa.Table) -> Any:
    """INSERT ... SELECT ... GROUP BY bucket ... ON CONFLICT DO UPDATE, between :start and :end."""
    key = (engine.dialect.name, tier.table.name, source.name)
    if key not in _statements:
        _statements[key] = _build(engine, tier, source)
    return _statements[key]


def _build(engine: Engine, tier: Tier, source: sa.Table) -> Any:
    time = source.c.timestamp_epoch
    bucket = time - time % tier.seconds
    raw = source is gpu_metrics
    columns: dict[str, Any] = {
        "gpu_id": source.c.gpu_id,
        "timestamp_epoch": bucket,
        "samples": sa.func.count() if raw else sa.func.sum(source.c.samples),
    }
    for metric in TICK_METRICS:
        columns |= _raw(metric) if raw else _coarser(metric, source)
    chosen = (
        sa.select(*(expression.label(name) for name, expression in columns.items()))
        .where(
            source.c.gpu_id.in_(sa.bindparam("mine", expanding=True)),
            time >= sa.bindparam("start", type_=sa.BigInteger),
            time < sa.bindparam("end", type_=sa.BigInteger),
        )
        .group_by(source.c.gpu_id, sa.literal_column("2"))
    )
    insert = upsert(engine.dialect, tier.table).from_select(list(columns), chosen)
    others = {name: insert.excluded[name] for name in columns if name not in ("gpu_id", "timestamp_epoch")}
    return insert.on_conflict_do_update(index_elements=["gpu_id", "timestamp_epoch"], set_=others)


def _whole(expression: Any) -> Any:
    return sa.cast(sa.func.round(expression), sa.BigInteger)


def _raw(metric: Metric) -> dict[str, Any]:
    """What ticks become: the mean of their means, the highest of their maxima."""
    column = gpu_metrics.c[metric.key]
    if metric.aggregate is Aggregate.COUNTER:
        return {metric.key: _whole(sa.func.max(column))}
    times = scale(metric)
    highest = gpu_metrics.c[metric.peak] if metric.peak else column
    return {
        metric.key: _whole(sa.func.avg(column) * times),
        f"{metric.key}_min": _whole(sa.func.min(column) * times),
        f"{metric.key}_max": _whole(sa.func.max(sa.func.coalesce(highest, column)) * times),
    }


def _coarser(metric: Metric, source: sa.Table) -> dict[str, Any]:
    """What buckets become: a mean in which every tick counts the same, however many a bucket has."""
    mean = source.c[metric.key]
    if metric.aggregate is Aggregate.COUNTER:
        return {metric.key: sa.func.max(mean)}
    weight = sa.case((mean.is_not(None), source.c.samples))
    return {
        metric.key: _whole(sa.func.sum(mean * source.c.samples * 1.0) / sa.func.sum(weight)),
        f"{metric.key}_min": sa.func.min(source.c[f"{metric.key}_min"]),
        f"{metric.key}_max": sa.func.max(source.c[f"{metric.key}_max"]),
    }
