"""Forgets raw ticks that are older than their time, without holding the recorder up."""

from __future__ import annotations

import logging
import threading
import time

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from gpumon_core.store.schema import gpu_metrics, gpus, process_snapshots

log = logging.getLogger(__name__)

DAY_S = 86400
# Rows of one GPU, and seconds of processes, that one transaction forgets: some ten milliseconds of
# the write lock, between which the recorder gets its turn.
BATCH_ROWS = 2000
BATCH_S = 600
PAUSE_S = 0.02
# Pages given back to the file system in one step.
VACUUM_PAGES = 500


def forget(
    engine: Engine, raw_days: float, now: float | None = None, stopping: threading.Event | None = None
) -> int:
    """Delete raw ticks older than `raw_days`, and give their space back. Returns the rows deleted.

    Every step is a transaction of its own: a run that is broken off, as by `stopping`, is simply
    continued by the next.
    Raises sqlalchemy.exc.DBAPIError.
    """
    stopping = stopping or threading.Event()
    cutoff = int((time.time() if now is None else now) - raw_days * DAY_S)
    rows = 0
    with engine.connect() as connection:
        gpu_ids = list(connection.execute(sa.select(gpus.c.id)).scalars())
    for gpu_id in gpu_ids:
        while deleted := _forget_metrics(engine, gpu_id, cutoff):
            rows += deleted
            if stopping.wait(PAUSE_S):
                return rows
    while deleted := _forget_snapshots(engine, cutoff):
        rows += deleted
        if stopping.wait(PAUSE_S):
            return rows
    if rows:
        _give_back(engine, stopping)
        log.info("retention: %d raw rows older than %g days deleted", rows, raw_days)
    return rows


def _forget_metrics(engine: Engine, gpu_id: int, cutoff: int) -> int:
    mine = sa.and_(gpu_metrics.c.gpu_id == gpu_id, gpu_metrics.c.timestamp_epoch < cutoff)
    with engine.begin() as connection:
        # The rows to go stand together, oldest first; the batch ends before this one.
        query = sa.select(gpu_metrics.c.timestamp_epoch).where(mine).order_by(gpu_metrics.c.timestamp_epoch)
        end = connection.execute(query.offset(BATCH_ROWS).limit(1)).scalar()
        batch = mine if end is None else sa.and_(mine, gpu_metrics.c.timestamp_epoch < end)
        return connection.execute(sa.delete(gpu_metrics).where(batch)).rowcount


def _forget_snapshots(engine: Engine, cutoff: int) -> int:
    time_of = process_snapshots.c.timestamp_epoch
    with engine.begin() as connection:
        oldest = connection.execute(sa.select(sa.func.min(time_of))).scalar()
        if oldest is None or oldest >= cutoff:
            return 0
        end = min(cutoff, oldest + BATCH_S)
        return connection.execute(sa.delete(process_snapshots).where(time_of < end)).rowcount


def _give_back(engine: Engine, stopping: threading.Event) -> None:
    if engine.dialect.name != "sqlite":
        return  # PostgreSQL's autovacuum does it
    while not stopping.wait(PAUSE_S):
        with engine.begin() as connection:
            free = connection.exec_driver_sql("PRAGMA freelist_count").scalar() or 0
            # Some pages stay for the rows to come.
            if free <= VACUUM_PAGES:
                return
            driver = connection.connection.driver_connection
            if driver is not None:
                # One page is freed per step of the statement, and fetching is what steps it.
                driver.execute(f"PRAGMA incremental_vacuum({VACUUM_PAGES})").fetchall()
