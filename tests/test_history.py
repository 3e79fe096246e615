"""What a chart of any length gets from the store (store/queries/history.py)."""

from __future__ import annotations

import itertools
import warnings

import hours
import numpy as np
import pytest
import sqlalchemy as sa
from hours import DAWN, DAY, HOUR, Values, wave, write
from ticks import GPUS, tick

from gpumon_core.metrics import GPU_METRICS
from gpumon_core.store import database, retention, rollups
from gpumon_core.store.queries.history import metrics_history
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuReading, Snapshot

# The fixture that these tests share.
engine = hours.engine


@pytest.fixture
def reader(database_url: str, engine: sa.Engine) -> sa.Engine:
    return database.open_for_reading(database_url)


@pytest.fixture
def filled(engine: sa.Engine, reader: sa.Engine) -> sa.Engine:
    """Two days of ticks of a GPU, every 20 seconds and for the last two hours every 4, rolled up."""
    end = DAWN + 2 * DAY
    write(engine, range(DAWN, end - 2 * HOUR, 20), wave)
    write(engine, range(end - 2 * HOUR, end, 4), wave)
    rollups.roll_up(engine, "here")
    return reader


@pytest.mark.parametrize("began", [DAWN, DAWN + 5 * HOUR + 1037])
@pytest.mark.parametrize("rolled", [False, True])
def test_a_young_history_fills_a_long_range_with_points(
    reader: sa.Engine, engine: sa.Engine, rolled: bool, began: int
) -> None:
    times = range(began, began + 15 * 60, 4)
    write(engine, times, wave)
    if rolled:
        rollups.roll_up(engine, "here")
    end = times[-1] + 4
    for span in (HOUR, DAY, 30 * DAY, 365 * DAY):
        found = metrics_history(reader, [1], ["temperature"], end - span, end, 200)
        assert 100 <= len(found.dropna()) <= 230, span


def test_a_machine_that_is_on_for_two_hours_a_day_is_drawn_as_finely_as_one_that_always_runs(
    reader: sa.Engine, engine: sa.Engine
) -> None:
    times = [DAWN + day * DAY + second for day in range(3) for second in range(0, 2 * HOUR, 4)]
    write(engine, times, wave)
    rollups.roll_up(engine, "here")
    found = metrics_history(reader, [1], ["temperature"], DAWN, DAWN + 3 * DAY, 1000)
    assert 500 <= len(found.dropna()) <= 1150
    assert found["temperature"].isna().sum() == 2


def test_any_range_has_at_least_half_of_the_points_and_hardly_more(filled: sa.Engine) -> None:
    end = DAWN + 2 * DAY
    for span, points in itertools.product((900, HOUR, 2 * HOUR, 6 * HOUR, DAY, 2 * DAY), (50, 300, 1000)):
        found = metrics_history(filled, [1], ["temperature", "utilization"], end - span, end, points)
        ticks = min(span, 2 * HOUR) // 4 + max(0, span - 2 * HOUR) // 20
        assert min(points, ticks) / 2 <= len(found.dropna()) <= points * 1.1 + 2, (span, points)
        assert found["timestamp_epoch"].is_monotonic_increasing
        assert found["timestamp_epoch"].between(end - span, end).all()
        assert not found["temperature"].isna().any(), "there is no gap"
        assert found["temperature_min"].min() == 40
        assert found["temperature_max"].max() == 46
        assert (found["utilization_min"] <= found["utilization"] + 0.1).all()
        assert (found["utilization"] <= found["utilization_max"] + 0.1).all()
        assert found["utilization_max"].max() >= 99


@pytest.mark.parametrize("rolled", [False, True])
def test_ticks_from_before_the_interval_was_raised_are_not_drawn_one_by_one(
    engine: sa.Engine, reader: sa.Engine, rolled: bool
) -> None:
    end = DAWN + DAY
    write(engine, range(DAWN, end, 4), wave, interval=4)
    if rolled:
        rollups.roll_up(engine, "here")
    write(engine, [end], wave, interval=300)
    for span in (HOUR, 6 * HOUR, DAY):
        found = metrics_history(reader, [1], ["temperature"], end - span, end, 200)
        assert 100 <= len(found.dropna()) <= 230, span
        assert found["temperature_max"].max() == 46


def test_a_range_of_one_moment_is_its_tick(engine: sa.Engine, reader: sa.Engine) -> None:
    write(engine, range(DAWN, DAWN + 60, 4), wave)
    found = metrics_history(reader, [1], ["temperature"], DAWN + 8, DAWN + 8, 200)
    assert found["timestamp_epoch"].tolist() == [DAWN + 8]
    assert metrics_history(reader, [1], ["temperature"], DAWN + 9, DAWN + 9, 200).empty


