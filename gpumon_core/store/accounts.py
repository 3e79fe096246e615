"""The arithmetic of the ledger: what a process has had of a GPU, tick after tick.

A GPU's busy time in a tick is its utilization times the tick's length. It is split among its processes by
their SM utilization, so that the parts add up to the whole; where the driver does not tell processes
apart, by the memory that they hold, which is an estimate and marked as one. Energy follows the same
shares, and what is left over is the GPU's own: idle (nothing ran) or unattributed (something ran that is no
known process's). What the server of NVIDIA's Multi-Process Service (MPS) did is its clients' work.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.metrics import PROCESS_METRICS
from gpumon_core.telemetry.records import GpuInfo, ProcessReading

HOUR_S = 3600
PROCESS_KEYS = tuple(metric.key for metric in PROCESS_METRICS)
MEMORY, SM = PROCESS_KEYS.index("memory"), PROCESS_KEYS.index("sm_utilization")
GONE: tuple[None, ...] = (None,) * len(PROCESS_KEYS)
UNKNOWN_PROGRAM = 0
# NVML counts the work of MPS clients as that of nvidia-cuda-mps-server, and tells of no client that it did
# anything. Where its arguments are not kept, the kernel's name for it ends here.
MPS_SERVER = "nvidia-cuda-mps"
# A pause longer than this many intervals is a gap: nothing is known of it.
GAP_INTERVALS = 3
# A process that does nothing new gets a row in process_snapshots this often all the same, so that a
# reader need not look back further, and retention may forget what is older.
HEARTBEAT_S = 600


def longest_step(interval_s: float) -> float:
    """The longest time between two ticks that is not a gap, in seconds."""
    return max(GAP_INTERVALS * interval_s, interval_s + 2)


@dataclass(slots=True)
class GpuHour:
    """A row of gpu_usage: what a GPU did within an hour."""

    seconds: float = 0.0
    busy_s: float = 0.0
    held_s: float = 0.0
    unattributed_s: float = 0.0
    energy_j: float = 0.0
    idle_j: float = 0.0
    unattributed_j: float = 0.0
    unrecorded_j: float = 0.0


@dataclass(slots=True)
class Gpu:
    """A GPU as the database has it."""

    id: int
    state: str
    info: GpuInfo | None = None
    sampling: str | None = None
    energy_j: float = 0.0
    counter_j: float | None = None
    energy_from: str | None = None
    changes: dict[str, float | None] = field(default_factory=dict)
    # This tick's energy, what was taken while nobody looked, and its utilization, to be shared out.
    tick_j: float = 0.0
    unrecorded_j: float = 0.0
    # What was shared out before the counter told of it.
    ahead_j: float = 0.0
    utilization: float | None = None
    # The hour it is in, and what it did of it.
    hour: int = -1
    used: GpuHour = field(default_factory=GpuHour)
    # The same as far as it is in the database, in the order of its fields.
    stored: tuple[float, ...] = ()


@dataclass(slots=True)
class Ledger:
    """A row of the ledger while its process runs: see gpu_processes, process_gpus and model_sessions."""

    last_seen: int
    max_memory: int | None = None
    avg_memory: float | None = None
    sample_count: int = 0
    seconds: float = 0.0

    def add(self, now: int, dt: float, memory: int | None) -> None:
        """One more sample, which stands for `dt` seconds."""
        # The clock may have been set back: a lifetime is never negative.
        self.last_seen = now if now > self.last_seen else self.last_seen
        self.sample_count += 1
        self.seconds += dt
        if memory is None:
            return
        if self.max_memory is None or memory > self.max_memory:
            self.max_memory = memory
        mean = self.avg_memory
        if mean != memory:
            self.avg_memory = memory if mean is None else mean + (memory - mean) * dt / self.seconds


@dataclass(slots=True)
class Work:
    """What a process has done on a GPU in its whole life: see process_gpus."""

    busy_s: float = 0.0
    energy_j: float = 0.0
    sm_percent_s: float = 0.0
    sm_told_s: float = 0.0
    max_sm: int | None = None
    estimated: int = 0
    # When it last did something, or when it came.
    last_busy: int = 0


# The columns that a ledger and work have in the database, in the order in which they are written.
LEDGER = ("last_seen", "max_memory", "avg_memory", "sample_count", "seconds")
WORK = ("busy_s", "energy_j", "sm_percent_s", "sm_told_s", "max_sm", "estimated", "last_busy")


@dataclass(slots=True)
class ProcessHour:
    """A row of process_hours: what a process used within an hour."""

    seconds: float = 0.0
    busy_s: float = 0.0
    idle_s: float = 0.0
    memory_mib_s: float = 0.0
    energy_j: float = 0.0
    max_memory: int | None = None
    estimated: int = 0


@dataclass(slots=True)
class Session:
    """A model on a GPU while it is loaded: a row of model_sessions."""

    id: int
    model: str
    ledger: Ledger


@dataclass(slots=True, eq=False)
class Use:
    """One process on one GPU while it is there."""

    process_id: int
    gpu: Gpu
    kind: str
    ledger: Ledger
    work: Work
    first_seen: int = 0
    # What it runs: the row of `programs`, the model that it serves, and whether it ever served one.
    program_id: int = UNKNOWN_PROGRAM
    session: Session | None = None
    has_served: bool = False
    # Whether it is a server of MPS, which works for its clients.
    serves_mps: bool = False
    # Who it is in this run of the program, and its row of the ledger.
    identity: ProcessIdentity | None = None
    key: tuple[int, str | None] = (0, None)
    known: tuple[int, Ledger] = field(init=False)
    pair: tuple[int, int] = field(init=False)
    # Its newest record and values, and those that are stored.
    reading: ProcessReading | None = None
    current: tuple[int | None, ...] = GONE
    now: tuple[int | None, ...] = GONE
    stored_at: int | None = None
    # What it has used, by the hour and what it ran, as far as that is not stored yet.
    hours: dict[tuple[int, int], ProcessHour] = field(default_factory=dict)
    # Parts of a joule that wait to be whole.
    rest_j: float = 0.0

    def __post_init__(self) -> None:
        self.known = (self.process_id, self.ledger)
        self.pair = (self.process_id, self.gpu.id)

    def in_hour(self, hour: int) -> ProcessHour:
        """What it has used of an hour, to be added to."""
        used = self.hours.get((hour, self.program_id))
        if used is None:
            used = self.hours[hour, self.program_id] = ProcessHour(energy_j=self.rest_j)
            self.rest_j = 0.0
        return used


def plus(total: int | None, more: int | None) -> int | None:
    """A sum of what is known; None while nothing is."""
    return total if more is None else (total or 0) + more


def shares(gpu: Gpu, uses: list[Use]) -> tuple[list[float], Collection[int]]:
    """Of a tick, the part in which each process kept the GPU busy, and the places of those whose part is an
    estimate."""
    told = [use.now[SM] for use in uses]
    whole = sum(share or 0 for share in told)
    if whole:
        busy = min(1.0, whole / 100) if gpu.utilization is None else gpu.utilization / 100
        parts = [busy * (share or 0) / whole for share in told]
        return parts, _hand_on(parts, uses)
    if not gpu.utilization or None not in told:
        return [0.0] * len(uses), ()
    # The driver does not tell these processes apart: by the memory that they hold, or evenly.
    split = _split(gpu.utilization / 100, [use for use, share in zip(uses, told, strict=True) if share is None])
    parts = [0.0 if share is not None else next(split) for share in told]
    _hand_on(parts, uses)
    return parts, range(len(uses))


def _split(part: float, among: list[Use]) -> Iterator[float]:
    """A part for each process, by the memory that it holds, or evenly where nobody's is known."""
    held = [float(use.now[MEMORY] or 0) for use in among]
    if not any(held):
        held = [1.0] * len(among)
    whole = sum(held)
    return (part * memory / whole for memory in held)


