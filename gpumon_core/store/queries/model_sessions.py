"""Which models were loaded when, from the ledger, as pandas DataFrames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from gpumon_core.store.queries.frames import fetch
from gpumon_core.store.queries.processes import PAGE_ROWS, Position, walk
from gpumon_core.store.queries.usage import Scope
from gpumon_core.store.schema import gpu_processes, gpus, hosts, programs
from gpumon_core.store.schema import model_sessions as sessions


def loaded(engine: Engine, scope: Scope, limit: int | None = None, after: Position | None = None) -> pd.DataFrame:
    """Which models were loaded at any time of the range, the newest first; with `after` those that follow a
    position in this order.

    Columns: session_id, model, process_id, gpu_id, host, gpu_index, mig_index, pid, name, username, workload,
    first_seen, last_seen (UTC seconds), lifetime_s, max_memory, avg_memory (MiB, the process's while it had the
    model), running.
    """
    conditions = _conditions(scope)
    if after is not None:
        place = sa.tuple_(sessions.c.first_seen, sessions.c.id)
        conditions.append(place < sa.tuple_(*after))
    return _read(engine, conditions, limit)


def position(frame: pd.DataFrame) -> Position:
    """The position of the last row of `loaded`. Raises IndexError for an empty frame."""
    return int(frame["first_seen"].iloc[-1]), int(frame["session_id"].iloc[-1])


def pages(engine: Engine, scope: Scope, size: int = PAGE_ROWS) -> Iterator[pd.DataFrame]:
    """`loaded` in pieces of at most `size` rows; one piece is in memory at a time."""
    return walk(lambda after: loaded(engine, scope, size, after), position, size)


def count(engine: Engine, scope: Scope) -> int:
    """How many rows `loaded` has."""
    query = _joined(sa.select(sa.func.count())).where(*_conditions(scope))
    with engine.connect() as connection:
        return int(connection.execute(query).scalar_one())


def of_process(engine: Engine, process_id: int) -> pd.DataFrame:
    """Which models one process had loaded, the newest first: the columns of `loaded`."""
    return _read(engine, [sessions.c.process_id == process_id], None)


def _is_loaded() -> Any:
    return sa.and_(sessions.c.active == 1, gpus.c.last_seen == hosts.c.last_seen)


def _last_seen() -> Any:
    return sa.case((_is_loaded(), hosts.c.last_seen), else_=sessions.c.last_seen)


def _read(engine: Engine, conditions: Sequence[Any], limit: int | None) -> pd.DataFrame:
    running, last_seen = _is_loaded(), _last_seen()
    query: sa.Select[Any] = sa.select(
        sessions.c.id.label("session_id"),
        *(sessions.c[name] for name in ("model", "process_id", "gpu_id")),
        hosts.c.name.label("host"),
        *(gpus.c[name] for name in ("gpu_index", "mig_index")),
        *(gpu_processes.c[name] for name in ("pid", "name", "username")),
        programs.c.workload,
        sessions.c.first_seen,
        last_seen.label("last_seen"),
        (last_seen - sessions.c.first_seen).label("lifetime_s"),
        *(sessions.c[name] for name in ("max_memory", "avg_memory")),
        sa.case((running, 1), else_=0).label("running"),
    )
    query = _joined(query).where(*conditions).order_by(sessions.c.first_seen.desc(), sessions.c.id.desc())
    frame = fetch(engine, query if limit is None else query.limit(limit))
    frame["running"] = frame["running"] == 1
    numbers = ["max_memory", "avg_memory", "mig_index"]
    frame[numbers] = frame[numbers].astype("float64")
    return frame


def _joined(query: sa.Select[Any]) -> sa.Select[Any]:
    return (
        query.select_from(sessions)
        .join(gpu_processes, gpu_processes.c.id == sessions.c.process_id)
        .join(gpus, gpus.c.id == sessions.c.gpu_id)
        .join(hosts, hosts.c.id == gpus.c.host_id)
        .outerjoin(programs, programs.c.id == gpu_processes.c.program_id)
    )


def _conditions(scope: Scope) -> list[Any]:
    found: list[Any] = [sessions.c.first_seen <= scope.end, _last_seen() >= scope.start]
    if scope.users:
        found.append(gpu_processes.c.username.in_(list(scope.users)))
    # The model of the session: the process may serve another one now.
    for name, values in scope.programs_with.items():
        if values:
            found.append((sessions.c.model if name == "model" else programs.c[name]).in_(list(values)))
    if scope.gpu_ids is not None:
        found.append(sessions.c.gpu_id.in_(list(scope.gpu_ids)))
    return found
