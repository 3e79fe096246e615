"""The simulated GPUs: what never changes about them, and the units on which processes run."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from gpumon_core.simulation import people
from gpumon_core.simulation.load import ProgramRun, Schedule, fraction, hash64
from gpumon_core.simulation.people import GpuModel
from gpumon_core.telemetry.records import GpuInfo

# Drivers change clocks in steps of this size.
CLOCK_STEP_MHZ = 15
KINDS = ("corrected", "uncorrected")


class Unit:
    """A GPU without MIG instances, or one MIG instance. `weight` is its share of the SMs of its GPU."""

    def __init__(self, info: GpuInfo, memory_mib: int, driver_mib: int, weight: float, role: str) -> None:
        self.info = info
        self.driver_mib = driver_mib
        self.weight = weight
        self.role = role
        self.schedules: list[Schedule] = []
        self.workers = 0
        self._free_mib = memory_mib - driver_mib

    def full_mib(self, schedule: Schedule, run: ProgramRun) -> int:
        """The memory that a run holds here once it has ramped up, in MiB."""
        for_workers = people.WORKERS_SHARE if self.workers else 0.0
        if schedule.habit is people.WORKERS:
            allowed = min(people.WORKER_MIB, for_workers * self._free_mib / self.workers)
        else:
            allowed = (1 - for_workers) * self._free_mib
        # The GPUs of one run hold slightly different amounts.
        uneven = 1 - 0.004 * fraction(hash64(run.key, self.info.index), 0)
        return max(1, int(allowed * run.share * uneven) & ~1)


@dataclass(frozen=True, slots=True)
class SimulatedGpu:
    """A physical GPU. Its units are its MIG instances, or the GPU itself."""

    model: GpuModel
    info: GpuInfo
    key: int
    hotter_c: float
    units: tuple[Unit, ...]
    # Values of readings that never change.
    constant: dict[str, float | None]
    has_nvlink: bool

    @property
    def is_divided(self) -> bool:
        """Whether it has MIG instances."""
        return self.units[0].info is not self.info


def create_gpu(index: int, seed: int, mig: bool) -> SimulatedGpu:
    """The GPU of an index; one of them has MIG instances, with `mig`."""
    model, role, hotter_c = people.GPUS[index % len(people.GPUS)]
    info = GpuInfo(
        index=index,
        uuid=_uuid("GPU", seed, index),
        name=model.name,
        memory_total_mib=model.memory_mib,
        power_limit_w=float(model.power.limit_w),
        pci_bus_id=f"{index // len(people.BUSES):08X}:{people.BUSES[index % len(people.BUSES)]}:00.0",
        architecture=model.architecture,
        compute_capability=model.compute_capability,
        memory_from="device",
    )
    if mig and index == people.MIG_INDEX:
        units = tuple(_instance(info, seed, number) for number in range(len(people.MIG_INSTANCES)))
    else:
        units = (Unit(info, model.memory_mib, model.driver_mib, 1.0, role),)
    return SimulatedGpu(model, info, hash64(seed, index, 5), hotter_c, units, _constant(model), role == "pair")


def _constant(model: GpuModel) -> dict[str, float | None]:
    """The values of a model's readings that never change."""
    values: dict[str, float | None] = {
        "pcie_width": 16,
        "max_pcie_width": 16,
        "max_pcie_generation": 5 if model.architecture == "Hopper" else 4,
        "pcie_replays": 0,
        "power_limit": model.power.limit_w,
        "bar1_used": 5 if model.fan_min is not None else 131_072 if model.architecture == "Hopper" else 1,
        "max_sm_clock": model.sm_mhz[1],
        "max_graphics_clock": model.sm_mhz[1],
        "max_memory_clock": model.memory_mhz[1],
        "max_video_clock": round(0.9 * model.sm_mhz[1] / CLOCK_STEP_MHZ) * CLOCK_STEP_MHZ,
        "memory_reserved": round(model.memory_mib / 140),
        "jpeg_utilization": 0.0,
        "ofa_utilization": 0.0,
    }
    if "GeForce" not in model.name:
        values |= {f"ecc_{kind}_{life}": 0 for kind in KINDS for life in ("volatile", "aggregate")}
        values |= {f"remapped_rows_{name}": 0 for name in (*KINDS, "pending", "failure")}
    return values


def _instance(parent: GpuInfo, seed: int, number: int) -> Unit:
    profile, memory_mib, weight, role = people.MIG_INSTANCES[number]
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
        # The driver numbers small instances after the larger ones.
        gpu_instance=7 + number,
        memory_from="device",
    )
    return Unit(info, memory_mib, people.MIG_DRIVER_MIB, weight, role)


def _uuid(prefix: str, *parts: int) -> str:
    return f"{prefix}-{uuid.UUID(int=hash64(*parts, 1) << 64 | hash64(*parts, 2))}"


def infos_of(gpu: SimulatedGpu) -> Iterator[GpuInfo]:
    """A GPU and its MIG instances."""
    yield gpu.info
    if gpu.is_divided:
        yield from (unit.info for unit in gpu.units)
