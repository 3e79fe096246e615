"""The records of an import: GPUs and files, the processes that it merges, and the rows of one transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import sqlalchemy as sa

from gpumon_core.store.accounting import HOUR_S, Ledger, Use
from gpumon_core.store.bulk import Row
from gpumon_core.store.schema import TIERS, RetentionLevel, gpu_metrics

MINUTE_S = 60
# The values of one of the original's readings, in this order: °C, %, MiB, W.
READINGS = ("temperature", "utilization", "memory", "power")
UTILIZATION, MEMORY, POWER = (READINGS.index(name) for name in ("utilization", "memory", "power"))
OriginalReading = tuple[float | None, ...]
# A process on a GPU at a tick: the GPU's id in the database, PID, name, MiB.
SeenProcess = tuple[int, int, str, int | None]

# The table for ticks of each level, finest first, and the seconds of one of its rows.
LEVELS: dict[RetentionLevel, tuple[sa.Table, int]] = {
    "raw": (gpu_metrics, 1),
    "minute": (TIERS[1].table, MINUTE_S),
    "hour": (TIERS[4].table, HOUR_S),
}
# What becomes of a tick: it is taken, or it was imported before, or gpumon itself recorded that time, or it is
# older than everything that gpumon stores.
TickOutcome = Literal["taken", "imported", "recorded", "old"]


class ImportRefused(Exception):
    """Nothing was imported. `str()` says why and what to do, without a full stop; `status` is the exit status."""

    def __init__(self, sentence: str, status: int = 1) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True, slots=True)
class TargetHost:
    """The machine that gets the history; `id` is None where the database does not know it yet."""

    id: int | None
    interval_s: float


@dataclass(frozen=True, slots=True)
class TargetGpu:
    """A GPU in the database that gets the history. gpumon itself recorded it from `first_seen` to `last_seen` (UTC
    seconds)."""

    id: int
    index: int
    uuid: str
    name: str | None
    memory_total_mib: int | None
    first_seen: int
    last_seen: int
    has_energy_counter: bool = False

    def lacks_energy_at(self, at: int) -> bool:
        """Whether the history has no energy for that time. An energy counter also covers pauses of gpumon."""
        return not self.has_energy_counter or at < self.first_seen


@dataclass(frozen=True, slots=True)
class ImportSource:
    """The file that the ticks come from, and the index that it gives each GPU, by the GPU's id."""

    name: str
    path: str
    indices: Mapping[int, int]


@dataclass(slots=True, eq=False)
class ImportedProcess:
    """A row of gpu_processes. `uses` holds one ImportedUse a GPU, by the GPU's id. While there is one GPU, the
    process has the same ledger as its use of it."""

    pid: int
    name: str
    first_seen: int
    key: str
    ledger: Ledger
    id: int | None = None
    uses: dict[int, ImportedUse] = field(default_factory=dict)

    @property
    def total(self) -> Ledger:
        """Its ledger over all of its GPUs."""
        return next(iter(self.uses.values())).ledger if len(self.uses) == 1 else self.ledger


@dataclass(slots=True, eq=False)
class ImportedUse(Use):
    """One process on one GPU."""

    process: ImportedProcess = field(kw_only=True)


@dataclass(slots=True)
class ImportedRange:
    """A row of imports: the ticks from `first` to `last` (UTC seconds) of a GPU were imported."""

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
        # The time, the process, its MiB, and 1 where it is present, 0 where it has ended.
        self.snapshots: list[tuple[int, ImportedUse, int | None, int]] = []
        self.usage: list[Row] = []
        self.new: list[ImportedProcess] = []
        self.uses: set[ImportedUse] = set()
        # By the GPU's id and the first second.
        self.ranges: dict[tuple[int, int], ImportedRange] = {}

    @property
    def rows(self) -> int:
        """About how many rows a transaction with it writes."""
        return len(self.metrics) + len(self.buckets) + len(self.snapshots)
