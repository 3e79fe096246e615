"""Reads files that may never answer, on threads of their own.

A file system of a user (FUSE), one on the network (NFS), or a process that hangs inside the kernel can block a
reader, and nothing interrupts that. So the caller waits a moment for a read. A late one goes on alone, and the
caller gets its result when it asks again. The number of reads at a time is limited.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import Any, TypeVar

log = logging.getLogger(__name__)

# After this time a read counts as hanging.
HANGS_S = 2.0
# The most hanging reads for one user, and in all. While so many hang, nothing else is read for that user, or at
# all.
MOST_OF_ONE = 4
MOST_HANGING = 32
# The most results of late reads that wait for their caller.
MOST_KEPT = 64
# A hostile program could cause any number of them: the log reports them this often at most.
SAID_EVERY_S = 60.0

_Result = TypeVar("_Result")


class Late(Exception):
    """The result is not there yet, or nothing can be read while other reads hang; `str()` says which."""


class _Read:
    def __init__(self, what: str, uid: int | None, action: Callable[[], Any]) -> None:
        self.what = what
        self.uid = uid
        self.began = time.monotonic()
        self.began_at = datetime.now(UTC)
        self.is_done = threading.Event()
        self.found: Any = None
        self.error: BaseException | None = None
        self._action: Callable[[], Any] | None = action

    @property
    def hangs(self) -> bool:
        """Whether it takes much too long."""
        return not self.is_done.is_set() and time.monotonic() - self.began >= HANGS_S

    def run(self) -> None:
        """Read, on the thread for it."""
        try:
            assert self._action is not None
            self.found = self._action()
        except BaseException as error:
            self.error = error
        finally:
            self._action = None
            self.is_done.set()


class Readers:
    """The reads of one caller, by keys that it chooses. Any thread may use `hung` and `problem`."""

    def __init__(self, name: str = "reader") -> None:
        self._name = name
        # The queue of its thread; None while no thread is free.
        self._jobs: SimpleQueue[_Read | None] | None = None
        # The late reads. Always replaced, never changed.
        self._late: dict[Hashable, _Read] = {}
        self._said_at = -SAID_EVERY_S

    def read(
        self,
        key: Hashable,
        what: str,
        action: Callable[[], _Result],
        patience_s: float,
        uid: int | None = None,
        is_last: bool = False,
    ) -> _Result:
        """The result of `action`, which runs on another thread, or its exception. Raises Late when it is not there
        after `patience_s`; the next call with the same key asks for the same read. `what` names it in messages,
        and `uid` is the user who controls what is read. With `is_last` the thread ends afterwards, because the
        action changed it."""
        read = self._late.get(key)
        if read is None:
            late = [one.uid for one in self._late.values() if not one.is_done.is_set()]
            if len(late) >= MOST_HANGING or late.count(uid) >= MOST_OF_ONE:
                raise Late(f"{what} is not read while {len(late)} others hang")
            read = _Read(what, uid, action)
            try:
                jobs = self._begin(read, is_last)
            except RuntimeError:
                # The system starts no more threads just now.
                raise Late(f"{what} is not read: there are too many threads") from None
            if not read.is_done.wait(patience_s) and jobs is self._jobs:
                # That thread ends with its read, if ever. Another one does the next read.
                self.close()
        if not read.is_done.is_set():
            # Drop results that the caller did not ask for again, the oldest first.
            done = [one for one, other in self._late.items() if other.is_done.is_set()][:-MOST_KEPT]
            self._late = {**{one: self._late[one] for one in self._late if one not in done}, key: read}
            self._say()
            raise Late(what)
        self._late = {one: other for one, other in self._late.items() if other is not read}
        if read.error is not None:
            raise read.error
        found: _Result = read.found
        return found

    def close(self) -> None:
        """Let the thread end after its current read; the next read starts another one."""
        if self._jobs is not None:
            self._jobs.put(None)
            self._jobs = None

    def _begin(self, read: _Read, is_last: bool) -> SimpleQueue[_Read | None]:
        jobs = None if is_last else self._jobs
        if jobs is None:
            jobs = SimpleQueue()
            # A daemon thread: a hanging read must not stop the program from ending.
            threading.Thread(target=_work, args=(jobs,), name=self._name, daemon=True).start()
        jobs.put(read)
        if is_last:
            jobs.put(None)
        else:
            self._jobs = jobs
        return jobs

    @property
    def is_late(self) -> bool:
        """Whether a read is late."""
        return any(not one.is_done.is_set() for one in self._late.values())

    @property
    def hung(self) -> int:
        """How many reads hang."""
        return sum(one.hangs for one in self._late.values())

    @property
    def problem(self) -> str | None:
        """The longest hanging read, in one sentence; None where none hangs."""
        hanging = [one for one in self._late.values() if one.hangs]
        if not hanging:
            return None
        first = min(hanging, key=lambda one: one.began)
        others = f" (and {len(hanging) - 1} more)" if len(hanging) > 1 else ""
        return f"{first.what} has not answered since {first.began_at:%Y-%m-%d %H:%M:%S} UTC{others}"

    def _say(self) -> None:
        problem, now = self.problem, time.monotonic()
        if problem is not None and now - self._said_at >= SAID_EVERY_S:
            self._said_at = now
            log.warning("%s; gpumon does not wait for it, and everything else goes on", problem)


def _work(jobs: SimpleQueue[_Read | None]) -> None:
    while (read := jobs.get()) is not None:
        read.run()
        # Release the result while the thread waits.
        del read
