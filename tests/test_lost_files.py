"""A database that is removed, replaced, foreign or damaged while it is recorded into: later ticks are in it."""

from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import crash
import fake_nvml
import pytest
import sqlalchemy as sa
from conftest import PATIENCE_S
from conftest import eventually as until
from fake_nvml import FakeNvml

from gpumon_core.recording import recorder as recorder_module
from gpumon_core.recording import roles
from gpumon_core.recording.recorder import Recorder
from gpumon_core.settings import load
from gpumon_core.store import database
from gpumon_core.store.writer import Writer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history" / "gpumon.db"


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles, "RETRY_S", 0.5)


@contextmanager
def recording(fake: FakeNvml, path: Path, **more: Any) -> Iterator[Recorder]:
    """A recorder of the fake driver in this process, and all that it has sampled as `sampled`."""
    with fake_nvml.loaded(fake):
        chosen = {"data_dir": path.parent, "host_name": "here", "interval": 1, "source": "nvml"} | more
        made = Recorder(load(**chosen))
        made.start(patient=True)
        try:
            yield made
        finally:
            made.stop()


def watch(made: Recorder) -> list[int]:
    """The second of each tick that is sampled from now on."""
    observer = made.observer
    assert observer is not None
    observe, seconds = observer.observe, []

    def seen() -> Any:
        observed = observe()
        seconds.append(int(observed[0].timestamp))
        return observed

    observer.observe = seen  # type: ignore[method-assign]
    return seconds


def stored(path: Path) -> set[int]:
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=PATIENCE_S)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return {second for (second,) in connection.execute("SELECT timestamp_epoch FROM gpu_metrics")}
    finally:
        connection.close()


def twice(recorded_ms: dict[int, int]) -> list[int]:
    """The seconds with a tick that lasted longer than the time since the one before: it was written twice."""
    pairs = itertools.pairwise(sorted(recorded_ms))
    return [second for before, second in pairs if recorded_ms[second] > 1000 * (second - before) + 950]


def committed(made: Recorder, more: int) -> None:
    before = made.counters.ticks
    until(lambda: made.counters.ticks >= before + more)


# ---- Removed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["file", "file and log", "folder"])
def test_a_database_that_is_removed_is_begun_anew_and_every_later_tick_is_in_it(
    fake: FakeNvml, path: Path, what: str
) -> None:
    fake.add_gpu()
    with recording(fake, path) as made:
        committed(made, 2)
        if what == "folder":
            shutil.rmtree(path.parent)
        else:
            for part in ("", *(("-wal", "-shm") if what == "file and log" else ())):
                (path.parent / (path.name + part)).unlink()
        seconds = watch(made)
        until(lambda: made.state.notice is not None)
        committed(made, 2)
        notice = made.state.notice
    assert notice is not None
    assert "removed while it was recorded into" in notice.reason
    assert seconds
    assert set(seconds) <= stored(path)
    assert made.counters.failed == 0


