"""What is handed each tick once it is in the database.

A consumer never delays or breaks a tick. It has a queue and a thread of its own: one that is slow loses ticks, and
one that fails or hangs costs itself only. /healthz and the pages name it. Its thread does not keep the program
from ending.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.recording.state import Problem
from gpumon_core.safety.text import clean
from gpumon_core.store.writer import Attributed
from gpumon_core.telemetry.records import Snapshot

log = logging.getLogger(__name__)

# As many ticks as may wait for the database: what is committed after it was away finds room here.
MOST_WAITING = 900
# A consumer that needs longer for one tick counts as hanging.
HANGS_AFTER_S = 30.0
# How long the end waits for all consumers together.
ENDS_S = 1.0
# The longest description of a failure: /healthz and the pages show it, and it may quote an answer from outside.
LONGEST_FAILURE = 300


@dataclass(frozen=True, slots=True)
class CommittedTick:
    """A tick as it is in the database. Consumers share it, and cannot change its mappings.

    source: nvml, or demo for simulated GPUs. identities: who the processes are, by PID. learned: those of them
    that are new to this consumer, or about which more is known than at the tick that it took before; an immediate
    consumer gets none. energy_j: by UUID, what the GPUs have taken since they were first seen, in joules, up to
    the newest tick of the same commit.
    """

    source: str
    snapshot: Snapshot
    identities: Mapping[int, ProcessIdentity]
    energy_j: Mapping[str, float]
    learned: Mapping[int, ProcessIdentity]


@dataclass(frozen=True, slots=True)
class Consumer:
    """Something that takes each committed tick, in order and once.

    An exception is counted, and the next tick comes all the same. Of more than `most_waiting` ticks the oldest are
    dropped. One that `is_immediate` takes ticks on the thread that writes: only for what takes microseconds and
    waits for nothing.
    """

    name: str
    take: Callable[[CommittedTick], None]
    most_waiting: int = MOST_WAITING
    is_immediate: bool = False


@dataclass(frozen=True, slots=True)
class ConsumerHealth:
    """How many ticks a consumer failed to take, lost because it was too slow, and has still to take."""

    failed: int
    dropped: int
    waiting: int
    problem: Problem | None

    def as_json(self) -> dict[str, Any]:
        """Its part of /healthz."""
        problem = self.problem and self.problem.reason
        return {"failed": self.failed, "dropped": self.dropped, "waiting": self.waiting, "problem": problem}


class Consumers:
    """All consumers of a recorder."""

    def __init__(self, consumers: Iterable[Consumer], changed: Callable[[], None]) -> None:
        """`changed` is called, on any thread, when `problems` are others. Raises ValueError for two of one name,
        of which health could show only one."""
        self._deliveries = [_Delivery(consumer, changed) for consumer in consumers]
        names = [delivery.name for delivery in self._deliveries]
        if len(set(names)) < len(names):
            raise ValueError(f"two consumers have the same name: {', '.join(names)}")

    def start(self) -> None:
        """Begin to hand over."""
        for delivery in self._deliveries:
            delivery.start()

    def hand_over(self, source: str, ticks: Sequence[Attributed], energy_j: Mapping[str, float]) -> None:
        """Give ticks that were committed to all, oldest first. Waits for none, and raises nothing."""
        # Consumers run at the same time: one that changed what they share would break the others.
        energy_j, nobody = MappingProxyType(energy_j), MappingProxyType[int, ProcessIdentity]({})
        committed = [
            CommittedTick(source, snapshot, MappingProxyType(who), energy_j, nobody) for snapshot, who in ticks
        ]
        for delivery in self._deliveries:
            delivery.add(committed)

    def stop(self) -> None:
        """Let them take what waits, for ENDS_S at the most."""
        ends = time.monotonic() + ENDS_S
        for delivery in self._deliveries:
            delivery.end()
        for delivery in self._deliveries:
            delivery.join(max(0.0, ends - time.monotonic()))

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What is wrong with them now."""
        found = (delivery.problem for delivery in self._deliveries)
        return tuple(problem for problem in found if problem is not None)

    @property
    def health(self) -> dict[str, ConsumerHealth]:
        """The state of each, by its name."""
        return {delivery.name: delivery.health for delivery in self._deliveries}


