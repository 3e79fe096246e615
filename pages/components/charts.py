"""Charts over time: metrics, processes and memory under each other on one axis, which zooms as one.

Each figure is drawn once a tick and view, for all viewers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple
from zoneinfo import ZoneInfo

import pandas as pd
import streamlit as st

from gpumon_core import figures
from gpumon_core import format as fmt
from gpumon_core.figures.history import SEVERAL
from gpumon_core.figures.lanes import UNKNOWN, pack
from gpumon_core.metrics import CLOCKS_EVENT_REASONS, GPU_METRICS, GPU_METRICS_BY_KEY, Group
from gpumon_core.recording.health import Health
from gpumon_core.store.queries import frames, occupancy, process_life, processes, usage
from gpumon_core.store.queries.history import metrics_history
from gpumon_core.store.queries.process_filter import ProcessFilter
from pages.components import chrome, data, filters, plot

# Steps of a line: about one for every second pixel of a wide screen, and of many GPUs' lines for every third.
POINTS, POINTS_OF_MANY = 600, 400
# The most bars of processes, and areas of memory.
MOST_LANES = 300
MOST_AREAS = 8
SELDOM_S = 60.0
# Memory by process is added up from the hours, and a year has too many hours.
LONGEST_STACK_S = 31 * filters.DAY
# A set of bits is no line; the page of a GPU has its reasons.
UNDRAWN = ("clocks_event_reasons",)
# Ids and names, in order, as a value that a cache can compare.
GpuLabels = tuple[tuple[int, str], ...]
Lanes = Literal["process", "model"]


class Appearance(NamedTuple):
    """How the viewer sees a figure: the name of the time zone, and whether the page is dark."""

    zone_name: str
    dark: bool

    @property
    def zone(self) -> ZoneInfo:
        """The time zone."""
        return ZoneInfo(self.zone_name)


def appearance() -> Appearance:
    """How the viewer of this run sees figures."""
    return Appearance(chrome.zone().key, chrome.is_dark())


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is drawn. `labels` names every GPU of the installation by id, in the order that fixes the colours."""

    gpu_ids: tuple[int, ...]
    labels: Mapping[int, str]
    metrics: tuple[str, ...]
    lanes: Lanes | None
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
    seen = appearance()
    drawn: list[str] = []
    notes: list[str] = []
    if chosen.metrics:
        points = POINTS if len(chosen.gpu_ids) <= SEVERAL else POINTS_OF_MANY
        labels = tuple(chosen.labels.items())
        text, is_empty = _history(at, chosen.gpu_ids, labels, chosen.metrics, start, end, points, seen.dark)
        if is_empty:
            notes.append("These GPUs have no samples in this time range: choose a longer one.")
        drawn.append(text)
    _add_processes(chosen, at, start, end, seen, drawn, notes)
    names = [chosen.labels[gpu_id] for gpu_id in chosen.gpu_ids]
    what = [GPU_METRICS_BY_KEY[metric].label for metric in chosen.metrics]
    _show(drawn, notes, window, end, key, _alt(what, names, window), f"{chosen.metrics} {chosen.gpu_ids}")


def device(
    now: Health, window: filters.Window, gpu_id: int, labels: Mapping[int, str], groups: Sequence[str]
) -> None:
    """Draw one GPU's metrics by groups, why its clocks are not higher, and its processes."""
    at, start, end = _when(now, window)
    seen = appearance()
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
        text, is_empty = _device(at, gpu_id, tuple(keys.items()), start, end, seen.dark)
        if is_empty:
            notes.append("This GPU has no samples in this time range: choose a longer one.")
        else:
            drawn.append(text)
    text, is_empty = _throttling(at, gpu_id, start, end, seen)
    if not is_empty:
        drawn.append(text)
    _add_processes(Chosen((gpu_id,), labels, (), "process", True), at, start, end, seen, drawn, notes)
    alt = _alt(list(keys), [labels[gpu_id]], window)
    _show(drawn, notes, window, end, "device", alt, f"{gpu_id} {groups}")


