"""The one recorder of this process, and what pages and routes ask of it."""

from __future__ import annotations

import threading
from functools import lru_cache

from sqlalchemy.engine import Engine

from gpumon_core import health
from gpumon_core.recorder import Recorder, State
from gpumon_core.settings import Settings, load
from gpumon_core.store import database
from gpumon_core.vitals import Vitals

_guard = threading.Lock()
_recorder: Recorder | None = None


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings in force, read once. Raises settings.SettingsError."""
    return load()


def start() -> Recorder:
    """Start this process's recorder; it deals with whatever is missing by trying again."""
    global _recorder  # noqa: PLW0603 - a process has one recorder, however many pages ask for it
    with _guard:
        if _recorder is None:
            recorder = Recorder(settings())
            _recorder = recorder
            recorder.start(patient=True)
        return _recorder


def stop() -> None:
    """Stop it, with its last tick committed."""
    global _recorder  # noqa: PLW0603
    with _guard:
        if _recorder is not None:
            _recorder.stop()
            _recorder = None


def state() -> State:
    """What the recorder is doing; without one, where its database would be."""
    if _recorder is not None:
        return _recorder.state
    chosen = settings()
    demo = chosen.source == "demo"
    return State(
        role="stopped",
        source="demo" if demo else "nvml",
        database_url=chosen.demo_database_url if demo else chosen.real_database_url,
    )


def vitals() -> Vitals | None:
    """What this process's recorder has done, in numbers; None where there is none."""
    return None if _recorder is None else _recorder.vitals


def engine() -> Engine:
    """A read-only engine on the database that is being shown now."""
    return _engine(state().database_url)


@lru_cache(maxsize=4)
def _engine(url: str) -> Engine:
    return database.open_for_reading(url)


def check_health() -> health.Health:
    """How the recording stands right now. Raises sqlalchemy.exc.DBAPIError."""
    return health.check(engine(), state(), settings().host_name, settings().interval, vitals())
