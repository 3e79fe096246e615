"""Takes the original program's history into gpumon's: which GPU is which, what is taken, and what is left out."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from gpumon_core.legacy_import.discovery import NamedGpu, named_gpus
from gpumon_core.legacy_import.import_records import Host, Place, Source
from gpumon_core.legacy_import.merger import Placer
from gpumon_core.legacy_import.process_matcher import Before
from gpumon_core.legacy_import.reader import METRICS, PROCESSES, SNAPSHOTS, Contents, Original
from gpumon_core.legacy_import.sqlite_file import OriginalError
from gpumon_core.settings import Settings, check_data_dir, mask_password
from gpumon_core.store import database
from gpumon_core.store.accounting import longest_step
from gpumon_core.store.lock import FileRecorderLock, Lock, ServerRecorderLock, recorder_lock
from gpumon_core.store.queries import gpu_selector
from gpumon_core.store.retention import Keep
from gpumon_core.store.schema import gpu_metrics, gpus, hosts, imported_files
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import Snapshot, SourceUnavailable

HOUR_S = 3600
# So long a transaction waits for the recorder's before it is tried again.
PATIENCE_S = 0.5
# What is counted, in the order in which people ask.
COUNTED = (("ticks", METRICS), ("processes", PROCESSES), ("snapshots", SNAPSHOTS))
CALLED = {"ticks": "ticks", "processes": "processes", "snapshots": "process snapshots"}
# Why something is left out that was read.
REASONS = {
    "imported": "imported before",
    "recorded": "gpumon itself recorded this GPU then",
    "old": "older than everything that is kept (GPUMON_RETENTION_HOUR_DAYS)",
}

Progress = Callable[[float, float], None]


class ImportRefused(Exception):
    """Nothing was imported; `str()` says why and what to do, up to the full stop; `status` is the exit status."""

    def __init__(self, sentence: str, status: int = 1) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(slots=True)
class Report:
    """What an import did, or would do. `taken` counts what is new; `left_out` has sentences, `problem` is what
    ended it before its time."""

    contents: Contents
    places: dict[int, Place]
    taken: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """Which GPU of this host each GPU of the file is, by the file's index; and why others are none."""

    places: Mapping[int, Place]
    unplaced: Mapping[int, str]


def choose(
    indices: Sequence[int],
    several: bool,
    named: Sequence[NamedGpu],
    places: Sequence[Place],
    given: Sequence[str],
    host: str,
) -> Choice:
    """Find each GPU of a file among this host's. `given` are --gpu's values: GPU or INDEX=GPU.

    Raises ImportRefused.
    """
    wanted: dict[int, Place] = {}
    for text in given:
        left, separator, right = text.partition("=")
        if separator:
            if not left.strip().isdecimal() or int(left) not in indices:
                raise ImportRefused(
                    f"--gpu {text}: the file tells of GPU {_listed(indices)}, not of {left.strip() or 'nothing'}",
                    2,
                )
            wanted[int(left)] = _find(right.strip(), places, host)
        elif len(indices) == 1 and not wanted:
            wanted[indices[0]] = _find(left.strip(), places, host)
        else:
            raise ImportRefused(
                f"--gpu {text}: the file tells of GPU {_listed(indices)}: say for each which it is, as in "
                f"--gpu {indices[0]}={places[0].uuid}",
                2,
            )
    found, unplaced = dict(wanted), {}
    told = {gpu.index: gpu for gpu in named}
    for index in indices:
        if index not in wanted:
            guess = _guess(index, several, told.get(index), places, host)
            if isinstance(guess, Place):
                found[index] = guess
            else:
                unplaced[index] = guess
    if len({place.id for place in found.values()}) < len(found):
        raise ImportRefused("two GPUs of the file would be one of this host: choose with --gpu INDEX=GPU", 2)
    if not found:
        [why] = list(unplaced.values())[:1]
        which = f"{min(unplaced)}=" if several else ""
        raise ImportRefused(
            f"it is not known which GPU the file is about: {why}. {host} has {_described(places)}. Choose with "
            f"--gpu {which}{places[0].uuid}",
            2,
        )
    return Choice(found, unplaced)


