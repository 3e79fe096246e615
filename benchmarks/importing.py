"""The original's history taken in: seconds and resident memory, beside a bare copy of the same rows.

    .venv/bin/python benchmarks/importing.py [--days 3] [--processes 20] [--jitter] [--recorder] [--postgresql]

A file as the original leaves it after --days days at 4 seconds is made (three days of 20 processes: 64,800 ticks
and 1.3 million process snapshots) and imported into a new database by a process of its own, with rollups; then
once more, which must add nothing. The bare copy is SQLite's own INSERT ... SELECT of the three tables with their
indexes into another file. With --jitter every process holds a little more or less memory at every tick. Resident
memory is the peak (VmHWM) of the process, in MB of 10^6 bytes. With --recorder another one commits a tick every
50 ms meanwhile, and the time that these take is told.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "tests"))

from gpumon_core.legacy_import import importer
from gpumon_core.settings import load
from gpumon_core.store import database
from gpumon_core.store.lock import recorder_lock
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuInfo, GpuReading, HostInfo, Snapshot

INTERVAL_S = 4
GPU = GpuInfo(0, "GPU-bench", "NVIDIA RTX A6000", 49140)
SCHEMA = """
CREATE TABLE gpu_metrics (id INTEGER PRIMARY KEY AUTOINCREMENT, timestamp TEXT NOT NULL,
    timestamp_epoch INTEGER NOT NULL, temperature REAL NOT NULL, utilization REAL NOT NULL, memory REAL NOT NULL,
    power REAL NOT NULL);
CREATE TABLE gpu_processes (id INTEGER PRIMARY KEY AUTOINCREMENT, pid INTEGER NOT NULL UNIQUE,
    process_name TEXT NOT NULL, first_seen INTEGER NOT NULL, last_seen INTEGER NOT NULL, max_memory REAL NOT NULL,
    avg_memory REAL NOT NULL, sample_count INTEGER NOT NULL DEFAULT 1);
CREATE TABLE process_snapshots (id INTEGER PRIMARY KEY AUTOINCREMENT, timestamp_epoch INTEGER NOT NULL,
    pid INTEGER NOT NULL, process_name TEXT NOT NULL, memory_usage REAL NOT NULL);
"""
INDEXES = """
CREATE INDEX idx_gpu_metrics_timestamp_epoch ON gpu_metrics(timestamp_epoch);
CREATE INDEX idx_gpu_processes_pid ON gpu_processes(pid);
CREATE INDEX idx_gpu_processes_last_seen ON gpu_processes(last_seen);
CREATE INDEX idx_process_snapshots_timestamp ON process_snapshots(timestamp_epoch);
CREATE INDEX idx_process_snapshots_pid ON process_snapshots(pid);
"""


def make(path: Path, now: int, days: float, processes: int, jitter: bool) -> tuple[int, int]:
    """The file; how many ticks and process snapshots it holds."""
    chance = random.Random(7)
    times = range(now - int(days * 86400), now, INTERVAL_S)
    names = [(1000 + number, f"/usr/bin/worker-{number % 7}", 500.0 + 100 * number) for number in range(processes)]

    def seen() -> Iterator[tuple[int, int, str, float]]:
        for at in times:
            for pid, name, memory in names:
                more = chance.randrange(20) if jitter else at % 86400 // 7200
                yield at + 1, pid, name, memory + more

    connection = sqlite3.connect(path)
    with connection:
        connection.executescript(SCHEMA + INDEXES)
        connection.executemany(
            "INSERT INTO gpu_metrics VALUES (NULL, ?, ?, ?, ?, ?, ?)",
            (
                (
                    *(time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at)), at, 40.0 + at % 30, float(at % 101)),
                    *(20000.0 + at % 1000, 80.0 + at % 200),
                )
                for at in times
            ),
        )
        connection.executemany("INSERT INTO process_snapshots VALUES (NULL, ?, ?, ?, ?)", seen())
        connection.execute(
            "INSERT INTO gpu_processes SELECT NULL, pid, process_name, min(timestamp_epoch), "
            "max(timestamp_epoch), max(memory_usage), avg(memory_usage), count(*) "
            "FROM process_snapshots GROUP BY pid"
        )
    connection.close()
    return len(times), len(times) * processes


def copy(source: Path, target: Path) -> float:
    """Seconds of SQLite's own copy of the same rows, indexes and all."""
    connection = sqlite3.connect(target, isolation_level=None)
    connection.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;" + SCHEMA + INDEXES)
    connection.execute("ATTACH ? AS original", (str(source),))
    began = time.monotonic()
    connection.execute("BEGIN")
    for table in ("gpu_metrics", "gpu_processes", "process_snapshots"):
        connection.execute(f"INSERT INTO {table} SELECT * FROM original.{table}")
    connection.execute("COMMIT")
    took = time.monotonic() - began
    connection.close()
    return took


