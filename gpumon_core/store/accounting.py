"""The arithmetic of the ledger: what a process has had of a GPU, tick after tick.

A GPU's busy time in a tick is its utilization times the tick's length. It is split among its processes by
their SM utilization, so that the parts add up to the whole; where the driver does not distinguish processes
apart, by the memory that they hold, which is an estimate and marked as one. Energy follows the same
shares, and what is left over is the GPU's own: idle (nothing ran) or unattributed (something ran that is no
known process's). What the server of NVIDIA's Multi-Process Service (MPS) did is its clients' work.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.metrics import PROCESS_METRICS
from gpumon_core.telemetry.energy import EnergyCounter, EnergyMeter
from gpumon_core.telemetry.records import GpuInfo, ProcessReading

HOUR_S = 3600
# The ledger counts by the half hour: so days and hours of zones with an offset of a half are right as well.
STEP_S = 1800
PROCESS_KEYS = tuple(metric.key for metric in PROCESS_METRICS)
MEMORY, SM = PROCESS_KEYS.index("memory"), PROCESS_KEYS.index("sm_utilization")
GONE: tuple[None, ...] = (None,) * len(PROCESS_KEYS)
UNKNOWN_PROGRAM = 0
# NVML counts the work of MPS clients as that of nvidia-cuda-mps-server, and reports no work of a client.
# Where its arguments are not stored, the kernel's name for it ends here.
MPS_SERVER = "nvidia-cuda-mps"
# A pause longer than this many intervals is a gap: nothing is known of it.
GAP_INTERVALS = 3
# A process that does nothing new gets a row in process_snapshots this often all the same, so that a
# reader need not look back further, and retention may forget what is older.
HEARTBEAT_S = 600


def longest_step(interval_s: float) -> float:
    """The longest time between two ticks that is not a gap, in seconds."""
    return max(GAP_INTERVALS * interval_s, interval_s + 2)


def step_of(moment: float) -> int:
    """The first second of the ledger's step that a moment (UTC seconds) is in."""
    return int(moment // STEP_S) * STEP_S


def spans(end: int, length_s: float) -> list[tuple[int, float]]:
    """The `length_s` seconds up to `end` (UTC seconds), step by step of the ledger: each with its seconds, the
    oldest first."""
    newest = step_of(end - 1)
    if end - length_s >= newest:
        return [(newest, length_s)]
    begin = max(0.0, end - length_s)
    steps = range(step_of(begin), newest + 1, STEP_S)
    return [(step, min(end, step + STEP_S) - max(begin, step)) for step in steps]


@dataclass(slots=True)
class GpuUse:
    """A row of gpu_usage: what a GPU did within a step of the ledger."""

    seconds: float = 0.0
    busy_s: float = 0.0
    held_s: float = 0.0
    unattributed_s: float = 0.0
    energy_j: float = 0.0
    idle_j: float = 0.0
    unattributed_j: float = 0.0
    unrecorded_j: float = 0.0
    unknown_s: float = 0.0


# The columns that it has in gpu_usage.
USAGE = tuple(one.name for one in fields(GpuUse))


@dataclass(frozen=True, slots=True)
class Moment:
    """A time: as the wall clock had it (UTC seconds), and by a clock that nobody sets, where that is known."""

    label: int
    elapsed: float | None = None

    def since(self, before: Moment) -> float:
        """Seconds since another moment; what the wall clock says where nothing better is known: 0 or less where it
        was set back."""
        if self.elapsed is not None and before.elapsed is not None and self.elapsed >= before.elapsed:
            return self.elapsed - before.elapsed
        return float(self.label - before.label)


@dataclass(slots=True)
class Gpu:
    """A GPU as the database has it."""

    id: int
    state: str
    info: GpuInfo | None = None
    sampling: str | None = None
    energy_j: float = 0.0
    meter: EnergyMeter = field(default_factory=lambda: EnergyMeter(EnergyCounter()))
    energy_from: str | None = None
    changes: dict[str, float | None] = field(default_factory=dict)
    # When it was read last.
    read_at: Moment | None = None
    # This tick's energy, and its utilization, to be shared out; the SM utilization of processes that have ended
    # since the tick before, by PID.
    tick_j: float = 0.0
    utilization: float | None = None
    ended: Mapping[int, int] = field(default_factory=dict)
    # The step of the ledger it is in, and what it did of it.
    step: int = -1
    used: GpuUse = field(default_factory=GpuUse)
    # What of it is in the database, in the order of its fields.
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
        """One more sample, which covers `dt` seconds."""
        self.last_seen = now
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

    def add(self, part: float, joules: float, sm: int | None, dt: float) -> None:
        """A tick of `dt` seconds and `joules`, this `part` (0 to 1) of them its own."""
        self.busy_s += part * dt
        self.energy_j += part * joules
        if sm is not None:
            self.sm_told_s += dt
            self.sm_percent_s += sm * dt
            if self.max_sm is None or sm > self.max_sm:
                self.max_sm = sm


# The columns that a ledger and work have in the database, in the order in which they are written.
LEDGER = ("last_seen", "max_memory", "avg_memory", "sample_count", "seconds")
WORK = ("busy_s", "energy_j", "sm_percent_s", "sm_told_s", "max_sm", "estimated", "last_busy")


@dataclass(slots=True)
class ProcessHour:
    """A row of process_hours: what a process used within a step of the ledger."""

    seconds: float = 0.0
    busy_s: float = 0.0
    idle_s: float = 0.0
    memory_mib_s: float = 0.0
    energy_j: float = 0.0
    max_memory: int | None = None
    estimated: int = 0


@dataclass(slots=True)
class ModelSession:
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
    session: ModelSession | None = None
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
    # What it has used, by the step of the ledger and what it ran, without what is stored already.
    hours: dict[tuple[int, int], ProcessHour] = field(default_factory=dict)
    # Parts of a joule that wait to be whole.
    rest_j: float = 0.0

    def __post_init__(self) -> None:
        self.known = (self.process_id, self.ledger)
        self.pair = (self.process_id, self.gpu.id)

    def in_step(self, step: int) -> ProcessHour:
        """What it has used of a step of the ledger, to be added to."""
        used = self.hours.get((step, self.program_id))
        if used is None:
            used = self.hours[step, self.program_id] = ProcessHour(energy_j=self.rest_j)
            self.rest_j = 0.0
        return used


def plus(total: int | None, more: int | None) -> int | None:
    """A sum of what is known; None while nothing is."""
    return total if more is None else (total or 0) + more


def shares(gpu: Gpu, uses: list[Use]) -> tuple[list[float | None], Collection[int]]:
    """For how much of a tick each process was busy on the GPU (None: not known), and the places of those whose
    part is an estimate. What processes that have ended did is nobody else's."""
    known = [use.now[SM] for use in uses]
    whole = sum(share or 0 for share in known) + sum(gpu.ended.values())
    if whole:
        busy = min(1.0, whole / 100) if gpu.utilization is None else gpu.utilization / 100
        parts = [None if share is None else busy * share / whole for share in known]
        return parts, _hand_on(parts, uses)
    if gpu.utilization is None:
        return [None if share is None else 0.0 for share in known], ()
    if not gpu.utilization or None not in known:
        return [0.0] * len(uses), ()
    # The driver does not distinguish these processes: they share by the memory that they hold, or evenly.
    split = _split(gpu.utilization / 100, [use for use, share in zip(uses, known, strict=True) if share is None])
    parts = [0.0 if share is not None else next(split) for share in known]
    _hand_on(parts, uses)
    return parts, range(len(uses))


def _split(part: float, among: list[Use]) -> Iterator[float]:
    """A part for each process, by the memory that it holds, or evenly where nobody's is known."""
    held = [float(use.now[MEMORY] or 0) for use in among]
    if not any(held):
        held = [1.0] * len(among)
    whole = sum(held)
    return (part * memory / whole for memory in held)


def _hand_on(parts: list[float | None], uses: list[Use]) -> Collection[int]:
    """Give what MPS servers did to the MPS clients, by memory; the places of those whose part is a guess now."""
    servers = [place for place, use in enumerate(uses) if use.serves_mps and parts[place]]
    if not servers:
        return ()
    clients = [place for place, use in enumerate(uses) if "M" in use.kind and not use.serves_mps]
    if not clients:
        return ()
    done = sum(parts[place] or 0.0 for place in servers)
    for place in servers:
        parts[place] = 0.0
    for place, part in zip(clients, _split(done, [uses[place] for place in clients]), strict=True):
        parts[place] = (parts[place] or 0.0) + part
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
    steps = spans(now, dt)
    for place, (use, part) in enumerate(zip(uses, parts, strict=True)):
        if only is not None and use not in only:
            continue
        memory, sm, *others = use.now
        work = use.work
        for step, seconds in steps:
            used = use.in_step(step)
            used.seconds += seconds
            if part:
                used.busy_s += part * seconds
                used.energy_j += part * gpu.tick_j * seconds / dt
                if place in estimated:
                    used.estimated = 1
            if memory is not None:
                used.memory_mib_s += memory * seconds
                if used.max_memory is None or memory > used.max_memory:
                    used.max_memory = memory
        work.add(part or 0.0, gpu.tick_j, sm, dt)
        if part and place in estimated:
            work.estimated = 1
        if part is None or part or sm or any(others):
            # What is not known is not idleness.
            work.last_busy = now
        else:
            _idle(use, steps, now, dt, idle_after_s, gap)
    return sum(part or 0.0 for part in parts)


def give_to_ended(gpu: Gpu, use: Use, sm: int, whole: int, now: int, dt: float) -> float:
    """Give a process that has ended since the tick before its part of this one; the part, 0 to 1."""
    busy = min(1.0, whole / 100) if gpu.utilization is None else gpu.utilization / 100
    part = busy * sm / whole
    for step, seconds in spans(now, dt):
        used = use.in_step(step)
        used.busy_s += part * seconds
        used.energy_j += part * gpu.tick_j * seconds / dt
    use.work.add(part, gpu.tick_j, None, dt)
    return part


def _idle(
    use: Use, steps: Sequence[tuple[int, float]], now: int, dt: float, idle_after_s: float, gap: bool
) -> None:
    """It did nothing in this tick: from `idle_after_s` on that is idleness, from its beginning."""
    length = now - use.work.last_busy
    if length < idle_after_s:
        return
    if not (gap or length - dt >= idle_after_s):
        steps = spans(now, length)
    for step, seconds in steps:
        use.in_step(step).idle_s += seconds


def account(gpu: Gpu, uses: list[Use], part: float, dt: float, seconds: float) -> None:
    """Add `seconds` of a tick of `dt` to the GPU's own step of the ledger; `part` went to its processes."""
    used = gpu.used
    # That its processes did nothing is known where the driver says so of each.
    known = gpu.utilization is not None or part > 0 or bool(uses and all(use.now[SM] is not None for use in uses))
    busy = part if gpu.utilization is None else gpu.utilization / 100
    joules = gpu.tick_j * seconds / dt
    used.seconds += seconds
    used.energy_j += joules
    if not known:
        # Whether it did anything cannot be said (as of a card that is split into MIG instances).
        used.unknown_s += seconds
        used.unattributed_j += joules
        return
    used.busy_s += busy * seconds
    # Graphics alone hold no GPU: a desktop leaves it to whoever computes.
    if any(use.kind != "G" for use in uses):
        used.held_s += (1 - busy) * seconds
    used.unattributed_s += (busy - part) * seconds
    used.unattributed_j += (busy - part) * joules
    used.idle_j += (1 - busy) * joules
