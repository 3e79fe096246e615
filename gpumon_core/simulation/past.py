"""Writes simulated history of any length, through the store's own writer, rollups and retention.

What retention would have forgotten by now is never written in detail: where only minutes are kept the
simulation is asked once a minute, where only hours are kept every five minutes.
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
# So many ticks are one transaction, and so much simulated time lies between two runs of the rollups.
BATCH = 200
ROLL_UP_EVERY_S = 6 * 3600
FORGET_EVERY_S = 2 * DAY_S


@dataclass(frozen=True, slots=True)
class Stretch:
    """A piece of the history and the seconds between its ticks."""

    start: float
    end: float
    step_s: float


def stretches(settings: Settings, days: float, now: float) -> list[Stretch]:
    """The history of `days` up to `now`, oldest first, each piece as fine as it would be kept."""
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
            found.append(Stretch(start, end, max(step, settings.interval)))
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
    """Write the history; how many ticks it has. `progress` is told the hours done and the hours in all; without
    `mig` no simulated GPU is divided.

    Raises ValueError for numbers that cannot be simulated, sqlalchemy.exc.DBAPIError.
    """
    source = SimulatedSource(gpus=gpus, host=settings.host_name, processes=processes, mig=mig)
    attribution = SimulatedAttribution(source)
    now = time.time() if now is None else now
    pieces = stretches(settings, days, now)
    whole = sum(piece.end - piece.start for piece in pieces) / 3600
    keep = retention.Keep(
        settings.retention_raw_days, settings.retention_minute_days, settings.retention_hour_days
    )
    done, ticks, forgotten = 0.0, 0, 0.0
    for piece in pieces:
        writer = Writer(engine, settings.host_name, source.name, piece.step_s, 60 * settings.idle_minutes)
        rolled = piece.start
        for batch in _batches(source, attribution, piece):
            ticks += writer.write_all(batch)
            newest = batch[-1][0].timestamp
            if newest - rolled >= ROLL_UP_EVERY_S:
                rollups.roll_up(engine, settings.host_name)
                rolled = newest
                # What would be forgotten by then, so that the file never is much larger than in the end.
                if newest - forgotten >= FORGET_EVERY_S:
                    retention.forget(engine, keep, newest, pause_s=0)
                    forgotten = newest
            progress(done + (newest - piece.start) / 3600, whole)
        writer.settle()
        rollups.roll_up(engine, settings.host_name)
        done += (piece.end - piece.start) / 3600
    retention.forget(engine, keep, now, pause_s=0)
    progress(whole, whole)
    return ticks


def _batches(
    source: SimulatedSource, attribution: SimulatedAttribution, piece: Stretch
) -> Iterator[list[Attributed]]:
    batch: list[Attributed] = []
    for tick in range(int((piece.end - piece.start) / piece.step_s)):
        snapshot = source.snapshot_at(piece.start + tick * piece.step_s)
        pids = {process.pid for process in snapshot.processes}
        batch.append((snapshot, attribution.identify(pids, snapshot.timestamp)))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