class _Delivery:
    """The ticks that wait for one consumer, and the thread that hands them over."""

    def __init__(self, consumer: Consumer, changed: Callable[[], None]) -> None:
        self.name = consumer.name
        self._consumer = consumer
        self._changed = changed
        self._guard = threading.Condition()
        self._waiting: deque[CommittedTick] = deque()
        self._is_ending = False
        # Who the consumer knows, by PID.
        self._known: Mapping[int, ProcessIdentity] = {}
        self._failed = self._dropped = 0
        # What the first of the failures in a row was, and whether ticks were dropped since none waited.
        self._failure: str | None = None
        self._is_behind = False
        # When the tick that it is taking was given to it, in seconds of time.monotonic.
        self._taking_since: float | None = None
        self._reported: Problem | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if not self._consumer.is_immediate:
            self._thread = threading.Thread(target=self._work, name=f"consumer {self.name}", daemon=True)
            self._thread.start()

    def add(self, ticks: Sequence[CommittedTick]) -> None:
        if self._consumer.is_immediate:
            for tick in ticks:
                self._take(tick)
            return
        with self._guard:
            self._waiting.extend(ticks)
            while len(self._waiting) > self._consumer.most_waiting:
                self._waiting.popleft()
                self._dropped += 1
                self._is_behind = True
            self._guard.notify()
        self._report()

    def end(self) -> None:
        with self._guard:
            self._is_ending = True
            self._guard.notify()

    def join(self, timeout_s: float) -> None:
        if self._thread is None:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            with self._guard:
                lost = len(self._waiting)
                self._waiting.clear()
                self._dropped += lost
            log.warning("%s does not end: it is not waited for, and %d ticks do not reach it", self.name, lost)

    def _work(self) -> None:
        while (tick := self._next()) is not None:
            self._take(tick)

    def _next(self) -> CommittedTick | None:
        """The oldest tick that waits; None at the end."""
        with self._guard:
            if not self._waiting:
                self._is_behind = False
        self._report()
        with self._guard:
            while not self._waiting and not self._is_ending:
                self._guard.wait()
            return self._waiting.popleft() if self._waiting else None

    def _take(self, tick: CommittedTick) -> None:
        if not self._consumer.is_immediate:
            known = self._known
            # Most processes are in every tick, as the same object.
            learned = {
                pid: who
                for pid, who in tick.identities.items()
                if (before := known.get(pid)) is not who and before != who
            }
            tick = replace(tick, learned=learned)
        self._taking_since = time.monotonic()
        try:
            self._consumer.take(tick)
        except BaseException as error:
            # Even what would end this thread: the next tick may be taken again.
            self._failed += 1
            if self._failure is None:
                log.exception("%s failed to take a tick; everything is recorded", self.name)
                self._failure = _described(error)
        else:
            self._failure = None
            self._known = tick.identities
        finally:
            self._taking_since = None
        self._report()

    @property
    def problem(self) -> Problem | None:
        """What is wrong now: in words that do not change from tick to tick."""
        since = self._taking_since
        if since is not None and time.monotonic() - since > HANGS_AFTER_S:
            return Problem(
                f"{self.name} has not finished a tick for more than {HANGS_AFTER_S:g} seconds; everything is "
                "recorded, and later ticks wait for it",
                "Look at what it talks to, and restart gpumon if it does not go on.",
            )
        if self._failure is not None:
            return Problem(
                f"{self.name} failed to take a tick: {self._failure}; everything is recorded",
                "It gets the next tick all the same. The log says more.",
            )
        if self._is_behind:
            return Problem(
                f"{self.name} is too slow: everything is recorded, but it has lost ticks",
                "It goes on with newer ones. Look at what it talks to.",
            )
        return None

    @property
    def health(self) -> ConsumerHealth:
        return ConsumerHealth(self._failed, self._dropped, len(self._waiting), self.problem)

    def _report(self) -> None:
        """Say so when something begins or ends to be wrong."""
        with self._guard:
            problem = self.problem
            if problem == self._reported:
                return
            self._reported = problem
        if problem is None:
            log.info("%s takes ticks again", self.name)
        elif self._failure is None:
            log.error("%s", problem.reason)
        self._changed()


def _described(error: BaseException) -> str:
    try:
        return clean(repr(error), LONGEST_FAILURE)
    except Exception:
        # An exception's own description may fail, too.
        return type(error).__name__