def take(
    source: str, url: str, now: int, answers: multiprocessing.Queue[tuple[float, float, dict[str, int]]]
) -> None:
    """Import, in a process of its own."""
    settings = load(database_url=url, host_name="bench", data_dir=Path(source).parent)
    began = time.monotonic()
    report = importer.run(settings, Path(source), now=now)
    took = time.monotonic() - began
    peak = next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    )
    for sentence in report.left_out:
        print(f"  left out: {sentence}")
    answers.put((took, peak * 1024 / 1e6, report.taken))


def new_database(url: str, now: int) -> None:
    """gpumon's own, with one tick of one GPU."""
    engine = database.open_for_writing(url)
    Writer(engine, "bench", "nvml", INTERVAL_S).write(
        Snapshot(now + 60, HostInfo("bench"), (GPU,), (GpuReading(GPU.uuid, {"utilization": 1.0}),)), {}
    )
    engine.dispose()


def record_beside(
    url: str, now: int, answers: multiprocessing.Queue[tuple[float, float, dict[str, int]]]
) -> list[float]:
    """Record until there is an answer; the milliseconds of each commit."""
    lock = recorder_lock(url, "bench")
    lock.acquire()
    engine = database.open_for_writing(url)
    writer, waits = Writer(engine, "bench", "nvml", 1), []
    while answers.empty():
        began = time.monotonic()
        # Times that no second import meets.
        at = now + 1000 + len(waits) + 1000 * int(began)
        writer.write(Snapshot(at, HostInfo("bench"), (GPU,), (GpuReading(GPU.uuid, {"utilization": 1.0}),)), {})
        waits.append(1000 * (time.monotonic() - began))
        time.sleep(0.05)
    engine.dispose()
    lock.release()
    return waits


def measure(folder: Path, url: str, arguments: argparse.Namespace) -> None:
    """Make, copy, import twice, and say what it took."""
    now = int(time.time())
    source = folder / "gpu_metrics.db"
    ticks, snapshots = make(source, now, arguments.days, arguments.processes, arguments.jitter)
    print(f"{ticks:,} ticks, {snapshots:,} process snapshots, {source.stat().st_size / 1e6:.0f} MB")
    bare = copy(source, folder / "copy.db")
    print(f"bare copy      {bare:6.2f} s")
    new_database(url, now)
    context = multiprocessing.get_context("spawn")
    for which in ("import", "once more"):
        answers: multiprocessing.Queue[tuple[float, float, dict[str, int]]] = context.Queue()
        process = context.Process(target=take, args=(str(source), url, now, answers))
        process.start()
        waits = record_beside(url, now, answers) if arguments.recorder else []
        took, peak, taken = answers.get()
        process.join()
        new = ", ".join(f"{count:,} {name}" for name, count in taken.items())
        if waits:
            print(
                f"{len(waits)} ticks beside it: median {statistics.median(waits):.1f} ms, "
                f"longest {max(waits):.0f} ms"
            )
        print(f"{which:<14} {took:6.2f} s  {took / bare:5.2f} x the copy  peak {peak:.0f} MB  ({new})")
    size = database.size_bytes(database.open_for_reading(url)) or 0
    print(f"gpumon's database: {size / 1e6:.1f} MB")


def main() -> None:
    """Measure on SQLite, or on a PostgreSQL server of our own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=float, default=3.0)
    parser.add_argument("--processes", type=int, default=20)
    parser.add_argument("--jitter", action="store_true")
    parser.add_argument("--recorder", action="store_true")
    parser.add_argument("--postgresql", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not arguments.postgresql:
            measure(folder, f"sqlite:///{folder / 'gpumon.db'}", arguments)
            return
        import postgres

        found = postgres.binaries()
        if found is None:
            raise SystemExit("no PostgreSQL server is installed")
        with postgres.running(found) as server, server.database() as url:
            measure(folder, url, arguments)


if __name__ == "__main__":
    main()
