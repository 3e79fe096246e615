"""Puts ticks into the database: one transaction a tick, or one for many where many have come together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter, itemgetter
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import OperationalError

from gpumon_core.attribution.records import NOTHING, ProcessIdentity, Program, is_placeholder
from gpumon_core.metrics import CHANGE_METRICS, TICK_COLUMNS, TICK_METRICS, Aggregate
from gpumon_core.store.accounting import (
    GONE,
    HEARTBEAT_S,
    HOUR_S,
    LEDGER,
    PROCESS_KEYS,
    SM,
    UNKNOWN_PROGRAM,
    WORK,
    Gpu,
    GpuUse,
    Ledger,
    Moment,
    Session,
    Use,
    Work,
    account,
    give_to_ended,
    is_mps_server,
    longest_step,
    plus,
    share_out,
    spans,
)
from gpumon_core.store.bulk import Bulk, Row, adding, replacing, upsert
from gpumon_core.store.crash_recovery import known_ledger, known_use, resume
from gpumon_core.store.schema import (
    PROGRAM_COLUMNS,
    gpu_changes,
    gpu_metrics,
    gpu_processes,
    gpu_usage,
    gpus,
    hosts,
    model_sessions,
    process_gpus,
    process_hours,
    process_snapshots,
    programs,
)
from gpumon_core.telemetry.energy import EnergyCounter, EnergyMeter
from gpumon_core.telemetry.records import (
    NAMELESS,
    GpuInfo,
    GpuReading,
    HostInfo,
    ProcessReading,
    Snapshot,
    nameless,
)

# A process whose start cannot be read is taken for the same one while it was seen this recently.
UNKNOWN_START_GRACE_S = 60
# So many rows of processes that go on are brought up to date in the ledger with each tick, in turn: few
# processes are exact at every tick, many cost no more than these. A row's last_seen tells up to where it
# is; what came after is read from the ticks again when a recorder was killed in between.
SETTLED_PER_TICK = 16
IDLE_AFTER_S = 600
# Labels are whole seconds: the wall clock was set where they part by more than this from what has passed.
CLOCK_SET_S = 2.0
# How long a pause may have been of which nothing is known: what a counter grew by in it can be more than any board
# takes in a month only if the counter errs.
UNKNOWN_PAUSE_S = 30 * 86400.0
# What was taken in a pause is spread over so much of it at the most: each half hour of it is a row.
LONGEST_SPREAD_S = 400 * 86400.0
UNRECORDED = ("energy_j", "unrecorded_j")
# What serves a model, and so has sessions of it: a training run has one, too, but does not serve it.
SERVING = ("inference", "image generation")
# A model that becomes known within this time was loaded when its process came.
LOADED_WITHIN_S = 120

# How often the row of a program is looked for and made before giving up.
ATTEMPTS = 5

NOBODY = (NOTHING, UNKNOWN_PROGRAM)

Attributed = tuple[Snapshot, Mapping[int, ProcessIdentity]]
SUMS = ("seconds", "busy_s", "idle_s", "memory_mib_s", "energy_j")
USAGE = tuple(field.name for field in fields(GpuUse))
CHANGE_KEYS = tuple(metric.key for metric in CHANGE_METRICS)


@dataclass(slots=True)
class _Rows:
    """What the ticks of one transaction make."""

    metrics: list[Row] = field(default_factory=list)
    # Of seconds that have a row already.
    again: list[Row] = field(default_factory=list)
    changes: list[Row] = field(default_factory=list)
    snapshots: list[Row] = field(default_factory=list)
    unrecorded: list[Row] = field(default_factory=list)
    # What has come or gone is settled at once.
    moved: dict[tuple[int, int], Use] = field(default_factory=dict)


class ContentReplaced(Exception):
    """The rows that a writer knows are others now, as after a backup was restored into the open database."""


class Writer:
    """Writes the ticks of one host. Not to be shared between threads."""

    def __init__(
        self, engine: Engine, host: str, source: str, interval_s: float, idle_after_s: float = IDLE_AFTER_S
    ) -> None:
        self._engine = engine
        self.host = host
        self.source = source
        self.interval_s = interval_s
        # A process that does nothing for so long is an idle holder of its memory.
        self.idle_after_s = idle_after_s
        # The oldest second written behind a newer one, after the clock was set back: rollups go back to it.
        self.rewritten_from: int | None = None
        self._statements(engine)
        self._forget()

    def _statements(self, engine: Engine) -> None:
        dialect = engine.dialect
        columns = ["gpu_id", "timestamp_epoch", *TICK_COLUMNS, "recorded_ms"]
        self._add_metrics = Bulk(dialect, gpu_metrics.insert(), columns)
        self._merge_metrics = Bulk(dialect, _merging(dialect), columns)
        columns = ["gpu_id", "metric", "timestamp_epoch", "value"]
        self._add_changes = Bulk(dialect, replacing(dialect, gpu_changes), columns)
        columns = ["timestamp_epoch", "process_id", "gpu_id", *PROCESS_KEYS, "present"]
        self._add_snapshots = Bulk(dialect, replacing(dialect, process_snapshots), columns)
        meter = ["last_seen", "energy_j", "energy_counter_j", "energy_from", "energy_ahead_j"]
        self._set_gpus = Bulk(
            dialect,
            sa.update(gpus)
            .where(gpus.c.id == sa.bindparam("this"))
            .values({name: sa.bindparam(f"new_{name}") for name in meter}),
            [*(f"new_{name}" for name in meter), "this"],
        )
        # Only where the row is as this writer left it.
        self._set_host = Bulk(
            dialect,
            sa.update(hosts)
            .where(
                hosts.c.id == sa.bindparam("this"),
                hosts.c.name == sa.bindparam("called"),
                hosts.c.last_seen == sa.bindparam("before"),
            )
            .values(last_seen=sa.bindparam("new")),
            ["new", "this", "called", "before"],
        )
        ledger = [*LEDGER]
        self._set_processes = Bulk(
            dialect,
            sa.update(gpu_processes)
            .where(gpu_processes.c.id == sa.bindparam("this"))
            .values({name: sa.bindparam(f"new_{name}") for name in ledger}),
            [*(f"new_{name}" for name in ledger), "this"],
        )
        pair = [*ledger, "active", *WORK, *PROCESS_KEYS]
        self._set_pairs = Bulk(
            dialect,
            sa.update(process_gpus)
            .where(
                process_gpus.c.process_id == sa.bindparam("this"), process_gpus.c.gpu_id == sa.bindparam("there")
            )
            .values({name: sa.bindparam(f"new_{name}") for name in pair}),
            [*(f"new_{name}" for name in pair), "this", "there"],
        )
        self._add_hours = hours_bulk(dialect)
        columns = ["timestamp_epoch", "gpu_id", *USAGE]
        self._add_usage = Bulk(dialect, adding(dialect, gpu_usage), columns)
        session = [*ledger, "active"]
        self._set_sessions = Bulk(
            dialect,
            sa.update(model_sessions)
            .where(model_sessions.c.id == sa.bindparam("this"))
            .values({name: sa.bindparam(f"new_{name}") for name in session}),
            [*(f"new_{name}" for name in session), "this"],
        )

    def _forget(self) -> None:
        """Drop what is known of the database, after a transaction that may not have happened."""
        self._host_id: int | None = None
        self._host_info: HostInfo | None = None
        # What the host's row has as its newest tick.
        self._host_seen = 0
        # The tick before, and the newest there is: they differ after the clock was set back.
        self._last_tick = 0
        self._newest_tick = 0
        # Up to then, what is read of the ticks may be of time that was recorded twice.
        self._mixed_until = -1
        # The tick before by the clock that nobody sets, of this run of the program.
        self._last_moment: Moment | None = None
        self._gpus: dict[str, Gpu] = {}
        self._inventory: tuple[object, ...] | None = None
        self._processes: dict[tuple[int, str | None], tuple[int, Ledger]] = {}
        # What the processes that run are known to run, by their id in the ledger.
        self._running: dict[int, tuple[Program, int]] = {}
        # Models that have been unloaded, and whose rows are not stored yet.
        self._unloaded: list[Session] = []
        self._live: dict[tuple[int, int], Use] = {}
        # The same by PID and GPU, for those that were there at the tick before.
        self._here: dict[tuple[int, str], Use] = {}
        # Processes that have left, and whose rows of the ledger are not stored yet.
        self._ended: dict[int, Ledger] = {}
        self._resumed = False
        self._turn = 0

    def is_new(self) -> bool:
        """Whether the database holds nothing of this host yet."""
        if self._host_id is None:
            with self._engine.connect() as connection:
                query = sa.select(hosts.c.id).where(hosts.c.name == self.host)
                return connection.execute(query).first() is None
        return False

    @property
    def host_id(self) -> int | None:
        """The host's row, once something was written."""
        return self._host_id

    def write(self, snapshot: Snapshot, identities: Mapping[int, ProcessIdentity]) -> bool:
        """Commit one tick; whether it was written.

        A second that has a tick already (the clock was set back) speaks of both from then on. Raises
        sqlalchemy.exc.DBAPIError, with nothing of the tick written.
        """
        return self.write_all([(snapshot, identities)]) == 1

    def write_all(self, ticks: Sequence[Attributed]) -> int:
        """Commit several ticks, oldest first, in one transaction; how many were written.

        Raises sqlalchemy.exc.DBAPIError, and ContentReplaced, after which the same may be tried again; nothing of
        them is written then.
        """
        try:
            with self._engine.begin() as connection:
                return self._write(connection, ticks)
        except BaseException:
            self._forget()
            raise

    def settle(self) -> None:
        """Bring the ledger up to the newest tick, as before closing. Raises sqlalchemy.exc.DBAPIError."""
        try:
            with self._engine.begin() as connection:
                self._settle(connection, list(self._live.values()))
        except BaseException:
            self._forget()
            raise

    def last_seen(self) -> int | None:
        """The second of this host's newest tick in the database, whoever wrote it; None where there is none.
        Raises sqlalchemy.exc.DBAPIError."""
        with self._engine.connect() as connection:
            query = sa.select(hosts.c.last_seen).where(hosts.c.name == self.host)
            found: int | None = connection.execute(query).scalar()
        return found

    def refuses(self, identity: ProcessIdentity) -> bool:
        """Whether the database does not take what is known of a process: it is tried, and undone. Raises
        sqlalchemy.exc.OperationalError where it takes nothing at all."""
        self._forget()
        with self._engine.connect() as connection, connection.begin() as attempt:
            try:
                host = connection.execute(sa.select(hosts.c.id).limit(1)).scalar()
                if host is not None:
                    process_id, _ = self._find_or_add(connection, 0, int(host), identity)
                    self._tell_program(connection, 0, process_id, identity)
                return False
            except OperationalError:
                raise
            except Exception:
                # Whatever it is about this one, a driver's error or Python's: the others are written without it.
                return True
            finally:
                attempt.rollback()
                self._forget()

    def _write(self, connection: Connection, ticks: Iterable[Attributed]) -> int:
        rows = _Rows()
        written = 0
        for snapshot, identities in ticks:
            self._take_tick(connection, snapshot, identities, rows)
            written += 1
        if not written:
            return 0
        self._add_metrics.run(connection, rows.metrics)
        self._merge_metrics.run(connection, rows.again)
        self._add_usage.run(connection, rows.unrecorded)
        self._add_changes.run(connection, rows.changes)
        self._add_snapshots.run(connection, rows.snapshots)
        # Of time that repeats, the ticks of both times stand among each other: none is left to be added later.
        mixed = self._last_tick <= self._mixed_until
        turn = self._live if mixed else self._in_turn(SETTLED_PER_TICK * written)
        self._settle(connection, list((rows.moved | turn).values()))
        self._set_gpus.run(
            connection,
            [
                (
                    *(self._last_tick, round(gpu.energy_j, 3), gpu.meter.counter.value, gpu.energy_from),
                    *(round(gpu.meter.ahead_j, 3), gpu.id),
                )
                for gpu in self._gpus.values()
                if gpu.state == "ok"
            ],
        )
        self._store_usage(connection)
        row = (self._last_tick, self._host_id, self.host, self._host_seen)
        if self._set_host.run(connection, [row]) != 1:
            raise ContentReplaced(f"the row of {self.host} is not as it was left")
        self._host_seen = self._last_tick
        return written

    def _take_tick(
        self,
        connection: Connection,
        snapshot: Snapshot,
        identities: Mapping[int, ProcessIdentity],
        rows: _Rows,
    ) -> None:
        """Take in one tick, with the rows that it makes."""
        now = int(snapshot.timestamp)
        moment = Moment(now, snapshot.elapsed)
        host_id = self._know_host(connection, now, snapshot.host)
        repeats = now <= self._newest_tick
        if repeats:
            self.rewritten_from = min(now, self.rewritten_from or now)
            self._mixed_until = self._newest_tick + 2 * HEARTBEAT_S + int(longest_step(self.interval_s))
        before = self._last_moment or Moment(self._last_tick)
        since = moment.since(before)
        gap = not 0 < since <= longest_step(self.interval_s)
        self._know_gpus(connection, now, host_id, snapshot)
        if not self._resumed:
            self._resume(connection)
        dt = self.interval_s if gap else since
        if before.label and (not gap or since <= 0):
            self._follow_clock(connection, now - before.label - max(since, dt), now, host_id)
        for gpu in self._gpus.values():
            gpu.utilization, gpu.tick_j = None, 0.0
        lengths = {}
        for reading in snapshot.readings:
            gpu = self._gpus[reading.uuid]
            # A GPU that was away has a gap of its own.
            lengths[gpu.id] = own_dt = dt if gpu.read_at == before else self.interval_s
            row = self._take_reading(gpu, reading, moment, own_dt, rows)
            (rows.again if repeats else rows.metrics).append(row)
            gpu.read_at = moment
        here = self._here
        on = self._take_processes(connection, now, since, dt, gap, host_id, snapshot, identities, rows)
        for reading in snapshot.readings:
            gpu = self._gpus[reading.uuid]
            uses, own_dt = on.get(gpu.id, []), lengths[gpu.id]
            gpu.ended = reading.ended
            part = share_out(gpu, uses, now, own_dt, self.idle_after_s, gap) if uses else 0.0
            if gpu.ended:
                part += self._share_with_ended(gpu, reading, here, uses, now, own_dt)
            for step, seconds in spans(now, own_dt):
                if gpu.step != step:
                    self._open_step(connection, gpu, step)
                account(gpu, uses, part, own_dt, seconds)
        self._last_tick, self._last_moment = now, moment
        self._newest_tick = max(now, self._newest_tick)

    def energy(self) -> dict[str, float]:
        """What every GPU has taken since it was first seen, by UUID, in joules; without those of which nothing
        tells."""
        return {uuid: gpu.energy_j for uuid, gpu in self._gpus.items() if gpu.energy_from is not None}

    def _in_turn(self, count: int) -> dict[tuple[int, int], Use]:
        """The next processes on GPUs whose turn it is to be settled."""
        if count >= len(self._live):
            return self._live
        pairs = list(self._live)
        self._turn %= len(pairs)
        chosen = (pairs + pairs)[self._turn : self._turn + count]
        self._turn += count
        return {pair: self._live[pair] for pair in chosen}

    def _settle(self, connection: Connection, uses: list[Use]) -> None:
        """Store what the ledger has to say of some processes on their GPUs."""
        if not uses and not self._unloaded:
            return
        ids = {use.process_id for use in uses}
        # A process and what it does on each of its GPUs are stored together.
        named = {(use.process_id, use.gpu.id) for use in uses}
        uses += [use for pair, use in self._live.items() if pair[0] in ids and pair not in named]
        self._set_pairs.run(
            connection,
            [
                (
                    *_ledger(use.ledger),
                    int(use.pair in self._live),
                    *_work(use.work),
                    *use.now,
                    use.process_id,
                    use.gpu.id,
                )
                for use in uses
            ],
        )
        ledgers = {process_id: ledger for process_id, ledger in self._processes.values() if process_id in ids}
        ledgers |= self._ended
        self._ended = {}
        self._set_processes.run(
            connection,
            [(*_ledger(ledger), process_id) for process_id, ledger in ledgers.items()],
        )
        hours = []
        for use in uses:
            for (step, program_id), used in use.hours.items():
                # Whole joules take half the space; what is left waits for the next time.
                joules = float(int(used.energy_j)) if use.pair in self._live else round(used.energy_j, 3)
                use.rest_j += used.energy_j - joules
                hours.append(
                    (
                        *(step, use.process_id, use.gpu.id, program_id, used.seconds, round(used.busy_s, 3)),
                        *(used.idle_s, used.memory_mib_s, joules, used.max_memory, used.estimated),
                    )
                )
            use.hours = {}
        self._add_hours.run(connection, hours)
        loaded = [(session, 1) for use in uses if use.pair in self._live and (session := use.session)]
        loaded += [(session, 0) for session in self._unloaded]
        self._unloaded = []
        self._set_sessions.run(
            connection, [(*_ledger(session.ledger), active, session.id) for session, active in loaded]
        )

    def _open_step(self, connection: Connection, gpu: Gpu, step: int) -> None:
        """Store what a GPU did in its step of the ledger, and take up another: new or stored."""
        if gpu.step >= 0:
            self._add_usage.run(connection, [_usage(gpu)])
        columns = [gpu_usage.c[name] for name in USAGE]
        query = sa.select(*columns).where(gpu_usage.c.timestamp_epoch == step, gpu_usage.c.gpu_id == gpu.id)
        known = connection.execute(query).first()
        gpu.step, gpu.used = step, GpuUse(*known) if known is not None else GpuUse()
        gpu.stored = _rounded(gpu.used)

    def _store_usage(self, connection: Connection) -> None:
        self._add_usage.run(
            connection, [_usage(gpu) for gpu in self._gpus.values() if gpu.step >= 0 and gpu.state == "ok"]
        )

    def _share_with_ended(
        self,
        gpu: Gpu,
        reading: GpuReading,
        here: Mapping[tuple[int, str], Use],
        uses: list[Use],
        now: int,
        dt: float,
    ) -> float:
        """Give processes that were here at the tick before, and have ended since, their part; the sum of them."""
        whole = sum(use.now[SM] or 0 for use in uses) + sum(reading.ended.values())
        known = [(here.get((pid, reading.uuid)), sm) for pid, sm in reading.ended.items()]
        return sum(
            give_to_ended(gpu, use, sm, whole, now, dt) for use, sm in known if use is not None and use not in uses
        )

    def _follow_clock(self, connection: Connection, set_by_s: float, now: int, host_id: int) -> None:
        """Where the wall clock was set between two ticks, what lies in the past stays as long ago as it was."""
        if abs(set_by_s) < CLOCK_SET_S:
            return
        for use in self._live.values():
            use.work.last_busy += round(set_by_s)
            # What began at a time that is still to come began as long ago as it was seen.
            if use.first_seen > now:
                use.first_seen = now - round(use.ledger.seconds)
        running = {process_id for process_id, _ in self._live}
        for table, mine in (
            (gpu_processes, gpu_processes.c.id.in_(running)),
            (process_gpus, process_gpus.c.process_id.in_(running)),
            (model_sessions, sa.and_(model_sessions.c.process_id.in_(running), model_sessions.c.active == 1)),
        ):
            began = now - sa.cast(table.c.seconds, sa.BigInteger)
            connection.execute(sa.update(table).where(mine, table.c.first_seen > now).values(first_seen=began))
        for table, mine in ((hosts, hosts.c.id == host_id), (gpus, gpus.c.host_id == host_id)):
            connection.execute(sa.update(table).where(mine, table.c.first_seen > now).values(first_seen=now))

    def _know_host(self, connection: Connection, now: int, info: HostInfo) -> int:
        if self._host_id is not None and info == self._host_info:
            return self._host_id
        facts = {
            "source": self.source,
            "interval_s": self.interval_s,
            "driver_version": info.driver_version,
            "cuda_version": info.cuda_version,
            "nvml_version": info.nvml_version,
        }
        known = connection.execute(
            sa.select(hosts.c.id, hosts.c.last_seen).where(hosts.c.name == self.host)
        ).first()
        if known is None:
            row = {"name": self.host, "first_seen": now, "last_seen": now, **facts}
            host_id = _insert(connection, hosts, row)
            # Another may have been first.
            query = sa.select(hosts.c.last_seen).where(hosts.c.id == host_id)
            self._host_seen = connection.execute(query).scalar_one()
        else:
            host_id = known.id
            self._host_seen = known.last_seen
            if self._host_id is None:
                self._last_tick = known.last_seen
                self._last_moment = None
                self._newest_tick = max(known.last_seen, _newest_tick(connection, host_id))
                if self._newest_tick > self._last_tick:
                    # The recorder before this one may have ended before such ticks were rolled up.
                    self.rewritten_from = self._last_tick - HOUR_S
            connection.execute(sa.update(hosts).where(hosts.c.id == host_id).values(facts))
        self._host_id, self._host_info = host_id, info
        return int(host_id)

    def _know_gpus(self, connection: Connection, now: int, host_id: int, snapshot: Snapshot) -> None:
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
        if not self._gpus:
            self._load_gpus(connection, host_id)
        sampling = {reading.uuid: reading.sampling for reading in snapshot.readings}
        unidentified = self._unidentified(connection, host_id, snapshot)
        for info in (*snapshot.gpus, *unidentified):
            state = "lost" if info in unidentified else snapshot.state_of(info.uuid)
            known = self._gpus.get(info.uuid)
            mark = sampling.get(info.uuid, known.sampling if known else None)
            if known is not None and (known.info, known.state, known.sampling) == (info, state, mark):
                continue
            row = {
                "gpu_index": info.index,
                "mig_index": info.mig_index,
                "parent_id": self._gpus[info.parent_uuid].id if info.parent_uuid in self._gpus else None,
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
                row |= {"host_id": host_id, "uuid": info.uuid, "first_seen": now, "last_seen": now}
                known = self._gpus[info.uuid] = Gpu(_insert(connection, gpus, row), state)
            else:
                connection.execute(sa.update(gpus).where(gpus.c.id == known.id).values(row))
            known.info, known.state, known.sampling = info, state, mark
        listed = {info.uuid for info in (*snapshot.gpus, *unidentified)}
        for uuid, gpu in list(self._gpus.items()):
            if uuid in listed:
                continue
            if uuid.startswith(NAMELESS):
                # It has said by now which it is, and no tick speaks of it.
                connection.execute(sa.delete(gpus).where(gpus.c.id == gpu.id))
                del self._gpus[uuid]
                continue
            # A GPU that cannot even be named is the one that stood in its place.
            was_at = sa.select(gpus.c.gpu_index).where(gpus.c.id == gpu.id)
            here = gpu.state != "gone" and connection.execute(was_at).scalar() in snapshot.nameless
            now_is = "lost" if here else "gone"
            if gpu.state != now_is:
                connection.execute(sa.update(gpus).where(gpus.c.id == gpu.id).values(state=now_is))
                gpu.info, gpu.state = None, now_is
        self._inventory = inventory

    def _unidentified(self, connection: Connection, host_id: int, snapshot: Snapshot) -> tuple[GpuInfo, ...]:
        """GPUs that do not say which they are, where none is known to have stood in their place."""
        if not snapshot.nameless:
            return ()
        query = sa.select(gpus.c.uuid, gpus.c.gpu_index).where(gpus.c.host_id == host_id, gpus.c.state != "gone")
        listed = {info.uuid for info in snapshot.gpus}
        taken = {
            index
            for uuid, index in connection.execute(query)
            if uuid not in listed and not uuid.startswith(NAMELESS)
        }
        return tuple(nameless(index) for index in sorted(snapshot.nameless - taken))

    def _load_gpus(self, connection: Connection, host_id: int) -> None:
        mine = gpus.c.host_id == host_id
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
            self._gpus[row.uuid] = by_id[row.id] = gpu
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

    def _take_reading(
        self,
        gpu: Gpu,
        reading: GpuReading,
        moment: Moment,
        dt: float,
        rows: _Rows,
    ) -> Row:
        """Take in what a GPU said of the `dt` seconds before the tick; its row of gpu_metrics."""
        values, now = reading.values, moment.label
        try:
            stored = list(_TICK(values))
        except KeyError:
            stored = [values.get(key) for key in TICK_COLUMNS]
        rows.unrecorded += self._count_energy(gpu, values, moment, dt)
        stored[_ENERGY] = None if gpu.energy_from is None else round(gpu.energy_j)
        gpu.utilization = values.get("utilization")
        for key in CHANGE_KEYS:
            if key in values:
                value = values[key]
                if key not in gpu.changes or gpu.changes[key] != value:
                    gpu.changes[key] = value
                    rows.changes.append((gpu.id, key, now, value))
        return (gpu.id, now, *stored, round(1000 * dt))

    def _count_energy(
        self, gpu: Gpu, values: Mapping[str, float | None], moment: Moment, dt: float
    ) -> Iterator[Row]:
        """Count this tick's energy; what the GPU took while nobody looked, as rows of the ledger of that time."""
        pause = 0.0
        if gpu.read_at is not None:
            since = moment.since(gpu.read_at)
            # Where the clock was set back before this recorder came, nothing says how long it was.
            pause = UNKNOWN_PAUSE_S if since <= 0 else max(0.0, since - dt)
        counter, before = values.get("energy"), gpu.meter.counter.value
        limit = gpu.info.power_limit_w if gpu.info is not None else None
        added = gpu.meter.add(counter, values.get("power"), limit, dt, pause)
        if added is None:
            return
        gpu.tick_j, unrecorded_j = added
        gpu.energy_j += gpu.tick_j + unrecorded_j
        gpu.energy_from = gpu.meter.source
        if not unrecorded_j:
            return
        # It lies at the time at which it was taken, as far as the wall clock can say.
        end = int(moment.label - dt)
        length = max(1.0, end - gpu.read_at.label) if gpu.read_at is not None else 1.0
        # A machine without a clock of its own begins in 1970: a label alone may be decades off.
        length = min(length, LONGEST_SPREAD_S)
        if counter is not None and before is not None and counter < before and moment.elapsed is not None:
            # The counter began anew, at the earliest when the machine was started.
            length = min(length, max(1.0, moment.elapsed))
        for step, seconds in spans(end, length):
            joules = unrecorded_j * seconds / length
            yield step, gpu.id, *(joules if name in UNRECORDED else 0.0 for name in USAGE)

    def _take_processes(
        self,
        connection: Connection,
        now: int,
        since: float,
        dt: float,
        gap: bool,
        host_id: int,
        snapshot: Snapshot,
        identities: Mapping[int, ProcessIdentity],
        rows: _Rows,
    ) -> dict[int, list[Use]]:
        """Take in who is on the GPUs; the processes of each, by the GPU's id."""
        if abs(since) > max(UNKNOWN_START_GRACE_S, 3 * self.interval_s):
            self._processes = {key: known for key, known in self._processes.items() if key[1] is not None}
            self._here = {}
        seen: dict[tuple[int, str | None], tuple[int, Ledger]] = {}
        live: dict[tuple[int, int], Use] = {}
        here: dict[tuple[int, str], Use] = {}
        totals: dict[int, tuple[Ledger, int | None]] = {}
        on: dict[int, list[Use]] = {}
        for process in snapshot.processes:
            identity = identities.get(process.pid)
            place = (process.pid, process.gpu_uuid)
            use = self._here.get(place)
            if use is None or use.identity is not identity or use.kind != process.kind or use.pair in live:
                use = self._find_use(connection, now, host_id, process, identity, seen, rows.moved)
            here[place] = use
            pair = use.pair
            live[pair] = use
            seen[use.key] = use.known
            # A source may hand out the same record again for a process that does nothing new.
            if process is not use.reading:
                use.reading = process
                use.current = (
                    process.memory_mib,
                    process.sm_utilization,
                    process.memory_utilization,
                    process.encoder_utilization,
                    process.decoder_utilization,
                )
            current, stored_at = use.current, use.stored_at
            if gap or current != use.now or stored_at is None or not 0 <= now - stored_at < HEARTBEAT_S:
                rows.snapshots.append((now, *pair, *current, 1))
                use.now, use.stored_at = current, now
            memory = current[0]
            use.ledger.add(now, dt, memory)
            if use.session is not None:
                use.session.ledger.add(now, dt, memory)
            process_id, ledger = use.known
            if process_id in totals:
                memory = plus(totals[process_id][1], memory)
            totals[process_id] = (ledger, memory)
            uses = on.get(pair[1])
            if uses is None:
                on[pair[1]] = [use]
            else:
                uses.append(use)
        for ledger, total in totals.values():
            ledger.add(now, dt, total)
        self._part(snapshot, now, seen, live, rows)
        self._here = here
        return on

    def _part(
        self,
        snapshot: Snapshot,
        now: int,
        seen: dict[tuple[int, str | None], tuple[int, Ledger]],
        live: dict[tuple[int, int], Use],
        rows: _Rows,
    ) -> None:
        """Part with what was there at the tick before and is not at this one."""
        answering = {self._gpus[reading.uuid].id for reading in snapshot.readings}
        for pair, use in self._live.items():
            if pair in live:
                continue
            if pair[1] not in answering and use.gpu.state in ("lost", "hung", "asleep", "quiet"):
                # It is the GPU that does not answer, or is not asked; of its processes nothing is known.
                live[pair] = use
                continue
            use.now = use.current = GONE
            use.reading = None
            self._unload(use)
            rows.moved[pair] = use
            rows.snapshots.append((now, *pair, *GONE, 0))
        # Only what runs is kept in mind: memory does not grow with the history.
        waiting = {process_id for process_id, _ in live}
        for key, known in self._processes.items():
            if key in seen:
                continue
            if known[0] in waiting:
                seen[key] = known
            else:
                self._ended[known[0]] = known[1]
                self._running.pop(known[0], None)
        self._processes, self._live = seen, live

    def _find_use(
        self,
        connection: Connection,
        now: int,
        host_id: int,
        process: ProcessReading,
        identity: ProcessIdentity | None,
        seen: dict[tuple[int, str | None], tuple[int, Ledger]],
        moved: dict[tuple[int, int], Use],
    ) -> Use:
        """The process on its GPU, taken into the ledger if it is new there."""
        who = identity or ProcessIdentity(process.pid)
        key = (who.pid, who.start_key)
        known = seen.get(key) or self._processes.get(key) or self._find_or_add(connection, now, host_id, who)
        program, program_id = self._running.get(known[0], NOBODY)
        # What is still being asked for may be less than what is known of it from before.
        waits = who.pending and program_id != UNKNOWN_PROGRAM
        if who.program is not NOTHING and program != who.program and not waits:
            self._tell_program(connection, now, known[0], who)
        gpu = self._gpus[process.gpu_uuid]
        pair = (known[0], gpu.id)
        use = self._live.get(pair)
        if use is None or use.kind != process.kind:
            use = self._know_pair(connection, now, known[0], gpu, process, use or moved.get(pair))
            moved[pair] = use
        if use.identity is not None and who.user not in (None, use.identity.user):
            # A directory that did not know the user id has come back.
            named = sa.update(gpu_processes).where(gpu_processes.c.id == known[0]).values(username=who.user)
            connection.execute(named)
        program, use.program_id = self._running.get(known[0], NOBODY)
        if program is not NOTHING and not who.pending:
            self._know_model(connection, now, use, program)
        use.identity, use.key, use.known = identity, key, known
        if who.name is not None:
            use.serves_mps = is_mps_server(who.name)
        return use

    def _know_model(self, connection: Connection, now: int, use: Use, program: Program) -> None:
        """Begin, rename or end the session of the model that a server has on a GPU."""
        model = program.model if program.category in SERVING else None
        session = use.session
        if model == (session.model if session else None):
            return
        if session is not None and model is not None and is_placeholder(session.model):
            # The same model, whose name has become known.
            connection.execute(
                sa.update(model_sessions).where(model_sessions.c.id == session.id).values(model=model)
            )
            session.model = model
            return
        came = session is None and not use.has_served and now - use.first_seen <= LOADED_WITHIN_S
        self._unload(use)
        if model is not None:
            ledger = replace(use.ledger) if came else Ledger(now)
            row = {
                **{"process_id": use.process_id, "gpu_id": use.gpu.id, "model": model, "active": 1},
                "first_seen": use.first_seen if came else now,
                **dict(zip(LEDGER, _ledger(ledger), strict=True)),
            }
            use.session = Session(_insert(connection, model_sessions, row), model, ledger)
            use.has_served = True

    def _unload(self, use: Use) -> None:
        if use.session is not None:
            self._unloaded.append(use.session)
            use.session = None

    def _resume(self, connection: Connection) -> None:
        """Take up the processes that were on the GPUs at the newest tick before this recorder's first."""
        self._resumed = True
        repeats = self._newest_tick > self._last_tick
        found = resume(
            connection, self._gpus.values(), self._last_tick, self.interval_s, self.idle_after_s, settled=repeats
        )
        self._live.update(found.live)
        self._processes.update(found.processes)
        self._running.update((process_id, (NOTHING, program)) for process_id, program in found.programs.items())
        self._unloaded += found.unloaded

    def _find_or_add(
        self, connection: Connection, now: int, host_id: int, identity: ProcessIdentity
    ) -> tuple[int, Ledger]:
        same = sa.and_(gpu_processes.c.host_id == host_id, gpu_processes.c.pid == identity.pid)
        query = sa.select(
            gpu_processes.c.id, gpu_processes.c.program_id, *(gpu_processes.c[name] for name in LEDGER)
        )
        if identity.start_key is not None:
            query = query.where(same, gpu_processes.c.start_key == identity.start_key)
        else:
            grace = max(UNKNOWN_START_GRACE_S, 3 * self.interval_s)
            query = (
                query.where(same, gpu_processes.c.start_key.is_(None))
                .where(gpu_processes.c.last_seen >= now - grace)
                .order_by(gpu_processes.c.last_seen.desc())
            )
        found = connection.execute(query.limit(1)).first()
        if found is not None:
            if found.id not in self._running:
                self._running[found.id] = (NOTHING, found.program_id or UNKNOWN_PROGRAM)
            return int(found.id), self._ended.pop(found.id, None) or known_ledger(found)
        program_id = _program_id(connection, now, identity.program)
        row = {
            "host_id": host_id,
            "pid": identity.pid,
            "start_key": identity.start_key,
            "start_time": identity.start_time,
            "name": identity.name,
            "username": identity.user,
            "program_id": program_id or None,
            "first_seen": now,
            "last_seen": now,
            "sample_count": 0,
        }
        process_id = _insert(connection, gpu_processes, row)
        self._running[process_id] = (identity.program, program_id)
        return process_id, Ledger(now)

    def _tell_program(self, connection: Connection, now: int, process_id: int, identity: ProcessIdentity) -> None:
        """More is known now of what a process runs, or this recorder has found it running."""
        program_id = _program_id(connection, now, identity.program)
        before = self._running.get(process_id, NOBODY)[1]
        if before not in (program_id, UNKNOWN_PROGRAM):
            # Hours that are kept speak of it still.
            _used_until(connection, now, before)
        facts: dict[str, object] = {"program_id": program_id or None}
        if identity.name is not None:
            facts["name"] = identity.name
        if identity.user is not None:
            facts["username"] = identity.user
        connection.execute(sa.update(gpu_processes).where(gpu_processes.c.id == process_id).values(facts))
        self._running[process_id] = (identity.program, program_id)

    def _know_pair(
        self,
        connection: Connection,
        now: int,
        process_id: int,
        gpu: Gpu,
        process: ProcessReading,
        use: Use | None,
    ) -> Use:
        same = sa.and_(process_gpus.c.process_id == process_id, process_gpus.c.gpu_id == gpu.id)
        known = connection.execute(sa.select(process_gpus).where(same)).first()
        if known is None:
            row = {
                "process_id": process_id,
                "gpu_id": gpu.id,
                "kind": process.kind,
                "first_seen": now,
                "last_seen": now,
                "sample_count": 0,
                "active": 1,
                "last_busy": now,
            }
            connection.execute(process_gpus.insert(), row)
            return Use(process_id, gpu, process.kind, Ledger(now), Work(last_busy=now), first_seen=now)
        if known.kind != process.kind:
            connection.execute(sa.update(process_gpus).where(same).values(kind=process.kind))
        if use is not None:
            use.kind = process.kind
            return use
        found = known_use(known, gpu)
        found.kind = process.kind
        return found


_ENERGY = TICK_COLUMNS.index("energy")
_TICK = itemgetter(*TICK_COLUMNS)
_USED = attrgetter(*USAGE)
_DIGITS = [0 if name.endswith("_j") else 1 for name in USAGE]


def _merging(dialect: sa.Dialect) -> Any:
    """An INSERT into gpu_metrics that is merged with a row of the same second: means by time, maxima."""
    statement = upsert(dialect, gpu_metrics)
    new, old = statement.excluded, gpu_metrics.c
    old_ms = sa.func.coalesce(old.recorded_ms, new.recorded_ms)
    values: dict[str, Any] = {"recorded_ms": old_ms + new.recorded_ms}
    for metric in TICK_METRICS:
        key = metric.key
        highest = [metric.peak] if metric.peak else []
        if metric.aggregate is Aggregate.COUNTER:
            highest.append(key)
        else:
            mean = (
                (old[key] * old_ms + new[key] * new.recorded_ms)
                * sa.literal_column("1.0")
                / (old_ms + new.recorded_ms)
            )
            if metric.column == "integer":
                mean = sa.cast(sa.func.round(mean), sa.Integer)
            values[key] = sa.func.coalesce(mean, new[key], old[key])
        for name in highest:
            values[name] = sa.case(
                (new[name] > old[name], new[name]), else_=sa.func.coalesce(old[name], new[name])
            )
    keys = ["gpu_id", "timestamp_epoch"]
    return statement.on_conflict_do_update(index_elements=keys, set_=values)


def hours_bulk(dialect: sa.Dialect) -> Bulk:
    """Adds to process_hours: its key, SUMS, max_memory and estimated."""
    hour = upsert(dialect, process_hours)
    new, old = hour.excluded, process_hours.c
    values = {name: old[name] + new[name] for name in SUMS}
    for name in ("max_memory", "estimated"):
        known = sa.func.coalesce(old[name], new[name])
        values[name] = sa.case((new[name] > known, new[name]), else_=known)
    keys = ["timestamp_epoch", "process_id", "gpu_id", "program_id"]
    statement = hour.on_conflict_do_update(index_elements=keys, set_=values)
    return Bulk(dialect, statement, [*keys, *SUMS, "max_memory", "estimated"])


def _newest_tick(connection: Connection, host_id: int) -> int:
    # One look at the key's end per GPU.
    time = gpu_metrics.c.timestamp_epoch
    mine = connection.execute(sa.select(gpus.c.id).where(gpus.c.host_id == host_id)).scalars()
    newest = [
        connection.execute(sa.select(sa.func.max(time)).where(gpu_metrics.c.gpu_id == gpu_id)).scalar()
        for gpu_id in list(mine)
    ]
    return max((int(found) for found in newest if found is not None), default=0)


def _ledger(ledger: Ledger) -> tuple[Any, ...]:
    return ledger.last_seen, ledger.max_memory, ledger.avg_memory, ledger.sample_count, ledger.seconds


def _work(work: Work) -> tuple[Any, ...]:
    return (
        *(round(work.busy_s, 3), float(round(work.energy_j)), work.sm_percent_s, work.sm_told_s),
        *(work.max_sm, work.estimated, work.last_busy),
    )


def _usage(gpu: Gpu) -> Row:
    """What is to be added to its row of gpu_usage: an import may add to the same hour."""
    now = _rounded(gpu.used)
    row = (gpu.step, gpu.id, *(round(new - old, 1) for new, old in zip(now, gpu.stored, strict=True)))
    gpu.stored = now
    return row


def _rounded(used: GpuUse) -> tuple[float, ...]:
    """A step of a GPU, rounded to take little space."""
    return tuple(map(round, _USED(used), _DIGITS))


def _program_id(connection: Connection, now: int, program: Program) -> int:
    """The row of a program, made when it is the first of its kind on any host."""
    if program == NOTHING:
        return UNKNOWN_PROGRAM
    values = {name: getattr(program, name) for name in PROGRAM_COLUMNS}
    digest = hashlib.blake2b(repr(list(values.values())).encode("utf-8", "replace"), digest_size=16).hexdigest()
    # Held until the transaction ends: retention deletes programs that nobody runs.
    query = sa.select(programs.c.id).where(programs.c.digest == digest).with_for_update(read=True, key_share=True)
    for _ in range(ATTEMPTS):
        known = connection.execute(query).scalar()
        if known is not None:
            return int(known)
        with _shared(connection) as apart:
            _insert(apart, programs, {"digest": digest, "last_used": now, **values})
    # Retention of another host deletes what nobody has used for months, and this was used just now.
    raise RuntimeError(f"the program {digest} is deleted as often as it is made")


def _used_until(connection: Connection, now: int, program_id: int) -> None:
    """Note when a process last ran a program."""
    with _shared(connection) as apart:
        apart.execute(sa.update(programs).where(programs.c.id == program_id).values(last_used=now))


@contextmanager
def _shared(connection: Connection) -> Iterator[Connection]:
    """Where to change rows that the recorders of all hosts share: in a transaction of its own, committed at once.

    Within that of a tick it would make every other recorder wait that has the same to write, until that tick is
    committed, and two that come to the same rows in another order would wait for each other. A SQLite file has
    one recorder, whose tick is the only transaction there can be.
    """
    if connection.dialect.name == "sqlite":
        yield connection
        return
    with connection.engine.begin() as apart:
        yield apart


def _insert(connection: Connection, table: sa.Table, row: dict[str, Any]) -> int:
    """Insert a row and return its id; where another was first with the same unique columns, the id of its row."""
    if connection.dialect.name == "sqlite":
        # Nobody else can be first: the transaction has the file's only write lock since it began.
        key = connection.execute(table.insert(), row).inserted_primary_key
        if key is None:
            raise RuntimeError(f"{table.name} returned no id")
        return int(key[0])
    statement = upsert(connection.dialect, table).on_conflict_do_nothing().returning(table.c.id)
    made = connection.execute(statement, row).scalar()
    if made is None:
        # It waited for the other's commit, so that this statement sees the row.
        same = [column == row[column.name] for column in _unique(table)]
        made = connection.execute(sa.select(table.c.id).where(*same)).scalar_one()
    return int(made)


def _unique(table: sa.Table) -> list[sa.Column[Any]]:
    """What no two rows of a table have in common, beside the id."""
    constraints = [one for one in table.constraints if isinstance(one, sa.UniqueConstraint)]
    return [column for one in constraints for column in one.columns]
