"""Writes the batches of an import: one batch is one transaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import OperationalError

from gpumon_core.legacy_import.import_records import (
    LEVELS,
    READINGS,
    Batch,
    ImportedProcess,
    ImportSource,
    TargetHost,
)
from gpumon_core.store import database, rollups
from gpumon_core.store.accounting import LEDGER, PROCESS_KEYS, UNKNOWN_PROGRAM, USAGE, WORK, Ledger
from gpumon_core.store.bulk import Bulk, Row, adding, replacing, setting, upsert
from gpumon_core.store.schema import (
    RetentionLevel,
    gpu_metrics,
    gpu_processes,
    gpu_usage,
    imported_files,
    imports,
    process_gpus,
    process_snapshots,
)
from gpumon_core.store.statements import hours_bulk

# The longest wait for a lock that another program holds, in all.
LOCKED_S = 60.0
RETRY_S = 0.1

T = TypeVar("T")
NO_MORE: tuple[None, ...] = (None,) * (len(PROCESS_KEYS) - 1)


class BatchWriter:
    """Writes for an import that began at `now` (UTC seconds). Methods raise sqlalchemy.exc.DBAPIError."""

    def __init__(self, engine: Engine, host: TargetHost, source: ImportSource, now: int) -> None:
        self.engine, self._host, self._source, self._now = engine, host, source, now
        dialect = engine.dialect
        only_new = upsert(dialect, gpu_metrics).on_conflict_do_nothing()
        self._add_metrics = Bulk(dialect, only_new, ["gpu_id", "timestamp_epoch", *READINGS])
        names = [name + suffix for name in READINGS for suffix in ("", "_min", "_max")]
        self._add_buckets = {
            level: Bulk(
                dialect,
                upsert(dialect, table).on_conflict_do_nothing(),
                ["gpu_id", "timestamp_epoch", "samples", *names],
            )
            for level, (table, _) in LEVELS.items()
            if level != "raw"
        }
        columns = ["timestamp_epoch", "process_id", "gpu_id", *PROCESS_KEYS, "present"]
        self._add_snapshots = Bulk(dialect, replacing(dialect, process_snapshots), columns)
        columns = ["host_id", "pid", "start_key", "name", "first_seen", *LEDGER]
        self._add_processes = Bulk(dialect, gpu_processes.insert(), columns)
        self._set_processes = setting(dialect, gpu_processes, LEDGER)
        columns = ["process_id", "gpu_id", "kind", "first_seen", *LEDGER, "active", *WORK, *PROCESS_KEYS]
        self._set_uses = Bulk(dialect, replacing(dialect, process_gpus), columns)
        self._add_hours = hours_bulk(dialect)
        self._add_usage = Bulk(dialect, adding(dialect, gpu_usage), ["timestamp_epoch", "gpu_id", *USAGE])
        columns = ["gpu_id", "first", "last", "ticks", "source", "imported_at"]
        self._set_ranges = Bulk(dialect, replacing(dialect, imports), columns)
        columns = ["gpu_id", "source", "source_index", "until", "imported_at"]
        self._set_files = Bulk(dialect, replacing(dialect, imported_files), columns)

    def in_transaction(self, action: Callable[[Connection], T]) -> T:
        """Run an action in one transaction; again, while another program holds the lock."""
        deadline = time.monotonic() + LOCKED_S
        while True:
            try:
                with self.engine.begin() as connection:
                    return action(connection)
            except OperationalError as error:
                # Another program is writing, or PostgreSQL ended a deadlock: this one can wait.
                if not database.is_busy(error) or time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_S)

    def note_read(self, connection: Connection, until: int) -> None:
        """Store up to when the file was read."""
        path, indices = self._source.path, self._source.indices
        self._set_files.run(
            connection, [(gpu_id, path, index, until, self._now) for gpu_id, index in sorted(indices.items())]
        )

    def commit(self, connection: Connection, batch: Batch, level: RetentionLevel) -> dict[ImportedProcess, int]:
        """Write a batch, its readings as rows of `level`. Returns the ids of the new processes."""
        host_id = self._host.id
        if host_id is None:
            raise ValueError("an import needs a host that is in the database")
        ids = self._insert(connection, batch.new)

        def number(process: ImportedProcess) -> int:
            return process.id if process.id is not None else ids[process]

        self._add_metrics.run(connection, batch.metrics)
        if level != "raw":
            self._add_buckets[level].run(connection, batch.buckets)
        rows: list[Row] = [
            (at, number(use.process), use.gpu.id, memory, *NO_MORE, present)
            for at, use, memory, present in batch.snapshots
        ]
        self._add_snapshots.run(connection, rows)
        processes = {use.process for use in batch.uses}
        self._set_processes.run(connection, [(*_figures(process.total), number(process)) for process in processes])
        self._set_uses.run(
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
        self._set_ranges.run(
            connection,
            [
                (gpu_id, imported.first, imported.last, imported.ticks, self._source.name, self._now)
                for (gpu_id, _), imported in batch.ranges.items()
            ],
        )
        if batch.ticks:
            self.note_read(connection, batch.last)
        if batch.metrics or batch.buckets:
            source = LEVELS[level][0]
            rollups.renew(connection, host_id, source, batch.first, batch.last, self._host.interval_s)
        return ids

    def _insert(self, connection: Connection, processes: Sequence[ImportedProcess]) -> dict[ImportedProcess, int]:
        if not processes:
            return {}
        newest = connection.execute(sa.select(sa.func.max(gpu_processes.c.id))).scalar() or 0
        self._add_processes.run(
            connection,
            [
                (self._host.id, one.pid, one.key, one.name, one.first_seen, *_figures(one.total))
                for one in processes
            ],
        )
        query = sa.select(gpu_processes.c.id, gpu_processes.c.pid, gpu_processes.c.start_key).where(
            gpu_processes.c.id > newest, gpu_processes.c.host_id == self._host.id
        )
        numbers = {(pid, key): number for number, pid, key in connection.execute(query)}
        return {one: numbers[one.pid, one.key] for one in processes}


def _figures(ledger: Ledger) -> tuple[Any, ...]:
    return ledger.last_seen, ledger.max_memory, ledger.avg_memory, ledger.sample_count, ledger.seconds
