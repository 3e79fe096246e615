"""The load of simulated programs: when they run, how busy a GPU is with them, and how warm it gets.

Everything is a pure function of absolute time. The load of a program is a step function, so that the heat of a GPU
is a chain of exponentials with a closed form: every moment costs the same to compute.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import exp
from random import Random

from gpumon_core.simulation.people import DAY, DEMAND, HOUR, WEEKEND, Habit, Pattern, PowerModel, ProgramProfile

MASK = (1 << 64) - 1
THURSDAY = 3  # 1 January 1970, counted from Monday

# How fast the temperature follows the power: of the die and its cold plate, and of the heat sink and the case.
QUICK_S, SLOW_S, QUICK_PART = 9.0, 110.0, 0.45
# So long before a time that the state assumed there has no effect any more.
WARM_UP_S = 8 * SLOW_S

FIRST_PID = 1200
# PIDs are given one after another and then again from the first, as a kernel does it.
PID_EVERY_S, PIDS = 7, 60_000

Step = tuple[float, float, float]


def hash64(*parts: int) -> int:
    """A 64-bit hash of integers, the same on every machine (multiply and xor-shift, as in SplitMix64)."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = ((state ^ (part & MASK)) * 0xBF58476D1CE4E5B9) & MASK
        state ^= state >> 29
    state = (state * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 32)


def fraction(number: int, which: int) -> float:
    """One of the four independent numbers, 0 <= x < 1, inside a hash."""
    return ((number >> (16 * which)) & 0xFFFF) / 65536


def demand(time: float) -> float:
    """How much people use GPUs at that time (UTC), 0 to 1: by the hour of the day, less on weekends."""
    day, second = divmod(time, DAY)
    hour, rest = divmod(second, HOUR)
    here, there = DEMAND[int(hour)], DEMAND[int(hour + 1) % 24]
    level = here + (there - here) * rest / HOUR
    return level * WEEKEND if (int(day) + THURSDAY) % 7 >= 5 else level


@dataclass(frozen=True, slots=True, eq=False)
class ProgramRun:
    """One run of a program, from `start` to just before `end` (whole UTC seconds).

    `share` is the part of its allowed memory that it holds once it has ramped up.
    """

    program: ProgramProfile
    pid: int
    start_key: str
    start: int
    end: int
    user: str
    ramp_s: int
    share: float
    key: int

    @property
    def name(self) -> str:
        """The program's name."""
        return self.program.name

    @property
    def busy_from(self) -> int:
        """When it begins to compute, in UTC seconds."""
        return self.start + (20 if self.program.stairs else self.ramp_s)

    def memory_mib(self, full_mib: int, time: float) -> int:
        """The memory that it holds at that time, in MiB, in pages of 2."""
        part = min(1.0, (time - self.start) / self.ramp_s)
        if self.program.stairs:
            part = int(part * self.program.stairs) / self.program.stairs
        return full_mib if part >= 1 else max(1, int(full_mib * (0.1 + 0.9 * part)) & ~1)


