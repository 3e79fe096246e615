"""Files that are no history of the original are refused in one sentence; a sound one is never written to."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import importing
import pytest
import sqlalchemy as sa
from conftest import PATIENCE_S, eventually
from importing import DAY, NOW, digest, everything, record, span
from originals import OriginalFile
from ticks import ask

from gpumon_core.__main__ import main
from gpumon_core.legacy_import import importer, reader, sqlite_file
from gpumon_core.settings import Settings, load
from gpumon_core.store import database

# The fixtures that these tests share.
engine, settings, file = importing.engine, importing.settings, importing.file


def no_sqlite(path: Path) -> None:
    path.write_text("temperature,utilization\n" * 100)


def empty(path: Path) -> None:
    path.touch()


def cut_header(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0")


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def tables(*statements: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with sqlite3.connect(path) as connection:
            for statement in statements:
                connection.execute(statement)

    make.__name__ = statements[0][:40]
    return make


READINGS = "timestamp_epoch, temperature, utilization, memory, power"


def own_database(path: Path) -> None:
    database.open_for_writing(f"sqlite:///{path}").dispose()


def torn(path: Path) -> None:
    file = OriginalFile(path)
    file.ticks(span(8000))
    file.connection.close()
    content = bytearray(path.read_bytes())
    content[3 * 4096 : 12 * 4096] = b"\xff" * (9 * 4096)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "does not exist"),
        (no_sqlite, "is not a SQLite file"),
        (empty, "is not a SQLite file"),
        (cut_header, "is not a SQLite file"),
        (folder, "is not a file"),
        (pipe, "is not a file"),
        (own_database, "is a database of gpumon itself"),
        (torn, "It is damaged"),
        (tables("CREATE TABLE other (x)"), "it has no table gpu_metrics"),
        (
            tables("CREATE TABLE gpu_metrics (timestamp_epoch, power)"),
            "no column temperature, utilization, memory",
        ),
        (
            tables(
                "CREATE TABLE t (x)",
                f"CREATE VIEW gpu_metrics AS SELECT {', '.join('x AS ' + c for c in READINGS.split(', '))} FROM t",
            ),
            "is not an ordinary table",
        ),
        (
            tables(f"CREATE TABLE gpu_metrics ({READINGS})", "CREATE TABLE process_snapshots (pid)"),
            "process_snapshots has no column",
        ),
        (tables("CREATE VIRTUAL TABLE gpu_metrics USING fts5(" + READINGS + ")"), "is not an ordinary table"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_another_file_is_one_sentence(
    tmp_path: Path,
    make: Callable[[Path], None],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GPUMON_DATA_DIR", str(tmp_path / "history"))
    monkeypatch.setenv("GPUMON_HOST_NAME", "here")
    chosen = load()
    engine = database.open_for_writing(chosen.real_database_url)
    record(engine, range(NOW, NOW + 1))
    before = everything(engine)
    path = tmp_path / "gpu_metrics.db"
    make(path)
    capsys.readouterr()
    # This process ends by its own rules.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert main(["import", str(path)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    [line] = shown.err.splitlines()
    assert line.startswith(f"gpumon: {path}")
    assert says in line
    assert everything(engine) == before


def test_triggers_and_views_beside_the_tables_do_nothing(
    engine: sa.Engine, settings: Settings, file: OriginalFile
) -> None:
    """The oldest files have a view of their own."""
    file.execute("CREATE VIEW history_json_view AS SELECT json_group_array(timestamp) FROM gpu_metrics")
    file.execute("CREATE TRIGGER t AFTER INSERT ON gpu_metrics BEGIN DELETE FROM gpu_metrics; END")
    file.execute("DROP TRIGGER t")
    file.ticks(span(40))
    file.execute("CREATE TRIGGER t AFTER INSERT ON gpu_metrics BEGIN DELETE FROM gpu_metrics; END")
    assert importer.run(settings, file.path, now=NOW).taken["ticks"] == 10


def test_a_file_of_readings_only_is_taken(engine: sa.Engine, settings: Settings, tmp_path: Path) -> None:
    file = OriginalFile(tmp_path / "early.db", "readings")
    file.ticks(span(400))
    assert importer.run(settings, file.path, now=NOW).taken == {"ticks": 100, "processes": 0, "snapshots": 0}


@pytest.mark.parametrize("left", ["rolled up", "log", "journal"])
def test_the_file_and_what_lies_beside_it_stay_as_they_are(
    engine: sa.Engine, settings: Settings, tmp_path: Path, left: str
) -> None:
    """Whether its program ended well, or was killed with a log or a journal behind it."""
    there = tmp_path / "there"
    there.mkdir()
    file = OriginalFile(tmp_path / "live.db")
    if left == "log":
        file.execute("PRAGMA journal_mode = WAL")
    file.ticks(span(400))
    name = there / "gpu_metrics.db"
    if left == "journal":
        file.connection.execute("PRAGMA cache_size = 2")
        file.connection.execute("BEGIN")
        file.connection.execute("UPDATE gpu_metrics SET power = 1")
        file.connection.executemany(
            "INSERT INTO gpu_metrics (timestamp, timestamp_epoch, temperature, utilization, memory, power) "
            "VALUES (?, ?, 1, 1, 1, 1)",
            [("x" * 2000, NOW - 500)] * 300,
        )
        shutil.copy(tmp_path / "live.db-journal", there / "gpu_metrics.db-journal")
    if left == "log":
        shutil.copy(tmp_path / "live.db-wal", there / "gpu_metrics.db-wal")
    shutil.copy(file.path, name)
    before = digest(there)
    report = importer.run(settings, name, now=NOW)
    assert report.taken["ticks"] == 100
    assert ask(engine, "SELECT count(*) FROM gpu_metrics WHERE power = 100") == [(100,)]
    assert digest(there) == before


def test_a_file_of_another_user_in_a_folder_of_another_user_is_read(
    engine: sa.Engine, settings: Settings, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    file = OriginalFile(there / "gpu_metrics.db")
    file.execute("PRAGMA journal_mode = WAL")
    file.ticks(span(400))
    file.connection.close()
    for path in (file.path, there):
        path.chmod(0o555)
    try:
        assert importer.run(settings, file.path, now=NOW).taken["ticks"] == 100
        assert [path.name for path in there.iterdir()] == ["gpu_metrics.db"]
    finally:
        there.chmod(0o755)


def write_in_wal_mode(path: Path, times: Iterable[int], padding: int = 0) -> None:
    """A program that opens the file for every batch: at its end SQLite takes the log away."""
    with closing(sqlite3.connect(path, timeout=PATIENCE_S)) as connection, connection:
        connection.execute("CREATE TABLE IF NOT EXISTS other (x)")
        # All pages move.
        connection.execute("DELETE FROM other")
        connection.executemany("INSERT INTO other VALUES (?)", [("x" * 3000,)] * padding)
        connection.executemany(
            "INSERT INTO gpu_metrics (timestamp, timestamp_epoch, temperature, utilization, memory, power) "
            "VALUES ('', ?, 60, 50, 1000, 100)",
            [(at,) for at in times],
        )


def test_a_file_that_is_written_to_between_two_questions_is_read_as_it_is_then(file: OriginalFile) -> None:
    file.execute("PRAGMA journal_mode = WAL")
    file.ticks(span(4000))
    file.connection.close()
    with reader.OriginalReader(file.path) as opened:
        assert len(list(opened.ticks(0, NOW))) == 1000
        write_in_wal_mode(file.path, span(400, NOW + 400), padding=200)
        assert len(list(opened.ticks(0, NOW + 400))) == 1100
        assert opened.contents().last == NOW + 396
    assert sorted(path.name for path in file.path.parent.iterdir()) == ["gpu_metrics.db"]


# Opens the file for every batch, in a process of its own: a process that closes a file gives up its locks on it.
IN_BATCHES = f"""
import contextlib, itertools, sqlite3, sys, time
for number in itertools.count():
    began = time.monotonic()
    with contextlib.closing(sqlite3.connect(sys.argv[1], timeout={PATIENCE_S})) as connection, connection:
        connection.execute("DELETE FROM gpu_metrics WHERE timestamp_epoch > {NOW}")
        connection.executemany(
            "INSERT INTO gpu_metrics (timestamp, timestamp_epoch, temperature, utilization, memory, power) "
            "VALUES (?, ?, 60, 50, 1000, 100)",
            [("x" * 3000, {NOW} + 4 * at) for at in range(1, number % 7 * 100 + 2)],
        )
    print(flush=True)
    # Quiet for longer than a reader needs, most of the time.
    time.sleep(max(0.08, 8 * (time.monotonic() - began)))
