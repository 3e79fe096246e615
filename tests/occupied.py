"""Histories of processes on GPUs of which everything is known: forty minutes tick by tick, and eight hours."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from ticks import GPUS, runs, tick, who

from gpumon_core.attribution.records import Program
from gpumon_core.store import database
from gpumon_core.store.writer import Attributed, Writer
from gpumon_core.telemetry.records import GpuInfo

DAWN = 1_800_000_000  # The beginning of an hour.
HOUR = 3600
# (GPU, PID) -> MiB.
Held = dict[tuple[int, int], int | None]


@pytest.fixture
def write(database_url: str) -> Callable[..., sa.Engine]:
    """Writes ticks, as a recorder that ends then, and returns an engine to read them."""
    engine = database.open_for_writing(database_url)

    def written(ticks: Iterable[Attributed], interval: float = 4, host: str = "here", settle: bool = True) -> Any:
        writer = Writer(engine, host, "nvml", interval)
        # In batches, as many ticks are settled at once as a batch has.
        batch: list[Attributed] = []
        for one in ticks:
            batch.append(one)
            if len(batch) == 200:
                writer.write_all(batch)
                batch = []
        writer.write_all(batch)
        if settle:
            writer.settle()
        return database.open_for_reading(database_url)

    return written


def at(
    moment: float, held: Held, gpus: tuple[GpuInfo, ...] = GPUS, lost: frozenset[str] = frozenset()
) -> Attributed:
    return tick(moment, held, gpus, lost), who(*(pid for _, pid in held))


def ids(engine: sa.Engine) -> dict[int, int]:
    """PID -> id in the ledger."""
    with engine.connect() as connection:
        return {row[0]: row[1] for row in connection.exec_driver_sql("SELECT pid, id FROM gpu_processes")}


def gpu_ids(engine: sa.Engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.exec_driver_sql("SELECT id FROM gpus ORDER BY host_id, gpu_index").scalars())


TICKS = 600
GAP = range(520, 561)


def held(step: int) -> Held:
    """What each process holds at a tick of forty minutes."""
    found: Held = {(2, 11): 50, (2, 10): None}
    if not 300 <= step < 330:
        # So many changes that there are several in every step of the chart.
        found[0, 7] = 1000 + 10 * (step % 7)
    if 100 <= step < 500:
        found |= {(0, 8): 500, (1, 8): 700}
    if 205 <= step < 208:
        found |= {(0, 9): 4000 + step, (1, 9): 300}
    return found


@pytest.fixture
def ticked(write: Callable[..., sa.Engine]) -> sa.Engine:
    return write(at(DAWN + 4 * step, held(step)) for step in range(TICKS) if step not in GAP)


SERVER = Program(workload="vLLM", category="inference", model="a")


def by_the_hour(minute: int) -> Held:
    """What each process holds in a minute of eight hours."""
    hour = minute // 60
    found: Held = {(0, 7): 1000}
    if hour in (1, 5):
        found[1, 8] = 1000 if minute % 60 < 30 else 3000
    if minute >= 150:
        found |= {(0, 11): 64, (1, 11): 32}
    if 376 <= minute < 379:
        found[2, 9] = 7000
    return found


@pytest.fixture
def hourly(write: Callable[..., sa.Engine]) -> sa.Engine:
    ticks = []
    for minute in range(480):
        # A tick is about the minute before it.
        snapshot, known = at(DAWN + 60 * (minute + 1), by_the_hour(minute))
        # In the middle of an hour it begins to serve another model.
        known |= runs(7, SERVER if minute < 210 else replace(SERVER, model="b"))
        ticks.append((snapshot, known))
    return write(ticks, interval=60)
