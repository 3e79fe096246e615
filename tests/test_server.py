"""The server as a whole: it records without a browser, says how it is, and survives being killed."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PATIENCE_S, Server
from fake_nvml import FakeNvml

Serve = Callable[..., Server]


def rows(database: Path, query: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=PATIENCE_S)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def ticks(server: Server) -> int:
    return len(rows(server.data_dir / "gpumon.db", "SELECT DISTINCT timestamp_epoch FROM gpu_metrics"))


def more_ticks(server: Server, count: int) -> Callable[..., bool]:
    """Whether so many have been written since this was asked."""
    before = ticks(server)
    return lambda *_: ticks(server) >= before + count


def test_ticks_are_recorded_before_any_browser_comes(serve: Serve, fake: FakeNvml) -> None:
    fake.add_gpu(name="NVIDIA RTX A6000", temperature=64).add_process(os.getpid(), 3 << 30)
    server = serve(fake).ready()
    server.wait(lambda *_: ticks(server) >= 3)
    assert rows(server.data_dir / "gpumon.db", "SELECT DISTINCT temperature FROM gpu_metrics") == [(64.0,)]
    assert rows(server.data_dir / "gpumon.db", "SELECT pid, max_memory FROM gpu_processes") == [
        (os.getpid(), 3072)
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_server_ends_cleanly_with_its_last_tick_committed(
    serve: Serve, fake: FakeNvml, number: signal.Signals
) -> None:
    fake.add_gpu()
    server = serve(fake).ready()
    server.wait(lambda status, answer: status == 200 and answer["status"] == "ok")
    server.process.send_signal(number)
    status = server.process.wait(timeout=PATIENCE_S)
    # The server passes SIGTERM on when it has shut down; after Ctrl-C Streamlit ends with 1, or with 0 where it
    # was not waiting for anything just then.
    assert status in ((-signal.SIGTERM,) if number == signal.SIGTERM else (0, 1))
    log = server.log.read_text()
    assert "recorder stopped" in log
    assert "Traceback" not in log
    database = server.data_dir / "gpumon.db"
    # All of it is in the one file, however many connections pages had to it.
    assert not Path(f"{database}-wal").exists()
    assert rows(database, "PRAGMA integrity_check") == [("ok",)]
    assert rows(database, "SELECT last_seen - (SELECT max(timestamp_epoch) FROM gpu_metrics) FROM hosts") == [(0,)]


def test_killed_at_any_moment_the_database_is_sound_and_goes_on(serve: Serve, fake: FakeNvml) -> None:
    fake.add_gpu().add_process(os.getpid(), 1 << 30)
    seen = 0
    for _ in range(3):
        server = serve(fake).ready()
        server.wait(lambda *_, server=server, seen=seen: ticks(server) > seen)
        server.process.kill()
        server.process.wait()
        assert rows(server.data_dir / "gpumon.db", "PRAGMA integrity_check") == [("ok",)]
        now = ticks(server)
        assert now > seen
        seen = now
    # The same process, through three recorders, is one row with every tick counted.
    assert rows(server.data_dir / "gpumon.db", "SELECT sample_count FROM gpu_processes") == [(seen,)]


def test_a_second_server_says_who_records_and_takes_over(serve: Serve, fake: FakeNvml) -> None:
    fake.add_gpu()
    first = serve(fake).ready()
    second = serve(fake)
    answer = second.wait(lambda status, answer: answer.get("role") == "standby" and answer["status"] == "ok")
    assert f"process {first.process.pid} on testhost is recording" in answer["recording_problem"].lower()
    assert "is recording" in second.log.read_text()
    first.stop()
    second.wait(lambda status, answer: status == 200 and answer["role"] == "recording")


def test_healthz_says_stale_when_sampling_stops_and_ok_when_it_resumes(serve: Serve, fake: FakeNvml) -> None:
    fake.add_gpu()
    fake.add_gpu()
    server = serve(fake).ready()
    # A busy machine may leave out a tick, and then is degraded for a while.
    answer = server.wait(lambda status, answer: status == 200 and answer["status"] == "ok")
    assert (answer["source"], answer["gpus"]) == ("nvml", 2)
    assert answer["interval_seconds"] == 1
    assert 0 <= answer["age_seconds"] <= 5
    fake.driver_loaded = False
    answer = server.wait(lambda status, _: status == 503)
    assert answer["status"] == "no_driver"
    assert answer["age_seconds"] >= 5
    fake.driver_loaded = True
    server.wait(lambda status, answer: status == 200 and answer["status"] == "ok")


def test_a_lost_gpu_makes_the_recording_degraded(serve: Serve, fake: FakeNvml) -> None:
    fake.add_gpu()
    lost = fake.add_gpu()
    server = serve(fake).ready()
    lost.lost = True
    answer = server.wait(lambda status, answer: answer.get("status") == "degraded")
    assert answer["gpus_lost"] == 1
    assert server.health()[0] == 200
    server.wait(more_ticks(server, 3))
    assert server.log.read_text().count(" is lost: ") == 1, "one line for a lost GPU, not one per tick"


def test_without_a_driver_nvml_says_so_and_auto_simulates_elsewhere(serve: Serve, fake: FakeNvml) -> None:
    fake.driver_loaded = False
    server = serve(fake, GPUMON_SOURCE="nvml")
    answer = server.wait(lambda status, answer: status == 503 and answer["status"] == "no_driver")
    assert "driver" in answer["driver_problem"].lower()
    server.stop()
    fallback = serve(fake, GPUMON_SOURCE="auto").ready()
    # A busy machine may leave out a tick, and then is degraded for a while.
    answer = fallback.wait(lambda status, answer: status == 200 and answer["status"] == "ok")
    assert answer["source"] == "demo"
    assert answer["driver_problem"]
    assert rows(server.data_dir / "gpumon.db", "SELECT count(*) FROM gpu_metrics") == [(0,)]
    assert rows(server.data_dir / "demo.db", "SELECT count(*) > 0 FROM gpu_metrics") == [(1,)]


def test_auto_changes_over_when_the_driver_appears(serve: Serve, fake: FakeNvml) -> None:
    fake.driver_loaded = False
    fake.add_gpu(name="NVIDIA RTX A6000")
    server = serve(fake, GPUMON_SOURCE="auto")
    server.wait(lambda status, answer: status == 200 and answer["source"] == "demo")
    fake.driver_loaded = True
    answer = server.wait(lambda status, answer: status == 200 and answer["source"] == "nvml")
    assert answer["driver_problem"] is None
    assert rows(server.data_dir / "gpumon.db", "SELECT name FROM gpus") == [("NVIDIA RTX A6000",)]


def test_a_server_that_may_not_record_only_reads(serve: Serve, fake: FakeNvml) -> None:
    fake.add_gpu()
    recorder = serve(fake).ready()
    viewer = serve(fake, GPUMON_RECORD="false").ready()
    assert viewer.health()[1]["role"] == "viewing"
    assert "recording NVIDIA GPUs" not in viewer.log.read_text()
    recorder.stop()


def test_a_wrong_setting_stops_the_start_with_one_line(serve: Serve, fake: FakeNvml) -> None:
    server = serve(fake, GPUMON_INTERVAL="0.2")
    assert server.process.wait(timeout=PATIENCE_S) != 0
    lines = [line for line in server.log.read_text().splitlines() if line.strip()]
    assert len(lines) == 1
    assert "GPUMON_INTERVAL=0.2" in lines[0]
    assert "1 to 3600" in lines[0]


def test_the_log_is_quiet_while_all_is_well(serve: Serve, fake: FakeNvml) -> None:
    fake.add_gpu(fan=None).add_process(os.getpid(), 1 << 30)
    server = serve(fake).ready()
    before = server.log.read_text()
    server.wait(more_ticks(server, 4))
    assert server.log.read_text() == before


def test_a_damaged_database_is_set_aside_and_a_new_one_begun(serve: Serve, fake: FakeNvml, tmp_path: Path) -> None:
    fake.add_gpu()
    data_dir = tmp_path / "history"
    data_dir.mkdir()
    content = b"SQLite format 3\0" + b"and not a database at all" * 500
    (data_dir / "gpumon.db").write_bytes(content)
    server = serve(fake)
    answer = server.ready().wait(lambda status, answer: bool(answer.get("notice")))
    assert "was damaged and has been set aside" in answer["notice"]
    (aside,) = data_dir.glob("gpumon.db.damaged-*")
    assert aside.name in answer["notice"]
    assert aside.read_bytes() == content
    assert ticks(server) >= 1
    assert "Traceback" not in server.log.read_text()
