"""Puts ticks into the database: one transaction a tick, or one for many where many have come together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter, itemgetter

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import OperationalError

from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.metrics import CHANGE_METRICS, TICK_COLUMNS
from gpumon_core.store.accounting import (
    HEARTBEAT_S,
    HOUR_S,
    SM,
    USAGE,
    Gpu,
    GpuUse,
    Moment,
    Use,
    account,
    give_to_ended,
    longest_step,
    share_out,
    spans,
)
from gpumon_core.store.bulk import Row
from gpumon_core.store.gpu_rows import GpuRows
from gpumon_core.store.process_rows import ProcessRows
from gpumon_core.store.schema import gpu_processes, gpu_usage, gpus, hosts, model_sessions, process_gpus
from gpumon_core.store.statements import NewRows, Statements
from gpumon_core.telemetry.records import GpuReading, Snapshot

# So many rows of processes that go on are brought up to date in the ledger with each tick, in turn: few
# processes are exact at every tick, many cost no more than these. A row's last_seen says up to when it
# is complete; what came after is read from the ticks again when a recorder was killed in between.
SETTLED_PER_TICK = 16
IDLE_AFTER_S = 600
# Labels are whole seconds: the wall clock was set where they part by more than this from what has passed.
CLOCK_SET_S = 2.0
# The longest that a pause of unknown length may have been: a counter that grew by more than a board takes in a
# month errs.
UNKNOWN_PAUSE_S = 30 * 86400.0
# What was taken in a pause is spread over so much of it at the most: each half hour of it is a row.
LONGEST_SPREAD_S = 400 * 86400.0
UNRECORDED = ("energy_j", "unrecorded_j")
Attributed = tuple[Snapshot, Mapping[int, ProcessIdentity]]
CHANGE_KEYS = tuple(metric.key for metric in CHANGE_METRICS)


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
        self._statements = Statements(engine.dialect)
        self._forget()

    def _forget(self) -> None:
        """Drop what is known of the database, after a transaction that may not have happened."""
        self._machine = GpuRows(self.host, self.source, self.interval_s)
        self._processes = ProcessRows(self._machine, self._statements, self.interval_s, self.idle_after_s)
        # The tick before, and the newest there is: they differ after the clock was set back.
        self._last_tick = 0
        self._newest_tick = 0
        # Up to then, what is read of the ticks may be of time that was recorded twice.
        self._mixed_until = -1
        # The tick before by the clock that nobody sets, of this run of the program.
        self._last_moment: Moment | None = None
        self._resumed = False

    def is_new(self) -> bool:
        """Whether the database holds nothing of this host yet."""
        if self.host_id is None:
            with self._engine.connect() as connection:
                query = sa.select(hosts.c.id).where(hosts.c.name == self.host)
                return connection.execute(query).first() is None
        return False

    @property
    def host_id(self) -> int | None:
        """The host's row, once something was written."""
        return self._machine.host_id

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
                self._processes.settle(connection, list(self._processes.live.values()))
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
                    process_id, _ = self._processes.find_or_add(connection, 0, int(host), identity)
                    self._processes.set_program(connection, 0, process_id, identity)
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
        rows, statements, processes = NewRows(), self._statements, self._processes
        written = 0
        for snapshot, identities in ticks:
            self._take_tick(connection, snapshot, identities, rows)
            written += 1
        if not written:
            return 0
        statements.add_metrics.run(connection, rows.metrics)
        statements.merge_metrics.run(connection, rows.again)
        statements.add_usage.run(connection, rows.unrecorded)
        statements.add_changes.run(connection, rows.changes)
        statements.add_snapshots.run(connection, rows.snapshots)
        # Where time repeats, the ticks of both times are mixed: none is left to be added later.
        mixed = self._last_tick <= self._mixed_until
        turn = processes.live if mixed else processes.in_turn(SETTLED_PER_TICK * written)
        processes.settle(connection, list((rows.moved | turn).values()))
        statements.set_gpus.run(
            connection,
            [
                (
                    *(self._last_tick, round(gpu.energy_j, 3), gpu.meter.counter.value, gpu.energy_from),
                    *(round(gpu.meter.ahead_j, 3), gpu.id),
                )
                for gpu in self._machine.gpus.values()
                if gpu.state == "ok"
            ],
        )
        used = [gpu for gpu in self._machine.gpus.values() if gpu.step >= 0 and gpu.state == "ok"]
        statements.add_usage.run(connection, [_usage(gpu) for gpu in used])
        row = (self._last_tick, self.host_id, self.host, self._machine.host_seen)
        if statements.set_host.run(connection, [row]) != 1:
            raise ContentReplaced(f"the row of {self.host} is not as it was left")
        self._machine.host_seen = self._last_tick
        return written

    def _take_tick(
        self,
        connection: Connection,
        snapshot: Snapshot,
        identities: Mapping[int, ProcessIdentity],
        rows: NewRows,
    ) -> None:
        """Take in one tick, with the rows that it makes."""
        now = int(snapshot.timestamp)
        moment = Moment(now, snapshot.elapsed)
        if self._machine.update_host(connection, now, snapshot.host):
            self._continue(connection)
        repeats = now <= self._newest_tick
        if repeats:
            self.rewritten_from = min(now, self.rewritten_from or now)
            self._mixed_until = self._newest_tick + 2 * HEARTBEAT_S + int(longest_step(self.interval_s))
        before = self._last_moment or Moment(self._last_tick)
        since = moment.since(before)
        gap = not 0 < since <= longest_step(self.interval_s)
        self._machine.update_gpus(connection, now, snapshot)
        if not self._resumed:
            self._resumed = True
            repeated = self._newest_tick > self._last_tick
            self._processes.resume(connection, self._last_tick, settled=repeated)
        dt = self.interval_s if gap else since
        if before.label and (not gap or since <= 0):
            self._follow_clock(connection, now - before.label - max(since, dt), now)
        for gpu in self._machine.gpus.values():
            gpu.utilization, gpu.tick_j = None, 0.0
        lengths = {}
        for reading in snapshot.readings:
            gpu = self._machine.gpus[reading.uuid]
            # A GPU that was away has a gap of its own.
            lengths[gpu.id] = own_dt = dt if gpu.read_at == before else self.interval_s
            row = self._take_reading(gpu, reading, moment, own_dt, rows)
            (rows.again if repeats else rows.metrics).append(row)
            gpu.read_at = moment
        here = self._processes.here
        on = self._processes.take(connection, now, since, dt, gap, snapshot, identities, rows)
        for reading in snapshot.readings:
            gpu = self._machine.gpus[reading.uuid]
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

    def _continue(self, connection: Connection) -> None:
        """Go on after the newest tick of the recorder before this one."""
        self._last_tick, self._last_moment = self._machine.host_seen, None
        self._newest_tick = max(self._last_tick, self._machine.newest_tick(connection))
        if self._newest_tick > self._last_tick:
            # That one may have ended before such ticks were rolled up.
            self.rewritten_from = self._last_tick - HOUR_S

    def energy(self) -> dict[str, float]:
        """What every GPU has taken since it was first seen, by UUID, in joules; without those whose energy
        is not known."""
        return {uuid: gpu.energy_j for uuid, gpu in self._machine.gpus.items() if gpu.energy_from is not None}

    def _open_step(self, connection: Connection, gpu: Gpu, step: int) -> None:
        """Store what a GPU did in its step of the ledger, and take up another: new or stored."""
        if gpu.step >= 0:
            self._statements.add_usage.run(connection, [_usage(gpu)])
        columns = [gpu_usage.c[name] for name in USAGE]
        query = sa.select(*columns).where(gpu_usage.c.timestamp_epoch == step, gpu_usage.c.gpu_id == gpu.id)
        known = connection.execute(query).first()
        gpu.step, gpu.used = step, GpuUse(*known) if known is not None else GpuUse()
        gpu.stored = _rounded(gpu.used)

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

    def _follow_clock(self, connection: Connection, set_by_s: float, now: int) -> None:
        """Where the wall clock was set between two ticks, what lies in the past stays as long ago as it was."""
        if abs(set_by_s) < CLOCK_SET_S:
            return
        for use in self._processes.live.values():
            use.work.last_busy += round(set_by_s)
            # What began at a time that is still to come began as long ago as it was seen.
            if use.first_seen > now:
                use.first_seen = now - round(use.ledger.seconds)
        running = {process_id for process_id, _ in self._processes.live}
        for table, mine in (
            (gpu_processes, gpu_processes.c.id.in_(running)),
            (process_gpus, process_gpus.c.process_id.in_(running)),
            (model_sessions, sa.and_(model_sessions.c.process_id.in_(running), model_sessions.c.active == 1)),
        ):
            began = now - sa.cast(table.c.seconds, sa.BigInteger)
            connection.execute(sa.update(table).where(mine, table.c.first_seen > now).values(first_seen=began))
        for table, mine in ((hosts, hosts.c.id == self.host_id), (gpus, gpus.c.host_id == self.host_id)):
            connection.execute(sa.update(table).where(mine, table.c.first_seen > now).values(first_seen=now))

    def _take_reading(
        self,
        gpu: Gpu,
        reading: GpuReading,
        moment: Moment,
        dt: float,
        rows: NewRows,
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
        # It belongs to the time at which it was taken, by the wall clock.
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


_ENERGY = TICK_COLUMNS.index("energy")
_TICK = itemgetter(*TICK_COLUMNS)
_USED = attrgetter(*USAGE)
_DIGITS = [0 if name.endswith("_j") else 1 for name in USAGE]


def _usage(gpu: Gpu) -> Row:
    """What is to be added to its row of gpu_usage: an import may add to the same hour."""
    now = _rounded(gpu.used)
    row = (gpu.step, gpu.id, *(round(new - old, 1) for new, old in zip(now, gpu.stored, strict=True)))
    gpu.stored = now
    return row


def _rounded(used: GpuUse) -> tuple[float, ...]:
    """A step of a GPU, rounded to take little space."""
    return tuple(map(round, _USED(used), _DIGITS))