def test_a_spike_is_in_a_chart_of_any_length(engine: sa.Engine, reader: sa.Engine) -> None:
    spike = DAWN + 31 * HOUR + 4 * 123
    write(engine, range(DAWN, DAWN + 2 * DAY, 4), lambda now: {"power": 900.0 if now == spike else 50.0})
    rollups.roll_up(engine, "here")
    for points in (10, 100, 1000):
        found = metrics_history(reader, [1], ["power"], DAWN, DAWN + 2 * DAY, points)
        assert found["power_max"].max() == 900
        at = found.loc[found["power_max"].idxmax(), "timestamp_epoch"]
        assert abs(at - spike) <= 2 * DAY / points


def test_what_is_not_rolled_up_yet_is_read_from_the_ticks(engine: sa.Engine, reader: sa.Engine) -> None:
    write(engine, range(DAWN, DAWN + DAY, 20), wave)
    found = metrics_history(reader, [1], ["temperature"], DAWN, DAWN + DAY, 500)
    assert 250 <= len(found) <= 550
    rollups.roll_up(engine, "here")
    write(engine, range(DAWN + DAY, DAWN + DAY + 2 * HOUR, 20), wave)
    found = metrics_history(reader, [1], ["temperature"], DAWN, DAWN + DAY + 2 * HOUR, 500)
    assert found["timestamp_epoch"].max() >= DAWN + DAY + 2 * HOUR - 400
    assert found["timestamp_epoch"].is_unique
    assert not found["temperature"].isna().any()


def test_where_the_detail_is_deleted_the_next_coarser_resolution_is_read(
    engine: sa.Engine, reader: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "PAUSE_S", 0)
    end = DAWN + 2 * DAY
    write(engine, range(DAWN, end, 20), wave)
    rollups.roll_up(engine, "here")
    retention.forget(engine, retention.RetentionDays(0.5, 1, 30), end)
    found = metrics_history(reader, [1], ["temperature"], DAWN, end, 600)
    times = found["timestamp_epoch"].to_numpy()
    assert times[0] <= DAWN + HOUR, "hours tell of the first day"
    assert (np.diff(times) > 0).all()
    assert np.diff(times[times < end - DAY]).max() <= HOUR
    assert np.diff(times[times > end - DAY]).max() <= 600
    assert not found["temperature"].isna().any(), "another resolution is not a gap"


def test_a_pause_is_one_gap_at_every_length(engine: sa.Engine, reader: sa.Engine) -> None:
    times = [now for now in range(DAWN, DAWN + DAY, 4) if not DAWN + 10 * HOUR <= now < DAWN + 14 * HOUR]
    write(engine, times, wave)
    rollups.roll_up(engine, "here")
    for start, points in ((DAWN + 9 * HOUR, 3000), (DAWN + 8 * HOUR, 600), (DAWN, 200), (DAWN, 20)):
        found = metrics_history(reader, [1], ["temperature"], start, DAWN + DAY, points)
        gaps = found[found["temperature"].isna()]
        assert len(gaps) == 1, (start, points)
        assert DAWN + 10 * HOUR - HOUR <= gaps["timestamp_epoch"].iloc[0] <= DAWN + 14 * HOUR


def test_a_counter_is_what_it_grew_by(filled: sa.Engine) -> None:
    end = DAWN + 2 * DAY
    for span in (900, 6 * HOUR, DAY):
        found = metrics_history(filled, [1], ["energy"], end - span, end, 300)
        whole = (wave(end - 4)["energy"] or 0) - (wave(end - span)["energy"] or 0)
        assert found["energy"].sum() == pytest.approx(whole, rel=0.02)
        assert (found["energy"].dropna() >= 0).all()


def test_a_metric_that_is_stored_on_change_holds_until_it_changes(engine: sa.Engine, reader: sa.Engine) -> None:
    def states(now: int) -> Values:
        state = 0 if now < DAWN + 1000 else 8 if now < DAWN + 1100 else 2
        return {"temperature": 50.0, "performance_state": state}

    write(engine, range(DAWN, DAWN + HOUR, 4), states)
    rollups.roll_up(engine, "here")
    fine = metrics_history(reader, [1], ["performance_state"], DAWN + 500, DAWN + HOUR, 5000)
    expected = [states(int(now))["performance_state"] for now in fine["timestamp_epoch"]]
    assert fine["performance_state"].tolist() == expected
    coarse = metrics_history(reader, [1], ["temperature", "performance_state"], DAWN, DAWN + HOUR, 12)
    assert coarse["performance_state"].iloc[0] == 0
    assert coarse["performance_state"].iloc[-1] == 2
    assert coarse["performance_state_max"].max() == 8, "no change disappears"


