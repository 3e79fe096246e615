"""What a recorder is doing, and what is wrong: for pages, /healthz and the log."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace
from typing import Any, Literal

from gpumon_core.safety.masking import hide

log = logging.getLogger(__name__)

TRIED_AGAIN = "gpumon tries again by itself."


@dataclass(frozen=True, slots=True)
class Problem:
    """Something the user should know: what is wrong and what it means, and what to do about it."""

    reason: str
    remedy: str

    def __post_init__(self) -> None:
        # Pages and /healthz show it, and another library's error may quote a password.
        object.__setattr__(self, "reason", hide(self.reason))


@dataclass(frozen=True, slots=True)
class State:
    """What the recorder is doing.

    role: recording; standby (another recorder holds the database); viewing (GPUMON_RECORD is
    false); stopped. `driver` is the problem with NVML, `recording` the one with this recorder, `reader` the one
    with reads of processes, `hung_readers` how many of these hang, `consumers` the problems of those that get each
    committed tick, and `notice` something that has happened and is over.
    """

    role: Literal["recording", "standby", "viewing", "stopped"]
    source: Literal["nvml", "demo"]
    database_url: str
    driver: Problem | None = None
    recording: Problem | None = None
    reader: Problem | None = None
    hung_readers: int = 0
    notice: Problem | None = None
    consumers: tuple[Problem, ...] = ()

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All that is wrong now, but for the driver."""
        return tuple(one for one in (self.recording, self.reader, *self.consumers) if one is not None)


class LiveState:
    """The state of a running recorder, which any of its threads may change."""

    def __init__(self, first: State) -> None:
        self._guard = threading.RLock()
        self._now = first
        # What is wrong with the recording, by topic.
        self._problems: dict[str, Problem] = {}

    @property
    def now(self) -> State:
        """The newest state; a new object whenever it changes."""
        return self._now

    def set(self, **changes: Any) -> None:
        """Change some fields of State."""
        with self._guard:
            changed = replace(self._now, **changes)
            if changed != self._now:
                self._now = changed

    def has_problem(self, topic: str) -> bool:
        """Whether something is wrong there now."""
        return topic in self._problems

    def fail(self, topic: str, reason: str, remedy: str = TRIED_AGAIN) -> None:
        """Note what is wrong with the recording. The log says it when it begins or changes, not every time."""
        problem = Problem(reason, remedy)
        with self._guard:
            if is_new := self._problems.get(topic) != problem:
                self._problems[topic] = problem
            self._show_problems()
        if is_new:
            log.error("%s", reason)

    def solve(self, topic: str) -> None:
        """What was wrong is over."""
        if not self.has_problem(topic):
            return
        self.forget(topic)
        log.info("recording again")

    def forget(self, *topics: str) -> None:
        """Drop what was wrong there, or everywhere: something else counts now."""
        with self._guard:
            for topic in topics or tuple(self._problems):
                self._problems.pop(topic, None)
            self._show_problems()

    def _show_problems(self) -> None:
        self.set(recording=next(iter(self._problems.values()), None))
