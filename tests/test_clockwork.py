"""Setting the wall clock neither stops nor hurries the recording, and the server says so."""

from __future__ import annotations

import glob
import sqlite3
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE_S, Server, eventually
from fake_nvml import FakeNvml

from gpumon_core.recording.clockwork import Clockwork, SteadyTrigger
from gpumon_core.recording.recorder import Recorder
from gpumon_core.settings import load

FAKETIME = next(iter(glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")), None)
NEED_FAKETIME = pytest.mark.skipif(FAKETIME is None, reason="no libfaketime is installed")


@NEED_FAKETIME
def test_a_server_whose_clock_is_set_goes_on_recording(
    serve: Callable[..., Server], fake: FakeNvml, tmp_path: Path
) -> None:
    fake.add_gpu(uuid="GPU-0", gpu_utilization=50, power_mw=100_000)
    offset = tmp_path / "offset"
    offset.write_text("+0")
    server = serve(
        fake,
        LD_PRELOAD=str(FAKETIME),
        FAKETIME_TIMESTAMP_FILE=str(offset),
        FAKETIME_NO_CACHE="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
    ).ready()
    for set_to in ("-3600", "+0", "+86400", "+0"):
        offset.write_text(set_to)
        before = server.wait(lambda _, answer: "recorder" in answer)["recorder"]["ticks"]

        def is_fresh(_: int, answer: dict[str, Any], known: int = before) -> bool:
            # Two ticks may be late before a sample counts as old.
            is_on_time = answer["status"] == "ok" and answer["age_seconds"] < 5
            return bool(is_on_time and answer["recorder"]["ticks"] >= known + 4)

        server.wait(is_fresh)

    def newest() -> bool:
        with sqlite3.connect(f"file:{server.data_dir}/gpumon.db?mode=ro", uri=True) as connection:
            [(seen,)] = connection.execute("SELECT last_seen FROM hosts")
        return abs(time.time() - seen) < 30

    assert eventually(newest), "a last_seen from the wrong clock is corrected"


def test_a_job_is_due_by_the_monotonic_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    trigger = SteadyTrigger(4.0, 1.0)

    for passed, expected in ((0.0, 1.0), (1.0, 4.0), (1.5, 3.5), (4.999, 4.001), (5.0, 4.0), (41.0, 4.0)):
        now[0] = 100.0 + passed
        begun = datetime.now(UTC)
        due = trigger.get_next_fire_time(None, begun)
        in_s = timedelta(seconds=expected)
        assert begun + in_s <= due + timedelta(milliseconds=1), passed
        assert due <= datetime.now(UTC) + in_s + timedelta(milliseconds=1), passed


def test_a_job_that_still_runs_is_left_out_and_counted() -> None:
    skipped: list[str] = []
    release, runs = threading.Event(), []

    def job() -> None:
        runs.append(1)
        release.wait(PATIENCE_S)

    clockwork = Clockwork(("one",), skipped.append)
    clockwork.add("slow", job, 0.2, 0.0, "one")
    clockwork.start()
    eventually(lambda: len(skipped) >= 2)
    assert len(runs) == 1
    release.set()
    eventually(lambda: len(runs) >= 3)
    clockwork.stop()
    assert set(skipped) == {"slow"}


def test_a_clock_that_is_set_years_ahead_does_not_cost_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load(data_dir=tmp_path, source="demo", host_name="here", interval=1)
    recorder = Recorder(settings)
    recorder.start()
    try:
        eventually(lambda: recorder.counters.ticks > 0)
        began = time.time()
        monkeypatch.setattr(time, "time", lambda: began + 10 * 365 * 86400)
        recorder._keep_house()
    finally:
        recorder.stop()
    with sqlite3.connect(tmp_path / "demo.db") as connection:
        [(oldest,)] = connection.execute("SELECT min(timestamp_epoch) FROM gpu_metrics")
    # A demo begins with an hour behind it.
    assert oldest < began - 1800
