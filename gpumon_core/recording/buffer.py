"""Ticks that wait for the database: between the thread that samples and the one that writes, and in files."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from gpumon_core.attribution.records import NOTHING, ProcessIdentity
from gpumon_core.safety.private_files import make_folder
from gpumon_core.store.writer import Attributed
from gpumon_core.telemetry.records import Snapshot

log = logging.getLogger(__name__)

SUFFIX = ".ticks"
# A larger file is not read: an hour of a large machine has some 50 MB.
LARGEST_FILE = 1 << 27
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class FileFailed(Exception):
    """Ticks could not be stored in a file, or not be read from it; `str()` says why."""


class TickBuffer:
    """Ticks that wait for one database, oldest first; one thread adds, another takes.

    Of more than `most` ticks the oldest are dropped. `committed` is the second of the newest tick that this
    program has committed to the database, None where it has committed none.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.committed: int | None = None
        self._guard = threading.Lock()
        self._ticks: deque[Attributed] = deque()
        # What is being written just now.
        self._taken: list[Attributed] = []

    def __len__(self) -> int:
        return len(self._ticks) + len(self._taken)

    def add(self, tick: Attributed) -> int:
        """Append a tick; how many were dropped for it."""
        with self._guard:
            self._ticks.append(tick)
            return self._make_room()

    def take(self, count: int) -> list[Attributed]:
        """The oldest ticks, to be written; `done` or `put_back` follows."""
        # What is being written cannot be dropped: so it is at most half of the buffer.
        count = min(count, max(1, self.most // 2))
        with self._guard:
            while self._ticks and len(self._taken) < count:
                self._taken.append(self._ticks.popleft())
            return list(self._taken)

    def done(self) -> None:
        """What was taken is in the database."""
        with self._guard:
            self._taken = []

    def put_back(self) -> None:
        """What was taken is to be written again."""
        with self._guard:
            self._ticks.extendleft(reversed(self._taken))
            self._taken = []

    def seconds(self) -> list[int]:
        """The times of all, oldest first, in UTC seconds."""
        with self._guard:
            return [int(snapshot.timestamp) for snapshot, _ in (*self._taken, *self._ticks)]

    def leave_out(self, count: int) -> list[Attributed]:
        """Remove the oldest, and return them; not while some are taken."""
        with self._guard:
            return [self._ticks.popleft() for _ in range(min(count, len(self._ticks)))]

    def put_before(self, ticks: Iterable[Attributed]) -> int:
        """Put older ticks before those that are there; how many were dropped."""
        with self._guard:
            self._ticks.extendleft(reversed(list(ticks)))
            return self._make_room()

    def _make_room(self) -> int:
        dropped = 0
        while len(self) > self.most and self._ticks:
            self._ticks.popleft()
            dropped += 1
        return dropped

    def save(self, folder: Path, name: str) -> int:
        """Store what waits in a file of its own, for the next recorder; returns how many ticks. Raises FileFailed.

        The file appears complete or not at all.
        """
        with self._guard:
            ticks = [*self._taken, *self._ticks]
        if not ticks:
            return 0
        import msgspec

        try:
            data = msgspec.msgpack.encode(_stored(ticks, self.committed))
            # Somebody may have removed it.
            make_folder(folder)
            # Readable by this user only, as all of the history.
            with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{name}-", suffix=".tmp", delete=False) as file:
                try:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(file.name, Path(file.name).with_suffix(SUFFIX))
                except OSError:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            raise FileFailed(f"{folder}: {error.strerror}") from error
        return len(ticks)


@dataclass(frozen=True, slots=True)
class _Stored:
    """The content of a file. `boot` is the run of the machine in which `elapsed` of the snapshots counts. A tick
    names its processes by their places in `identities`, since most of them are in every tick."""

    boot: str
    committed: int | None
    identities: list[ProcessIdentity]
    ticks: list[tuple[Snapshot, dict[int, int]]]


def _stored(ticks: list[Attributed], committed: int | None) -> _Stored:
    places: dict[ProcessIdentity, int] = {}
    named = [
        (snapshot, {pid: places.setdefault(identity, len(places)) for pid, identity in identities.items()})
        for snapshot, identities in ticks
    ]
    # Later nobody can be asked about these processes.
    identities = [replace(identity, ask=None, pending=False) for identity in places]
    return _Stored(_boot(), committed, identities, named)


@dataclass(frozen=True, slots=True)
class Saved:
    """What another recorder left for this one, and the files that hold it."""

    ticks: list[Attributed]
    committed: int | None
    files: list[Path]
    # Files that could not be read, and why.
    problems: list[str]


def saved(folder: Path, name: str) -> Saved:
    """Read what waits in files; a file that cannot be read stays where it is, under another name."""
    found = Saved([], None, [], [])
    files = sorted(folder.glob(f"{name}-*{SUFFIX}"))
    if not files:
        return found
    read = []
    for path in files:
        try:
            read.append((_read(path), path))
        except FileFailed as error:
            found.problems.append(str(error))
    read.sort(key=lambda pair: pair[0].ticks[0][0].timestamp if pair[0].ticks else 0.0)
    committed = None
    for stored, path in read:
        same_boot = stored.boot == _boot() != ""
        identities = [
            replace(identity, program=NOTHING) if identity.program == NOTHING else identity
            for identity in stored.identities
        ]
        for snapshot, places in stored.ticks:
            readings = tuple(
                replace(reading, values={key: _number(value) for key, value in reading.values.items()})
                for reading in snapshot.readings
            )
            moved = replace(snapshot, readings=readings, elapsed=snapshot.elapsed if same_boot else None)
            found.ticks.append((moved, {pid: identities[place] for pid, place in places.items()}))
        committed = stored.committed if committed is None else committed
        found.files.append(path)
    return replace(found, committed=committed)


def _read(path: Path) -> _Stored:
    import msgspec

    try:
        stored: _Stored = msgspec.msgpack.decode(_content(path), type=_Stored)
        places = range(len(stored.identities))
        if not all(place in places for _, named in stored.ticks for place in named.values()):
            raise FileFailed(f"The ticks in {path} name processes that the file does not have")
    except (OSError, ValueError, msgspec.DecodeError) as error:
        aside = path.with_suffix(".unreadable")
        try:
            path.rename(aside)
        except OSError as refused:
            raise FileFailed(
                f"The ticks in {path} cannot be read: {error}; it cannot be renamed either ({refused.strerror})"
            ) from error
        raise FileFailed(f"The ticks in {path} cannot be read: {error}; the file is now {aside.name}") from error
    return stored


def _content(path: Path) -> bytes:
    """Raises OSError, and ValueError where it is no file that this user has made."""
    # Others may be able to put something into the folder: a pipe would never be read to its end.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
            raise ValueError("it is not a regular file of this user")
        if facts.st_size > LARGEST_FILE:
            raise ValueError(f"it is larger than {LARGEST_FILE >> 20} MiB")
        return file.read(LARGEST_FILE)


def _number(value: float | None) -> float | None:
    """Whole numbers come back as floats, which columns of integers do not take."""
    return int(value) if value is not None and value.is_integer() else value


def _boot() -> str:
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        # Without an id no two files count as written in the same run of the machine.
        return ""
