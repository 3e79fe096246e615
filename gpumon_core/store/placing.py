"""Places another program's ticks in the history of this host's GPUs, without touching what gpumon recorded.

Ticks go into the finest resolution that is kept at their time, and the rollups make the coarser ones. A tick is
left out where this GPU has one of gpumon's own at that time, be it only in a rollup. What was taken is noted in
`imports` with the same transaction, so that a run that was broken off is continued by the next, and what is
there already is known.
"""

from __future__ import annotations

import hashlib
import time
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import OperationalError

from gpumon_core.metrics import GPU_METRICS_BY_KEY
from gpumon_core.store import database, rollups
from gpumon_core.store.accounts import (
    HOUR_S,
    PROCESS_KEYS,
    UNKNOWN_PROGRAM,
    Gpu,
    GpuHour,
    Ledger,
    Use,
    Work,
    account,
    longest_step,
    share_out,
)
from gpumon_core.store.bulk import Bulk, Row, adding, replacing, upsert
from gpumon_core.store.retention import Keep
from gpumon_core.store.schema import (
    IMPORTED,
    TIERS,
    gpu_metrics,
    gpu_processes,
    gpu_usage,
    imported_files,
    imports,
    process_gpus,
    process_snapshots,
    scale,
)
from gpumon_core.store.writer import HEARTBEAT_S, LEDGER, USAGE, WORK, hours_bulk

DAY_S, MINUTE_S = 86400, 60
# What another program's tick tells, in this order.
READINGS = ("temperature", "utilization", "memory", "power")
UTILIZATION, MEMORY, POWER = (READINGS.index(name) for name in ("utilization", "memory", "power"))
SCALES = tuple(scale(GPU_METRICS_BY_KEY[name]) for name in READINGS)
Reading = tuple[float | None, ...]
# GPU's id, PID, name, MiB
Seen = tuple[int, int, str, int | None]
# It lists processes that compute, and does not say of what kind they are.
KIND = "C"
# A process that is missing at so many ticks, or was not seen for so long (be it that nobody looked), has ended.
MISSED_TICKS = 3
UNSEEN_S = 600
# About so many rows are one transaction: a few ten milliseconds of the write lock.
BATCH_ROWS = 5000
BATCH_TICKS = 2000
# So long a lock that another program holds is waited for, all in all.
LOCKED_S = 60.0
RETRY_S = 0.1
# A recorder's turn between two transactions. SQLite looks for a free lock in steps of at most 25 ms at first, 50
# and 100 ms later: within the first steps it finds one.
TURN_S = 0.05

T = TypeVar("T")
Level = Literal["raw", "minute", "hour"]
# Where ticks of a time go, finest first, and the seconds of a row.
SOURCES: dict[Level, tuple[sa.Table, int]] = {
    "raw": (gpu_metrics, 1),
    "minute": (TIERS[1].table, MINUTE_S),
    "hour": (TIERS[4].table, HOUR_S),
}
# What becomes of a tick: taken; imported before; recorded by gpumon itself; older than what is kept.
Verdict = Literal["taken", "imported", "recorded", "old"]
NO_MORE: tuple[None, ...] = (None,) * (len(PROCESS_KEYS) - 1)


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
    uses: dict[int, _Use] = field(default_factory=dict)

    @property
    def whole(self) -> Ledger:
        """Its ledger over all of its GPUs."""
        return next(iter(self.uses.values())).ledger if len(self.uses) == 1 else self.ledger


@dataclass(slots=True, eq=False)
class _Use(Use):
    """One process on one GPU."""

    process: Process = field(kw_only=True)


@dataclass(slots=True, eq=False)
class Run:
    """A program under its PID, for as long as nothing tells that it has ended. `number` counts ticks."""

    started: int
    last: int
    number: int
    process: Process | None = None


@dataclass(frozen=True, slots=True)
class Before:
    """A process, or a part of its life, of which there are no snapshots: only what was counted.

    Where it goes on, `since` is its first snapshot. See gpu_processes for the rest.
    """

    place_id: int
    pid: int
    name: str
    first_seen: int
    last_seen: int
    max_memory: int | None
    avg_memory: float | None
    sample_count: int
    since: int | None = None


