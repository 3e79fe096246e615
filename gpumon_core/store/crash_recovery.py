"""What a recorder continues: the processes of before its start, and what the last recorder left out of the ledger.

Rows of the ledger are brought up to date in turn, and all of them when a recorder ends. One that is killed leaves
ticks behind that are in the database and not in the ledger: they are read once more, and added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from gpumon_core.store.accounting import (
    HEARTBEAT_S,
    MEMORY,
    PROCESS_KEYS,
    UNKNOWN_PROGRAM,
    WORK,
    Gpu,
    Ledger,
    ModelSession,
    Use,
    Work,
    is_mps_server,
    longest_step,
    plus,
    share_out,
)
from gpumon_core.store.schema import gpu_metrics, gpu_processes, model_sessions, process_gpus, process_snapshots

# Of a GPU at a tick: its id, energy (J), power (W), utilization (%) and the time that it speaks of (ms).
GpuTick = tuple[int, float | None, float | None, float | None, int | None]
# Labels of ticks are whole seconds: the time between two may seem longer by so much.
LABEL_S = 1.0


@dataclass(slots=True)
class Resumed:
    """Who was on a host's GPUs at its newest tick.

    live: by process and GPU. processes: their ids and rows of the ledger, by PID and start key. programs: what
    they run, by their id. unloaded: sessions whose model is no longer there.
    """

    live: dict[tuple[int, int], Use] = field(default_factory=dict)
    processes: dict[tuple[int, str | None], tuple[int, Ledger]] = field(default_factory=dict)
    programs: dict[int, int] = field(default_factory=dict)
    unloaded: list[ModelSession] = field(default_factory=list)


def resume(
    connection: Connection,
    gpus: Iterable[Gpu],
    newest: int,
    interval_s: float,
    idle_after_s: float,
    settled: bool = False,
) -> Resumed:
    """Take up the processes that were on these GPUs at the newest tick (UTC seconds), with all that was recorded
    of them until then; `settled`: all of it is in the ledger. Raises sqlalchemy.exc.DBAPIError."""
    found = Resumed()
    by_id = {gpu.id: gpu for gpu in gpus}
    query = sa.select(process_gpus).where(process_gpus.c.active == 1, process_gpus.c.gpu_id.in_(list(by_id)))
    for row in connection.execute(query):
        use = known_use(row, by_id[row.gpu_id])
        found.live[use.pair] = use
    if found.live:
        ids = {process_id for process_id, _ in found.live}
        names: dict[int, str | None] = {}
        for row in connection.execute(sa.select(gpu_processes).where(gpu_processes.c.id.in_(ids))):
            found.processes[row.pid, row.start_key] = (row.id, known_ledger(row))
            found.programs[row.id] = row.program_id or UNKNOWN_PROGRAM
            names[row.id] = row.name
        for use in found.live.values():
            use.program_id = found.programs.get(use.process_id, UNKNOWN_PROGRAM)
            use.serves_mps = is_mps_server(names.get(use.process_id))
        _resume_sessions(connection, found, ids)
        if not settled:
            _catch_up(connection, found, by_id, newest, interval_s, idle_after_s)
    return found


def known_ledger(row: Any) -> Ledger:
    """What a row of gpu_processes, process_gpus or model_sessions has counted."""
    return Ledger(row.last_seen, row.max_memory, row.avg_memory, row.sample_count, row.seconds or 0.0)


def known_use(row: Any, gpu: Gpu) -> Use:
    """A process on a GPU, as its row of process_gpus has it."""
    work = Work(**{name: getattr(row, name) for name in WORK})
    work.last_busy = work.last_busy or row.last_seen
    return Use(row.process_id, gpu, row.kind, known_ledger(row), work, first_seen=row.first_seen)


def _resume_sessions(connection: Connection, found: Resumed, ids: Iterable[int]) -> None:
    query = sa.select(model_sessions).where(model_sessions.c.active == 1, model_sessions.c.process_id.in_(ids))
    for row in connection.execute(query):
        session = ModelSession(row.id, row.model, known_ledger(row))
        use = found.live.get((row.process_id, row.gpu_id))
        if use is None or use.session is not None:
            found.unloaded.append(session)
        else:
            use.session, use.has_served = session, True


def _catch_up(
    connection: Connection,
    found: Resumed,
    by_id: Mapping[int, Gpu],
    newest: int,
    interval_s: float,
    idle_after_s: float,
) -> None:
    """Add the ticks that a killed recorder had written, and not settled, to the ledger."""
    settled = min(use.ledger.last_seen for use in found.live.values())
    if settled >= newest:
        return
    ticks = _ticks(connection, list(by_id), settled, newest)
    states = _states(connection, list(by_id), settled, newest)
    uses: dict[tuple[int, int], Use] = {}
    ledgers = dict(found.processes.values())
    energy: dict[int, float] = {}
    seen: dict[int, int] = {}
    place, before = 0, None
    for now in sorted(ticks):
        while place < len(states) and states[place].timestamp_epoch <= now:
            row = states[place]
            place += 1
            pair = (row.process_id, row.gpu_id)
            if not row.present:
                uses.pop(pair, None)
                continue
            use = found.live.get(pair)
            if use is None:
                # It has ended since, and is settled; but it had its part of the GPU.
                use = uses.get(pair) or _ended(connection, row.process_id, by_id[row.gpu_id], now)
            use.now = tuple(getattr(row, key) for key in PROCESS_KEYS)
            uses[pair] = use
        usual = float(now - before) if before and now - before <= longest_step(interval_s) else interval_s
        before = now
        totals: dict[int, int | None] = {}
        dt = usual
        for gpu_id, joules, power, utilization, recorded_ms in ticks[now]:
            gpu = by_id[gpu_id]
            gpu.utilization = utilization
            dt = usual if recorded_ms is None else recorded_ms / 1000
            known, estimate = energy.get(gpu_id), (power or 0.0) * dt
            gpu.tick_j = estimate if known is None or joules is None else max(0.0, joules - known)
            if power is not None and now - seen.get(gpu_id, now) > dt + LABEL_S:
                # What was taken while nobody looked is nobody's.
                gpu.tick_j = min(gpu.tick_j, estimate)
            seen[gpu_id] = now
            if joules is not None:
                energy[gpu_id] = joules
            here = [use for use in uses.values() if use.gpu is gpu]
            late = [use for use in here if use.ledger.last_seen < now and (use.process_id, gpu_id) in found.live]
            share_out(gpu, here, now, dt, idle_after_s, only=late)
            for use in late:
                memory = use.now[MEMORY]
                use.ledger.add(now, dt, memory)
                if use.session is not None:
                    use.session.ledger.add(now, dt, memory)
                totals[use.process_id] = plus(totals.get(use.process_id), memory)
        for process_id, total in totals.items():
            if ledgers[process_id].last_seen < now:
                ledgers[process_id].add(now, dt, total)


def _ended(connection: Connection, process_id: int, gpu: Gpu, now: int) -> Use:
    """One that is there no more."""
    query = (
        sa.select(process_gpus.c.kind, gpu_processes.c.name)
        .join(gpu_processes, gpu_processes.c.id == process_gpus.c.process_id)
        .where(process_gpus.c.process_id == process_id, process_gpus.c.gpu_id == gpu.id)
    )
    kind, name = connection.execute(query).one_or_none() or ("", None)
    return Use(process_id, gpu, kind, Ledger(now), Work(), serves_mps=is_mps_server(name))


def _ticks(connection: Connection, gpu_ids: Sequence[int], first: int, last: int) -> dict[int, list[GpuTick]]:
    """What the GPUs did from `first` to `last`, by tick."""
    time = gpu_metrics.c.timestamp_epoch
    ticks: dict[int, list[GpuTick]] = {}
    columns = (gpu_metrics.c[name] for name in ("energy", "power", "utilization", "recorded_ms"))
    query = sa.select(time, gpu_metrics.c.gpu_id, *columns).where(
        gpu_metrics.c.gpu_id.in_(gpu_ids), time >= first, time <= last
    )
    for now, gpu_id, *values in connection.execute(query):
        ticks.setdefault(now, []).append((gpu_id, *values))
    return ticks


def _states(connection: Connection, gpu_ids: Sequence[int], first: int, last: int) -> list[Any]:
    """The rows of process_snapshots that hold from `first` to `last`, the oldest first."""
    time = process_snapshots.c.timestamp_epoch
    query = (
        sa.select(process_snapshots)
        .where(time > first - 2 * HEARTBEAT_S, time <= last, process_snapshots.c.gpu_id.in_(gpu_ids))
        .order_by(time)
    )
    return list(connection.execute(query))