def test_pandas_has_nothing_to_say_of_all_metrics_together(engine: sa.Engine, reader: sa.Engine) -> None:
    write(engine, range(DAWN, DAWN + HOUR, 4), lambda _: {metric.key: 1.0 for metric in GPU_METRICS})
    rollups.roll_up(engine, "here")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = metrics_history(reader, [1], [metric.key for metric in GPU_METRICS], DAWN, DAWN + HOUR, 60)
    assert len(found) == 60


def test_each_gpu_has_its_own_rows_in_order(engine: sa.Engine, reader: sa.Engine) -> None:
    write(engine, range(DAWN, DAWN + 600, 4), wave, gpus=3)
    found = metrics_history(reader, [3, 1], ["temperature"], DAWN, DAWN + 600, 50)
    assert found["gpu_id"].unique().tolist() == [1, 3]
    assert (found["gpu_id"].diff().dropna() >= 0).all()


def test_nothing_is_an_empty_frame_with_its_columns(reader: sa.Engine) -> None:
    found = metrics_history(reader, [1], ["power", "ecc_corrected_volatile"], 0, 100, 10)
    assert found.empty
    assert {"gpu_id", "timestamp_epoch", "power_max", "ecc_corrected_volatile"} <= set(found.columns)
    with pytest.raises(ValueError, match="not in the catalogue: nonsense"):
        metrics_history(reader, [1], ["nonsense"], 0, 100, 10)


@pytest.fixture
def writer(engine: sa.Engine) -> Writer:
    return Writer(engine, "here", "nvml", 4)


def reading(now: int, **values: float) -> Snapshot:
    plain = tick(now, gpus=GPUS[:1])
    return Snapshot(now, plain.host, plain.gpus, (GpuReading("GPU-0", values),))


def test_history_gives_every_tick_where_they_fit(writer: Writer, reader: sa.Engine) -> None:
    for now in range(1000, 1100, 4):
        writer.write(reading(now, temperature=float(now)), {})
    frame = metrics_history(reader, [1], ["temperature"], 1000, 1100, points=1000)
    assert frame["timestamp_epoch"].tolist() == list(range(1000, 1100, 4))
    assert frame["temperature"].tolist() == [float(now) for now in range(1000, 1100, 4)]


def test_history_in_few_points_keeps_every_spike(writer: Writer, reader: sa.Engine) -> None:
    for now in range(1000, 2000, 4):
        writer.write(reading(now, utilization=100.0 if now == 1500 else 0.0), {})
    frame = metrics_history(reader, [1], ["utilization"], 1000, 2000, points=10)
    assert 8 <= len(frame) <= 12
    assert frame["utilization_max"].max() == 100
    assert frame["utilization_min"].min() == 0
    assert 0 < frame["utilization"].max() < 10


def test_a_pause_in_the_recording_breaks_the_line(writer: Writer, reader: sa.Engine) -> None:
    for now in [*range(1000, 1040, 4), *range(1100, 1140, 4)]:
        writer.write(reading(now, temperature=50.0), {})
    frame = metrics_history(reader, [1], ["temperature"], 1000, 1200, points=1000)
    [gap] = frame.index[frame["temperature"].isna()]
    assert 1036 < frame["timestamp_epoch"][gap] < 1100
    assert len(frame) == 21


def test_a_tick_that_comes_late_is_no_pause(writer: Writer, reader: sa.Engine) -> None:
    for now in (1000, 1004, 1008, 1016, 1020, 1024):
        writer.write(reading(now, temperature=50.0), {})
    assert not metrics_history(reader, [1], ["temperature"], 1000, 1100, 1000)["temperature"].isna().any()


def test_two_gpus_side_by_side_make_no_gap(writer: Writer, reader: sa.Engine) -> None:
    for now in range(1000, 1040, 4):
        writer.write(tick(now, gpus=GPUS), {})
    frame = metrics_history(reader, [1, 2, 3], ["temperature", "power"], 1000, 1100, 1000)
    assert not frame["temperature"].isna().any()
    assert frame["power"].isna().all()
    assert set(frame["gpu_id"]) == {1, 2, 3}