class Schedule:
    """The runs of one habit on one GPU or on a pair: at most one run at a time, each inside its own period.

    Its PIDs follow from its number, so that two schedules never use the same PID.
    """

    def __init__(self, habit: Habit, key: int, phase_key: int, replaced_by: Schedule | None = None) -> None:
        self.habit = habit
        self._key = key
        self._phase = hash64(phase_key) % habit.period_s if habit.phase_s is None else habit.phase_s
        # In a period in which that schedule has a run, this one has none.
        self._replaced_by = replaced_by
        self._number, self._schedules = 0, 1
        self._runs: dict[int, ProgramRun | None] = {}

    def expected(self) -> float:
        """How many processes it has on average."""
        habit = self.habit
        length = min(sum(habit.length_s) / 2, habit.period_s)
        rest = 1 - (self._replaced_by.habit.chance if self._replaced_by else 0)
        return habit.chance * rest * (0.45 if habit.daily else 1) * length / habit.period_s

    def set_number(self, number: int, schedules: int) -> None:
        """Set its number among all schedules."""
        self._number, self._schedules = number, schedules

    def at(self, time: float) -> ProgramRun | None:
        """The run that is active at that time."""
        run = self.run(int((time - self._phase) // self.habit.period_s))
        return run if run is not None and run.start <= time < run.end else None

    def between(self, start: float, end: float) -> Iterator[ProgramRun]:
        """The runs that are active at some time between two times."""
        period = self.habit.period_s
        for slot in range(int((start - self._phase) // period), int((end - self._phase) // period) + 1):
            run = self.run(slot)
            if run is not None and run.start < end and run.end > start:
                yield run

    def run(self, slot: int) -> ProgramRun | None:
        """The run of a period, if there is one."""
        try:
            return self._runs[slot]
        except KeyError:
            if len(self._runs) >= 128:
                self._runs.clear()
            return self._runs.setdefault(slot, self._make(slot))

    def _make(self, slot: int) -> ProgramRun | None:
        habit = self.habit
        begin = self._phase + slot * habit.period_s
        dice = Random(hash64(self._key, slot))
        chance = habit.chance * (demand(begin) if habit.daily else 1)
        if dice.random() >= chance or (self._replaced_by is not None and self._replaced_by.run(slot) is not None):
            return None
        start = begin + int(habit.period_s * dice.uniform(*habit.start))
        length = dice.uniform(*habit.length_s)
        if habit.daily:
            # Most short jobs are very short.
            length = min(length, dice.uniform(*habit.length_s))
        program = dice.choice(habit.programs)
        numbers = max(4, PIDS // self._schedules)
        return ProgramRun(
            program=program,
            pid=FIRST_PID + start // PID_EVERY_S % numbers * self._schedules + self._number,
            # As long as the start keys of real processes.
            start_key=f"{self._key & 0xFFFFFFFF:08x}:{start}",
            start=start,
            end=min(start + int(length), begin + habit.period_s - 5),
            user=dice.choice(program.users),
            ramp_s=int(dice.uniform(*program.ramp_s)),
            share=dice.uniform(*habit.share),
            key=hash64(self._key, slot, 1),
        )


def _cells(run: ProgramRun, start: float, end: float, length_s: int) -> Iterator[tuple[int, int]]:
    """The pieces of `length_s` seconds between two times: the begin of each, and a hash of its own."""
    for cell in range(int(start // length_s), int(end // length_s) + 1):
        yield cell * length_s, hash64(run.key, cell)


def _training(run: ProgramRun, start: float, end: float) -> Iterator[Step]:
    """Nearly full, with pauses for checkpoints and short waits for the data loader."""
    level = 0.955 + 0.04 * fraction(run.key, 0)
    yield run.busy_from, run.end, level
    every, pause = 900 + 1800 * fraction(run.key, 1), 14 + 40 * fraction(run.key, 2)
    since = run.busy_from
    for number in range(max(1, int((start - since) // every)), int((end - since) // every) + 1):
        yield since + number * every, since + number * every + pause, -0.94 * level
    for begin, dice in _cells(run, start, end, 90):
        if fraction(dice, 0) < 0.09:
            stall = begin + 70 * fraction(dice, 1)
            yield stall, stall + 4 + 16 * fraction(dice, 2), -level * (0.2 + 0.5 * fraction(dice, 3))


def _requests(run: ProgramRun, start: float, end: float) -> Iterator[Step]:
    """Bursts of requests: many by day, few by night, and some quarters of an hour much busier than others."""
    for begin, dice in _cells(run, start, end, 60):
        mood = 0.5 + 1.3 * fraction(hash64(run.key, begin // 900, 2), 0)
        if fraction(dice, 0) < demand(begin) * mood:
            burst = begin + 25 * fraction(dice, 1)
            yield burst, burst + 10 + 65 * fraction(dice, 2), 0.35 + 0.62 * fraction(dice, 3)


def _notebook(run: ProgramRun, start: float, end: float) -> Iterator[Step]:
    """Trials of a person, fewer and fewer; the memory stays occupied."""
    for begin, dice in _cells(run, start, end, 300):
        age = begin - run.start
        if fraction(dice, 0) < (0.6 if age < HOUR else 0.25 if age < 3 * HOUR else 0.0):
            trial = begin + 100 * fraction(dice, 1)
            yield trial, trial + 5 + 150 * fraction(dice, 2), 0.2 + 0.75 * fraction(dice, 3)


def _batch(run: ProgramRun, start: float, end: float) -> Iterator[Step]:
    """One level from the begin to the end."""
    yield run.busy_from, run.end, 0.78 + 0.2 * fraction(run.key, 0)


def _encoding(run: ProgramRun, start: float, end: float) -> Iterator[Step]:
    """The video engines do most of the work; the SMs run filters."""
    yield run.busy_from, run.end, 0.25 + 0.3 * fraction(run.key, 0)


def _desktop(run: ProgramRun, start: float, end: float) -> Iterator[Step]:
    """A person scrolls and plays videos by day."""
    for begin, dice in _cells(run, start, end, 60):
        if fraction(dice, 0) < 0.8 * demand(begin):
            yield begin, begin + 10 + 50 * fraction(dice, 1), 0.01 + 0.09 * fraction(dice, 2) ** 2


def _worker(run: ProgramRun, start: float, end: float) -> Iterator[Step]:
    """Small tasks."""
    for begin, dice in _cells(run, start, end, 600):
        if fraction(dice, 0) < 0.4:
            yield begin, begin + 40 + 500 * fraction(dice, 1), 0.005 + 0.05 * fraction(dice, 2)


PATTERNS: dict[Pattern, Callable[[ProgramRun, float, float], Iterator[Step]]] = {
    "training": _training,
    "requests": _requests,
    "notebook": _notebook,
    "batch": _batch,
    "encoding": _encoding,
    "desktop": _desktop,
    "worker": _worker,
}


@dataclass(frozen=True, slots=True)
class LoadCurve:
    """The load of a GPU over time, in steps: the values from each of `times` to the next.

    `used` and `bandwidth` are shares of 1, `watts` is the power draw, and `has_context` says whether a CUDA
    context exists. `heat` is the temperature that the GPU approaches, from 0 (idle) to 1 (at its power limit);
    `quick` and `slow` are its two parts at the begin of the step.
    """

    times: list[float]
    used: list[float]
    bandwidth: list[float]
    watts: list[float]
    has_context: list[bool]
    heat: list[float]
    quick: list[float]
    slow: list[float]

    def at(self, time: float) -> int:
        """The step that a time is in."""
        return bisect_right(self.times, time) - 1

    def warmth(self, step: int, time: float) -> tuple[float, float]:
        """The quick and the slow part of the heat at a time within a step."""
        heat, age = self.heat[step], time - self.times[step]
        return (
            heat + (self.quick[step] - heat) * exp(-age / QUICK_S),
            heat + (self.slow[step] - heat) * exp(-age / SLOW_S),
        )


def activity(run: ProgramRun, start: float, end: float) -> tuple[list[float], list[float]]:
    """How busy the SMs are with one run from `start` to `end`: times, and the level from each to the next."""
    changes: list[Step] = []
    begin, finish = max(start, run.busy_from), min(end, run.end)
    for first, last, level in PATTERNS[run.program.pattern](run, start, end):
        first, last = max(first, begin), min(last, finish)  # noqa: PLW2901
        if first < last:
            changes.append((first, level, 0.0))
            changes.append((last, -level, 0.0))
    times, levels, level = [start], [0.0], 0.0
    for time, more, _ in sorted(changes):
        level += more
        if time > times[-1]:
            times.append(time)
            levels.append(max(0.0, level))
        else:
            levels[-1] = max(0.0, level)
    return times, levels


def load_curve(
    power_model: PowerModel, runs: list[tuple[ProgramRun, float]], start: float, end: float
) -> LoadCurve:
    """The load of a GPU from `start` to `end`. Each run has a weight: the share of the SMs of its MIG instance.

    The temperature is right from WARM_UP_S after `start` on.
    """
    changes: list[tuple[float, float, float, float, int]] = [(start, 0.0, 0.0, 0.0, 0)]
    for run, weight in runs:
        program = run.program
        begin, finish = max(start, run.busy_from), min(end, run.end)
        if "C" in program.kind:
            changes.append((max(start, run.start), 0.0, 0.0, 0.0, 1))
            changes.append((finish, 0.0, 0.0, 0.0, -1))
        for first, last, level in PATTERNS[program.pattern](run, start, end):
            first, last = max(first, begin), min(last, finish)  # noqa: PLW2901
            if first < last:
                used = level * weight
                power, bandwidth = used * program.power, used * program.bandwidth
                changes.append((first, used, power, bandwidth, 0))
                changes.append((last, -used, -power, -bandwidth, 0))
    changes.sort()
    return _accumulate(power_model, changes)


def _accumulate(model: PowerModel, changes: list[tuple[float, float, float, float, int]]) -> LoadCurve:
    load = LoadCurve([], [], [], [], [], [], [], [])
    used = power = bandwidth = quick = slow = heat = 0.0
    contexts, before = 0, changes[0][0]
    span = model.limit_w - model.idle_w
    for number, (time, more_used, more_power, more_bandwidth, more_contexts) in enumerate(changes):
        used, power, bandwidth = used + more_used, power + more_power, bandwidth + more_bandwidth
        contexts += more_contexts
        if number + 1 < len(changes) and changes[number + 1][0] == time:
            continue
        if time > before:
            quick = heat + (quick - heat) * exp((before - time) / QUICK_S)
            slow = heat + (slow - heat) * exp((before - time) / SLOW_S)
        floor = model.context_w if contexts > 0 else model.idle_w
        watts = floor + (model.limit_w - floor) * min(0.99, max(0.0, power))
        heat, before = (watts - model.idle_w) / span, time
        if not load.times:
            quick = slow = heat
        load.times.append(time)
        load.used.append(min(1.0, max(0.0, used)))
        load.bandwidth.append(min(1.0, max(0.0, bandwidth)))
        load.watts.append(watts)
        load.has_context.append(contexts > 0)
        load.heat.append(heat)
        load.quick.append(quick)
        load.slow.append(slow)
    return load
