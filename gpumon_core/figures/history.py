"""Metrics over time: charts under each other on one time axis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from gpumon_core import format as fmt
from gpumon_core.figures.base import (
    DASHES,
    LINES,
    Figure,
    color,
    heading_of,
    ink_of,
    milliseconds,
    time_layout,
)
from gpumon_core.metrics import GPU_METRICS_BY_KEY, PROCESS_METRICS, Aggregate, Metric

Array = np.ndarray[Any, Any]

ROW_HEIGHT = 170
CHROME_HEIGHT = 84
# Between two charts, in pixels, where a legend of up to WORDY lines has its place.
GAP, LEGEND_LINE, WORDY = 34, 20, 5
# With more lines than this a hover names those of its own chart alone, or the list would not fit a screen.
MOST_HOVERED = 40
# The bands of more lines than this are paler, because they overlap.
FEW = 3
# The bands of more GPUs than this are coarser, too: COARSE steps of a line are one of its band. An outline has
# twice the points of its line, and each GPU has one in each chart.
SEVERAL, COARSE = 6, 3


@dataclass(frozen=True, slots=True)
class ChartLine:
    """A metric of a GPU, its name in the chart, and its place in the order of colours."""

    gpu_id: int
    metric: Metric
    name: str
    place: int


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines of one unit under a heading; `own_legend` where they are not those of the other charts."""

    heading: str
    lines: Sequence[ChartLine]
    own_legend: bool = False


def history(
    frame: pd.DataFrame,
    labels: Mapping[int, str],
    metrics: Sequence[str],
    start: int,
    end: int,
    dark: bool,
    totals: Mapping[str, float] | None = None,
) -> Figure:
    """One chart per metric, one line per GPU in its own colour.

    `frame` is from metrics_history; `labels` names every GPU of the installation by id, in the order that
    fixes the colours. `totals` has, by metric, what 100 % of it is, where that is the same for all GPUs.
    """
    there = set(frame["gpu_id"].unique())
    charts = []
    for key in metrics:
        metric = GPU_METRICS_BY_KEY[key]
        lines = [
            ChartLine(gpu_id, metric, name, place)
            for place, (gpu_id, name) in enumerate(labels.items())
            if gpu_id in there
        ]
        charts.append(Chart(_heading(_called(metric, frame), metric), lines))
    return stack(frame, charts, start, end, dark, totals)


def device(
    frame: pd.DataFrame,
    gpu_id: int,
    groups: Mapping[str, Sequence[str]],
    start: int,
    end: int,
    dark: bool,
    totals: Mapping[str, float] | None = None,
) -> Figure:
    """One GPU in depth: one chart for each group of metrics and unit in it, one line per metric. `groups` has keys
    of the catalogue by the group's name; a metric without values in the frame is left out."""
    charts = []
    for group, keys in groups.items():
        by_unit: dict[str, list[Metric]] = {}
        for key in keys:
            metric = GPU_METRICS_BY_KEY[key]
            if _is_worth_a_chart(frame, metric):
                by_unit.setdefault(metric.unit, []).append(metric)
        for metrics in by_unit.values():
            name = metrics[0].label if len(metrics) == 1 else group
            lines = [ChartLine(gpu_id, metric, metric.label, place) for place, metric in enumerate(metrics)]
            charts.append(Chart(_heading(name, metrics[0]), lines, own_legend=True))
    return stack(frame, charts, start, end, dark, totals)


def life(frame: pd.DataFrame, labels: Mapping[int, str], start: int, end: int, dark: bool) -> Figure:
    """A process over its life: its memory and its utilization, one line per GPU. `frame` is from
    process_life.steps."""
    charts = []
    for metric in PROCESS_METRICS:
        if frame[metric.key].notna().any() and (metric.key == "memory" or (frame[metric.key] > 0).any()):
            lines = [
                ChartLine(gpu_id, metric, labels.get(gpu_id, str(gpu_id)), place)
                for place, gpu_id in enumerate(frame["gpu_id"].unique())
            ]
            charts.append(Chart(_heading(metric.label, metric), lines))
    return stack(frame, charts, start, end, dark)


def _is_worth_a_chart(frame: pd.DataFrame, metric: Metric) -> bool:
    """Whether a chart says more than a number: not where a metric that rarely changes did not change, and no error
    was counted."""
    values = frame[metric.key].dropna()
    if metric.aggregate is Aggregate.COUNTER:
        # Power is the slope of energy, and drawn already.
        return metric.stored == "change" and bool((values > 0).any())
    return len(values) > 0 and (metric.stored == "tick" or values.nunique() > 1)


