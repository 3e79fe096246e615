"""Reading for pages. A result is kept until the next tick, so that all viewers share one query."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pandas as pd
import streamlit as st
from sqlalchemy.exc import DBAPIError

from gpumon_core.legacy_import import discovery, import_state, reader, sqlite_file
from gpumon_core.legacy_import.reader import Contents
from gpumon_core.recording import runtime
from gpumon_core.recording.health import Health
from gpumon_core.store import database
from gpumon_core.store.queries import costs, current, frames, processes, usage
from gpumon_core.store.queries.dimensions import Dimension
from gpumon_core.store.queries.processes import ProcessFilter
from gpumon_core.store.queries.usage import Scope
from pages.components import cards

P = ParamSpec("P")
R = TypeVar("R")
# A database and the time of its newest sample.
Tick = tuple[str, int | None]

MINUTE_S = 60
# How long a result is kept that nobody needs any more: one of another tick or minute than the present.
KEPT_S = 2 * MINUTE_S
TREND_S = 900
TREND_POINTS = 90
# How often they are drawn anew; their ends follow the tick.
TREND_EVERY_S = 20


def shared(
    max_entries: int, ttl: float = KEPT_S, hash_funcs: dict[str | type[Any], Callable[[Any], Any]] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Of a function that gets a tick: its results are kept, and all viewers share them. They are not copied for
    each of them, so nobody may change what he gets."""
    return st.cache_resource(max_entries=max_entries, ttl=ttl, show_spinner=False, hash_funcs=hash_funcs)


def health() -> Health | None:
    """How the recording stands, or None where there is no database to ask yet."""
    try:
        return runtime.check_health()
    except DBAPIError:
        # The recorder makes the file and its tables; until then there is nothing to read.
        return None


def tick(found: Health) -> Tick:
    """What a cached result is good for: this database, and its newest sample."""
    return found.state.database_url, found.latest


def minute(found: Health) -> Tick:
    """What a result is good for that need not follow every tick."""
    url, newest = tick(found)
    return url, None if newest is None else newest - newest % MINUTE_S


def prices() -> costs.Prices:
    """What energy and busy GPUs cost here."""
    settings = runtime.settings()
    return costs.Prices(settings.price_per_kwh, settings.price_per_gpu_hour, settings.currency)


@shared(max_entries=4)
def hosts(at: Tick) -> list[current.Row]:
    """store.now.hosts at a tick."""
    return current.hosts(runtime.engine(at[0]))


@shared(max_entries=4)
def gpus(at: Tick) -> list[current.Row]:
    """store.now.gpus at a tick."""
    return current.gpus(runtime.engine(at[0]))


@shared(max_entries=4)
def gpu_table(at: Tick) -> pd.DataFrame:
    """frames.gpu_table at a tick."""
    return frames.as_gpu_table(gpus(at))


@shared(max_entries=4)
def active_processes(at: Tick) -> list[current.Row]:
    """store.now.processes at a tick."""
    return current.processes(runtime.engine(at[0]))


@shared(max_entries=4)
def overview_html(at: Tick) -> str:
    """The overview's machines and cards at a tick, drawn once for all viewers."""
    shown = gpus(at)
    return cards.host_line(hosts(at), shown) + _cards(at, shown, TREND_POINTS)


@shared(max_entries=16)
def gpu_card_html(at: Tick, gpu_id: int) -> str:
    """One GPU's card, with its MIG instances."""
    several = len({row["host"] for row in gpus(at)}) > 1
    mine = [row for row in gpus(at) if gpu_id in (row["id"], row["parent_id"])]
    return _cards(at, mine, 2 * TREND_POINTS, several)


