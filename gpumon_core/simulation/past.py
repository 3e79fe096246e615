"""Writes simulated history of any length, with the writer, the rollups and the retention of the store.

It writes no details that retention has to delete again: where only minutes are stored it makes one tick a minute,
and where only hours are stored one every five minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sqlalchemy.engine import Engine

from gpumon_core.settings import Settings
from gpumon_core.simulation.identities import SimulatedAttribution
from gpumon_core.simulation.source import SimulatedSource
from gpumon_core.store import retention, rollups
from gpumon_core.store.writer import Attributed, Writer

DAY_S = 86400
MINUTE_STEP_S = 60.0
HOUR_STEP_S = 300.0
# The ticks of one transaction, and the simulated time between two runs of the rollups and of retention.
BATCH = 200
ROLL_UP_EVERY_S = 6 * 3600
FORGET_EVERY_S = 2 * DAY_S


@dataclass(frozen=True, slots=True)
class HistoryPart:
    """A part of the history, and the seconds between its ticks."""

    start: float
    end: float
    step_s: float


def history_parts(settings: Settings, days: float, now: float) -> list[HistoryPart]:
    """The history of `days` up to `now`, oldest first, each part at the resolution that retention stores."""
    begin = now - days * DAY_S
    edges = (
        (now - settings.retention_hour_days * DAY_S, HOUR_STEP_S),
        (now - settings.retention_minute_days * DAY_S, MINUTE_STEP_S),
        (now - settings.retention_raw_days * DAY_S, settings.interval),
    )
    found = []
    for (start, step), end in zip(edges, (edges[1][0], edges[2][0], now), strict=True):
        start, end = max(begin, start), min(now, end)  # noqa: PLW2901
        if end > start:
            found.append(HistoryPart(start, end, max(step, settings.interval)))
    return found


def fill(
    engine: Engine,
    settings: Settings,
    days: float,
    gpus: int,
    processes: int | None,
    progress: Callable[[float, float], None],
    now: float | None = None,
    mig: bool = True,
) -> int:
    """Write the history, and return the number of its ticks. `progress` is called with the hours done and the
    hours in all. Without `mig` no simulated GPU has MIG instances.

    Raises ValueError for numbers that cannot be simulated, sqlalchemy.exc.DBAPIError.
    """
    source = SimulatedSource(gpus=gpus, host=settings.host_name, processes=processes, mig=mig)
    attribution = SimulatedAttribution(source)
    now = time.time() if now is None else now
    parts = history_parts(settings, days, now)
    total_h = sum(part.end - part.start for part in parts) / 3600
    stored_for = retention.RetentionDays.of(settings)
    done, ticks, forgotten = 0.0, 0, 0.0
    for part in parts:
        writer = Writer(engine, settings.host_name, source.name, part.step_s, 60 * settings.idle_minutes)
        rolled = part.start
        for batch in _batches(source, attribution, part):
            ticks += writer.write_all(batch)
            newest = batch[-1][0].timestamp
            if newest - rolled >= ROLL_UP_EVERY_S:
                rollups.roll_up(engine, settings.host_name)
                rolled = newest
                # Delete what retention deletes by then, so that the file is never much larger than at the end.
                if newest - forgotten >= FORGET_EVERY_S:
                    retention.forget(engine, stored_for, newest, pause_s=0)
                    forgotten = newest
            progress(done + (newest - part.start) / 3600, total_h)
        writer.settle()
        rollups.roll_up(engine, settings.host_name)
        done += (part.end - part.start) / 3600
    retention.forget(engine, stored_for, now, pause_s=0)
    progress(total_h, total_h)
    return ticks


def _batches(
    source: SimulatedSource, attribution: SimulatedAttribution, part: HistoryPart
) -> Iterator[list[Attributed]]:
    batch: list[Attributed] = []
    for tick in range(int((part.end - part.start) / part.step_s)):
        snapshot = source.snapshot_at(part.start + tick * part.step_s)
        pids = {process.pid for process in snapshot.processes}
        batch.append((snapshot, attribution.identify(pids, snapshot.timestamp)))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
