"""Imports the original's history: runs the steps, and reports what was taken and what was left out."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from sqlalchemy.engine import Engine

from gpumon_core.legacy_import.discovery import named_gpus
from gpumon_core.legacy_import.gpu_choice import GpuChoice, choose
from gpumon_core.legacy_import.host_gpus import ask_driver, recorded_gpus, store_gpus
from gpumon_core.legacy_import.import_records import ImportRefused, ImportSource, TargetGpu, TargetHost
from gpumon_core.legacy_import.import_state import database_path
from gpumon_core.legacy_import.merger import Merger
from gpumon_core.legacy_import.process_matcher import CountedProcess
from gpumon_core.legacy_import.reader import METRICS, PROCESSES, SNAPSHOTS, Contents, OriginalReader
from gpumon_core.legacy_import.sqlite_file import SqliteFileError
from gpumon_core.settings import Settings, check_data_dir, mask_password
from gpumon_core.store import database
from gpumon_core.store.accounting import HOUR_S
from gpumon_core.store.lock import FileRecorderLock, Lock, ServerRecorderLock, recorder_lock
from gpumon_core.store.retention import RetentionDays

# A transaction waits this long for the recorder's transaction before it is tried again.
PATIENCE_S = 0.5
# What an import counts, and the table of the file that holds it.
COUNTED = (("ticks", METRICS), ("processes", PROCESSES), ("snapshots", SNAPSHOTS))
CALLED = {"ticks": "ticks", "processes": "processes", "snapshots": "process snapshots"}
# Why something that was read is left out, by the merger's verdict.
REASONS = {
    "imported": "imported before",
    "recorded": "gpumon itself recorded this GPU then",
    "old": "older than everything that gpumon stores (GPUMON_RETENTION_HOUR_DAYS)",
}

# Called with the hours done and the hours in all.
OnProgress = Callable[[float, float], None]


@dataclass(slots=True)
class Report:
    """What an import did, or would do. `taken` counts what is new, `left_out` has sentences, and `problem` is what
    ended the import early."""

    contents: Contents
    targets: dict[int, TargetGpu]
    taken: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    problem: str | None = None


def run(
    settings: Settings,
    path: Path,
    given: Sequence[str] = (),
    dry: bool = False,
    progress: OnProgress = lambda done, total: None,
    now: float | None = None,
) -> Report:
    """Import the file into the history of this host; with `dry`, only find out what an import would do.

    Raises ImportRefused, sqlite_file.SqliteFileError, settings.SettingsError, database.DatabaseError, OSError,
    sqlalchemy.exc.SQLAlchemyError. What was committed before an error stays. An import that is refused creates no
    database.
    """
    at = int(time.time() if now is None else now)
    url = settings.real_database_url
    with OriginalReader(path) as original:
        contents, indices, named = original.contents(), original.indices(), named_gpus(path)
        if not indices:
            return Report(contents, {})

        def choice_among(targets: Sequence[TargetGpu]) -> GpuChoice:
            return choose(indices, contents.several, named, targets, given, settings.host_name)

        reading = None
        if not _has_database(url):
            # Choose before anything is created: an import that is refused then leaves nothing behind.
            reading = ask_driver(settings)
            choice_among(reading.targets)
        if not dry:
            check_data_dir(settings)
        with _import_lock(url, settings.host_name, dry), _engines(url, dry) as (read_engine, write_engine):
            host, targets = recorded_gpus(settings.host_name, read_engine)
            if not targets:
                reading = reading or ask_driver(settings)
                host, targets = TargetHost(host.id, settings.interval), reading.targets
                if write_engine is not None:
                    choice_among(targets)
                    store_gpus(settings, write_engine, reading)
                    host, targets = recorded_gpus(settings.host_name, read_engine)
            choice = choice_among(targets)
            merger = Merger(
                read_engine,
                write_engine,
                host,
                list(choice.targets.values()),
                RetentionDays.of(settings),
                original.interval_s(),
                ImportSource(
                    path.name,
                    database_path(path),
                    {target.id: index for index, target in choice.targets.items()},
                ),
                at,
                # A dry run judges as the import does: ticks that a running recorder has not written yet count too.
                is_live=read_engine is not None and not recorder_lock(url, settings.host_name).is_free(),
                idle_after_s=60 * settings.idle_minutes,
            )
            return _merge(original, merger, choice, contents, at, progress)


def _merge(
    original: OriginalReader, merger: Merger, choice: GpuChoice, contents: Contents, now: int, progress: OnProgress
) -> Report:
    """Merge what is in the file, and report it."""
    report = Report(contents, dict(choice.targets))
    unmatched: Counter[int] = Counter()
    try:
        _merge_processes(original, merger, choice)
        _merge_ticks(original, merger, choice, contents, now, unmatched, progress)
    except SqliteFileError as error:
        # What was read before the error is sound.
        report.problem = str(error)
    # The next run has to read again what lies in the future now.
    until = min(now, now if contents.last is None else contents.last)
    merger.finish(until if report.problem is None else None)
    times = original.bad_times(merger.oldest, now) if report.problem is None else Counter()
    report.taken = {name: merger.counts[f"{name} taken"] for name, _ in COUNTED}
    report.left_out = list(_left_out(original, merger, choice, times, unmatched))
    return report


def _merge_processes(original: OriginalReader, merger: Merger, choice: GpuChoice) -> None:
    """Merge the processes that have no snapshots, and announce those whose snapshots begin later."""
    ids = {index: target.id for index, target in choice.targets.items()}
    by_name: defaultdict[tuple[int, str], list[CountedProcess]] = defaultdict(list)
    for row in original.known_processes():
        if row.index not in ids:
            continue
        goes_on = row.since is not None and row.since[1] == row.name
        counted = CountedProcess(
            *(ids[row.index], row.pid, row.name, row.first_seen, row.last_seen),
            *(row.max_memory, row.avg_memory, row.sample_count),
            first_snapshot=row.since[0] if row.since is not None and goes_on else None,
        )
        if counted.first_snapshot is not None:
            merger.expect(counted)
        else:
            by_name[counted.pid, counted.name].append(counted)
    for group in by_name.values():
        merger.merge_counted(group)


def _merge_ticks(
    original: OriginalReader,
    merger: Merger,
    choice: GpuChoice,
    contents: Contents,
    now: int,
    unmatched: Counter[int],
    progress: OnProgress,
) -> None:
    """Merge the ticks, and count in `unmatched` those of GPUs that this host does not have."""
    ids = {index: target.id for index, target in choice.targets.items()}
    first = max(merger.oldest, contents.first or now)
    total_h = max(1, min(now, contents.last or now) - first) / HOUR_S
    for tick in original.ticks(merger.oldest, now):
        if choice.unmatched:
            unmatched.update(index for index in tick.readings if index not in ids)
        readings = {ids[index]: reading for index, reading in tick.readings.items() if index in ids}
        processes = [(ids[index], pid, name, mib) for index, pid, name, mib in tick.processes if index in ids]
        if readings or processes:
            merger.merge_tick(tick.at, readings, processes)
        progress(min(total_h, max(0.0, (tick.at - first) / HOUR_S)), total_h)


def _left_out(
    original: OriginalReader, merger: Merger, choice: GpuChoice, times: Counter[str], unmatched: Counter[int]
) -> Iterator[str]:
    """A sentence for everything that was not taken."""
    counts = merger.counts
    counts["ticks old"] += times[f"{METRICS} before"]
    counts["snapshots old"] += times[f"{SNAPSHOTS} before"]
    for verdict, reason in REASONS.items():
        parts = [
            f"{counts[f'{name} {verdict}']:,} {CALLED[name]}" for name, _ in COUNTED if counts[f"{name} {verdict}"]
        ]
        if parts:
            yield f"{', '.join(parts)}: {reason}"
    for word, reason in (("after", "in the future"), ("none", "without a possible time")):
        parts = [
            f"{times[f'{table} {word}']:,} {CALLED[name]}" for name, table in COUNTED if times[f"{table} {word}"]
        ]
        if parts:
            yield f"{', '.join(parts)}: {reason}"
    for index, why in choice.unmatched.items():
        yield f"{unmatched[index]:,} ticks of GPU {index} and its processes: {why}; choose with --gpu {index}=GPU"
    if counts["too much memory"]:
        yield f"{counts['too much memory']:,} values of memory: more than this GPU has"
    for what, count in sorted(original.left_out.items()):
        yield f"{count:,} {what}"


@contextmanager
def _import_lock(url: str, host: str, dry: bool) -> Iterator[None]:
    """Let one import run at a time: two at once would take the same ticks twice."""
    if dry:
        yield
        return
    path = database.file_of(url)
    lock: Lock
    if path is None:
        lock = ServerRecorderLock(url, f"import {host}")
    else:
        lock = FileRecorderLock(path.with_name(path.name + ".import"), host)
    if not lock.acquire():
        raise ImportRefused(
            f"{lock.holder() or 'another program'} is importing into {mask_password(url)}, and only one import "
            "can run at a time: try again when it has ended"
        )
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _engines(url: str, dry: bool) -> Iterator[tuple[Engine | None, Engine | None]]:
    """One engine that reads (None without a database), and one that writes (None in a dry run)."""
    writer = None if dry else database.open_for_writing(url, PATIENCE_S)
    reader = None
    try:
        if writer is not None or database.exists(url):
            reader = database.open_for_reading(url)
            with reader.connect() as connection:
                found = database.revision(connection)
            if found != database.head():
                raise ImportRefused(
                    f"the database {mask_password(url)} has the schema of another version ({found}, not "
                    f"{database.head()}), and a dry run does not change it: start this version of gpumon once"
                )
        yield reader, writer
    finally:
        for engine in (reader, writer):
            if engine is not None:
                engine.dispose()


def _has_database(url: str) -> bool:
    """Whether there is a database, even a damaged one: the error of opening it says more than "there is none"."""
    path = database.file_of(url)
    return database.exists(url) if path is None else path.exists()


def moment(epoch: float | None) -> str:
    """A time in this machine's zone, to the minute; a time that no calendar has as its number of seconds."""
    if epoch is None:
        return "–"
    try:
        return datetime.fromtimestamp(epoch).astimezone().strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return f"second {epoch}"
