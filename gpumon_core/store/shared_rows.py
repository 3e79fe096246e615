"""Rows that recorders of several hosts may make at once: programs, which hosts share, and whatever is unique."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from gpumon_core.attribution.records import NOTHING, Program
from gpumon_core.store.accounting import UNKNOWN_PROGRAM
from gpumon_core.store.bulk import upsert
from gpumon_core.store.schema import PROGRAM_COLUMNS, programs

# How often the row of a program is looked for and made before giving up.
ATTEMPTS = 5


def row_of_program(connection: Connection, now: int, program: Program) -> int:
    """The row of a program, made when it is the first of its kind on any host."""
    if program == NOTHING:
        return UNKNOWN_PROGRAM
    values = {name: getattr(program, name) for name in PROGRAM_COLUMNS}
    digest = hashlib.blake2b(repr(list(values.values())).encode("utf-8", "replace"), digest_size=16).hexdigest()
    # Held until the transaction ends: retention deletes programs that nobody runs.
    query = sa.select(programs.c.id).where(programs.c.digest == digest).with_for_update(read=True, key_share=True)
    for _ in range(ATTEMPTS):
        known = connection.execute(query).scalar()
        if known is not None:
            return int(known)
        with _shared(connection) as apart:
            insert(apart, programs, {"digest": digest, "last_used": now, **values})
    # Retention of another host deletes what nobody has used for months, and this was used just now.
    raise RuntimeError(f"the program {digest} is deleted as often as it is made")


def used_until(connection: Connection, now: int, program_id: int) -> None:
    """Note when a process last ran a program."""
    with _shared(connection) as apart:
        apart.execute(sa.update(programs).where(programs.c.id == program_id).values(last_used=now))


@contextmanager
def _shared(connection: Connection) -> Iterator[Connection]:
    """Where to change rows that the recorders of all hosts share: in a transaction of its own, committed at once.

    Within that of a tick it would make every other recorder wait that has the same to write, until that tick is
    committed, and two that come to the same rows in another order would wait for each other. A SQLite file has
    one recorder, whose tick is the only transaction there can be.
    """
    if connection.dialect.name == "sqlite":
        yield connection
        return
    with connection.engine.begin() as apart:
        yield apart


def insert(connection: Connection, table: sa.Table, row: dict[str, Any]) -> int:
    """Insert a row and return its id; where another was first with the same unique columns, the id of its row."""
    if connection.dialect.name == "sqlite":
        # Nobody else can be first: the transaction has the file's only write lock since it began.
        key = connection.execute(table.insert(), row).inserted_primary_key
        if key is None:
            raise RuntimeError(f"{table.name} returned no id")
        return int(key[0])
    statement = upsert(connection.dialect, table).on_conflict_do_nothing().returning(table.c.id)
    made = connection.execute(statement, row).scalar()
    if made is None:
        # It waited for the other's commit, so that this statement sees the row.
        same = [column == row[column.name] for column in _unique(table)]
        made = connection.execute(sa.select(table.c.id).where(*same)).scalar_one()
    return int(made)


def _unique(table: sa.Table) -> list[sa.Column[Any]]:
    """What no two rows of a table have in common, beside the id."""
    constraints = [one for one in table.constraints if isinstance(one, sa.UniqueConstraint)]
    return [column for one in constraints for column in one.columns]
