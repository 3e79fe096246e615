"""What pages ask of the store. An answer is read once for each tick, and all viewers share it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import streamlit as st
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError

from gpumon_core.legacy_import import discovery, import_state, reader, sqlite_file
from gpumon_core.legacy_import.reader import Contents
from gpumon_core.recording import runtime
from gpumon_core.recording.health import Health
from gpumon_core.store import database
from gpumon_core.store.queries import costs, processes
from gpumon_core.store.queries.usage import Scope

P = ParamSpec("P")
R = TypeVar("R")
# A database and the time of its newest sample.
Tick = tuple[str, int | None]

MINUTE_S = 60
# An answer of another tick or minute than the present one is dropped after this time.
RETAINED_S = 2 * MINUTE_S
# The most answers of one query that are retained; fewer where one has thousands of rows.
MOST_ANSWERS = 24
MOST_ANSWERS_OF: dict[Callable[..., Any], int] = {processes.process_history: 8}
# The end of a scope moves with every tick; its answer is the same for a minute.
HASHED_BY: dict[str | type[Any], Callable[[Any], Any]] = {Scope: lambda scope: scope.identity}


def shared(max_entries: int, ttl: float = RETAINED_S) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function of a tick: its results are cached, and all viewers share them. They are not copied for
    each viewer, so nobody may change one."""
    return st.cache_resource(max_entries=max_entries, ttl=ttl, show_spinner=False, hash_funcs=HASHED_BY)


def ask(at: Tick, query: Callable[Concatenate[Engine, P], R], *arguments: P.args, **named: P.kwargs) -> R:
    """The answer of a query of the store at a tick; shared, as above."""
    answer: R = _cached(query)(at, *arguments, **named)
    return answer


@cache
def _cached(query: Callable[..., Any]) -> Callable[..., Any]:
    def read(at: Tick, *arguments: Any, **named: Any) -> Any:
        return query(engine(at), *arguments, **named)

    # Streamlit knows a cache by the name of its function.
    read.__module__, read.__qualname__ = query.__module__, query.__qualname__
    return shared(MOST_ANSWERS_OF.get(query, MOST_ANSWERS))(read)


def engine(at: Tick) -> Engine:
    """For the queries of a cached view."""
    return runtime.engine(at[0])


def health() -> Health | None:
    """The state of the recording, or None where there is no database to ask yet."""
    try:
        return runtime.check_health()
    except DBAPIError:
        # The recorder makes the file and its tables; until then there is nothing to read.
        return None


def tick(found: Health) -> Tick:
    """What an answer depends on: this database, and its newest sample."""
    return found.state.database_url, found.latest


def minute(found: Health) -> Tick:
    """What an answer depends on that need not follow every tick."""
    url, newest = tick(found)
    return url, None if newest is None else newest - newest % MINUTE_S


def prices() -> costs.Prices:
    """What energy and busy GPUs cost here."""
    settings = runtime.settings()
    return costs.Prices(settings.price_per_kwh, settings.price_per_gpu_hour, settings.currency)


@shared(max_entries=4, ttl=MINUTE_S)
def database_bytes(url: str) -> int | None:
    """The size of the database on disk."""
    return database.size_bytes(engine((url, None)))


@dataclass(frozen=True, slots=True)
class OriginalFile:
    """A file of the original program in the data directory, and how much of it is imported."""

    path: Path
    contents: Contents
    state: import_state.ImportState


@shared(max_entries=2, ttl=MINUTE_S)
def originals(folder: Path, url: str, demo_url: str, host: str) -> list[OriginalFile]:
    """The files of the original program in the data directory; one that cannot be read is left out."""
    found = []
    own = [path for path in map(database.file_of, (url, demo_url)) if path is not None]
    for path in discovery.found_in(folder, own):
        with suppress(sqlite_file.SqliteFileError):
            with reader.OriginalReader(path, copying=False) as file:
                contents, indices = file.contents(), file.indices()
            state = import_state.ImportState(None, False)
            if database.exists(url):
                with suppress(DBAPIError):
                    state = import_state.import_state(engine((url, None)), host, path, indices, contents)
            found.append(OriginalFile(path, contents, state))
    return found
