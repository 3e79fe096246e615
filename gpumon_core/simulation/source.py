"""Simulated GPUs: for demos, for machines without a driver, and for filling years of history.

What they show is a pure function of the seed, the number of GPUs and the time: a server that is
restarted continues the same story, and any moment of the past can be asked for, in any order.
"""

from __future__ import annotations

import time
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf, pi, sin

from gpumon_core.metrics import TICK_COLUMNS
from gpumon_core.simulation import people as cast
from gpumon_core.simulation.load import (
    FIRST_PID,
    QUICK_PART,
    WARM_UP_S,
    Lane,
    Load,
    ProgramRun,
    activity,
    build,
    mix,
    share,
)
from gpumon_core.simulation.people import DAY, HOUR, Card
from gpumon_core.telemetry.records import GpuInfo, GpuReading, HostInfo, ProcessReading, Snapshot, elapsed_beside

MAX_GPUS = 64
MAX_PROCESSES = 4096

DRIVER = "580.95.05"
# Schedules are worked out in pieces of this length; boards begin theirs one after another, so that
# no tick has to work out all of them.
BLOCK_S = HOUR
STAGGER_S = 450
# Drivers change clocks in steps of this size.
CLOCK_STEP_MHZ = 15
THROTTLE_C = 87
# Below this level a GPU counts as doing nothing at all.
STILL = 0.005

NOTHING: dict[str, float | None] = dict.fromkeys(TICK_COLUMNS)
# Which boards measure what (see simulated_cast): GPM came with Hopper, the JPEG and optical-flow engines with
# Ampere; desktop boards do not tell how hot their memory is.
WITH_GPM = frozenset({"Hopper", "Blackwell"})
WITH_HBM = frozenset({"Hopper"}) | {"NVIDIA A100-SXM4-80GB"}
# Bits of the clocks-event reasons (nvmlClocksEventReason* in the API reference).
REASON_IDLE, REASON_POWER_CAP, REASON_THERMAL = 0x1, 0x4, 0x20
# A board whose memory corrects an error now and then, and how often.
ECC_INDEX, ECC_EVERY_S = 5, 11 * HOUR
MIB_S_PCIE, MIB_S_NVLINK = 9000, 120_000


class _Presence:
    """One run on one unit: what it holds in the end, and how busy it is when."""

    __slots__ = ("full", "last", "level", "levels", "run", "since", "times", "until")

    def __init__(self, run: ProgramRun, full: ProcessReading, times: list[float], levels: list[float]) -> None:
        self.run = run
        self.full = full
        self.times = times
        self.levels = levels
        # Handed out again while nothing about it changes.
        self.last = full
        # The step looked at last: how busy, from when to when.
        self.level, self.since, self.until = 0.0, 0.0, 0.0

    def seek(self, timestamp: float) -> None:
        """Find the step of a time."""
        step = bisect_right(self.times, timestamp)
        self.level, self.since = self.levels[step - 1], self.times[step - 1]
        self.until = self.times[step] if step < len(self.times) else inf


Present = tuple[_Presence, ...]
KINDS = ("corrected", "uncorrected")
# What the driver does not say of a divided GPU.
UNDIVIDED = (
    *("utilization", "utilization_max", "memory_utilization", "memory_utilization_max"),
    *("encoder_utilization", "decoder_utilization", "jpeg_utilization", "ofa_utilization"),
)


class _Unit:
    """Where processes run: a GPU, or one MIG instance of it with its `weight` among the SMs."""

    def __init__(self, info: GpuInfo, memory_mib: int, driver_mib: int, weight: float, role: str) -> None:
        self.info = info
        self.driver_mib = driver_mib
        self.weight = weight
        self.role = role
        self.lanes: list[Lane] = []
        self.workers = 0
        self._free_mib = memory_mib - driver_mib

    def full_mib(self, lane: Lane, run: ProgramRun) -> int:
        """What a run holds here once it has ramped up, in MiB."""
        kept = cast.WORKERS_SHARE if self.workers else 0.0
        if lane.habit is cast.WORKERS:
            allowed = min(cast.WORKER_MIB, kept * self._free_mib / self.workers)
        else:
            allowed = (1 - kept) * self._free_mib
        # Two GPUs of one run never hold quite the same.
        uneven = 1 - 0.004 * share(mix(run.key, self.info.index), 0)
        return max(1, int(allowed * run.share * uneven) & ~1)