def _hand_on(parts: list[float], uses: list[Use]) -> Collection[int]:
    """Give what MPS servers did to the MPS clients, by memory; the places of those whose part is a guess now."""
    servers = [place for place, use in enumerate(uses) if use.serves_mps and parts[place]]
    if not servers:
        return ()
    clients = [place for place, use in enumerate(uses) if "M" in use.kind and not use.serves_mps]
    if not clients:
        return ()
    done = sum(parts[place] for place in servers)
    for place in servers:
        parts[place] = 0.0
    for place, part in zip(clients, _split(done, [uses[place] for place in clients]), strict=True):
        parts[place] += part
    # Of one server, a single client is nobody's guess.
    return clients if len(clients) > 1 or len(servers) > 1 else ()


def is_mps_server(name: str | None) -> bool:
    """Whether a process of that name works for the clients of MPS."""
    return name is not None and name.startswith(MPS_SERVER)


def share_out(
    gpu: Gpu,
    uses: list[Use],
    now: int,
    dt: float,
    idle_after_s: float,
    gap: bool = False,
    only: Collection[Use] | None = None,
) -> float:
    """Give each process (or `only` some) its part of the GPU's time and energy in the `dt` seconds up to `now`;
    the part of it that went to all of them together, 0 to 1."""
    parts, estimated = shares(gpu, uses)
    hour = now - now % HOUR_S
    for place, (use, part) in enumerate(zip(uses, parts, strict=True)):
        if only is not None and use not in only:
            continue
        memory, sm, *others = use.now
        used, work = use.in_hour(hour), use.work
        used.seconds += dt
        if part:
            joules = part * gpu.tick_j
            used.busy_s += part * dt
            used.energy_j += joules
            work.busy_s += part * dt
            work.energy_j += joules
            if place in estimated:
                used.estimated = work.estimated = 1
        if sm is not None:
            work.sm_told_s += dt
            if sm:
                work.sm_percent_s += sm * dt
            if work.max_sm is None or sm > work.max_sm:
                work.max_sm = sm
        if part or sm or any(others):
            work.last_busy = now
        else:
            _idle(use, used, now, dt, idle_after_s, gap)
        if memory is not None:
            used.memory_mib_s += memory * dt
            if used.max_memory is None or memory > used.max_memory:
                used.max_memory = memory
    return sum(parts)


