"""What a GPU says at one moment: plain records, the same for real and simulated hardware.

A value that the hardware does not offer is None, never 0 and never a sentinel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

# What a GPU reports, by catalogue key.
GpuValues = Mapping[str, float | None]
# Before the index of a GPU that cannot say which it is: replaces its UUID.
NAMELESS = "unidentified-"


@dataclass(frozen=True, slots=True)
class HostInfo:
    """The machine and its driver stack, as text ("580.159", "13.0", "13.580.159")."""

    name: str
    driver_version: str | None = None
    cuda_version: str | None = None
    nvml_version: str | None = None


@dataclass(frozen=True, slots=True)
class GpuInfo:
    """What rarely changes while a GPU is up; the source asks for it once a minute.

    A MIG instance is a GPU of its own: it has its parent's index, a `mig_index` below it,
    and `parent_uuid`; `gpu_instance` is the number under which its parent knows the GPU instance. `memory_from`
    is "unified" for a GPU that shares the machine's memory, "device" for one with memory of its own.
    """

    index: int
    uuid: str
    name: str | None = None
    memory_total_mib: int | None = None
    power_limit_w: float | None = None
    pci_bus_id: str | None = None
    architecture: str | None = None
    compute_capability: str | None = None
    parent_uuid: str | None = None
    mig_index: int | None = None
    gpu_instance: int | None = None
    memory_from: str | None = None


Sampling = Literal["interval", "partial", "point"]


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU at one tick: catalogue key (or `<key>_max`) -> value in the catalogue's unit, or None.

    `sampling` says what utilization is: the mean over the whole time since the tick before
    (interval), over the end of it where the driver had retained no more (partial), or what the driver said at the
    moment of the tick (point). A metric that is asked
    rarely and was not asked for this tick is missing from `values`. `ended` are processes that the driver
    names in its utilization of processes and no longer lists: PID -> percent of the SMs.
    """

    uuid: str
    values: GpuValues
    sampling: Sampling = "point"
    ended: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ProcessReading:
    """One process on one GPU at one tick.

    `kind` is C (compute), G (graphics), M (MPS client) or a sum such as "C+G", as in nvidia-smi.
    Utilization is the percentage of the GPU's SMs, memory controller, encoders and decoders that this
    process used since the tick before.
    """

    gpu_uuid: str
    pid: int
    kind: str
    memory_mib: int | None = None
    sm_utilization: int | None = None
    memory_utilization: int | None = None
    encoder_utilization: int | None = None
    decoder_utilization: int | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One tick of one host. `timestamp` is when it was read, in UTC seconds since the epoch.

    `gpus` lists every GPU known, `lost` the UUIDs of those that no longer answer, `hung` those of them
    in whose driver call a thread still waits, and `readings` the GPUs that did answer. `nameless` are
    the indices of GPUs that were lost before they could say which they are, `asleep` the UUIDs of those that
    are switched off and not asked, so that they stay so, and `quiet` of those that are not asked for a while, so
    that they can switch themselves off. `elapsed` is when it was read by a clock that nobody
    sets (seconds; CLOCK_BOOTTIME, which goes on in suspend); None where only `timestamp` is known.
    """

    timestamp: float
    host: HostInfo
    gpus: tuple[GpuInfo, ...] = ()
    readings: tuple[GpuReading, ...] = ()
    processes: tuple[ProcessReading, ...] = ()
    lost: frozenset[str] = frozenset()
    hung: frozenset[str] = frozenset()
    nameless: frozenset[int] = frozenset()
    asleep: frozenset[str] = frozenset()
    elapsed: float | None = None
    quiet: frozenset[str] = frozenset()

    def state_of(self, uuid: str) -> str:
        """Whether a GPU answers: ok, quiet, asleep, lost, or hung."""
        states = {"hung": self.hung, "lost": self.lost, "asleep": self.asleep, "quiet": self.quiet}
        return next((state for state, uuids in states.items() if uuid in uuids), "ok")

    def with_nameless(self) -> Snapshot:
        """The same, in which those that cannot say which they are count as lost, by their index."""
        if not self.nameless:
            return self
        unknown = tuple(nameless(index) for index in self.nameless)
        gpus = sorted((*self.gpus, *unknown), key=lambda gpu: gpu.index)
        lost = self.lost | {gpu.uuid for gpu in unknown}
        return replace(self, gpus=tuple(gpus), lost=lost, nameless=frozenset())

    def completed_by(self, earlier: Snapshot) -> Snapshot:
        """The same, in which an earlier one fills what is missing: what is asked rarely is asked only once."""
        before = {reading.uuid: reading.values for reading in earlier.readings}
        readings = tuple(
            replace(reading, values=_filled(reading.values, before.get(reading.uuid, {})))
            for reading in self.readings
        )
        return replace(self, readings=readings)


def nameless(index: int) -> GpuInfo:
    """What is known of a GPU that does not say which it is: its index."""
    return GpuInfo(index, f"{NAMELESS}{index}")


def _filled(values: GpuValues, earlier: GpuValues) -> dict[str, float | None]:
    return {**earlier, **{key: value for key, value in values.items() if value is not None or key not in earlier}}


def elapsed() -> float:
    """Seconds by a clock that nobody sets; where the system has one, it goes on while the machine is suspended."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def elapsed_beside(clock: Callable[[], float]) -> float | None:
    """`elapsed`, where `clock` is the wall clock; None where it is another one, as in a simulation of the past."""
    return elapsed() if clock is time.time else None


class SourceUnavailable(Exception):
    """No reading can be had at all. `str()` says why, `remedy` what to do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


class Source(Protocol):
    """Where snapshots come from: NVML or the simulation."""

    name: str

    def read(self) -> Snapshot:
        """Take one snapshot now. Raises SourceUnavailable when the whole source is gone."""
        ...

    @property
    def compares(self) -> bool:
        """Whether some values say what happened between two readings, so that the first lacks them."""
        ...

    def process_name(self, pid: int) -> str | None:
        """The executable's name as the source itself knows it, or None."""
        ...

    def close(self) -> None:
        """Give back what the source holds; closing twice is fine."""
        ...
