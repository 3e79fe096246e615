"""The source of simulated GPUs: for demos, for machines without a driver, and to write years of history.

Its snapshots are a pure function of the seed, the number of GPUs and the time. So a server that restarts continues
the same history, and every moment of the past can be read, in any order.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf

from gpumon_core.simulation import people
from gpumon_core.simulation.gpus import Unit, create_gpu, infos_of
from gpumon_core.simulation.load import (
    FIRST_PID,
    WARM_UP_S,
    LoadCurve,
    ProgramRun,
    Schedule,
    activity,
    hash64,
    load_curve,
)
from gpumon_core.simulation.people import HOUR
from gpumon_core.simulation.readings import NO_VALUES, gpu_values, weather_c
from gpumon_core.telemetry.records import GpuReading, HostInfo, ProcessReading, Snapshot, elapsed_beside

MAX_GPUS = 64
MAX_PROCESSES = 4096

DRIVER = "580.95.05"
# Schedules are computed in blocks of this length. The blocks of each GPU begin at another time, so that no tick
# has to compute all of them.
BLOCK_S = HOUR
STAGGER_S = 450


class _ActiveRun:
    """One run on one unit: its reading at full memory, and its levels over time."""

    __slots__ = ("full", "last", "level", "levels", "run", "since", "times", "until")

    def __init__(self, run: ProgramRun, full: ProcessReading, times: list[float], levels: list[float]) -> None:
        self.run = run
        self.full = full
        self.times = times
        self.levels = levels
        # The last reading, used again while it does not change.
        self.last = full
        # The last step: its level, and when it begins and ends.
        self.level, self.since, self.until = 0.0, 0.0, 0.0

    def seek(self, timestamp: float) -> None:
        """Find the step of a time."""
        step = bisect_right(self.times, timestamp)
        self.level, self.since = self.levels[step - 1], self.times[step - 1]
        self.until = self.times[step] if step < len(self.times) else inf


ActiveRuns = tuple[_ActiveRun, ...]
# What the driver does not report for a GPU with MIG instances.
NOT_WITH_MIG = (
    *("utilization", "utilization_max", "memory_utilization", "memory_utilization_max"),
    *("encoder_utilization", "decoder_utilization", "jpeg_utilization", "ofa_utilization"),
)


@dataclass(frozen=True, slots=True)
class _Block:
    """A GPU for BLOCK_S seconds: its load, and the runs of every unit."""

    load: LoadCurve
    runs: tuple[ActiveRuns, ...]


class SimulatedSource:
    """Snapshots of `gpus` simulated GPUs (1 to 64); MIG instances come on top of that number, unless `mig` is off.

    `processes` is about how many processes exist at once over all GPUs; None leaves it to the simulation.
    Raises ValueError for numbers that are out of range.
    """

    name = "demo"
    compares = False

    def __init__(
        self,
        gpus: int = 4,
        seed: int = 7,
        host: str | None = None,
        processes: int | None = None,
        clock: Callable[[], float] = time.time,
        mig: bool = True,
    ) -> None:
        if not 1 <= gpus <= MAX_GPUS:
            raise ValueError(f"between 1 and {MAX_GPUS} GPUs can be simulated, not {gpus}")
        if processes is not None and not 0 <= processes <= MAX_PROCESSES:
            raise ValueError(f"between 0 and {MAX_PROCESSES} processes can be simulated, not {processes}")
        self.host = HostInfo(host or "demo", DRIVER, "13.0", f"13.{DRIVER}")
        self._seed = seed
        self._clock = clock
        self._gpus = tuple(create_gpu(index, seed, mig) for index in range(gpus))
        self._infos = tuple(info for gpu in self._gpus for info in infos_of(gpu))
        self._schedules = _create_schedules([unit for gpu in self._gpus for unit in gpu.units], seed, processes)
        # Enough for ticks and for reading times in order; after a jump the blocks are computed again.
        self._block = lru_cache(maxsize=3 * gpus)(self._make_block)

    def read(self) -> Snapshot:
        """The snapshot of this moment."""
        return replace(self.snapshot_at(self._clock()), elapsed=elapsed_beside(self._clock))

    def close(self) -> None:
        """Nothing to close."""

    def process_name(self, pid: int) -> str | None:
        """The name of the program that has this PID now."""
        run = self.identity(pid, self._clock())
        return run.name if run else None

    def identity(self, pid: int, timestamp: float) -> ProgramRun | None:
        """The run that has this PID at that time (UTC seconds), None where there is none."""
        if not self._schedules or pid < FIRST_PID:
            return None
        run = self._schedules[(pid - FIRST_PID) % len(self._schedules)].at(timestamp)
        return run if run is not None and run.pid == pid else None

    def snapshot_at(self, timestamp: float) -> Snapshot:
        """The snapshot of any moment, in UTC seconds: always the same one for the same moment."""
        readings: list[GpuReading] = []
        processes: list[ProcessReading] = []
        air_c = weather_c(self._seed, timestamp)
        for number, gpu in enumerate(self._gpus):
            block = self._block(number, int((timestamp + STAGGER_S * number) // BLOCK_S))
            values = gpu_values(gpu, block.load, timestamp, air_c)
            utilization = None if gpu.is_divided else values["utilization"]
            memory, coding = [], 0
            for unit, runs in zip(gpu.units, block.runs, strict=True):
                held, encoders = _add_processes(runs, timestamp, processes, utilization)
                memory.append(unit.driver_mib + held)
                coding += encoders
            values["memory"] = sum(memory)
            if not gpu.is_divided:
                values["encoder_utilization"] = float(min(100, coding))
                values["decoder_utilization"] = float(min(100, coding * 2 // 3))
            readings.append(GpuReading(gpu.info.uuid, values, "point" if gpu.is_divided else "interval"))
            if gpu.is_divided:
                # The driver does not report the utilization of a GPU with MIG instances, and only the memory of
                # these.
                for key in NOT_WITH_MIG:
                    values[key] = None
                for unit, used in zip(gpu.units, memory, strict=True):
                    readings.append(GpuReading(unit.info.uuid, {**NO_VALUES, "memory": used}))
        return Snapshot(timestamp, self.host, self._infos, tuple(readings), tuple(processes))

    def _make_block(self, number: int, slot: int) -> _Block:
        gpu = self._gpus[number]
        start = slot * BLOCK_S - STAGGER_S * number
        end = start + BLOCK_S
        active: list[tuple[ProgramRun, float]] = []
        runs: list[ActiveRuns] = []
        for unit in gpu.units:
            here: list[_ActiveRun] = []
            for schedule in unit.schedules:
                # A run that ended shortly before still has an effect on the temperature.
                for run in schedule.between(start - WARM_UP_S, end):
                    active.append((run, unit.weight))
                    if run.end > start:
                        mib = unit.full_mib(schedule, run)
                        reading = ProcessReading(unit.info.uuid, run.pid, run.program.kind, mib)
                        here.append(_ActiveRun(run, reading, *activity(run, start - WARM_UP_S, end)))
            runs.append(tuple(here))
        return _Block(load_curve(gpu.model.power, active, start - WARM_UP_S, end), tuple(runs))


def _add_processes(
    runs: ActiveRuns, timestamp: float, processes: list[ProcessReading], utilization: float | None
) -> tuple[int, int]:
    """Add the processes of that time to `processes`. Returns their memory together, in MiB, and their encoder
    utilization together, in percent. Each process has a part of `utilization`; None where the driver does not
    report processes one by one."""
    total, coding, busy = 0, 0, 0.0
    here: list[_ActiveRun] = []
    for active in runs:
        run = active.run
        if run.start <= timestamp < run.end:
            if not active.since <= timestamp < active.until:
                active.seek(timestamp)
            busy += active.level
            here.append(active)
    # The levels may add up to more than 1.
    part = 100.0 / max(1.0, busy)
    for active in here:
        run, full = active.run, active.full
        mib = full.memory_mib or 0
        if timestamp - run.start < run.ramp_s:
            mib = run.memory_mib(mib, timestamp)
        total += mib
        sm = None if utilization is None else int(active.level * part)
        last = active.last
        if last.memory_mib != mib or last.sm_utilization != sm:
            video = 0
            if run.program.pattern == "encoding" and sm:
                video = min(100, 2 * sm)
            last = active.last = ProcessReading(
                *(full.gpu_uuid, full.pid, full.kind, mib, sm),
                *((None,) * 3 if sm is None else (int(sm * run.program.bandwidth), video, video * 2 // 3)),
            )
        coding += last.encoder_utilization or 0
        processes.append(last)
    return total, coding


@dataclass(frozen=True, slots=True)
class _UnitSchedule:
    """A schedule, its units, and its rank among their schedules; 0 is the main one."""

    rank: int
    schedule: Schedule
    units: list[Unit]


def _create_schedules(units: list[Unit], seed: int, processes: int | None) -> list[Schedule]:
    """Give every unit its schedules. Returns all schedules, with their numbers set."""
    schedules: list[_UnitSchedule] = []
    shared: dict[int, tuple[Schedule, int]] = {}
    for number, unit in enumerate(units):
        neighbours = units[number : number + 2]
        if number not in shared and [neighbour.role for neighbour in neighbours] == ["pair", "pair"]:
            phase = hash64(seed, number, 6)
            pair = Schedule(people.PAIR, hash64(seed, number, 7), phase)
            shared[number] = shared[number + 1] = (pair, phase)
            schedules.append(_UnitSchedule(0, pair, neighbours))
        for rank, habit in enumerate(people.ROLES[unit.role]):
            key = hash64(seed, number, rank, 8)
            # The main runs of a pair have the same periods as the shared ones, which replace them.
            shared_one, phase = shared[number] if number in shared and rank == 0 else (None, key)
            schedules.append(_UnitSchedule(rank, Schedule(habit, key, phase, shared_one), [unit]))
    if processes is not None:
        schedules = _limit_schedules(schedules, units, seed, processes)
    for number, unit_schedule in enumerate(schedules):
        unit_schedule.schedule.set_number(number, len(schedules))
        for unit in unit_schedule.units:
            unit.schedules.append(unit_schedule.schedule)
    return [unit_schedule.schedule for unit_schedule in schedules]


def _limit_schedules(
    schedules: list[_UnitSchedule], units: list[Unit], seed: int, processes: int
) -> list[_UnitSchedule]:
    """The schedules for about so many processes: the main ones first, and workers at the end."""
    chosen: list[_UnitSchedule] = []
    count = 0.0
    for unit_schedule in sorted(schedules, key=lambda unit_schedule: unit_schedule.rank):
        count += unit_schedule.schedule.expected()
        if count > processes:
            return chosen
        chosen.append(unit_schedule)
    for number in range(round((processes - count) / people.WORKERS_PRESENT)):
        unit = units[number % len(units)]
        key = hash64(seed, number, 9)
        unit.workers += 1
        chosen.append(_UnitSchedule(9, Schedule(people.WORKERS, key, key), [unit]))
    return chosen
