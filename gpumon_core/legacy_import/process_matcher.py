"""Which process a PID and a name are at a time, where another program tells of no more than that."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from gpumon_core.legacy_import.import_records import Batch, PlacedUse, Process
from gpumon_core.store.accounting import LEDGER, WORK, Gpu, Ledger, Work
from gpumon_core.store.schema import IMPORTED, gpu_processes, process_gpus

# It lists processes that compute, and does not say of what kind they are.
KIND = "C"


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


class Processes:
    """Those of a host that were imported, before or now.

    `read` asks the database; `gpus` are those that are placed, by their ids. Of the program that tells of them,
    `interval_s` is the usual time between two ticks, `gap_s` the longest that is no gap.
    """

    def __init__(
        self,
        read: Callable[[sa.Select[Any]], Sequence[Any]],
        host_id: int | None,
        gpus: Mapping[int, Gpu],
        gap_s: float,
        interval_s: float,
    ) -> None:
        self._read, self._host_id, self._gpus = read, host_id, gpus
        self._gap_s, self._interval_s = gap_s, interval_s
        self._before: dict[tuple[int, str], list[Before]] = {}
        # Processes that were imported before, by PID and name, and by their key.
        self._known: dict[tuple[int, str], list[Process]] = {}
        self.by_key: dict[tuple[int, str], Process] = {}
        for process in self._imported_processes():
            self._known.setdefault((process.pid, process.name), []).append(process)
            self.by_key[process.pid, process.key] = process

    def _imported_processes(self) -> list[Process]:
        names = ("id", "pid", "name", "first_seen", "start_key", *LEDGER)
        query = sa.select(*(gpu_processes.c[name] for name in names)).where(
            gpu_processes.c.host_id == self._host_id, gpu_processes.c.start_key.startswith(IMPORTED)
        )
        return [
            Process(pid, name or "", first, key, Ledger(*ledger), number)
            for number, pid, name, first, key, *ledger in self._read(query)
        ]

    def expect(self, before: Iterable[Before]) -> None:
        """Processes of which the snapshots to come tell only the rest."""
        for known in before:
            self._before.setdefault((known.pid, known.name), []).append(known)

    def find_use(self, run: Run, place_id: int, pid: int, name: str, at: int, batch: Batch) -> PlacedUse:
        """A process on a GPU where it was not placed yet in this run; one that is new is put into the batch."""
        process = run.process
        if process is None:
            process = run.process = self._match(run, pid, name, at) or self._new(run, pid, name, at, batch)
        use = process.uses.get(place_id)
        if use is None:
            known = next(
                (one for one in self._before.get((pid, name), ()) if self._goes_on(one, run, place_id)), None
            )
            first = at if known is None else known.first_seen
            ledger = Ledger(at) if known is None else self.ledger(known)
            if len(process.uses) == 1:
                # From now on the whole is more than its part.
                process.ledger = replace(process.whole)
            use = PlacedUse(0, self._gpus[place_id], KIND, ledger, Work(last_busy=at), first, process=process)
            process.uses[place_id] = use
        return use

    def _goes_on(self, known: Before, run: Run, place_id: int | None) -> bool:
        """Whether a process of before is the one whose snapshots begin with this run."""
        same = place_id is None or known.place_id == place_id
        return same and known.since is not None and abs(known.since - run.started) <= self._gap_s

    def _match(self, run: Run, pid: int, name: str, at: int) -> Process | None:
        """The process that an import before this one took for the same run."""
        for process in self._known.get((pid, name), ()):
            ledger = process.whole if process.uses else process.ledger
            if process.first_seen <= at and ledger.last_seen >= run.started - self._gap_s:
                return self.with_uses(process)
        for known in self._before.get((pid, name), ()):
            if self._goes_on(known, run, None):
                found = self.by_key.get((pid, key_of(known.first_seen, name)))
                return None if found is None else self.with_uses(found)
        return None

    def _new(self, run: Run, pid: int, name: str, at: int, batch: Batch) -> Process:
        before = [known for known in self._before.get((pid, name), ()) if self._goes_on(known, run, None)]
        first = min((known.first_seen for known in before), default=at)
        ledger = Ledger(at) if not before else self.ledger(*before)
        process = Process(pid, name, first, key_of(first, name), ledger)
        known = self.by_key.setdefault((pid, process.key), process)
        if known is not process:
            return self.with_uses(known)
        batch.new.append(process)
        return process

    def with_uses(self, process: Process) -> Process:
        """With what it did on its GPUs, as far as that is placed here."""
        if not process.uses:
            query = sa.select(process_gpus).where(process_gpus.c.process_id == process.id)
            for row in self._read(query):
                gpu = self._gpus.get(row.gpu_id) or Gpu(row.gpu_id, "ok")
                ledger = Ledger(*(getattr(row, name) for name in LEDGER))
                work = Work(**{name: getattr(row, name) for name in WORK})
                work.last_busy = work.last_busy or row.last_seen
                use = PlacedUse(row.process_id, gpu, row.kind, ledger, work, row.first_seen, process=process)
                process.uses[row.gpu_id] = use
        return process

    def ledger(self, *parts: Before) -> Ledger:
        """What was counted of a process, on all of its GPUs together."""
        most = [known.max_memory for known in parts if known.max_memory is not None]
        means = [known.avg_memory for known in parts if known.avg_memory is not None]
        samples = max(known.sample_count for known in parts)
        first, last = min(known.first_seen for known in parts), max(known.last_seen for known in parts)
        seconds = min(samples * self._interval_s, last - first + self._interval_s)
        return Ledger(last, sum(most) if most else None, sum(means) if means else None, samples, seconds)


def key_of(first_seen: int, name: str) -> str:
    """The start_key of a process whose start is not known: what tells it apart, and where it is from."""
    digest = hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=6).hexdigest()
    return f"{IMPORTED}{first_seen} {digest}"
