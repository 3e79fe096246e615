"""One process over its life: rows are stored when something changes, and a reader sees every tick all the same."""

from __future__ import annotations

from collections.abc import Callable

import occupied
import pandas as pd
import pytest
import sqlalchemy as sa
from occupied import DAWN
from ticks import GPUS, HOST, who

from gpumon_core.metrics import PROCESS_METRICS
from gpumon_core.store import database, retention
from gpumon_core.store.queries import process_life
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuReading, ProcessReading, Snapshot

# The fixtures that these tests share.
write, ticked, hourly = occupied.write, occupied.ticked, occupied.hourly

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
        # Another process, which always runs and changes at every tick.
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
    life = process_life.ticks(engine, process)
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
    whole = process_life.ticks(engine, process)
    start, end = DAWN + 4 * first, DAWN + 4 * first + 100
    part = process_life.ticks(engine, process, start, end)
    inside = whole[whole["timestamp_epoch"].between(start, end)].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, inside)
    assert len(part) or first == 310


def test_an_unknown_process_has_no_ticks(engine: sa.Engine) -> None:
    life = process_life.ticks(engine, 4711)
    assert life.empty
    assert {"gpu_id", "timestamp_epoch", "memory", "sm_utilization"} <= set(life.columns)


def test_a_short_life_is_read_from_the_ticks(ticked: sa.Engine) -> None:
    frame, by_hour = process_life.steps(ticked, occupied.ids(ticked)[7], 60)
    assert not by_hour
    assert set(frame["gpu_id"]) == {1}
    known = frame.dropna(subset="memory")
    assert 45 <= len(known) <= 70
    step = (occupied.TICKS - 1) * 4 // 60
    for row in known.to_dict("records"):
        begins = row["timestamp_epoch"]
        inside = [
            n for n in range(occupied.TICKS) if begins <= DAWN + 4 * n < begins + step and n not in occupied.GAP
        ]
        due = [occupied.held(n)[0, 7] or 0 for n in inside if (0, 7) in occupied.held(n)]
        assert (row["memory_min"], row["memory_max"]) == (min(due), max(due))
        assert row["memory"] == pytest.approx(sum(due) / len(due))
    # Once it was not on the GPU, and once nothing was recorded.
    breaks = frame.loc[frame["memory"].isna(), "timestamp_epoch"]
    assert [
        (moment - DAWN) // 4 in away for moment, away in zip(breaks, (range(300, 330), occupied.GAP), strict=True)
    ] == [True] * 2


def test_every_metric_of_a_life_has_its_extremes(write: Callable[..., sa.Engine]) -> None:
    ticks = []
    for step in range(100):
        row = ProcessReading("GPU-0", 7, "C", 100, step, 2, None, 1)
        readings = (GpuReading("GPU-0", {"utilization": float(step)}),)
        ticks.append((Snapshot(DAWN + 4 * step, HOST, GPUS[:1], readings, (row,)), who(7)))
    frame, _ = process_life.steps(write(ticks), 1, 4)
    columns = {metric.key + part for metric in PROCESS_METRICS for part in ("", "_min", "_max")}
    assert set(frame.columns) == {"gpu_id", "timestamp_epoch"} | columns
    assert (frame[sorted(columns)].dtypes == "float64").all()
    assert (frame["sm_utilization_min"].min(), frame["sm_utilization_max"].max()) == (0, 99)
    assert (frame["sm_utilization_min"] < frame["sm_utilization"]).all()
    assert frame["encoder_utilization"].isna().all()


def test_a_long_life_is_read_from_the_hours(hourly: sa.Engine) -> None:
    frame, by_hour = process_life.steps(hourly, occupied.ids(hourly)[7], 600)
    assert by_hour
    assert frame["timestamp_epoch"].tolist() == [DAWN + occupied.HOUR * hour for hour in range(8)]
    assert (frame["memory"] == 1000).all()
    assert frame["memory_max"].tolist() == [1000] * 8
    columns = {metric.key + part for metric in PROCESS_METRICS for part in ("", "_min", "_max")}
    assert set(frame.columns) == {"gpu_id", "timestamp_epoch"} | columns


def test_the_sm_utilization_of_an_hour_is_its_part_of_the_gpus_busy_time(write: Callable[..., sa.Engine]) -> None:
    ticks = []
    for minute in range(480):
        rows = tuple(ProcessReading("GPU-0", pid, "C", 100, 30 if pid == 7 else 10) for pid in (7, 8))
        readings = (GpuReading("GPU-0", {"utilization": 80.0}),)
        ticks.append((Snapshot(DAWN + 60 * (minute + 1), HOST, GPUS[:1], readings, rows), who(7, 8)))
    engine = write(ticks, interval=60)
    frame, by_hour = process_life.steps(engine, occupied.ids(engine)[7], 600)
    assert by_hour
    assert frame["sm_utilization"].tolist() == pytest.approx([60.0] * 8)


def test_hours_without_the_process_break_its_line(write: Callable[..., sa.Engine]) -> None:
    minutes = range(480)
    engine = write(
        (occupied.at(DAWN + 60 * (m + 1), {(0, 7): 10} if m // 60 in (0, 1, 4, 7) else {}) for m in minutes), 60
    )
    frame, _ = process_life.steps(engine, occupied.ids(engine)[7], 600)
    drawn = [
        (row["timestamp_epoch"] - DAWN) / occupied.HOUR if row["memory"] > 0 else None
        for row in frame.to_dict("records")
    ]
    assert drawn == [0, 1, None, 4, None, 7]


def test_a_life_without_all_of_its_ticks_is_read_from_the_hours(ticked: sa.Engine, database_url: str) -> None:
    whole, _ = process_life.steps(ticked, occupied.ids(ticked)[7], 600)
    # In its middle: half of a life is not all of it.
    for forgotten_s in (1200, 2 * occupied.HOUR):
        days = retention.RetentionDays(raw_days=1 / 24, minute_days=30, hour_days=730)
        now = DAWN + forgotten_s + occupied.HOUR
        retention.forget(database.open_for_writing(database_url), days, now=now, pause_s=0)
        frame, by_hour = process_life.steps(ticked, occupied.ids(ticked)[7], 600)
        assert by_hour
        assert frame["timestamp_epoch"].tolist() == [DAWN - occupied.HOUR, DAWN], (
            "its first tick is about the time before"
        )
        assert frame["memory"].iloc[-1] == pytest.approx(whole["memory"].mean(), rel=0.02)


def test_an_unknown_process_has_no_steps(ticked: sa.Engine) -> None:
    frame, _ = process_life.steps(ticked, 4711, 600)
    assert frame.empty
    assert {"gpu_id", "timestamp_epoch", "memory", "sm_utilization", "memory_max"} <= set(frame.columns)
