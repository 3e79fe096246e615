"""Opens the SQLite file of another program and asks it, while that program may be writing to it: neither the file
nor what lies beside it is ever changed."""

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

# So long a program that writes to the file is waited for, and a question to a damaged file may take.
BUSY_S = 5.0
PATIENCE_S = 60.0
BYTES_PER_S = 2**20
# So often a question is asked, where the file was written to meanwhile; the pause before the next time grows by as
# much each time.
TRIES = 12
RETRY_S = 0.05
# Two changes this close to each other may leave a file with one time: kernels count it in steps of 1 to 10 ms.
GRAIN_S = 0.02

MAGIC = b"SQLite format 3\0"
# What sqlite3 raises of a broken file: it decodes what SQLite says of it, which may quote from it.
BROKEN = (sqlite3.Error, UnicodeDecodeError, OverflowError, MemoryError)

# A file's device, inode, size and time of its last change in ns; None where there is no file.
State = tuple[int, int, int, int] | None


class OriginalError(Exception):
    """The file cannot be read; `str()` says why and what to do."""


class _Written(Exception):
    """The file was written to while it was read: what was read may be of two states."""


class OriginalFile:
    """An open file. `ask` raises OriginalError where the file turns out to be damaged or locked."""

    def __init__(self, path: Path, copying: bool = True) -> None:
        """Open a file. Where it was left in the middle of a change, only a copy of it can be read: made if
        `copying`. Raises OriginalError."""
        self.path = path
        self._copying = copying
        # In seconds of time.monotonic(): what takes longer is broken off.
        self._deadline = math.inf
        # As it was opened, where no lock keeps others from changing it meanwhile.
        self._found: State = None
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        self._connection: sqlite3.Connection | None = None
        self.ask("SELECT count(*) FROM sqlite_master")

    def close(self) -> None:
        """Let go of the file; doing it twice is fine."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._copy is not None:
            self._copy.cleanup()
            self._copy = None

    def ask(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """The rows of a query, all of one state of the file. Raises OriginalError, which lets go of the file."""
        for attempt in range(TRIES):
            try:
                if self._connection is None:
                    self._connection = self._open()
                return self._execute(self._connection, query, values)
            except _Written:
                self.close()
                time.sleep(RETRY_S * (attempt + 1))
            except OriginalError:
                self.close()
                raise
        raise OriginalError(
            f"{self.path} was written to while it was read, {TRIES} times in a row. Run it again, or stop the "
            "original first."
        )

    def _execute(self, connection: sqlite3.Connection, query: str, values: Sequence[Any]) -> list[Any]:
        try:
            self._deadline = time.monotonic() + PATIENCE_S + self.path.stat().st_size / BYTES_PER_S
            rows = connection.execute(query, values).fetchall()
        except BROKEN as error:
            self._check_state()
            raise self._explain(error) from error
        except OSError as error:
            raise OriginalError(f"{self.path} has gone away ({error.strerror}).") from error
        finally:
            self._deadline = math.inf
        self._check_state()
        return rows

    def _check_state(self) -> None:
        if self._found is not None and _state(self.path) != self._found:
            raise _Written

    def _open(self) -> sqlite3.Connection:
        try:
            if not self.path.is_file():
                what = "is not a file" if self.path.exists() else "does not exist"
                raise OriginalError(f"{self.path} {what}: name the original's gpu_metrics.db.")
            with self.path.open("rb") as file:
                header = file.read(20)
        except OSError as error:
            raise OriginalError(
                f"{self.path} cannot be read ({error.strerror}): give this user access to it."
            ) from error
        if not header.startswith(MAGIC) or len(header) < 20:
            raise OriginalError(f"{self.path} is not a SQLite file: name the original's gpu_metrics.db.")
        wal, shared = self._beside("-wal"), self._beside("-shm")
        in_wal_mode = header[18] == 2
        found = _settled(self.path) if in_wal_mode else None
        if in_wal_mode and not wal.exists():
            # All is in the file, and nobody had it open just now: this way nothing is made beside it. No lock is
            # taken, either, so that every answer stands only if the file has not changed since.
            connection = self._connect(self.path, "immutable=1")
            self._found = found
            return connection
        self._found = None
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
            raise _Written
        if not self._copying:
            raise OriginalError(f"{self.path} was left in the middle of a change.")
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
        """What a program that was killed left beside the file belongs to it, but only a writer can apply it: to a
        copy."""
        parts = {suffix: self._beside(suffix) for suffix in ("", "-wal", "-journal")}
        states = {suffix: _settled(part) for suffix, part in parts.items()}

        def check() -> None:
            if any(_state(part) != states[suffix] for suffix, part in parts.items()):
                raise _Written

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
            raise OriginalError(
                f"{self.path} was left in the middle of a change, and a copy to finish it on cannot be made "
                f"({error}): free some space in {tempfile.gettempdir()}, or open it once with sqlite3."
            ) from error
        return connection

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def _explain(self, error: Exception) -> OriginalError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        remedy = {
            sqlite3.SQLITE_BUSY: "Another program is writing to it: stop the original, or try again.",
            sqlite3.SQLITE_INTERRUPT: "To read it takes far too long for its size: it is damaged.",
            sqlite3.SQLITE_CANTOPEN: "Give this user access to it.",
            sqlite3.SQLITE_PERM: "Give this user access to it.",
        }.get(code, "It is damaged: `sqlite3 FILE .recover` may save what it holds.")
        # SQLite quotes from the file.
        why = clean(str(error), 200)
        return OriginalError(f"{self.path} cannot be read ({why}). {remedy}")


def _state(path: Path) -> State:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _settled(path: Path) -> State:
    """The state of a file that any change from now on will change. Raises _Written."""
    found = _state(path)
    if found is not None and 0 <= time.time_ns() - found[3] < GRAIN_S * 1e9:
        time.sleep(GRAIN_S)
        if _state(path) != found:
            raise _Written
    return found
