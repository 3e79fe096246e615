"""What a mean over time is, whatever the interval was and wherever values are missing; and whose a pause is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from ticks import HOST, ask, who

from gpumon_core.store import database, rollups
from gpumon_core.store.queries.history import metrics_history
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuInfo, GpuReading, ProcessReading, Snapshot

BEGIN = 1_800_000_000
HOUR = 3600
GPUS = (GpuInfo(0, "GPU-0", "Board", 24000, 300.0), GpuInfo(1, "GPU-1", "Board", 24000, 300.0))


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    opened = database.open_for_writing(database_url)
    yield opened
    opened.dispose()


def test_means_weigh_time_not_ticks(engine: sa.Engine) -> None:
    """Twenty minutes each at 10, 1 and 60 s between ticks, at 0, 100 and 0 %."""
    at = BEGIN
    for interval, utilization in ((10, 0.0), (1, 100.0), (60, 0.0)):
        writer, ticks = Writer(engine, "here", "nvml", interval), []
        for _ in range(1200 // interval):
            at += interval
            reading = (GpuReading("GPU-0", {"utilization": utilization}),)
            ticks.append((Snapshot(at - 1, HOST, GPUS[:1], reading, elapsed=float(at)), {}))
        writer.write_all(ticks)
    rollups.roll_up(engine, "here")
    for table, times in (("gpu_hours", 10), ("gpu_4h", 10)):
        [(mean,)] = ask(engine, f"SELECT utilization FROM {table}")
        assert mean == pytest.approx(times * 100 / 3, abs=0.02 * times * 100), table
    frame = metrics_history(engine, [1], ["utilization"], BEGIN, BEGIN + HOUR - 1, 1)
    assert frame["utilization"].mean() == pytest.approx(100 / 3, abs=1)


def test_means_weigh_only_time_in_which_there_was_a_value(engine: sa.Engine) -> None:
    """250 W for ten minutes of an hour, 50 W for one minute; the power is not known for the rest."""
    writer, ticks = Writer(engine, "here", "nvml", 4), []
    for step in range(900):
        power = 250.0 if step < 150 else 50.0 if step < 165 else None
        values = {"power": power, "utilization": 10.0}
        ticks.append((Snapshot(BEGIN + 4 * step, HOST, GPUS[:1], (GpuReading("GPU-0", values),)), {}))
    writer.write_all(ticks)
    rollups.roll_up(engine, "here")
    due = (150 * 250 + 15 * 50) / 165
    for table in ("gpu_hours", "gpu_4h"):
        [(power, known_ms, recorded_ms, load_ms)] = ask(
            engine, f"SELECT power, power_known_ms, recorded_ms, utilization_known_ms FROM {table}"
        )
        assert power == pytest.approx(10 * due, abs=1), table
        assert (known_ms, recorded_ms, load_ms) == (660_000, HOUR * 1000, None), table
    frame = metrics_history(engine, [1], ["power"], BEGIN, BEGIN + HOUR - 1, 1)
    assert frame["power"].max() == pytest.approx(due, abs=0.2)


def test_a_range_of_hours_does_not_have_the_hour_at_its_end(engine: sa.Engine) -> None:
    writer, ticks = Writer(engine, "here", "nvml", 60), []
    for step in range(30 * 60):
        reading = (GpuReading("GPU-0", {"utilization": 10.0}),)
        ticks.append((Snapshot(BEGIN + 60 * step, HOST, GPUS[:1], reading), {}))
    writer.write_all(ticks)
    rollups.roll_up(engine, "here")
    frame = metrics_history(engine, [1], ["utilization"], BEGIN, BEGIN + 24 * HOUR, 24)
    assert len(frame) == 24


def test_what_a_lost_gpu_took_is_nobodys_and_lies_in_the_hours_in_which_it_took_it(engine: sa.Engine) -> None:
    """300 W; ada's for an hour, lost for the next, bob's for the third. The other GPU is there all the time."""
    writer, ticks = Writer(engine, "here", "nvml", 60), []
    ada, bob = who(7), {8: who(8)[8]}
    for step in range(3 * 60):
        lost = frozenset({"GPU-1"}) if 60 <= step < 120 else frozenset()
        values = {"utilization": 100.0, "power": 300.0, "energy": 300.0 * 60 * step}
        readings = tuple(GpuReading(gpu.uuid, values) for gpu in GPUS if gpu.uuid not in lost)
        rows = () if lost else (ProcessReading("GPU-1", 7 if step < 60 else 8, "C", 900, 100, 0, 0, 0),)
        at = BEGIN + 60 * (step + 1)
        ticks.append((Snapshot(at, HOST, GPUS, readings, rows, lost, elapsed=1000.0 + 60 * step), ada | bob))
    writer.write_all(ticks)
    writer.settle()
    query = (
        "SELECT pid, sum(energy_j), sum(busy_s) FROM process_hours JOIN gpu_processes ON id = process_id "
        "GROUP BY pid ORDER BY pid"
    )
    assert ask(engine, query) == [(7, 59 * 18000.0, 3600.0), (8, 60 * 18000.0, 3600.0)]
    query = (
        "SELECT timestamp_epoch / 3600 * 3600, sum(energy_j), sum(unrecorded_j) FROM gpu_usage "
        "WHERE gpu_id = 2 GROUP BY 1 ORDER BY 1"
    )
    assert ask(engine, query) == [
        (BEGIN, 59 * 18000.0, 0.0),
        (BEGIN + HOUR, 60 * 18000.0, 60 * 18000.0),
        (BEGIN + 2 * HOUR, 60 * 18000.0, 0.0),
    ]
