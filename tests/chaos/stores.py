"""The databases, read with plain SQL: which readings are in them, and which went with a file that was lost."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

# The fake driver gives every reading a number of its own as its video clock.
ROWS = "SELECT video_clock, uuid, timestamp_epoch, recorded_ms FROM gpu_metrics JOIN gpus ON gpus.id = gpu_id"
COUNTS = ("ticks", "skipped", "failed", "dropped")


@dataclass(slots=True)
class Contents:
    """What a database holds: the numbers of readings; and by GPU and second the number of each row, with the time
    that it speaks of."""

    numbers: set[int] = field(default_factory=set)
    rows: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    # Why it may be incomplete.
    problem: str | None = None


@dataclass(slots=True)
class Grave:
    """A file that was lost: what it held then, and a connection that still sees what is written into it."""

    why: str
    held: Contents
    connection: sqlite3.Connection

    def look_again(self) -> None:
        """Take what was written since for lost with it, too."""
        now = contents_of(self.connection)
        self.held.numbers |= now.numbers
        self.held.rows |= now.rows

    def written(self) -> set[int]:
        """The numbers of all readings that are in it by now."""
        return contents_of(self.connection).numbers


class Store:
    """One SQLite database of gpumon's."""

    def __init__(self, folder: Path, name: str = "gpumon.db") -> None:
        self.folder, self.path = folder, folder / name
        self.graves: list[Grave] = []

    def parts(self) -> list[Path]:
        """The file, and what SQLite keeps beside it."""
        return [self.path.with_name(self.path.name + suffix) for suffix in ("", "-wal", "-shm")]

    def connect(self, path: Path | None = None) -> sqlite3.Connection:
        """A connection that cannot write. Raises sqlite3.Error."""
        return sqlite3.connect(
            f"file:{path or self.path}?mode=ro",
            uri=True,
            isolation_level=None,
            timeout=30,
            check_same_thread=False,
        )

    def contents(self, labels: Iterable[int] = (), path: Path | None = None) -> Contents:
        """What is in it. Of a file that is damaged, what the rows of the seconds in `labels` say."""
        if not (path or self.path).exists():
            return Contents(problem="there is no file")
        try:
            with closing(self.connect(path)) as connection:
                return contents_of(connection, labels)
        except sqlite3.Error as error:
            return Contents(problem=f"{type(error).__name__}: {error}")

    def bury(self, why: str) -> Grave:
        """Remember what the file holds, just before it is lost."""
        connection = self.connect()
        grave = Grave(why, contents_of(connection), connection)
        self.graves.append(grave)
        return grave

    def aside(self, labels: Iterable[int]) -> list[Contents]:
        """What is in the files that gpumon has set aside."""
        found = sorted(self.folder.glob(f"{self.path.name}.*-[0-9]*"))
        return [self.contents(labels, path) for path in found if not path.name.endswith(("-wal", "-shm"))]

    def texts(self) -> Iterator[tuple[str, bytes]]:
        """All that it has written, to be searched; with names."""
        for path in self.folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    yield str(path.relative_to(self.folder.parent)), file.read(256 * 2**20)

    def counts(self) -> dict[str, int]:
        """What the recorder says of itself, minute by minute, in this file and in those that were lost."""
        found = dict.fromkeys(COUNTS, 0)
        connections = [grave.connection for grave in self.graves]
        with suppress(sqlite3.Error):
            connections.append(self.connect())
        for connection in connections:
            try:
                sums = ", ".join(f"sum({name})" for name in COUNTS)
                row = connection.execute(f"SELECT {sums} FROM recorder_health").fetchone()
            except sqlite3.Error:
                continue
            for name, value in zip(COUNTS, row, strict=True):
                found[name] += value or 0
        return found


def contents_of(connection: sqlite3.Connection, labels: Iterable[int] = ()) -> Contents:
    """What is in a database; see Store.contents."""
    found = Contents()

    def take(where: str = "", values: tuple[int, ...] = ()) -> None:
        for number, uuid, second, recorded_ms in connection.execute(f"{ROWS} {where}", values).fetchall():
            found.rows[uuid, second] = number or 0, recorded_ms or 0
            if number is not None:
                found.numbers.add(number)

    try:
        take()
    except sqlite3.Error as error:
        found.problem = f"{type(error).__name__}: {error}"
        for label in labels:
            for gpu in (1, 2):
                try:
                    take("WHERE gpu_id = ? AND timestamp_epoch = ?", (gpu, label))
                except sqlite3.Error:
                    continue
    return found


class ServerStore(Store):
    """What one host has in a PostgreSQL database that it shares with others."""

    def __init__(self, folder: Path, host: str, url: str) -> None:
        super().__init__(folder)
        self.host, self.url = host, url

    def ask(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """The rows of a query. Raises psycopg.Error."""
        address = self.url.replace("+psycopg", "")
        with psycopg.connect(
            address, connect_timeout=5, autocommit=True, options="-c statement_timeout=10s"
        ) as it:
            return it.execute(query.encode(), values or None).fetchall()

    def contents(self, labels: Iterable[int] = (), path: Path | None = None) -> Contents:
        """See Store. Everything is there, or nothing."""
        del labels, path
        found = Contents()
        try:
            rows = self.ask(f"{ROWS} JOIN hosts ON hosts.id = host_id WHERE hosts.name = %s", self.host)
        except psycopg.Error as error:
            return Contents(problem=f"{type(error).__name__}: {error}")
        for number, uuid, second, recorded_ms in rows:
            found.rows[uuid, second] = number or 0, recorded_ms or 0
            if number is not None:
                found.numbers.add(number)
        return found

    def aside(self, labels: Iterable[int]) -> list[Contents]:
        """Nothing is set aside there."""
        del labels
        return []

    def texts(self) -> Iterator[tuple[str, bytes]]:
        """See Store: every row of every table, and what lies in the folder."""
        yield from super().texts()
        tables = self.ask("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        for (table,) in tables:
            rows = self.ask(f'SELECT one::text FROM "{table}" AS one')
            yield f"the table {table}", "\n".join(row[0] for row in rows).encode()

    def counts(self) -> dict[str, int]:
        """See Store."""
        sums = ", ".join(f"coalesce(sum({name}), 0)" for name in COUNTS)
        query = f"SELECT {sums} FROM recorder_health JOIN hosts ON hosts.id = host_id WHERE hosts.name = %s"
        return dict(zip(COUNTS, map(int, self.ask(query, self.host)[0]), strict=True))
