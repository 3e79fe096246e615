"""`backup`: a sound copy of a database that goes on being written."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
from collections import namedtuple
from contextlib import closing
from pathlib import Path

import pytest
from cli import NOON, PEOPLE, PROGRAM, gpumon, record, settings, tick
from conftest import PATIENCE_S, ROOT, eventually

from gpumon_core.cli import backup, terminal
from gpumon_core.store import database
from gpumon_core.store.writer import Writer

SPACE = namedtuple("SPACE", "total used free")


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'gpumon.db'}"
    record(url, 100).dispose()
    return url


def ticks(path: Path) -> int:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return int(connection.execute("SELECT count(DISTINCT timestamp_epoch) FROM gpu_metrics").fetchone()[0])


def test_ticks_go_on_while_it_copies_and_the_copy_is_one_moment(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = database.open_for_writing(url)
    writer = Writer(writing, "box", "nvml", 4)
    steps = 0

    def between(*_: object) -> None:
        nonlocal steps
        steps += 1
        # Raises where the copy would lock the recorder out.
        writer.write_all([(tick(NOON + 4 * (200 + steps), steps), PEOPLE)])

    monkeypatch.setattr(backup, "PAGES", 8)
    monkeypatch.setattr(terminal.Bar, "show", between)
    reading = database.open_for_reading(url)
    backup.copy(reading, tmp_path / "copy.db")
    writing.dispose()
    assert steps > 5, "so often the recorder wrote meanwhile"
    assert ticks(tmp_path / "copy.db") == 100
    assert ticks(tmp_path / "gpumon.db") == 100 + steps
    backup.check(tmp_path / "copy.db")
    # It serves as a database in its turn.
    again = database.open_for_writing(f"sqlite:///{tmp_path / 'copy.db'}")
    Writer(again, "box", "nvml", 4).write_all([(tick(NOON + 9999), PEOPLE)])
    again.dispose()


def test_beside_a_running_recorder_it_makes_one_sound_file_that_the_owner_alone_may_read(tmp_path: Path) -> None:
    environ = settings(tmp_path / "history", GPUMON_SOURCE="demo", GPUMON_INTERVAL="1", GPUMON_LOG_LEVEL="WARNING")
    file = tmp_path / "history" / "demo.db"
    with subprocess.Popen(
        [*PROGRAM, "record"], cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True
    ) as recorder:
        try:
            eventually(lambda: file.exists() and database.exists(f"sqlite:///{file}") and ticks(file) >= 1)
            file.chmod(0o600)
            done = gpumon(environ, "backup")
            assert (done.returncode, done.stderr) == (0, "")
            [copy] = set(file.parent.glob("demo-*.db"))
            assert str(copy) in done.stdout
            assert ticks(copy) >= 1
            assert copy.stat().st_mode & 0o777 == 0o600
            assert {path.name.removeprefix("demo.db") for path in file.parent.iterdir()} == {
                *("", "-wal", "-shm", ".lock", copy.name)
            }
            before = ticks(file)
            eventually(lambda: ticks(file) > before)
        finally:
            recorder.send_signal(signal.SIGTERM)
            _, log = recorder.communicate(timeout=PATIENCE_S)
    # A busy machine may leave out a tick and say so; of the backup the recorder noticed nothing.
    assert not re.search("lock|written|Traceback", log), log


def test_nothing_is_overwritten_unasked_and_never_the_database_itself(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = settings(tmp_path)
    out = tmp_path / "copy.db"
    out.write_text("dear")
    done = gpumon(environ, "backup", "--out", str(out))
    assert (done.returncode, done.stderr.count("\n"), out.read_text()) == (1, 1, "dear")
    assert "--force" in done.stderr
    assert gpumon(environ, "backup", "--out", str(out), "--force").returncode == 0
    assert ticks(out) == 100
    link = tmp_path / "link.db"
    link.symlink_to("gpumon.db")
    for name in ("gpumon.db", "link.db"):
        done = gpumon(environ, "backup", "--out", str(tmp_path / name), "--force")
        assert done.returncode == 1
        assert "belongs to the database itself" in done.stderr
    assert ticks(tmp_path / "gpumon.db") == 100
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SPACE(1 << 30, 1 << 30, 1 << 20))
    with pytest.raises(terminal.Failure, match="free some space"):
        backup.copy(database.open_for_reading(url), tmp_path / "third.db")


def test_a_damaged_copy_is_deleted(url: str, tmp_path: Path) -> None:
    path = tmp_path / "gpumon.db"
    size = os.path.getsize(path)
    with path.open("r+b") as file:
        # A page in the middle.
        file.seek(size // 2 - size // 2 % 4096)
        file.write(b"\xff" * 4096)
    done = gpumon(settings(tmp_path), "backup", "--out", str(tmp_path / "copy.db"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "the copy is damaged" in done.stderr
    assert not (tmp_path / "copy.db").exists()
    assert not list(tmp_path.glob(".copy*"))


def test_of_postgresql_it_says_how_and_keeps_the_password(tmp_path: Path) -> None:
    environ = settings(
        tmp_path, GPUMON_DATABASE_URL="postgresql+psycopg://u:geheim@db:5433/gpumon?sslmode=require"
    )
    done = gpumon(environ, "backup")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "pg_dump --format=custom" in done.stderr
    assert "'postgresql://u:***@db:5433/gpumon?sslmode=require'" in done.stderr
    assert "geheim" not in done.stderr