def test_a_tick_that_went_into_a_file_just_removed_is_written_again(
    fake: FakeNvml, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add_gpu()
    write, removed = Writer.write_all, []

    def remove_while_writing(self: Writer, ticks: Any) -> int:
        written = write(self, ticks)
        if made.counters.ticks >= 2 and not removed:
            removed.extend(int(snapshot.timestamp) for snapshot, _ in ticks)
            path.unlink()
        return written

    monkeypatch.setattr(Writer, "write_all", remove_while_writing)
    with recording(fake, path) as made:
        until(lambda: made.state.notice is not None)
        committed(made, 1)
    assert removed
    assert set(removed) <= stored(path)


@pytest.mark.parametrize("parts", [("-wal", "-shm"), ("-wal",), ("-shm",)])
@pytest.mark.parametrize("is_polled", [False, True])
def test_a_log_that_is_removed_alone_costs_nothing(
    fake: FakeNvml, path: Path, parts: tuple[str, ...], is_polled: bool
) -> None:
    fake.add_gpu()
    reader = database.open_for_reading(f"sqlite:///{path}", often=True)
    with recording(fake, path) as made:
        seconds = watch(made)
        committed(made, 3)
        if is_polled:
            with reader.connect() as connection:
                connection.execute(sa.text("SELECT count(*) FROM gpu_metrics")).all()
        for part in parts:
            (path.parent / (path.name + part)).unlink()
        until(lambda: made.state.notice is not None)
        assert made.state.notice is not None
        assert "its content was written into the file" in made.state.notice.reason
        committed(made, 2)
        assert set(seconds[:-1]) <= stored(path), "another program sees all of it"
        if is_polled:
            with reader.connect() as connection:
                found = connection.execute(sa.text("SELECT timestamp_epoch FROM gpu_metrics")).scalars()
                assert set(seconds[:-1]) <= set(found), "and so does a reader of this one"
    reader.dispose()
    assert set(seconds) <= stored(path)


# ---- Replaced ------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_log", [False, True])
def test_a_backup_that_is_moved_over_the_live_file_is_sound_and_goes_on(
    fake: FakeNvml, path: Path, tmp_path: Path, with_log: bool
) -> None:
    fake.add_gpu()
    backup = tmp_path / "backup.db"
    with recording(fake, path) as made:
        committed(made, 2)
        source, copy = sqlite3.connect(path), sqlite3.connect(backup)
        source.backup(copy)
        source.close()
        if with_log:
            # It brings a log of its own, which belongs to it.
            copy.execute("PRAGMA journal_mode = WAL")
            copy.execute("PRAGMA wal_autocheckpoint = 0")
            copy.execute("CREATE TABLE mark AS SELECT 1 AS x")
            copy.commit()
            for part in ("", "-wal"):
                shutil.copy(f"{backup}{part}", f"{backup}{part}.copy")
        copy.close()
        before = stored(backup)
        committed(made, 3)
        if with_log:
            os.replace(f"{backup}.copy", path)
            os.replace(f"{backup}-wal.copy", f"{path}-wal")
        else:
            backup.rename(path)
        seconds = watch(made)
        until(lambda: made.state.notice is not None)
        committed(made, 3)
        assert made.state.notice is not None
        assert "replaced while it was recorded into" in made.state.notice.reason
    found = stored(path)
    assert before <= found
    assert set(seconds) <= found
    if with_log:
        connection = sqlite3.connect(path)
        assert connection.execute("SELECT x FROM mark").fetchall() == [(1,)], "nor is its log lost"
        connection.close()
        assert not list(path.parent.glob("*.replaced-*"))
    else:
        assert len(list(path.parent.glob("gpumon.db.replaced-*-wal"))) == 1


def test_a_damaged_file_that_takes_the_place_of_the_live_one_is_set_aside(
    fake: FakeNvml, path: Path, tmp_path: Path
) -> None:
    fake.add_gpu()
    with recording(fake, path) as made:
        committed(made, 2)
        other = tmp_path / "other.db"
        source, copy = sqlite3.connect(path), sqlite3.connect(other)
        source.backup(copy)
        source.close()
        copy.close()
        content = bytearray(other.read_bytes())
        # Not the first page, nor those of the tables that a tick touches first.
        content[-4096 * 3 :] = os.urandom(4096 * 3)
        other.write_bytes(content)
        other.rename(path)
        until(lambda: made.state.notice is not None and "set aside" in made.state.notice.reason)
        committed(made, 2)
    (aside,) = path.parent.glob("gpumon.db.damaged-*[0-9]")
    assert aside.read_bytes() == bytes(content)
    assert stored(path)


def test_a_backup_behind_a_link_gets_no_log_but_its_own(fake: FakeNvml, path: Path, tmp_path: Path) -> None:
    fake.add_gpu()
    real = tmp_path / "elsewhere" / "x.db"
    real.parent.mkdir()
    path.parent.mkdir()
    path.symlink_to(real)
    with recording(fake, path) as made:
        committed(made, 2)
        backup = tmp_path / "backup.db"
        source, copy = sqlite3.connect(path), sqlite3.connect(backup)
        source.backup(copy)
        copy.execute("CREATE TABLE mark AS SELECT 1 AS x")
        copy.commit()
        source.close()
        copy.close()
        committed(made, 2)
        backup.rename(real)
        seconds = watch(made)
        until(lambda: made.state.notice is not None)
        committed(made, 2)
    assert set(seconds) <= stored(path)
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT x FROM mark").fetchall() == [(1,)]
    connection.close()
    assert len(list(real.parent.glob("x.db.replaced-*-wal"))) == 1


@pytest.mark.parametrize("stand_in", ["dangling link", "file"])
def test_a_folder_that_is_out_of_reach_and_comes_back_loses_nothing(
    fake: FakeNvml, path: Path, tmp_path: Path, stand_in: str
) -> None:
    fake.add_gpu()
    with recording(fake, path) as made:
        seconds = watch(made)
        committed(made, 3)
        away = tmp_path / "away"
        path.parent.rename(away)
        if stand_in == "file":
            path.parent.write_text("in its place")
        else:
            path.parent.symlink_to(tmp_path / "nowhere" / "at" / "all")
            (tmp_path / "nowhere").write_text("no folder")
        until(lambda: made.counters.buffered >= 2)
        path.parent.unlink()
        away.rename(path.parent)
        until(lambda: made.counters.buffered == 0)
        committed(made, 1)
    assert set(seconds) <= stored(path)
    assert not list(path.parent.glob("*.removed-*"))


@pytest.mark.parametrize("whose", ["own", "another machine's"])
def test_a_backup_that_is_restored_in_place_is_noticed_and_ticks_go_to_their_own_rows(
    fake: FakeNvml, path: Path, tmp_path: Path, whose: str
) -> None:
    fake.add_gpu()
    backup = tmp_path / "backup.db"
    with recording(fake, path) as made:
        committed(made, 2)
        if whose == "own":
            source, copy = sqlite3.connect(path), sqlite3.connect(backup)
            source.backup(copy)
            source.close()
        else:
            engine = database.open_for_writing(f"sqlite:///{backup}")
            Writer(engine, "otherhost", "nvml", 1).write(crash.tick(crash.FIRST), crash.WHO)
            engine.dispose()
            copy = sqlite3.connect(backup)
        committed(made, 2)
        live = sqlite3.connect(path, timeout=PATIENCE_S)
        copy.backup(live)
        live.close()
        copy.close()
        seconds = watch(made)
        until(lambda: made.state.notice is not None)
        assert made.state.notice is not None
        assert "was replaced while it was recorded into" in made.state.notice.reason
        committed(made, 2)
    connection = sqlite3.connect(path)
    mine = connection.execute(
        "SELECT timestamp_epoch FROM gpu_metrics m JOIN gpus g ON g.id = m.gpu_id "
        "JOIN hosts h ON h.id = g.host_id WHERE h.name = 'here'"
    )
    assert set(seconds) <= {second for (second,) in mine}
    others = connection.execute("SELECT max(last_seen) FROM hosts WHERE name <> 'here'").fetchone()[0]
    connection.close()
    assert others == (None if whose == "own" else crash.FIRST)
    assert made.counters.failed == 0


def test_a_file_that_is_replaced_is_followed_before_the_next_tick(
    fake: FakeNvml, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add_gpu()
    monkeypatch.setattr(recorder_module, "LOOK_S", 0.2)
    with recording(fake, path, interval=3600) as made:
        until(lambda: made.counters.ticks >= 1)
        path.unlink()
        until(lambda: made.state.notice is not None)
        until(path.exists)
        assert made.counters.ticks == 1


# ---- Foreign and damaged -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "link to text", "link to a damaged database"])
def test_what_is_no_database_is_refused_and_never_renamed(
    fake: FakeNvml, path: Path, tmp_path: Path, kind: str
) -> None:
    fake.add_gpu()
    path.parent.mkdir()
    mine = tmp_path / "mine.txt"
    content = b"my thesis\n" * 1000 if "text" in kind else b"SQLite format 3\0" + b"\xff" * 8000
    mine.write_bytes(content)
    if kind == "text":
        path.write_bytes(content)
    else:
        path.symlink_to(mine)
    with recording(fake, path) as made:
        until(lambda: made.state.recording is not None)
        assert made.state.recording is not None
        assert "left a" in made.state.recording.reason
        seconds = watch(made)
        until(lambda: len(seconds) >= 2)
        assert path.read_bytes() == content
        assert path.is_symlink() == (kind != "text")
        assert sorted(found.name for found in path.parent.iterdir() if "damaged" in found.name) == []
        # Once it is out of the way, all that was sampled meanwhile is written.
        path.rename(tmp_path / "moved")
        committed(made, 2)
    assert set(seconds) <= stored(path)
    assert mine.read_bytes() == content


def test_damage_beyond_the_first_page_is_found_at_the_start(fake: FakeNvml, path: Path) -> None:
    fake.add_gpu()
    with recording(fake, path) as made:
        committed(made, 2)
    with path.open("r+b") as file:
        file.seek(-8192, os.SEEK_END)
        file.write(os.urandom(8192))
    with recording(fake, path) as made:
        until(lambda: made.state.notice is not None)
        assert made.state.notice is not None
        assert "set aside" in made.state.notice.reason
        committed(made, 1)
    assert stored(path)


# ---- Sampling and writing ------------------------------------------------------------------------


def test_sampling_goes_on_while_a_write_does_not_return(
    fake: FakeNvml, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add_gpu()
    go_on, write, held = threading.Event(), Writer.write_all, threading.Event()

    def slow(self: Writer, ticks: Any) -> int:
        if made.counters.ticks >= 1:
            held.set()
            go_on.wait(PATIENCE_S)
        return write(self, ticks)

    monkeypatch.setattr(Writer, "write_all", slow)
    with recording(fake, path) as made:
        seconds = watch(made)
        until(held.is_set)
        until(lambda: made.counters.buffered >= 4)
        assert made.latest_tick is not None
        assert int(made.latest_tick.snapshot.timestamp) >= seconds[-2], "what is shown from memory is new"
        go_on.set()
        until(lambda: made.counters.buffered == 0)
    assert set(seconds) <= stored(path)
    assert made.counters.dropped == 0


def test_a_commit_of_which_nobody_knows_is_not_repeated(
    fake: FakeNvml, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add_gpu()
    write, broken = Writer.write_all, []

    def breaks_after_the_commit(self: Writer, ticks: Any) -> int:
        written = write(self, ticks)
        if made.counters.ticks >= 2 and not broken:
            broken.append(int(ticks[-1][0].timestamp))
            self._forget()
            raise sa.exc.OperationalError("COMMIT", {}, sqlite3.OperationalError("connection lost"))
        return written

    monkeypatch.setattr(Writer, "write_all", breaks_after_the_commit)
    with recording(fake, path) as made:
        until(lambda: broken)
        committed(made, 3)
    connection = sqlite3.connect(path)
    lengths = dict(connection.execute("SELECT timestamp_epoch, recorded_ms FROM gpu_metrics"))
    connection.close()
    assert broken[0] in lengths
    assert twice(lengths) == [], "a tick that is written twice is merged with itself"
    assert made.counters.ticks == len(lengths)


def test_what_the_database_refuses_of_one_process_costs_its_texts_only(
    fake: FakeNvml, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = fake.add_gpu()
    gpu.add_process(os.getpid(), 1 << 30)
    gpu.add_process(os.getppid(), 1 << 30)
    with recording(fake, path) as made:
        observer = made.observer
        assert observer is not None
        observe = observer.observe

        def odd() -> Any:
            snapshot, identities = observe()
            mine = identities[os.getpid()]
            # What no database takes: half of a pair of surrogates.
            identities[os.getpid()] = replace(mine, name="\ud800", start_key="bad:1")
            return snapshot, identities

        monkeypatch.setattr(observer, "observe", odd)
        until(lambda: "cannot be written" in (made.counters.last_error or ""))
        seconds = watch(made)
        committed(made, 3)
        assert made.counters.failed == 0
    assert seconds
    assert set(seconds) <= stored(path)
    connection = sqlite3.connect(path)
    names = dict(
        connection.execute(
            "SELECT pid, name FROM gpu_processes WHERE start_key = 'bad:1' OR pid <> ?", [os.getpid()]
        )
    )
    connection.close()
    assert names[os.getpid()] is None
    assert names[os.getppid()] is not None


# ---- The end -------------------------------------------------------------------------------------


def test_what_waits_at_the_end_is_written_by_the_next_recorder(fake: FakeNvml, path: Path) -> None:
    fake.add_gpu()
    with recording(fake, path) as made:
        committed(made, 2)
        seconds = watch(made)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        until(lambda: made.counters.buffered >= 3)
        began = time.monotonic()
        made.stop()
        assert time.monotonic() - began < PATIENCE_S, "the lock is never given back"
        other.close()
    (left,) = path.parent.glob("waiting-*.ticks")
    with recording(fake, path) as made:
        committed(made, 1)
        until(lambda: not left.exists())
    assert set(seconds) <= stored(path)
    assert made.counters.dropped == 0


def test_the_end_waits_for_nothing_that_hangs(fake: FakeNvml, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.add_gpu()
    go_on, write = threading.Event(), Writer.write_all

    def hangs(self: Writer, ticks: Any) -> int:
        if made.counters.ticks >= 1:
            go_on.wait(10 * PATIENCE_S)
        return write(self, ticks)

    monkeypatch.setattr(Writer, "write_all", hangs)
    with recording(fake, path) as made:
        until(lambda: made.counters.buffered >= 2)
        began = time.monotonic()
        made.stop()
        took_s = time.monotonic() - began
        assert made.state.role == "stopped"
        assert list(path.parent.glob("waiting-*.ticks"))
        go_on.set()
    assert took_s < PATIENCE_S, "what hangs does so for ten times as long"
