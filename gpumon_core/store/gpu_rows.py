"""The rows of a host and of its GPUs, and what is known of them in memory."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from gpumon_core.store.accounting import Gpu, Moment
from gpumon_core.store.schema import gpu_changes, gpu_metrics, gpus, hosts
from gpumon_core.store.shared_rows import insert
from gpumon_core.telemetry.energy import EnergyCounter, EnergyMeter
from gpumon_core.telemetry.records import NAMELESS, GpuInfo, HostInfo, Snapshot, nameless


class GpuRows:
    """One host and its GPUs; to be made anew after a transaction that may not have happened."""

    def __init__(self, host: str, source: str, interval_s: float) -> None:
        self.host = host
        self._source = source
        self._interval_s = interval_s
        self.host_id: int | None = None
        # What the host's row has as its newest tick.
        self.host_seen = 0
        self._host_info: HostInfo | None = None
        # By UUID.
        self.gpus: dict[str, Gpu] = {}
        self._inventory: tuple[object, ...] | None = None

    def update_host(self, connection: Connection, now: int, info: HostInfo) -> bool:
        """Bring the host's row up to date; whether it was there when it was looked for the first time."""
        if self.host_id is not None and info == self._host_info:
            return False
        facts = {
            "source": self._source,
            "interval_s": self._interval_s,
            "driver_version": info.driver_version,
            "cuda_version": info.cuda_version,
            "nvml_version": info.nvml_version,
        }
        query = sa.select(hosts.c.id, hosts.c.last_seen).where(hosts.c.name == self.host)
        known = connection.execute(query).first()
        is_met = known is not None and self.host_id is None
        if known is None:
            row = {"name": self.host, "first_seen": now, "last_seen": now, **facts}
            self.host_id = insert(connection, hosts, row)
            # Another may have been first.
            query_seen = sa.select(hosts.c.last_seen).where(hosts.c.id == self.host_id)
            self.host_seen = connection.execute(query_seen).scalar_one()
        else:
            self.host_id, self.host_seen = int(known.id), known.last_seen
            connection.execute(sa.update(hosts).where(hosts.c.id == known.id).values(facts))
        self._host_info = info
        return is_met

    def newest_tick(self, connection: Connection) -> int:
        """The second of the newest tick of any GPU of the host, 0 where there is none."""
        # One look at the key's end per GPU.
        time = gpu_metrics.c.timestamp_epoch
        mine = connection.execute(sa.select(gpus.c.id).where(gpus.c.host_id == self.host_id)).scalars()
        newest = [
            connection.execute(sa.select(sa.func.max(time)).where(gpu_metrics.c.gpu_id == gpu_id)).scalar()
            for gpu_id in list(mine)
        ]
        return max((int(found) for found in newest if found is not None), default=0)

    def update_gpus(self, connection: Connection, now: int, snapshot: Snapshot) -> None:
        """Bring the rows of `gpus` up to date; a tick like the one before costs nothing."""
        marks = tuple(reading.sampling for reading in snapshot.readings)
        inventory = (
            snapshot.gpus,
            snapshot.lost,
            snapshot.hung,
            snapshot.nameless,
            marks,
            snapshot.asleep,
            snapshot.quiet,
        )
        if inventory == self._inventory:
            return
        if not self.gpus:
            self._load_gpus(connection)
        sampling = {reading.uuid: reading.sampling for reading in snapshot.readings}
        unidentified = self._unidentified(connection, snapshot)
        for info in (*snapshot.gpus, *unidentified):
            state = "lost" if info in unidentified else snapshot.state_of(info.uuid)
            known = self.gpus.get(info.uuid)
            mark = sampling.get(info.uuid, known.sampling if known else None)
            if known is not None and (known.info, known.state, known.sampling) == (info, state, mark):
                continue
            row = {
                "gpu_index": info.index,
                "mig_index": info.mig_index,
                "parent_id": self.gpus[info.parent_uuid].id if info.parent_uuid in self.gpus else None,
                "name": info.name,
                "memory_total_mib": info.memory_total_mib,
                "power_limit_w": info.power_limit_w,
                "pci_bus_id": info.pci_bus_id,
                "architecture": info.architecture,
                "compute_capability": info.compute_capability,
                "state": state,
                "sampling": mark,
                "memory_from": info.memory_from,
            }
            if known is None:
                row |= {"host_id": self.host_id, "uuid": info.uuid, "first_seen": now, "last_seen": now}
                known = self.gpus[info.uuid] = Gpu(insert(connection, gpus, row), state)
            else:
                connection.execute(sa.update(gpus).where(gpus.c.id == known.id).values(row))
            known.info, known.state, known.sampling = info, state, mark
        listed = {info.uuid for info in (*snapshot.gpus, *unidentified)}
        for uuid, gpu in list(self.gpus.items()):
            if uuid in listed:
                continue
            if uuid.startswith(NAMELESS):
                # It has said by now which it is, and no tick speaks of it.
                connection.execute(sa.delete(gpus).where(gpus.c.id == gpu.id))
                del self.gpus[uuid]
                continue
            # A GPU that cannot even be named is the one that had this index.
            was_at = sa.select(gpus.c.gpu_index).where(gpus.c.id == gpu.id)
            here = gpu.state != "gone" and connection.execute(was_at).scalar() in snapshot.nameless
            now_is = "lost" if here else "gone"
            if gpu.state != now_is:
                connection.execute(sa.update(gpus).where(gpus.c.id == gpu.id).values(state=now_is))
                gpu.info, gpu.state = None, now_is
        self._inventory = inventory

    def _unidentified(self, connection: Connection, snapshot: Snapshot) -> tuple[GpuInfo, ...]:
        """GPUs that do not say which they are, where no known GPU had their index."""
        if not snapshot.nameless:
            return ()
        query = sa.select(gpus.c.uuid, gpus.c.gpu_index).where(
            gpus.c.host_id == self.host_id, gpus.c.state != "gone"
        )
        listed = {info.uuid for info in snapshot.gpus}
        taken = {
            index
            for uuid, index in connection.execute(query)
            if uuid not in listed and not uuid.startswith(NAMELESS)
        }
        return tuple(nameless(index) for index in sorted(snapshot.nameless - taken))

    def _load_gpus(self, connection: Connection) -> None:
        mine = gpus.c.host_id == self.host_id
        columns = (
            gpus.c.uuid,
            gpus.c.id,
            gpus.c.state,
            gpus.c.energy_j,
            gpus.c.energy_counter_j,
            gpus.c.energy_from,
            gpus.c.energy_ahead_j,
            gpus.c.last_seen,
        )
        by_id: dict[int, Gpu] = {}
        for row in connection.execute(sa.select(*columns).where(mine)):
            meter = EnergyMeter(EnergyCounter(row.energy_counter_j), row.energy_from is not None)
            meter.ahead_j = row.energy_ahead_j or 0.0
            gpu = Gpu(row.id, row.state, energy_j=row.energy_j or 0.0, meter=meter, energy_from=row.energy_from)
            gpu.read_at = Moment(row.last_seen)
            self.gpus[row.uuid] = by_id[row.id] = gpu
        newest = (
            sa.select(
                gpu_changes.c.gpu_id, gpu_changes.c.metric, sa.func.max(gpu_changes.c.timestamp_epoch).label("at")
            )
            .where(gpu_changes.c.gpu_id.in_(list(by_id)))
            .group_by(gpu_changes.c.gpu_id, gpu_changes.c.metric)
            .subquery()
        )
        query = sa.select(gpu_changes.c.gpu_id, gpu_changes.c.metric, gpu_changes.c.value).join(
            newest,
            sa.and_(
                gpu_changes.c.gpu_id == newest.c.gpu_id,
                gpu_changes.c.metric == newest.c.metric,
                gpu_changes.c.timestamp_epoch == newest.c.at,
            ),
        )
        for gpu_id, metric, value in connection.execute(query):
            by_id[gpu_id].changes[metric] = value