@dataclass(slots=True)
class _Stretch:
    """A row of imports."""

    first: int
    last: int
    ticks: int


@dataclass(slots=True, eq=False)
class _Covered:
    """An hour of a GPU as it was found. Of `own` ticks there are rows; in the minutes `forgotten`, or in the
    `whole` hour, were more than there are now; `minutes` have rows of any kind, and so has the hour if `counted`.
    """

    hour: int
    own: list[int] = field(default_factory=list)
    minutes: set[int] = field(default_factory=set)
    forgotten: set[int] = field(default_factory=set)
    whole: bool = False
    counted: bool = False


@dataclass(slots=True, eq=False)
class _There:
    """What goes on at one GPU while ticks are placed there. `known` stretches were imported, before or now."""

    place: Place
    gpu: Gpu
    known: list[_Stretch]
    stretch: _Stretch | None = None
    covered: _Covered | None = None
    last_tick: int = 0
    here: set[_Use] = field(default_factory=set)
    bucket: int = 0
    bucketed: list[Reading] = field(default_factory=list)

    def was_imported(self, at: int) -> bool:
        """Whether that second is in a stretch that was imported before."""
        stretch = self.before(at)
        return stretch is not None and at <= stretch.last

    def before(self, at: int) -> _Stretch | None:
        """The last such stretch that begins no later."""
        place = bisect_right(self.known, at, key=lambda stretch: stretch.first)
        return self.known[place - 1] if place else None


class _Batch:
    """The rows of one transaction."""

    def __init__(self) -> None:
        self.first = self.last = 0
        self.ticks = 0
        self.metrics: list[Row] = []
        self.buckets: list[Row] = []
        # The time, who, how much memory, and whether it is there.
        self.snapshots: list[tuple[int, _Use, int | None, int]] = []
        self.usage: list[Row] = []
        self.new: list[Process] = []
        self.uses: set[_Use] = set()
        self.stretches: dict[tuple[int, int], _Stretch] = {}

    @property
    def rows(self) -> int:
        """About how much work it is."""
        return len(self.metrics) + len(self.buckets) + len(self.snapshots)


