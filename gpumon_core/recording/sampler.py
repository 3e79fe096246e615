"""Takes ticks of the source that is chosen, and puts them where they wait for the database."""

from __future__ import annotations

import logging
import threading
import time

from gpumon_core.recording.collector import Observer
from gpumon_core.recording.counters import LiveCounters
from gpumon_core.recording.latest_tick import LatestTick, LatestTickMemory
from gpumon_core.recording.session import Target
from gpumon_core.recording.state import LiveState, Problem
from gpumon_core.store.writer import Attributed
from gpumon_core.telemetry.records import SourceUnavailable

log = logging.getLogger(__name__)

# How long the end waits for the source.
ENDS_S = 1.0


class Sampler:
    """The source, and what is read of it. Sampling waits for no database."""

    def __init__(self, state: LiveState, counters: LiveCounters) -> None:
        self._state = state
        self._counters = counters
        # The observer belongs to one thread at a time.
        self._busy = threading.Lock()
        self.observer: Observer | None = None
        self._target: Target | None = None
        self.memory = LatestTickMemory()
        # How long the latest tick took to be read.
        self.took_ms = 0.0

    @property
    def latest_tick(self) -> LatestTick | None:
        """The latest tick, as long as there is a source."""
        return None if self.observer is None else self.memory.latest

    def use(self, observer: Observer | None, target: Target | None) -> None:
        """Sample this source from now on, or none; the one before is closed."""
        if not self._busy.acquire(timeout=ENDS_S if observer is None else -1):
            log.warning("the driver does not return from a call; gpumon does not wait for it")
            self.observer = None
            return
        try:
            before, self.observer, self._target = self.observer, observer, target
        finally:
            self._busy.release()
        if before is not None and before is not observer:
            before.close()
            self.memory.clear()

    def tick(self) -> bool:
        """Take a snapshot, and put it where it waits for the database; whether there is one."""
        with self._busy:
            observer, target = self.observer, self._target
            if observer is None or target is None:
                return False
            began = time.monotonic()
            try:
                observed = observer.observe()
            except SourceUnavailable as error:
                self._source_failed(error)
                self._counters.took(1000 * (time.monotonic() - began))
                return False
            except Exception as error:
                # A tick may fail in unforeseen ways; the next one is tried all the same.
                reason = f"a tick failed: {error!r}; it is lost"
                if not self._state.has_problem("tick"):
                    log.exception("a tick failed")
                self._counters.failed(reason, tick=True)
                self._state.fail("tick", reason)
                return False
            self.memory.read(*observed)
            self.took_ms = 1000 * (time.monotonic() - began)
            dropped = target.buffer.add(observed)
            self._look_at_readers(observer)
        if dropped:
            self._counters.dropped(dropped, "more ticks waited for the database than the buffer holds")
        if len(target.buffer) > 1:
            self._counters.waiting(len(target.buffer))
        self._state.solve("tick")
        if self._state.now.source == "nvml" and self._state.now.driver is not None:
            log.info("the driver answers again")
            self._state.set(driver=None)
        return True

    def past(self, start: float, end: float, step_s: float) -> list[Attributed]:
        """The ticks from `start` to just before `end`, where the source knows its past."""
        with self._busy:
            return [] if self.observer is None else list(self.observer.past(start, end, step_s))

    def _source_failed(self, error: SourceUnavailable) -> None:
        problem = Problem(str(error), error.remedy)
        if self._state.now.driver != problem:
            log.error("%s. %s", error, error.remedy)
        self._state.set(driver=problem)
        self._counters.failed(str(error), tick=True)

    def _look_at_readers(self, observer: Observer) -> None:
        """Report a read of a process's files that hangs."""
        if not observer.hung_readers and self._state.now.reader is None:
            return
        reason = observer.reader_problem
        problem = None
        if reason is not None:
            remedy = "Everything else is recorded. Look at that process, or at the file system that it uses."
            problem = Problem(reason, remedy)
        self._state.set(reader=problem, hung_readers=observer.hung_readers)