def _cards(at: Tick, shown: list[current.Row], points: int, with_host: bool | None = None) -> str:
    end = at[1] or int(time.time())
    known = {row["id"] for row in shown}
    # A MIG instance on its GPU's card has no trends.
    whole = [row for row in shown if row["parent_id"] not in known]
    sparks = _sparks((at[0], end // TREND_EVERY_S), tuple(row["id"] for row in whole), points, end, whole)
    return cards.overview(shown, sparks, active_processes(at), workloads(at), end, with_host)


@shared(max_entries=16)
def _sparks(
    step: Tick, gpu_ids: tuple[int, ...], points: int, _end: int, _gpus: list[current.Row]
) -> dict[int, dict[str, cards.Spark]]:
    """The cards' trends, read and drawn once for each of their steps."""
    span = (_end - TREND_S, _end)
    trend = frames.history(runtime.engine(step[0]), gpu_ids, cards.TREND_METRICS, *span, points)
    return cards.sparks(_gpus, trend, span)


@shared(max_entries=4)
def history(
    at: Tick, gpu_ids: Sequence[int], metrics: Sequence[str], start: int, end: int, points: int
) -> pd.DataFrame:
    """frames.history at a tick."""
    return frames.history(runtime.engine(at[0]), gpu_ids, metrics, start, end, points)


@shared(max_entries=32)
def process_count(at: Tick, wanted: ProcessFilter) -> int:
    """processes.count at a tick."""
    return processes.count(runtime.engine(at[0]), wanted)


@shared(max_entries=8)
def process_history(at: Tick, wanted: ProcessFilter, total: int, most: int) -> pd.DataFrame:
    """The newest `most` rows of processes.process_history at a tick, of which there are `total`."""
    # A few rows are found fastest by what they are, many by when they were.
    return processes.process_history(runtime.engine(at[0]), wanted, most if total > most else None)


@shared(max_entries=8)
def these_processes(at: Tick, process_ids: tuple[int, ...]) -> pd.DataFrame:
    """Some rows of processes.process_history at a tick, as far as they are still there."""
    return processes.process_history(runtime.engine(at[0]), ProcessFilter(process_ids=process_ids))


@shared(max_entries=16)
def one_process(at: Tick, process_id: int) -> pd.DataFrame:
    """One row of processes.process_history at a tick; none where it is forgotten."""
    return processes.process_history(runtime.engine(at[0]), ProcessFilter(process_ids=(process_id,)))


@shared(max_entries=16)
def sessions_of(at: Tick, process_id: int) -> pd.DataFrame:
    """usage.sessions of one process at a tick."""
    return usage.sessions_of(runtime.engine(at[0]), process_id)


# A scope's end moves with every tick; what is read of it is the same for a minute.
SCOPES: dict[str | type[Any], Callable[[Any], Any]] = {Scope: lambda scope: scope.identity}


@shared(max_entries=24, hash_funcs=SCOPES)
def usage_ranking(at: Tick, by: Dimension, scope: Scope) -> pd.DataFrame:
    """usage.ranking at a minute."""
    return usage.ranking(runtime.engine(at[0]), by, scope)


@shared(max_entries=24, hash_funcs=SCOPES)
def usage_trend(at: Tick, by: Dimension, scope: Scope, keys: Sequence[Any] | None) -> pd.DataFrame:
    """usage.trend at a minute."""
    return usage.trend(runtime.engine(at[0]), by, scope, keys)


def usage_labels(at: Tick, by: Dimension, ranking: pd.DataFrame) -> dict[Any, str]:
    """usage.labels of a ranking's keys at a minute."""
    keys = ranking.loc[ranking["kind"] == "part", "key"].dropna()
    return _usage_labels(at, by, tuple(keys))


@shared(max_entries=24)
def _usage_labels(at: Tick, by: Dimension, keys: Sequence[Any]) -> dict[Any, str]:
    return usage.labels(runtime.engine(at[0]), by, keys)


@shared(max_entries=24, hash_funcs=SCOPES)
def gpu_totals(at: Tick, scope: Scope) -> pd.DataFrame:
    """usage.gpu_totals at a minute."""
    return usage.gpu_totals(runtime.engine(at[0]), scope)


@shared(max_entries=24, hash_funcs=SCOPES)
def gpu_hours(at: Tick, scope: Scope) -> pd.DataFrame:
    """usage.gpu_hours at a minute."""
    return usage.gpu_hours(runtime.engine(at[0]), scope)


@shared(max_entries=24, hash_funcs=SCOPES)
def idle_holders(at: Tick, scope: Scope, idle_s: float) -> pd.DataFrame:
    """usage.idle_holders at a minute."""
    return usage.idle_holders(runtime.engine(at[0]), scope, idle_s)


@shared(max_entries=24, hash_funcs=SCOPES)
def model_sessions(at: Tick, scope: Scope) -> pd.DataFrame:
    """usage.sessions at a minute."""
    return usage.sessions(runtime.engine(at[0]), scope)


@shared(max_entries=4)
def recorder_history(at: Tick, host: str, start: int, end: int) -> pd.DataFrame:
    """frames.health_history at a tick."""
    return frames.health_history(runtime.engine(at[0]), host, start, end)


@shared(max_entries=4)
def resolutions(at: Tick) -> pd.DataFrame:
    """frames.resolutions at a tick."""
    return frames.resolutions(runtime.engine(at[0]))


@shared(max_entries=4, ttl=60)
def database_bytes(url: str) -> int | None:
    """What the database takes on disk."""
    return database.size_bytes(runtime.engine(url))


@shared(max_entries=4)
def usernames(at: Tick) -> list[str]:
    """processes.usernames at a tick."""
    return processes.usernames(runtime.engine(at[0]))


@shared(max_entries=4)
def containers(at: Tick) -> list[str]:
    """processes.containers at a tick."""
    return processes.containers(runtime.engine(at[0]))


@shared(max_entries=8)
def program_values(at: Tick, column: str) -> list[str]:
    """processes.program_values at a tick."""
    return processes.program_values(runtime.engine(at[0]), column)


@shared(max_entries=4)
def workloads(at: Tick) -> list[str]:
    """processes.workloads at a tick."""
    return processes.workloads(runtime.engine(at[0]))


@dataclass(frozen=True, slots=True)
class Found:
    """A file of the original's in the data directory, and how much of it the history has."""

    path: Path
    contents: Contents
    standing: import_state.ImportState


@shared(max_entries=2, ttl=60)
def originals(folder: Path, url: str, demo_url: str, host: str) -> list[Found]:
    """What lies in the data directory for an import into a database; a file that cannot be read is none."""
    found = []
    own = [path for path in map(database.file_of, (url, demo_url)) if path is not None]
    for path in discovery.found_in(folder, own):
        with suppress(sqlite_file.SqliteFileError):
            with reader.OriginalReader(path, copying=False) as file:
                contents, indices = file.contents(), file.indices()
            standing = import_state.ImportState(None, False)
            if database.exists(url):
                with suppress(DBAPIError):
                    standing = import_state.import_state(runtime.engine(url), host, path, indices, contents)
            found.append(Found(path, contents, standing))
    return found
