"""Merges the original's ticks into the history of this host's GPUs, and never changes what gpumon recorded.

Each tick is written at the finest level that is stored for its time; the rollups make the coarser ones. The same
transaction notes in `imports` which ticks it wrote, so that the next run continues one that was interrupted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from gpumon_core.legacy_import.batch_writer import NO_MORE, BatchWriter
from gpumon_core.legacy_import.import_records import (
    LEVELS,
    MEMORY,
    POWER,
    READINGS,
    UTILIZATION,
    Batch,
    ImportedProcess,
    ImportedRange,
    ImportedUse,
    ImportSource,
    OriginalReading,
    SeenProcess,
    TargetGpu,
    TargetHost,
    TickOutcome,
)
from gpumon_core.legacy_import.process_matcher import KIND, CountedProcess, ProcessMatcher, ProcessRun, key_of
from gpumon_core.legacy_import.recorded_history import RecordedHistory, StoredLevels
from gpumon_core.metrics import GPU_METRICS_BY_KEY
from gpumon_core.store import database
from gpumon_core.store.accounting import (
    HEARTBEAT_S,
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
from gpumon_core.store.retention import RetentionDays
from gpumon_core.store.schema import RetentionLevel, scale

# The factor with which a rollup stores each value of a reading.
SCALES = tuple(scale(GPU_METRICS_BY_KEY[name]) for name in READINGS)
# A process has ended when this many ticks lack it, or when no tick had it for so long.
MISSED_TICKS = 3
UNSEEN_S = 600
# About so many rows make one transaction, which holds the write lock for some ten milliseconds.
BATCH_ROWS = 5000
BATCH_TICKS = 2000
# The pause between two transactions in which a recorder can write. SQLite looks for a free lock in steps of at
# most 25 ms at first, 50 and 100 ms later: this pause is long enough for the first steps.
RECORDER_PAUSE_S = 0.05


@dataclass(slots=True, eq=False)
class _GpuState:
    """One GPU while ticks are merged into it. `range` is the imported range that the next tick may extend;
    `present` are the processes of the last tick; `bucketed` are the readings of the bucket that begins at
    `bucket`.
    """

    target: TargetGpu
    gpu: Gpu
    history: RecordedHistory
    range: ImportedRange | None = None
    last_tick: int = 0
    present: set[ImportedUse] = field(default_factory=set)
    bucket: int = 0
    bucketed: list[OriginalReading] = field(default_factory=list)


class Merger:
    """Merges the ticks of one host, oldest first. One thread only.

    `read_engine` is None without a database, `write_engine` is None where nothing may be written. With `is_live` a
    recorder writes at the same time, and gets a pause between two transactions. Methods raise
    sqlalchemy.exc.DBAPIError; what was committed before it stays, and the next run continues from there.
    """

    def __init__(
        self,
        read_engine: Engine | None,
        write_engine: Engine | None,
        host: TargetHost,
        targets: Sequence[TargetGpu],
        retention: RetentionDays,
        interval_s: float,
        source: ImportSource,
        now: int,
        is_live: bool = False,
        idle_after_s: float = 600,
    ) -> None:
        self._read_engine, self._interval_s, self._is_live = read_engine, interval_s, is_live
        self._idle_after_s = idle_after_s
        self._levels = StoredLevels(retention, now)
        self.oldest = self._levels.oldest
        # How many ticks, snapshots and processes got which verdict: "ticks taken".
        self.counts: Counter[str] = Counter()
        self._gap_s, own_gap_s = longest_step(interval_s), longest_step(host.interval_s)
        self._gpus = {
            target.id: _GpuState(
                target,
                Gpu(target.id, "ok"),
                RecordedHistory(self._read, target, self._levels, own_gap_s, is_live),
            )
            for target in targets
        }
        self._runs: dict[tuple[int, str], ProcessRun] = {}
        self._number = 0
        gpus = {gpu_id: state.gpu for gpu_id, state in self._gpus.items()}
        self._matcher = ProcessMatcher(self._read, host.id, gpus, self._gap_s, interval_s)
        # The seconds and MiB of one tick, one pair a GPU, of processes on several GPUs.
        self._parts: dict[ImportedProcess, list[tuple[float, int | None]]] = {}
        self._level: RetentionLevel = "raw"
        self._batch = Batch()
        self._writer = None if write_engine is None else BatchWriter(write_engine, host, source, now)

    def _read(self, query: sa.Select[Any]) -> Sequence[Any]:
        if self._read_engine is None:
            return ()
        with self._read_engine.connect() as connection:
            return connection.execute(query).all()

    def expect(self, counted: CountedProcess) -> None:
        """Announce a process that was counted before its first snapshot."""
        self._matcher.expect(counted)

    def merge_tick(
        self, at: int, readings: Mapping[int, OriginalReading], processes: Sequence[SeenProcess]
    ) -> None:
        """Merge a tick: its readings, by the GPU's id, and the processes on these GPUs."""
        self._number += 1
        level = self._levels.at(at)
        if level != self._level or self._is_full(at):
            self._flush(at)
        self._level = level
        verdicts: dict[int, TickOutcome] = {}
        for gpu_id in {*readings, *(process[0] for process in processes)}:
            state = self._gpus[gpu_id]
            verdict = verdicts[gpu_id] = state.history.judge(at)
            if gpu_id in readings:
                self.counts[f"ticks {verdict}"] += 1
            if verdict != "taken":
                state.range = None
        uses = self._merge_processes(at, processes, verdicts)
        for gpu_id, verdict in verdicts.items():
            if verdict == "taken":
                self._merge_gpu(self._gpus[gpu_id], at, readings.get(gpu_id), uses.get(gpu_id, {}))
        for process, parts in self._parts.items():
            known = [memory for _, memory in parts if memory is not None]
            process.ledger.add(at, max(dt for dt, _ in parts), sum(known) if known else None)
        self._parts.clear()
        batch = self._batch
        batch.first, batch.last = batch.first or at, at
        batch.ticks += 1

    def _is_full(self, at: int) -> bool:
        """Whether the batch is large enough for a transaction and may end here: a bucket is written once."""
        length = LEVELS[self._level][1]
        if at // length == self._batch.last // length:
            return False
        full = BATCH_ROWS // 2 if self._is_live else BATCH_ROWS
        return self._batch.rows >= full or self._batch.ticks >= BATCH_TICKS

    def _merge_processes(
        self,
        at: int,
        processes: Sequence[SeenProcess],
        verdicts: Mapping[int, TickOutcome],
    ) -> dict[int, dict[ImportedUse, int | None]]:
        """The MiB of each process, by GPU."""
        uses: dict[int, dict[ImportedUse, int | None]] = {}
        number, runs, gap = self._number, self._runs, self._gap_s
        counted, new = dict.fromkeys(verdicts.values(), 0), len(self._batch.new)
        for gpu_id, pid, name, memory in processes:
            run = runs.get((pid, name))
            if run is None or (
                run.number != number
                and ((number - run.number > MISSED_TICKS and at - run.last > gap) or at - run.last > UNSEEN_S)
            ):
                run = runs[pid, name] = ProcessRun(at, at, number)
            run.last, run.number = at, number
            verdict = verdicts[gpu_id]
            counted[verdict] += 1
            if verdict == "taken":
                use = None if run.process is None else run.process.uses.get(gpu_id)
                if use is None:
                    use = self._matcher.find_use(run, gpu_id, pid, name, at, self._batch)
                on_gpu = uses.get(gpu_id)
                if on_gpu is None:
                    uses[gpu_id] = {use: memory}
                else:
                    on_gpu[use] = memory
        for verdict, count in counted.items():
            self.counts[f"snapshots {verdict}"] += count
        self.counts["processes taken"] += len(self._batch.new) - new
        return uses

    def _merge_gpu(
        self, state: _GpuState, at: int, reading: OriginalReading | None, memory_of: dict[ImportedUse, int | None]
    ) -> None:
        gpu, target, batch = state.gpu, state.target, self._batch
        since = at - state.last_tick
        is_gap = not 0 < since <= self._gap_s
        if is_gap and state.present:
            self._end_uses(state.present, state.last_tick + max(1, round(self._interval_s)))
            state.present = set()
        dt = self._interval_s if is_gap else float(since)
        self._add_reading(state, at, reading)
        power = reading[POWER] if reading is not None else None
        gpu.utilization = reading[UTILIZATION] if reading is not None else None
        gpu.tick_j = power * dt if power is not None and target.lacks_energy_at(at) else 0.0
        is_raw = self._level == "raw"
        uses: list[Use] = []
        for use, reported in memory_of.items():
            memory = None if self._is_too_much(target, reported) else reported
            stored_at = use.stored_at
            if memory != use.now[0] or stored_at is None or at - stored_at >= HEARTBEAT_S:
                use.now = (memory, *NO_MORE)
                if is_raw:
                    batch.snapshots.append((at, use, memory, 1))
                    use.stored_at = at
            use.ledger.add(at, dt, memory)
            uses.append(use)
            if len(use.process.uses) > 1:
                self._parts.setdefault(use.process, []).append((dt, memory))
        batch.uses.update(memory_of)
        if state.present and (ended := state.present - memory_of.keys()):
            self._end_uses(ended, at)
        state.present = set(memory_of)
        part = share_out(gpu, uses, at, dt, self._idle_after_s, is_gap) if uses else 0.0
        if reading is not None:
            for step, seconds in spans(at, dt):
                if gpu.step != step:
                    self._close_step(gpu)
                    gpu.step = step
                account(gpu, uses, part, dt, seconds)
        state.last_tick = at

    def _is_too_much(self, target: TargetGpu, memory_mib: float | None) -> bool:
        """Whether a value is more than the memory of the GPU; counts those that are."""
        if memory_mib is None or not target.memory_total_mib or memory_mib <= target.memory_total_mib:
            return False
        self.counts["too much memory"] += 1
        return True

    def _add_reading(self, state: _GpuState, at: int, reading: OriginalReading | None) -> None:
        """Put a reading into the batch, and note that its time was imported."""
        batch, target = self._batch, state.target
        if reading is not None:
            if self._is_too_much(target, reading[MEMORY]):
                reading = (*reading[:MEMORY], None, *reading[MEMORY + 1 :])
            if self._level == "raw":
                batch.metrics.append((target.id, at, *(_stored(reading))))
            else:
                length = LEVELS[self._level][1]
                if state.bucketed and at - at % length != state.bucket:
                    batch.buckets.append(_bucket(state))
                state.bucket = at - at % length
                state.bucketed.append(reading)
        imported = state.range
        if imported is None or at - imported.last > self._gap_s:
            imported = state.history.last_range(at)
            if imported is None or at - imported.last > self._gap_s:
                imported = ImportedRange(at, at, 0)
                state.history.add(imported)
            state.range = imported
        imported.last = at
        imported.ticks += 1
        batch.ranges[target.id, imported.first] = imported

    def _end_uses(self, uses: Iterable[ImportedUse], at: int) -> None:
        """Write that processes are no longer on a GPU from that time on."""
        for use in uses:
            if use.stored_at is not None:
                self._batch.snapshots.append((at, use, None, 0))
                use.stored_at = None

    def _close_step(self, gpu: Gpu) -> None:
        if gpu.used.seconds:
            figures = (round(getattr(gpu.used, name), 0 if name.endswith("_j") else 1) for name in USAGE)
            self._batch.usage.append((gpu.step, gpu.id, *figures))
            gpu.used = GpuUse()

    def merge_counted(self, counted: Sequence[CountedProcess]) -> None:
        """Merge processes that have no snapshots. All have one PID and name: those that overlap in time are one
        process on several GPUs."""
        groups: list[list[CountedProcess]] = []
        for one in sorted(counted, key=lambda one: one.first_seen):
            if groups and one.first_seen <= max(other.last_seen for other in groups[-1]):
                groups[-1].append(one)
            else:
                groups.append([one])
        for group in groups:
            verdict = self._merge_group(group)
            self.counts[f"processes {verdict}"] += 1

    def _merge_group(self, group: Sequence[CountedProcess]) -> TickOutcome:
        if max(one.last_seen for one in group) < self._levels.ledger_since:
            return "old"
        ends = [(self._gpus[one.gpu_id].history, at) for one in group for at in (one.first_seen, one.last_seen)]
        if all(history.judge(at) == "recorded" for history, at in ends):
            return "recorded"
        first, pid, name = min(one.first_seen for one in group), group[0].pid, group[0].name
        ledger = self._matcher.ledger(*group)
        process = self._matcher.by_key.get((pid, key_of(first, name)))
        if process is not None:
            self._matcher.with_uses(process)
            if process.total.sample_count >= ledger.sample_count:
                return "imported"
        verdict: TickOutcome = "taken" if process is None else "imported"
        if process is None:
            process = ImportedProcess(pid, name, first, key_of(first, name), ledger)
            self._batch.new.append(process)
            self._matcher.by_key[pid, process.key] = process
        process.ledger = ledger
        for one in group:
            part = self._matcher.ledger(one)
            use = process.uses.get(one.gpu_id)
            if use is None:
                gpu = self._gpus[one.gpu_id].gpu
                use = ImportedUse(
                    0, gpu, KIND, part, Work(last_busy=one.last_seen), one.first_seen, process=process
                )
                process.uses[one.gpu_id] = use
            use.ledger = part
            self._batch.uses.add(use)
        if self._batch.rows + len(self._batch.uses) >= BATCH_ROWS:
            self._flush(None)
        return verdict

    def finish(self, until: int | None) -> None:
        """Commit the rest. `until` is the time up to which the file was read; None where it was not read to its
        end."""
        self._flush(None)
        if until is not None and (writer := self._writer) is not None:
            writer.in_transaction(lambda connection: writer.note_read(connection, until))

    def _flush(self, next_tick: int | None) -> None:
        """Commit the batch so that it is complete without a following one; `next_tick` is the time of the next."""
        batch = self._batch
        for state in self._gpus.values():
            if state.bucketed:
                batch.buckets.append(_bucket(state))
            end = state.last_tick + max(1, round(self._interval_s))
            if next_tick is not None and 0 < next_tick - state.last_tick <= self._gap_s:
                end = next_tick
            self._end_uses(state.present, end)
            self._close_step(state.gpu)
        self._batch = Batch()
        if next_tick is not None:
            self._runs = {who: run for who, run in self._runs.items() if next_tick - run.last <= UNSEEN_S}
        writer = self._writer
        if writer is not None and (batch.ticks or batch.uses):
            ids = writer.in_transaction(lambda connection: writer.commit(connection, batch, self._level))
            for process, number in ids.items():
                process.id = number
            if self._is_live:
                database.checkpoint(writer.engine)
                time.sleep(RECORDER_PAUSE_S)
        for use in batch.uses:
            use.hours = {}


def _stored(reading: OriginalReading) -> Iterable[float | None]:
    memory = reading[MEMORY]
    return (*reading[:MEMORY], None if memory is None else round(memory), *reading[MEMORY + 1 :])


def _bucket(state: _GpuState) -> Row:
    """The row of the bucket that a GPU's readings filled; the bucket is empty afterwards."""
    row: list[Any] = [state.target.id, state.bucket, len(state.bucketed)]
    for values, factor in zip(zip(*state.bucketed, strict=True), SCALES, strict=True):
        known = [value for value in values if value is not None]
        mean = sum(known) / len(known) if known else None
        row += [
            None if value is None else round(value * factor)
            for value in (mean, min(known, default=None), max(known, default=None))
        ]
    state.bucketed = []
    return tuple(row)
