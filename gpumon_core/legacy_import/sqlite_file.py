"""Opens and queries the SQLite file of another program, which may be writing to it. Neither the file nor the files
beside it are ever changed."""

from __future__ import annotations

import math
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gpumon_core.safety.text import clean

# The longest wait for a program that writes to the file, and the longest time for a query of a damaged file.
BUSY_S = 5.0
PATIENCE_S = 60.0
BYTES_PER_S = 2**20
# The number of tries for a query, where the file changes meanwhile; each pause is longer by RETRY_S than the last.
TRIES = 12
RETRY_S = 0.05
# Two changes so close to each other may leave the same time on a file: kernels count it in steps of 1 to 10 ms.
GRAIN_S = 0.02

MAGIC = b"SQLite format 3\0"
# What sqlite3 raises for a broken file. It decodes messages of SQLite, which may quote from the file.
BROKEN = (sqlite3.Error, UnicodeDecodeError, OverflowError, MemoryError)

# A file's device, inode, size and time of its last change in ns; None where there is no file.
FileStamp = tuple[int, int, int, int] | None


class SqliteFileError(Exception):
    """The file cannot be read; `str()` says why and what to do."""


class _Changed(Exception):
    """The file changed while it was read: the rows may come from two states."""


class SqliteFile:
    """An open file. `ask` raises SqliteFileError where the file turns out to be damaged or locked."""

    def __init__(self, path: Path, copying: bool = True) -> None:
        """Open a file. If a program was killed in the middle of a change, only a copy of the file can be read,
        which is made if `copying`. Raises SqliteFileError."""
        self.path = path
        self._copying = copying
        # A query that runs longer is stopped: in seconds of time.monotonic().
        self._deadline = math.inf
        # The state in which it was opened, where no lock stops others from changing it.
        self._opened_state: FileStamp = None
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        self._connection: sqlite3.Connection | None = None
        self.ask("SELECT count(*) FROM sqlite_master")

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._copy is not None:
            self._copy.cleanup()
            self._copy = None

    def ask(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """The rows of a query, all from one state of the file. Raises SqliteFileError, and then the file is
        closed."""
        for attempt in range(TRIES):
            try:
                if self._connection is None:
                    self._connection = self._open()
                return self._execute(self._connection, query, values)
            except _Changed:
                self.close()
                time.sleep(RETRY_S * (attempt + 1))
            except SqliteFileError:
                self.close()
                raise
        raise SqliteFileError(
            f"{self.path} was written to while it was read, {TRIES} times in a row: nothing more of it was read. "
            "Run it again, or stop the original first."
        )

    def _execute(self, connection: sqlite3.Connection, query: str, values: Sequence[Any]) -> list[Any]:
        try:
            self._deadline = time.monotonic() + PATIENCE_S + self.path.stat().st_size / BYTES_PER_S
            rows = connection.execute(query, values).fetchall()
        except BROKEN as error:
            self._check_state()
            raise self._explain(error) from error
        except OSError as error:
            raise SqliteFileError(
                f"{self.path} has disappeared ({error.strerror}) and cannot be read further: put it back, and "
                "run it again."
            ) from error
        finally:
            self._deadline = math.inf
        self._check_state()
        return rows

    def _check_state(self) -> None:
        if self._opened_state is not None and _state(self.path) != self._opened_state:
            raise _Changed

    def _open(self) -> sqlite3.Connection:
        try:
            if not self.path.is_file():
                what = "is not a file" if self.path.exists() else "does not exist"
                raise SqliteFileError(f"{self.path} {what}: name the original's gpu_metrics.db.")
            with self.path.open("rb") as file:
                header = file.read(20)
        except OSError as error:
            raise SqliteFileError(
                f"{self.path} cannot be read ({error.strerror}): give this user access to it."
            ) from error
        if not header.startswith(MAGIC) or len(header) < 20:
            raise SqliteFileError(f"{self.path} is not a SQLite file: name the original's gpu_metrics.db.")
        wal, shared = self._beside("-wal"), self._beside("-shm")
        in_wal_mode = header[18] == 2
        found = _settled(self.path) if in_wal_mode else None
        if in_wal_mode and not wal.exists():
            # The file is complete, and no program had it open just now. Opened this way, SQLite creates no file
            # beside it. It takes no lock either, so each answer is valid only if the file has not changed.
            connection = self._connect(self.path, "immutable=1")
            self._opened_state = found
            return connection
        self._opened_state = None
        connection = self._connect(self.path, "mode=ro")
        if not in_wal_mode or shared.exists():
            try:
                connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
                return connection
            except BROKEN as error:
                code = getattr(error, "sqlite_errorcode", 0) & 0xFF
                if code not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
                    connection.close()
                    raise self._explain(error) from error
        connection.close()
        if in_wal_mode and not wal.exists():
            raise _Changed
        if not self._copying:
            raise SqliteFileError(
                f"{self.path} was left in the middle of a change: `gpumon import` can read it from a copy."
            )
        return self._connect_to_copy()

    def _connect(self, path: Path, how: str) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(
                f"file:{quote(str(path.absolute()))}?{how}", uri=True, timeout=BUSY_S, isolation_level=None
            )
            for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0"):
                connection.execute(f"PRAGMA {pragma}")
        except BROKEN as error:
            raise self._explain(error) from error
        connection.set_progress_handler(lambda: time.monotonic() > self._deadline, 100_000)
        return connection

    def _connect_to_copy(self) -> sqlite3.Connection:
        """A killed program leaves changes beside the file that only a writer can apply: apply them to a copy."""
        parts = {suffix: self._beside(suffix) for suffix in ("", "-wal", "-journal")}
        states = {suffix: _settled(part) for suffix, part in parts.items()}

        def check() -> None:
            if any(_state(part) != states[suffix] for suffix, part in parts.items()):
                raise _Changed

        self._copy = tempfile.TemporaryDirectory(prefix="gpumon-import-")
        copy = Path(self._copy.name) / "copy.db"
        try:
            for suffix, part in parts.items():
                if states[suffix] is not None:
                    shutil.copyfile(part, copy.with_name(copy.name + suffix))
            check()
            connection = self._connect(copy, "mode=rw")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except (OSError, *BROKEN) as error:
            check()
            self.close()
            raise SqliteFileError(
                f"{self.path} was left in the middle of a change, and a copy to finish it on cannot be made "
                f"({error}): free some space in {tempfile.gettempdir()}, or open it once with sqlite3."
            ) from error
        return connection

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def _explain(self, error: Exception) -> SqliteFileError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        remedy = {
            sqlite3.SQLITE_BUSY: "Another program is writing to it: stop the original, or try again.",
            sqlite3.SQLITE_INTERRUPT: "Reading it takes too long for its size: it is damaged.",
            sqlite3.SQLITE_CANTOPEN: "Give this user access to it.",
            sqlite3.SQLITE_PERM: "Give this user access to it.",
        }.get(code, "It is damaged: `sqlite3 FILE .recover` may save what it holds.")
        # The message may quote from the file.
        why = clean(str(error), 200)
        return SqliteFileError(f"{self.path} cannot be read ({why}). {remedy}")


def _state(path: Path) -> FileStamp:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _settled(path: Path) -> FileStamp:
    """The state of a file, once any further change shows in it. Raises _Changed."""
    found = _state(path)
    if found is not None and 0 <= time.time_ns() - found[3] < GRAIN_S * 1e9:
        time.sleep(GRAIN_S)
        if _state(path) != found:
            raise _Changed
    return found
