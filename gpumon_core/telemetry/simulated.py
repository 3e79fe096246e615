"""Simulated GPUs with believable workloads, for demos, for machines without a driver, and for tests.

A snapshot is a function of the seed and the absolute time alone: nothing is remembered from one to
the next, so a restarted server continues the same story, and any past moment can be asked for.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from gpumon_core.metrics import GPU_METRICS
from gpumon_core.telemetry.records import GpuInfo, GpuReading, HostInfo, ProcessReading, Snapshot
from gpumon_core.telemetry.simulated_cast import BOARDS, ROLES, WORKER, Board, Lane, Pattern, Program

_MASK = (1 << 64) - 1

AMBIENT_C = 29.0
# Memory that the driver itself keeps on a board in use.
OVERHEAD_MIB = 430
# The board that is split into MIG instances, where there are enough boards to spare one.
MIG_GPU = 4
MIG_SLICES = (("3g.40gb", 40192), ("2g.20gb", 19968))
# How a board warms and cools: seconds ago, and the weight of the power drawn then.
THERMAL = ((0, 0.15), (25, 0.3), (75, 0.35), (180, 0.2))
DAY_S = 86400


@dataclass(frozen=True, slots=True)
class Run:
    """A program running on one or two GPUs from `start` to `end` (UTC seconds)."""

    program: Program
    pid: int
    start: float
    end: float
    gpus: tuple[int, ...]
    share: float
    salt: int


class SimulatedSource:
    """So many GPUs, and optionally at least about so many processes on them."""

    name = "demo"

    def __init__(
        self,
        gpus: int = 4,
        seed: int = 7,
        host: str | None = None,
        processes: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._seed = seed
        self._clock = clock
        self._host = HostInfo(host or "demo", "580.95.05", "13.0", "13.580.95.05")
        self._boards = [BOARDS[index % len(BOARDS)] for index in range(gpus)]
        self._infos = [self._info(index) for index in range(gpus)]
        self._mig = self._mig_infos() if gpus > MIG_GPU else ()
        self._lanes = list(self._place_lanes(gpus, processes))
        self._inventory = tuple(self._in_order())
        # A lane's runs are asked for several times in a tick, at the same few slots.
        self._run_in_slot = lru_cache(maxsize=8 * len(self._lanes) + 64)(self._make_run)

    def read(self) -> Snapshot:
        """The state of all GPUs now."""
        return self.snapshot_at(self._clock())

    def snapshot_at(self, timestamp: float) -> Snapshot:
        """The state of all GPUs at any moment."""
        runs = self.runs_at(timestamp)
        # What still warms the boards.
        past = [(weight, timestamp - ago, self.runs_at(timestamp - ago)) for ago, weight in THERMAL]
        readings: list[GpuReading] = []
        processes: list[ProcessReading] = []
        for index, board in enumerate(self._boards):
            mine = [run for run in runs if index in run.gpus]
            places: list[tuple[GpuInfo, list[Run]]] = [(self._infos[index], mine)]
            if self._mig and index == MIG_GPU:
                # Programs take turns on the instances; the parent has none of its own.
                count = len(self._mig)
                places = [(info, mine[position::count]) for position, info in enumerate(self._mig)]
            total = 0
            for info, here in places:
                held = self._memory(here, info.memory_total_mib or 0, timestamp)
                processes += [
                    ProcessReading(info.uuid, run.pid, run.program.kind, mib)
                    for run, mib in zip(here, held, strict=True)
                ]
                if info.parent_uuid is not None:
                    readings.append(self._instance_reading(info, sum(held)))
                total += sum(held)
            readings.append(self._reading(index, board, mine, total, past, timestamp))
        return Snapshot(timestamp, self._host, self._inventory, tuple(readings), tuple(processes))

    def runs_at(self, timestamp: float) -> list[Run]:
        """Every program that runs at a moment."""
        found = []
        for number, (_, lane) in enumerate(self._lanes):
            # Slots of different lanes begin at different times of day.
            shifted = timestamp - (number * 7919) % lane.slot_s
            run = self._run_in_slot(number, int(shifted // lane.slot_s))
            if run is not None and run.start <= timestamp < run.end:
                found.append(run)
        return found

    def process_name(self, pid: int) -> str | None:
        """The name of a program that runs now."""
        return next((run.program.name for run in self.runs_at(self._clock()) if run.pid == pid), None)

    def close(self) -> None:
        """There is nothing to give back."""

    def _chance(self, *keys: int) -> float:
        """A number from 0 to 1 that depends on the seed and the keys alone."""
        mixed = self._seed * 0x9E3779B97F4A7C15
        for key in keys:
            mixed = ((mixed ^ key) * 0xBF58476D1CE4E5B9) & _MASK
            mixed ^= mixed >> 31
        return ((mixed * 0x94D049BB133111EB & _MASK) >> 11) / (1 << 53)

    def _drift(self, timestamp: float, period_s: float, salt: int) -> float:
        """A smooth wandering between 0 and 1, with a new direction every `period_s` seconds."""
        whole, part = divmod(timestamp / period_s, 1.0)
        weight = part * part * (3 - 2 * part)
        return self._chance(int(whole), salt) * (1 - weight) + self._chance(int(whole) + 1, salt) * weight

    def _info(self, index: int) -> GpuInfo:
        board = self._boards[index]
        return GpuInfo(
            index=index,
            uuid="GPU-" + self._uuid(index),
            name=board.name,
            memory_total_mib=board.memory_mib,
            power_limit_w=float(board.limit_w),
            pci_bus_id=f"00000000:{0x17 + index:02X}:00.0",
            architecture=board.architecture,
            compute_capability=board.capability,
        )

    def _mig_infos(self) -> tuple[GpuInfo, ...]:
        parent = self._infos[MIG_GPU]
        return tuple(
            GpuInfo(
                index=MIG_GPU,
                uuid="MIG-" + self._uuid(1000 + position),
                name=f"{parent.name} MIG {profile}",
                memory_total_mib=memory_mib,
                pci_bus_id=parent.pci_bus_id,
                architecture=parent.architecture,
                compute_capability=parent.compute_capability,
                parent_uuid=parent.uuid,
                mig_index=position,
            )
            for position, (profile, memory_mib) in enumerate(MIG_SLICES)
        )

    def _uuid(self, number: int) -> str:
        text = hashlib.sha256(f"{self._seed}/{self._host.name}/{number}".encode()).hexdigest()
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:32]}"

    def _in_order(self) -> Iterator[GpuInfo]:
        for info in self._infos:
            yield info
            if self._mig and info.index == MIG_GPU:
                yield from self._mig

    def _place_lanes(self, gpus: int, processes: int | None) -> Iterator[tuple[int, Lane]]:
        natural = 0
        for index in range(gpus):
            for lane in ROLES[index % len(ROLES)]:
                yield index, lane
                natural += lane.chance >= 0.8
        for extra in range(max(0, (processes or 0) - natural)):
            yield extra % gpus, WORKER

    def _make_run(self, number: int, slot: int) -> Run | None:
        gpu, lane = self._lanes[number]
        if self._chance(number, slot, 1) >= lane.chance:
            return None
        length = (lane.shortest + (lane.longest - lane.shortest) * self._chance(number, slot, 2)) * lane.slot_s
        start = (number * 7919) % lane.slot_s + slot * lane.slot_s
        start += int((lane.slot_s - length) * self._chance(number, slot, 3))
        program = lane.programs[int(self._chance(number, slot, 4) * len(lane.programs))]
        spans = lane.spans and gpu + 1 < len(self._boards) and gpu + 1 != MIG_GPU
        both = spans and self._chance(number, slot, 5) < 0.5
        # A lane's number in the PID keeps programs that run together apart.
        pid = 2000 + number + len(self._lanes) * int(self._chance(number, slot, 6) * (60000 // len(self._lanes)))
        share = program.least + (program.most - program.least) * self._chance(number, slot, 7)
        salt = int(self._chance(number, slot, 8) * 1e9)
        return Run(program, pid, start, start + length, (gpu, gpu + 1) if both else (gpu,), share, salt)

    def _memory(self, runs: list[Run], total_mib: int, timestamp: float) -> list[int]:
        """MiB that each program holds: it fills up at first, then stays. Together they fit."""
        wanted = []
        for run in runs:
            share = run.share * min(1.0, 0.15 + (timestamp - run.start) / 45)
            if run.program.pattern is Pattern.JOB:
                share *= 0.75 + 0.25 * self._drift(timestamp, 40, run.salt)
            wanted.append(share)
        room = (total_mib - OVERHEAD_MIB) * min(1.0, 0.97 / max(sum(wanted), 0.01))
        return [max(2, int(share * room)) for share in wanted]

    def _load(self, run: Run, timestamp: float) -> float:
        """The share of the GPU's time that a program keeps it busy, 0 to 1."""
        match run.program.pattern:
            case Pattern.TRAINING:
                return self._training(run, timestamp)
            case Pattern.SERVING:
                hour = 0.5 - 0.5 * math.cos(2 * math.pi * (timestamp % DAY_S) / DAY_S - 0.6)
                asked = self._drift(timestamp, 45, run.salt) * (0.25 + 0.75 * hour)
                return 0.0 if asked < 0.22 else min(0.98, 0.15 + 1.1 * asked)
            case Pattern.JOB:
                return 0.3 + 0.6 * self._drift(timestamp, 25, run.salt)
            case Pattern.DESKTOP:
                return 0.06 * self._drift(timestamp, 15, run.salt)
            case _:
                return 0.0

    def _training(self, run: Run, timestamp: float) -> float:
        since = timestamp - run.start
        if since < 40:
            return 0.05
        # A checkpoint every 20 minutes, and a data loader that stalls now and then.
        if since % 1200 > 1200 - 25:
            return 0.08
        stalled = self._chance(int(timestamp // 8), run.salt) < 0.02
        return 0.55 if stalled else 0.95 + 0.05 * self._drift(timestamp, 6, run.salt)

    def _busy(self, index: int, runs: list[Run], timestamp: float) -> float:
        return min(1.0, sum(self._load(run, timestamp) for run in runs if index in run.gpus))

    def _power_share(self, busy: float, runs: list[Run]) -> float:
        """Of the way from idle to the limit; a context that holds memory keeps the clocks up a little."""
        return 0.06 * bool(runs) + 0.9 * math.pow(busy, 0.8)

    def _reading(
        self,
        index: int,
        board: Board,
        runs: list[Run],
        held_mib: int,
        past: list[tuple[float, float, list[Run]]],
        timestamp: float,
    ) -> GpuReading:
        busy = self._busy(index, runs, timestamp)
        jitter = self._drift(timestamp, 4, index) - 0.5
        heat = 0.0
        for weight, then, everybody in past:
            mine = [run for run in everybody if index in run.gpus]
            heat += weight * self._power_share(self._busy(index, mine, then), mine)
        share = self._power_share(busy, runs)
        power = board.idle_w + (board.limit_w - board.idle_w) * share + jitter * 0.02 * board.limit_w
        temperature = round(
            AMBIENT_C + 4 + (board.hot - AMBIENT_C) * heat + 2 * self._drift(timestamp, 300, index)
        )
        values: dict[str, float | None] = dict.fromkeys((metric.key for metric in GPU_METRICS), None)
        values |= {
            "temperature": float(temperature),
            "memory": min(board.memory_mib, held_mib + (OVERHEAD_MIB if runs else 1)),
            "power": round(max(board.idle_w * 0.9, power), 3),
            "fan_speed": float(30 if temperature < 50 else min(100, 30 + 2 * (temperature - 50)))
            if board.cooled
            else None,
            "sm_clock": 15
            * round((board.sm_clock * (0.9 + 0.1 * (1 - busy) + 0.01 * jitter) if runs else 210) / 15),
            "memory_clock": board.memory_clock if runs else 405,
        }
        if not (self._mig and index == MIG_GPU):
            values["utilization"] = float(round(100 * busy))
            values["memory_utilization"] = float(round(55 * busy * (0.8 + 0.4 * jitter)))
        return GpuReading(self._infos[index].uuid, values)

    def _instance_reading(self, info: GpuInfo, held_mib: int) -> GpuReading:
        """A MIG instance reports its memory and nothing else."""
        values: dict[str, float | None] = dict.fromkeys((metric.key for metric in GPU_METRICS), None)
        values["memory"] = held_mib + 38
        return GpuReading(info.uuid, values)
