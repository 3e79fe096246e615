"""One recorder at a time: a lock that its holder signs, and that ends with its holder.

A SQLite file has one recorder, a PostgreSQL server one for each host: see `recorder_lock`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from filelock import FileLock, Timeout
from sqlalchemy.engine import make_url

if TYPE_CHECKING:
    import psycopg
    from sqlalchemy.engine import Connection


@dataclass(frozen=True, slots=True)
class Holder:
    """Who records: a process id, the name of its machine, and since when (UTC seconds)."""

    pid: int
    host: str
    since: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class LockLost(Exception):
    """The lock is not this object's any more: another may record by now."""


class Lock(ABC):
    """What a recorder holds while it records.

    Every method but `release` and `holder` raises OSError, whose strerror says why, where the lock
    cannot be reached.
    """

    @abstractmethod
    def is_free(self) -> bool:
        """Whether nobody records at this moment; the last signature is left as it is."""

    @abstractmethod
    def acquire(self) -> bool:
        """Take the lock if it is free, and sign it; True too if this object holds it already."""

    @abstractmethod
    def is_held(self) -> bool:
        """Whether this object still holds the lock; once False, only `acquire` makes it True again."""

    def fence(self, connection: Connection) -> None:
        """Raise LockLost within a transaction of writing where the lock is not held any more."""
        if not self.is_held():
            raise LockLost

    @abstractmethod
    def release(self) -> None:
        """Give the lock back; doing it twice is fine."""

    @abstractmethod
    def holder(self) -> Holder | None:
        """Who holds a lock that could not be taken; None where that cannot be read."""


def recorder_lock(url: str, host: str) -> Lock:
    """The lock for recording `host` into the database at `url`. Nothing is opened yet."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return ServerRecorderLock(url, host)
    if not parsed.database:
        raise ValueError("a SQLite database in memory cannot be recorded into")
    return FileRecorderLock(Path(parsed.database), host)


class FileRecorderLock(Lock):
    """The lock on one SQLite file. The kernel frees it when its holder ends, however it ends."""

    # Finding out whether a file lock is free takes it for a moment: `acquire` outlasts that.
    PROBE_S = 0.25

    def __init__(self, database: Path, host: str) -> None:
        self._path = database.with_name(database.name + ".lock")
        self._host = host
        self._lock = FileLock(self._path, thread_local=False)

    def is_free(self) -> bool:
        if self._lock.is_locked:
            return False
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        self._lock.release()
        return True

    def acquire(self) -> bool:
        if self._lock.is_locked:
            return True
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=self.PROBE_S, poll_interval=0.01)
        except Timeout:
            return False
        signature = json.dumps(asdict(Holder(os.getpid(), self._host, int(time.time()))))
        # Written in place: replacing the file would leave the lock on the old one.
        with self._path.open("r+", encoding="utf-8") as file:
            file.truncate(0)
            file.write(signature)
        return True

    def is_held(self) -> bool:
        return self._lock.is_locked

    def release(self) -> None:
        self._lock.release()

    def holder(self) -> Holder | None:
        """Who signed last, which is who holds a lock that could not be taken."""
        try:
            return Holder(**json.loads(self._path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


# The name while recorder and doctor still construct it themselves.
RecorderLock = FileRecorderLock


class ServerRecorderLock(Lock):
    """The lock on one host's part of a PostgreSQL database: an advisory lock of a session of its own.

    The server frees it when that session ends. Through a pooler that is only so if it pools
    sessions, not transactions. Source: PostgreSQL documentation, "Advisory Locks" and "pg_locks".
    """

    # libpq's words. A network that is gone is noticed within half a minute, not after libpq's two hours.
    CONNECTING: ClassVar[dict[str, int]] = {
        "connect_timeout": 5,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 15_000,
    }
    # The same for the server's end, which decides when the lock of a machine that lost power is free.
    # A setting that an older server does not know is left out.
    SESSION = """
        SELECT set_config(name, wanted.setting, false)
        FROM pg_settings JOIN (VALUES
            ('tcp_keepalives_idle', '30'), ('tcp_keepalives_interval', '10'), ('tcp_keepalives_count', '3'),
            ('tcp_user_timeout', '60000'), ('idle_session_timeout', '0')
        ) AS wanted (name, setting) USING (name)
    """
    HOLDER = """
        SELECT application_name
        FROM pg_locks JOIN pg_stat_activity USING (pid)
        WHERE locktype = 'advisory' AND granted AND objsubid = 1
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND (classid::bigint << 32) | objid::bigint = %s
    """

    def __init__(self, url: str, host: str) -> None:
        self._url = make_url(url)
        self._host = host
        # Stable over versions of Python and gpumon: both sides must come to the same number.
        digest = hashlib.sha256(b"gpumon recorder\0" + host.encode()).digest()
        self._key = int.from_bytes(digest[:8], "big", signed=True)
        self._connection: psycopg.Connection[Any] | None = None

    def is_free(self) -> bool:
        return self._signature() is None

    def acquire(self) -> bool:
        if self.is_held():
            return True
        with _as_os_error():
            connection = self._connect(_signed(self._host))
            try:
                connection.execute(self.SESSION)
                if connection.execute("SELECT pg_try_advisory_lock(%s)", [self._key]).fetchone() == (True,):
                    self._connection = connection
            finally:
                if self._connection is None:
                    connection.close()
        return self._connection is not None

    def is_held(self) -> bool:
        """Asks the session that holds the lock, so a connection that broke counts as a lost lock."""
        if self._connection is None:
            return False
        import psycopg

        try:
            self._connection.execute("SELECT 1")
        except psycopg.Error:
            self._connection.close()
            self._connection = None
            return False
        return True

    def release(self) -> None:
        if self._connection is None:
            return
        import psycopg

        # Closing alone would free it too, but only some moments after this returned.
        with suppress(psycopg.Error):
            self._connection.execute("SELECT pg_advisory_unlock(%s)", [self._key])
        self._connection.close()
        self._connection = None

    def holder(self) -> Holder | None:
        try:
            signed = re.fullmatch(r"gpumon (\d+)@.* (\d+)", self._signature() or "")
        except OSError:
            return None
        # The host is ours by construction of the key; the name in the signature may be cut.
        return Holder(int(signed[1]), self._host, int(signed[2])) if signed else None

    def _signature(self) -> str | None:
        """What the holder's session is called, or None while the lock is free."""
        with _as_os_error(), self._connect("gpumon") as connection:
            row = connection.execute(self.HOLDER, [self._key]).fetchone()
        return None if row is None else str(row[0])

    def _connect(self, application_name: str) -> psycopg.Connection[Any]:
        import psycopg

        _, options = self._url.get_dialect()().create_connect_args(self._url)
        # What the URL says about connecting wins.
        options = {**self.CONNECTING, **options, "application_name": application_name}
        return psycopg.connect(**options, autocommit=True)


def _signed(host: str) -> str:
    """This process as an application_name: PostgreSQL keeps 63 bytes of it, ASCII only."""
    before, after = f"gpumon {os.getpid()}@", f" {int(time.time())}"
    name = host.encode("ascii", "replace").decode()
    return before + name[: 63 - len(before) - len(after)] + after


@contextmanager
def _as_os_error() -> Iterator[None]:
    """What psycopg raises, as the error that locks raise, in one line."""
    import psycopg

    try:
        yield
    except psycopg.Error as error:
        raise ConnectionError(errno.ENOTCONN, " ".join(str(error).split())) from error
