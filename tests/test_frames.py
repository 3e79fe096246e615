"""What is now, as frames."""

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


def test_where_nothing_runs_the_frame_of_processes_is_empty(writer: Writer, engine: sa.Engine) -> None:
    writer.write(reading(100, temperature=1.0), {})
    assert frames.active_processes(engine).empty


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