def _idle(use: Use, used: ProcessHour, now: int, dt: float, idle_after_s: float, gap: bool) -> None:
    """It did nothing in this tick: from `idle_after_s` on that is idleness, from its beginning."""
    length = now - use.work.last_busy
    if length < idle_after_s:
        return
    if gap or length - dt >= idle_after_s:
        used.idle_s += dt
        return
    end = now
    while end > use.work.last_busy:
        hour = (end - 1) - (end - 1) % HOUR_S
        start = max(hour, use.work.last_busy)
        use.in_hour(hour).idle_s += end - start
        end = start


def account(gpu: Gpu, uses: list[Use], part: float, dt: float) -> None:
    """Add a tick to the GPU's own hour; `part` went to its processes."""
    used = gpu.used
    known = gpu.utilization is not None or part > 0
    busy = part if gpu.utilization is None else gpu.utilization / 100
    used.seconds += dt
    used.busy_s += busy * dt
    # Graphics alone hold no GPU: a desktop leaves it to whoever computes.
    if any(use.kind != "G" for use in uses):
        used.held_s += (1 - busy) * dt
    used.energy_j += gpu.tick_j + gpu.unrecorded_j
    used.unrecorded_j += gpu.unrecorded_j
    used.unattributed_s += (busy - part) * dt
    if known:
        used.unattributed_j += (busy - part) * gpu.tick_j
        used.idle_j += (1 - busy) * gpu.tick_j
    else:
        # Whether it did anything cannot be told (as of a card that is split into MIG instances).
        used.unattributed_j += gpu.tick_j
