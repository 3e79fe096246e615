"""The rows of processes and of what they use, and what is known of them in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from gpumon_core.attribution.records import NOTHING, ProcessIdentity, Program, is_placeholder
from gpumon_core.store.accounting import (
    GONE,
    HEARTBEAT_S,
    LEDGER,
    UNKNOWN_PROGRAM,
    Gpu,
    Ledger,
    ModelSession,
    Use,
    Work,
    is_mps_server,
    plus,
)
from gpumon_core.store.crash_recovery import known_ledger, known_use, resume
from gpumon_core.store.gpu_rows import GpuRows
from gpumon_core.store.schema import gpu_processes, model_sessions, process_gpus
from gpumon_core.store.shared_rows import insert, row_of_program, used_until
from gpumon_core.store.statements import NewRows, Statements
from gpumon_core.telemetry.records import ProcessReading, Snapshot

# A process whose start cannot be read is taken for the same one while it was seen this recently.
UNKNOWN_START_GRACE_S = 60
# What serves a model, and so has sessions of it: a training run has one, too, but does not serve it.
SERVING = ("inference", "image generation")
# A model that becomes known within this time was loaded when its process came.
LOADED_WITHIN_S = 120

NOBODY = (NOTHING, UNKNOWN_PROGRAM)


class ProcessRows:
    """The processes of one host; to be made anew after a transaction that may not have happened."""

    def __init__(self, machine: GpuRows, statements: Statements, interval_s: float, idle_after_s: float) -> None:
        self._machine = machine
        self._statements = statements
        self._interval_s = interval_s
        self._idle_after_s = idle_after_s
        # By PID and start.
        self.known: dict[tuple[int, str | None], tuple[int, Ledger]] = {}
        # What the processes that run are known to run, by their id in the ledger.
        self._running: dict[int, tuple[Program, int]] = {}
        # Models that have been unloaded; their rows are not stored yet.
        self._unloaded: list[ModelSession] = []
        self.live: dict[tuple[int, int], Use] = {}
        # The same by PID and GPU, for those that were there at the tick before.
        self.here: dict[tuple[int, str], Use] = {}
        # Processes that have ended; their rows of the ledger are not stored yet.
        self._ended: dict[int, Ledger] = {}
        self._turn = 0

    def take(
        self,
        connection: Connection,
        now: int,
        since: float,
        dt: float,
        gap: bool,
        snapshot: Snapshot,
        identities: Mapping[int, ProcessIdentity],
        rows: NewRows,
    ) -> dict[int, list[Use]]:
        """Take in the processes on the GPUs; those of each, by the GPU's id."""
        if abs(since) > max(UNKNOWN_START_GRACE_S, 3 * self._interval_s):
            self.known = {key: known for key, known in self.known.items() if key[1] is not None}
            self.here = {}
        seen: dict[tuple[int, str | None], tuple[int, Ledger]] = {}
        live: dict[tuple[int, int], Use] = {}
        here: dict[tuple[int, str], Use] = {}
        totals: dict[int, tuple[Ledger, int | None]] = {}
        on: dict[int, list[Use]] = {}
        for process in snapshot.processes:
            identity = identities.get(process.pid)
            place = (process.pid, process.gpu_uuid)
            use = self.here.get(place)
            if use is None or use.identity is not identity or use.kind != process.kind or use.pair in live:
                use = self._find_use(connection, now, process, identity, seen, rows.moved)
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
        self._end_absent(snapshot, now, seen, live, rows)
        self.here = here
        return on

    def _end_absent(
        self,
        snapshot: Snapshot,
        now: int,
        seen: dict[tuple[int, str | None], tuple[int, Ledger]],
        live: dict[tuple[int, int], Use],
        rows: NewRows,
    ) -> None:
        """End what was there at the tick before and is not at this one."""
        answering = {self._machine.gpus[reading.uuid].id for reading in snapshot.readings}
        for pair, use in self.live.items():
            if pair in live:
                continue
            if pair[1] not in answering and use.gpu.state in ("lost", "hung", "asleep", "quiet"):
                # The GPU does not answer, or is not asked: nothing is known of its processes.
                live[pair] = use
                continue
            use.now = use.current = GONE
            use.reading = None
            self._unload(use)
            rows.moved[pair] = use
            rows.snapshots.append((now, *pair, *GONE, 0))
        # Only what runs stays in memory, which does not grow with the history.
        waiting = {process_id for process_id, _ in live}
        for key, known in self.known.items():
            if key in seen:
                continue
            if known[0] in waiting:
                seen[key] = known
            else:
                self._ended[known[0]] = known[1]
                self._running.pop(known[0], None)
        self.known, self.live = seen, live

    def _find_use(
        self,
        connection: Connection,
        now: int,
        process: ProcessReading,
        identity: ProcessIdentity | None,
        seen: dict[tuple[int, str | None], tuple[int, Ledger]],
        moved: dict[tuple[int, int], Use],
    ) -> Use:
        """The process on its GPU, added to the ledger if it is new there."""
        who = identity or ProcessIdentity(process.pid)
        key = (who.pid, who.start_key)
        known = (
            seen.get(key) or self.known.get(key) or self.find_or_add(connection, now, self._machine.host_id, who)
        )
        program, program_id = self._running.get(known[0], NOBODY)
        # What is still being asked for may be less than what is known of it from before.
        waits = who.pending and program_id != UNKNOWN_PROGRAM
        if who.program is not NOTHING and program != who.program and not waits:
            self.set_program(connection, now, known[0], who)
        gpu = self._machine.gpus[process.gpu_uuid]
        pair = (known[0], gpu.id)
        use = self.live.get(pair)
        if use is None or use.kind != process.kind:
            use = self._find_or_add_pair(connection, now, known[0], gpu, process, use or moved.get(pair))
            moved[pair] = use
        if use.identity is not None and who.user not in (None, use.identity.user):
            # A directory that did not know the user id has come back.
            named = sa.update(gpu_processes).where(gpu_processes.c.id == known[0]).values(username=who.user)
            connection.execute(named)
        program, use.program_id = self._running.get(known[0], NOBODY)
        if program is not NOTHING and not who.pending:
            self._update_model(connection, now, use, program)
        use.identity, use.key, use.known = identity, key, known
        if who.name is not None:
            use.serves_mps = is_mps_server(who.name)
        return use

    def _update_model(self, connection: Connection, now: int, use: Use, program: Program) -> None:
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
            use.session = ModelSession(insert(connection, model_sessions, row), model, ledger)
            use.has_served = True

    def _unload(self, use: Use) -> None:
        if use.session is not None:
            self._unloaded.append(use.session)
            use.session = None

    def _find_or_add_pair(
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

    def find_or_add(
        self, connection: Connection, now: int, host_id: int | None, identity: ProcessIdentity
    ) -> tuple[int, Ledger]:
        same = sa.and_(gpu_processes.c.host_id == host_id, gpu_processes.c.pid == identity.pid)
        query = sa.select(
            gpu_processes.c.id, gpu_processes.c.program_id, *(gpu_processes.c[name] for name in LEDGER)
        )
        if identity.start_key is not None:
            query = query.where(same, gpu_processes.c.start_key == identity.start_key)
        else:
            grace = max(UNKNOWN_START_GRACE_S, 3 * self._interval_s)
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
        program_id = row_of_program(connection, now, identity.program)
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
        process_id = insert(connection, gpu_processes, row)
        self._running[process_id] = (identity.program, program_id)
        return process_id, Ledger(now)

    def set_program(self, connection: Connection, now: int, process_id: int, identity: ProcessIdentity) -> None:
        """Store what a process runs: more is known of it now, or this recorder has found it running."""
        program_id = row_of_program(connection, now, identity.program)
        before = self._running.get(process_id, NOBODY)[1]
        if before not in (program_id, UNKNOWN_PROGRAM):
            # Stored hours refer to it still.
            used_until(connection, now, before)
        facts: dict[str, object] = {"program_id": program_id or None}
        if identity.name is not None:
            facts["name"] = identity.name
        if identity.user is not None:
            facts["username"] = identity.user
        connection.execute(sa.update(gpu_processes).where(gpu_processes.c.id == process_id).values(facts))
        self._running[process_id] = (identity.program, program_id)

    def resume(self, connection: Connection, last_tick: int, settled: bool) -> None:
        """Take up the processes that were on the GPUs at the newest tick before this recorder's first; `settled`
        says that nothing of them is left to be added."""
        gpus = self._machine.gpus.values()
        found = resume(connection, gpus, last_tick, self._interval_s, self._idle_after_s, settled=settled)
        self.live.update(found.live)
        self.known.update(found.processes)
        self._running.update((process_id, (NOTHING, program)) for process_id, program in found.programs.items())
        self._unloaded += found.unloaded

    def in_turn(self, count: int) -> dict[tuple[int, int], Use]:
        """The processes on GPUs that are to be settled next."""
        if count >= len(self.live):
            return self.live
        pairs = list(self.live)
        self._turn %= len(pairs)
        chosen = (pairs + pairs)[self._turn : self._turn + count]
        self._turn += count
        return {pair: self.live[pair] for pair in chosen}

    def settle(self, connection: Connection, uses: list[Use]) -> None:
        """Store what the ledger has to say of some processes on their GPUs."""
        if not uses and not self._unloaded:
            return
        ids = {use.process_id for use in uses}
        # A process and what it does on each of its GPUs are stored together.
        named = {(use.process_id, use.gpu.id) for use in uses}
        uses += [use for pair, use in self.live.items() if pair[0] in ids and pair not in named]
        self._statements.set_pairs.run(
            connection,
            [
                (
                    *_ledger(use.ledger),
                    int(use.pair in self.live),
                    *_work(use.work),
                    *use.now,
                    use.process_id,
                    use.gpu.id,
                )
                for use in uses
            ],
        )
        ledgers = {process_id: ledger for process_id, ledger in self.known.values() if process_id in ids}
        ledgers |= self._ended
        self._ended = {}
        self._statements.set_processes.run(
            connection,
            [(*_ledger(ledger), process_id) for process_id, ledger in ledgers.items()],
        )
        hours = []
        for use in uses:
            for (step, program_id), used in use.hours.items():
                # Whole joules take half the space; what is left waits for the next time.
                joules = float(int(used.energy_j)) if use.pair in self.live else round(used.energy_j, 3)
                use.rest_j += used.energy_j - joules
                hours.append(
                    (
                        *(step, use.process_id, use.gpu.id, program_id, used.seconds, round(used.busy_s, 3)),
                        *(used.idle_s, used.memory_mib_s, joules, used.max_memory, used.estimated),
                    )
                )
            use.hours = {}
        self._statements.add_hours.run(connection, hours)
        loaded = [(session, 1) for use in uses if use.pair in self.live and (session := use.session)]
        loaded += [(session, 0) for session in self._unloaded]
        self._unloaded = []
        self._statements.set_sessions.run(
            connection, [(*_ledger(session.ledger), active, session.id) for session, active in loaded]
        )


def _ledger(ledger: Ledger) -> tuple[Any, ...]:
    return ledger.last_seen, ledger.max_memory, ledger.avg_memory, ledger.sample_count, ledger.seconds


def _work(work: Work) -> tuple[Any, ...]:
    return (
        *(round(work.busy_s, 3), float(round(work.energy_j)), work.sm_percent_s, work.sm_told_s),
        *(work.max_sm, work.estimated, work.last_busy),
    )
