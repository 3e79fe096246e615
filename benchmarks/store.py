"""The history on a full database: how fast it is read, how large it is, and whether retention holds a tick up.

    .venv/bin/python benchmarks/store.py [--days 365] [--keep FOLDER]

Fills a database with simulated GPUs (a year takes some minutes), or uses the one that an earlier run left in
FOLDER. Reading is timed as pages do it, through store.frames, a connection made for each; figures are medians.
Beside them is a SELECT of as many bare numbers through sqlite3 and pandas, measured in the same run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pandas as pd
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from gpumon_core import settings
from gpumon_core.simulation import past
from gpumon_core.simulation.source import SimulatedSource
from gpumon_core.store import database, retention
from gpumon_core.store.queries import frames, processes
from gpumon_core.store.queries.history import metrics_history
from gpumon_core.store.queries.process_filter import ProcessFilter
from gpumon_core.store.schema import gpu_processes, process_gpus
from gpumon_core.store.writer import Writer

DAY = 86400
METRICS = ("temperature", "utilization", "memory", "power")
RANGES = {
    "15 minutes": 900,
    "1 hour": 3600,
    "6 hours": 6 * 3600,
    "24 hours": DAY,
    "3 days": 3 * DAY,
    "30 days": 30 * DAY,
    "90 days": 90 * DAY,
    "1 year": 365 * DAY,
}
HISTORY_MS, LIST_MS, DELAY_MS = 80.0, 30.0, 250.0


def milliseconds(action: Callable[[], object], times: int = 9) -> float:
    """Median wall time of a call, after one that warms the file's cache."""
    action()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        taken.append(1000 * (time.perf_counter() - began))
    return statistics.median(taken)


def verdict(figure: float, limit: float) -> str:
    """Whether a figure is within its limit."""
    return f"{'within' if figure <= limit else 'ABOVE'} {limit:g}"


def make(folder: Path, days: float, gpus: int, processes: int) -> str:
    """A database filled as `python -m gpumon_core fill` does it, but of whole GPUs alone; its URL."""
    url = f"sqlite:///{folder / f'{gpus}x{processes}x{days:g}.db'}"
    engine = database.open_for_writing(url)
    chosen = settings.load(source="demo", data_dir=folder, host_name="bench", interval=4)
    if Writer(engine, "bench", "demo", 4).is_new():
        began = time.monotonic()
        ticks = past.fill(engine, chosen, days, gpus, processes, lambda *_: None, mig=False)
        took = time.monotonic() - began
        print(
            f"filled {days:g} days of {gpus} GPUs ({ticks:,} ticks) at {days * 1440 / took:,.0f} hours per minute"
        )
    engine.dispose()
    with sqlite3.connect(database.file_of(url) or "") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return url


def megabytes(url: str) -> float:
    """Size of the file, in MB of 10^6 bytes."""
    path = database.file_of(url)
    return 0.0 if path is None else path.stat().st_size / 1e6


def bare(url: str, rows: int) -> None:
    """As many rows of numbers as a chart of 8 GPUs has, with nothing asked of them."""
    with sqlite3.connect(database.file_of(url) or "") as connection:
        pd.read_sql_query(
            "SELECT gpu_id, timestamp_epoch, temperature, utilization, memory, power, sm_clock, memory_clock, "
            "fan_speed, graphics_clock, video_clock, memory_utilization, energy, power_max FROM gpu_metrics "
            f"LIMIT {rows}",
            connection,
        )


def reading(url: str) -> None:
    """Every reading function on the full database."""
    engine = database.open_for_reading(url)
    with engine.connect() as connection:
        now = int(connection.execute(sa.text("SELECT max(last_seen) FROM hosts")).scalar() or 0)
    gpu_ids = frames.gpu_table(engine)["id"].tolist()[:8]
    base = milliseconds(lambda: bare(url, 8000))
    print(f"8,000 bare rows of 14 numbers         {base:7.1f} ms")
    for name, span in RANGES.items():
        found = metrics_history(engine, gpu_ids, METRICS, now - span, now, 1000)
        points = len(found) / max(1, found["gpu_id"].nunique())
        took = milliseconds(lambda span=span: metrics_history(engine, gpu_ids, METRICS, now - span, now, 1000))
        print(
            f"history of {name:<12} {points:5.0f} points {took:10.1f} ms   {verdict(took, HISTORY_MS)} ms; "
            f"{took / base:.1f} times the bare rows"
        )
    took = milliseconds(lambda: frames.active_processes(engine))
    count = len(frames.active_processes(engine))
    print(f"active processes ({count})  {took:22.1f} ms   {verdict(took, LIST_MS)} ms")
    for what, found in (
        ("by user", lambda: processes.process_history(engine, ProcessFilter(users=("needle",)))),
        ("by name", lambda: processes.process_history(engine, ProcessFilter(text="needle.py"))),
    ):
        took = milliseconds(found)
        chosen = f"{len(found())} of {ledger_size(engine):,} processes {what}"
        print(f"{chosen:<37} {took:7.1f} ms   {verdict(took, LIST_MS)} ms")
    engine.dispose()


