"""Use of the GPUs: parts of a total over time, hours of the week, and where each GPU's time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import pandas as pd

from gpumon_core import format as fmt
from gpumon_core.figures.base import Figure, color, heading_of, ink_of, layout_of, milliseconds, time_layout

HOUR_S, DAY_S = 3600, 86400


def stacked(
    frame: pd.DataFrame,
    parts: Mapping[str, str],
    unit: str,
    dark: bool,
    span_s: int,
    within: tuple[int, int] | None = None,
    height: int = 320,
    heading: str = "",
) -> Figure:
    """Parts of a total over time as stacked areas.

    frame: timestamp_epoch (the beginning of each step of `span_s` seconds) and one column for each of `parts`,
    which have the columns' colours, the lowest area first; a missing step has no parts. `within` is the range (UTC
    seconds) that the axis shows, by default that of the frame.
    """
    epochs = frame["timestamp_epoch"].to_numpy()
    # An area ends where its last step ends.
    ends = np.append(epochs, epochs[-1:] + span_s)
    start, end = within or (int(ends[0]), int(ends[-1])) if len(ends) else (0, 1)
    times = milliseconds(ends)
    data: list[Figure] = []
    for name, ink in parts.items():
        values = frame[name].to_numpy("float64")
        data.append(
            {
                **{
                    "type": "scatter",
                    "mode": "lines",
                    "stackgroup": "total",
                    "name": escape(name, quote=False),
                    "x": times,
                },
                "y": np.append(values, values[-1:]).round(4),
                "line": {"width": 0, "shape": "hv", "color": ink},
                "fillcolor": ink,
                "hovertemplate": f"%{{y:.2f}} {unit}",
            }
        )
    layout = time_layout(dark, height, start, end) | {
        "showlegend": True,
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            # Below the labels of the axis, which have two lines where a year or a day begins.
            "y": -48 / max(1, height - 60),
            "yanchor": "top",
            "traceorder": "reversed",
        },
        "yaxis": {
            **{"gridcolor": ink_of(dark)[1], "zeroline": False, "fixedrange": True},
            **{"rangemode": "tozero", "nticks": 6},
        },
    }
    if heading:
        layout["annotations"] = [heading_of(heading, 1.0)]
        layout["margin"]["t"] = 40
    if span_s >= DAY_S:
        layout["xaxis"]["hoverformat"] = fmt.date_form(start)
    elif span_s >= HOUR_S:
        layout["xaxis"]["hoverformat"] = f"{fmt.date_form(start)} %H:%M"
    return {"data": data, "layout": layout}


# The part of a field of the week that is free beside the next one.
FIELD_GAP = 0.08
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def week(frame: pd.DataFrame, dark: bool) -> Figure:
    """When the GPUs are busy: a heat map, days of the week down and hours of the day across.

    frame: weekday (0 is Monday), hour and share (percent busy); an hour that was never recorded is empty.
    """
    shares = frame.dropna(subset=["share"])
    low, high = ("#161b22", "#56B4E9") if dark else ("#eef3f8", "#0072B2")
    # A bar for each field: the part of Plotly that the pages load has no heat map.
    data = {
        "type": "bar",
        "x": shares["hour"],
        "base": shares["weekday"],
        "y": [1 - FIELD_GAP] * len(shares),
        "customdata": [
            f"{DAYS[day]} {hour:02d}:00" for day, hour in zip(shares["weekday"], shares["hour"], strict=True)
        ],
        "marker": {
            "color": shares["share"],
            "cmin": 0,
            "cmax": 100,
            "colorscale": [[0, low], [1, high]],
            "showscale": True,
            "colorbar": {"title": {"text": "busy"}, "ticksuffix": "%", "thickness": 12, "outlinewidth": 0},
        },
        "hovertemplate": "%{customdata}<br>%{marker.color:.0f}% busy<extra></extra>",
    }
    hours = list(range(0, 24, 3))
    layout = layout_of(dark, 280) | {
        "hovermode": "closest",
        "barmode": "overlay",
        "bargap": FIELD_GAP,
        "xaxis": {
            "fixedrange": True,
            "showgrid": False,
            "zeroline": False,
            "range": [-0.5, 23.5],
            "tickvals": hours,
            "ticktext": [f"{hour:02d}" for hour in hours],
            "title": {"text": "hour"},
        },
        "yaxis": {
            "fixedrange": True,
            "showgrid": False,
            "zeroline": False,
            "range": [7 - FIELD_GAP / 2, -FIELD_GAP / 2],
            "tickvals": [day + (1 - FIELD_GAP) / 2 for day in range(7)],
            "ticktext": list(DAYS),
        },
    }
    layout["margin"] = {"l": 44, "r": 12, "t": 12, "b": 44}
    return {"data": [data], "layout": layout}


def time_split(frame: pd.DataFrame, labels: Sequence[str], dark: bool) -> Figure:
    """Where each GPU's time went: one bar a GPU. frame: busy_s, held_s, free_s, unknown_s,
    unrecorded_s."""
    names = ["busy_s", "held_s", "free_s", "unknown_s", "unrecorded_s"]
    frame = frame.reindex(columns=names, fill_value=0.0)
    total = frame.sum(axis=1).clip(lower=1)
    data: list[Figure] = []
    for column, name, ink, pattern in (
        ("busy_s", "busy", color(0, dark), ""),
        ("held_s", "held idle", color(1, dark), "/"),
        ("free_s", "free", "#3d4653" if dark else "#d5dbe2", ""),
        ("unknown_s", "unknown", "#56606d" if dark else "#b4bcc6", "x"),
        ("unrecorded_s", "not recorded", "#20262e" if dark else "#f0f2f5", "."),
    ):
        if column == "unknown_s" and not frame[column].any():
            # Most GPUs report their utilization at all times: then there is nothing to explain.
            continue
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "y": [escape(label, quote=False) for label in labels],
                "x": (100 * frame[column] / total).round(2).tolist(),
                "customdata": frame[column].map(fmt.duration).tolist(),
                "marker": {"color": ink, "pattern": {"shape": pattern, "fgopacity": 0.35, "size": 6}},
                "hovertemplate": f"%{{y}}: {name} %{{x:.1f}}%, %{{customdata}}<extra></extra>",
            }
        )
    layout = layout_of(dark, max(180, 34 * len(labels) + 84)) | {
        "barmode": "stack",
        "hovermode": "closest",
        "showlegend": True,
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "traceorder": "normal",
        },
        "xaxis": {"range": [0, 100], "ticksuffix": "%", "fixedrange": True, "gridcolor": ink_of(dark)[1]},
        "yaxis": {"autorange": "reversed", "fixedrange": True, "type": "category", "automargin": True},
        "bargap": 0.35,
    }
    # Half of the last "100%" is outside the plot.
    layout["margin"] = {"l": 12, "r": 24, "t": 36, "b": 32}
    return {"data": data, "layout": layout}