def stack(
    frame: pd.DataFrame,
    charts: Sequence[Chart],
    start: int,
    end: int,
    dark: bool,
    totals: Mapping[str, float] | None = None,
) -> Figure:
    """Charts under each other: each line is a mean, in a band from the lowest to the highest value."""
    rows = max(1, len(charts))
    frames = dict(tuple(frame.groupby("gpu_id")))
    times = _shared({gpu_id: milliseconds(of["timestamp_epoch"]) for gpu_id, of in frames.items()})
    bands = _Bands()
    layout = _layout(dark, charts, start, end)
    # A long legend takes two lines.
    wordy = any(chart.own_legend and len(chart.lines) > WORDY for chart in charts)
    gap = (GAP + LEGEND_LINE * wordy) / (ROW_HEIGHT * rows) if rows > 1 else 0.0
    height = (1 - gap * (rows - 1)) / rows
    data: list[Figure] = []
    for row, chart in enumerate(charts):
        name = "y" if row == 0 else f"y{row + 1}"
        top = 1 - row * (height + gap)
        metric = chart.lines[0].metric if chart.lines else None
        scale = fmt.reading(metric).scale if metric else 1.0
        layout[name.replace("y", "yaxis")] = {
            **_value_axis(dark, metric),
            "domain": [max(0.0, top - height), top],
            "anchor": "x",
        }
        layout["annotations"].append(heading_of(chart.heading, top))
        legend = "legend"
        # A single line is named by the heading.
        own_legend = chart.own_legend and len(chart.lines) > 1
        if own_legend:
            legend = "legend" if row == 0 else f"legend{row + 1}"
            layout[legend] = _legend(top + LEGEND_LINE * (len(chart.lines) > WORDY) / (ROW_HEIGHT * rows))
        for level, value in _thresholds([line.metric for line in chart.lines], totals or {}):
            layout["shapes"].append(_threshold(level, value * scale, name, dark))
        for line in chart.lines:
            own = {"xaxis": "x", "yaxis": name, "legend": legend}
            own["legendgroup"] = f"{row} {line.name}" if chart.own_legend else str(line.gpu_id)
            mine = frames.get(line.gpu_id)
            if mine is not None:
                few = len(chart.lines) <= FEW
                width = 1 if len(chart.lines) <= SEVERAL or chart.own_legend else COARSE
                outline = bands.around(times[line.gpu_id], *_edges(line.metric, mine), width)
                data += _drawn(line, mine, times[line.gpu_id], outline, dark, few, own)
                data[-1]["showlegend"] = own_legend if chart.own_legend else row == 0
    layout["xaxis"]["anchor"] = "y" if rows == 1 else f"y{rows}"
    return {"data": data, "layout": layout}


def _shared(times: Mapping[Any, Array]) -> dict[Any, Array]:
    """One array in place of those that are equal: the GPUs of a machine are read together."""
    known: dict[bytes, Array] = {}
    return {gpu_id: known.setdefault(of.tobytes(), of) for gpu_id, of in times.items()}


def _layout(dark: bool, charts: Sequence[Chart], start: int, end: int) -> Figure:
    rows = max(1, len(charts))
    layout = time_layout(dark, ROW_HEIGHT * rows + CHROME_HEIGHT, start, end)
    lines = sum(len(chart.lines) for chart in charts)
    layout |= {
        "annotations": [],
        "shapes": [],
        "hoversubplots": "axis" if lines <= MOST_HOVERED else "overlaying",
        # Above the first chart's heading, however many lines it takes on a narrow screen.
        "legend": _legend(1 + 24 / (ROW_HEIGHT * rows)),
    }
    layout["margin"]["t"] = 52
    return layout


def _legend(bottom: float) -> Figure:
    return {
        **{"orientation": "h", "x": 1, "xanchor": "right", "y": bottom, "yanchor": "bottom"},
        **{"uirevision": "lines", "bgcolor": "rgba(0,0,0,0)"},
    }


