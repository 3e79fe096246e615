"""The columns of usage, idle processes and model sessions in files and answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from gpumon_core.export.processes import GPU, HOUR_S, PROGRAM
from gpumon_core.export.tables import FLAG, MOMENT, NUMBER, TEXT, WHOLE, Column, Table, plain, scaled
from gpumon_core.format import JOULES_PER_KWH, MIB_PER_GIB
from gpumon_core.store.queries.costs import Prices, called, shares


def named(ranking: pd.DataFrame, names: Mapping[Any, str]) -> pd.DataFrame:
    """A usage.ranking with all of its rows, as ranking_table needs it."""
    return ranking.assign(called=called(ranking, names), share=shares(ranking))


def together(named_ranking: pd.DataFrame) -> pd.DataFrame:
    """One row with the sums of all rows of `named`."""
    return named_ranking.sum(numeric_only=True).to_frame().T.assign(called="", kind="", key=None)


def ranking_table(prices: Prices) -> Table:
    """For frames of usage.ranking with `called` (costs.called) and `share` (costs.shares).

    It has the same columns whatever has a price: `cost` is None where nothing has.
    """

    def cost(frame: pd.DataFrame) -> pd.Series:
        found = prices.cost(frame["energy_j"], frame["busy_s"]).round(6)
        return found if prices.known else found * float("nan")

    return Table(
        (
            plain("name", "Name", TEXT, "called", sure=True),
            plain("kind", "Kind", TEXT, sure=True),
            Column("key", "Key", TEXT, _key),
            plain("processes", "Processes", WHOLE),
            scaled("gpu_hours", "GPU-hours", "h", "busy_s", HOUR_S, 6),
            scaled("memory_gib_hours", "Memory-hours", "GiB h", "memory_mib_s", MIB_PER_GIB * HOUR_S, 6),
            scaled("energy_kwh", "Energy", "kWh", "energy_j", JOULES_PER_KWH, 9),
            scaled("energy_share_percent", "Share", "% of energy", "share", 1, 3),
            scaled("on_gpu_s", "On GPU", "s", "seconds", 1, 1),
            scaled("held_idle_s", "Held idle", "s", "idle_s", 1, 1),
            Column("cost", "Cost", NUMBER, cost, prices.currency),
            Column("estimated", "Estimate", FLAG, lambda frame: frame["estimated"] > 0, sure=True),
        )
    )


def _key(frame: pd.DataFrame) -> pd.Series:
    """The key of each part, as text: None where not known, and for the GPUs' own rows."""
    pairs = zip(frame["kind"], frame["key"], strict=True)
    texts = [str(key) if kind == "part" and pd.notna(key) else None for kind, key in pairs]
    return pd.Series(texts, index=frame.index, dtype="object")


# For frames of model_sessions.loaded.
SESSIONS = Table(
    (
        plain("model", "Model", TEXT, sure=True),
        plain("host", "Host", TEXT, sure=True),
        GPU,
        plain("loaded", "Loaded", MOMENT, "first_seen", sure=True),
        plain("last_seen", "Last seen", MOMENT, sure=True),
        plain("lifetime_s", "Loaded for", WHOLE, unit="s", sure=True),
        plain("running", "Still loaded", FLAG, sure=True),
        plain("max_memory_mib", "Maximum memory", WHOLE, "max_memory", "MiB"),
        scaled("avg_memory_mib", "Average memory", "MiB", "avg_memory", 1, 1),
        plain("workload", "Workload", TEXT),
        plain("name", "Name", TEXT),
        plain("pid", "PID", WHOLE, sure=True),
        plain("user", "User", TEXT, "username"),
        plain("gpu_id", "Id of the GPU in gpumon", WHOLE, sure=True),
        plain("process_id", "Id of the process in gpumon", WHOLE, sure=True),
        plain("session_id", "Id in gpumon", WHOLE, sure=True),
    )
)

# For frames of usage.idle_holders.
IDLE = Table(
    (
        plain("host", "Host", TEXT, sure=True),
        GPU,
        plain("pid", "PID", WHOLE, sure=True),
        plain("name", "Name", TEXT),
        plain("user", "User", TEXT, "username"),
        plain("running", "Running", FLAG, sure=True),
        scaled("memory_mib", "Memory held", "MiB", "memory", 1, 1),
        # Exact to the second, although a frame has floats where some are not known.
        Column("idle_since", "Idle since", MOMENT, lambda frame: frame["idle_since"].astype("Int64")),
        scaled("idle_s", "Held idle", "s", "idle_s", 1, 0),
        scaled("memory_wasted_gib_hours", "Memory wasted", "GiB h", "wasted_mib_s", MIB_PER_GIB * HOUR_S, 3),
        *(plain(column, title, TEXT) for title, column in PROGRAM.items()),
    )
)


def time_split(shown: pd.DataFrame) -> Table:
    """For a frame of each GPU's time: its name in the column GPU, and hours in the others."""
    return Table(
        tuple(plain(name, name, *((TEXT,) if name == "GPU" else (NUMBER, "", "h"))) for name in shown.columns)
    )