"""


def has_all_ticks(path: Path) -> bool:
    """Whether every tick before NOW is read; not where a machine is too busy for a read between two batches."""
    try:
        with reader.OriginalReader(path) as opened:
            assert len([tick for tick in opened.ticks(0, NOW + DAY) if tick.at < NOW]) == 2000
    except sqlite_file.SqliteFileError as error:
        if "was written to while it was read" in str(error):
            return False
        raise
    return True


def test_a_sound_file_is_never_called_damaged_while_its_program_opens_and_closes_it(
    file: OriginalFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.execute("PRAGMA journal_mode = WAL")
    file.execute("CREATE INDEX at ON gpu_metrics (timestamp_epoch)")
    file.ticks(span(8000))
    file.connection.close()
    monkeypatch.setattr(reader, "PAGE_ROWS", 100)
    command = [sys.executable, "-c", IN_BATCHES, str(file.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writing:
        assert writing.stdout is not None
        writing.stdout.readline()
        try:
            for _ in range(40):
                eventually(lambda: has_all_ticks(file.path))
        finally:
            writing.kill()


def test_a_file_that_is_always_written_to_is_to_be_read_again(
    file: OriginalFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.execute("PRAGMA journal_mode = WAL")
    file.ticks(span(400))
    file.connection.close()
    monkeypatch.setattr(sqlite_file, "RETRY_S", 0.0)
    states = itertools.count()
    monkeypatch.setattr(sqlite_file, "_state", lambda path: (0, 0, 0, next(states)))
    with pytest.raises(sqlite_file.SqliteFileError, match=r"was written to while it was read.* Run it again"):
        reader.OriginalReader(file.path)
