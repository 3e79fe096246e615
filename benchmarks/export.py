"""History as files: seconds and resident memory of 100,000 processes, and of 1,000,000 process snapshots.

    .venv/bin/python benchmarks/export.py [--rows 100000] [--snapshots 1000000]

Of the processes every figure comes from a process of its own that has read one row before, so that imports do not
count. The bytes are thrown away as they come, as a server hands them on. Beside them stands one bare SELECT of
the same rows with all that belongs to them, fetched by sqlite3 and thrown away row by row. Resident growth is the
peak (VmHWM) during the export less what was resident before it, in MB of 10^6 bytes.

The snapshots are written by the command line, `python -m gpumon_core export`, into a file: wall clock and peak
resident memory (wait4's ru_maxrss) of the whole program, its start included. Beside them stands a Python that
fetches the bare rows and throws them away.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sqlalchemy as sa

from gpumon_core.store import database
from gpumon_core.store.bulk import Bulk, Row
from gpumon_core.store.schema import (
    PROGRAM_COLUMNS,
    gpu_processes,
    gpus,
    hosts,
    process_gpus,
    process_snapshots,
    programs,
)

NOW = 1_775_000_000
PROGRAMS = 2000
GPUS = 8
RUNS = 3
BERLIN = ZoneInfo("Europe/Berlin")
BARE = (
    "SELECT p.*, h.name, u.*, g.* FROM gpu_processes p JOIN hosts h ON h.id = p.host_id "
    "JOIN process_gpus u ON u.process_id = p.id LEFT JOIN programs g ON g.id = p.program_id "
    "ORDER BY p.first_seen DESC, p.id DESC"
)


BARE_SNAPSHOTS = """
import sqlite3, sys
for _ in sqlite3.connect(sys.argv[1]).execute("SELECT * FROM process_snapshots"):
    pass
"""
# What 1,000,000 snapshots may take: seconds, and MB resident.
LIMITS_S = {"csv": 30.0, "parquet": 15.0}
LIMIT_MB = 250.0
# So many of them belong to one tick.
TOGETHER = 64


def make(url: str, rows: int, snapshots: int) -> None:
    """A ledger of so many processes that have ended, every tenth of them on two GPUs, and what some did."""
    engine = database.open_for_writing(url)

    def fill(table: sa.Table, names: tuple[str, ...], values: Iterable[Row]) -> None:
        Bulk(engine.dialect, table.insert(), names).run(connection, list(values))

    with engine.begin() as connection:
        first = NOW - 30 * rows
        seen = ("first_seen", "last_seen")
        fill(hosts, ("id", "name", "source", "interval_s", *seen), [(1, "bench", "demo", 4, first, NOW)])
        fill(
            gpus,
            ("id", "host_id", "uuid", "gpu_index", "state", *seen),
            ((number + 1, 1, f"GPU-{number}", number, "ok", first, NOW) for number in range(GPUS)),
        )
        fill(
            programs,
            ("id", "digest", *PROGRAM_COLUMNS),
            (
                (number + 1, f"{number}", *(f"{name} of program {number}" for name in PROGRAM_COLUMNS))
                for number in range(PROGRAMS)
            ),
        )
        counted = ("max_memory", "avg_memory", "sample_count", "seconds")
        fill(
            gpu_processes,
            (
                *("id", "host_id", "pid", "start_key", "start_time", "name", "username", "program_id"),
                *seen,
                *counted,
            ),
            (
                (
                    *(number, 1, 1000 + number, f"b:{number}", first + 30 * number - 0.63),
                    *(f"worker-{number % 977}", f"user{number % 53}", 1 + number % PROGRAMS),
                    *(first + 30 * number, first + 30 * number + 900, 1000 + number % 7000, 900.5, 225, 900.0),
                )
                for number in range(1, rows + 1)
            ),
        )
        fill(
            process_gpus,
            (
                *("process_id", "gpu_id", "kind"),
                *seen,
                *counted,
                "busy_s",
                "energy_j",
                "sm_percent_s",
                "sm_told_s",
            ),
            (
                (
                    *(number, 1 + (number + more) % GPUS, "C"),
                    *(first + 30 * number, first + 30 * number + 900, 1000 + number % 7000, 900.5, 225, 900.0),
                    *(412.5, 91234.5, 37125.0, 900.0),
                )
                for number in range(1, rows + 1)
                for more in range(1 + (number % 10 == 0))
            ),
        )
        for begin in range(0, snapshots, 100_000):
            fill(
                process_snapshots,
                tuple(column.name for column in process_snapshots.columns),
                (
                    (
                        *(NOW + 4 * (number // TOGETHER), 1 + number % TOGETHER + number // 50_000 * TOGETHER),
                        *(1 + number % GPUS, 1000 + number % 7000, number % 101, number % 53, 0, None, 1),
                    )
                    for number in range(begin, min(begin + 100_000, snapshots))
                ),
            )
    engine.dispose()
    with sqlite3.connect(database.file_of(url) or "") as file:
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def status_mb(name: str) -> float:
    """A size in this process's /proc/self/status, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"no {name}")