def _edges(metric: Metric, mine: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """The lowest and highest values of a metric's steps, as they are read."""
    low, high = (mine[f"{metric.key}_{edge}"] * fmt.reading(metric).scale for edge in ("min", "max"))
    return low, high


def _drawn(
    line: ChartLine,
    mine: pd.DataFrame,
    times: Array,
    outline: tuple[Array, Array] | None,
    dark: bool,
    few: bool,
    own: Figure,
) -> list[Figure]:
    """A line, and its band below it where it has one."""
    key = line.metric.key
    ink = color(line.place % LINES, dark)
    how = fmt.reading(line.metric)
    drawn: list[Figure] = []
    if outline is not None:
        drawn.append(
            {
                **own,
                **{"type": "scatter", "mode": "lines", "fill": "toself", "line": {"width": 0}},
                **{"fillcolor": ink, "opacity": 0.2 if few else 0.1, "hoverinfo": "skip", "showlegend": False},
                **{"x": outline[0], "y": outline[1]},
            }
        )
    drawn.append(
        {
            **own,
            **{"type": "scatter", "mode": "lines", "name": escape(line.name, quote=False), "x": times},
            "y": (mine[key] * how.scale).to_numpy("float32"),
            "connectgaps": False,
            "hovertemplate": _hover(line.metric).replace(f"{line.name} ", "", 1),
            "line": {
                "color": ink,
                "width": 1.6,
                "shape": "hv" if line.metric.stored == "change" else "linear",
                "dash": DASHES[line.place // LINES % len(DASHES)],
            },
        }
    )
    return drawn


def _called(metric: Metric, frame: pd.DataFrame) -> str:
    """A metric's name above its chart. Of a counter the chart shows the growth in each step, so the name says how
    long a step is."""
    if metric.aggregate is not Aggregate.COUNTER or metric.stored != "tick":
        return metric.label
    lengths = frame["timestamp_epoch"].diff()
    lengths = lengths[lengths > 0]
    return metric.label if lengths.empty else f"{metric.label} per {fmt.duration(float(lengths.median()))}"


def _heading(name: str, metric: Metric) -> str:
    unit = fmt.reading(metric).unit
    return f"{name} ({unit})" if unit else name


def _hover(metric: Metric) -> str:
    """What a hover says about a line, as a template of Plotly."""
    how = fmt.reading(metric)
    return f"{metric.label} {how.before}%{{y:{how.form}}} {how.unit}".rstrip()


def _value_axis(dark: bool, metric: Metric | None) -> Figure:
    percent = metric is not None and metric.unit == "%" and metric.maximum
    return {
        "rangemode": "tozero",
        **({"range": [0, 1.04 * percent]} if percent else {}),
        **({"tickprefix": before} if (before := metric and fmt.reading(metric).before) else {}),
        **{"gridcolor": ink_of(dark)[1], "zeroline": False, "fixedrange": True, "nticks": 5},
    }


def _thresholds(metrics: Sequence[Metric], totals: Mapping[str, float]) -> list[tuple[str, float]]:
    """The levels of a chart's first metric, in its own unit, that can be drawn as lines."""
    if not metrics:
        return []
    metric = metrics[0]
    if metric.share_of is not None:
        return [("total", totals[metric.key])] if metric.key in totals else []
    levels = [("warning", metric.warning), ("critical", metric.critical)]
    return [(level, value) for level, value in levels if value is not None]


def _threshold(level: str, value: float, axis: str, dark: bool) -> Figure:
    ink = {"warning": ("#b97a00", "#f0b429"), "critical": ("#c9372c", "#ff7b6f"), "total": ("#8a94a0", "#6b7580")}
    return {
        **{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": axis, "y0": value, "y1": value},
        **{"layer": "below", "line": {"color": ink[level][dark], "width": 1, "dash": "dot"}},
    }


class _Bands:
    """Outlines of bands. Bands with values at the same times share one array of times."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, bytes], Array] = {}

    def around(self, times: Array, low: pd.Series, high: pd.Series, width: int) -> tuple[Array, Array] | None:
        """The outline, piece by piece, with a corner at every `width`th of the times; None where the band is
        nowhere wider than its line."""
        bottom, top = low.to_numpy("float64"), high.to_numpy("float64")
        there = ~(np.isnan(bottom) | np.isnan(top))
        if not (there & (top > bottom)).any():
            return None
        edges = np.flatnonzero(np.diff(np.concatenate(([0], there.astype("int8"), [0]))))
        pieces = [slice(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True)]
        key = id(times), width, there.tobytes()
        if key not in self._known:
            corners = [_corners(times[piece], width) for piece in pieces]
            self._known[key] = _outline(zip(corners, corners, strict=True))
        hulls = (
            (_hull(top[piece], width, np.maximum), _hull(bottom[piece], width, np.minimum)) for piece in pieces
        )
        return self._known[key], _outline(hulls).astype("float32")


def _corners(times: Array, width: int) -> Array:
    """The times at which the band of an unbroken piece has corners."""
    return times if width == 1 else np.append(times[::width], times[-1])


def _hull(values: Array, width: int, outer: np.ufunc) -> Array:
    """The extremes at the corners, far enough out that no value between two corners is beyond them."""
    if width == 1:
        return values
    steps = np.asarray(outer.reduceat(values, np.arange(0, len(values), width)))
    return np.asarray(outer(np.append(steps, steps[-1]), np.append(steps[0], steps)))


def _outline(pieces: Iterable[tuple[Array, Array]]) -> Array:
    """Forth along the upper edge and back along the lower one, for each unbroken piece, with NaN between
    pieces."""
    parts: list[Array] = []
    for upper, lower in pieces:
        parts += [upper, lower[::-1], np.array([np.nan])]
    return np.concatenate(parts[:-1])
