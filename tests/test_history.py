"""Rollups, and history read at any length from the resolution that fits."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
from test_writer import GPUS, HOST, ask

from gpumon_core.metrics import GPU_METRICS
from gpumon_core.store import database, frames, retention, rollups
from gpumon_core.store.schema import TIERS
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


@pytest.fixture
def reader(database_url: str, engine: sa.Engine) -> sa.Engine:
    return database.open_for_reading(database_url)


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


def buckets(engine: sa.Engine, seconds: int) -> pd.DataFrame:
    (table,) = (tier.table for tier in TIERS if tier.seconds == seconds)
    with engine.connect() as connection:
        result = connection.execute(sa.select(table).order_by(table.c.gpu_id, table.c.timestamp_epoch))
        return pd.DataFrame(result.all(), columns=list(result.keys()))


# ---- Rollups -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [tier.seconds for tier in TIERS])
def test_every_resolution_has_what_its_ticks_say(engine: sa.Engine, seconds: int) -> None:
    times = [now for now in range(DAWN, DAWN + 9 * HOUR, 4) if not DAWN + 5000 < now < DAWN + 5700]
    write(engine, times, wave)
    rollups.roll_up(engine, "here")
    ticks = pd.DataFrame([{"time": now, **wave(now)} for now in times]).astype("float64")
    grouped = ticks.groupby(ticks["time"] // seconds * seconds)
    found = buckets(engine, seconds)
    assert found["timestamp_epoch"].tolist() == sorted(int(key) for key in grouped.groups)
    assert found["samples"].tolist() == grouped.size().tolist()
    for key, decimals in (("temperature", 0), ("memory", 0), ("utilization", 1), ("power", 1)):
        scale = 10**decimals
        # Every step from one resolution to the next rounds once more.
        np.testing.assert_allclose(found[key].astype(float) / scale, grouped[key].mean(), atol=3.1 / scale)
        np.testing.assert_allclose(found[f"{key}_min"].astype(float) / scale, grouped[key].min())
        highest = grouped["utilization_max" if key == "utilization" else key].max()
        np.testing.assert_allclose(found[f"{key}_max"].astype(float) / scale, highest)
    first = wave(DAWN)["energy"]
    np.testing.assert_allclose(found["energy"].astype(float), grouped["energy"].max() - (first or 0), atol=1)


def test_rolling_up_again_changes_nothing(engine: sa.Engine) -> None:
    write(engine, range(DAWN, DAWN + 2 * HOUR, 4), wave, gpus=2)
    rollups.roll_up(engine, "here")
    before = [buckets(engine, tier.seconds) for tier in TIERS]
    rollups.roll_up(engine, "here")
    for tier, frame in zip(TIERS, before, strict=True):
        pd.testing.assert_frame_equal(buckets(engine, tier.seconds), frame)


def test_a_bit_at_a_time_is_the_same_as_all_at_once(engine: sa.Engine) -> None:
    write(engine, range(DAWN, DAWN + HOUR, 4), wave)
    rollups.roll_up(engine, "here")
    whole = [buckets(engine, tier.seconds) for tier in TIERS]
    for name in ("gpu_metrics", *(tier.table.name for tier in TIERS)):
        with engine.begin() as connection:
            connection.exec_driver_sql(f"DELETE FROM {name}")
    # The counter goes on where it stands: only what it grows by can be the same.
    for start in range(DAWN, DAWN + HOUR, 52):
        write(engine, range(start, min(start + 52, DAWN + HOUR), 4), wave)
        rollups.roll_up(engine, "here")
    for tier, frame in zip(TIERS, whole, strict=True):
        found = buckets(engine, tier.seconds)
        pd.testing.assert_frame_equal(found.drop(columns="energy"), frame.drop(columns="energy"))


def test_a_run_that_is_broken_off_is_continued(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollups, "STEP_S", 600)
    monkeypatch.setattr(rollups, "STEP_BUCKETS", 1)
    write(engine, range(DAWN, DAWN + 3 * HOUR, 4), wave)
    stopping = threading.Event()
    stopping.set()
    for _ in range(100):
        rollups.roll_up(engine, "here", stopping=stopping)
        if len(buckets(engine, 20)) == 540:
            break
    else:
        pytest.fail("it never gets there")
    rollups.roll_up(engine, "here")
    assert [len(buckets(engine, tier.seconds)) for tier in TIERS] == [540, 180, 36, 9, 3, 1]


def test_ticks_behind_a_clock_that_was_set_back_are_rolled_up_too(engine: sa.Engine) -> None:
    write(engine, range(DAWN + HOUR, DAWN + 2 * HOUR, 4), wave)
    rollups.roll_up(engine, "here")
    writer = Writer(engine, "here", "nvml", 4)
    for now in range(DAWN + HOUR + 2, DAWN + HOUR + 600, 4):
        writer.write(Snapshot(now, HOST, GPUS[:1], (GpuReading("GPU-0", {"temperature": 90.0}),)), {})
    assert writer.rewritten_from == DAWN + HOUR + 2
    rollups.roll_up(engine, "here", writer.rewritten_from)
    assert buckets(engine, 60)["samples"].tolist()[:11] == [30] * 9 + [30, 15]
    assert buckets(engine, 3600)["temperature_max"].tolist() == [90]


def test_another_hosts_gpus_are_left_to_it(engine: sa.Engine) -> None:
    write(engine, range(DAWN, DAWN + 600, 4), wave)
    assert rollups.roll_up(engine, "there") == 0
    assert buckets(engine, 60).empty


def test_ticks_far_apart_need_no_twenty_seconds(engine: sa.Engine) -> None:
    write(engine, range(DAWN, DAWN + HOUR, 30), wave, interval=30)
    rollups.roll_up(engine, "here")
    assert buckets(engine, 20).empty
    assert len(buckets(engine, 60)) == 60


def test_retention_keeps_each_resolution_for_its_time(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "PAUSE_S", 0)
    now = DAWN + 5 * DAY
    write(engine, range(DAWN, now, 600), wave)
    rollups.roll_up(engine, "here")
    retention.forget(engine, retention.Keep(raw_days=1, minute_days=2, hour_days=3), now)
    oldest = {
        tier.seconds: now - int(buckets(engine, tier.seconds)["timestamp_epoch"].min()) for tier in TIERS[1:]
    }
    assert oldest == {60: 2 * DAY, 300: 2 * DAY, 1200: 2 * DAY, 3600: 3 * DAY, 14400: 3 * DAY}
    assert ask(engine, f"SELECT {now} - min(timestamp_epoch) FROM gpu_metrics") == [(DAY,)]


def test_a_tick_that_no_minute_has_taken_in_is_not_forgotten(engine: sa.Engine) -> None:
    write(engine, range(DAWN, DAWN + HOUR, 4), wave)
    retention.forget(engine, retention.Keep(1, 1, 1), DAWN + 10 * DAY)
    assert ask(engine, "SELECT count(*) FROM gpu_metrics") == [(900,)]


# ---- Reading -------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("span", [HOUR, DAY, 30 * DAY, 365 * DAY])
def test_a_young_history_fills_a_long_range_with_points(
    reader: sa.Engine, engine: sa.Engine, span: int, rolled: bool, began: int
) -> None:
    times = range(began, began + 15 * 60, 4)
    write(engine, times, wave)
    if rolled:
        rollups.roll_up(engine, "here")
    end = times[-1] + 4
    found = frames.history(reader, [1], ["temperature"], end - span, end, 200)
    assert 100 <= len(found.dropna()) <= 230


def test_a_machine_that_is_on_for_two_hours_a_day_is_drawn_as_finely_as_one_that_always_runs(
    reader: sa.Engine, engine: sa.Engine
) -> None:
    times = [DAWN + day * DAY + second for day in range(3) for second in range(0, 2 * HOUR, 4)]
    write(engine, times, wave)
    rollups.roll_up(engine, "here")
    found = frames.history(reader, [1], ["temperature"], DAWN, DAWN + 3 * DAY, 1000)
    assert 500 <= len(found.dropna()) <= 1150
    assert found["temperature"].isna().sum() == 2


@pytest.mark.parametrize("points", [50, 300, 1000])
@pytest.mark.parametrize("span", [900, HOUR, 2 * HOUR, 6 * HOUR, DAY, 2 * DAY])
def test_any_range_has_at_least_half_of_the_points_and_hardly_more(
    filled: sa.Engine, span: int, points: int
) -> None:
    end = DAWN + 2 * DAY
    found = frames.history(filled, [1], ["temperature", "utilization"], end - span, end, points)
    ticks = min(span, 2 * HOUR) // 4 + max(0, span - 2 * HOUR) // 20
    assert min(points, ticks) / 2 <= len(found.dropna()) <= points * 1.1 + 2
    assert found["timestamp_epoch"].is_monotonic_increasing
    assert found["timestamp_epoch"].between(end - span, end).all()
    assert not found["temperature"].isna().any(), "there is no gap"
    assert found["temperature_min"].min() == 40
    assert found["temperature_max"].max() == 46
    assert (found["utilization_min"] <= found["utilization"] + 0.1).all()
    assert (found["utilization"] <= found["utilization_max"] + 0.1).all()
    assert found["utilization_max"].max() >= 99


@pytest.mark.parametrize("rolled", [False, True])
@pytest.mark.parametrize("span", [HOUR, 6 * HOUR, DAY])
def test_ticks_from_before_the_interval_was_raised_are_not_drawn_one_by_one(
    engine: sa.Engine, reader: sa.Engine, span: int, rolled: bool
) -> None:
    end = DAWN + DAY
    write(engine, range(DAWN, end, 4), wave, interval=4)
    if rolled:
        rollups.roll_up(engine, "here")
    write(engine, [end], wave, interval=300)
    found = frames.history(reader, [1], ["temperature"], end - span, end, 200)
    assert 100 <= len(found.dropna()) <= 230
    assert found["temperature_max"].max() == 46


def test_a_range_of_one_moment_is_its_tick(engine: sa.Engine, reader: sa.Engine) -> None:
    write(engine, range(DAWN, DAWN + 60, 4), wave)
    found = frames.history(reader, [1], ["temperature"], DAWN + 8, DAWN + 8, 200)
    assert found["timestamp_epoch"].tolist() == [DAWN + 8]
    assert frames.history(reader, [1], ["temperature"], DAWN + 9, DAWN + 9, 200).empty


def test_a_spike_is_in_a_chart_of_any_length(engine: sa.Engine, reader: sa.Engine) -> None:
    spike = DAWN + 31 * HOUR + 4 * 123
    write(engine, range(DAWN, DAWN + 2 * DAY, 4), lambda now: {"power": 900.0 if now == spike else 50.0})
    rollups.roll_up(engine, "here")
    for points in (10, 100, 1000):
        found = frames.history(reader, [1], ["power"], DAWN, DAWN + 2 * DAY, points)
        assert found["power_max"].max() == 900
        at = found.loc[found["power_max"].idxmax(), "timestamp_epoch"]
        assert abs(at - spike) <= 2 * DAY / points


def test_what_is_not_rolled_up_yet_is_read_from_the_ticks(engine: sa.Engine, reader: sa.Engine) -> None:
    write(engine, range(DAWN, DAWN + DAY, 20), wave)
    found = frames.history(reader, [1], ["temperature"], DAWN, DAWN + DAY, 500)
    assert 250 <= len(found) <= 550
    rollups.roll_up(engine, "here")
    write(engine, range(DAWN + DAY, DAWN + DAY + 2 * HOUR, 20), wave)
    found = frames.history(reader, [1], ["temperature"], DAWN, DAWN + DAY + 2 * HOUR, 500)
    assert found["timestamp_epoch"].max() >= DAWN + DAY + 2 * HOUR - 400
    assert found["timestamp_epoch"].is_unique
    assert not found["temperature"].isna().any()


def test_what_is_forgotten_in_detail_is_read_from_the_next_coarser(
    engine: sa.Engine, reader: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "PAUSE_S", 0)
    end = DAWN + 2 * DAY
    write(engine, range(DAWN, end, 20), wave)
    rollups.roll_up(engine, "here")
    retention.forget(engine, retention.Keep(0.5, 1, 30), end)
    found = frames.history(reader, [1], ["temperature"], DAWN, end, 600)
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
        found = frames.history(reader, [1], ["temperature"], start, DAWN + DAY, points)
        gaps = found[found["temperature"].isna()]
        assert len(gaps) == 1, (start, points)
        assert DAWN + 10 * HOUR - HOUR <= gaps["timestamp_epoch"].iloc[0] <= DAWN + 14 * HOUR


def test_a_counter_is_what_it_grew_by(filled: sa.Engine) -> None:
    end = DAWN + 2 * DAY
    for span in (900, 6 * HOUR, DAY):
        found = frames.history(filled, [1], ["energy"], end - span, end, 300)
        whole = (wave(end - 4)["energy"] or 0) - (wave(end - span)["energy"] or 0)
        assert found["energy"].sum() == pytest.approx(whole, rel=0.02)
        assert (found["energy"].dropna() >= 0).all()


def test_what_is_kept_when_it_changes_holds_until_it_does(engine: sa.Engine, reader: sa.Engine) -> None:
    def states(now: int) -> Values:
        state = 0 if now < DAWN + 1000 else 8 if now < DAWN + 1100 else 2
        return {"temperature": 50.0, "performance_state": state}

    write(engine, range(DAWN, DAWN + HOUR, 4), states)
    rollups.roll_up(engine, "here")
    fine = frames.history(reader, [1], ["performance_state"], DAWN + 500, DAWN + HOUR, 5000)
    expected = [states(int(now))["performance_state"] for now in fine["timestamp_epoch"]]
    assert fine["performance_state"].tolist() == expected
    coarse = frames.history(reader, [1], ["temperature", "performance_state"], DAWN, DAWN + HOUR, 12)
    assert coarse["performance_state"].iloc[0] == 0
    assert coarse["performance_state"].iloc[-1] == 2
    assert coarse["performance_state_max"].max() == 8, "no change disappears"


def test_pandas_has_nothing_to_say_of_all_metrics_together(engine: sa.Engine, reader: sa.Engine) -> None:
    write(engine, range(DAWN, DAWN + HOUR, 4), lambda _: {metric.key: 1.0 for metric in GPU_METRICS})
    rollups.roll_up(engine, "here")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = frames.history(reader, [1], [metric.key for metric in GPU_METRICS], DAWN, DAWN + HOUR, 60)
    assert len(found) == 60


def test_gpus_are_told_apart_and_in_order(engine: sa.Engine, reader: sa.Engine) -> None:
    write(engine, range(DAWN, DAWN + 600, 4), wave, gpus=3)
    found = frames.history(reader, [3, 1], ["temperature"], DAWN, DAWN + 600, 50)
    assert found["gpu_id"].unique().tolist() == [1, 3]
    assert (found["gpu_id"].diff().dropna() >= 0).all()


def test_nothing_is_an_empty_frame_with_its_columns(reader: sa.Engine) -> None:
    found = frames.history(reader, [1], ["power", "ecc_corrected_volatile"], 0, 100, 10)
    assert found.empty
    assert {"gpu_id", "timestamp_epoch", "power_max", "ecc_corrected_volatile"} <= set(found.columns)
    with pytest.raises(ValueError, match="not in the catalogue: nonsense"):
        frames.history(reader, [1], ["nonsense"], 0, 100, 10)
