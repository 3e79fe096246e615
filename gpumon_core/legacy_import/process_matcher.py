"""Finds the process that a PID and a name mean at a time: the original records no more of a process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import sqlalchemy as sa

from gpumon_core.legacy_import.import_records import Batch, ImportedProcess, ImportedUse
from gpumon_core.legacy_import.recorded_history import Read
from gpumon_core.store.accounting import LEDGER, WORK, Gpu, Ledger, Work
from gpumon_core.store.schema import IMPORTED, gpu_processes, process_gpus

# The original lists compute processes, and does not record their kind.
KIND = "C"


@dataclass(slots=True, eq=False)
class ProcessRun:
    """A program under its PID, until it has ended. `number` is the number of the last tick that had it."""

    started: int
    last: int
    number: int
    process: ImportedProcess | None = None


@dataclass(frozen=True, slots=True)
class CountedProcess:
    """A process, or the first part of its life, without snapshots: the original has only its totals.

    `first_snapshot` is when its snapshots begin, None where it has none. The rest is as in gpu_processes.
    """

    gpu_id: int
    pid: int
    name: str
    first_seen: int
    last_seen: int
    max_memory: int | None
    avg_memory: float | None
    sample_count: int
    first_snapshot: int | None = None


class ProcessMatcher:
    """The processes of a host that were imported, by an earlier run or by this one.

    `gpus` are those that get the history, by their ids. In the original's file `interval_s` is the usual time
    between two ticks, and `gap_s` the longest that is no gap.
    """

    def __init__(
        self,
        read: Read,
        host_id: int | None,
        gpus: Mapping[int, Gpu],
        gap_s: float,
        interval_s: float,
    ) -> None:
        self._read, self._host_id, self._gpus = read, host_id, gpus
        self._gap_s, self._interval_s = gap_s, interval_s
        self._expected: dict[tuple[int, str], list[CountedProcess]] = {}
        # Processes that an earlier run imported, by PID and name, and by PID and key.
        self._imported: dict[tuple[int, str], list[ImportedProcess]] = {}
        self.by_key: dict[tuple[int, str], ImportedProcess] = {}
        for process in self._imported_processes():
            self._imported.setdefault((process.pid, process.name), []).append(process)
            self.by_key[process.pid, process.key] = process

    def _imported_processes(self) -> list[ImportedProcess]:
        names = ("id", "pid", "name", "first_seen", "start_key", *LEDGER)
        query = sa.select(*(gpu_processes.c[name] for name in names)).where(
            gpu_processes.c.host_id == self._host_id, gpu_processes.c.start_key.startswith(IMPORTED)
        )
        return [
            ImportedProcess(pid, name or "", first, key, Ledger(*ledger), number)
            for number, pid, name, first, key, *ledger in self._read(query)
        ]

    def expect(self, counted: CountedProcess) -> None:
        """Announce a process that was counted before its first snapshot."""
        self._expected.setdefault((counted.pid, counted.name), []).append(counted)

    def find_use(self, run: ProcessRun, gpu_id: int, pid: int, name: str, at: int, batch: Batch) -> ImportedUse:
        """The use of a GPU by a process that this run has not met on that GPU yet. A new process goes into the
        batch."""
        process = run.process
        if process is None:
            process = run.process = self._match(run, pid, name, at) or self._new(run, pid, name, at, batch)
        use = process.uses.get(gpu_id)
        if use is None:
            counted = next(
                (one for one in self._earlier(run, pid, name) if one.gpu_id == gpu_id),
                None,
            )
            first = at if counted is None else counted.first_seen
            ledger = Ledger(at) if counted is None else self.ledger(counted)
            if len(process.uses) == 1:
                # From now on the total is more than this one use.
                process.ledger = replace(process.total)
            use = ImportedUse(0, self._gpus[gpu_id], KIND, ledger, Work(last_busy=at), first, process=process)
            process.uses[gpu_id] = use
        return use

    def _earlier(self, run: ProcessRun, pid: int, name: str) -> list[CountedProcess]:
        """The counted parts of a process whose snapshots begin with this run, one a GPU."""
        return [
            one
            for one in self._expected.get((pid, name), ())
            if one.first_snapshot is not None and abs(one.first_snapshot - run.started) <= self._gap_s
        ]

    def _match(self, run: ProcessRun, pid: int, name: str, at: int) -> ImportedProcess | None:
        """The process that an earlier import made of the same run."""
        for process in self._imported.get((pid, name), ()):
            ledger = process.total if process.uses else process.ledger
            if process.first_seen <= at and ledger.last_seen >= run.started - self._gap_s:
                return self.with_uses(process)
        for counted in self._earlier(run, pid, name)[:1]:
            found = self.by_key.get((pid, key_of(counted.first_seen, name)))
            return None if found is None else self.with_uses(found)
        return None

    def _new(self, run: ProcessRun, pid: int, name: str, at: int, batch: Batch) -> ImportedProcess:
        earlier = self._earlier(run, pid, name)
        first = min((counted.first_seen for counted in earlier), default=at)
        ledger = Ledger(at) if not earlier else self.ledger(*earlier)
        process = ImportedProcess(pid, name, first, key_of(first, name), ledger)
        known = self.by_key.setdefault((pid, process.key), process)
        if known is not process:
            return self.with_uses(known)
        batch.new.append(process)
        return process

    def with_uses(self, process: ImportedProcess) -> ImportedProcess:
        """The process with its uses of the GPUs, read from the database where this run has not read them yet."""
        if not process.uses:
            query = sa.select(process_gpus).where(process_gpus.c.process_id == process.id)
            for row in self._read(query):
                gpu = self._gpus.get(row.gpu_id) or Gpu(row.gpu_id, "ok")
                ledger = Ledger(*(getattr(row, name) for name in LEDGER))
                work = Work(**{name: getattr(row, name) for name in WORK})
                work.last_busy = work.last_busy or row.last_seen
                use = ImportedUse(row.process_id, gpu, row.kind, ledger, work, row.first_seen, process=process)
                process.uses[row.gpu_id] = use
        return process

    def ledger(self, *parts: CountedProcess) -> Ledger:
        """The totals of a process over all of its GPUs."""
        most = [counted.max_memory for counted in parts if counted.max_memory is not None]
        means = [counted.avg_memory for counted in parts if counted.avg_memory is not None]
        samples = max(counted.sample_count for counted in parts)
        first, last = min(counted.first_seen for counted in parts), max(counted.last_seen for counted in parts)
        seconds = min(samples * self._interval_s, last - first + self._interval_s)
        return Ledger(last, sum(most) if most else None, sum(means) if means else None, samples, seconds)


def key_of(first_seen: int, name: str) -> str:
    """The start_key of an imported process, whose start time is not known: it marks the import and the process."""
    digest = hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=6).hexdigest()
    return f"{IMPORTED}{first_seen} {digest}"
