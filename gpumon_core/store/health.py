"""What the recorder writes down about itself, once a minute."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.engine import Engine

from gpumon_core.store import database
from gpumon_core.store.bulk import Bulk, replacing
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
    statement = Bulk(engine.dialect, replacing(engine.dialect, recorder_health), recorder_health.columns.keys())
    with engine.begin() as connection:
        statement.run(connection, [row])
