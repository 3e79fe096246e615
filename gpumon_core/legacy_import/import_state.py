"""How much of a file of the original was imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from gpumon_core.legacy_import.reader import Contents
from gpumon_core.store.accounting import longest_step
from gpumon_core.store.schema import gpu_metrics, gpus, hosts, imported_files


@dataclass(frozen=True, slots=True)
class ImportState:
    """Up to when a file was imported (UTC seconds; None: never), and whether nothing in it is new."""

    until: int | None
    is_complete: bool


def import_state(engine: Engine, host: str, path: Path, indices: Sequence[int], contents: Contents) -> ImportState:
    """How much of a file, with these GPUs by its own index, was imported for a host.

    Raises sqlalchemy.exc.DBAPIError.
    """
    with engine.connect() as connection:
        interval = connection.execute(sa.select(hosts.c.interval_s).where(hosts.c.name == host)).scalar() or 0.0
        query = (
            sa.select(imported_files.c.gpu_id, imported_files.c.source_index, imported_files.c.until)
            .join(gpus, gpus.c.id == imported_files.c.gpu_id)
            .join(hosts, hosts.c.id == gpus.c.host_id)
            .where(hosts.c.name == host, imported_files.c.source == database_path(path))
        )
        rows = connection.execute(query.where(imported_files.c.source_index.in_(indices))).all()
        last, step = contents.last, int(longest_step(interval))
        complete = {
            row.source_index
            for row in rows
            if last is None or row.until >= last or _is_recorded(connection, row.gpu_id, row.until, last, step)
        }
    return ImportState(min((row.until for row in rows), default=None), bool(rows) and complete >= set(indices))


def _is_recorded(connection: Connection, gpu_id: int, start: int, end: int, step: int) -> bool:
    """Whether a GPU has ticks from `start` to `end` without a longer pause: the file grew while gpumon
    recorded."""
    at = gpu_metrics.c.timestamp_epoch
    ticks = (
        sa.select(at.label("at"), (at - sa.func.lag(at).over(order_by=at)).label("pause"))
        .where(gpu_metrics.c.gpu_id == gpu_id, at >= start, at <= end + step)
        .subquery()
    )
    found = sa.select(sa.func.min(ticks.c.at), sa.func.max(ticks.c.at), sa.func.max(ticks.c.pause))
    first, last, longest = connection.execute(found).one()
    return first is not None and first <= start + step and last >= end - step and (longest or 0) <= step


def database_path(path: Path) -> str:
    """The path that identifies a file in the database, in characters that every database takes."""
    return os.fsencode(path.resolve()).decode("utf-8", "backslashreplace")
