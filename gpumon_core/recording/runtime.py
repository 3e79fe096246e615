"""The one recorder of this process, and all that pages and routes ask of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError

from gpumon_core.attribution import local
from gpumon_core.recording import health
from gpumon_core.recording.consumers import Consumer
from gpumon_core.recording.counters import Counters
from gpumon_core.recording.latest_tick import LatestTick
from gpumon_core.recording.recorder import Recorder
from gpumon_core.recording.state import State
from gpumon_core.settings import Settings, load
from gpumon_core.store import database

_guard = threading.Lock()
_recorder: Recorder | None = None


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings in force, read once. Raises settings.SettingsError."""
    return load()


def start(consumers: Iterable[Consumer] = ()) -> Recorder:
    """Start this process's recorder, which hands each committed tick to the consumers. What is missing then is
    tried again."""
    global _recorder  # noqa: PLW0603 - a process has one recorder, however many pages ask for it
    with _guard:
        if _recorder is None:
            recorder = Recorder(settings(), consumers)
            _recorder = recorder
            recorder.start(patient=True)
        return _recorder


def stop() -> None:
    """Stop it, with its last tick committed, and break off queries that wait for a server. Doing it twice is
    fine."""
    global _recorder  # noqa: PLW0603
    with _guard:
        with _opening:
            for engine in _engines.values():
                database.break_off(engine)
            _close_all_but(0)
        if _recorder is not None:
            _recorder.stop()
            _recorder = None


def state() -> State:
    """What the recorder is doing; without one, where its database would be."""
    if _recorder is not None:
        return _recorder.state
    chosen = settings()
    return State(
        role="stopped",
        source="demo" if chosen.source == "demo" else "nvml",
        database_url=chosen.database_of(chosen.source),
    )


def sees_processes() -> bool:
    """Whether the driver reports all processes to this process's recorder: in a container with PIDs of its own it
    reports none outside. True where nothing is recorded, and under WSL, where no setting changes it."""
    now = state()
    return now.role != "recording" or now.source == "demo" or local.is_wsl() or local.sees_host_processes()


def counters() -> Counters | None:
    """What this process's recorder has done, in numbers; None where there is none."""
    return None if _recorder is None else _recorder.counters


def latest_tick() -> LatestTick | None:
    """This process's latest tick, from memory; None where it does not record."""
    return None if _recorder is None else _recorder.latest_tick


def engine(url: str | None = None) -> Engine:
    """A read-only engine on a database, by default the one that is being shown now."""
    return _engine(url or state().database_url)


# One shows real GPUs, another simulated ones.
MOST_ENGINES = 2
_opening = threading.Lock()
_engines: dict[str, Engine] = {}


def _engine(url: str) -> Engine:
    with _opening:
        if url not in _engines:
            _close_all_but(MOST_ENGINES - 1)
            _engines[url] = database.open_for_reading(url, often=True)
        return _engines[url]


def _close_all_but(newest: int) -> None:
    while len(_engines) > newest:
        _engines.pop(next(iter(_engines))).dispose()


# gpumon cannot know when a recorder in another process has written, so it asks the database this often.
ELSEWHERE_S = 0.5


@dataclass(frozen=True, slots=True)
class _Looked:
    """What was read or went wrong, when, and for which tick it is good."""

    key: tuple[str, int | None]
    at: float
    reading: health.RecordedState | DBAPIError


_looking = threading.Lock()
_looked: _Looked | None = None


def check_health() -> health.Health:
    """The state of the recording now; the database is asked once per tick, however many viewers there are.
    Raises sqlalchemy.exc.DBAPIError."""
    global _looked  # noqa: PLW0603 - all viewers share it
    now_is, counts = state(), counters()
    records = counts is not None and now_is.role == "recording"
    key = (now_is.database_url, counts.ticks if counts is not None and records else None)
    good_for = settings().interval if records else min(ELSEWHERE_S, settings().interval)
    # Viewers that come together wait for the one that asks the database.
    with _looking:
        found = _looked
        if found is not None and isinstance(found.reading, DBAPIError):
            good_for, key = min(ELSEWHERE_S, good_for), (now_is.database_url, None)
        if found is None or found.key != key or time.monotonic() - found.at > good_for:
            # Where this process records, its own ticks count; elsewhere the newest of any host.
            host = settings().host_name if records else None
            reading: health.RecordedState | DBAPIError
            try:
                reading = health.read(_engine(now_is.database_url), host)
            except DBAPIError as error:
                # Viewers do not wait one after the other for a server that is away.
                reading, key = error, (now_is.database_url, None)
            found = _looked = _Looked(key, time.monotonic(), reading)
    if isinstance(found.reading, DBAPIError):
        raise found.reading
    recorder = _recorder
    age_s = recorder.age_s if records and recorder is not None else None
    found_health = health.judge(found.reading, now_is, settings().interval, counts, age_s)
    return found_health if recorder is None else replace(found_health, consumers=recorder.consumers)
