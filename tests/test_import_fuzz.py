"""Whatever a file holds that calls itself the original's: one sentence or a sound history, and twice is once."""

from __future__ import annotations

import sqlite3
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from importing import GPUS, NOW, everything, record, span
from originals import OriginalFile
from ticks import ask

from gpumon_core.legacy_import import importer, reader, sqlite_file
from gpumon_core.legacy_import.import_records import ImportRefused
from gpumon_core.settings import load
from gpumon_core.store import database

QUIETLY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
# Near the present, at the edges of retention, and anywhere.
TIMES = st.one_of(
    st.integers(NOW - 400, NOW + 8),
    st.sampled_from([NOW - days * 86400 + more for days in (3, 30, 730) for more in (-3601, -60, -1, 0, 4, 3599)]),
    st.integers(-(2**63), 2**63 - 1),
)
ANYTHING = st.one_of(
    st.none(), st.floats(), st.integers(-(2**63), 2**63 - 1), st.text(max_size=20), st.binary(max_size=20)
)
NUMBERS = st.one_of(st.floats(0, 100), st.integers(0, 100), ANYTHING)
INDICES = st.one_of(st.integers(0, 2), ANYTHING)
PIDS = st.one_of(st.integers(1, 4), ANYTHING)
NAMES = st.one_of(st.sampled_from(["train", "/usr/bin/train", "serve"]), ANYTHING)
ROWS = {
    "gpu_metrics": (INDICES, st.one_of(TIMES, ANYTHING), NUMBERS, NUMBERS, NUMBERS, NUMBERS),
    "gpu_processes": (
        INDICES,
        PIDS,
        NAMES,
        TIMES,
        TIMES,
        NUMBERS,
        NUMBERS,
        st.one_of(st.integers(0, 9), ANYTHING),
    ),
    "process_snapshots": (INDICES, st.one_of(TIMES, ANYTHING), PIDS, NAMES, NUMBERS),
}
FILES = st.fixed_dictionaries(
    {table: st.lists(st.tuples(*columns), max_size=12) for table, columns in ROWS.items()}
)


def storable(value: Any) -> Any:
    """What sqlite3 can bind: of half a character in a text the bytes, as another program may have written them."""
    try:
        return value.encode() and value if isinstance(value, str) else value
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogatepass")


def take(folder: Path, path: Path) -> dict[str, int] | None:
    """What an import took; None where the file was refused with a sentence."""
    chosen = load(data_dir=folder, host_name="here")
    problem: str | None
    try:
        report = importer.run(chosen, path, now=NOW)
        taken, problem = report.taken, report.problem
    except (sqlite_file.SqliteFileError, ImportRefused) as error:
        taken, problem = None, str(error)
    assert problem is None or (problem and problem.isprintable())
    return taken


def imported_twice(folder: Path, path: Path) -> None:
    """Import a file into a new database twice: the second time changes nothing, and what is there adds up."""
    engine = database.open_for_writing(f"sqlite:///{folder / 'gpumon.db'}")
    record(engine, range(NOW - 200, NOW - 100, 4), GPUS)
    try:
        own = everything(engine)["gpu_metrics"]
        first = take(folder, path)
        before = everything(engine)
        assert set(own) <= set(before["gpu_metrics"])
        again = take(folder, path)
        assert (again is None) == (first is None)
        assert again is None or not any(again.values())
        assert everything(engine) == before
        assert ask(engine, "PRAGMA integrity_check") == [("ok",)]
        assert ask(engine, "PRAGMA foreign_key_check") == []
        [(within,)] = ask(engine, "SELECT count(*) FROM imports WHERE first > last OR ticks < 1")
        assert within == 0
        overdone = "SELECT * FROM gpu_processes WHERE first_seen > last_seen OR sample_count < 1 OR avg_memory < 0"
        assert ask(engine, overdone) == []
        [(short,)] = ask(engine, "SELECT count(*) FROM gpu_usage WHERE seconds < 0 OR busy_s > seconds + 0.1")
        assert short == 0
    finally:
        engine.dispose()


@QUIETLY
@given(rows=FILES, several=st.booleans())
def test_any_rows(rows: dict[str, list[tuple[Any, ...]]], several: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "gpu_metrics.db"
        connection = sqlite3.connect(path)
        for table, columns in reader.COLUMNS.items():
            names = ("gpu_index", *columns) if several else columns
            connection.execute(f"CREATE TABLE {table} ({', '.join(names)})")
            places = ", ".join("?" * len(names))
            connection.executemany(
                f"INSERT INTO {table} VALUES ({places})",
                [tuple(map(storable, row))[0 if several else 1 :] for row in rows[table]],
            )
        connection.commit()
        connection.close()
        imported_twice(Path(name), path)


def whole_file() -> bytes:
    """A file of one GPU, of a few pages, as the original leaves it."""
    with tempfile.TemporaryDirectory() as name:
        file = OriginalFile(Path(name) / "gpu_metrics.db")
        file.ticks(span(600))
        file.seen(7, "/usr/bin/train", span(600))
        file.seen(8, "serve", span(200))
        file.counted(9, "gone", NOW - 90_000, NOW - 80_000, 100, 300.0, 400.0)
        file.execute("CREATE INDEX idx_gpu_metrics_timestamp_epoch ON gpu_metrics(timestamp_epoch)")
        file.execute("CREATE INDEX idx_process_snapshots_timestamp ON process_snapshots(timestamp_epoch)")
        file.execute("CREATE INDEX idx_process_snapshots_pid ON process_snapshots(pid)")
        file.connection.close()
        return file.path.read_bytes()


WHOLE = whole_file()
# The beginnings of pages are where a file is held together.
OFFSETS = st.one_of(
    st.integers(0, len(WHOLE) - 1),
    st.builds(
        lambda page, more: min(len(WHOLE) - 1, 4096 * page + more),
        st.integers(0, len(WHOLE) // 4096),
        st.integers(0, 40),
    ),
)


@QUIETLY
@given(
    changes=st.lists(st.tuples(OFFSETS, st.integers(0, 255)), min_size=1, max_size=20), cut=st.integers(0, 8000)
)
def test_any_flipped_bytes(changes: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(WHOLE)
    for offset, byte in changes:
        content[offset] = byte
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "gpu_metrics.db"
        path.write_bytes(content[: len(content) - max(0, cut - 4000)])
        imported_twice(Path(name), path)
