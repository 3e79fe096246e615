"""A dry run of the import counts what the import then takes, whatever the file and whatever is recorded."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from fake_nvml import FakeNvml, loaded
from importing import DAY, GPUS, HOUR, NOW, record, span
from originals import OriginalFile
from ticks import ask

from gpumon_core.legacy_import import importer
from gpumon_core.settings import Settings, load
from gpumon_core.store import database
from gpumon_core.store.lock import recorder_lock
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuInfo, GpuReading, HostInfo, Snapshot


def plain(path: Path) -> None:
    """Up to this second, as the original is when it runs beside gpumon."""
    file = OriginalFile(path)
    file.ticks(span(1200, NOW + 1))
    file.seen(7, "train", span(1200, NOW + 1))


def readings_only(path: Path) -> None:
    OriginalFile(path, "readings").ticks(span(8 * HOUR, NOW + 1))


def several(path: Path) -> None:
    file = OriginalFile(path, "several")
    for index in (0, 1):
        file.ticks(span(1200, NOW + 1), index)
        file.seen(7 + index, "train", span(1200, NOW + 1), index=index)
    file.seen(7, "train", span(1200, NOW + 1), index=1)


def counted_before_the_snapshots(path: Path) -> None:
    file = OriginalFile(path)
    file.ticks(span(1200))
    file.seen(7, "train", span(1200))
    file.execute("UPDATE gpu_processes SET first_seen = first_seen - 5000, sample_count = sample_count + 900")
    file.counted(8, "gone", NOW - 2 * DAY, NOW - DAY, 1000, 300.0, 400.0)


def a_pid_that_was_reused(path: Path) -> None:
    file = OriginalFile(path)
    file.ticks(span(4000))
    for number, name in enumerate(("one", "two", "one")):
        file.seen(7, name, span(400, NOW - 2800 + 1000 * number))


def years_and_the_future(path: Path) -> None:
    file = OriginalFile(path)
    for back in (3000 * DAY, 400 * DAY, 40 * DAY, 2 * DAY):
        file.ticks(span(HOUR, NOW - back))
        file.seen(7, "old", span(HOUR, NOW - back))
    file.ticks(range(NOW - 100, NOW + HOUR, 4))


def nothing_possible(path: Path) -> None:
    file = OriginalFile(path)
    file.ticks(span(400), power=-5.0, memory=1e12)
    file.ticks(["noon", 3.5, -8], power=1.0)  # type: ignore[list-item]
    file.seen(-7, "no", span(40))
    file.seen(2**40, "no", span(40))


def damaged(path: Path) -> None:
    file = OriginalFile(path)
    file.ticks(span(40_000))
    # It can be counted by the index alone; the second half of the rows cannot be read.
    file.execute("CREATE INDEX at ON gpu_metrics (timestamp_epoch)")
    file.connection.close()
    content = bytearray(path.read_bytes())
    somewhere = len(content) // 3 // 4096 * 4096
    content[somewhere : somewhere + 4096] = b"\xff" * 4096
    path.write_bytes(content)


def empty_tables(path: Path) -> None:
    OriginalFile(path)


def in_wal_mode(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    plain(path)


FILES: list[Callable[[Path], None]] = [
    *(plain, readings_only, several, counted_before_the_snapshots, a_pid_that_was_reused, years_and_the_future),
    *(nothing_possible, damaged, empty_tables, in_wal_mode),
]


@contextmanager
def nothing(settings: Settings, url: str, fake: FakeNvml) -> Iterator[None]:
    """No database yet: the driver says which GPUs there are."""
    for gpu in GPUS:
        fake.add_gpu(uuid=gpu.uuid, name=gpu.name)
    with loaded(fake):
        yield


@contextmanager
def another_host(settings: Settings, url: str, fake: FakeNvml) -> Iterator[None]:
    """A database in which only another machine has recorded, at the same time."""
    made = database.open_for_writing(url)
    own = Writer(made, "there", "nvml", 4)
    gpus = tuple(GpuInfo(index, f"GPU-there-{index}", "Board") for index in range(2))
    for at in range(NOW - 600, NOW, 4):
        readings = tuple(GpuReading(gpu.uuid, {"temperature": 40.0}) for gpu in gpus)
        own.write(Snapshot(at, HostInfo("there"), gpus, readings), {})
    made.dispose()
    with nothing(settings, url, fake):
        yield


@contextmanager
def recorded(settings: Settings, url: str, fake: FakeNvml) -> Iterator[None]:
    """gpumon has recorded a part of the time, and does not now."""
    made = database.open_for_writing(url)
    record(made, range(NOW - 500, NOW - 300, 4), GPUS)
    made.dispose()
    yield


@contextmanager
def at_work(settings: Settings, url: str, fake: FakeNvml) -> Iterator[None]:
    """A recorder is running, and its newest tick is a moment old."""
    made = database.open_for_writing(url)
    record(made, range(NOW - 500, NOW - 60, 4), GPUS)
    made.dispose()
    lock = recorder_lock(url, "here")
    assert lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def imported(settings: Settings, url: str, fake: FakeNvml) -> Iterator[None]:
    """A part of the same was imported before."""
    made = database.open_for_writing(url)
    record(made, range(NOW, NOW + 1), GPUS)
    made.dispose()
    before = OriginalFile(settings.data_dir / "before.db")
    before.ticks(span(600, NOW - 400))
    before.seen(7, "train", span(600, NOW - 400))
    importer.run(settings, before.path, ["0"], now=NOW)
    yield


@pytest.mark.parametrize(
    ("make", "database_url"),
    [*((make, "sqlite") for make in FILES), (plain, "postgresql"), (several, "postgresql")],
    indirect=["database_url"],
)
@pytest.mark.parametrize("state", [nothing, another_host, recorded, at_work, imported], ids=lambda s: s.__name__)
def test_a_dry_run_counts_what_the_import_then_takes(
    state: Callable[..., ExitStack],
    make: Callable[[Path], None],
    database_url: str,
    tmp_path: Path,
    fake: FakeNvml,
) -> None:
    settings = load(database_url=database_url, data_dir=tmp_path, host_name="here", interval=4, source="nvml")
    path = tmp_path / "gpu_metrics.db"
    make(path)
    given = ["0=0", "1=1"] if make is several else [] if make is empty_tables else ["0"]
    with state(settings, database_url, fake):
        dry = importer.run(settings, path, given, dry=True, now=NOW)
        done = importer.run(settings, path, given, now=NOW)
    assert (dry.taken, dry.left_out, dry.problem) == (done.taken, done.left_out, done.problem)
    # And what is said to be taken is there.
    if done.taken:
        engine = database.open_for_reading(database_url)
        before = 0
        if state is imported:
            [(before,)] = ask(engine, "SELECT 150 FROM imports LIMIT 1")
        assert ask(engine, "SELECT coalesce(sum(ticks), 0) FROM imports") == [(done.taken["ticks"] + before,)]
        engine.dispose()