def _guess(index: int, several: bool, told: NamedGpu | None, places: Sequence[Place], host: str) -> Place | str:
    """The GPU that can only be meant, or why there is none."""
    if told is not None and told.uuid is not None:
        same = [place for place in places if place.uuid == told.uuid]
        return same[0] if same else f"gpu_config.json calls GPU {index} {told.uuid}, which {host} does not have"
    fitting = [place for place in places if place.index == index or not several]
    if told is not None and told.name is not None:
        fitting = [place for place in fitting if place.name is None or _same(place.name, told.name)]
        if not fitting:
            return f"gpu_config.json calls GPU {index} {told.name!r}, which {host} does not have"
    if not fitting:
        return f"{host} has no GPU {index}"
    return fitting[0] if len(fitting) == 1 else f"{host} has several that it may be"


def _same(name: str, other: str) -> bool:
    return name.split() == other.split()


def _find(text: str, places: Sequence[Place], host: str) -> Place:
    """The GPU of this host that is called that: see naming.find."""
    named = [gpu_selector.Named(place.id, host, place.index, None, place.uuid, place.name) for place in places]
    try:
        found = gpu_selector.find(text, named, "index")
    except (gpu_selector.UnknownGpu, gpu_selector.AmbiguousGpu) as error:
        raise ImportRefused(str(error), 2) from error
    return next(place for place in places if place.id == found.id)


def _described(places: Sequence[Place]) -> str:
    return "; ".join(f"GPU {place.index}, {place.name or 'of unknown model'}, {place.uuid}" for place in places)


def _listed(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices))


def run(
    settings: Settings,
    path: Path,
    given: Sequence[str] = (),
    dry: bool = False,
    progress: Progress = lambda done, whole: None,
    now: float | None = None,
) -> Report:
    """Take the file into the history of this host; with `dry`, only find out what would come of it.

    `progress` is told the hours done and the hours in all. Raises ImportRefused, original_file.OriginalError,
    settings.SettingsError, database.DatabaseError, OSError, sqlalchemy.exc.SQLAlchemyError; what was committed
    before stays, and what is refused where there was no database makes none.
    """
    at = int(time.time() if now is None else now)
    url = settings.real_database_url
    with Original(path) as original:
        contents, indices, named = original.contents(), original.indices(), named_gpus(path)
        if not indices:
            return Report(contents, {})

        def chosen(places: Sequence[Place]) -> Choice:
            return choose(indices, contents.several, named, places, given, settings.host_name)

        look = None
        if not _is_there(url):
            # Before anything is made: what is refused leaves nothing behind.
            look = _look(settings)
            chosen(look.places)
        if not dry:
            check_data_dir(settings)
        with _alone(url, settings.host_name, dry), _engines(url, dry) as (reader, writer):
            host, places = _recorded_gpus(settings.host_name, reader)
            if not places:
                # The driver is asked once which GPUs there are.
                look = look or _look(settings)
                host, places = Host(host.id, settings.interval), look.places
                if writer is not None:
                    chosen(places)
                    _write_first(settings, writer, look)
                    host, places = _recorded_gpus(settings.host_name, reader)
            choice = chosen(places)
            keep = Keep(settings.retention_raw_days, settings.retention_minute_days, settings.retention_hour_days)
            placer = Placer(
                reader,
                writer,
                host,
                list(choice.places.values()),
                keep,
                original.interval_s(),
                Source(path.name, called(path), {place.id: index for index, place in choice.places.items()}),
                at,
                # A dry run judges as the import would: what a recorder at work has not written yet is its own.
                live=reader is not None and not recorder_lock(url, settings.host_name).is_free(),
                idle_after_s=60 * settings.idle_minutes,
            )
            return _taken(original, placer, choice, contents, at, progress)


def _taken(
    original: Original, placer: Placer, choice: Choice, contents: Contents, now: int, progress: Progress
) -> Report:
    """Take what is in the file, and say what came of it."""
    report = Report(contents, dict(choice.places))
    unplaced: Counter[int] = Counter()
    try:
        _place(original, placer, choice, contents, now, unplaced, progress)
    except OriginalError as error:
        # What was read before it is sound.
        report.problem = str(error)
    # What is in the future now is not by the next run.
    until = min(now, now if contents.last is None else contents.last)
    placer.finish(until if report.problem is None else None)
    times = original.bad_times(placer.oldest, now) if report.problem is None else Counter()
    report.taken = {name: placer.counts[f"{name} taken"] for name, _ in COUNTED}
    report.left_out = list(_left_out(original, placer, choice, times, unplaced))
    return report


