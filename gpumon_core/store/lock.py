"""One recorder at a time: a lock that its holder signs, and that ends with its holder.

A SQLite file has one recorder, a PostgreSQL server one for each host: see `recorder_lock`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from filelock import FileLock, Timeout
from sqlalchemy.engine import Connection, make_url

from gpumon_core.safety.private_files import FILE, make_folder

if TYPE_CHECKING:
    from psycopg import Connection as Session

    from gpumon_core.store.postgresql import ServerConnection


class LockLost(Exception):
    """This recorder's lock is no longer its own: another may record by now. Nothing was written."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who records: a process id, the name of its machine, and since when (UTC seconds)."""

    pid: int
    host: str
    since: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lock(ABC):
    """What a recorder holds while it records.

    Every method but `release`, `holder` and `fence` raises OSError where the lock cannot be reached; its strerror
    says why: PermissionError where the server refuses for good, as for a wrong password; any other may pass.
    """

    @abstractmethod
    def is_free(self) -> bool:
        """Whether nobody records at this moment; the last signature is left as it is."""

    @abstractmethod
    def acquire(self) -> bool:
        """Take the lock if it is free, and sign it; True too if this object holds it already."""

    @abstractmethod
    def is_held(self) -> bool:
        """Whether this object still holds the lock; once False, only `acquire` makes it True again.

        False: the lock is lost, and nothing more can be written. The recorder holds its ticks and calls `acquire`:
        True: it goes on and writes them; False: another records. OSError: nothing is known, as while the
        server is away. The recorder does nothing and asks again later: whatever it writes is fenced.
        """

    @abstractmethod
    def fence(self, connection: Connection) -> None:
        """Let a transaction that has just begun on `connection` write only under this lock.

        To be called at the beginning of every transaction, or once for all of an engine:
        `sqlalchemy.event.listen(engine, "begin", lock.fence)`. Raises LockLost where the lock is no longer this
        object's, and sqlalchemy.exc.DBAPIError.
        """

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
    """The lock on one SQLite file. The kernel frees it when its holder ends, however it ends.

    It belongs to the file that was there when it was taken. Once that file was removed or replaced, another
    recorder can lock the one that is there now, so this lock counts as lost.
    """

    # Finding out whether a file lock is free takes it for a moment: `acquire` outlasts that.
    PROBE_S = 0.25

    def __init__(self, database: Path, host: str) -> None:
        self._path = database.with_name(database.name + ".lock")
        self._host = host
        self._lock = FileLock(self._path, mode=FILE, thread_local=False)
        self._identity: tuple[int, int] | None = None

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
        if self.is_held():
            return True
        # One that was removed or replaced guards nothing.
        self._lock.release()
        make_folder(self._path.parent)
        try:
            self._lock.acquire(timeout=self.PROBE_S, poll_interval=0.01)
        except Timeout:
            return False
        signature = json.dumps(asdict(Holder(os.getpid(), self._host, int(time.time()))))
        # Written in place: replacing the file would leave the lock on the old one.
        with self._path.open("r+", encoding="utf-8") as file:
            found = os.fstat(file.fileno())
            self._identity = found.st_dev, found.st_ino
            file.truncate(0)
            file.write(signature)
        return True

    def is_held(self) -> bool:
        if not self._lock.is_locked:
            return False
        try:
            found = self._path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return (found.st_dev, found.st_ino) == self._identity

    def fence(self, connection: Connection) -> None:
        try:
            held = self.is_held()
        except OSError:
            # A folder that cannot be looked into now is not one without the file; the kernel's lock is there.
            held = self._lock.is_locked
        if not held:
            raise LockLost(f"the lock {self._path} was given back, removed or replaced")

    def release(self) -> None:
        self._lock.release()
        self._identity = None

    def holder(self) -> Holder | None:
        """Who signed last, which is who holds a lock that could not be taken."""
        try:
            return Holder(**json.loads(self._path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


# The name while recorder and doctor still construct it themselves.
RecorderLock = FileRecorderLock


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """The session of the server that has the lock. A later session with its process id has another start."""

    pid: int
    began: Any


class ServerRecorderLock(Lock):
    """The lock on one host's part of a PostgreSQL database: an advisory lock of a session of its own.

    The server frees it when that session ends, as when it restarts, and then two recorders may race for it. So
    that no two ever write, every session that writes holds a second lock (`WRITING`, shared) as long as it lives:

    - who has taken the lock records only once no other session holds the second one;
    - a session that begins to write takes the second lock first, and then looks whether the lock is held by the
      session that took it (by process id and start, which a later session does not have).

    Each first puts down its own mark and then looks for the other's, so at least one of two sees the other. From
    then on a transaction needs no question: while its session lives nobody else can begin to record, and when
    that session ends so does the transaction. It costs two statements for every new connection, none for a tick.

    Through a pooler all this is so only if it pools sessions, not transactions. Source: PostgreSQL documentation,
    "Advisory Locks" and "pg_locks".
    """

    # How long whoever takes the lock waits for the last recorder's sessions: the server notices their end a little
    # later; a machine that lost power holds on for a minute, see server.SESSION.
    SETTLE_S = 2.0
    POLL_S = 0.02
    HOLDER = """
        SELECT application_name
        FROM pg_locks JOIN pg_stat_activity USING (pid)
        WHERE locktype = 'advisory' AND granted AND objsubid = 1
            AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND (classid::bigint << 32) | objid::bigint IN (%(key)s, %(writing)s)
        ORDER BY (classid::bigint << 32) | objid::bigint <> %(key)s LIMIT 1
    """
    OTHERS = """
        SELECT count(*) FROM pg_locks
        WHERE locktype = 'advisory' AND granted AND objsubid = 1
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND (classid::bigint << 32) | objid::bigint = %(writing)s
    """
    HELD = """
        SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)
        WHERE locktype = 'advisory' AND granted AND objsubid = 1
            AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND (classid::bigint << 32) | objid::bigint = %(key)s AND pid = %(pid)s AND backend_start = %(began)s
    """
    ITSELF = "SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()"
    WRITING = "SELECT pg_advisory_lock_shared(%(writing)s)"
    NOT_WRITING = "SELECT pg_advisory_unlock_shared(%(writing)s)"
    # What a connection's `info` has of it.
    MARK = "gpumon lock"

    def __init__(self, url: str, host: str) -> None:
        self._url = make_url(url)
        self._host = host
        self._keys = {"key": _key("gpumon recorder", host), "writing": _key("gpumon recorder writes", host)}
        self._connection: ServerConnection | None = None
        self._held: _Held | None = None
        # The sessions that hold the second lock.
        self._writing: WeakSet[Session[Any]] = WeakSet()
        self._guard = threading.Lock()

    def is_free(self) -> bool:
        if self._held is None:
            self._end_writing()
        return self._signature() is None

    def acquire(self) -> bool:
        if self.is_held():
            return True
        self._lose()
        with _as_os_error():
            connection = self._connect(_signed(self._host))
            held = None
            try:
                held = self._take(connection)
            finally:
                if held is None:
                    connection.close()
        if held is None:
            return False
        self._connection, self._held = connection, held
        return True

    def _take(self, connection: ServerConnection) -> _Held | None:
        from gpumon_core.store import postgresql

        connection.execute(postgresql.SESSION)
        if connection.execute("SELECT pg_try_advisory_lock(%(key)s)", self._keys).fetchone() != (True,):
            return None
        deadline = time.monotonic() + self.SETTLE_S
        while connection.execute(self.OTHERS, self._keys).fetchone() != (0,):
            if time.monotonic() > deadline:
                return None
            time.sleep(self.POLL_S)
        itself = connection.execute(self.ITSELF).fetchone()
        return None if itself is None else _Held(*itself)

    def is_held(self) -> bool:
        """Asked in a session of its own: the server says whether the one that took the lock holds it still."""
        held = self._held
        if held is None:
            return False
        with _as_os_error(), self._connect("gpumon") as connection:
            row = connection.execute(self.HELD, self._marks(held)).fetchone()
        if row == (1,):
            return True
        self._lose()
        return False

    def fence(self, connection: Connection) -> None:
        held = self._held
        if held is None:
            raise LockLost(f"the lock for recording {self._host} is not held")
        if connection.info.get(self.MARK) is held:
            return
        session = connection.connection.driver_connection
        with self._guard:
            if session is not None:
                self._writing.add(session)
        connection.exec_driver_sql(self.WRITING, self._marks(held))
        if connection.exec_driver_sql(self.HELD, self._marks(held)).scalar() != 1:
            connection.exec_driver_sql(self.NOT_WRITING, self._marks(held))
            if self._held is held:
                self._held = None
            raise LockLost(f"the lock for recording {self._host} was lost: the session that held it has ended")
        connection.info[self.MARK] = held

    def release(self) -> None:
        if self._connection is not None and self._held is not None:
            import psycopg

            # Nobody begins to write any more, and who did has ended, before it is free.
            self._held = None
            self._end_writing()
            # Closing alone would free it too, but only some moments after this returned.
            with suppress(psycopg.Error):
                self._connection.execute("SELECT pg_advisory_unlock(%(key)s)", self._keys)
        self._lose()

    def holder(self) -> Holder | None:
        try:
            signed = re.fullmatch(r"gpumon (\d+)@.* (\d+)", self._signature() or "")
        except OSError:
            return None
        # The host is ours by construction of the key; the name in the signature may be cut.
        return Holder(int(signed[1]), self._host, int(signed[2])) if signed else None

    def _lose(self) -> None:
        self._held = None
        self._end_writing()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _end_writing(self) -> None:
        """Close the idle sessions that hold the second lock: their pool makes new ones, which ask anew.

        A session in the middle of a transaction holds it until it is done; until then nobody can take the lock.
        """
        if not self._writing:
            return
        from psycopg.pq import TransactionStatus

        with self._guard:
            for session in list(self._writing):
                # Whoever uses it has its lock at this moment.
                if not session.closed and session.lock.acquire(blocking=False):
                    try:
                        if session.info.transaction_status == TransactionStatus.IDLE:
                            session.close()
                    finally:
                        session.lock.release()
                if session.closed:
                    self._writing.discard(session)

    def _marks(self, held: _Held) -> dict[str, Any]:
        return {**self._keys, "pid": held.pid, "began": held.began}

    def _signature(self) -> str | None:
        """What the holder's session is called, or None while the lock is free."""
        with _as_os_error(), self._connect("gpumon") as connection:
            row = connection.execute(self.HOLDER, self._keys).fetchone()
        return None if row is None else str(row[0])

    def _connect(self, application_name: str) -> ServerConnection:
        from gpumon_core.store import postgresql

        _, options = self._url.get_dialect()().create_connect_args(self._url)
        # What the URL says about connecting wins.
        options = {**postgresql.LINK, **options, "application_name": application_name}
        return postgresql.ServerConnection.connect(**options, autocommit=True)


def _key(purpose: str, host: str) -> int:
    # Stable over versions of Python and gpumon: both sides must come to the same number.
    digest = hashlib.sha256(f"{purpose}\0{host}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _signed(host: str) -> str:
    """This process as an application_name: PostgreSQL stores 63 bytes of it, ASCII only."""
    before, after = f"gpumon {os.getpid()}@", f" {int(time.time())}"
    name = host.encode("ascii", "replace").decode()
    return before + name[: 63 - len(before) - len(after)] + after


@contextmanager
def _as_os_error() -> Iterator[None]:
    """What psycopg raises, as the error that locks raise, in one line."""
    import psycopg

    from gpumon_core.store.postgresql import may_come_back

    try:
        yield
    except psycopg.Error as error:
        text = " ".join(str(error).split())
        if may_come_back(error):
            raise ConnectionError(errno.ENOTCONN, text) from error
        raise PermissionError(errno.EACCES, text) from error
