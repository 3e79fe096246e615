"""Statements that run for many rows at once, without SQLAlchemy's work for every single row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Dialect

Row = tuple[Any, ...]


class Bulk:
    """One compiled statement whose parameters are given as tuples, in the order of `names`."""

    def __init__(self, dialect: Dialect, statement: sa.Insert | sa.Update, names: Sequence[str]) -> None:
        columns = list(names) if isinstance(statement, sa.Insert) else None
        compiled = statement.compile(dialect=dialect, column_keys=columns)
        self._text = str(compiled)
        self._names = tuple(names)
        order = compiled.positiontup
        # Where a driver's parameters have places, not names: which of ours goes to which.
        self._places = None if order is None else [self._names.index(name) for name in order]
        self._straight = self._places == list(range(len(self._names)))

    def run(self, connection: Connection, rows: Sequence[Row]) -> int:
        """Execute it for every row; how many rows of the table it was. Raises sqlalchemy.exc.DBAPIError."""
        if not rows:
            return 0
        given: Any
        if self._straight:
            given = list(rows)
        elif self._places is not None:
            places = self._places
            given = [tuple(row[place] for place in places) for row in rows]
        else:
            given = [dict(zip(self._names, row, strict=True)) for row in rows]
        return connection.exec_driver_sql(self._text, given).rowcount


def setting(dialect: Dialect, table: sa.Table, columns: Sequence[str], keys: Sequence[str] = ("id",)) -> Bulk:
    """An UPDATE of some columns of a row: takes their values, then those of its keys."""
    places = {key: f"its_{key}" for key in keys}
    # An UPDATE keeps the names of its columns for itself.
    values = {name: f"new_{name}" for name in columns}
    statement = (
        sa.update(table)
        .where(*(table.c[key] == sa.bindparam(place) for key, place in places.items()))
        .values({name: sa.bindparam(value) for name, value in values.items()})
    )
    return Bulk(dialect, statement, [*values.values(), *places.values()])


def upsert(dialect: Dialect, table: sa.Table) -> Any:
    """An INSERT that knows ON CONFLICT, in the dialect of the database."""
    # Imported here: a recorder on SQLite does without the two megabytes of the other dialect.
    if dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert

        return insert(table)
    from sqlalchemy.dialects.sqlite import insert as insert_sqlite

    return insert_sqlite(table)


def replacing(dialect: Dialect, table: sa.Table) -> Any:
    """An INSERT that takes the place of a row with the same key."""
    statement = upsert(dialect, table)
    keys = [column.name for column in table.primary_key]
    others = {c.name: statement.excluded[c.name] for c in table.columns if c.name not in keys}
    return statement.on_conflict_do_update(index_elements=keys, set_=others)


def adding(dialect: Dialect, table: sa.Table) -> Any:
    """An INSERT that is added to a row with the same key, number by number."""
    statement = upsert(dialect, table)
    keys = [column.name for column in table.primary_key]
    sums = {c.name: c + statement.excluded[c.name] for c in table.columns if c.name not in keys}
    return statement.on_conflict_do_update(index_elements=keys, set_=sums)
