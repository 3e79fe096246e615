"""How often a device is asked what costs much.

Most calls take microseconds; on some boards a few take milliseconds of CPU time in the driver. What each takes is
measured, and what takes more than its share of the time between two ticks is asked at every other tick, or at
every fourth. Nothing is lost by that: a counter's growth and the driver's samples tell of the whole time since the
reading before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from math import inf
from statistics import median
from typing import TypeVar

Answer = TypeVar("Answer")

log = logging.getLogger(__name__)

# What all devices of a machine together may cost, as a part of one core; and one question's share of its device's.
BUDGET = 0.01
SHARE = 0.1
# What costs less is asked at every tick, however short the interval.
CHEAP_S = 0.0005
# A question is asked at every tick, every second, or every fourth.
RAREST = 4
# So many measurements decide: the middle one, for now and then a call waits for something.
MEASURED = 8
# Measuring takes time itself: it is done during so many ticks, and then of so many times as many.
TURN, TURNS = RAREST * MEASURED, 8
# Of what a driver keeps for some time, this part of that time may pass until it is asked again.
SAFE = 0.7


class _Question:
    """One question: every how many ticks it is asked, and what it cost the last times."""

    __slots__ = ("costs_s", "every", "offset")

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.every = 1
        self.costs_s: list[float] = []


class Pace:
    """Says what a device is asked at a tick."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self._questions: dict[str, _Question] = {}
        self._tick = 0
        self._interval_s = 0.0
        self._allowed_s = inf
        self._measures = True
        self._thins = False

    @property
    def asks_all(self) -> bool:
        """Whether everything is asked at this tick, and nothing is measured."""
        return not (self._measures or self._thins)

    def begin(self, interval_s: float, devices: int) -> None:
        """A new tick, so long after the one before it (0: not known), of a machine with so many devices."""
        self._tick += 1
        self._measures = self._tick // TURN % TURNS == 0
        if self._tick % TURN == 0:
            # What was measured a while ago says nothing of now.
            for question in self._questions.values():
                question.costs_s = []
        self._interval_s = interval_s
        share_s = BUDGET * SHARE * interval_s / max(1, devices)
        self._allowed_s = max(CHEAP_S, share_s) if interval_s else inf

    def is_due(self, name: str, kept_s: float = inf) -> bool:
        """Whether to ask now what the driver keeps for `kept_s`."""
        question = self._questions.get(name)
        if question is None:
            # Beginning at different ticks, so that no tick has all that costs much.
            question = self._questions[name] = _Question(len(self._questions))
        every = question.every
        if every == 1:
            return True
        while every > 1 and every * self._interval_s > SAFE * kept_s:
            every //= 2
        return (self._tick + question.offset) % every == 0

    def measure(self, name: str, ask: Callable[[], Answer]) -> Answer:
        """Ask, and note the CPU time that it took."""
        if not self._measures:
            return ask()
        began = time.thread_time()
        try:
            return ask()
        finally:
            question = self._questions.get(name)
            if question is not None:
                question.costs_s.append(time.thread_time() - began)
                if len(question.costs_s) >= MEASURED:
                    self._decide(name, question)

    def is_thinned(self, name: str) -> bool:
        """Whether there are ticks at which this is not asked."""
        question = self._questions.get(name)
        return question is not None and question.every > 1

    def _decide(self, name: str, question: _Question) -> None:
        cost_s = median(question.costs_s)
        question.costs_s = []
        every = 1
        while every < RAREST and cost_s > every * self._allowed_s:
            every *= 2
        if every != question.every:
            often = "every tick" if every == 1 else f"one tick of {every}"
            log.info(
                "%s: %s takes %.1f ms of CPU time, and is asked at %s", self.subject, name, 1e3 * cost_s, often
            )
            question.every = every
            self._thins = any(one.every > 1 for one in self._questions.values())
