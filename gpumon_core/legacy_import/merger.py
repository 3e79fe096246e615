"""Places another program's ticks in the history of this host's GPUs, without touching what gpumon recorded.

Ticks go into the finest resolution that is kept at their time, and the rollups make the coarser ones. A tick is
left out where this GPU has one of gpumon's own at that time, be it only in a rollup. What was taken is noted in
`imports` with the same transaction, so that a run that was broken off is continued by the next, and what is
there already is known.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from gpumon_core.legacy_import.batch_writer import NO_MORE, Rows
from gpumon_core.legacy_import.import_records import (
    MEMORY,
    MINUTE_S,
    POWER,
    READINGS,
    SOURCES,
    UTILIZATION,
    Batch,
    Host,
    Level,
    Place,
    PlacedUse,
    Process,
    Reading,
    Seen,
    Source,
    Stretch,
)
from gpumon_core.legacy_import.process_matcher import KIND, Before, Processes, Run, key_of
from gpumon_core.metrics import GPU_METRICS_BY_KEY
from gpumon_core.store import database
from gpumon_core.store.accounting import (
    HEARTBEAT_S,
    HOUR_S,
    USAGE,
    Gpu,
    GpuUse,
    Use,
    Work,
    account,
    longest_step,
    share_out,
    spans,
)
from gpumon_core.store.bulk import Row
from gpumon_core.store.retention import Keep
from gpumon_core.store.schema import gpu_metrics, imports, scale

DAY_S = 86400
# How a reading is stored in a rollup.
SCALES = tuple(scale(GPU_METRICS_BY_KEY[name]) for name in READINGS)
# A process that is missing at so many ticks, or was not seen for so long (be it that nobody looked), has ended.
MISSED_TICKS = 3
UNSEEN_S = 600
# About so many rows are one transaction: a few ten milliseconds of the write lock.
BATCH_ROWS = 5000
BATCH_TICKS = 2000
# A recorder's turn between two transactions. SQLite looks for a free lock in steps of at most 25 ms at first, 50
# and 100 ms later: within the first steps it finds one.
TURN_S = 0.05

# What becomes of a tick: taken; imported before; recorded by gpumon itself; older than what is kept.
Verdict = Literal["taken", "imported", "recorded", "old"]


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
    known: list[Stretch]
    stretch: Stretch | None = None
    covered: _Covered | None = None
    last_tick: int = 0
    here: set[PlacedUse] = field(default_factory=set)
    bucket: int = 0
    bucketed: list[Reading] = field(default_factory=list)

    def was_imported(self, at: int) -> bool:
        """Whether that second is in a stretch that was imported before."""
        stretch = self.before(at)
        return stretch is not None and at <= stretch.last

    def before(self, at: int) -> Stretch | None:
        """The last such stretch that begins no later."""
        place = bisect_right(self.known, at, key=lambda stretch: stretch.first)
        return self.known[place - 1] if place else None


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
        self._reader, self._interval_s, self._live = reader, interval_s, live
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
        gpus = {gpu_id: there.gpu for gpu_id, there in self._there.items()}
        self._processes = Processes(self._read, host.id, gpus, self._gap_s, interval_s)
        # What processes on several GPUs hold on each of them at a tick, and for how long.
        self._totals: dict[Process, list[tuple[float, int | None]]] = {}
        self._level: Level = "raw"
        self._batch = Batch()
        self._rows = None if writer is None else Rows(writer, host, source, now)

    # What is there already.

    def _read(self, query: sa.Select[Any]) -> Sequence[Any]:
        if self._reader is None:
            return ()
        with self._reader.connect() as connection:
            return connection.execute(query).all()

    def _stretches(self, place: Place) -> list[Stretch]:
        query = sa.select(imports.c.first, imports.c.last, imports.c.ticks).where(imports.c.gpu_id == place.id)
        return [Stretch(*row) for row in self._read(query.order_by(imports.c.first))]

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
        self._processes.expect(before)

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
    ) -> dict[int, dict[PlacedUse, int | None]]:
        """Who is on each GPU, and with how much memory."""
        on: dict[int, dict[PlacedUse, int | None]] = {}
        number, runs, gap = self._number, self._runs, self._gap_s
        counted, new = dict.fromkeys(verdicts.values(), 0), len(self._batch.new)
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
                    use = self._processes.find_use(run, place_id, pid, name, at, self._batch)
                there = on.get(place_id)
                if there is None:
                    on[place_id] = {use: memory}
                else:
                    there[use] = memory
        for verdict, count in counted.items():
            self.counts[f"snapshots {verdict}"] += count
        self.counts["processes taken"] += len(self._batch.new) - new
        return on

    def _take_gpu(self, there: _There, at: int, reading: Reading | None, on: dict[PlacedUse, int | None]) -> None:
        gpu, place, batch = there.gpu, there.place, self._batch
        since = at - there.last_tick
        gap = not 0 < since <= self._gap_s
        if gap and there.here:
            self._leave(there, there.here, there.last_tick + max(1, round(self._interval_s)))
            there.here = set()
        dt = self._interval_s if gap else float(since)
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
            for step, seconds in spans(at, dt):
                if gpu.step != step:
                    self._close_step(gpu)
                    gpu.step = step
                account(gpu, uses, part, dt, seconds)
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
            stretch = known if known is not None and goes_on else Stretch(at, at, 0)
            there.stretch = stretch
            if stretch is not known:
                # What this run has taken is not taken for gpumon's own either.
                insort(there.known, stretch, key=lambda one: one.first)
        stretch.last = at
        stretch.ticks += 1
        batch.stretches[place.id, stretch.first] = stretch

    def _leave(self, there: _There, uses: Iterable[PlacedUse], at: int) -> None:
        """Processes that are not there any more from that time on."""
        for use in uses:
            if use.stored_at is not None:
                self._batch.snapshots.append((at, use, None, 0))
                use.stored_at = None

    def _close_step(self, gpu: Gpu) -> None:
        if gpu.used.seconds:
            figures = (round(getattr(gpu.used, name), 0 if name.endswith("_j") else 1) for name in USAGE)
            self._batch.usage.append((gpu.step, gpu.id, *figures))
            gpu.used = GpuUse()

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
        ledger = self._processes.ledger(*group)
        process = self._processes.by_key.get((pid, key_of(first, name)))
        if process is not None:
            self._processes.with_uses(process)
            if process.whole.sample_count >= ledger.sample_count:
                return "imported"
        verdict: Verdict = "taken" if process is None else "imported"
        if process is None:
            process = Process(pid, name, first, key_of(first, name), ledger)
            self._batch.new.append(process)
            self._processes.by_key[pid, process.key] = process
        process.ledger = ledger
        for one in group:
            counted = self._processes.ledger(one)
            use = process.uses.get(one.place_id)
            if use is None:
                gpu = self._there[one.place_id].gpu
                use = PlacedUse(
                    0, gpu, KIND, counted, Work(last_busy=one.last_seen), one.first_seen, process=process
                )
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
        if until is not None and (rows := self._rows) is not None:
            rows.in_transaction(lambda connection: rows.note(connection, until))

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
            self._close_step(there.gpu)
        self._batch = Batch()
        if following is not None:
            ended = [who for who, run in self._runs.items() if following - run.last > UNSEEN_S]
            for who in ended:
                del self._runs[who]
        rows = self._rows
        if rows is None or not (batch.ticks or batch.uses):
            self._let_go(batch)
            return
        ids = rows.in_transaction(lambda connection: rows.commit(connection, batch, self._level))
        for process, number in ids.items():
            process.id = number
        self._let_go(batch)
        if self._live:
            database.checkpoint(rows.engine)
            time.sleep(TURN_S)

    def _let_go(self, batch: Batch) -> None:
        for use in batch.uses:
            use.hours = {}


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