def life(at: data.Tick, process_id: int, first: int, last: int, name: str) -> bool:
    """Draw a process from when it was first seen to when it was last seen, where something of it is stored;
    whether the points are means of hours."""
    text, by_hour = _life(at, process_id, first, last, chrome.is_dark())
    if text is not None:
        alt = f"Memory and utilization of {name} over its life"
        plot.show([text], key="life", alt=alt, view=str(process_id))
    return by_hour


def _when(now: Health, window: filters.Window) -> tuple[data.Tick, int, int]:
    """What a figure depends on, and from when to when it is."""
    assert now.latest is not None
    start, end = window.span(now.latest)
    # What lies in the past is the same for a minute, however many samples come.
    recent = window.follows or end > now.latest - filters.MINUTE
    return (data.tick(now) if recent else data.minute(now)), start, end


def _add_processes(
    chosen: Chosen, at: data.Tick, start: int, end: int, seen: Appearance, drawn: list[str], notes: list[str]
) -> None:
    """Add the processes, and what the reader should know about them."""
    if chosen.lanes:
        labels = tuple(chosen.labels.items())
        text, shown, found = _lanes(at, chosen.gpu_ids, labels, start, end, chosen.lanes, seen)
        what = "processes" if chosen.lanes == "process" else "model sessions"
        if found == 0:
            notes.append(f"No {what} in this time range.")
        else:
            drawn.append(text)
        if shown < found:
            notes.append(f"The {shown:,} largest of {found:,} {what} are drawn.")
    if chosen.memory_by_process:
        if end - start > LONGEST_STACK_S:
            notes.append("Memory by process is drawn for a month at most; the Usage page has more.")
        elif (areas := _memory(at, chosen.gpu_ids, start, end, seen.dark)) is not None:
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


@data.shared(max_entries=24)
def _history(
    at: data.Tick,
    gpu_ids: tuple[int, ...],
    labels: GpuLabels,
    metrics: tuple[str, ...],
    start: int,
    end: int,
    points: int,
    dark: bool,
) -> tuple[str, bool]:
    """figures.history, and whether it is empty."""
    frame = metrics_history(data.engine(at), gpu_ids, metrics, start, end, points)
    figure = figures.history(frame, dict(labels), metrics, start, end, dark, _totals(at, gpu_ids))
    return figures.as_json(figure), frame.empty


@data.shared(max_entries=24)
def _device(
    at: data.Tick,
    gpu_id: int,
    groups: tuple[tuple[str, tuple[str, ...]], ...],
    start: int,
    end: int,
    dark: bool,
) -> tuple[str, bool]:
    """figures.device, and whether it is empty."""
    keys = tuple(key for _, group in groups for key in group)
    frame = metrics_history(data.engine(at), (gpu_id,), keys, start, end, POINTS)
    figure = figures.device(frame, gpu_id, dict(groups), start, end, dark, _totals(at, (gpu_id,)))
    return figures.as_json(figure), not figure["data"]


def _totals(at: data.Tick, gpu_ids: tuple[int, ...]) -> dict[str, float]:
    """By metric, what 100 % of it is, where that is the same for all of these GPUs."""
    gpus = data.ask(at, frames.gpu_table)
    gpus = gpus[gpus["id"].isin(gpu_ids)]
    found = {}
    for metric in GPU_METRICS_BY_KEY.values():
        if metric.share_of is not None:
            totals = gpus[metric.share_of].dropna().unique()
            if len(totals) == 1:
                found[metric.key] = float(totals[0])
    return found


