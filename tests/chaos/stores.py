"""The databases, read with plain SQL: which readings are in them, and which went with a file that was lost."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

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
    held: set[int]
    connection: sqlite3.Connection


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
        grave = Grave(why, contents_of(connection).numbers, connection)
        self.graves.append(grave)
        return grave

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