def _place(
    original: Original,
    placer: Placer,
    choice: Choice,
    contents: Contents,
    now: int,
    unplaced: Counter[int],
    progress: Progress,
) -> None:
    ids = {index: place.id for index, place in choice.places.items()}
    alone: defaultdict[tuple[int, str], list[Before]] = defaultdict(list)
    for known in original.known_processes():
        if known.index not in ids:
            continue
        goes_on = known.since is not None and known.since[1] == known.name
        before = Before(
            *(ids[known.index], known.pid, known.name, known.first_seen, known.last_seen),
            *(known.max_memory, known.avg_memory, known.sample_count),
            since=known.since[0] if known.since is not None and goes_on else None,
        )
        if before.since is not None:
            placer.expect([before])
        else:
            alone[before.pid, before.name].append(before)
    for group in alone.values():
        placer.place(group)
    first = max(placer.oldest, contents.first or now)
    whole = max(1, min(now, contents.last or now) - first) / HOUR_S
    for tick in original.ticks(placer.oldest, now):
        readings, processes = tick.readings, tick.processes
        if choice.unplaced:
            unplaced.update(index for index in readings if index not in ids)
        here = {ids[index]: reading for index, reading in readings.items() if index in ids}
        seen = [(ids[index], pid, name, memory) for index, pid, name, memory in processes if index in ids]
        if here or seen:
            placer.take(tick.at, here, seen)
        progress(min(whole, max(0.0, (tick.at - first) / HOUR_S)), whole)


def _left_out(
    original: Original, placer: Placer, choice: Choice, times: Counter[str], unplaced: Counter[int]
) -> Iterator[str]:
    """A sentence for everything that was not taken."""
    counts = placer.counts
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
    for index, why in choice.unplaced.items():
        yield f"{unplaced[index]:,} ticks of GPU {index} and its processes: {why}; choose with --gpu {index}=GPU"
    if counts["more memory"]:
        yield f"{counts['more memory']:,} values of memory: more than this GPU has"
    for what, count in sorted(original.left_out.items()):
        yield f"{count:,} {what}"


@contextmanager
def _alone(url: str, host: str, dry: bool) -> Iterator[None]:
    """Two imports at once would take the same ticks twice."""
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
            f"{lock.holder() or 'another program'} is importing into {mask_password(url)}: let it end"
        )
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _engines(url: str, dry: bool) -> Iterator[tuple[Engine | None, Engine | None]]:
    """One to read what is there (None where nothing is), and one to write (None in a dry run)."""
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
                    f"{database.head()}), which a dry run does not change: start this version of gpumon once"
                )
        yield reader, writer
    finally:
        for engine in (reader, writer):
            if engine is not None:
                engine.dispose()


@dataclass(frozen=True, slots=True)
class Look:
    """What the driver says where nothing is recorded yet: one tick, from `source`, and the GPUs in it."""

    snapshot: Snapshot
    source: str
    places: list[Place]


def _is_there(url: str) -> bool:
    """Whether there is a database, be it damaged: opening one says that better than what follows from none."""
    path = database.file_of(url)
    return database.exists(url) if path is None else path.exists()


def _look(settings: Settings) -> Look:
    """Read the driver once. Raises ImportRefused."""
    from gpumon_core.recording.collector import real

    try:
        observer = real(settings)
    except SourceUnavailable as error:
        raise ImportRefused(
            f"gpumon has recorded no GPU of {settings.host_name} yet, and the driver cannot be asked for them "
            f"({error}): start gpumon on the machine with the GPUs first, or set GPUMON_HOST_NAME to a name that "
            "it has recorded"
        ) from error
    try:
        snapshot, _ = observer.observe()
    except SourceUnavailable as error:
        remedy = error.remedy.removesuffix(".")
        raise ImportRefused(f"the driver does not say which GPUs there are ({error}). {remedy}") from error
    finally:
        observer.close()
    now = int(snapshot.timestamp)
    # No row has a number below 0: another host's rows are never taken for theirs.
    places = [
        Place(-number, gpu.index, gpu.uuid, gpu.name, gpu.memory_total_mib, now, now)
        for number, gpu in enumerate(snapshot.gpus, 1)
        if gpu.parent_uuid is None
    ]
    if not places:
        raise ImportRefused(f"{settings.host_name} has no GPU: compare with nvidia-smi -L")
    return Look(snapshot, observer.source.name, places)


