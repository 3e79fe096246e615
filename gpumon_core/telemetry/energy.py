"""What an energy counter of a driver is worth.

Counters err: they start anew with the driver, miss a reading and come back, step back a little, do not grow while
power is drawn, or count a whole module (on GH200 the processor too). A growth is believed if the GPU can have
taken it: at most its power limit times the time. What is not believed is estimated by power until the counter
is plausible again, from where it was or from where it is.
"""

from __future__ import annotations

from dataclasses import dataclass

# A board may exceed its limit for moments, never for long: its mean by so much, and at once by what it takes in
# so many seconds (a counter that is renewed once a second may have two seconds of it).
ABOVE_LIMIT = 1.1
AT_ONCE_S = 2.0
# The limit of a board that does not say: no single GPU of today takes as much.
HIGHEST_W = 3000.0
# What a counter grows by since it was doubted, as parts of what the power says.
CONFIRMED = (0.4, 2.5)
# After so long without a plausible growth, the energy no longer comes from the counter.
DOUBTED_S = 60.0


@dataclass(frozen=True, slots=True)
class Growth:
    """Joules that were counted within so many seconds, and whether they begin where the counter was doubted."""

    joules: float
    seconds: float
    from_doubt: bool = False


@dataclass(slots=True)
class EnergyCounter:
    """A counter in joules, reading after reading: `value` is the newest that was believed, `age_s` its age."""

    value: float | None = None
    age_s: float = 0.0
    # A value that cannot have come from the one before, and its age: perhaps the beginning of a new count.
    _doubted: float | None = None
    _doubted_age_s: float = 0.0
    # What was believed beyond the limit, and has to be made up for.
    _excess_j: float = 0.0

    @property
    def begins_anew(self) -> bool:
        """Whether the newest reading is one that a new count may have begun with."""
        return self._doubted is not None and self._doubted_age_s == 0.0

    def step(
        self,
        value: float | None,
        since_s: float,
        power_w: float | None,
        limit_w: float | None,
        pause: bool = False,
    ) -> Growth | None:
        """The growth since the value that was believed last; None where this reading (J) says nothing.

        `since_s` is the time since the reading before, `power_w` the power by another source, `limit_w` the power
        limit. In a `pause` nobody looked: the machine may have been restarted, and the counter with it.
        """
        self.age_s += since_s
        self._doubted_age_s += since_s
        if value is None:
            return None
        if self.value is None:
            self._believe(value)
            return None
        limit = max(limit_w or 0.0, power_w or 0.0) or HIGHEST_W
        growths = [Growth(value - self.value, self.age_s)]
        if self._doubted is not None:
            growths.append(Growth(value - self._doubted, self._doubted_age_s, from_doubt=True))
        elif pause and value < self.value:
            growths.append(Growth(value, self.age_s, from_doubt=True))
        possible = [growth for growth in growths if self._is_possible(growth, limit, power_w, pause)]
        if not possible:
            if value != self.value:
                self._doubted, self._doubted_age_s = value, 0.0
            return None
        # Where both are possible, the one nearer to the power by another source.
        found = min(possible, key=lambda growth: abs(growth.joules - (power_w or 0.0) * growth.seconds))
        self._excess_j = max(0.0, self._excess_j + found.joules - ABOVE_LIMIT * limit * found.seconds)
        self._believe(value)
        return found

    def _is_possible(self, growth: Growth, limit_w: float, power_w: float | None, pause: bool) -> bool:
        if growth.joules == 0:
            return not power_w
        if growth.from_doubt and not pause and power_w:
            # A count that is new has to be confirmed by the power.
            estimate = power_w * growth.seconds
            if not CONFIRMED[0] * estimate <= growth.joules <= CONFIRMED[1] * estimate:
                return False
        most = ABOVE_LIMIT * limit_w * growth.seconds + max(0.0, AT_ONCE_S * limit_w - self._excess_j)
        return 0 < growth.joules <= most

    def _believe(self, value: float) -> None:
        self.value, self.age_s, self._doubted, self._doubted_age_s = value, 0.0, None, 0.0


@dataclass(slots=True)
class EnergyMeter:
    """The energy of one GPU, from its counter where that can be believed, else from its power."""

    counter: EnergyCounter
    # Whether energy was counted before: what the counter says at first is not this history's.
    begun: bool = False
    # What was estimated by power since the counter was believed last, and since it was doubted.
    ahead_j: float = 0.0
    _ahead_of_doubt_j: float = 0.0
    # Whether nobody looked for a while since then.
    _paused: bool = False

    @property
    def source(self) -> str:
        """counter, or power where there is no counter, or none that can be believed."""
        counter = self.counter
        return "power" if counter.value is None or counter.age_s > DOUBTED_S else "counter"

    def add(
        self,
        value: float | None,
        power_w: float | None,
        limit_w: float | None,
        dt_s: float,
        pause_s: float = 0.0,
    ) -> tuple[float, float] | None:
        """Joules of the `dt_s` seconds up to now, and of the `pause_s` seconds before them in which nobody looked.

        None where neither is known.
        """
        estimate = None if power_w is None else power_w * dt_s
        known, begun = self.counter.value is not None, self.begun
        self._paused = self._paused or pause_s > 0
        growth = self.counter.step(value, dt_s + pause_s, power_w, limit_w, pause_s > 0)
        self.begun = self.begun or self.counter.value is not None or estimate is not None
        if growth is None:
            if not known and not begun and self.counter.value is not None:
                return 0.0, 0.0
            if known and estimate is not None:
                self.ahead_j += estimate
                # The value that is doubted has this tick behind it.
                self._ahead_of_doubt_j = 0.0 if self.counter.begins_anew else self._ahead_of_doubt_j + estimate
            return None if estimate is None else (estimate, 0.0)
        ahead_j = self._ahead_of_doubt_j if growth.from_doubt else self.ahead_j
        rest = growth.joules - ahead_j
        self.ahead_j, self._ahead_of_doubt_j = max(0.0, -rest), 0.0
        rest = max(0.0, rest)
        paused, self._paused = self._paused, False
        if not paused:
            return rest, 0.0
        recorded = rest if estimate is None else min(estimate, rest)
        return recorded, rest - recorded
