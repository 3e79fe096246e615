"""One process over its life: rows are stored when something changes, and a reader sees every tick all the same."""

from __future__ import annotations

import pandas as pd
import pytest
import sqlalchemy as sa
from ticks import GPUS, HOST, who

from gpumon_core.store import database
from gpumon_core.store.queries import frames
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuReading, ProcessReading, Snapshot

DAWN = 1_800_000_000
TICKS = 900


def there(step: int) -> dict[int, tuple[int, int]]:
    """GPU -> MiB and percent of SMs of the process at a tick; it leaves its first GPU for a while."""
    memory = 2000 if 200 <= step < 210 else 1000
    found = {} if 300 <= step < 320 else {0: (memory, 90 if step == 123 else 0)}
    return found | ({1: (500, step % 3)} if step >= 480 else {})


@pytest.fixture
def engine(database_url: str) -> sa.Engine:
    writer = Writer(database.open_for_writing(database_url), "here", "nvml", 4)
    batch = []
    for step in range(TICKS):
        rows = [
            ProcessReading(f"GPU-{gpu}", 7, "C", memory, sm, None, None, None)
            for gpu, (memory, sm) in there(step).items()
        ]
        # Somebody else, who is always there and always at something.
        rows.append(ProcessReading("GPU-0", 8, "C", 100 + step, step % 100, None, None, None))
        readings = tuple(GpuReading(gpu.uuid, {"utilization": 1.0}) for gpu in GPUS[:2])
        batch.append((Snapshot(DAWN + 4 * step, HOST, GPUS[:2], readings, tuple(rows)), who(7, 8)))
    writer.write_all(batch)
    return database.open_for_reading(database_url)


def id_of(engine: sa.Engine, pid: int) -> int:
    with engine.connect() as connection:
        return int(connection.exec_driver_sql(f"SELECT id FROM gpu_processes WHERE pid = {pid}").scalar() or 0)


def test_every_tick_of_its_life_is_there_though_few_rows_are_stored(engine: sa.Engine) -> None:
    process = id_of(engine, 7)
    life = frames.process_life(engine, process)
    found = {
        (int(row.gpu_id) - 1, (int(row.timestamp_epoch) - DAWN) // 4): (row.memory, row.sm_utilization)
        for row in life.itertuples()
    }
    assert found == {(gpu, step): values for step in range(TICKS) for gpu, values in there(step).items()}
    assert len(life) == len(found), "each once"
    with engine.connect() as connection:
        stored = connection.exec_driver_sql(
            f"SELECT count(*) FROM process_snapshots WHERE process_id = {process} AND gpu_id = 1"
        ).scalar()
    assert stored < 15, "two changes of memory, a busy tick, an absence, and a heartbeat now and then"


@pytest.mark.parametrize("first", [0, 50, 149, 250, 310, 499, 899])
def test_a_part_of_its_life_is_the_same_as_that_part_of_the_whole(engine: sa.Engine, first: int) -> None:
    process = id_of(engine, 7)
    whole = frames.process_life(engine, process)
    start, end = DAWN + 4 * first, DAWN + 4 * first + 100
    part = frames.process_life(engine, process, start, end)
    inside = whole[whole["timestamp_epoch"].between(start, end)].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, inside)
    assert len(part) or first == 310


def test_of_one_that_nobody_knows_there_is_nothing(engine: sa.Engine) -> None:
    life = frames.process_life(engine, 4711)
    assert life.empty
    assert {"gpu_id", "timestamp_epoch", "memory", "sm_utilization"} <= set(life.columns)
