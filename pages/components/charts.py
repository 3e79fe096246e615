"""Charts over time: metrics, processes and memory under each other on one axis, which zooms as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import pandas as pd
import streamlit as st

from gpumon_core import format as fmt
from gpumon_core.figures.history import SEVERAL
from gpumon_core.metrics import GPU_METRICS, GPU_METRICS_BY_KEY, Group
from gpumon_core.recording.health import Health
from pages.components import chrome, data, drawings, filters, plot

# Steps of a line: about one for every second pixel of a wide screen, and of many GPUs' lines for every third.
POINTS, POINTS_OF_MANY = 600, 400
SELDOM_S = 60.0
# Memory by process is added up from the hours, of which a year has too many.
LONGEST_STACK_S = 31 * filters.DAY
# A set of bits is no line; the page of a GPU has its reasons.
UNDRAWN = ("clocks_event_reasons",)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is drawn. `labels` names every GPU of the installation by id, in the order that fixes the colours."""

    gpu_ids: tuple[int, ...]
    labels: Mapping[int, str]
    metrics: tuple[str, ...]
    lanes: Literal["process", "model"] | None
    memory_by_process: bool


def offered(gpus: pd.DataFrame) -> dict[str, str]:
    """The metrics that at least one GPU has, by label."""
    return {
        metric.label: metric.key
        for metric in GPU_METRICS
        if metric.key not in UNDRAWN and gpus[metric.key].notna().any()
    }


def refresh_s(window: filters.Window) -> float:
    """How often a chart of that window has something new to show; its page looks once a minute all the same."""
    if not window.follows or window.length_s is None:
        return SELDOM_S
    return min(SELDOM_S, window.length_s / POINTS)


def over_time(now: Health, window: filters.Window, chosen: Chosen, key: str) -> None:
    """Draw what is chosen within the window."""
    at, start, end = _when(now, window)
    look = drawings.look()
    drawn: list[str] = []
    notes: list[str] = []
    labels = tuple(chosen.labels.items())
    if chosen.metrics:
        points = POINTS if len(chosen.gpu_ids) <= SEVERAL else POINTS_OF_MANY
        text, empty = drawings.history(at, chosen.gpu_ids, labels, chosen.metrics, start, end, points, look)
        if empty:
            notes.append("These GPUs have no samples in this time range: choose a longer one.")
        drawn.append(text)
    _who(chosen, at, start, end, look, drawn, notes)
    names = [chosen.labels[gpu_id] for gpu_id in chosen.gpu_ids]
    what = [GPU_METRICS_BY_KEY[metric].label for metric in chosen.metrics]
    _show(drawn, notes, window, end, key, _alt(what, names, window), f"{chosen.metrics} {chosen.gpu_ids}")


def device(
    now: Health, window: filters.Window, gpu_id: int, labels: Mapping[int, str], groups: Sequence[str]
) -> None:
    """Draw one GPU's metrics by groups, why its clocks are not higher, and who was on it."""
    at, start, end = _when(now, window)
    look = drawings.look()
    drawn: list[str] = []
    notes: list[str] = []
    keys = {
        str(group): tuple(
            metric.key for metric in GPU_METRICS if metric.group is group and metric.key not in UNDRAWN
        )
        for group in Group
        if str(group) in groups
    }
    if keys:
        text, empty = drawings.device(at, gpu_id, tuple(keys.items()), start, end, POINTS, look)
        if empty:
            notes.append("This GPU has no samples in this time range: choose a longer one.")
        else:
            drawn.append(text)
    text, empty = drawings.throttling(at, gpu_id, start, end, look)
    if not empty:
        drawn.append(text)
    chosen = Chosen((gpu_id,), labels, (), "process", True)
    _who(chosen, at, start, end, look, drawn, notes)
    alt = _alt(list(keys), [labels[gpu_id]], window)
    _show(drawn, notes, window, end, "device", alt, f"{gpu_id} {groups}")


def _when(now: Health, window: filters.Window) -> tuple[data.Tick, int, int]:
    """What a drawing is good for, and from when to when it is."""
    assert now.latest is not None
    start, end = window.span(now.latest)
    # What lies in the past is the same for a minute, however many samples come.
    recent = window.follows or end > now.latest - filters.MINUTE
    return (data.tick(now) if recent else data.minute(now)), start, end


def _who(
    chosen: Chosen, at: data.Tick, start: int, end: int, look: drawings.Look, drawn: list[str], notes: list[str]
) -> None:
    """Add who was there, and what the reader should know of it."""
    labels = tuple(chosen.labels.items())
    if chosen.lanes:
        text, shown, of = drawings.lanes(at, chosen.gpu_ids, labels, start, end, chosen.lanes, look)
        what = "processes" if chosen.lanes == "process" else "model sessions"
        if of == 0:
            notes.append(f"No {what} in this time range.")
        else:
            drawn.append(text)
        if shown < of:
            notes.append(f"The {shown:,} largest of {of:,} {what} are drawn.")
    if chosen.memory_by_process:
        if end - start > LONGEST_STACK_S:
            notes.append("Memory by process is drawn for a month at most; the Usage page has more.")
        elif (areas := drawings.memory(at, chosen.gpu_ids, start, end, POINTS, look)) is not None:
            drawn.append(areas)


def _show(
    drawn: list[str], notes: list[str], window: filters.Window, end: int, key: str, alt: str, view: str
) -> None:
    plot.show(
        drawn,
        key=key,
        alt=alt,
        view=f"{window.name} {window.start} {window.end} {view}",
        on_zoom=lambda: filters.zoom(key),
    )
    until = datetime.fromtimestamp(end, chrome.zone()).strftime("%a %d %b %Y, %H:%M:%S")
    # As it is, Streamlit would load its emoji for the colons.
    when = fmt.plain(f"{until} ({chrome.zone_label()})")
    notes.append(f"Up to {when}. Drag across a chart with the mouse to zoom in, double-click to go back.")
    st.caption(" ".join(notes))


def _alt(what: Sequence[str], names: Sequence[str], window: filters.Window) -> str:
    return f"{', '.join(what) or 'Processes'} of {', '.join(names)} over {window.says()}"
