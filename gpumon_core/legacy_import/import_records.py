"""What an import works with: GPUs and files, the processes that it places, and the rows of one transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import sqlalchemy as sa

from gpumon_core.store.accounting import HOUR_S, Ledger, Use
from gpumon_core.store.bulk import Row
from gpumon_core.store.schema import TIERS, gpu_metrics

MINUTE_S = 60
# What another program's tick tells, in this order.
READINGS = ("temperature", "utilization", "memory", "power")
UTILIZATION, MEMORY, POWER = (READINGS.index(name) for name in ("utilization", "memory", "power"))
Reading = tuple[float | None, ...]
# GPU's id, PID, name, MiB
Seen = tuple[int, int, str, int | None]

Level = Literal["raw", "minute", "hour"]
# Where ticks of a time go, finest first, and the seconds of a row.
SOURCES: dict[Level, tuple[sa.Table, int]] = {
    "raw": (gpu_metrics, 1),
    "minute": (TIERS[1].table, MINUTE_S),
    "hour": (TIERS[4].table, HOUR_S),
}


@dataclass(frozen=True, slots=True)
class Host:
    """The machine whose history it is; `id` is None where the database does not know it yet."""

    id: int | None
    interval_s: float


@dataclass(frozen=True, slots=True)
class Place:
    """A GPU as the database has it. gpumon itself recorded it from `first_seen` to `last_seen` (UTC seconds)."""

    id: int
    index: int
    uuid: str
    name: str | None
    memory_total_mib: int | None
    first_seen: int
    last_seen: int
    counts_energy: bool = False

    def has_energy_of(self, at: int) -> bool:
        """Whether the energy of that time is missing: what a driver counted while nobody looked is not."""
        return not self.counts_energy or at < self.first_seen


@dataclass(frozen=True, slots=True)
class Source:
    """The file that the ticks are from, and which index each of its GPUs has in it, by the GPU's id."""

    name: str
    path: str
    indices: Mapping[int, int]


@dataclass(slots=True, eq=False)
class Process:
    """A row of the ledger. `uses` are its GPUs, by their ids; with a single one the ledger is that one's."""

    pid: int
    name: str
    first_seen: int
    key: str
    ledger: Ledger
    id: int | None = None
    uses: dict[int, PlacedUse] = field(default_factory=dict)

    @property
    def whole(self) -> Ledger:
        """Its ledger over all of its GPUs."""
        return next(iter(self.uses.values())).ledger if len(self.uses) == 1 else self.ledger


@dataclass(slots=True, eq=False)
class PlacedUse(Use):
    """One process on one GPU."""

    process: Process = field(kw_only=True)


@dataclass(slots=True)
class Stretch:
    """A row of imports."""

    first: int
    last: int
    ticks: int


class Batch:
    """The rows of one transaction."""

    def __init__(self) -> None:
        self.first = self.last = 0
        self.ticks = 0
        self.metrics: list[Row] = []
        self.buckets: list[Row] = []
        # The time, who, how much memory, and whether it is there.
        self.snapshots: list[tuple[int, PlacedUse, int | None, int]] = []
        self.usage: list[Row] = []
        self.new: list[Process] = []
        self.uses: set[PlacedUse] = set()
        self.stretches: dict[tuple[int, int], Stretch] = {}

    @property
    def rows(self) -> int:
        """About how much work it is."""
        return len(self.metrics) + len(self.buckets) + len(self.snapshots)
