"""The file of a SQLite database: which one is open, whether it is sound, and how it is moved out of the way."""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.pool import QueuePool

# What every SQLite file begins with. Source: https://www.sqlite.org/fileformat.html
MAGIC = b"SQLite format 3\0"
LOG, INDEX = "-wal", "-shm"

Identity = tuple[int, int]
FileState = Literal["same", "gone", "replaced", "without log"]


def identity(path: Path | None) -> Identity | None:
    """Device and inode of the file that a path leads to; None where there is none."""
    try:
        found = path.stat() if path else None
    except OSError:
        return None
    return found and (found.st_dev, found.st_ino)


def beside(path: Path, suffix: str) -> Path:
    """One of the files that SQLite has beside a database: where a link leads, not where it lies."""
    return Path(os.path.realpath(path) + suffix)


class OpenFile:
    """The file that this program's recorder has open. Its path may come to lead to another one, or to none; nobody
    in this program opens that one until the recorder has: see `await_recorder`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database = identity(path)
        # What SQLite has beside it, once it is there: neither changes as long as the database is open.
        self._beside = beside(path, LOG), beside(path, INDEX)
        self._log, self._index = map(identity, self._beside)
        _recorded[path] = self

    def look(self) -> FileState:
        """Where the path leads now: to the file that was opened, to none, to another; or to the same without its
        log or the log's index, which hold what was committed last."""
        now = identity(self.path)
        if now != self._database:
            return "gone" if now is None else "replaced"
        log, index = map(identity, self._beside)
        if (self._log or log, self._index or index) != (log, index):
            return "without log"
        self._log, self._index = log, index
        return "same"

    def put_log_aside(self, mark: str) -> Path | None:
        """Rename the write-ahead log of the file that was open, if it still lies there: SQLite would apply it to
        whatever file has the path now. Returns the new name. Raises OSError."""
        wal = beside(self.path, LOG)
        if self._log is None or identity(wal) != self._log:
            return None
        aside = unused(Path(os.path.realpath(self.path)), f"{mark}-{_now()}")
        wal.rename(beside(aside, LOG))
        # It only says what is where in the log.
        beside(self.path, INDEX).unlink(missing_ok=True)
        return beside(aside, LOG)

    def clear_way(self) -> None:
        """Rename what lies in the place of the log or its index and is no file. Raises OSError."""
        aside = unused(Path(os.path.realpath(self.path)), f"foreign-{_now()}")
        for suffix in (LOG, INDEX):
            part = beside(self.path, suffix)
            if os.path.lexists(part) and not stat.S_ISREG(os.lstat(part).st_mode):
                part.rename(beside(aside, suffix))

    def close(self) -> None:
        """Nothing is recorded into it any more, or the path is ready to be opened anew."""
        if _recorded.get(self.path) is self:
            del _recorded[self.path]


# What is recorded into by this program, by path; and who in this program reads it through a pool.
_recorded: dict[Path, OpenFile] = {}
_readers: WeakKeyDictionary[Engine, Path] = WeakKeyDictionary()


def reads(engine: Engine, path: Path) -> None:
    """An engine leaves connections to a file open."""
    _readers[engine] = path


def close_readers(path: Path, patience_s: float) -> None:
    """Close what this program has open of a file for reading, and wait so long for what is in use."""
    ends = time.monotonic() + patience_s
    for engine in [one for one, file in list(_readers.items()) if file == path]:
        engine.dispose()
        while isinstance(engine.pool, QueuePool) and engine.pool.checkedout() > 0 and time.monotonic() < ends:
            time.sleep(0.01)
            engine.dispose()


def save_log(engine: Engine) -> bool:
    """Bring what was committed from the log into the file, by a connection that has both open still; whether all
    of it is there. Raises sqlalchemy.exc.DBAPIError."""
    with engine.connect() as connection:
        try:
            is_busy, _, _ = connection.connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as error:
            raise sa.exc.OperationalError("PRAGMA wal_checkpoint", {}, error) from error
    return not is_busy


def await_recorder(path: Path) -> None:
    """Raise sqlite3.OperationalError while a path leads to another file than this program records into.

    Whoever opened that first would take the log and the index of the file before for its own, and within one
    program SQLite shares the index with all later connections.
    """
    recorded = _recorded.get(path)
    if recorded is not None and recorded.look() != "same":
        raise sqlite3.OperationalError(f"{path}, or its log, was removed or replaced, and is opened anew soon")


def is_sqlite(path: Path) -> bool:
    """Whether a file is a SQLite database by its first bytes, or still empty. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) in (MAGIC, b"")


def damage(engine: Engine) -> str | None:
    """What SQLite's quick check finds wrong; None where the file is sound. Reads the whole file. Raises
    sqlalchemy.exc.DBAPIError."""
    if engine.dialect.name != "sqlite":
        return None
    try:
        with engine.connect() as connection:
            # A transaction of writing would shut everybody else out for as long.
            found = connection.connection.cursor().execute("PRAGMA quick_check(1)").fetchone()
    except (sqlite3.Error, sa.exc.DBAPIError) as error:
        if is_damage(error):
            return str(getattr(error, "orig", None) or error)
        if isinstance(error, sqlite3.Error):
            raise sa.exc.OperationalError("PRAGMA quick_check", {}, error) from error
        raise
    return None if found is None or found[0] == "ok" else str(found[0])


def is_damage(error: BaseException) -> bool:
    """Whether an error means that the SQLite file itself is broken."""
    code = getattr(getattr(error, "orig", error), "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def set_aside(path: Path) -> Path:
    """Give a damaged file, and what belongs to it, another name; returns that of the file.

    Only a SQLite database is renamed: whatever else lies there is somebody else's. Raises OSError.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(0, "it is a link, or no regular file; what it leads to is left alone")
    if not is_sqlite(path):
        raise OSError(0, "it is no SQLite database, and is left alone")
    aside = unused(path, f"damaged-{_now()}")
    for suffix in (LOG, INDEX, ""):
        part = beside(path, suffix)
        if part.exists():
            part.rename(beside(aside, suffix))
    return aside


def unused(path: Path, mark: str) -> Path:
    """A name beside a file that nothing has yet."""
    aside, number = path.with_name(f"{path.name}.{mark}"), 1
    while aside.exists() or beside(aside, LOG).exists():
        number += 1
        aside = path.with_name(f"{path.name}.{mark}-{number}")
    return aside


def _now() -> str:
    return time.strftime("%Y%m%d-%H%M%S")


def explain_foreign(path: Path) -> str | None:
    """Why a file is refused that is no SQLite database; None where it may be one."""
    try:
        if path.is_file() and not is_sqlite(path):
            return (
                f"{path} is no SQLite database, and is left as it is. Move it away, or name another file in "
                "GPUMON_DATABASE_URL."
            )
    except OSError:
        # Opening it says why.
        return None
    return None
