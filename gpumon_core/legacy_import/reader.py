"""Reads the SQLite file of the original program (bigsk1/gpu-monitor), and never writes to it.

Its tables, from its monitor_gpu.sh: gpu_metrics (timestamp_epoch in UTC seconds, temperature °C, utilization %,
memory MiB, power W) is the only table of bigsk1's own versions. Versions that others made from it add
gpu_processes (one row per PID, even where several processes had it one after the other) and process_snapshots (one
row per process and tick). Files of several GPUs have a gpu_index in each table. Nothing in a file is trusted:
SQLite stores any type in any column.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpumon_core.legacy_import.import_records import READINGS, OriginalReading
from gpumon_core.legacy_import.sqlite_file import SqliteFile, SqliteFileError
from gpumon_core.safety import text
from gpumon_core.store.accounting import longest_step

METRICS, PROCESSES, SNAPSHOTS = "gpu_metrics", "gpu_processes", "process_snapshots"
INDEX = "gpu_index"
COLUMNS = {
    METRICS: ("timestamp_epoch", "temperature", "utilization", "memory", "power"),
    PROCESSES: ("pid", "process_name", "first_seen", "last_seen", "max_memory", "avg_memory", "sample_count"),
    SNAPSHOTS: ("timestamp_epoch", "pid", "process_name", "memory_usage"),
}
# The possible range of each value; anything else was never measured. The original writes N/A as a power of 0 W.
POSSIBLE = {
    "temperature": (-50.0, 200.0),
    "utilization": (0.0, 100.0),
    "memory": (0.0, 2.0**24),
    "power": (0.0, 20_000.0),
}
LARGEST_INDEX = 1023
LARGEST_PID = 2**31 - 1
NAME_LENGTH = 512
# The most rows in memory at a time, and the most rows that one second may have.
PAGE_ROWS = 20_000
USUAL_INTERVAL_S = 4.0
NAME_IT = "Name the original's gpu_metrics.db."

# As bytes, so that a text that is not UTF-8 is no error; a long text ends here, and any text at a NUL.
_NAME = f"CASE typeof(process_name) WHEN 'text' THEN CAST(substr(process_name, 1, {NAME_LENGTH}) AS BLOB) END"

# A process on a GPU at a tick: gpu_index, PID, name, MiB.
OriginalProcess = tuple[int, int, str, int | None]


@dataclass(slots=True)
class OriginalTick:
    """One tick of the original: the readings (in the order of READINGS) by gpu_index, and the processes."""

    at: int
    readings: dict[int, OriginalReading] = field(default_factory=dict)
    processes: list[OriginalProcess] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ProcessRow:
    """A row of the original's gpu_processes. Where its process has snapshots too, the row is for the time
    before them, and `since` is the time and the name of the first snapshot."""

    index: int
    pid: int
    name: str
    first_seen: int
    last_seen: int
    max_memory: int | None
    avg_memory: float | None
    sample_count: int
    since: tuple[int, str] | None = None


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file holds: the rows by table, and the first and last tick (UTC seconds; None without ticks)."""

    several: bool
    rows: dict[str, int]
    first: int | None
    last: int | None


