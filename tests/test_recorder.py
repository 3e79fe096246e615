"""The recorder on bad days: killed, locked out, out of disk, its file damaged, its driver hanging."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import crash
import fake_nvml
import pytest
import sqlalchemy as sa
from conftest import PATIENCE_S, Server
from conftest import eventually as until
from fake_nvml import FakeNvml

from gpumon_core.recording import roles
from gpumon_core.recording.recorder import Recorder
from gpumon_core.settings import load
from gpumon_core.store import database
from gpumon_core.store.schema import TIERS
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry import nvml

Serve = Callable[..., Server]
KILLS = 80


def ask(path: Path, query: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=PATIENCE_S)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history" / "gpumon.db"


@contextmanager
def recording(fake: FakeNvml, path: Path, **more: Any) -> Iterator[Recorder]:
    """A recorder of the fake driver in this process."""
    with fake_nvml.loaded(fake):
        made = Recorder(load(data_dir=path.parent, host_name="here", interval=1, source="nvml", **more))
        made.start()
        try:
            yield made
        finally:
            made.stop()


# ---- Killed --------------------------------------------------------------------------------------


def test_killed_eighty_times_nothing_is_lost_and_nothing_counted_twice(tmp_path: Path) -> None:
    path = tmp_path / "gpumon.db"
    url = f"sqlite:///{path}"
    database.open_for_writing(url).dispose()
    dice = random.Random(4711)
    committed: set[int] = set()
    awaited = 0
    # How long this machine takes to open the database and commit, and from one commit to the next.
    opening_s = tick_s = 0.0
    start = crash.FIRST
    parent = subprocess.Popen(
        [sys.executable, crash.__file__, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    try:
        for number in range(KILLS):
            wanted = dice.choice((0, 1, 1, 2, 3, 5, 8))
            awaited += wanted
            parent.stdin.write(f"{start}\n")
            parent.stdin.flush()
            child, seen, before = 0, 0, time.monotonic()
            while not child or seen < wanted:
                line = parent.stdout.readline()
                if line.startswith("pid"):
                    child = int(line.split()[1])
                    continue
                committed.add(int(line))
                took, before = time.monotonic() - before, time.monotonic()
                opening_s, tick_s = (opening_s, took) if seen else (took, tick_s)
                seen += 1
            # Anywhere in what it does next. Nothing depends on how far it gets.
            time.sleep(dice.random() * (tick_s if wanted else opening_s))
            os.kill(child, signal.SIGKILL)
            while (line := parent.stdout.readline()) != "dead\n":
                committed.add(int(line))
            if number % 20 == 0:
                assert ask(path, "PRAGMA quick_check") == [("ok",)]
            newest = ask(path, "SELECT max(timestamp_epoch) FROM gpu_metrics")[0][0]
            start = max(start, (newest or 0) + 1)
    finally:
        parent.kill()
        parent.wait()
    assert ask(path, "PRAGMA integrity_check") == [("ok",)]
    # One more recorder takes up what the last one left.
    writer = Writer(database.open_for_writing(url), "here", "nvml", 1)
    writer.write(crash.tick(start), crash.WHO)
    writer.settle()
    stored = {now for (now,) in ask(path, "SELECT DISTINCT timestamp_epoch FROM gpu_metrics")}
    assert committed <= stored
    assert len(committed) >= awaited > KILLS
    ticks = len(stored)
    assert ask(path, "SELECT count(*) FROM gpu_processes") == [(len(crash.PIDS),)]
    present = {pid: sum(pid < 130 or (now - crash.FIRST) // 5 % 2 for now in stored) for pid in crash.PIDS}
    counted = dict(ask(path, "SELECT pid, sample_count FROM gpu_processes"))
    assert counted == present
    assert max(present.values()) == ticks
    hours = dict(
        ask(
            path,
            "SELECT pid, sum(h.seconds) FROM process_hours h "
            "JOIN gpu_processes p ON p.id = h.process_id GROUP BY pid",
        )
    )
    assert hours == pytest.approx(present)


# ---- The database --------------------------------------------------------------------------------


def test_a_locked_database_costs_no_tick(fake: FakeNvml, path: Path) -> None:
    fake.add_gpu()
    with recording(fake, path) as made:
        until(lambda: made.counters.ticks >= 2)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        began, before = int(time.time()), made.counters.ticks
        # One may have been read before the lock.
        until(lambda: made.counters.buffered >= 5)
        ended = time.time()
        until(lambda: made.state.recording is not None)
        assert made.counters.ticks <= before + 1, "only what was written already may be counted late"
        assert made.state.recording is not None
        assert "locked" in made.state.recording.reason
        other.execute("ROLLBACK")
        other.close()
        until(lambda: made.counters.buffered == 0)
        until(lambda: made.state.recording is None)
    times = [now for (now,) in ask(path, "SELECT timestamp_epoch FROM gpu_metrics")]
    assert len(times) == made.counters.ticks
    assert sum(began <= now <= ended for now in times) >= 4, "every tick is there, with its own time"


def test_a_locked_database_is_said_by_the_server(serve: Serve, fake: FakeNvml) -> None:
    fake.add_gpu()
    server = serve(fake).ready()
    other = sqlite3.connect(server.data_dir / "gpumon.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    def waits(_: int, answer: dict[str, Any]) -> bool:
        return answer["recorder"]["buffered"] >= 2 and "wait in memory" in (answer.get("recording_problem") or "")

    answer = server.wait(waits)
    assert answer["status"] in ("degraded", "stale")
    other.close()
    server.wait(lambda _, answer: answer["status"] == "ok" and answer["recorder"]["buffered"] == 0)


def test_a_full_disk_is_waited_for(fake: FakeNvml, path: Path) -> None:
    fake.add_gpu()
    with recording(fake, path) as made:
        until(lambda: made.counters.ticks >= 1)
        assert made.session is not None
        engine = made.session.engine

        def limit(pages: int) -> None:
            # SQLite then says what it says on a full disk: SQLITE_FULL.
            with made.session._busy, engine.connect() as connection:
                connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

        with engine.begin() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql("CREATE TABLE ballast AS SELECT zeroblob(100000) AS bytes")
        limit(1)
        with engine.begin() as connection, pytest.raises(sa.exc.OperationalError, match="full"):
            connection.exec_driver_sql("INSERT INTO ballast SELECT zeroblob(500000)")
        del pages

        def full(_: object, __: object, statement: str, *___: object) -> None:
            if statement.startswith("INSERT INTO gpu_metrics"):
                raise sa.exc.OperationalError(statement, {}, sqlite3.OperationalError("database or disk is full"))

        sa.event.listen(engine, "before_cursor_execute", full)
        until(lambda: made.counters.buffered >= 3)
        until(lambda: made.state.recording is not None)
        assert made.state.recording is not None
        assert "full" in made.state.recording.reason
        sa.event.remove(engine, "before_cursor_execute", full)
        limit(2**30)
        until(lambda: made.counters.buffered == 0)
        until(lambda: made.state.recording is None)


def test_what_waits_is_bounded_and_the_oldest_makes_room(
    fake: FakeNvml, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles, "BUFFER_TICKS", 3)
    fake.add_gpu()
    with recording(fake, path) as made:
        until(lambda: made.counters.ticks >= 1)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        until(lambda: made.counters.dropped >= 2)
        assert made.counters.buffered <= 3
        other.close()
        until(lambda: made.counters.buffered == 0)


def test_a_file_damaged_while_recording_is_set_aside(fake: FakeNvml, path: Path) -> None:
    fake.add_gpu()
    with recording(fake, path) as made:
        until(lambda: made.counters.ticks >= 2)
        assert made.session is not None
        with made.session._busy:
            connection = sqlite3.connect(path)
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.close()
            size = path.stat().st_size
            with path.open("r+b") as file:
                file.seek(4096)
                file.write(os.urandom(size - 4096))
            made.session.engine.dispose()
        until(lambda: made.state.notice is not None)
        notice = made.state.notice
        assert notice is not None
        assert "set aside" in notice.reason
        before = made.counters.ticks
        until(lambda: made.counters.ticks >= before + 2)
    (aside,) = path.parent.glob("gpumon.db.damaged-*[0-9]")
    assert aside.stat().st_size == size, "nothing of it is deleted"
    assert ask(path, "PRAGMA integrity_check") == [("ok",)]
    assert len(ask(path, "SELECT * FROM gpu_metrics")) >= 2


def test_a_tick_that_can_never_be_written_is_dropped_and_the_next_are_not(
    fake: FakeNvml, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add_gpu()
    with recording(fake, path) as made:
        until(lambda: made.counters.ticks >= 1)
        observer = made.observer
        assert observer is not None
        observe, odd = observer.observe, [True]

        def once() -> Any:
            snapshot, identities = observe()
            if odd:
                odd.clear()
                snapshot.readings[0].values["temperature"] = object()  # type: ignore[index]
            return snapshot, identities

        monkeypatch.setattr(observer, "observe", once)
        until(lambda: made.counters.failed >= 1)
        before = made.counters.ticks
        until(lambda: made.counters.ticks >= before + 2)
        assert made.counters.buffered == 0
        assert made.state.recording is None


def test_a_folder_that_cannot_be_written_is_named_and_used_once_it_can(
    serve: Serve, fake: FakeNvml, tmp_path: Path
) -> None:
    fake.add_gpu()
    data_dir = tmp_path / "history"
    data_dir.mkdir()
    # Root may write anything; nobody can open a folder as a database.
    (data_dir / "gpumon.db").mkdir()
    server = serve(fake)
    answer = server.wait(lambda _, answer: bool(answer.get("recording_problem")))
    assert "cannot be opened" in answer["recording_problem"]
    (data_dir / "gpumon.db").rmdir()
    server.wait(lambda status, _: status == 200)
    assert "Traceback" not in server.log.read_text()


# ---- The driver ----------------------------------------------------------------------------------


def test_a_tick_that_takes_longer_than_the_interval_is_skipped_and_counted(
    fake: FakeNvml, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A call that takes long, and not one that is given up.
    monkeypatch.setattr(nvml, "HANG_S", 10 * PATIENCE_S)
    gpu = fake.add_gpu()
    with recording(fake, path) as made:
        until(lambda: made.counters.ticks >= 1)
        fake.hang("nvmlDeviceGetTemperatureV", 10 * PATIENCE_S, gpu)
        until(lambda: made.counters.skipped >= 4)
        fake.recover()
        began, before = time.monotonic(), made.counters.ticks
        until(lambda: made.counters.ticks >= before + 4)
        # The one that was under way, one that was late, and then one an interval: the skipped have not piled up.
        assert made.counters.ticks - before <= 3 + time.monotonic() - began


def test_a_gpu_whose_driver_call_hangs_costs_the_others_nothing(
    fake: FakeNvml, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "HANG_S", 1.0)
    first, _ = fake.add_gpu(uuid="GPU-a"), fake.add_gpu(uuid="GPU-b")
    with recording(fake, path) as made:
        until(lambda: made.counters.ticks >= 1)
        fake.hang("nvmlDeviceGetTemperatureV", 10 * PATIENCE_S, first)
        until(lambda: ask(path, "SELECT state FROM gpus ORDER BY uuid") == [("hung",), ("ok",)])
        before = made.counters.ticks
        until(lambda: made.counters.ticks >= before + 3)
        newest = dict(
            ask(path, "SELECT uuid, max(timestamp_epoch) FROM gpu_metrics JOIN gpus ON id = gpu_id GROUP BY 1")
        )
        assert newest["GPU-b"] > newest["GPU-a"] + 1
        fake.recover()
        until(lambda: ask(path, "SELECT DISTINCT state FROM gpus") == [("ok",)])


def test_the_server_says_that_a_call_hangs_and_still_ends(serve: Serve, fake: FakeNvml) -> None:
    first, _ = fake.add_gpu(uuid="GPU-a"), fake.add_gpu(uuid="GPU-b")
    server = serve(fake).ready()
    fake.hang("nvmlDeviceGetFanSpeed", 10 * PATIENCE_S, first)
    server.wait(lambda _, answer: answer.get("gpus_hung") == 1 and answer["status"] == "degraded")
    # The call would return long after this test has ended; it is not waited for.
    server.stop()
    assert "recorder stopped" in server.log.read_text()


def test_the_driver_may_go_and_come_and_gpus_with_it(
    fake: FakeNvml, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "LONGEST_PAUSE_S", 0.5)
    monkeypatch.setattr(nvml, "RETRY_S", 0.5)
    monkeypatch.setattr(nvml, "RECOUNT_S", 0.5)
    gpu = fake.add_gpu(uuid="GPU-a")
    with recording(fake, path) as made:
        until(lambda: made.counters.ticks >= 1)
        fake.driver_loaded = False
        until(lambda: made.state.driver is not None)
        fake.driver_loaded = True
        until(lambda: made.state.driver is None)
        gpu.lost = True
        until(lambda: ask(path, "SELECT state FROM gpus") == [("lost",)])
        gpu.lost = False
        until(lambda: ask(path, "SELECT state FROM gpus") == [("ok",)])
        other = fake.add_gpu(uuid="GPU-b")
        until(lambda: ask(path, "SELECT state FROM gpus ORDER BY uuid") == [("ok",), ("ok",)])
        other.remove()
        until(lambda: ask(path, "SELECT state FROM gpus ORDER BY uuid") == [("ok",), ("gone",)])


# ---- The recorder's own account ------------------------------------------------------------------


def test_every_minute_is_written_down(fake: FakeNvml, path: Path) -> None:
    fake.add_gpu()
    with recording(fake, path) as made:
        until(lambda: made.counters.ticks >= 3)
        made._every_minute()
        ticks = made.counters.ticks
        until(lambda: made.counters.ticks > ticks)
        ticks = made.counters.ticks
        made._every_minute()
    rows = ask(
        path, "SELECT ticks, skipped, failed, dropped, buffered, duration_ms, database_bytes FROM recorder_health"
    )
    assert ticks <= sum(row[0] for row in rows) <= made.counters.ticks
    assert sum(row[1] for row in rows) <= made.counters.skipped
    assert all(row[2:5] == (0, 0, 0) for row in rows)
    assert rows[0][5] > 0
    assert rows[0][6] > 0
    assert ask(path, "SELECT count(*) FROM gpu_minutes")[0][0] >= 1


def test_the_end_leaves_every_resolution_up_to_date(fake: FakeNvml, path: Path) -> None:
    fake.add_gpu()
    with recording(fake, path) as made:
        until(lambda: made.counters.ticks >= 2)
        made._every_minute()
        before = made.counters.ticks
        until(lambda: made.counters.ticks >= before + 3)
    [(ticks,)] = ask(path, "SELECT count(*) FROM gpu_metrics")
    for tier in TIERS:
        assert ask(path, f"SELECT sum(samples) FROM {tier.table.name}") == [(ticks,)], tier.table.name


def test_a_clock_that_jumps_makes_no_duplicate_and_nothing_negative(fake: FakeNvml, path: Path) -> None:
    fake.add_gpu().add_process(os.getpid(), 1 << 30, sm=50)
    with recording(fake, path) as made:
        until(lambda: made.counters.ticks >= 1)
        assert made.session is not None
        assert made.observer is not None
        source: Any = made.observer.source
        for jump in (-3600, 7200, -1, 0):
            source._clock = lambda jump=jump: time.time() + jump
            before = made.counters.ticks
            until(lambda before=before: made.counters.ticks >= before + 2)
        # Ticks go on behind those of the future.
        ticks = ask(path, "SELECT count(*) FROM gpu_metrics")[0][0]
        made.session.roll_up(made._stopping)
        rolled = ask(path, "SELECT sum(samples) FROM gpu_minutes")[0][0]
        assert ticks <= rolled <= ask(path, "SELECT count(*) FROM gpu_metrics")[0][0]
    assert ask(path, "SELECT count(*) FROM gpu_processes WHERE last_seen < first_seen") == [(0,)]
    assert ask(path, "SELECT count(*) FROM process_hours WHERE seconds < 0 OR busy_s < 0 OR energy_j < 0") == [
        (0,)
    ]
    with recording(fake, path) as again:
        until(lambda: again.counters.ticks >= 1)
        assert again.session is not None
        ticks = ask(path, "SELECT count(*) FROM gpu_metrics")[0][0]
        again.session.roll_up(again._stopping)
        assert ask(path, "SELECT sum(samples) FROM gpu_minutes")[0][0] >= ticks, "nor does a restart lose any"


def test_two_recorders_of_one_file_take_turns(fake: FakeNvml, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles, "RETRY_S", 0.5)
    fake.add_gpu()
    with recording(fake, path) as first:
        until(lambda: first.counters.ticks >= 1)
        with recording(fake, path) as second:
            assert second.state.role == "standby"
            first.stop()
            until(lambda: second.state.role == "recording")
            until(lambda: second.counters.ticks >= 1)
