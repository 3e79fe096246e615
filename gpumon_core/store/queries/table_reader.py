"""Reads tables of any length, page by page in the order of their key: one page is in memory at a time.

Each page is a query of its own, so that a slow reader holds neither a connection nor the database's log, and no
row comes twice. Rows are the driver's own tuples: many times faster than rows of SQLAlchemy's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from gpumon_core.store.bulk import Row
from gpumon_core.store.queries.frames import gpu_ids
from gpumon_core.store.schema import gpu_processes, gpus, process_gpus

PAGE_ROWS = 10_000
# The columns with the beginning and the end of what a row is about; of a table, the first pair that it has.
TIMES = (
    ("timestamp_epoch", "timestamp_epoch"),
    ("first_seen", "last_seen"),
    ("first", "last"),
    ("imported_at", "imported_at"),
)


class NotSelectable(Exception):
    """A table lacks what rows are chosen by; `str()` says what."""


@dataclass(frozen=True, slots=True)
class RowSelection:
    """Some rows of a table, in the order of its key. None means all.

    start, end: UTC seconds; rows of that time, or about what was seen in it. gpu_ids: rows about one of these
    GPUs, or about a process that was on one of them.
    """

    table: sa.Table
    start: int | None = None
    end: int | None = None
    gpu_ids: tuple[int, ...] | None = None

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """The conditions for the rows. Raises NotSelectable."""
        return [*self._when(), *self._where()]

    def _when(self) -> list[sa.ColumnElement[bool]]:
        if self.start is None and self.end is None:
            return []
        this = self.table.c
        names = next((pair for pair in TIMES if pair[0] in this and pair[1] in this), None)
        if names is None:
            raise NotSelectable(f"{self.table.name} has no times to choose by")
        first, last = (this[name] for name in names)
        found = [] if self.start is None else [last >= self.start]
        return found if self.end is None else [*found, first <= self.end]

    def _where(self) -> list[sa.ColumnElement[bool]]:
        if self.gpu_ids is None:
            return []
        this = self.table.c
        if "gpu_id" in this:
            return [this.gpu_id.in_(self.gpu_ids)]
        if self.table is gpus:
            return [this.id.in_(self.gpu_ids)]
        if self.table is gpu_processes:
            on = sa.select(process_gpus.c.process_id).where(process_gpus.c.gpu_id.in_(self.gpu_ids))
            return [this.id.in_(on)]
        raise NotSelectable(f"{self.table.name} has no GPUs to choose by")


def count(engine: Engine, part: RowSelection) -> int:
    """How many rows there are. Raises NotSelectable, sqlalchemy.exc.DBAPIError."""
    query = sa.select(sa.func.count()).select_from(part.table).where(*part.conditions())
    with engine.connect() as connection:
        return int(connection.execute(query).scalar_one())


def pages(
    engine: Engine, part: RowSelection, columns: Sequence[sa.ColumnElement[Any]], size: int = PAGE_ROWS
) -> Iterator[list[Row]]:
    """The rows in pieces of at most `size`: the values of `columns`, which are the table's own or, where it has a
    process_id, those of `gpu_processes`. Raises NotSelectable, sqlalchemy.exc.DBAPIError."""
    key = list(part.table.primary_key.columns)
    query = sa.select(*columns, *key).select_from(_joined(part.table)).where(*part.conditions())
    if key[0].name == "gpu_id":
        # One GPU after the other: the time comes after it in the key, and is found by the index then.
        for gpu_id in part.gpu_ids if part.gpu_ids is not None else gpu_ids(engine):
            yield from _walk(engine, query.where(key[0] == gpu_id), key[1:], len(columns), size)
    else:
        yield from _walk(engine, query, key, len(columns), size)


def _walk(
    engine: Engine, query: sa.Select[Any], key: Sequence[sa.Column[Any]], width: int, size: int
) -> Iterator[list[Row]]:
    ordered = query.order_by(*key).limit(size)
    after: tuple[Any, ...] | None = None
    while True:
        page = ordered if after is None else ordered.where(sa.tuple_(*key) > sa.tuple_(*after))
        with engine.connect() as connection:
            cursor = connection.execute(page).cursor
            rows: list[Row] = list(cursor.fetchall()) if cursor is not None else []
        if rows:
            after = tuple(rows[-1][-len(key) :])
            yield rows
        if len(rows) < size:
            return


def _joined(table: sa.Table) -> sa.FromClause:
    # An outer join, so that the database reads this table in order, whatever size it assumes for the other.
    if "process_id" not in table.c:
        return table
    return table.outerjoin(gpu_processes, gpu_processes.c.id == table.c.process_id)
