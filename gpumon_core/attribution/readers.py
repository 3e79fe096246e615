"""Reads that may never end, on threads that nobody waits for.

A file system of a user's own (FUSE), one on the network (NFS), or a process that hangs inside the kernel can hold
up whoever reads from it, and nothing interrupts that. So a read is waited for a moment; one that is late goes on
alone, and what it brings is taken when it is asked for again. Only so many may be under way at once.
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

# From then on a read counts as hanging.
HANGS_S = 2.0
# So many of one user's may hang, and so many in all; while they do, nothing else of that user, or at all, is read.
MOST_OF_ONE = 4
MOST_HANGING = 32
# So many that were late, and are there by now, wait to be asked for.
MOST_KEPT = 64
# A hostile program could make any number of them: so often the log says so at the most.
SAID_EVERY_S = 60.0

Found = TypeVar("Found")


class Late(Exception):
    """What is read is not there yet, or cannot be read while others hang; `str()` says which."""


class _Read:
    def __init__(self, what: str, whose: int | None, action: Callable[[], Any]) -> None:
        self.what = what
        self.whose = whose
        self.began = time.monotonic()
        self.began_at = datetime.now(UTC)
        self.is_done = threading.Event()
        self.found: Any = None
        self.error: BaseException | None = None
        self._action: Callable[[], Any] | None = action

    @property
    def hangs(self) -> bool:
        """Whether it takes far longer than a read may."""
        return not self.is_done.is_set() and time.monotonic() - self.began >= HANGS_S

    def run(self) -> None:
        """Do it; for the thread that does."""
        try:
            assert self._action is not None
            self.found = self._action()
        except BaseException as error:
            self.error = error
        finally:
            self._action = None
            self.is_done.set()


class Readers:
    """One caller's reads, by keys of its own. `hung` and `problem` may be asked by any thread."""

    def __init__(self, name: str = "reader") -> None:
        self._name = name
        # What its thread does next; None where there is no thread that is free.
        self._jobs: SimpleQueue[_Read | None] | None = None
        # Those that were late. Always replaced, never changed.
        self._late: dict[Hashable, _Read] = {}
        self._said_at = -SAID_EVERY_S

    def read(
        self,
        key: Hashable,
        what: str,
        action: Callable[[], Found],
        patience_s: float,
        whose: int | None = None,
        is_last: bool = False,
    ) -> Found:
        """What `action` returns or raises, on another thread. Raises Late where that is not there after
        `patience_s`: asked again with the same key, it is the same read. `what` is named where it hangs, and
        `whose` is the user to blame then. After one that `is_last` its thread ends: it has changed that thread."""
        read = self._late.get(key)
        if read is None:
            late = [one.whose for one in self._late.values() if not one.is_done.is_set()]
            if len(late) >= MOST_HANGING or late.count(whose) >= MOST_OF_ONE:
                raise Late(f"{what} is not read while {len(late)} others hang")
            read = _Read(what, whose, action)
            try:
                jobs = self._begin(read, is_last)
            except RuntimeError:
                # The system gives no more threads just now.
                raise Late(f"{what} is not read: there are too many threads") from None
            if not read.is_done.wait(patience_s) and jobs is self._jobs:
                # That thread ends when its read does, if ever; another does what comes next.
                self.close()
        if not read.is_done.is_set():
            # Those that nobody asked for again are forgotten, the oldest first.
            done = [one for one, other in self._late.items() if other.is_done.is_set()][:-MOST_KEPT]
            self._late = {**{one: self._late[one] for one in self._late if one not in done}, key: read}
            self._say()
            raise Late(what)
        self._late = {one: other for one, other in self._late.items() if other is not read}
        if read.error is not None:
            raise read.error
        found: Found = read.found
        return found

    def close(self) -> None:
        """Let the thread end when it has done what it is at; the next read begins another."""
        if self._jobs is not None:
            self._jobs.put(None)
            self._jobs = None

    def _begin(self, read: _Read, is_last: bool) -> SimpleQueue[_Read | None]:
        jobs = None if is_last else self._jobs
        if jobs is None:
            jobs = SimpleQueue()
            # A daemon: what hangs must not keep the program from ending.
            threading.Thread(target=_work, args=(jobs,), name=self._name, daemon=True).start()
        jobs.put(read)
        if is_last:
            jobs.put(None)
        else:
            self._jobs = jobs
        return jobs

    @property
    def is_late(self) -> bool:
        """Whether something has not been read in time."""
        return any(not one.is_done.is_set() for one in self._late.values())

    @property
    def hung(self) -> int:
        """How many reads hang."""
        return sum(one.hangs for one in self._late.values())

    @property
    def problem(self) -> str | None:
        """The read that has hung longest, in one sentence; None where none hangs."""
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
            log.warning("%s; it is left behind, and everything else goes on", problem)


def _work(jobs: SimpleQueue[_Read | None]) -> None:
    while (read := jobs.get()) is not None:
        read.run()
        # Nothing of it is held while there is nothing to do.
        del read
