"""Figures for pages, as the text that the browser draws. Each is made once per sample and view, for all
viewers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal
from zoneinfo import ZoneInfo

import streamlit as st

from gpumon_core import figures, runtime
from gpumon_core import format as fmt
from gpumon_core.figures.lanes import UNKNOWN, pack
from gpumon_core.metrics import CLOCKS_EVENT_REASONS, GPU_METRICS_BY_KEY
from gpumon_core.store import timeline, usage
from pages.ui import data

# So many bars of processes, and areas of memory, at most.
MOST_LANES = 300
MOST_AREAS = 8
POINTS_OF_A_LIFE = 600
# Ids and names, in order, as a value that a cache can compare.
Labels = tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class Look:
    """How the viewer sees a figure: the name of his time zone, and whether the page is dark."""

    zone_name: str
    dark: bool

    @property
    def zone(self) -> ZoneInfo:
        """The time zone."""
        return ZoneInfo(self.zone_name)


_LOOKS: dict[str | type[Any], Any] = {Look: lambda look: (look.zone_name, look.dark)}


@st.cache_data(max_entries=24, show_spinner=False, hash_funcs=_LOOKS)
def history(
    at: data.Tick,
    gpu_ids: tuple[int, ...],
    labels: Labels,
    metrics: tuple[str, ...],
    start: int,
    end: int,
    points: int,
    look: Look,
) -> tuple[str, bool]:
    """figures.history, and whether there is nothing in it."""
    frame = data.history(at, gpu_ids, metrics, start, end, points)
    wholes = _wholes(at, gpu_ids)
    figure = figures.history(frame, dict(labels), metrics, start, end, look.dark, wholes)
    return figures.as_json(figure), frame.empty


@st.cache_data(max_entries=24, show_spinner=False, hash_funcs=_LOOKS)
def device(
    at: data.Tick,
    gpu_id: int,
    groups: tuple[tuple[str, tuple[str, ...]], ...],
    start: int,
    end: int,
    points: int,
    look: Look,
) -> tuple[str, bool]:
    """figures.device, and whether there is nothing in it."""
    keys = tuple(key for _, group in groups for key in group)
    frame = data.history(at, (gpu_id,), keys, start, end, points)
    wholes = _wholes(at, (gpu_id,))
    figure = figures.device(frame, gpu_id, dict(groups), start, end, look.dark, wholes)
    return figures.as_json(figure), not figure["data"]


def _wholes(at: data.Tick, gpu_ids: tuple[int, ...]) -> dict[str, float]:
    """By metric, what is 100 % of it, where that is the same for all of these GPUs."""
    gpus = data.gpu_table(at)
    gpus = gpus[gpus["id"].isin(gpu_ids)]
    found = {}
    for metric in GPU_METRICS_BY_KEY.values():
        if metric.share_of is not None:
            wholes = gpus[metric.share_of].dropna().unique()
            if len(wholes) == 1:
                found[metric.key] = float(wholes[0])
    return found


@st.cache_data(max_entries=24, show_spinner=False, hash_funcs=_LOOKS)
def lanes(
    at: data.Tick,
    gpu_ids: tuple[int, ...],
    labels: Labels,
    start: int,
    end: int,
    of: Literal["process", "model"],
    look: Look,
) -> tuple[str, int, int]:
    """figures.lanes, how many bars are drawn, and how many there are."""
    frame = timeline.lanes(runtime.engine(at[0]), gpu_ids, start, end, of, MOST_LANES)
    packed = pack(frame, start, end)
    # All workloads that were ever seen, so that each keeps its colour.
    colors = figures.colors_of(data.program_values(at, "workload"), look.dark)
    colors[UNKNOWN] = figures.GREYS[look.dark][0]
    heading = "Processes" if of == "process" else "Models"
    figure = figures.lanes(packed, dict(labels), colors, start, end, look.zone, look.dark, heading)
    return figures.as_json(figure), len(packed), 0 if frame.empty else int(frame["found"].iloc[0])


@st.cache_data(max_entries=24, show_spinner=False, hash_funcs=_LOOKS)
def memory(at: data.Tick, gpu_ids: tuple[int, ...], start: int, end: int, points: int, look: Look) -> str | None:
    """figures.stacked of timeline.memory_by_process, in GiB; None where no process held any."""
    frame = timeline.memory_by_process(runtime.engine(at[0]), gpu_ids, start, end, points // 2, MOST_AREAS)
    if len(frame.columns) < 2:
        return None
    ids = [column for column in frame.columns if column not in ("timestamp_epoch", timeline.OTHERS)]
    called: dict[Any, str] = usage.labels(runtime.engine(at[0]), "process", ids) if ids else {}
    called[timeline.OTHERS] = "Others"
    wide = frame.rename(columns=called)
    # Two processes of one name and number are told apart by nothing here, and drawn as one.
    wide = wide.T.groupby(level=0, sort=False).sum().T
    parts = [name for name in wide.columns if name != "timestamp_epoch"]
    colors = figures.colors_of(parts, look.dark)
    if "Others" in colors:
        colors["Others"] = figures.GREYS[look.dark][0]
    wide[parts] /= fmt.MIB_PER_GIB
    step = int(frame["timestamp_epoch"].diff().iloc[1]) if len(frame) > 1 else 1
    figure = figures.stacked(
        wide,
        colors,
        "GiB",
        look.dark,
        step,
        within=(start, end),
        height=280,
        heading="Memory by process (GiB)",
    )
    return figures.as_json(figure)


@st.cache_data(max_entries=24, show_spinner=False, hash_funcs=_LOOKS)
def throttling(at: data.Tick, gpu_id: int, start: int, end: int, look: Look) -> tuple[str, bool]:
    """figures.reasons, and whether there is nothing in it."""
    frame = timeline.throttling(runtime.engine(at[0]), gpu_id, start, end)
    warning, calm = ("#f0b429", "#4a535e") if look.dark else ("#d08700", "#b6bfc8")
    names = {reason.label: warning if reason.throttles else calm for reason in CLOCKS_EVENT_REASONS}
    names["Power cap"] = figures.color(0, look.dark)
    figure = figures.reasons(frame, names, start, end, look.zone, look.dark, "Why clocks are not higher")
    return figures.as_json(figure), frame.empty


@st.cache_data(max_entries=24, show_spinner=False, hash_funcs=_LOOKS)
def life(at: data.Tick, process_id: int, look: Look) -> tuple[str | None, bool]:
    """figures.life of one process, None where nothing of it is kept; and whether its points are means of hours."""
    frame, by_hour = timeline.life(runtime.engine(at[0]), process_id, POINTS_OF_A_LIFE)
    if frame.empty:
        return None, by_hour
    labels = usage.labels(runtime.engine(at[0]), "gpu", [])
    start, end = int(frame["timestamp_epoch"].min()), int(frame["timestamp_epoch"].max())
    figure = figures.life(frame, labels, start, max(end, start + 1), look.dark)
    return figures.as_json(figure), by_hour
