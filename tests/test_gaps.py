"""A gap is judged by the interval of its time: charts of a range in which the interval was changed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from ticks import HOST, who

from gpumon_core.store import database, rollups
from gpumon_core.store.queries import occupancy, process_life
from gpumon_core.store.queries.history import metrics_history
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuInfo, GpuReading, ProcessReading, Snapshot

BEGIN = 1_800_000_000
GPU = GpuInfo(0, "GPU-0", "Board", 24000, 300.0)
# Interval, when it begins, when it ends. Between the last two is a pause of 300 s: a gap at 10 s, none at 120 s.
PARTS = ((120, 0, 1200), (10, 1200, 1800), (10, 2100, 2700))


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = database.open_for_writing(database_url)
    for interval, begin, end in PARTS:
        writer = Writer(engine, "here", "nvml", interval)
        for at in range(begin + interval, end + 1, interval):
            # The energy is that of 100 W, in the pause too.
            values = {"power": 100.0, "energy": 1e6 + 100.0 * at, "utilization": 50.0, "memory": 900}
            rows = (ProcessReading("GPU-0", 7, "C", 900, 50, 0, 0, 0),)
            reading = (GpuReading("GPU-0", values),)
            writer.write(Snapshot(BEGIN + at, HOST, (GPU,), reading, rows, elapsed=500.0 + at), who(7))
        writer.settle()
    rollups.roll_up(engine, "here")
    yield engine
    engine.dispose()


@pytest.mark.parametrize("points", [300, 40])
def test_history_breaks_where_nothing_was_recorded_and_nowhere_else(engine: sa.Engine, points: int) -> None:
    frame = metrics_history(engine, [1], ["power"], BEGIN, BEGIN + 2700, points)
    [gap] = frame.loc[frame["power"].isna(), "timestamp_epoch"]
    assert 1800 < gap - BEGIN < 2110
    assert frame["power"].dropna().eq(100.0).all()


def test_memory_by_process_has_no_hole_but_the_pause(engine: sa.Engine) -> None:
    frame = occupancy.memory_by_process(engine, [1], BEGIN + 130, BEGIN + 2700, 257, 5)
    held = frame.set_index(frame["timestamp_epoch"] - BEGIN)[1]
    assert (held[held.index < 1800] == 900).all()
    assert (held[(held.index > 1805) & (held.index < 2100)] == 0).all()
    assert (held[(held.index > 2110) & (held.index < 2690)] == 900).all()


def test_a_life_is_as_long_as_the_process_lived_and_breaks_in_the_pause(engine: sa.Engine) -> None:
    frame, by_hour = process_life.steps(engine, 1, 300)
    assert not by_hour
    [gap] = frame.loc[frame["memory"].isna(), "timestamp_epoch"]
    assert 1800 < gap - BEGIN < 2110
    assert frame["timestamp_epoch"].min() - BEGIN <= 125
    assert frame["timestamp_epoch"].max() - BEGIN >= 2690


@pytest.mark.parametrize("points", [1, 3, 50])
def test_few_points_have_the_energy_of_the_whole_range(engine: sa.Engine, points: int) -> None:
    for begin, end in ((600, 2700), (1300, 1700), (1900, 2400)):
        frame = metrics_history(engine, [1], ["energy"], BEGIN + begin, BEGIN + end, points)
        assert frame["energy"].sum() == pytest.approx(100 * (end - begin), abs=1300), (begin, end)
