"""The file of a SQLite database: which one is open, whether it is sound, and how it is moved out of the way."""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from pathlib import Path
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.engine import Engine

# What every SQLite file begins with. Source: https://www.sqlite.org/fileformat.html
MAGIC = b"SQLite format 3\0"
LOG, INDEX = "-wal", "-shm"

Identity = tuple[int, int]


def identity(path: Path | None) -> Identity | None:
    """Device and inode of the file that a path leads to; None where there is none."""
    try:
        found = path.stat() if path else None
    except OSError:
        return None
    return found and (found.st_dev, found.st_ino)


def beside(path: Path, suffix: str) -> Path:
    """One of the files that SQLite keeps beside a database."""
    return path.with_name(path.name + suffix)


class OpenFile:
    """The file that an engine has open. Its path may come to lead to another one, or to none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database = identity(path)
        self._log = identity(beside(path, LOG))

    def look(self) -> Literal["same", "gone", "replaced"]:
        """Where the path leads now."""
        now = identity(self.path)
        if now == self._database:
            self._log = identity(beside(self.path, LOG))
            return "same"
        return "gone" if now is None else "replaced"

    def put_log_aside(self) -> Path | None:
        """Rename the write-ahead log of the file that was open, if it lies beside another one now: SQLite would
        apply it to that one. Returns the new name. Raises OSError."""
        wal = beside(self.path, LOG)
        if self._log is None or identity(wal) != self._log:
            return None
        aside = unused(self.path, f"replaced-{_now()}")
        wal.rename(beside(aside, LOG))
        # It only says what is where in the log.
        beside(self.path, INDEX).unlink(missing_ok=True)
        return beside(aside, LOG)


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
            # A transaction of writing would keep everybody else out for as long.
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
