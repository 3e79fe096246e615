"""The sidebar's filters; their values live in the page's address."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from gpumon_core.store.frames import gpu_labels
from pages.ui import data

MINUTE, HOUR, DAY = 60, 3600, 86400
RANGES = {
    "15m": 15 * MINUTE,
    "30m": 30 * MINUTE,
    "1h": HOUR,
    "6h": 6 * HOUR,
    "12h": 12 * HOUR,
    "24h": DAY,
    "3d": 3 * DAY,
    "7d": 7 * DAY,
    "30d": 30 * DAY,
    "1y": 365 * DAY,
}


def named_gpus(gpus: pd.DataFrame) -> dict[str, int]:
    """Every GPU's short name ("GPU 0", "GPU 0:1", "rack1 GPU 0" where there are several hosts) and id."""
    names = "GPU " + gpu_labels(gpus["gpu_index"], gpus["mig_index"])
    if gpus["host"].nunique() > 1:
        names = gpus["host"] + " " + names
    return dict(zip(names, gpus["id"].astype(int), strict=True))


def gpu_filter(gpus: pd.DataFrame) -> list[str]:
    """The names of the chosen GPUs; none chosen means all of them."""
    return st.sidebar.multiselect(
        "GPUs", list(named_gpus(gpus)), placeholder="All GPUs", key="gpu", bind="query-params"
    )


def user_filter(at: data.Tick) -> list[str]:
    """The chosen users; none chosen means all of them."""
    return st.sidebar.multiselect(
        "Users", data.usernames(at), placeholder="All users", key="user", bind="query-params"
    )


def program_filters(at: data.Tick, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """For each of some columns of `programs`, the chosen values; those of which none is chosen are missing."""
    chosen = {
        name: st.sidebar.multiselect(
            f"{name.capitalize()}s",
            data.program_values(at, name),
            placeholder=f"All {name}s",
            key=name,
            bind="query-params",
        )
        for name in names
    }
    return {name: tuple(values) for name, values in chosen.items() if values}


def range_filter(ranges: dict[str, int | None], default: str, label: str = "Time range") -> str:
    """The name of the chosen time range."""
    names = list(ranges)
    chosen = st.sidebar.pills(label, names, default=default, key="range", bind="query-params", required=True)
    return chosen if chosen in ranges else default
