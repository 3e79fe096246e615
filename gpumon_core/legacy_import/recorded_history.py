"""Decides which ticks of a file the history lacks: a tick is taken where this GPU has none of its own.

A tick of gpumon's own counts even where only a rollup of it is left.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from gpumon_core.legacy_import.import_records import (
    LEVELS,
    MINUTE_S,
    ImportedRange,
    TargetGpu,
    TickOutcome,
)
from gpumon_core.store.accounting import HOUR_S
from gpumon_core.store.retention import RetentionDays
from gpumon_core.store.schema import RetentionLevel, gpu_metrics, imports

# Runs a query on the database; [] without one.
Read = Callable[[sa.Select[Any]], Sequence[Any]]


class StoredLevels:
    """The levels that the retention stores, seen from `now` (UTC seconds)."""

    def __init__(self, retention: RetentionDays, now: int) -> None:
        oldest = retention.cutoffs(now)
        # Retention may have deleted a part of the bucket at the edge: begin with the first bucket that is
        # complete.
        edges: dict[RetentionLevel, int] = {"raw": MINUTE_S, "minute": HOUR_S, "hour": 1}
        self._since = {level: time + -time % edges[level] for level, time in oldest.items()}
        self.oldest = min(self._since.values())
        self.ledger_since = min(oldest.values())

    def at(self, at: int) -> RetentionLevel:
        """The finest level that is stored for a time."""
        fitting = (level for level in LEVELS if at >= self._since[level])
        return next(fitting, "hour")


@dataclass(slots=True, eq=False)
class _RecordedHour:
    """What one hour of a GPU holds. `own` are the ticks of gpumon's own that have rows. In the minutes
    `forgotten`, or in the hour where `is_forgotten`, there were more ticks than have rows now. `minutes` have rows
    of any kind; so has the hour where `has_rows`.
    """

    hour: int
    own: list[int] = field(default_factory=list)
    minutes: set[int] = field(default_factory=set)
    forgotten: set[int] = field(default_factory=set)
    is_forgotten: bool = False
    has_rows: bool = False


class RecordedHistory:
    """What the database has of one GPU before and during an import. `gap_s` is the longest pause between two of
    gpumon's own ticks that is no gap. Where `is_live`, a recorder writes at the same time."""

    def __init__(self, read: Read, target: TargetGpu, levels: StoredLevels, gap_s: float, is_live: bool) -> None:
        self._read, self._target, self._levels = read, target, levels
        self._gap_s, self._is_live = gap_s, is_live
        query = sa.select(imports.c.first, imports.c.last, imports.c.ticks).where(imports.c.gpu_id == target.id)
        self._ranges = [ImportedRange(*row) for row in read(query.order_by(imports.c.first))]
        self._hour: _RecordedHour | None = None

    def add(self, imported: ImportedRange) -> None:
        """Count ticks that this run takes as imported, not as gpumon's own."""
        insort(self._ranges, imported, key=lambda one: one.first)

    def last_range(self, at: int) -> ImportedRange | None:
        """The last imported range that begins at a time or before it."""
        place = bisect_right(self._ranges, at, key=lambda one: one.first)
        return self._ranges[place - 1] if place else None

    def judge(self, at: int) -> TickOutcome:
        """What becomes of a tick of that time. Raises sqlalchemy.exc.DBAPIError."""
        if at < self._levels.oldest:
            return "old"
        if self._was_imported(at):
            return "imported"
        if self._is_live and at > self._target.last_seen:
            return "recorded"
        hour = at - at % HOUR_S
        found = self._hour
        if found is None or found.hour != hour:
            found = self._hour = self._read_hour(hour)
        level = self._levels.at(at)
        if level == "hour":
            return "recorded" if found.has_rows else "taken"
        minute = at - at % MINUTE_S
        if found.is_forgotten or minute in (found.minutes if level == "minute" else found.forgotten):
            return "recorded"
        near = bisect_left(found.own, at - self._gap_s)
        return "recorded" if near < len(found.own) and found.own[near] <= at + self._gap_s else "taken"

    def _was_imported(self, at: int) -> bool:
        found = self.last_range(at)
        return found is not None and at <= found.last

    def _read_hour(self, hour: int) -> _RecordedHour:
        """What an hour holds. This run writes its ticks hour by hour, so the hour has no rollup of them yet."""
        found = _RecordedHour(hour)
        at, gpu_id = gpu_metrics.c.timestamp_epoch, self._target.id
        slack = int(self._gap_s) + 1
        query = sa.select(at).where(gpu_metrics.c.gpu_id == gpu_id, at >= hour - slack, at < hour + HOUR_S + slack)
        ticks = [row[0] for row in self._read(query.order_by(at))]
        found.own = [tick for tick in ticks if not self._was_imported(tick)]
        raw = Counter(tick - tick % MINUTE_S for tick in ticks if hour <= tick < hour + HOUR_S)
        minutes, hours = self._samples("minute", hour), self._samples("hour", hour)
        found.minutes = {*minutes, *raw}
        found.forgotten = {minute for minute, count in minutes.items() if count > raw[minute]}
        in_minutes = sum(max(minutes.get(minute, 0), raw[minute]) for minute in found.minutes)
        found.is_forgotten = hours.get(hour, 0) > in_minutes
        found.has_rows = bool(hours or found.minutes)
        return found

    def _samples(self, level: RetentionLevel, hour: int) -> Mapping[int, int]:
        """How many ticks went into each row of a level, by the row's time."""
        table, _ = LEVELS[level]
        at = table.c.timestamp_epoch
        query = sa.select(at, table.c.samples).where(
            table.c.gpu_id == self._target.id, at >= hour, at < hour + HOUR_S
        )
        return dict(map(tuple, self._read(query)))