def ledger_size(engine: Engine) -> int:
    """How many processes the ledger has."""
    with engine.connect() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(gpu_processes)).scalar() or 0)


def crowd(url: str, whole: int = 100_000, needles: int = 100) -> None:
    """Add processes until there are so many; a few of them are searched for."""
    engine = database.open_for_writing(url)
    with engine.begin() as connection:
        have = int(connection.execute(sa.select(sa.func.count()).select_from(gpu_processes)).scalar() or 0)
        first = int(connection.execute(sa.select(sa.func.max(gpu_processes.c.id))).scalar() or 0) + 1
        last = int(connection.execute(sa.select(sa.func.max(gpu_processes.c.last_seen))).scalar() or 0)
        rows = []
        # At least so many more that all needles are among them.
        for number in range(first, first + max(needles, whole - have)):
            found = number - first < needles
            seen = last - 200 * DAY + number * 150
            rows.append(
                {
                    "id": number,
                    "host_id": 1,
                    "pid": 100_000 + number,
                    "start_key": f"bench:{number}",
                    "name": "needle.py" if found else f"worker-{number % 977}",
                    "username": "needle" if found else f"user{number % 53}",
                    "first_seen": seen,
                    "last_seen": seen + 90,
                    "max_memory": 1000,
                    "avg_memory": 900.0,
                    "sample_count": 22,
                }
            )
        if rows:
            connection.execute(gpu_processes.insert(), rows)
            places = [
                {
                    "process_id": row["id"],
                    "gpu_id": 1 + row["id"] % 8,
                    "kind": "C",
                    "active": 0,
                    **{
                        key: row[key]
                        for key in ("first_seen", "last_seen", "max_memory", "avg_memory", "sample_count")
                    },
                }
                for row in rows
            ]
            connection.execute(process_gpus.insert(), places)
    engine.dispose()


def forgetting(url: str, gpus: int, processes: int) -> None:
    """Retention of a third of the database while ticks are written; the longest a tick waited."""
    engine = database.open_for_writing(url)
    with engine.connect() as connection:
        now = int(connection.execute(sa.text("SELECT max(last_seen) FROM hosts")).scalar() or 0)
    source = SimulatedSource(gpus=gpus, host="bench", processes=processes, mig=False)
    writer = Writer(engine, "bench", "demo", 4)
    times: list[float] = []

    def tick(number: int) -> None:
        snapshot = source.snapshot_at(now + 4 * (number + 1))
        began = time.perf_counter()
        writer.write(snapshot, {})
        times.append(1000 * (time.perf_counter() - began))

    for number in range(50):
        tick(number)
    alone = max(times[10:])
    days = retention.RetentionDays(raw_days=2, minute_days=20, hour_days=250)
    deleted: list[int] = []
    worker = threading.Thread(target=lambda: deleted.append(retention.forget(engine, days, now)))
    began = time.monotonic()
    worker.start()
    times.clear()
    while worker.is_alive():
        tick(50 + len(times))
        time.sleep(0.05)
    worker.join()
    print(
        f"retention of {deleted[0]:,} rows in {time.monotonic() - began:.0f} s, {len(times)} ticks meanwhile: the "
        f"longest took {max(times):.0f} ms ({alone:.0f} ms before)   "
        f"{verdict(max(times) - alone, DELAY_MS)} ms of delay"
    )
    engine.dispose()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--days", type=float, default=365)
    parser.add_argument("--keep", type=Path, help="folder for the databases, used again by the next run")
    options = parser.parse_args()
    for name in list(os.environ):
        if name.startswith("GPUMON_"):
            del os.environ[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        small = make(folder, 3, 1, 4)
        print(f"1 GPU, 4 processes, 3 days {megabytes(small):18.1f} MB   {verdict(megabytes(small), 15)} MB")
        full = make(folder, options.days, 8, 64)
        size = megabytes(full)
        print(f"8 GPUs, 64 processes, {options.days:g} days {size:15.1f} MB   {verdict(size, 250)} MB")
        with tempfile.TemporaryDirectory() as spare:
            # What follows writes: the database that was made stays as it is.
            copy = f"sqlite:///{shutil.copy(database.file_of(full) or '', spare)}"
            crowd(copy)
            reading(copy)
            forgetting(copy, 8, 64)


if __name__ == "__main__":
    main()
