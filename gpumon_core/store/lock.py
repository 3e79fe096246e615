"""One recorder per database: a lock that its holder signs, and that ends with its holder."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout


@dataclass(frozen=True, slots=True)
class Holder:
    """Who records: a process id, the name of its machine, and since when (UTC seconds)."""

    pid: int
    host: str
    since: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class RecorderLock:
    """The lock on one SQLite file. The kernel frees it when its holder ends, however it ends."""

    def __init__(self, database: Path, host: str) -> None:
        self._path = database.with_name(database.name + ".lock")
        self._host = host
        self._lock = FileLock(self._path, thread_local=False)

    def is_free(self) -> bool:
        """Whether nobody records at this moment; the last signature is left as it is."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        self._lock.release()
        return True

    def acquire(self) -> bool:
        """Take the lock if it is free, and sign it. Raises OSError where it cannot be written."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        signature = json.dumps(asdict(Holder(os.getpid(), self._host, int(time.time()))))
        # Written in place: replacing the file would leave the lock on the old one.
        with self._path.open("r+", encoding="utf-8") as file:
            file.truncate(0)
            file.write(signature)
        return True

    def release(self) -> None:
        """Give the lock back; doing it twice is fine."""
        self._lock.release()

    def holder(self) -> Holder | None:
        """Who signed last, which is who holds a lock that could not be taken."""
        try:
            return Holder(**json.loads(self._path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
