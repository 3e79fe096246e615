"""Runs driver calls on a thread of their own, so that one that hangs holds nobody up."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue

# How long a task may take once another of the same round has been given up.
IMPATIENT_S = 1.0


class Task:
    """Something to be done again and again; `stuck` while a thread still waits inside it."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action
        self.stuck = False
        self.stuck_in = ""


class _Round:
    """One pass over some tasks. A thread that was given up finds that the round is no longer its own."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self.waiting = deque(tasks)
        self.current: Task | None = None
        self.began = time.monotonic()
        self.owner: threading.Thread | None = None
        self.done: SimpleQueue[BaseException | None] = SimpleQueue()


class Watch:
    """One caller's worker. A task that takes longer than its patience is given up, the others go on."""

    def __init__(self, name: str, doing: Callable[[], str] = str) -> None:
        """`doing` says what the worker is at, for the log."""
        self._name = name
        self._doing = doing
        self._thread: threading.Thread | None = None
        self._rounds: SimpleQueue[_Round | None] = SimpleQueue()
        self._guard = threading.Lock()

    def run(self, tasks: Iterable[Task], patience_s: float) -> list[Task]:
        """Do the tasks that are not stuck, one after another. Returns those that now are given up.

        What a task raises ends the round and is raised here.
        """
        work = _Round(task for task in tasks if not task.stuck)
        given_up: list[Task] = []
        self._begin(work)
        while True:
            try:
                error = work.done.get(timeout=max(0.001, work.began + patience_s - time.monotonic()))
            except Empty:
                with self._guard:
                    late = time.monotonic() - work.began >= patience_s
                    hung = work.current if late else None
                    if hung is None:
                        continue
                    hung.stuck = True
                    hung.stuck_in = self._doing()
                    given_up.append(hung)
                    # Where one hangs others may: all of them together must not take a tick for every one.
                    patience_s = min(patience_s, IMPATIENT_S)
                    # That thread ends when its call returns, if ever; another does the rest.
                    work.current = work.owner = self._thread = None
                    work.began = time.monotonic()
                self._begin(work)
                continue
            if error is not None:
                raise error
            return given_up

    def close(self) -> None:
        """Let the worker end; the next run begins another."""
        self._rounds.put(None)
        self._thread = None

    def _begin(self, work: _Round) -> None:
        if self._thread is None:
            self._rounds = SimpleQueue()
            # A daemon: a hanging driver must not stop the program from ending.
            self._thread = threading.Thread(target=self._work, args=(self._rounds,), name=self._name, daemon=True)
            self._thread.start()
        work.owner = self._thread
        self._rounds.put(work)

    def _work(self, rounds: SimpleQueue[_Round | None]) -> None:
        me = threading.current_thread()
        while (work := rounds.get()) is not None:
            error: BaseException | None = None
            while error is None:
                with self._guard:
                    if work.owner is not me:
                        return
                    if not work.waiting:
                        break
                    task = work.current = work.waiting.popleft()
                    work.began = time.monotonic()
                try:
                    task.action()
                except BaseException as raised:
                    error = raised
                with self._guard:
                    if work.owner is not me:
                        task.stuck = False
                        return
                    work.current = None
            work.done.put(error)
