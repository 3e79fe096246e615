"""From which resolution a range of the history is read.

Ticks and rollups hold the same history at different resolutions. A range is read from the coarsest one that still
gives half of the points asked for. Where that one has no rows (they were deleted, or are not made yet) the next
coarser or finer one takes its place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from gpumon_core.store.schema import TIERS, gpu_metrics, gpus, hosts

# With this many rows of a GPU in a range, counting them says well enough how much of it was recorded.
COUNTED = 60
# Ticks this many times closer than the interval are from a time when the interval was shorter.
DENSER = 1.5
# A range of few points is read from at least this many rows of a GPU, so that they reach little beyond it.
FEWEST_ROWS = 200

# Built once, because every chart asks: when each GPU's rows begin and end in each table.
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
class Resolution:
    """A table, the seconds between its rows, and the time for which it has rows."""

    table: sa.Table
    seconds: float
    first: int | None
    last: int | None

    @property
    def is_raw(self) -> bool:
        """Whether its rows are ticks."""
        return self.table is gpu_metrics


@dataclass(frozen=True, slots=True)
class RangePart:
    """A part of a range, the resolution that it is read from, and the seconds of one point in it."""

    resolution: Resolution
    start: int
    end: int
    step_s: int = 0


def pieces(
    connection: Connection, ids: list[int], start: int, end: int, points: int
) -> tuple[list[RangePart], float]:
    """A range (UTC seconds) in parts, by time, and the present interval of ticks in seconds."""
    resolutions = _available(connection, ids)
    interval_s = resolutions[0].seconds
    recorded_s = _recorded_s(connection, resolutions, ids, start, end)
    chosen = _coarsest(resolutions, recorded_s, points)
    if resolutions[chosen].is_raw:
        resolutions[chosen] = _at_real_density(connection, resolutions[chosen], ids, start, end, recorded_s)
        chosen = _coarsest(resolutions, recorded_s, points)
    found = [
        replace(piece, step_s=_step_s(piece.resolution, recorded_s, points))
        for piece in _divide(resolutions, chosen, start, end)
    ]
    return found, interval_s


def _available(connection: Connection, ids: list[int]) -> list[Resolution]:
    """All resolutions, finest first, and the time for which each has rows."""
    rows = connection.execute(_EDGES, {"ids": ids}).all()
    interval = min((row[0] for row in rows), default=1.0)
    found = []
    for place, table in enumerate(_TABLES):
        firsts = [row[1 + 2 * place] for row in rows if row[1 + 2 * place] is not None]
        lasts = [row[2 + 2 * place] for row in rows if row[2 + 2 * place] is not None]
        seconds = interval if place == 0 else TIERS[place - 1].seconds
        found.append(Resolution(table, seconds, min(firsts, default=None), max(lasts, default=None)))
    return found


def _recorded_s(
    connection: Connection, resolutions: list[Resolution], ids: list[int], start: int, end: int
) -> int:
    """The seconds of the range that were recorded. An installation of yesterday, or a machine that runs two hours
    a day, gets as many points from a long range as one that always ran."""
    ticks = resolutions[0]
    fresh = 0
    if ticks.first is not None and ticks.last is not None:
        fresh = max(0, min(end, ticks.last) - max(start, ticks.first) + 1)
    recorded = fresh
    # Where the first bucket of the tier before ends.
    reach = None
    # A few long buckets say little about the pauses in a range.
    countable = [r for r in resolutions[1:] if COUNTED * r.seconds <= end - start] or resolutions[1:2]
    for counted in reversed(countable):
        if counted.first is None or counted.last is None:
            continue
        if reach is not None and counted.first >= max(start, reach):
            # This part of the range exists only at a coarser resolution: count it there.
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
        # Ticks that are not rolled up yet come after the last bucket.
        recorded = most * length + max(0, min(fresh, min(end, ticks.last or 0) - (counted.last + length - 1)))
        if most > COUNTED:
            break
    return min(end - start, recorded)


def _coarsest(resolutions: list[Resolution], span: int, points: int) -> int:
    """The place of the coarsest resolution that still gives half of the points."""
    interval = resolutions[0].seconds
    fitting = [
        place
        for place, resolution in enumerate(resolutions)
        # A rollup that is no coarser than the ticks adds nothing.
        if (place == 0 or resolution.seconds > interval)
        and 2 * span >= max(points, FEWEST_ROWS) * resolution.seconds
    ]
    return max(fitting, default=0)


def _at_real_density(
    connection: Connection, ticks: Resolution, ids: list[int], start: int, end: int, recorded_s: int
) -> Resolution:
    """The ticks with the seconds between them in this range: fewer than now where the interval was shorter."""
    time = gpu_metrics.c.timestamp_epoch
    rows = sa.select(sa.func.count().label("rows")).where(gpu_metrics.c.gpu_id.in_(ids), time.between(start, end))
    by_gpu = rows.group_by(gpu_metrics.c.gpu_id).subquery()
    most = connection.execute(sa.select(sa.func.max(by_gpu.c.rows))).scalar() or 0
    # Times of ticks are whole seconds.
    seconds = max(1.0, recorded_s / max(1, most))
    return replace(ticks, seconds=seconds) if DENSER * seconds < ticks.seconds else ticks


def _divide(resolutions: list[Resolution], chosen: int, start: int, end: int) -> list[RangePart]:
    """The range in parts: the chosen resolution where it has rows, coarser ones before it, finer ones after it."""
    order = [chosen, *range(chosen + 1, len(resolutions)), *range(chosen - 1, -1, -1)]
    missing = [(start, end)]
    found: list[RangePart] = []
    for place in order:
        resolution = resolutions[place]
        if resolution.first is None or resolution.last is None:
            continue
        length = 1 if resolution.is_raw else int(resolution.seconds)
        reaches = resolution.last + length - 1
        left: list[tuple[int, int]] = []
        for begin, finish in missing:
            if place > chosen and finish == end and found:
                # Only a finer resolution has what is newer than the chosen one.
                left.append((begin, finish))
                continue
            low, high = max(begin, resolution.first), min(finish, reaches)
            if finish < end and place != chosen:
                # What follows this part is read already: no bucket may reach into it.
                high = min(high, finish + 1 - length)
            if low > high:
                left.append((begin, finish))
                continue
            found.append(RangePart(resolution, low, high))
            read_until = high if place == chosen else high - high % length + length - 1
            # What is shorter than a row of the chosen resolution is not worth a query.
            if low - begin >= resolutions[chosen].seconds:
                left.append((begin, low - 1))
            if finish - read_until >= resolutions[chosen].seconds:
                left.append((read_until + 1, finish))
        missing = left
    return sorted(found, key=lambda piece: piece.start)


def _step_s(resolution: Resolution, span: int, points: int) -> int:
    """Seconds of one point: a whole number of rows, so that every point is made of equally many."""
    rows = max(1, ceil(span / (points * resolution.seconds)))
    return max(1, round(rows * resolution.seconds))
