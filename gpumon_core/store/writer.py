"""Puts ticks into the database: one transaction a tick, whatever the tick holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.store.schema import (
    gpu_metrics,
    gpu_processes,
    gpus,
    hosts,
    process_gpus,
    process_snapshots,
)
from gpumon_core.telemetry.records import GpuInfo, HostInfo, ProcessReading, Snapshot

# A process whose start cannot be read is taken for the same one while it was seen this recently.
UNKNOWN_START_GRACE_S = 60

_HOST = sa.bindparam("this_host", type_=sa.Integer)
_NOW = sa.bindparam("this_tick", type_=sa.BigInteger)


def _ledger_values(table: sa.Table, memory: sa.ColumnElement[Any]) -> dict[str, Any]:
    """How one more sample changes a row of the ledger: the maximum, and the mean so far."""
    mean = sa.func.coalesce(table.c.avg_memory, memory)
    return {
        # The clock may have been set back: a lifetime is never negative.
        "last_seen": sa.case((table.c.last_seen < _NOW, _NOW), else_=table.c.last_seen),
        "max_memory": sa.case((table.c.max_memory >= memory, table.c.max_memory), else_=memory),
        "avg_memory": sa.case(
            (memory.is_(None), table.c.avg_memory), else_=mean + (memory - mean) / (table.c.sample_count + 1.0)
        ),
        "sample_count": table.c.sample_count + 1,
    }


_tick = process_snapshots.alias("tick")
_update_process_gpus = (
    sa.update(process_gpus)
    .where(
        _tick.c.timestamp_epoch == _NOW,
        _tick.c.process_id == process_gpus.c.process_id,
        _tick.c.gpu_id == process_gpus.c.gpu_id,
        process_gpus.c.gpu_id.in_(sa.select(gpus.c.id).where(gpus.c.host_id == _HOST)),
    )
    .values(_ledger_values(process_gpus, _tick.c.memory))
)
_totals = (
    sa.select(process_snapshots.c.process_id, sa.func.sum(process_snapshots.c.memory).label("memory"))
    .where(process_snapshots.c.timestamp_epoch == _NOW)
    .group_by(process_snapshots.c.process_id)
    .subquery("totals")
)
_update_processes = (
    sa.update(gpu_processes)
    .where(gpu_processes.c.id == _totals.c.process_id, gpu_processes.c.host_id == _HOST)
    .values(_ledger_values(gpu_processes, _totals.c.memory))
)
_update_gpus = sa.update(gpus).where(gpus.c.host_id == _HOST, gpus.c.state == "ok").values(last_seen=_NOW)
_update_host = sa.update(hosts).where(hosts.c.id == _HOST).values(last_seen=_NOW)


class Writer:
    """Writes the ticks of one host. Not to be shared between threads."""

    def __init__(self, engine: Engine, host: str, source: str, interval_s: float) -> None:
        self._engine = engine
        self._host = host
        self._source = source
        self._interval_s = interval_s
        self._grace_s = max(UNKNOWN_START_GRACE_S, 3 * interval_s)
        self._forget()

    def _forget(self) -> None:
        """Drop what is known of the database, after a transaction that may not have happened."""
        self._host_id: int | None = None
        self._host_info: HostInfo | None = None
        self._last_tick = 0
        self._gpus: dict[str, tuple[int, GpuInfo | None, str]] = {}
        self._inventory: tuple[tuple[GpuInfo, ...], frozenset[str], frozenset[int]] | None = None
        self._processes: dict[tuple[int, str | None], int] = {}
        self._pairs: dict[tuple[int, int], str] = {}

    def is_new(self) -> bool:
        """Whether the database holds nothing of this host yet."""
        if self._host_id is None:
            with self._engine.connect() as connection:
                return connection.execute(sa.select(hosts.c.id).where(hosts.c.name == self._host)).first() is None
        return False

    def write(self, snapshot: Snapshot, identities: Mapping[int, ProcessIdentity]) -> bool:
        """Commit one tick. False where this second has a tick already (the clock was set back).

        Raises sqlalchemy.exc.DBAPIError, with nothing of the tick written.
        """
        now = int(snapshot.timestamp)
        try:
            with self._engine.begin() as connection:
                return self._write(connection, now, snapshot, identities)
        except BaseException:
            self._forget()
            raise

    def _write(
        self, connection: Connection, now: int, snapshot: Snapshot, identities: Mapping[int, ProcessIdentity]
    ) -> bool:
        host_id = self._know_host(connection, now, snapshot.host)
        if now <= self._last_tick and self._has_tick(connection, host_id, now):
            return False
        self._know_gpus(connection, now, host_id, snapshot)
        if snapshot.readings:
            connection.execute(
                gpu_metrics.insert(),
                [
                    {"gpu_id": self._gpus[reading.uuid][0], "timestamp_epoch": now, **reading.values}
                    for reading in snapshot.readings
                ],
            )
        rows = self._know_processes(connection, now, host_id, snapshot.processes, identities)
        tick = {"this_host": host_id, "this_tick": now}
        if rows:
            connection.execute(process_snapshots.insert(), rows)
            connection.execute(_update_process_gpus, tick)
            connection.execute(_update_processes, tick)
        connection.execute(_update_gpus, tick)
        connection.execute(_update_host, tick)
        self._last_tick = now
        return True

    def _has_tick(self, connection: Connection, host_id: int, now: int) -> bool:
        query = (
            sa.select(gpu_metrics.c.gpu_id)
            .join(gpus, gpus.c.id == gpu_metrics.c.gpu_id)
            .where(gpus.c.host_id == host_id, gpu_metrics.c.timestamp_epoch == now)
        )
        return now == self._last_tick or connection.execute(query.limit(1)).first() is not None

    def _know_host(self, connection: Connection, now: int, info: HostInfo) -> int:
        if self._host_id is not None and info == self._host_info:
            return self._host_id
        facts = {
            "source": self._source,
            "interval_s": self._interval_s,
            "driver_version": info.driver_version,
            "cuda_version": info.cuda_version,
            "nvml_version": info.nvml_version,
        }
        known = connection.execute(
            sa.select(hosts.c.id, hosts.c.last_seen).where(hosts.c.name == self._host)
        ).first()
        if known is None:
            row = {"name": self._host, "first_seen": now, "last_seen": now, **facts}
            host_id = _insert(connection, hosts, row)
        else:
            host_id, self._last_tick = known
            connection.execute(sa.update(hosts).where(hosts.c.id == host_id).values(facts))
        self._host_id, self._host_info = host_id, info
        return int(host_id)

    def _know_gpus(self, connection: Connection, now: int, host_id: int, snapshot: Snapshot) -> None:
        """Bring the rows of `gpus` up to date; a tick like the one before costs nothing."""
        inventory = (snapshot.gpus, snapshot.lost, snapshot.nameless)
        if inventory == self._inventory:
            return
        if not self._gpus:
            found = connection.execute(
                sa.select(gpus.c.uuid, gpus.c.id, gpus.c.state).where(gpus.c.host_id == host_id)
            )
            self._gpus = {uuid: (gpu_id, None, state) for uuid, gpu_id, state in found}
        for info in snapshot.gpus:
            state = "lost" if info.uuid in snapshot.lost else "ok"
            known = self._gpus.get(info.uuid)
            if known is not None and known[1:] == (info, state):
                continue
            row = {
                "gpu_index": info.index,
                "mig_index": info.mig_index,
                "parent_id": self._gpus[info.parent_uuid][0] if info.parent_uuid in self._gpus else None,
                "name": info.name,
                "memory_total_mib": info.memory_total_mib,
                "power_limit_w": info.power_limit_w,
                "pci_bus_id": info.pci_bus_id,
                "architecture": info.architecture,
                "compute_capability": info.compute_capability,
                "state": state,
            }
            if known is None:
                row |= {"host_id": host_id, "uuid": info.uuid, "first_seen": now, "last_seen": now}
                gpu_id = _insert(connection, gpus, row)
            else:
                gpu_id = known[0]
                connection.execute(sa.update(gpus).where(gpus.c.id == gpu_id).values(row))
            self._gpus[info.uuid] = (gpu_id, info, state)
        listed = {info.uuid for info in snapshot.gpus}
        for uuid, (gpu_id, _, state) in self._gpus.items():
            if uuid in listed:
                continue
            # A GPU that cannot even be named is the one that stood in its place.
            was_at = sa.select(gpus.c.gpu_index).where(gpus.c.id == gpu_id)
            here = state != "gone" and connection.execute(was_at).scalar() in snapshot.nameless
            now_is = "lost" if here else "gone"
            if state != now_is:
                connection.execute(sa.update(gpus).where(gpus.c.id == gpu_id).values(state=now_is))
                self._gpus[uuid] = (gpu_id, None, now_is)
        self._inventory = inventory

    def _know_processes(
        self,
        connection: Connection,
        now: int,
        host_id: int,
        processes: tuple[ProcessReading, ...],
        identities: Mapping[int, ProcessIdentity],
    ) -> list[dict[str, Any]]:
        """The tick's rows of process_snapshots, after making sure that the ledger has their processes."""
        rows = []
        if now - self._last_tick > self._grace_s:
            self._processes = {key: known for key, known in self._processes.items() if key[1] is not None}
        seen: dict[tuple[int, str | None], int] = {}
        pairs: dict[tuple[int, int], str] = {}
        for process in processes:
            identity = identities.get(process.pid) or ProcessIdentity(process.pid)
            key = (identity.pid, identity.start_key)
            process_id = seen.get(key) or self._processes.get(key)
            if process_id is None:
                process_id = self._find_or_add(connection, now, host_id, identity)
            seen[key] = process_id
            gpu_id = self._gpus[process.gpu_uuid][0]
            pair = (process_id, gpu_id)
            pairs[pair] = process.kind
            if self._pairs.get(pair) != process.kind:
                self._know_pair(connection, now, pair, process.kind)
            rows.append(
                {"timestamp_epoch": now, "process_id": process_id, "gpu_id": gpu_id, "memory": process.memory_mib}
            )
        # Only what ran in this tick is kept in mind: memory does not grow with the history.
        self._processes, self._pairs = seen, pairs
        return rows

    def _find_or_add(self, connection: Connection, now: int, host_id: int, identity: ProcessIdentity) -> int:
        same = sa.and_(gpu_processes.c.host_id == host_id, gpu_processes.c.pid == identity.pid)
        if identity.start_key is not None:
            query = sa.select(gpu_processes.c.id).where(same, gpu_processes.c.start_key == identity.start_key)
        else:
            query = (
                sa.select(gpu_processes.c.id)
                .where(same, gpu_processes.c.start_key.is_(None))
                .where(gpu_processes.c.last_seen >= now - self._grace_s)
                .order_by(gpu_processes.c.last_seen.desc())
            )
        found = connection.execute(query.limit(1)).scalar()
        if found is not None:
            return int(found)
        row = {
            "host_id": host_id,
            "pid": identity.pid,
            "start_key": identity.start_key,
            "start_time": identity.start_time,
            "name": identity.name,
            "username": identity.user,
            "first_seen": now,
            "last_seen": now,
            "sample_count": 0,
        }
        return _insert(connection, gpu_processes, row)

    def _know_pair(self, connection: Connection, now: int, pair: tuple[int, int], kind: str) -> None:
        process_id, gpu_id = pair
        same = sa.and_(process_gpus.c.process_id == process_id, process_gpus.c.gpu_id == gpu_id)
        known = connection.execute(sa.select(process_gpus.c.kind).where(same)).scalar()
        if known is None:
            row = {
                "process_id": process_id,
                "gpu_id": gpu_id,
                "kind": kind,
                "first_seen": now,
                "last_seen": now,
                "sample_count": 0,
            }
            connection.execute(process_gpus.insert(), row)
        elif known != kind:
            connection.execute(sa.update(process_gpus).where(same).values(kind=kind))


def _insert(connection: Connection, table: sa.Table, row: dict[str, Any]) -> int:
    """Insert a row and return its id."""
    key = connection.execute(table.insert(), row).inserted_primary_key
    if key is None:
        raise RuntimeError(f"{table.name} returned no id")
    return int(key[0])
