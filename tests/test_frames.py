"""What readers get out of the store."""

from __future__ import annotations

import math

import pytest
import sqlalchemy as sa
from ticks import GPUS, tick, who

from gpumon_core.store import database
from gpumon_core.store.queries import frames
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuReading, Snapshot


@pytest.fixture
def url(database_url: str) -> str:
    return database_url


@pytest.fixture
def writer(url: str) -> Writer:
    return Writer(database.open_for_writing(url), "here", "nvml", 4)


@pytest.fixture
def engine(url: str) -> sa.Engine:
    return database.open_for_reading(url)


def reading(now: int, **values: float) -> Snapshot:
    plain = tick(now, gpus=GPUS[:1])
    return Snapshot(now, plain.host, plain.gpus, (GpuReading("GPU-0", values),))


def test_the_gpu_table_has_the_newest_values(writer: Writer, engine: sa.Engine) -> None:
    writer.write(reading(100, temperature=50.0), {})
    writer.write(reading(104, temperature=55.0), {})
    [row] = frames.gpu_table(engine).to_dict("records")
    assert (row["host"], row["gpu_index"], row["temperature"], row["last_seen"]) == ("here", 0, 55.0, 104)
    assert math.isnan(row["power"])


def test_history_gives_every_tick_where_they_fit(writer: Writer, engine: sa.Engine) -> None:
    for now in range(1000, 1100, 4):
        writer.write(reading(now, temperature=float(now)), {})
    frame = frames.history(engine, [1], ["temperature"], 1000, 1100, points=1000)
    assert frame["timestamp_epoch"].tolist() == list(range(1000, 1100, 4))
    assert frame["temperature"].tolist() == [float(now) for now in range(1000, 1100, 4)]


def test_history_in_few_points_keeps_every_spike(writer: Writer, engine: sa.Engine) -> None:
    for now in range(1000, 2000, 4):
        writer.write(reading(now, utilization=100.0 if now == 1500 else 0.0), {})
    frame = frames.history(engine, [1], ["utilization"], 1000, 2000, points=10)
    assert 8 <= len(frame) <= 12
    assert frame["utilization_max"].max() == 100
    assert frame["utilization_min"].min() == 0
    assert 0 < frame["utilization"].max() < 10


def test_a_pause_in_the_recording_breaks_the_line(writer: Writer, engine: sa.Engine) -> None:
    for now in [*range(1000, 1040, 4), *range(1100, 1140, 4)]:
        writer.write(reading(now, temperature=50.0), {})
    frame = frames.history(engine, [1], ["temperature"], 1000, 1200, points=1000)
    [gap] = frame.index[frame["temperature"].isna()]
    assert 1036 < frame["timestamp_epoch"][gap] < 1100
    assert len(frame) == 21


def test_a_tick_that_comes_late_is_no_pause(writer: Writer, engine: sa.Engine) -> None:
    for now in (1000, 1004, 1008, 1016, 1020, 1024):
        writer.write(reading(now, temperature=50.0), {})
    assert not frames.history(engine, [1], ["temperature"], 1000, 1100, 1000)["temperature"].isna().any()


def test_two_gpus_side_by_side_make_no_gap(writer: Writer, engine: sa.Engine) -> None:
    for now in range(1000, 1040, 4):
        writer.write(tick(now, gpus=GPUS), {})
    frame = frames.history(engine, [1, 2, 3], ["temperature", "power"], 1000, 1100, 1000)
    assert not frame["temperature"].isna().any()
    assert frame["power"].isna().all()
    assert set(frame["gpu_id"]) == {1, 2, 3}


def test_nothing_recorded_is_an_empty_frame_with_its_columns(writer: Writer, engine: sa.Engine) -> None:
    writer.write(reading(100, temperature=1.0), {})
    frame = frames.history(engine, [1], ["temperature"], 5000, 6000, 100)
    assert frame.empty
    assert list(frame) == ["gpu_id", "timestamp_epoch", "temperature", "temperature_min", "temperature_max"]
    assert frames.active_processes(engine).empty


def test_a_metric_that_does_not_exist_is_refused(writer: Writer, engine: sa.Engine) -> None:
    with pytest.raises(ValueError, match="not in the catalogue: nonsense"):
        frames.history(engine, [1], ["nonsense"], 0, 1, 1)


def test_active_processes_are_those_of_the_newest_tick(writer: Writer, engine: sa.Engine) -> None:
    writer.write(tick(100, {(0, 7): 1000, (1, 8): 9000}), who(7, 8))
    writer.write(tick(104, {(0, 7): 3000, (1, 7): 500}), who(7))
    frame = frames.active_processes(engine)
    assert frame[["pid", "gpu_index", "memory", "max_memory", "avg_memory", "first_seen"]].to_dict("list") == {
        "pid": [7, 7],
        "gpu_index": [0, 1],
        "memory": [3000.0, 500.0],
        "max_memory": [3000.0, 500.0],
        "avg_memory": [2000.0, 500.0],
        "first_seen": [100, 104],
    }
