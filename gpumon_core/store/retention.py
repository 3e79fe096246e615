"""Deletes what is older than its retention, without holding the recorder up.

Each resolution has a time of its own; the ledger of processes lives as long as the hours.

On a server that many hosts share, each recorder deletes rows of its own host, by its own settings. The settings of
a host that is gone for good are not known: its rows stay until somebody deletes them (docs/deployment.md has the
statement). A SQLite file has one recorder; its settings apply to all of the file.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from gpumon_core.store.schema import (
    TIERS,
    RetentionLevel,
    gpu_changes,
    gpu_metrics,
    gpu_processes,
    gpu_usage,
    gpus,
    hosts,
    imports,
    model_sessions,
    process_gpus,
    process_hours,
    process_snapshots,
    programs,
    recorder_health,
)

if TYPE_CHECKING:
    from gpumon_core.settings import Settings

log = logging.getLogger(__name__)

DAY_S = 86400
HOUR_S = 3600
# Rows of one GPU, seconds of processes, and rows of the ledger that one transaction deletes: some ten
# milliseconds of the write lock, between which the recorder gets its turn.
BATCH_ROWS = 2000
BATCH_S = 600
BATCH_PROCESSES = 500
BATCH_CHANGES = 500
PAUSE_S = 0.02
# Pages given back to the file system in one step.
VACUUM_PAGES = 500


@dataclass(frozen=True, slots=True)
class RetentionDays:
    """For how many days each resolution is stored."""

    raw_days: float
    minute_days: float
    hour_days: float

    @classmethod
    def of(cls, settings: Settings) -> RetentionDays:
        """Those of the settings."""
        return cls(settings.retention_raw_days, settings.retention_minute_days, settings.retention_hour_days)

    def cutoffs(self, now: float) -> dict[RetentionLevel, int]:
        """Since when each is stored at `now`, in UTC seconds."""
        return {
            "raw": int(now - self.raw_days * DAY_S),
            "minute": int(now - self.minute_days * DAY_S),
            "hour": int(now - self.hour_days * DAY_S),
        }


class _Stopped(Exception):
    """The run is broken off; the next one continues it."""


def newest(engine: Engine) -> int | None:
    """The time of the newest tick of any host, UTC seconds. Raises sqlalchemy.exc.DBAPIError."""
    with engine.connect() as connection:
        found: int | None = connection.execute(sa.select(sa.func.max(hosts.c.last_seen))).scalar()
    return found


def forget(
    engine: Engine,
    days: RetentionDays,
    now: float | None = None,
    stopping: threading.Event | None = None,
    pause_s: float | None = None,
    host: str | None = None,
) -> int:
    """Delete what is older than `days` says, and give its space back. Returns the rows deleted.

    On a server, `host` names the host to delete rows of; None means all hosts, as always in a SQLite file.

    Every step is a transaction of its own: a run that is broken off, as by `stopping`, is simply
    continued by the next. Between two steps others get `pause_s` (by default PAUSE_S) for their turn.
    Raises sqlalchemy.exc.DBAPIError.
    """
    run = _Run(engine, days, time.time() if now is None else now, stopping or threading.Event())
    run.host = host if engine.dialect.name != "sqlite" else None
    run.pause_s = PAUSE_S if pause_s is None else pause_s
    try:
        run.all()
    except _Stopped:
        return run.rows
    if run.rows:
        _give_back(engine, run.stopping, run.pause_s)
        log.info("retention: %d rows deleted", run.rows)
    return run.rows


class _Run:
    def __init__(self, engine: Engine, days: RetentionDays, now: float, stopping: threading.Event) -> None:
        self.engine = engine
        self.stopping = stopping
        self.rows = 0
        self.pause_s = PAUSE_S
        # The host to delete rows of; None: all hosts.
        self.host: str | None = None
        self.host_id: int | None = None
        self.gpu_ids: list[int] = []
        self.cutoffs = days.cutoffs(now)

    def all(self) -> None:
        with self.engine.connect() as connection:
            query = sa.select(gpus.c.id)
            if self.host is not None:
                known = sa.select(hosts.c.id).where(hosts.c.name == self.host)
                self.host_id = connection.execute(known).scalar()
                query = query.where(gpus.c.host_id == self.host_id)
            self.gpu_ids = list(connection.execute(query).scalars())
        if self.host is not None and self.host_id is None:
            return
        for gpu_id in self.gpu_ids:
            # Ticks that no rollup has taken in yet are not deleted.
            with self.engine.connect() as connection:
                minutes = TIERS[1].table
                rolled = connection.execute(
                    sa.select(sa.func.max(minutes.c.timestamp_epoch)).where(minutes.c.gpu_id == gpu_id)
                ).scalar()
            if rolled is not None:
                self._metrics(gpu_metrics, gpu_id, min(self.cutoffs["raw"], rolled))
            for tier in TIERS:
                self._metrics(tier.table, gpu_id, self.cutoffs[tier.retention])
            self._thin_changes(gpu_id)
        self._by_time(process_snapshots, self.cutoffs["raw"], BATCH_S)
        self._by_time(process_hours, self.cutoffs["hour"], DAY_S)
        self._by_time(gpu_usage, self.cutoffs["hour"], DAY_S)
        self._sessions(self.cutoffs["hour"])
        self._by_time(recorder_health, self.cutoffs["minute"], DAY_S)
        self._ledger(min(self.cutoffs.values()))
        self._imports(min(self.cutoffs.values()))

    def _mine(self, table: sa.Table) -> sa.ColumnElement[bool]:
        """Which rows of a table are to be looked at."""
        if self.host_id is None:
            return sa.true()
        if "host_id" in table.columns:
            return table.c.host_id == self.host_id
        return table.c.gpu_id.in_(self.gpu_ids)

    def _count(self, rows: int) -> None:
        self.rows += rows
        if rows and self.pause_s:
            self.stopping.wait(self.pause_s)
        if self.stopping.is_set():
            raise _Stopped

    def _metrics(self, table: sa.Table, gpu_id: int, cutoff: int) -> None:
        mine = sa.and_(table.c.gpu_id == gpu_id, table.c.timestamp_epoch < cutoff)
        # The rows to delete are adjacent, oldest first; the batch ends before this one.
        query = sa.select(table.c.timestamp_epoch).where(mine).order_by(table.c.timestamp_epoch)
        end: int | None = 0
        while end is not None:
            with self.engine.begin() as connection:
                end = connection.execute(query.offset(BATCH_ROWS).limit(1)).scalar()
                batch = mine if end is None else sa.and_(mine, table.c.timestamp_epoch < end)
                rows = connection.execute(sa.delete(table).where(batch)).rowcount
            self._count(rows)

    def _thin_changes(self, gpu_id: int) -> None:
        """Retain one change an hour of those older than the ticks, and the last of those older than the hours."""
        table = gpu_changes
        at = table.c.timestamp_epoch
        for cutoff, same_hour in ((self.cutoffs["raw"], True), (self.cutoffs["hour"], False)):
            following = sa.func.lead(at).over(partition_by=table.c.metric, order_by=at).label("following")
            old = sa.select(table.c.metric, at.label("at"), following).where(table.c.gpu_id == gpu_id, at < cutoff)
            numbered = old.subquery()
            query = sa.select(numbered.c.metric, numbered.c.at).where(numbered.c.following.is_not(None))
            if same_hour:
                hour = numbered.c.at - numbered.c.at % HOUR_S
                query = query.where(numbered.c.following < hour + HOUR_S)
            # To look for them takes long, and nobody has to wait for that.
            with self.engine.connect() as connection:
                surplus = [tuple(row) for row in connection.execute(query)]
            delete = sa.delete(table).where(
                table.c.gpu_id == gpu_id, table.c.metric == sa.bindparam("which"), at == sa.bindparam("then")
            )
            for first in range(0, len(surplus), BATCH_CHANGES):
                batch = [
                    {"which": metric, "then": then} for metric, then in surplus[first : first + BATCH_CHANGES]
                ]
                with self.engine.begin() as connection:
                    connection.execute(delete, batch)
                self._count(len(batch))

    def _by_time(self, table: sa.Table, cutoff: int, step_s: int) -> None:
        time_of = table.c.timestamp_epoch
        mine = self._mine(table)
        # Other hosts may retain rows for longer: their older rows are passed over once, and not with every step.
        first = None
        while True:
            rest = mine if first is None else sa.and_(mine, time_of >= first)
            with self.engine.begin() as connection:
                oldest = connection.execute(sa.select(time_of).where(rest).order_by(time_of).limit(1)).scalar()
                if oldest is None or oldest >= cutoff:
                    return
                first = min(cutoff, oldest + step_s)
                batch = sa.and_(mine, time_of >= oldest, time_of < first)
                rows = connection.execute(sa.delete(table).where(batch)).rowcount
            self._count(rows)

    def _ledger(self, cutoff: int) -> None:
        """Processes that have nothing else left, and are not on a GPU."""
        active = (
            sa.select(process_gpus.c.process_id)
            .where(process_gpus.c.process_id == gpu_processes.c.id, process_gpus.c.active == 1)
            .exists()
        )
        # Rows are in the order in which processes were first seen.
        query = (
            sa.select(gpu_processes.c.id)
            .where(self._mine(gpu_processes), gpu_processes.c.first_seen < cutoff)
            .where(gpu_processes.c.last_seen < cutoff, ~active)
            .order_by(gpu_processes.c.first_seen)
            .limit(BATCH_PROCESSES)
        )
        while True:
            with self.engine.begin() as connection:
                ids = list(connection.execute(query).scalars())
                if not ids:
                    break
                connection.execute(sa.delete(process_gpus).where(process_gpus.c.process_id.in_(ids)))
                connection.execute(sa.delete(model_sessions).where(model_sessions.c.process_id.in_(ids)))
                rows = connection.execute(sa.delete(gpu_processes).where(gpu_processes.c.id.in_(ids))).rowcount
            self._count(rows)
        self._programs()

    def _sessions(self, cutoff: int) -> None:
        """Models that were unloaded long ago; the server that had them may run still."""
        table = model_sessions
        old = sa.select(table.c.id).where(
            self._mine(table), table.c.first_seen < cutoff, table.c.last_seen < cutoff, table.c.active == 0
        )
        rows = 1
        while rows:
            with self.engine.begin() as connection:
                some = sa.delete(table).where(table.c.id.in_(old.limit(BATCH_PROCESSES)))
                rows = connection.execute(some).rowcount
            self._count(rows)

    def _imports(self, cutoff: int) -> None:
        """Imported periods that have nothing left."""
        with self.engine.begin() as connection:
            old = sa.and_(self._mine(imports), imports.c.last < cutoff)
            rows = connection.execute(sa.delete(imports).where(old)).rowcount
        self._count(rows)

    def _programs(self) -> None:
        """What no process in the ledger of any host runs any more, and no stored hour refers to.

        Hosts share programs. So each is first locked against a recorder that is about to use it (which holds FOR
        KEY SHARE then, and is passed over), and only then looked for: what was committed before is seen.
        """
        run = sa.select(gpu_processes.c.id).where(gpu_processes.c.program_id == programs.c.id).exists()
        old = sa.func.coalesce(programs.c.last_used, 0) < self.cutoffs["hour"]
        # Hours that refer to it are older than its last use; another host may retain hours for longer.
        hours = process_hours.c
        query = (
            sa.select(programs.c.id)
            .where(programs.c.id > sa.bindparam("last"), ~run, old)
            .order_by(programs.c.id)
            .limit(BATCH_PROCESSES)
            .with_for_update(skip_locked=True, of=programs)
        )
        last = 0
        while True:
            with self.engine.begin() as connection:
                ids = list(connection.execute(query, {"last": last}).scalars())
                if not ids:
                    return
                last = ids[-1]
                spoken_of = sa.select(hours.program_id).where(
                    hours.timestamp_epoch < self.cutoffs["hour"], hours.program_id.in_(ids)
                )
                named = list(connection.execute(spoken_of.distinct()).scalars()) if self.host_id else []
                unused = sa.and_(programs.c.id.in_(ids), programs.c.id.not_in(named), ~run, old)
                rows = connection.execute(sa.delete(programs).where(unused)).rowcount
            self._count(rows)


def _give_back(engine: Engine, stopping: threading.Event, pause_s: float) -> None:
    if engine.dialect.name != "sqlite":
        return  # PostgreSQL's autovacuum does it
    while not stopping.wait(pause_s):
        with engine.begin() as connection:
            free = connection.exec_driver_sql("PRAGMA freelist_count").scalar() or 0
            # Some pages stay for the rows to come.
            if free <= VACUUM_PAGES:
                return
            driver = connection.connection.driver_connection
            if driver is not None:
                # One page is freed per step of the statement, and fetching is what steps it.
                driver.execute(f"PRAGMA incremental_vacuum({VACUUM_PAGES})").fetchall()