def bare(url: str, limit: int) -> int:
    """The same rows as the database has them; no file is made of them."""
    with sqlite3.connect(database.file_of(url) or "") as connection:
        for _ in connection.execute(f"{BARE} LIMIT {limit}"):
            pass
    return 0


def as_csv(url: str, limit: int) -> int:
    """The ledger as CSV; how many bytes it has."""
    from gpumon_core.export.processes import LEDGER

    return sum(len(chunk) for chunk in LEDGER.write("csv", _pages(url, limit), BERLIN))


def as_parquet(url: str, limit: int) -> int:
    """The ledger as Parquet; how many bytes it has."""
    from gpumon_core.export.processes import LEDGER

    return sum(len(chunk) for chunk in LEDGER.write("parquet", _pages(url, limit), BERLIN))


def _pages(url: str, limit: int) -> Iterator[Any]:
    from gpumon_core.store.queries import processes

    engine = database.open_for_reading(url)
    return iter([processes.page(engine, size=1)]) if limit == 1 else processes.pages(engine)


def measured(action: Callable[[str, int], int], url: str) -> tuple[float, float, int]:
    """Seconds, resident growth in MB and bytes of one export, in this process."""
    action(url, 1)
    before = status_mb("VmRSS")
    # The peak so far is forgotten: proc(5), clear_refs.
    Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    size = action(url, -1)
    took = time.perf_counter() - began
    return took, status_mb("VmHWM") - before, size


def program(arguments: list[str], folder: str) -> tuple[float, float]:
    """Seconds and peak resident MB of `python arguments`, from its start to its end."""
    environ = {**os.environ, "GPUMON_DATA_DIR": folder, "GPUMON_LOG_LEVEL": "ERROR"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    took = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{arguments} ended with {process.returncode}")
    return took, used.ru_maxrss * 1024 / 1e6


def snapshots(folder: str, rows: int) -> None:
    """Measure the command line and print."""
    print(f"{rows:,} process snapshots by the command line, medians of {RUNS}")
    export = ["-m", "gpumon_core", "export", "--table", "process_snapshots", "--force"]
    ways = {"bare": ["-c", BARE_SNAPSHOTS, str(Path(folder) / "gpumon.db")]}
    ways |= {
        chosen: [*export, "--out", str(Path(folder) / f"out.{chosen}")] for chosen in ("csv", "json", "parquet")
    }
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(RUNS):
        for what, arguments in ways.items():
            found.setdefault(what, []).append(program(arguments, folder))
    base = statistics.median(seconds for seconds, _ in found["bare"])
    for what, runs in found.items():
        seconds, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        line = f"  {what:<12} {seconds:6.2f} s   {seconds / base:4.1f} times the bare SELECT   peak {peak:6.1f} MB"
        if what in LIMITS_S and rows <= 1_000_000:
            fits = seconds <= LIMITS_S[what] and peak <= LIMIT_MB
            line += f"   {'within' if fits else 'ABOVE'} {LIMITS_S[what]:.0f} s and {LIMIT_MB:.0f} MB"
        print(line)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--snapshots", type=int, default=1_000_000)
    options = parser.parse_args()
    for name in list(os.environ):
        if name.startswith("GPUMON_"):
            del os.environ[name]
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'gpumon.db'}"
        make(url, options.rows, options.snapshots)
        print(f"{options.rows:,} processes, medians of {RUNS}")
        found: dict[str, list[tuple[float, float, int]]] = {}
        # In turn, so that what else the machine does falls on all of them.
        for _ in range(RUNS):
            for what, action in (("bare SELECT", bare), ("CSV", as_csv), ("Parquet", as_parquet)):
                with multiprocessing.get_context("spawn").Pool(1) as alone:
                    found.setdefault(what, []).append(alone.apply(measured, (action, url)))
        base = statistics.median(seconds for seconds, _, _ in found["bare SELECT"])
        for what, runs in found.items():
            seconds, growth, size = (statistics.median(column) for column in zip(*runs, strict=True))
            print(
                f"  {what:<12} {seconds:6.2f} s   {seconds / base:4.1f} times the bare SELECT   "
                f"peak {growth:+6.1f} MB" + (f"   {size / 1e6:6.1f} MB of file" if size else "")
            )
        snapshots(folder, options.snapshots)


if __name__ == "__main__":
    main()
