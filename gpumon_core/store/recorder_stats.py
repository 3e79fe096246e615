"""What the recorder writes down about itself, once a minute."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import sqlalchemy as sa
from sqlalchemy.engine import Dialect, Engine

from gpumon_core.store import database
from gpumon_core.store.bulk import Bulk, upsert
from gpumon_core.store.schema import recorder_health


@dataclass(frozen=True, slots=True)
class Minute:
    """A minute of recording: ticks committed, skipped (the one before took too long), failed (nothing could
    be read) and dropped (the buffer was full); how many wait; how long a tick took, in milliseconds."""

    ticks: int
    skipped: int
    failed: int
    dropped: int
    buffered: int
    duration_ms: float | None
    duration_max_ms: float | None
    last_error: str | None


def write(engine: Engine, host_id: int, at: int, minute: Minute) -> None:
    """Store the minute that ends at `at`. Raises sqlalchemy.exc.DBAPIError."""
    row = (
        host_id,
        at,
        minute.ticks,
        minute.skipped,
        minute.failed,
        minute.dropped,
        minute.buffered,
        minute.duration_ms,
        minute.duration_max_ms,
        database.size_bytes(engine),
        minute.last_error,
    )
    with engine.begin() as connection:
        _statement(engine.dialect).run(connection, [row])


@lru_cache(maxsize=2)
def _statement(dialect: Dialect) -> Bulk:
    insert = upsert(dialect, recorder_health)
    new, old = insert.excluded, recorder_health.c
    # Asked for twice within a second, what the first has told is not told again.
    values = {name: old[name] + new[name] for name in ("ticks", "skipped", "failed", "dropped")}
    values |= {"buffered": new.buffered, "database_bytes": new.database_bytes}
    values |= {
        name: sa.func.coalesce(new[name], old[name]) for name in ("duration_ms", "duration_max_ms", "last_error")
    }
    insert = insert.on_conflict_do_update(index_elements=["host_id", "timestamp_epoch"], set_=values)
    return Bulk(dialect, insert, recorder_health.columns.keys())