@dataclass(frozen=True, slots=True)
class _Board:
    """A GPU as one buys it, with its MIG instances as its units, or itself as the only one."""

    card: Card
    info: GpuInfo
    key: int
    hotter_c: float
    units: tuple[_Unit, ...]
    # What never changes, or too rarely to be worked out with every tick.
    constant: dict[str, float | None]
    # Over what it is tied to its neighbour.
    nvlink: bool

    @property
    def divided(self) -> bool:
        return self.units[0].info is not self.info


@dataclass(frozen=True, slots=True)
class _Block:
    """A board's schedule for a while: its load, and every unit's runs with what they fill up to."""

    load: Load
    runs: tuple[Present, ...]


class SimulatedSource:
    """Snapshots of `gpus` simulated GPUs (1 to 64); MIG instances come on top of that number, unless `mig` is off.

    `processes` is about how many processes exist at once over all GPUs; None leaves it to the story.
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
        self._boards = tuple(_board(index, seed, mig) for index in range(gpus))
        self._infos = tuple(info for board in self._boards for info in _infos(board))
        self._lanes = _populate([unit for board in self._boards for unit in board.units], seed, processes)
        # Enough for ticks and for a walk through history; after a jump the pieces are worked out again.
        self._block = lru_cache(maxsize=3 * gpus)(self._make_block)

    def read(self) -> Snapshot:
        """The snapshot of this moment."""
        return replace(self.snapshot_at(self._clock()), elapsed=elapsed_beside(self._clock))

    def close(self) -> None:
        """Nothing is held."""

    def process_name(self, pid: int) -> str | None:
        """The name of a program that runs now."""
        run = self.identity(pid, self._clock())
        return run.name if run else None

    def identity(self, pid: int, timestamp: float) -> ProgramRun | None:
        """The run that has this PID at that time (UTC seconds), None where there is none."""
        if not self._lanes or pid < FIRST_PID:
            return None
        run = self._lanes[(pid - FIRST_PID) % len(self._lanes)].at(timestamp)
        return run if run is not None and run.pid == pid else None

    def snapshot_at(self, timestamp: float) -> Snapshot:
        """The snapshot of any moment, in UTC seconds: the same one whenever it is asked for."""
        readings: list[GpuReading] = []
        processes: list[ProcessReading] = []
        weather = _weather(self._seed, timestamp)
        for number, board in enumerate(self._boards):
            block = self._block(number, int((timestamp + STAGGER_S * number) // BLOCK_S))
            values = _values(board, block.load, timestamp, weather)
            whole = None if board.divided else values["utilization"]
            memory, coding = [], 0
            for unit, runs in zip(board.units, block.runs, strict=True):
                held, encoders = _present(runs, timestamp, processes, whole)
                memory.append(unit.driver_mib + held)
                coding += encoders
            values["memory"] = sum(memory)
            if not board.divided:
                values["encoder_utilization"] = float(min(100, coding))
                values["decoder_utilization"] = float(min(100, coding * 2 // 3))
            readings.append(GpuReading(board.info.uuid, values, "point" if board.divided else "interval"))
            if board.divided:
                # The driver does not say how busy a divided GPU is, and of its instances only the memory.
                for key in UNDIVIDED:
                    values[key] = None
                for unit, used in zip(board.units, memory, strict=True):
                    readings.append(GpuReading(unit.info.uuid, {**NOTHING, "memory": used}))
        return Snapshot(timestamp, self.host, self._infos, tuple(readings), tuple(processes))

    def _make_block(self, number: int, slot: int) -> _Block:
        board = self._boards[number]
        start = slot * BLOCK_S - STAGGER_S * number
        end = start + BLOCK_S
        active: list[tuple[ProgramRun, float]] = []
        present: list[Present] = []
        for unit in board.units:
            here: list[_Presence] = []
            for lane in unit.lanes:
                # What ended a little earlier has left its warmth.
                for run in lane.between(start - WARM_UP_S, end):
                    active.append((run, unit.weight))
                    if run.end > start:
                        mib = unit.full_mib(lane, run)
                        reading = ProcessReading(unit.info.uuid, run.pid, run.program.kind, mib)
                        here.append(_Presence(run, reading, *activity(run, start - WARM_UP_S, end)))
            present.append(tuple(here))
        return _Block(build(board.card.board, active, start - WARM_UP_S, end), tuple(present))


def _present(
    runs: Present, timestamp: float, processes: list[ProcessReading], utilization: float | None
) -> tuple[int, int]:
    """Add the processes that live at that time; the memory they hold together, in MiB, and how busy they keep
    the encoders, in percent. Each has its part of the board's utilization; None where the driver does not
    tell processes apart."""
    total, coding, busy = 0, 0, 0.0
    here: list[_Presence] = []
    for presence in runs:
        run = presence.run
        if run.start <= timestamp < run.end:
            if not presence.since <= timestamp < presence.until:
                presence.seek(timestamp)
            busy += presence.level
            here.append(presence)
    # Levels may add up to more than a board has.
    part = 100.0 / max(1.0, busy)
    for presence in here:
        run, full = presence.run, presence.full
        mib = full.memory_mib or 0
        if timestamp - run.start < run.ramp_s:
            mib = run.memory_mib(mib, timestamp)
        total += mib
        sm = None if utilization is None else int(presence.level * part)
        last = presence.last
        if last.memory_mib != mib or last.sm_utilization != sm:
            video = 0
            if run.program.pattern == "encoding" and sm:
                video = min(100, 2 * sm)
            last = presence.last = ProcessReading(
                *(full.gpu_uuid, full.pid, full.kind, mib, sm),
                *((None,) * 3 if sm is None else (int(sm * run.program.bandwidth), video, video * 2 // 3)),
            )
        coding += last.encoder_utilization or 0
        processes.append(last)
    return total, coding


def _values(board: _Board, load: Load, timestamp: float, weather: float) -> dict[str, float | None]:
    """Everything but memory, in the catalogue's units and as coarse as NVML gives it."""
    card, limits = board.card, board.card.board
    step = load.at(timestamp)
    noise = mix(board.key, int(timestamp))
    wobble = share(noise, 0) - 0.5
    used, watts = load.used[step], load.watts[step] * (1 + 0.03 * wobble)
    # Boards overshoot their limit for a moment now and then.
    if share(noise, 1) > 0.998 and watts > 0.85 * limits.limit_w:
        watts = limits.limit_w * (1.02 + 0.1 * share(noise, 2))
    quick, slow = load.warmth(step, timestamp)
    rise = limits.load_c + board.hotter_c - limits.idle_c
    base = limits.idle_c + weather
    temperature = round(base + rise * (QUICK_PART * quick + (1 - QUICK_PART) * slow))
    awake = used > STILL or (load.held[step] and not card.dozes)
    utilization = _percent(used, 0.03 * wobble)
    bandwidth = _percent(load.bandwidth[step], 0.04 * (share(noise, 3) - 0.5))
    clock = _sm_clock(card, watts, temperature, wobble) if awake else card.sm_mhz[0]
    # The highest moment of a tick lies above its mean, the more so the less even the load is.
    above = 1 + 0.25 * share(noise, 2) * (1 - used) + 0.02 * share(noise, 1)
    values = {**NOTHING, **board.constant}
    values["temperature"] = float(temperature)
    values["power"] = round(watts, 3)
    values["power_max"] = round(watts * (1 + 0.04 * share(noise, 1)), 3)
    values["utilization"] = utilization
    values["utilization_max"] = float(min(100, round(utilization * above)))
    values["memory_utilization"] = bandwidth
    values["memory_utilization_max"] = float(min(100, round(bandwidth * above)))
    values["fan_speed"] = _fan(card, base + rise * slow)
    values["sm_clock"] = values["graphics_clock"] = clock
    values["video_clock"] = round(0.9 * clock / CLOCK_STEP_MHZ) * CLOCK_STEP_MHZ
    values["memory_clock"] = card.memory_mhz[awake]
    if card.name in WITH_HBM or card.architecture in WITH_HBM:
        values["memory_temperature"] = float(temperature + 5 + round(6 * load.bandwidth[step]))
    values["pcie_tx"] = round(MIB_S_PCIE * 0.2 * bandwidth * (0.5 + share(noise, 2)) / 100, 1)
    values["pcie_rx"] = round(MIB_S_PCIE * 0.5 * bandwidth * (0.5 + share(noise, 3)) / 100, 1)
    if card.architecture in WITH_GPM:
        values["graphics_activity"] = utilization
        values["sm_activity"] = round(0.93 * utilization, 1)
        values["sm_occupancy"] = round(0.41 * utilization, 1)
        values["tensor_activity"] = round(0.52 * utilization * (0.9 + 0.2 * share(noise, 3)), 1)
        values["dram_activity"] = round(0.8 * bandwidth, 1)
    if board.nvlink:
        traffic = MIB_S_NVLINK * 0.3 * bandwidth * (0.8 + 0.4 * share(noise, 1)) / 100
        values["nvlink_tx"] = values["nvlink_rx"] = round(traffic, 1)
    values["performance_state"] = 0 if awake else 8
    values["clocks_event_reasons"] = _reasons(awake, watts, limits.limit_w, temperature)
    values["pcie_generation"] = board.constant["max_pcie_generation"] if awake else 1
    if board.info.index == ECC_INDEX:
        values["ecc_corrected_aggregate"] = int((timestamp + board.key % ECC_EVERY_S) // ECC_EVERY_S) % 100_000
    return values


def _reasons(awake: bool, watts: float, limit_w: float, temperature: float) -> int:
    """Why the clocks are not at their highest, as the driver's bits."""
    if not awake:
        return REASON_IDLE
    return REASON_POWER_CAP * (watts > 0.97 * limit_w) | REASON_THERMAL * (temperature > THROTTLE_C)


def _percent(level: float, wobble: float) -> float:
    """A share as whole percent; what does nothing does not wobble."""
    if level <= STILL:
        return 0.0
    return float(min(100, max(0, round(100 * level * (1 + wobble)))))


def _fan(card: Card, temperature: float) -> float | None:
    """Percent of a fan's full speed; it follows the heat sink. Gaming cards stop theirs when cool."""
    if card.fan_min is None:
        return None
    if card.fan_min == 0 and temperature < 43:
        return 0.0
    wanted = 30 + 70 * (temperature - 42) / (card.board.load_c + 6 - 42)
    return float(round(min(100.0, max(30.0, wanted))))


def _sm_clock(card: Card, watts: float, temperature: float, wobble: float) -> int:
    """MHz: it falls as power nears the limit, and further when the board is too hot."""
    low, high = card.sm_mhz
    strain = max(0.0, watts / card.board.limit_w - 0.5)
    mhz = high * (1 - 0.22 * strain - 0.02 * max(0, temperature - THROTTLE_C) + 0.015 * strain * wobble)
    return max(low, min(high, round(mhz / CLOCK_STEP_MHZ) * CLOCK_STEP_MHZ))


def _weather(seed: int, timestamp: float) -> float:
    """How much warmer than usual the air is, in °C: the time of day, and from one day to the next."""
    day, second = divmod(timestamp, DAY)
    today, tomorrow = (6 * share(mix(seed, int(day) + n, 3), 0) - 3 for n in (0, 1))
    return today + (tomorrow - today) * second / DAY + 2.5 * sin(2 * pi * (second / HOUR - 9) / 24)


def _board(index: int, seed: int, mig: bool) -> _Board:
    card, role, hotter_c = cast.LINE_UP[index % len(cast.LINE_UP)]
    info = GpuInfo(
        index=index,
        uuid=_uuid("GPU", seed, index),
        name=card.name,
        memory_total_mib=card.memory_mib,
        power_limit_w=float(card.board.limit_w),
        pci_bus_id=f"{index // len(cast.BUSES):08X}:{cast.BUSES[index % len(cast.BUSES)]}:00.0",
        architecture=card.architecture,
        compute_capability=card.compute_capability,
        memory_from="device",
    )
    if mig and index == cast.MIG_INDEX:
        units = tuple(_instance(info, seed, number) for number in range(len(cast.MIG_INSTANCES)))
    else:
        units = (_Unit(info, card.memory_mib, card.driver_mib, 1.0, role),)
    return _Board(card, info, mix(seed, index, 5), hotter_c, units, _constant(card), role == "pair")


def _constant(card: Card) -> dict[str, float | None]:
    """What a board says the same of at any time."""
    values: dict[str, float | None] = {
        "pcie_width": 16,
        "max_pcie_width": 16,
        "max_pcie_generation": 5 if card.architecture == "Hopper" else 4,
        "pcie_replays": 0,
        "power_limit": card.board.limit_w,
        "bar1_used": 5 if card.fan_min is not None else 131_072 if card.architecture == "Hopper" else 1,
        "max_sm_clock": card.sm_mhz[1],
        "max_graphics_clock": card.sm_mhz[1],
        "max_memory_clock": card.memory_mhz[1],
        "max_video_clock": round(0.9 * card.sm_mhz[1] / CLOCK_STEP_MHZ) * CLOCK_STEP_MHZ,
        "memory_reserved": round(card.memory_mib / 140),
        "jpeg_utilization": 0.0,
        "ofa_utilization": 0.0,
    }
    if "GeForce" not in card.name:
        values |= {f"ecc_{kind}_{life}": 0 for kind in KINDS for life in ("volatile", "aggregate")}
        values |= {f"remapped_rows_{name}": 0 for name in (*KINDS, "pending", "failure")}
    return values


def _instance(parent: GpuInfo, seed: int, number: int) -> _Unit:
    profile, memory_mib, weight, role = cast.MIG_INSTANCES[number]
    info = GpuInfo(
        index=parent.index,
        uuid=_uuid("MIG", seed, parent.index, number),
        name=f"{parent.name} MIG {profile}",
        memory_total_mib=memory_mib,
        pci_bus_id=parent.pci_bus_id,
        architecture=parent.architecture,
        compute_capability=parent.compute_capability,
        parent_uuid=parent.uuid,
        mig_index=number,
        # As the driver numbers them, from behind the numbers of larger instances.
        gpu_instance=7 + number,
        memory_from="device",
    )
    return _Unit(info, memory_mib, cast.MIG_DRIVER_MIB, weight, role)


def _uuid(prefix: str, *parts: int) -> str:
    return f"{prefix}-{uuid.UUID(int=mix(*parts, 1) << 64 | mix(*parts, 2))}"


def _infos(board: _Board) -> Iterator[GpuInfo]:
    yield board.info
    if board.divided:
        yield from (unit.info for unit in board.units)


@dataclass(frozen=True, slots=True)
class _Place:
    """A lane, the units it runs on, and its rank among what they do: 0 is the chief thing."""

    rank: int
    lane: Lane
    units: list[_Unit]


def _populate(units: list[_Unit], seed: int, processes: int | None) -> list[Lane]:
    """Give every unit its lanes; all of them, each knowing its number."""
    places: list[_Place] = []
    shared: dict[int, tuple[Lane, int]] = {}
    for number, unit in enumerate(units):
        neighbours = units[number : number + 2]
        if number not in shared and [neighbour.role for neighbour in neighbours] == ["pair", "pair"]:
            phase = mix(seed, number, 6)
            pair = Lane(cast.PAIR, mix(seed, number, 7), phase)
            shared[number] = shared[number + 1] = (pair, phase)
            places.append(_Place(0, pair, neighbours))
        for rank, habit in enumerate(cast.ROLES[unit.role]):
            key = mix(seed, number, rank, 8)
            # The chief runs of a pair keep the periods of the shared one, which they give way to.
            instead, phase = shared[number] if number in shared and rank == 0 else (None, key)
            places.append(_Place(rank, Lane(habit, key, phase, instead), [unit]))
    if processes is not None:
        places = _fit(places, units, seed, processes)
    for number, place in enumerate(places):
        place.lane.enrol(number, len(places))
        for unit in place.units:
            unit.lanes.append(place.lane)
    return [place.lane for place in places]


def _fit(places: list[_Place], units: list[_Unit], seed: int, processes: int) -> list[_Place]:
    """As many lanes as make about so many processes: the chief ones first, workers in the end."""
    chosen: list[_Place] = []
    count = 0.0
    for place in sorted(places, key=lambda place: place.rank):
        count += place.lane.expected()
        if count > processes:
            return chosen
        chosen.append(place)
    for number in range(round((processes - count) / cast.WORKERS_PRESENT)):
        unit = units[number % len(units)]
        key = mix(seed, number, 9)
        unit.workers += 1
        chosen.append(_Place(9, Lane(cast.WORKERS, key, key), [unit]))
    return chosen
