"""Rollups hold what their ticks say, and are continued where they were broken off (store/rollups.py)."""

from __future__ import annotations

import threading

import hours
import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
from hours import DAWN, DAY, HOUR, wave, write
from ticks import GPUS, HOST, ask

from gpumon_core.store import retention, rollups
from gpumon_core.store.schema import TIERS, gpu_metrics
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuReading, Snapshot

# The fixture that these tests share.
engine = hours.engine


def buckets(engine: sa.Engine, seconds: int) -> pd.DataFrame:
    (table,) = (tier.table for tier in TIERS if tier.seconds == seconds)
    with engine.connect() as connection:
        result = connection.execute(sa.select(table).order_by(table.c.gpu_id, table.c.timestamp_epoch))
        return pd.DataFrame(result.all(), columns=list(result.keys()))


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
    # The counter goes on where it is: only what it grows by can be the same.
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


def test_a_bucket_that_an_import_has_begun_leaves_none_incomplete(engine: sa.Engine) -> None:
    progress = rollups.Progress()
    for start in range(DAWN, DAWN + 4 * HOUR, 60):
        write(engine, range(start, start + 60, 20), wave, interval=20)
        rollups.roll_up(engine, "here", progress=progress)
    write(engine, range(DAWN + 4 * HOUR, DAWN + 4 * HOUR + 40, 20), wave, interval=20)
    # An import renews what it has written in: the bucket of four hours begins here.
    with engine.begin() as connection:
        rollups.renew(connection, 1, gpu_metrics, start=DAWN + 4 * HOUR, end=DAWN + 4 * HOUR + 20, interval_s=20)
    rollups.roll_up(engine, "here", progress=progress)
    for tier in TIERS:
        [(samples,)] = ask(engine, f"SELECT sum(samples) FROM {tier.table.name}")
        # Ticks of 20 seconds need no buckets of 20 seconds.
        assert samples == (None if tier.seconds == 20 else 4 * HOUR // 20 + 2), tier.table.name


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
    retention.forget(engine, retention.RetentionDays(raw_days=1, minute_days=2, hour_days=3), now)
    oldest = {
        tier.seconds: now - int(buckets(engine, tier.seconds)["timestamp_epoch"].min()) for tier in TIERS[1:]
    }
    assert oldest == {60: 2 * DAY, 300: 2 * DAY, 1200: 2 * DAY, 3600: 3 * DAY, 14400: 3 * DAY}
    assert ask(engine, f"SELECT {now} - min(timestamp_epoch) FROM gpu_metrics") == [(DAY,)]


def test_a_tick_that_no_minute_has_taken_in_is_not_forgotten(engine: sa.Engine) -> None:
    write(engine, range(DAWN, DAWN + HOUR, 4), wave)
    retention.forget(engine, retention.RetentionDays(1, 1, 1), DAWN + 10 * DAY)
    assert ask(engine, "SELECT count(*) FROM gpu_metrics") == [(900,)]


def test_a_coarse_tier_is_renewed_every_five_minutes(engine: sa.Engine) -> None:
    statements: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    progress = rollups.Progress()
    renewed: list[str] = []
    for start in range(DAWN, DAWN + 2 * HOUR, 60):
        write(engine, range(start, start + 60, 4), wave)
        statements.clear()
        rollups.roll_up(engine, "here", progress=progress)
        renewed += [text.split()[2] for text in statements if text.startswith("INSERT")]
        assert sum(text.startswith("SELECT") for text in statements) <= (1 if start > DAWN else 7)
    assert [renewed.count(tier.table.name) for tier in TIERS] == [120, 120, 120, 24, 24, 24]


def test_what_a_tier_has_in_the_end_is_complete(engine: sa.Engine) -> None:
    progress = rollups.Progress()
    # A pause of two hours, and ticks behind newer ones.
    times = [*range(DAWN, DAWN + HOUR, 4), *range(DAWN + 3 * HOUR, DAWN + 5 * HOUR, 4)]
    for first in range(0, len(times), 13):
        write(engine, times[first : first + 13], wave)
        rollups.roll_up(engine, "here", progress=progress)
    last = DAWN + 5 * HOUR - 4
    little_by_little = [buckets(engine, tier.seconds) for tier in TIERS]
    rollups.roll_up(engine, "here")
    for tier, frame in zip(TIERS, little_by_little, strict=True):
        # The newest bucket of a coarse tier may lack what came last.
        begun = last - last % tier.seconds
        found = buckets(engine, tier.seconds)
        past = [one[one["timestamp_epoch"] < begun].drop(columns="energy") for one in (frame, found)]
        pd.testing.assert_frame_equal(*past)
        assert frame["timestamp_epoch"].tolist() == found["timestamp_epoch"].tolist()
    rollups.roll_up(engine, "here", DAWN + HOUR - 100, progress=progress)
    for tier in TIERS:
        assert buckets(engine, tier.seconds)["samples"].sum() == len(times)