@data.shared(max_entries=24)
def _lanes(
    at: data.Tick, gpu_ids: tuple[int, ...], labels: GpuLabels, start: int, end: int, of: Lanes, seen: Appearance
) -> tuple[str, int, int]:
    """figures.lanes, how many bars are drawn, and how many there are."""
    frame = occupancy.lanes(data.engine(at), gpu_ids, start, end, of, MOST_LANES)
    packed = pack(frame, start, end)
    # All workloads that were ever seen, so that each keeps its colour.
    colors = figures.colors_of(data.ask(at, processes.workloads), seen.dark)
    colors[UNKNOWN] = figures.GREYS[seen.dark][0]
    heading = "Processes" if of == "process" else "Models"
    figure = figures.lanes(packed, dict(labels), colors, start, end, seen.zone, seen.dark, heading)
    return figures.as_json(figure), len(packed), 0 if frame.empty else int(frame["found"].iloc[0])


@data.shared(max_entries=24)
def _memory(at: data.Tick, gpu_ids: tuple[int, ...], start: int, end: int, dark: bool) -> str | None:
    """figures.stacked of occupancy.memory_by_process, in GiB; None where no process held any."""
    engine = data.engine(at)
    frame = occupancy.memory_by_process(engine, gpu_ids, start, end, POINTS // 2, MOST_AREAS)
    if len(frame.columns) < 2:
        return None
    ids = [column for column in frame.columns if column not in ("timestamp_epoch", occupancy.OTHER_PROCESSES)]
    names: dict[Any, str] = usage.labels(engine, "process", ids) if ids else {}
    names[occupancy.OTHER_PROCESSES] = "Others"
    wide = frame.rename(columns=names)
    # Nothing here distinguishes two processes of one name and number: they are drawn as one.
    wide = wide.T.groupby(level=0, sort=False).sum().T
    parts = [name for name in wide.columns if name != "timestamp_epoch"]
    # As in the lanes above it, where each workload has its colour.
    rows = processes.process_history(engine, ProcessFilter(process_ids=tuple(map(int, ids))))
    workloads = dict(zip(rows["process_id"].map(names), rows["workload"], strict=True))
    known = figures.colors_of(data.ask(at, processes.workloads), dark)
    colors = figures.shades({part: workloads.get(part) for part in parts}, known, dark)
    wide[parts] /= fmt.MIB_PER_GIB
    step = int(frame["timestamp_epoch"].diff().iloc[1]) if len(frame) > 1 else 1
    heading = "Memory by process (GiB)"
    figure = figures.stacked(wide, colors, "GiB", dark, step, within=(start, end), height=280, heading=heading)
    return figures.as_json(figure)


@data.shared(max_entries=24)
def _throttling(at: data.Tick, gpu_id: int, start: int, end: int, seen: Appearance) -> tuple[str, bool]:
    """figures.reasons, and whether it is empty."""
    frame = occupancy.throttling(data.engine(at), gpu_id, start, end)
    warning, calm = ("#f0b429", "#4a535e") if seen.dark else ("#d08700", "#b6bfc8")
    names = {reason.label: warning if reason.throttles else calm for reason in CLOCKS_EVENT_REASONS}
    names["Power cap"] = figures.color(0, seen.dark)
    figure = figures.reasons(frame, names, start, end, seen.zone, seen.dark, "Why clocks are not higher")
    return figures.as_json(figure), frame.empty


@data.shared(max_entries=24)
def _life(at: data.Tick, process_id: int, first: int, last: int, dark: bool) -> tuple[str | None, bool]:
    """figures.life, None where nothing is stored of it; and whether its points are means of hours."""
    frame, by_hour = process_life.steps(data.engine(at), process_id, POINTS)
    if frame.empty:
        return None, by_hour
    labels = data.ask(at, usage.labels, "gpu", ())
    # Its first hour may have begun before it came.
    frame["timestamp_epoch"] = frame["timestamp_epoch"].clip(first, max(first, last))
    figure = figures.life(frame, labels, first, max(last, first + 1), dark)
    return figures.as_json(figure), by_hour
