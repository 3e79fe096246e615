"""Figures for pages, as the text that the browser draws. Each is made once per sample and view, for all
viewers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal
from zoneinfo import ZoneInfo

import pandas as pd

from gpumon_core import figures
from gpumon_core import format as fmt
from gpumon_core.figures.lanes import UNKNOWN, pack
from gpumon_core.metrics import CLOCKS_EVENT_REASONS, GPU_METRICS_BY_KEY
from gpumon_core.recording import runtime
from gpumon_core.store.queries import costs, occupancy, usage
from gpumon_core.store.queries.dimensions import Dimension
from gpumon_core.store.queries.usage import OWN, Scope
from pages.components import chrome, data, filters, tables

# So many bars of processes, and areas of memory, at most.
MOST_LANES = 300
MOST_AREAS = 8
POINTS_OF_A_LIFE = 600
# So many parts of the ledger are drawn apart from each other.
TOP_PARTS = 7
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


def look() -> Look:
    """How the viewer of this run sees figures."""
    return Look(chrome.zone().key, chrome.is_dark())


_LOOKS: dict[str | type[Any], Any] = {Look: lambda look: (look.zone_name, look.dark)}
_SCOPED_LOOKS = _LOOKS | data.SCOPES


@data.shared(max_entries=24, hash_funcs=_LOOKS)
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


@data.shared(max_entries=24, hash_funcs=_LOOKS)
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


@data.shared(max_entries=24, hash_funcs=_LOOKS)
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
    frame = occupancy.lanes(runtime.engine(at[0]), gpu_ids, start, end, of, MOST_LANES)
    packed = pack(frame, start, end)
    # All workloads that were ever seen, so that each keeps its colour.
    colors = figures.colors_of(data.workloads(at), look.dark)
    colors[UNKNOWN] = figures.GREYS[look.dark][0]
    heading = "Processes" if of == "process" else "Models"
    figure = figures.lanes(packed, dict(labels), colors, start, end, look.zone, look.dark, heading)
    return figures.as_json(figure), len(packed), 0 if frame.empty else int(frame["found"].iloc[0])


@data.shared(max_entries=24, hash_funcs=_LOOKS)
def memory(at: data.Tick, gpu_ids: tuple[int, ...], start: int, end: int, points: int, look: Look) -> str | None:
    """figures.stacked of timeline.memory_by_process, in GiB; None where no process held any."""
    frame = occupancy.memory_by_process(runtime.engine(at[0]), gpu_ids, start, end, points // 2, MOST_AREAS)
    if len(frame.columns) < 2:
        return None
    ids = [column for column in frame.columns if column not in ("timestamp_epoch", occupancy.OTHERS)]
    called: dict[Any, str] = usage.labels(runtime.engine(at[0]), "process", ids) if ids else {}
    called[occupancy.OTHERS] = "Others"
    wide = frame.rename(columns=called)
    # Two processes of one name and number are told apart by nothing here, and drawn as one.
    wide = wide.T.groupby(level=0, sort=False).sum().T
    parts = [name for name in wide.columns if name != "timestamp_epoch"]
    # As in the lanes above it, where each workload has its colour.
    rows = data.these_processes(at, tuple(map(int, ids)))
    runs = dict(zip(rows["process_id"].map(called), rows["workload"], strict=True))
    known = figures.colors_of(data.workloads(at), look.dark)
    colors = figures.shades({part: runs.get(part) for part in parts}, known, look.dark)
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


@data.shared(max_entries=24, hash_funcs=_LOOKS)
def throttling(at: data.Tick, gpu_id: int, start: int, end: int, look: Look) -> tuple[str, bool]:
    """figures.reasons, and whether there is nothing in it."""
    frame = occupancy.throttling(runtime.engine(at[0]), gpu_id, start, end)
    warning, calm = ("#f0b429", "#4a535e") if look.dark else ("#d08700", "#b6bfc8")
    names = {reason.label: warning if reason.throttles else calm for reason in CLOCKS_EVENT_REASONS}
    names["Power cap"] = figures.color(0, look.dark)
    figure = figures.reasons(frame, names, start, end, look.zone, look.dark, "Why clocks are not higher")
    return figures.as_json(figure), frame.empty


@data.shared(max_entries=24, hash_funcs=_LOOKS)
def life(at: data.Tick, process_id: int, first: int, last: int, look: Look) -> tuple[str | None, bool]:
    """figures.life of one process from when it was first seen to when it was last, None where nothing of it is
    kept; and whether its points are means of hours."""
    frame, by_hour = occupancy.life(runtime.engine(at[0]), process_id, POINTS_OF_A_LIFE)
    if frame.empty:
        return None, by_hour
    labels = usage.labels(runtime.engine(at[0]), "gpu", [])
    # Its first hour may have begun before it came.
    frame["timestamp_epoch"] = frame["timestamp_epoch"].clip(first, max(first, last))
    figure = figures.life(frame, labels, first, max(last, first + 1), look.dark)
    return figures.as_json(figure), by_hour


@data.shared(max_entries=24, hash_funcs=_SCOPED_LOOKS)
def ledger_trend(at: data.Tick, by: Dimension, scope: Scope, measure: str, look: Look) -> str | None:
    """A measure (of ledger.MEASURES) by a dimension, hour by hour or day by day; None where nobody was there."""
    ranking = data.usage_ranking(at, by, scope)
    parts = ranking[ranking["kind"] == "part"]
    if parts.empty:
        return None
    prices = data.prices()
    names = data.usage_labels(at, by, ranking)
    value = costs.measure(parts, measure, prices)
    top = parts.assign(value=value).nlargest(TOP_PARTS, "value")["key"].tolist()
    span_s = costs.HOUR_S if scope.end - scope.start <= costs.HOURLY_UP_TO_S else costs.DAY_S
    trend = data.usage_trend(at, by, scope, tuple(top) if by == "process" else None)
    own = data.gpu_hours(at, scope)
    own = own[own["timestamp_epoch"] >= scope.first_step] if not scope.chooses else own.head(0)
    frame = costs.over_time(trend, own, top, names, measure, prices, look.zone, span_s)
    rest, unknown, nobody = figures.GREYS[look.dark]
    grey = {costs.OTHERS: rest, costs.UNKNOWN: unknown, OWN["idle"]: nobody}
    drawn = [part for part in frame.columns if part != "timestamp_epoch"]
    # A workload has the colour that it has on the other pages.
    known = figures.colors_of(data.workloads(at), look.dark) if by == "workload" else {}
    known |= grey
    colors = {part: known.get(part) or figures.hue(number, look.dark) for number, part in enumerate(drawn)}
    unit = costs.MEASURES[measure] or prices.currency
    figure = figures.stacked(
        frame,
        colors,
        unit,
        look.dark,
        span_s,
        within=(scope.first_step, scope.end),
        heading=f"{measure} per {'hour' if span_s == costs.HOUR_S else 'day'} ({unit})",
    )
    return figures.as_json(figure)


@data.shared(max_entries=24, hash_funcs=_SCOPED_LOOKS)
def week(at: data.Tick, scope: Scope, look: Look) -> str:
    """How busy the GPUs were at each hour of the week, of the time of which their utilization is known."""
    own = data.gpu_hours(at, scope)
    mine = data.usage_trend(at, "gpu", scope, None) if scope.chooses else own
    return figures.as_json(figures.week(costs.by_week(mine, own, look.zone), look.dark))


@data.shared(max_entries=24, hash_funcs=_SCOPED_LOOKS)
def time_split(at: data.Tick, scope: Scope, look: Look) -> tuple[str, pd.DataFrame]:
    """Where each GPU's time went, drawn, and as tables.time_split."""
    totals = data.gpu_totals(at, scope)
    begins = totals["first_seen"].clip(lower=scope.first_step)
    missed = (scope.end - begins - totals["seconds"]).clip(lower=0)
    # A few ticks at both ends are no gap.
    split = totals.assign(unrecorded_s=missed.where(missed > 60, 0.0))
    labels = list(filters.named_gpus(totals.assign(id=totals["gpu_id"])))
    return figures.as_json(figures.time_split(split, labels, look.dark)), tables.time_split(split, labels)
