"""Files as the original program leaves them, in its forms: one GPU, several, and readings only."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path

INTERVAL_S = 4
METRICS = "timestamp TEXT NOT NULL, timestamp_epoch INTEGER NOT NULL, temperature REAL NOT NULL, utilization REAL "
METRICS += "NOT NULL, memory REAL NOT NULL, power REAL NOT NULL"
PROCESSES = "process_name TEXT NOT NULL, first_seen INTEGER NOT NULL, last_seen INTEGER NOT NULL, max_memory REAL "
PROCESSES += "NOT NULL, avg_memory REAL NOT NULL, sample_count INTEGER NOT NULL DEFAULT 1"
SNAPSHOTS = (
    "timestamp_epoch INTEGER NOT NULL, pid INTEGER NOT NULL, process_name TEXT NOT NULL, memory_usage REAL "
)
SNAPSHOTS += "NOT NULL"
ID = "id INTEGER PRIMARY KEY AUTOINCREMENT"
INDEX = "gpu_index INTEGER NOT NULL DEFAULT 0"
# Time, index, PID, name, MiB.
Snapshot = tuple[object, object, object, object, object]


class OriginalFile:
    """A file that is being written as the original writes it."""

    def __init__(self, path: Path, form: str = "one") -> None:
        self.path = path
        self.several = form == "several"
        index = f"{INDEX}, " if self.several else ""
        unique = "pid INTEGER NOT NULL, " if self.several else "pid INTEGER NOT NULL UNIQUE, "
        self.connection = sqlite3.connect(path)
        # Lasting nothing makes it fast.
        self.connection.execute("PRAGMA synchronous = OFF")
        tables = [f"CREATE TABLE gpu_metrics ({ID}, {index}{METRICS})"]
        if form != "readings":
            last = ", UNIQUE (gpu_index, pid)" if self.several else ""
            tables += [
                f"CREATE TABLE gpu_processes ({ID}, {index}{unique}{PROCESSES}{last})",
                f"CREATE TABLE process_snapshots ({ID}, {index}{SNAPSHOTS})",
            ]
        with self.connection:
            for statement in tables:
                self.connection.execute(statement)

    def ticks(self, times: Iterable[int], index: int = 0, **values: object) -> None:
        """Readings at those times."""
        given = {"temperature": 60.0, "utilization": 50.0, "memory": 1000.0, "power": 100.0} | values
        columns = (["gpu_index"] if self.several else []) + ["timestamp", "timestamp_epoch", *given]
        first = [index] if self.several else []
        with self.connection:
            self.connection.executemany(
                f"INSERT INTO gpu_metrics ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})",
                [(*first, "11-24 10:00:00", at, *given.values()) for at in times],
            )

    def seen(self, pid: int, name: str, times: Iterable[int], memory: float = 500.0, index: int = 0) -> None:
        """A process at those times, as the original records it: one row per PID, even where processes share it."""
        names = ["gpu_index"] if self.several else []
        first = [index] if self.several else []
        key = "gpu_index, pid" if self.several else "pid"
        with self.connection:
            for at in times:
                self.connection.execute(
                    f"INSERT INTO process_snapshots ({', '.join([*names, 'timestamp_epoch'])}, pid, process_name, "
                    f"memory_usage) VALUES ({', '.join('?' * (len(names) + 4))})",
                    (*first, at, pid, name, memory),
                )
                self.connection.execute(
                    f"INSERT INTO gpu_processes ({', '.join([*names, 'pid'])}, process_name, first_seen, "
                    "last_seen, max_memory, avg_memory, sample_count) "
                    f"VALUES ({', '.join('?' * (len(names) + 7))}) "
                    f"ON CONFLICT({key}) DO UPDATE SET last_seen = excluded.last_seen, "
                    "max_memory = max(max_memory, excluded.max_memory), avg_memory = (avg_memory * sample_count + "
                    "excluded.avg_memory) / (sample_count + 1), sample_count = sample_count + 1",
                    (*first, pid, name, at, at, memory, memory, 1),
                )

    def counted(self, pid: int, name: str, first: int, last: int, count: int, mean: float, most: float) -> None:
        """A row of gpu_processes alone."""
        with self.connection:
            self.connection.execute(
                "INSERT INTO gpu_processes (pid, process_name, first_seen, last_seen, max_memory, avg_memory, "
                "sample_count) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (pid, name, first, last, most, mean, count),
            )

    def execute(self, statement: str, *values: object) -> None:
        """Anything else."""
        with self.connection:
            self.connection.execute(statement, values)