class OriginalReader:
    """An open file. Every method raises SqliteFileError where the file turns out to be damaged or locked."""

    def __init__(self, path: Path, copying: bool = True) -> None:
        """Open a file. If a program was killed in the middle of a change, only a copy of the file can be read,
        which is made if `copying`. Raises SqliteFileError."""
        self.path = path
        # How many values or rows were left out, by what they are.
        self.left_out: Counter[str] = Counter()
        self._file = SqliteFile(path, copying)
        try:
            self._tables = self._check()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> OriginalReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        self._file.close()

    def _ask(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        return self._file.ask(query, values)

    def _check(self) -> dict[str, bool]:
        """The tables of the file, and whether each has a gpu_index."""
        kinds = {
            name: (kind, page)
            for name, kind, page in self._ask(
                "SELECT CAST(name AS BLOB), CAST(type AS BLOB), rootpage FROM sqlite_master"
            )
        }
        if kinds.get(b"alembic_version") is not None:
            raise SqliteFileError(f"{self.path} is a database of gpumon itself, not the original's. {NAME_IT}")
        found = {}
        for table, columns in COLUMNS.items():
            kind, page = kinds.get(table.encode(), (None, 0))
            if kind is None:
                continue
            if kind != b"table" or not page:
                raise SqliteFileError(
                    f"{self.path} is not the original's: {table} is not an ordinary table in it. {NAME_IT}"
                )
            has = {row[0] for row in self._ask(f"SELECT CAST(name AS BLOB) FROM pragma_table_info('{table}')")}
            lacking = [column for column in columns if column.encode() not in has]
            if lacking:
                raise SqliteFileError(
                    f"{self.path} is not the original's: its {table} has no column {', '.join(lacking)}. {NAME_IT}"
                )
            found[table] = INDEX.encode() in has
        if METRICS not in found:
            raise SqliteFileError(f"{self.path} is not the original's: it has no table {METRICS}. {NAME_IT}")
        return found

    @property
    def several(self) -> bool:
        """Whether the file has a gpu_index, so that it may hold several GPUs."""
        return any(self._tables.values())

    def contents(self) -> Contents:
        """How much it holds."""
        rows = {table: int(self._ask(f"SELECT count(*) FROM {table}")[0][0]) for table in self._tables}
        # One query each: SQLite then looks at one end of the index instead of at all rows.
        ends = [self._ask(f"SELECT {end}(timestamp_epoch) FROM {METRICS}")[0][0] for end in ("min", "max")]
        first, last = (end if isinstance(end, int) else None for end in ends)
        return Contents(self.several, rows, first, last)

    def indices(self) -> list[int]:
        """The indices of its GPUs; [0] for a file without a gpu_index."""
        found: set[int] = set()
        for table, has_index in self._tables.items():
            if not has_index:
                # A table without a gpu_index has the rows of the first GPU.
                found |= {0} if self._ask(f"SELECT 1 FROM {table} LIMIT 1") else set()
                continue
            for (index,) in self._ask(
                f"SELECT DISTINCT {INDEX} FROM {table} WHERE typeof({INDEX}) = 'integer' "
                f"AND {INDEX} BETWEEN 0 AND {LARGEST_INDEX}"
            ):
                found.add(index)
        return sorted(found)

    def interval_s(self) -> float:
        """The usual seconds between two of its ticks."""
        times = [
            row[0]
            for row in self._ask(
                f"SELECT DISTINCT timestamp_epoch FROM {METRICS} WHERE typeof(timestamp_epoch) = 'integer' "
                "ORDER BY timestamp_epoch DESC LIMIT 500"
            )
        ]
        steps = [late - early for late, early in pairwise(times)]
        return min(3600.0, max(1.0, float(statistics.median(steps)))) if steps else USUAL_INTERVAL_S

    def ticks(self, start: int, end: int) -> Iterator[OriginalTick]:
        """Its ticks from `start` to `end` (UTC seconds), oldest first. The original asks for the processes a
        moment after the readings: they belong to the tick before them."""
        reach = longest_step(self.interval_s())
        readings, processes = self._readings(start, end), self._processes(start, end)
        reading, seen = next(readings, None), next(processes, None)
        tick: OriginalTick | None = None
        while reading is not None or seen is not None:
            if reading is not None and (seen is None or reading[0] <= seen[0]):
                if tick is not None:
                    yield tick
                tick = OriginalTick(*reading)
                reading = next(readings, None)
            elif seen is not None:
                if tick is None or seen[0] - tick.at > reach:
                    if tick is not None:
                        yield tick
                    tick = OriginalTick(seen[0])
                tick.processes += seen[1]
                seen = next(processes, None)
        if tick is not None:
            yield tick

    def _readings(self, start: int, end: int) -> Iterator[tuple[int, dict[int, OriginalReading]]]:
        for at, rows in self._seconds(METRICS, ", ".join(READINGS), start, end):
            found: dict[int, OriginalReading] = {}
            for _, index, *values in rows:
                if not is_index(index):
                    self.left_out["readings of a GPU that has no possible index"] += 1
                elif index in found:
                    self.left_out["second readings of one GPU within a second"] += 1
                else:
                    reading = tuple(map(self._value, READINGS, values))
                    if reading == (None,) * len(READINGS):
                        self.left_out["readings without a possible value"] += 1
                    else:
                        found[index] = reading
            if found:
                yield at, found

    def _value(self, name: str, value: object) -> float | None:
        low, high = POSSIBLE[name]
        if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
            self.left_out[f"impossible values of {name}"] += 1
            return None
        if name == "power" and not value:
            return None
        return float(value)  # type: ignore[arg-type]

    def _processes(self, start: int, end: int) -> Iterator[tuple[int, list[OriginalProcess]]]:
        if SNAPSHOTS not in self._tables:
            return
        # The same GPU, PID and name need one check, not one a row.
        checked: dict[tuple[object, object, object], tuple[int, int, str] | None] = {}
        highest = POSSIBLE["memory"][1]
        for at, rows in self._seconds(SNAPSHOTS, f"pid, {_NAME}, memory_usage", start, end):
            found: list[OriginalProcess] = []
            for _, index, pid, raw, memory in rows:
                try:
                    who = checked[index, pid, raw]
                except KeyError:
                    if len(checked) > PAGE_ROWS:
                        checked.clear()
                    who = checked[index, pid, raw] = _identified(index, pid, raw)
                if who is None:
                    self.left_out["process snapshots without a possible GPU, PID or name"] += 1
                elif type(memory) is float and 0.5 <= memory <= highest:
                    found.append((*who, int(memory + 0.5)))
                else:
                    found.append((*who, self._memory(memory)))
            if found:
                yield at, found

    def _memory(self, value: object) -> int | None:
        """The MiB of a process; 0 is what the original writes when the driver does not report it."""
        if type(value) not in (int, float) or not 0 <= value <= POSSIBLE["memory"][1]:  # type: ignore[operator]
            self.left_out["impossible values of a process's memory"] += 1
            return None
        return round(value) or None  # type: ignore[call-overload]

    def _seconds(self, table: str, columns: str, start: int, end: int) -> Iterator[tuple[int, list[Any]]]:
        """The rows of a table, one second at a time: the time, the index, and `columns`."""
        index = INDEX if self._tables[table] else "0"
        # In pages, so that a program that writes to the file can do so between them.
        query = (
            f"SELECT timestamp_epoch, {index}, {columns} FROM {table} WHERE typeof(timestamp_epoch) = 'integer' "
            f"AND timestamp_epoch >= ? AND timestamp_epoch <= ? ORDER BY timestamp_epoch LIMIT {PAGE_ROWS}"
        )
        while start <= end:
            rows = self._ask(query, (start, end))
            full = len(rows) == PAGE_ROWS
            place = 0
            while place < len(rows):
                at = rows[place][0]
                after = place + 1
                while after < len(rows) and rows[after][0] == at:
                    after += 1
                if full and after == len(rows) and place:
                    # The rest of this second is on the next page.
                    break
                if full and after == len(rows):
                    self.left_out[f"seconds that have more than {PAGE_ROWS:,} rows"] += 1
                yield at, rows[place:after]
                place, start = after, at + 1
            if not full:
                return

    def bad_times(self, start: int, end: int) -> Counter[str]:
        """How many rows have no time, a time before `start`, or one after `end`: "TABLE none", "TABLE before" and
        "TABLE after"."""
        found: Counter[str] = Counter()
        for table in (METRICS, SNAPSHOTS):
            if table not in self._tables:
                continue
            [(rows, none, before, after)] = self._ask(
                "SELECT count(*), coalesce(sum(typeof(timestamp_epoch) <> 'integer'), 0), "
                "coalesce(sum(typeof(timestamp_epoch) = 'integer' AND timestamp_epoch < ?), 0), "
                f"coalesce(sum(typeof(timestamp_epoch) = 'integer' AND timestamp_epoch > ?), 0) FROM {table}",
                (start, end),
            )
            found[table] = rows
            found[f"{table} none"], found[f"{table} before"], found[f"{table} after"] = none, before, after
        return found

    def first_snapshots(self) -> dict[int, int]:
        """The time of each GPU's first process snapshot, by index, in UTC seconds."""
        if SNAPSHOTS not in self._tables:
            return {}
        sound = "typeof(timestamp_epoch) = 'integer' AND timestamp_epoch > 0"
        if not self._tables[SNAPSHOTS]:
            [(first,)] = self._ask(f"SELECT min(timestamp_epoch) FROM {SNAPSHOTS} WHERE {sound}")
            return {} if first is None else {0: first}
        return {
            index: first
            for index, first in self._ask(
                f"SELECT {INDEX}, min(timestamp_epoch) FROM {SNAPSHOTS} WHERE {sound} GROUP BY {INDEX}"
            )
            if is_index(index)
        }

    def known_processes(self) -> Iterator[ProcessRow]:
        """The rows of gpu_processes with ticks that process_snapshots lacks, which are those before the
        snapshots."""
        if PROCESSES not in self._tables:
            return
        index = INDEX if self._tables[PROCESSES] else "0"
        begins = self.first_snapshots()
        slack = longest_step(self.interval_s())
        columns = f"pid, {_NAME}, first_seen, last_seen, max_memory, avg_memory, sample_count"
        for at, pid, raw, first, last, most, mean, count in self._ask(
            f"SELECT {index}, {columns} FROM {PROCESSES}"
        ):
            who = _identified(at, pid, raw)
            if who is None or not all(type(number) is int for number in (first, last, count)):
                self.left_out["processes without a possible GPU, PID, name or time"] += 1
                continue
            if not 0 < first <= last or not 0 < count <= LARGEST_PID:
                self.left_out["processes without a possible GPU, PID, name or time"] += 1
                continue
            if who[0] in begins and first >= begins[who[0]] - slack and self._has_snapshots(who[0], pid):
                continue
            row = ProcessRow(*who, first, last, self._memory(most), self._memory(mean), count)
            rest = self._before_snapshots(row)
            if rest is not None:
                yield rest

    def _snapshots_query(self, index: int, pid: int) -> tuple[str, tuple[int, ...]]:
        if self._tables[SNAPSHOTS]:
            return f"{SNAPSHOTS} WHERE pid = ? AND {INDEX} = ?", (pid, index)
        return f"{SNAPSHOTS} WHERE pid = ?", (pid,)

    def _has_snapshots(self, index: int, pid: int) -> bool:
        if SNAPSHOTS not in self._tables:
            return False
        where, values = self._snapshots_query(index, pid)
        return bool(self._ask(f"SELECT 1 FROM {where} LIMIT 1", values))

    def _before_snapshots(self, row: ProcessRow) -> ProcessRow | None:
        """The part of a row that its snapshots do not cover; None where they cover all of it."""
        if not self._has_snapshots(row.index, row.pid):
            return row
        where, values = self._snapshots_query(row.index, row.pid)
        number = "typeof(memory_usage) IN ('integer', 'real')"
        [(rows, total, most)] = self._ask(
            f"SELECT count(*), total(CASE WHEN {number} THEN memory_usage END), "
            f"max(CASE WHEN {number} THEN memory_usage END) FROM {where}",
            values,
        )
        found = self._ask(
            f"SELECT timestamp_epoch, {_NAME} FROM {where} AND typeof(timestamp_epoch) = 'integer' "
            "ORDER BY timestamp_epoch LIMIT 1",
            values,
        )
        count = row.sample_count - rows
        if count <= 0 or not found:
            return None
        since, raw = found[0]
        if since <= row.first_seen:
            return None
        mean = row.avg_memory
        if mean is not None:
            mean = max(0.0, min((mean * row.sample_count - total) / count, row.max_memory or mean))
        highest = row.max_memory
        if highest is not None and most is not None and most >= highest - 0.5:
            # The snapshots hold the maximum; how much less it was before them is not known: use the mean.
            highest = None if mean is None else round(mean)
        # Another process may have had the PID later, and the end of this one is not recorded: estimate it.
        last = max(row.first_seen, min(since, row.first_seen + int(count * self.interval_s())))
        name = _name(raw) if isinstance(raw, bytes) else ""
        return ProcessRow(
            *(row.index, row.pid, row.name, row.first_seen, last, highest or None, mean, count),
            since=(since, name),
        )


def is_index(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_INDEX


def _identified(index: object, pid: object, raw: object) -> tuple[int, int, str] | None:
    """The GPU, PID and name of a process, or None where one of them is impossible."""
    if type(index) is not int or not 0 <= index <= LARGEST_INDEX:
        return None
    if type(pid) is not int or not 0 < pid <= LARGEST_PID or not isinstance(raw, bytes):
        return None
    name = _name(raw)
    return (index, pid, name) if name else None


def _name(raw: bytes) -> str:
    """The name of a program as people call it: the last part of a path, without control characters."""
    name = text.decoded(raw).strip()
    return name.rstrip("/").rsplit("/", 1)[-1] if name.startswith("/") else name