def _write_first(settings: Settings, writer: Engine, look: Look) -> None:
    """Let the database know the GPUs that were found. Raises ImportRefused.

    Nothing that they said is recorded: a tick now would be one of gpumon's own, beside which the file's last ones
    are left out, by how much later than the dry run the import is run.
    """
    lock = recorder_lock(settings.real_database_url, settings.host_name)
    if not lock.acquire():
        raise ImportRefused("a recorder is about to take its first tick: try again in a few seconds")
    try:
        first = Writer(writer, settings.host_name, look.source, settings.interval)
        first.write(replace(look.snapshot, readings=(), processes=()), {})
    finally:
        lock.release()


def _recorded_gpus(name: str, reader: Engine | None) -> tuple[Host, list[Place]]:
    """A host and its GPUs as they were recorded, whole cards only: the original knows no MIG instances."""
    if reader is None:
        return Host(None, 0.0), []
    columns = ("id", "gpu_index", "uuid", "name", "memory_total_mib", "first_seen", "last_seen")
    with reader.connect() as connection:
        host = connection.execute(sa.select(hosts.c.id, hosts.c.interval_s).where(hosts.c.name == name)).first()
        if host is None:
            return Host(None, 0.0), []
        query = sa.select(*(gpus.c[column] for column in columns), gpus.c.energy_from, gpus.c.state).where(
            gpus.c.host_id == host.id, gpus.c.mig_index.is_(None)
        )
        rows = connection.execute(query.order_by(gpus.c.gpu_index, gpus.c.id)).all()
    here = [row for row in rows if row.state != "gone"] or rows
    return Host(host.id, host.interval_s), [
        Place(*row[: len(columns)], row.energy_from == "counter")  # type: ignore[call-arg]
        for row in here
    ]


@dataclass(frozen=True, slots=True)
class Standing:
    """Up to when a file was imported (UTC seconds; None where it never was), and whether nothing in it is new."""

    until: int | None
    whole: bool


def standing(engine: Engine, host: str, path: Path, indices: Sequence[int], contents: Contents) -> Standing:
    """How much of that file, with these GPUs by its own index, was imported for a host.

    Raises sqlalchemy.exc.DBAPIError.
    """
    with engine.connect() as connection:
        interval = connection.execute(sa.select(hosts.c.interval_s).where(hosts.c.name == host)).scalar() or 0.0
        query = (
            sa.select(imported_files.c.gpu_id, imported_files.c.source_index, imported_files.c.until)
            .join(gpus, gpus.c.id == imported_files.c.gpu_id)
            .join(hosts, hosts.c.id == gpus.c.host_id)
            .where(hosts.c.name == host, imported_files.c.source == called(path))
        )
        read = connection.execute(query.where(imported_files.c.source_index.in_(indices))).all()
        last, step = contents.last, int(longest_step(interval))
        done = {
            row.source_index
            for row in read
            if last is None or row.until >= last or _is_whole(connection, row.gpu_id, row.until, last, step)
        }
    return Standing(min((row.until for row in read), default=None), bool(read) and done >= set(indices))


def _is_whole(connection: Connection, gpu_id: int, start: int, end: int, step: int) -> bool:
    """Whether a GPU has ticks from `start` to `end` without a longer pause: the file has grown, but while gpumon
    recorded, too."""
    at = gpu_metrics.c.timestamp_epoch
    ticks = (
        sa.select(at.label("at"), (at - sa.func.lag(at).over(order_by=at)).label("pause"))
        .where(gpu_metrics.c.gpu_id == gpu_id, at >= start, at <= end + step)
        .subquery()
    )
    found = sa.select(sa.func.min(ticks.c.at), sa.func.max(ticks.c.at), sa.func.max(ticks.c.pause))
    first, last, longest = connection.execute(found).one()
    return first is not None and first <= start + step and last >= end - step and (longest or 0) <= step


def called(path: Path) -> str:
    """Which file it is, for the database: its path, in letters that every database takes."""
    return os.fsencode(path.resolve()).decode("utf-8", "backslashreplace")


def moment(epoch: float | None) -> str:
    """A time in this machine's zone, to the minute; what no calendar has is told as it is."""
    if epoch is None:
        return "–"
    try:
        return datetime.fromtimestamp(epoch).astimezone().strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return f"second {epoch}"