class Placer:
    """Takes the ticks of one host, oldest first. Not to be shared between threads.

    `reader` is None where there is no database yet, `writer` None where nothing is to be written. `live` says that
    a recorder is at work: it gets its turn between two transactions. Methods raise sqlalchemy.exc.DBAPIError; what
    was committed before stays, and the next run continues it.
    """

    def __init__(
        self,
        reader: Engine | None,
        writer: Engine | None,
        host: Host,
        places: Sequence[Place],
        keep: Keep,
        interval_s: float,
        source: Source,
        now: int,
        live: bool = False,
        idle_after_s: float = 600,
    ) -> None:
        self._reader, self._writer, self._host = reader, writer, host
        self._interval_s, self._source, self._now, self._live = interval_s, source, now, live
        self._idle_after_s = idle_after_s
        days: dict[Level, float] = {"raw": keep.raw_days, "minute": keep.minute_days, "hour": keep.hour_days}
        oldest = {level: int(now - length * DAY_S) for level, length in days.items()}
        # Where finer rows are being forgotten, a bucket of the next tier would be made of a part of them.
        edges = {"raw": MINUTE_S, "minute": HOUR_S, "hour": 1}
        self._since = {level: time + -time % edges[level] for level, time in oldest.items()}
        self.oldest = min(self._since.values())
        self._ledger_since = min(oldest.values())
        # How many ticks, snapshots and processes came to which verdict: "ticks taken".
        self.counts: Counter[str] = Counter()
        self._gap_s, self._own_gap_s = longest_step(interval_s), longest_step(host.interval_s)
        self._there = {place.id: _There(place, Gpu(place.id, "ok"), self._stretches(place)) for place in places}
        self._runs: dict[tuple[int, str], Run] = {}
        self._number = 0
        self._before: dict[tuple[int, str], list[Before]] = {}
        # Processes that were imported before, by PID and name, and by their key.
        self._known: dict[tuple[int, str], list[Process]] = {}
        self._by_key: dict[tuple[int, str], Process] = {}
        for process in self._imported_processes():
            self._known.setdefault((process.pid, process.name), []).append(process)
            self._by_key[process.pid, process.key] = process
        # What processes on several GPUs hold on each of them at a tick, and for how long.
        self._totals: dict[Process, list[tuple[float, int | None]]] = {}
        self._level: Level = "raw"
        self._batch = _Batch()
        if writer is not None:
            self._statements(writer.dialect)

    def _statements(self, dialect: sa.Dialect) -> None:
        only_new = upsert(dialect, gpu_metrics).on_conflict_do_nothing()
        self._add_metrics = Bulk(dialect, only_new, ["gpu_id", "timestamp_epoch", *READINGS])
        names = [name + suffix for name in READINGS for suffix in ("", "_min", "_max")]
        self._add_buckets = {
            level: Bulk(
                dialect,
                upsert(dialect, table).on_conflict_do_nothing(),
                ["gpu_id", "timestamp_epoch", "samples", *names],
            )
            for level, (table, _) in SOURCES.items()
            if level != "raw"
        }
        columns = ["timestamp_epoch", "process_id", "gpu_id", *PROCESS_KEYS, "present"]
        self._add_snapshots = Bulk(dialect, replacing(dialect, process_snapshots), columns)
        columns = ["host_id", "pid", "start_key", "name", "first_seen", *LEDGER]
        self._add_processes = Bulk(dialect, gpu_processes.insert(), columns)
        self._set_processes = Bulk(
            dialect,
            sa.update(gpu_processes)
            .where(gpu_processes.c.id == sa.bindparam("this"))
            .values({name: sa.bindparam(f"new_{name}") for name in LEDGER}),
            [*(f"new_{name}" for name in LEDGER), "this"],
        )
        columns = ["process_id", "gpu_id", "kind", "first_seen", *LEDGER, "active", *WORK, *PROCESS_KEYS]
        self._set_pairs = Bulk(dialect, replacing(dialect, process_gpus), columns)
        self._add_hours = hours_bulk(dialect)
        self._add_usage = Bulk(dialect, adding(dialect, gpu_usage), ["timestamp_epoch", "gpu_id", *USAGE])
        columns = ["gpu_id", "first", "last", "ticks", "source", "imported_at"]
        self._set_stretches = Bulk(dialect, replacing(dialect, imports), columns)
        columns = ["gpu_id", "source", "source_index", "until", "imported_at"]
        self._set_files = Bulk(dialect, replacing(dialect, imported_files), columns)

    # What is there already.

    def _read(self, query: sa.Select[Any]) -> Sequence[Any]:
        if self._reader is None:
            return ()
        with self._reader.connect() as connection:
            return connection.execute(query).all()

    def _stretches(self, place: Place) -> list[_Stretch]:
        query = sa.select(imports.c.first, imports.c.last, imports.c.ticks).where(imports.c.gpu_id == place.id)
        return [_Stretch(*row) for row in self._read(query.order_by(imports.c.first))]

    def _imported_processes(self) -> list[Process]:
        names = ("id", "pid", "name", "first_seen", "start_key", *LEDGER)
        query = sa.select(*(gpu_processes.c[name] for name in names)).where(
            gpu_processes.c.host_id == self._host.id, gpu_processes.c.start_key.startswith(IMPORTED)
        )
        return [
            Process(pid, name or "", first, key, Ledger(*ledger), number)
            for number, pid, name, first, key, *ledger in self._read(query)
        ]

    def _look(self, there: _There, hour: int) -> _Covered:
        """What an hour of a GPU has. Its rollups are none of this run: its ticks come one hour after the other."""
        found = _Covered(hour)
        at, place = gpu_metrics.c.timestamp_epoch, there.place.id
        slack = int(self._own_gap_s) + 1
        query = sa.select(at).where(gpu_metrics.c.gpu_id == place, at >= hour - slack, at < hour + HOUR_S + slack)
        ticks = [row[0] for row in self._read(query.order_by(at))]
        found.own = [tick for tick in ticks if not there.was_imported(tick)]
        raw = Counter(tick - tick % MINUTE_S for tick in ticks if hour <= tick < hour + HOUR_S)
        samples: dict[Level, dict[int, int]] = {}
        for level in ("minute", "hour"):
            table, _ = SOURCES[level]
            at = table.c.timestamp_epoch
            query = sa.select(at, table.c.samples).where(table.c.gpu_id == place, at >= hour, at < hour + HOUR_S)
            samples[level] = dict(map(tuple, self._read(query)))
        minutes = samples["minute"]
        found.minutes = {*minutes, *raw}
        found.forgotten = {minute for minute, count in minutes.items() if count > raw[minute]}
        told = sum(max(minutes.get(minute, 0), raw[minute]) for minute in found.minutes)
        found.whole = samples["hour"].get(hour, 0) > told
        found.counted = bool(samples["hour"] or found.minutes)
        return found

    def _judge(self, there: _There, at: int) -> Verdict:
        if at < self.oldest:
            return "old"
        if there.was_imported(at):
            return "imported"
        if self._live and at > there.place.last_seen:
            return "recorded"
        hour = at - at % HOUR_S
        found = there.covered
        if found is None or found.hour != hour:
            found = there.covered = self._look(there, hour)
        level = self._level_at(at)
        if level == "hour":
            return "recorded" if found.counted else "taken"
        minute = at - at % MINUTE_S
        if found.whole or minute in (found.minutes if level == "minute" else found.forgotten):
            return "recorded"
        near = bisect_left(found.own, at - self._own_gap_s)
        return "recorded" if near < len(found.own) and found.own[near] <= at + self._own_gap_s else "taken"

    # One tick after the other.

    def expect(self, before: Iterable[Before]) -> None:
        """Processes of which the snapshots to come tell only the rest."""
        for known in before:
            self._before.setdefault((known.pid, known.name), []).append(known)

    def take(self, at: int, readings: Mapping[int, Reading], processes: Sequence[Seen]) -> None:
        """Place a tick: the readings by the GPU's id, and (GPU's id, PID, name, MiB) of who was on them."""
        self._number += 1
        level = self._level_at(at)
        if level != self._level or self._is_full(at):
            self._flush(at)
        self._level = level
        verdicts: dict[int, Verdict] = {}
        for place_id in {*readings, *(process[0] for process in processes)}:
            there = self._there[place_id]
            verdict = verdicts[place_id] = self._judge(there, at)
            if place_id in readings:
                self.counts[f"ticks {verdict}"] += 1
            if verdict != "taken":
                there.stretch = None
        on = self._take_processes(at, processes, verdicts)
        for place_id, verdict in verdicts.items():
            if verdict == "taken":
                self._take_gpu(self._there[place_id], at, readings.get(place_id), on.get(place_id, {}))
        for process, told in self._totals.items():
            known = [memory for _, memory in told if memory is not None]
            process.ledger.add(at, max(dt for dt, _ in told), sum(known) if known else None)
        self._totals.clear()
        batch = self._batch
        batch.first, batch.last = batch.first or at, at
        batch.ticks += 1

    def _level_at(self, at: int) -> Level:
        """The finest resolution that is kept at a time."""
        fitting = (level for level in SOURCES if at >= self._since[level])
        return next(fitting, "hour")

    def _is_full(self, at: int) -> bool:
        """Whether what waits is enough for a transaction, and may be one: a bucket is made once."""
        length = SOURCES[self._level][1]
        if at // length == self._batch.last // length:
            return False
        full = BATCH_ROWS // 2 if self._live else BATCH_ROWS
        return self._batch.rows >= full or self._batch.ticks >= BATCH_TICKS

    def _take_processes(
        self,
        at: int,
        processes: Sequence[Seen],
        verdicts: Mapping[int, Verdict],
    ) -> dict[int, dict[_Use, int | None]]:
        """Who is on each GPU, and with how much memory."""
        on: dict[int, dict[_Use, int | None]] = {}
        number, runs, gap = self._number, self._runs, self._gap_s
        counted = dict.fromkeys(verdicts.values(), 0)
        for place_id, pid, name, memory in processes:
            run = runs.get((pid, name))
            if run is None or (
                run.number != number
                and ((number - run.number > MISSED_TICKS and at - run.last > gap) or at - run.last > UNSEEN_S)
            ):
                run = runs[pid, name] = Run(at, at, number)
            run.last, run.number = at, number
            verdict = verdicts[place_id]
            counted[verdict] += 1
            if verdict == "taken":
                use = None if run.process is None else run.process.uses.get(place_id)
                if use is None:
                    use = self._find_use(run, self._there[place_id], pid, name, at)
                there = on.get(place_id)
                if there is None:
                    on[place_id] = {use: memory}
                else:
                    there[use] = memory
        for verdict, count in counted.items():
            self.counts[f"snapshots {verdict}"] += count
        return on

    def _take_gpu(self, there: _There, at: int, reading: Reading | None, on: dict[_Use, int | None]) -> None:
        gpu, place, batch = there.gpu, there.place, self._batch
        since = at - there.last_tick
        gap = not 0 < since <= self._gap_s
        if gap and there.here:
            self._leave(there, there.here, there.last_tick + max(1, round(self._interval_s)))
            there.here = set()
        dt = self._interval_s if gap else float(since)
        hour = at - at % HOUR_S
        if gpu.hour != hour:
            self._close_hour(gpu)
            gpu.hour = hour
        self._keep(there, at, reading)
        power = reading[POWER] if reading is not None else None
        gpu.utilization = reading[UTILIZATION] if reading is not None else None
        # What the driver has counted while gpumon did not look is in the history already.
        gpu.tick_j = power * dt if power is not None and place.has_energy_of(at) else 0.0
        raw = self._level == "raw"
        uses: list[Use] = []
        for use, told in on.items():
            memory = told
            if memory is not None and place.memory_total_mib and memory > place.memory_total_mib:
                self.counts["more memory"] += 1
                memory = None
            stored_at = use.stored_at
            if memory != use.now[0] or stored_at is None or at - stored_at >= HEARTBEAT_S:
                use.now = (memory, *NO_MORE)
                if raw:
                    batch.snapshots.append((at, use, memory, 1))
                    use.stored_at = at
            use.ledger.add(at, dt, memory)
            uses.append(use)
            if len(use.process.uses) > 1:
                self._totals.setdefault(use.process, []).append((dt, memory))
        batch.uses.update(on)
        if there.here and (left := there.here - on.keys()):
            self._leave(there, left, at)
        there.here = set(on)
        part = share_out(gpu, uses, at, dt, self._idle_after_s, gap) if uses else 0.0
        if reading is not None:
            account(gpu, uses, part, dt)
        there.last_tick = at

    def _keep(self, there: _There, at: int, reading: Reading | None) -> None:
        """Put a reading where its time is kept, and note that it was taken."""
        batch, place = self._batch, there.place
        if reading is not None:
            memory = reading[MEMORY]
            if memory is not None and place.memory_total_mib and memory > place.memory_total_mib:
                self.counts["more memory"] += 1
                reading = (*reading[:MEMORY], None, *reading[MEMORY + 1 :])
            if self._level == "raw":
                batch.metrics.append((place.id, at, *(_stored(reading))))
            else:
                length = SOURCES[self._level][1]
                if there.bucketed and at - at % length != there.bucket:
                    batch.buckets.append(_bucket(there))
                there.bucket = at - at % length
                there.bucketed.append(reading)
        stretch = there.stretch
        if stretch is None or at - stretch.last > self._gap_s:
            known = there.before(at)
            goes_on = known is not None and at - known.last <= self._gap_s
            stretch = known if known is not None and goes_on else _Stretch(at, at, 0)
            there.stretch = stretch
            if stretch is not known:
                # What this run has taken is not taken for gpumon's own either.
                insort(there.known, stretch, key=lambda one: one.first)
        stretch.last = at
        stretch.ticks += 1
        batch.stretches[place.id, stretch.first] = stretch

    def _leave(self, there: _There, uses: Iterable[_Use], at: int) -> None:
        """Processes that are not there any more from that time on."""
        for use in uses:
            if use.stored_at is not None:
                self._batch.snapshots.append((at, use, None, 0))
                use.stored_at = None

    def _close_hour(self, gpu: Gpu) -> None:
        if gpu.used.seconds:
            figures = (round(getattr(gpu.used, name), 0 if name.endswith("_j") else 1) for name in USAGE)
            self._batch.usage.append((gpu.hour, gpu.id, *figures))
            gpu.used = GpuHour()

    # Who a process is.

    def _find_use(self, run: Run, there: _There, pid: int, name: str, at: int) -> _Use:
        """A process on a GPU where it was not placed yet in this run."""
        process = run.process
        if process is None:
            process = run.process = self._match(run, pid, name, at) or self._new(run, pid, name, at)
        place = there.place
        use = process.uses.get(place.id)
        if use is None:
            known = next(
                (one for one in self._before.get((pid, name), ()) if self._goes_on(one, run, place)), None
            )
            first = at if known is None else known.first_seen
            ledger = Ledger(at) if known is None else self._ledger(known)
            if len(process.uses) == 1:
                # From now on the whole is more than its part.
                process.ledger = replace(process.whole)
            use = _Use(0, there.gpu, KIND, ledger, Work(last_busy=at), first, process=process)
            process.uses[place.id] = use
        return use

    def _goes_on(self, known: Before, run: Run, place: Place | None) -> bool:
        """Whether a process of before is the one whose snapshots begin with this run."""
        same = place is None or known.place_id == place.id
        return same and known.since is not None and abs(known.since - run.started) <= self._gap_s

    def _match(self, run: Run, pid: int, name: str, at: int) -> Process | None:
        """The process that an import before this one took for the same run."""
        for process in self._known.get((pid, name), ()):
            ledger = process.whole if process.uses else process.ledger
            if process.first_seen <= at and ledger.last_seen >= run.started - self._gap_s:
                return self._with_uses(process)
        for known in self._before.get((pid, name), ()):
            if self._goes_on(known, run, None):
                found = self._by_key.get((pid, _key(known.first_seen, name)))
                return None if found is None else self._with_uses(found)
        return None

    def _new(self, run: Run, pid: int, name: str, at: int) -> Process:
        before = [known for known in self._before.get((pid, name), ()) if self._goes_on(known, run, None)]
        first = min((known.first_seen for known in before), default=at)
        ledger = Ledger(at) if not before else self._ledger(*before)
        process = Process(pid, name, first, _key(first, name), ledger)
        known = self._by_key.setdefault((pid, process.key), process)
        if known is not process:
            return self._with_uses(known)
        self._batch.new.append(process)
        self.counts["processes taken"] += 1
        return process

    def _with_uses(self, process: Process) -> Process:
        """With what it did on its GPUs, as far as that is placed here."""
        if not process.uses:
            query = sa.select(process_gpus).where(process_gpus.c.process_id == process.id)
            for row in self._read(query):
                there = self._there.get(row.gpu_id)
                gpu = there.gpu if there is not None else Gpu(row.gpu_id, "ok")
                ledger = Ledger(*(getattr(row, name) for name in LEDGER))
                work = Work(**{name: getattr(row, name) for name in WORK})
                work.last_busy = work.last_busy or row.last_seen
                use = _Use(row.process_id, gpu, row.kind, ledger, work, row.first_seen, process=process)
                process.uses[row.gpu_id] = use
        return process

    def _ledger(self, *parts: Before) -> Ledger:
        """What was counted of a process, on all of its GPUs together."""
        most = [known.max_memory for known in parts if known.max_memory is not None]
        means = [known.avg_memory for known in parts if known.avg_memory is not None]
        samples = max(known.sample_count for known in parts)
        first, last = min(known.first_seen for known in parts), max(known.last_seen for known in parts)
        seconds = min(samples * self._interval_s, last - first + self._interval_s)
        return Ledger(last, sum(most) if most else None, sum(means) if means else None, samples, seconds)

    def place(self, known: Sequence[Before]) -> None:
        """Take processes of which there are no snapshots into the ledger. All have one PID and name: those that
        overlap are one process on several GPUs."""
        groups: list[list[Before]] = []
        for one in sorted(known, key=lambda one: one.first_seen):
            if groups and one.first_seen <= max(other.last_seen for other in groups[-1]):
                groups[-1].append(one)
            else:
                groups.append([one])
        for group in groups:
            verdict = self._place(group)
            self.counts[f"processes {verdict}"] += 1

    def _place(self, group: Sequence[Before]) -> Verdict:
        if max(one.last_seen for one in group) < self._ledger_since:
            return "old"
        ends = [(self._there[one.place_id], at) for one in group for at in (one.first_seen, one.last_seen)]
        if all(self._judge(there, at) == "recorded" for there, at in ends):
            return "recorded"
        first, pid, name = min(one.first_seen for one in group), group[0].pid, group[0].name
        ledger = self._ledger(*group)
        process = self._by_key.get((pid, _key(first, name)))
        if process is not None:
            self._with_uses(process)
            if process.whole.sample_count >= ledger.sample_count:
                return "imported"
        verdict: Verdict = "taken" if process is None else "imported"
        if process is None:
            process = Process(pid, name, first, _key(first, name), ledger)
            self._batch.new.append(process)
            self._by_key[pid, process.key] = process
        process.ledger = ledger
        for one in group:
            counted = self._ledger(one)
            use = process.uses.get(one.place_id)
            if use is None:
                gpu = self._there[one.place_id].gpu
                use = _Use(0, gpu, KIND, counted, Work(last_busy=one.last_seen), one.first_seen, process=process)
                process.uses[one.place_id] = use
            use.ledger = counted
            self._batch.uses.add(use)
        if self._batch.rows + len(self._batch.uses) >= BATCH_ROWS:
            self._flush(None)
        return verdict

    # Writing.

    def finish(self, until: int | None) -> None:
        """Commit what is left. `until` is the time up to which the file was read, whatever it had to tell; None
        where it could not be read to its end."""
        self._flush(None)
        if until is not None and self._writer is not None:
            self._in_transaction(self._writer, lambda connection: self._note(connection, until))

    def _flush(self, following: int | None) -> None:
        """Commit the batch, as if nothing followed it; `following` is the time of the tick that does."""
        batch = self._batch
        for there in self._there.values():
            if there.bucketed:
                batch.buckets.append(_bucket(there))
            end = there.last_tick + max(1, round(self._interval_s))
            if following is not None and 0 < following - there.last_tick <= self._gap_s:
                end = following
            self._leave(there, there.here, end)
            self._close_hour(there.gpu)
        self._batch = _Batch()
        if following is not None:
            ended = [who for who, run in self._runs.items() if following - run.last > UNSEEN_S]
            for who in ended:
                del self._runs[who]
        if self._writer is None or not (batch.ticks or batch.uses):
            self._let_go(batch)
            return
        ids = self._in_transaction(self._writer, lambda connection: self._commit(connection, batch))
        for process, number in ids.items():
            process.id = number
        self._let_go(batch)
        if self._live:
            database.checkpoint(self._writer)
            time.sleep(TURN_S)

    def _in_transaction(self, writer: Engine, action: Callable[[Connection], T]) -> T:
        """Do something in one transaction, as soon as there can be one."""
        deadline = time.monotonic() + LOCKED_S
        while True:
            try:
                with writer.begin() as connection:
                    return action(connection)
            except OperationalError as error:
                # Somebody else is writing, or PostgreSQL had to choose between two: this one can wait.
                if not database.is_busy(error) or time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_S)

    def _note(self, connection: Connection, until: int) -> None:
        """Up to when the file was read."""
        path, indices = self._source.path, self._source.indices
        self._set_files.run(
            connection, [(gpu_id, path, index, until, self._now) for gpu_id, index in sorted(indices.items())]
        )

    def _let_go(self, batch: _Batch) -> None:
        for use in batch.uses:
            use.hours = {}

    def _commit(self, connection: Connection, batch: _Batch) -> dict[Process, int]:
        """Write a batch; the ids of the processes that are new."""
        host_id = self._host.id
        if host_id is None:
            raise ValueError("nothing can be placed on a host that is not there")
        ids = self._insert(connection, batch.new)

        def number(process: Process) -> int:
            return process.id if process.id is not None else ids[process]

        self._add_metrics.run(connection, batch.metrics)
        if self._level != "raw":
            self._add_buckets[self._level].run(connection, batch.buckets)
        rows: list[Row] = [
            (at, number(use.process), use.gpu.id, memory, *NO_MORE, present)
            for at, use, memory, present in batch.snapshots
        ]
        self._add_snapshots.run(connection, rows)
        processes = {use.process for use in batch.uses}
        self._set_processes.run(connection, [(*_figures(process.whole), number(process)) for process in processes])
        self._set_pairs.run(
            connection,
            [
                (
                    *(number(use.process), use.gpu.id, use.kind, use.first_seen, *_figures(use.ledger), 0),
                    *(getattr(use.work, name) for name in WORK),
                    *(None for _ in PROCESS_KEYS),
                )
                for use in batch.uses
            ],
        )
        self._add_hours.run(
            connection,
            [
                (
                    *(hour, number(use.process), use.gpu.id, UNKNOWN_PROGRAM, used.seconds, round(used.busy_s, 3)),
                    *(used.idle_s, used.memory_mib_s, round(used.energy_j, 3), used.max_memory, used.estimated),
                )
                for use in batch.uses
                for (hour, _), used in use.hours.items()
            ],
        )
        # In the order of their keys, so that two writers never wait for each other.
        self._add_usage.run(connection, sorted(batch.usage))
        self._set_stretches.run(
            connection,
            [
                (gpu_id, stretch.first, stretch.last, stretch.ticks, self._source.name, self._now)
                for (gpu_id, _), stretch in batch.stretches.items()
            ],
        )
        if batch.ticks:
            self._note(connection, batch.last)
        if batch.metrics or batch.buckets:
            source = SOURCES[self._level][0]
            rollups.renew(connection, host_id, source, batch.first, batch.last, self._host.interval_s)
        return ids

    def _insert(self, connection: Connection, processes: Sequence[Process]) -> dict[Process, int]:
        if not processes:
            return {}
        newest = connection.execute(sa.select(sa.func.max(gpu_processes.c.id))).scalar() or 0
        self._add_processes.run(
            connection,
            [
                (self._host.id, one.pid, one.key, one.name, one.first_seen, *_figures(one.whole))
                for one in processes
            ],
        )
        query = sa.select(gpu_processes.c.id, gpu_processes.c.pid, gpu_processes.c.start_key).where(
            gpu_processes.c.id > newest, gpu_processes.c.host_id == self._host.id
        )
        numbers = {(pid, key): number for number, pid, key in connection.execute(query)}
        return {one: numbers[one.pid, one.key] for one in processes}


def _key(first_seen: int, name: str) -> str:
    """The start_key of a process whose start is not known: what tells it apart, and where it is from."""
    digest = hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=6).hexdigest()
    return f"{IMPORTED}{first_seen} {digest}"


def _figures(ledger: Ledger) -> tuple[Any, ...]:
    return ledger.last_seen, ledger.max_memory, ledger.avg_memory, ledger.sample_count, ledger.seconds


def _stored(reading: Reading) -> Iterable[float | None]:
    memory = reading[MEMORY]
    return (*reading[:MEMORY], None if memory is None else round(memory), *reading[MEMORY + 1 :])


def _bucket(there: _There) -> Row:
    """The row of the bucket that a GPU's readings filled, which then is empty."""
    row: list[Any] = [there.place.id, there.bucket, len(there.bucketed)]
    for values, times in zip(zip(*there.bucketed, strict=True), SCALES, strict=True):
        known = [value for value in values if value is not None]
        mean = sum(known) / len(known) if known else None
        row += [
            None if value is None else round(value * times)
            for value in (mean, min(known, default=None), max(known, default=None))
        ]
    there.bucketed = []
    return tuple(row)
