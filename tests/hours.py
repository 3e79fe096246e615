"""Hours of ticks whose values are known, in a database."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import sqlalchemy as sa
from ticks import GPUS, HOST

from gpumon_core.store import database
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuReading, Snapshot

HOUR = 3600
DAY = 24 * HOUR
# The beginning of a day, so that buckets of all lengths begin there.
DAWN = 1_790_035_200 - 1_790_035_200 % DAY
Values = dict[str, float | None]


@pytest.fixture
def engine(database_url: str) -> sa.Engine:
    return database.open_for_writing(database_url)


def write(
    engine: sa.Engine,
    times: Iterable[int],
    values: Callable[[int], Values],
    gpus: int = 1,
    interval: float = 4,
) -> Writer:
    """Ticks at `times`, the same for `gpus` GPUs."""
    writer = Writer(engine, "here", "nvml", interval)
    ticks = [
        (
            Snapshot(now, HOST, GPUS[:gpus], tuple(GpuReading(g.uuid, values(now)) for g in GPUS[:gpus])),
            {},
        )
        for now in times
    ]
    for start in range(0, len(ticks), 500):
        writer.write_all(ticks[start : start + 500])
    return writer


def wave(now: int) -> Values:
    step = (now - DAWN) // 4
    return {
        "temperature": 40.0 + step % 7,
        "utilization": float(step * 37 % 101),
        "utilization_max": min(100.0, step * 37 % 101 + 5.0),
        "memory": 1000 + step % 13,
        "power": None if step % 5 == 0 else 100.5 + step % 3,
        "energy": 10.0 * step,
    }
