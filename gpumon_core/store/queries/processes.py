"""Reads the process ledger: every process that was seen on a GPU, as pandas DataFrames.

Every function takes an engine from `database.open_for_reading`, and raises sqlalchemy.exc.DBAPIError where the
database does not answer. Times are integer UTC seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from gpumon_core.format import gpu_label
from gpumon_core.store.queries.process_filter import CONTAINER, EVERYTHING, ProcessFilter, running
from gpumon_core.store.schema import PROGRAM_COLUMNS, gpu_processes, gpus, hosts, process_gpus, programs

# The place of a row in the ledger's order: its first_seen and process_id.
Position = tuple[int, int]

PAGE_ROWS = 5000
# Up to this number a query lists the processes' ids; above it, it repeats the query that found them. SQLite takes
# 32,766 values.
NAMED = 5000
# The columns that are read from `gpu_processes` itself.
OWN = (
    *("id", "pid", "name", "username", "program_id", "start_time", "first_seen", "last_seen"),
    *("max_memory", "avg_memory", "seconds", "sample_count"),
)
# The columns of process_history; seconds becomes memory_mib_s, and lifetime_s follows from the times.
DTYPES = {
    "process_id": "int64",
    **dict.fromkeys(("host", "gpus"), "str"),
    "pid": "int64",
    **dict.fromkeys(("name", "username"), "str"),
    "start_time": "float64",
    "kind": "str",
    **dict.fromkeys(("first_seen", "last_seen"), "int64"),
    **dict.fromkeys(("max_memory", "avg_memory", "seconds"), "float64"),
    "sample_count": "int64",
    "running": "bool",
    **dict.fromkeys(("busy_s", "energy_j", "sm_mean", "max_sm"), "float64"),
    "estimated": "bool",
    **dict.fromkeys(PROGRAM_COLUMNS, "object"),
}


def count(engine: Engine, wanted: ProcessFilter = EVERYTHING) -> int:
    """How many processes meet the filter. Raises KeyError for a column that `programs` lacks."""
    query = sa.select(sa.func.count()).select_from(gpu_processes).where(*wanted.conditions(engine.dialect.name))
    with engine.connect() as connection:
        return int(connection.execute(query).scalar_one())


def process_history(engine: Engine, wanted: ProcessFilter = EVERYTHING, limit: int | None = None) -> pd.DataFrame:
    """The processes that meet the filter, newest first: one row per process.

    Columns: process_id, host, gpus (a text such as "0, 3"), pid, name, username, start_time, kind, first_seen,
    last_seen, lifetime_s, max_memory, avg_memory (MiB, summed over the process's GPUs), memory_mib_s (MiB times
    seconds), sample_count, running (bool), busy_s (seconds of a GPU at 100 %), energy_j, sm_mean, max_sm (%, NaN
    where the driver does not report it), estimated (bool: busy_s and energy_j are split by memory), and those of
    `programs` (None where not known). Raises KeyError for a column that `programs` lacks.
    """
    if limit is not None:
        return page(engine, wanted, limit)
    with engine.connect() as connection:
        frame = _read(connection, _ledger(wanted, engine.dialect.name))
    # Sorted here: the database would read all processes in this order to find a few of them.
    return frame.sort_values(["first_seen", "process_id"], ascending=False, ignore_index=True)


def page(
    engine: Engine, wanted: ProcessFilter = EVERYTHING, size: int = PAGE_ROWS, after: Position | None = None
) -> pd.DataFrame:
    """The first rows of process_history, or those that follow a position in it."""
    this = gpu_processes.c
    query = _ledger(wanted, engine.dialect.name).order_by(this.first_seen.desc(), this.id.desc()).limit(size)
    if after is not None:
        query = query.where(sa.tuple_(this.first_seen, this.id) < sa.tuple_(*after))
    with engine.connect() as connection:
        return _read(connection, query)


def position(frame: pd.DataFrame) -> Position:
    """The position of the last row of a page. Raises IndexError for an empty frame."""
    return int(frame["first_seen"].iloc[-1]), int(frame["process_id"].iloc[-1])


def pages(engine: Engine, wanted: ProcessFilter = EVERYTHING, size: int = PAGE_ROWS) -> Iterator[pd.DataFrame]:
    """process_history in pieces of at most `size` rows; one piece is in memory at a time.

    Each piece is a query of its own, so that a slow reader holds neither a connection nor the database's log. No
    process comes twice: its first_seen and id never change, and processes newer than the first row are left out.
    """
    return walk(lambda after: page(engine, wanted, size, after), position, size)


def walk(
    read: Callable[[Position | None], pd.DataFrame], position_of: Callable[[pd.DataFrame], Position], size: int
) -> Iterator[pd.DataFrame]:
    """Frames of at most `size` rows one after the other, each read from where the one before ended."""
    after = None
    while True:
        frame = read(after)
        if len(frame):
            after = position_of(frame)
            yield frame
        if len(frame) < size:
            return


def seen_last(engine: Engine, wanted: ProcessFilter, most: int) -> pd.DataFrame:
    """The rows of process_history that were seen last, at most so many, and in this order. Of those that were seen
    at the same time, the newest come first."""
    this = gpu_processes.c
    # The writer updates a running process's row only now and then. `running` has a row for each of its GPUs.
    now = running().add_columns(hosts.c.last_seen).distinct().subquery()
    seen = sa.func.coalesce(now.c.last_seen, this.last_seen)
    query = (
        sa.select(this.id)
        .outerjoin(now, now.c.process_id == this.id)
        .where(*wanted.conditions(engine.dialect.name))
        .order_by(seen.desc(), this.first_seen.desc(), this.id.desc())
        .limit(most)
    )
    with engine.connect() as connection:
        ids = connection.execute(query).scalars().all()
        frame = _read(connection, _ledger(EVERYTHING, engine.dialect.name).where(this.id.in_(ids)))
    return frame.sort_values(["last_seen", "first_seen", "process_id"], ascending=False, ignore_index=True)


def memory_totals(engine: Engine, process_ids: Iterable[int]) -> dict[int, int]:
    """By process id, the summed memory in MiB of all GPUs that the process was on. A process is missing where the
    memory of one of its GPUs is not known."""
    query = (
        sa.select(process_gpus.c.process_id, gpus.c.memory_total_mib)
        .join(gpus, gpus.c.id == process_gpus.c.gpu_id)
        .where(process_gpus.c.process_id.in_(list(process_ids)))
    )
    found: dict[int, list[int | None]] = {}
    with engine.connect() as connection:
        for process_id, total in connection.execute(query):
            found.setdefault(process_id, []).append(total)
    return {
        one: sum(known) for one, totals in found.items() if len(known := [*filter(None, totals)]) == len(totals)
    }


def usernames(engine: Engine) -> list[str]:
    """Every user in the ledger, by name."""
    return _values(engine, gpu_processes.c.username)


def containers(engine: Engine) -> list[str]:
    """Every container in the ledger, as ProcessFilter names them, by name."""
    return _values(engine, CONTAINER)


def program_values(engine: Engine, column: str) -> list[str]:
    """Every value that a column of `programs` has in the ledger, in order. Raises KeyError for another."""
    return _values(engine, programs.c[column])


def workloads(engine: Engine) -> list[str]:
    """Every workload in the ledger in the order in which they were first seen: a new one moves no other."""
    name = programs.c.workload
    query = sa.select(name).where(name.is_not(None)).group_by(name).order_by(sa.func.min(programs.c.id))
    with engine.connect() as connection:
        return list(connection.execute(query).scalars())


def _values(engine: Engine, value: sa.ColumnElement[Any]) -> list[str]:
    with engine.connect() as connection:
        return sorted(connection.execute(sa.select(value).where(value.is_not(None)).distinct()).scalars())


def _ledger(wanted: ProcessFilter, dialect: str) -> sa.Select[Any]:
    return (
        sa.select(*(gpu_processes.c[name] for name in OWN), hosts.c.name.label("host"))
        .join(hosts, hosts.c.id == gpu_processes.c.host_id)
        .where(*wanted.conditions(dialect))
    )


def _read(connection: Connection, chosen: sa.Select[Any]) -> pd.DataFrame:
    """Rows of the ledger with what they did on their GPUs and what they run.

    Joined before there is a frame: joining frames of a few rows takes longer than all the queries.
    """
    rows = connection.execute(chosen).all()
    ids = [row.id for row in rows]
    used = _on_gpus(connection, ids if len(ids) <= NAMED else sa.select(chosen.subquery().c.id))
    runs = _programs(connection, {row.program_id for row in rows if row.program_id is not None})
    now = {row.process_id: row.last_seen for row in connection.execute(running().add_columns(hosts.c.last_seen))}
    columns: dict[str, Sequence[Any]]
    columns = dict(zip((*OWN, "host"), zip(*rows, strict=True), strict=True)) if rows else {}
    columns |= {"process_id": ids, "running": [process_id in now for process_id in ids]}
    # The writer updates the rows of running processes only now and then: they were seen just now.
    columns["last_seen"] = [now.get(row.id, row.last_seen) for row in rows]
    nowhere, nothing = _Used(), (None,) * len(PROGRAM_COLUMNS)
    on = [used.get(process_id, nowhere) for process_id in ids]
    for name in ("busy_s", "energy_j", "max_sm", "estimated"):
        columns[name] = [getattr(one, name) for one in on]
    columns["gpus"] = [", ".join(one.labels) for one in on]
    columns["kind"] = [_join_kinds(one.kinds) for one in on]
    columns["sm_mean"] = [one.sm_percent_s / one.sm_told_s if one.sm_told_s else None for one in on]
    programs_of = zip(*(runs.get(row.program_id, nothing) for row in rows), strict=True)
    columns |= dict(zip(PROGRAM_COLUMNS, programs_of, strict=True)) if rows else {}
    frame = pd.DataFrame(
        {name: pd.Series(list(columns.get(name, ())), dtype=dtype) for name, dtype in DTYPES.items()}
    )
    frame["lifetime_s"] = frame["last_seen"] - frame["first_seen"]
    frame["memory_mib_s"] = frame["avg_memory"] * frame.pop("seconds")
    return frame


@dataclass(slots=True)
class _Used:
    """What a process did on all of its GPUs, summed."""

    labels: list[str] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    busy_s: float = 0.0
    energy_j: float = 0.0
    sm_percent_s: float = 0.0
    sm_told_s: float = 0.0
    max_sm: int | None = None
    estimated: bool = False


def _on_gpus(connection: Connection, process_ids: Any) -> dict[int, _Used]:
    names = ("process_id", "kind", "busy_s", "energy_j", "sm_percent_s", "sm_told_s", "max_sm", "estimated")
    query = (
        sa.select(*(process_gpus.c[name] for name in names), gpus.c.gpu_index, gpus.c.mig_index)
        .join(gpus, gpus.c.id == process_gpus.c.gpu_id)
        .where(process_gpus.c.process_id.in_(process_ids))
        .order_by(process_gpus.c.process_id, gpus.c.gpu_index, gpus.c.mig_index)
    )
    found: dict[int, _Used] = {}
    for process_id, kind, busy_s, energy_j, percent_s, told_s, max_sm, estimated, index, mig in connection.execute(
        query
    ):
        used = found.get(process_id)
        if used is None:
            used = found[process_id] = _Used()
        used.labels.append(gpu_label(index, mig))
        used.kinds.add(kind)
        used.busy_s += busy_s
        used.energy_j += energy_j
        used.sm_percent_s += percent_s
        used.sm_told_s += told_s
        if max_sm is not None:
            used.max_sm = max(max_sm, used.max_sm or 0)
        used.estimated |= estimated == 1
    return found


def _programs(connection: Connection, ids: set[int]) -> dict[int | None, tuple[str | None, ...]]:
    query = sa.select(programs.c.id, *(programs.c[name] for name in PROGRAM_COLUMNS))
    if len(ids) <= NAMED:
        query = query.where(programs.c.id.in_(ids))
    return {row[0]: tuple(row[1:]) for row in connection.execute(query)}


def _join_kinds(kinds: Iterable[str]) -> str:
    letters = {letter for kind in kinds for letter in kind.split("+")}
    return "+".join(letter for letter in "MCG" if letter in letters)
