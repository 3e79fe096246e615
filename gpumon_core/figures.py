"""DataFrames in, Plotly figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from zoneinfo import ZoneInfo

import pandas as pd
import plotly.graph_objects as go

from gpumon_core import format as fmt
from gpumon_core.metrics import GPU_METRICS_BY_KEY

# Okabe and Ito's palette, which colour-blind eyes can tell apart, darkened or lightened for contrast.
PALETTE_LIGHT = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#B8860B", "#3DA5D9", "#6B4FBB", "#555555")
PALETTE_DARK = ("#56B4E9", "#FF8A4C", "#2FD6A3", "#E091C4", "#F0C541", "#9AD9FF", "#B39DFF", "#BBBBBB")
DASHES = ("solid", "dash", "dot", "dashdot")

ROW_HEIGHT = 190
CHROME_HEIGHT = 90


def color(position: int, dark: bool) -> str:
    """The colour of the GPU at a position in the list of all GPUs, the same in every chart."""
    palette = PALETTE_DARK if dark else PALETTE_LIGHT
    return palette[position % len(palette)]


def wall_clock(epoch: pd.Series, zone: ZoneInfo) -> pd.Series:
    """UTC seconds as the naive local time that Plotly draws."""
    return pd.to_datetime(epoch, unit="s", utc=True).dt.tz_convert(zone).dt.tz_localize(None)


def history(
    frame: pd.DataFrame,
    labels: Mapping[int, str],
    metrics: Sequence[str],
    start: int,
    end: int,
    zone: ZoneInfo,
    dark: bool,
) -> go.Figure:
    """One chart per metric on a shared time axis, one line per GPU in its own colour.

    `frame` is what frames.history returned; `labels` names every GPU of the installation by id,
    in the order that fixes the colours.
    """
    rows = len(metrics)
    gap = 0.045 if rows > 1 else 0.0
    height = (1 - gap * (rows - 1)) / max(1, rows)
    text, grid = _ink(dark)
    layout: dict[str, object] = {
        "height": ROW_HEIGHT * rows + CHROME_HEIGHT,
        "margin": {"l": 56, "r": 12, "t": 56, "b": 36},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": text, "size": 13, "family": "'Source Sans', sans-serif"},
        "hovermode": "x unified",
        "hoversubplots": "axis",
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "yanchor": "bottom"},
        "annotations": [],
    }
    # Above the first chart's heading, however many lines it takes on a narrow screen.
    layout["legend"] |= {"y": 1 + 24 / (ROW_HEIGHT * max(1, rows))}  # type: ignore[operator]
    data: list[dict[str, object]] = []
    begin, finish = wall_clock(pd.Series([start, end]), zone)
    frames = dict(tuple(frame.groupby("gpu_id")))
    times = {gpu_id: wall_clock(rows_of["timestamp_epoch"], zone) for gpu_id, rows_of in frames.items()}
    shown = [gpu_id for gpu_id in labels if gpu_id in frames]
    positions = {gpu_id: position for position, gpu_id in enumerate(labels)}
    for row, key in enumerate(metrics):
        metric = GPU_METRICS_BY_KEY[key]
        # Memory reads best in GiB; the database keeps MiB.
        scale, unit = (1 / fmt.MIB_PER_GIB, "GiB") if metric.unit == "MiB" else (1.0, metric.unit)
        digits = 1 if unit == "GiB" else metric.digits
        name = "yaxis" if row == 0 else f"yaxis{row + 1}"
        top = 1 - row * (height + gap)
        layout[name] = {
            "domain": [max(0.0, top - height), top],
            "rangemode": "tozero",
            "range": [0, metric.maximum * 1.04] if metric.unit == "%" and metric.maximum else None,
            "gridcolor": grid,
            "zeroline": False,
            "anchor": "x",
            "fixedrange": True,
            "nticks": 5,
        }
        layout["annotations"].append(  # type: ignore[attr-defined]
            {
                "text": f"<b>{metric.label}</b> ({unit})",
                "xref": "paper",
                "yref": "paper",
                "x": 0,
                "y": top,
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
            }
        )
        for gpu_id in shown:
            position = positions[gpu_id]
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": labels[gpu_id],
                    "legendgroup": str(gpu_id),
                    "showlegend": row == 0,
                    "x": times[gpu_id],
                    "y": (frames[gpu_id][key] * scale).round(digits + 1),
                    "xaxis": "x",
                    "yaxis": "y" if row == 0 else f"y{row + 1}",
                    "connectgaps": False,
                    "hovertemplate": f"%{{y:.{digits}f}} {unit}",
                    "line": {
                        "color": color(position, dark),
                        "width": 1.6,
                        "dash": DASHES[position // len(PALETTE_LIGHT) % len(DASHES)],
                    },
                }
            )
    layout["xaxis"] = {
        "range": [begin, finish],
        "type": "date",
        "gridcolor": grid,
        "anchor": "y" if rows == 1 else f"y{rows}",
        "showspikes": True,
        "spikemode": "across",
        "spikethickness": 1,
        "spikedash": "solid",
        "spikecolor": text,
        "hoverformat": "%a %d %b %H:%M:%S",
    }
    return go.Figure({"data": data, "layout": layout})


def pulse(frame: pd.DataFrame, zone: ZoneInfo, dark: bool) -> go.Figure:
    """How the recorder fared: the mean and the longest duration of a tick in each minute, and marks at the
    minutes in which ticks were skipped, failed, waited or were dropped. `frame` is frames.health_history's."""
    text, grid = _ink(dark)
    times = wall_clock(frame["timestamp_epoch"], zone)
    lines = (("mean", "duration_ms", 0, "solid"), ("longest", "duration_max_ms", 1, "dot"))
    data: list[dict[str, object]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": times,
            "y": frame[column],
            "line": {"color": color(position, dark), "width": 1.6, "dash": dash},
            "hovertemplate": "%{y:.1f} ms",
        }
        for name, column, position, dash in lines
    ]
    symbols = {"skipped": "triangle-up", "failed": "x", "dropped": "square", "buffered": "circle"}
    for position, (column, symbol) in enumerate(symbols.items(), 2):
        bad = frame[column] > 0
        if bad.any():
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": "waiting" if column == "buffered" else column,
                    "x": times[bad],
                    "y": frame.loc[bad, "duration_max_ms"].fillna(0),
                    "customdata": frame.loc[bad, column],
                    "marker": {"color": color(position, dark), "symbol": symbol, "size": 9},
                    "hovertemplate": "%{customdata} ticks",
                }
            )
    axis = {"gridcolor": grid, "zeroline": False, "fixedrange": True}
    layout = {
        "height": 240,
        "margin": {"l": 56, "r": 12, "t": 40, "b": 36},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": text, "size": 13, "family": "'Source Sans', sans-serif"},
        "hovermode": "x unified",
        "showlegend": True,
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        "title": {"text": "Duration of a tick (ms)", "font": {"size": 13}, "x": 0.01},
        "xaxis": {**axis, "type": "date"},
        "yaxis": {**axis, "rangemode": "tozero"},
    }
    return go.Figure({"data": data, "layout": layout})


def stacked(
    frame: pd.DataFrame, parts: Mapping[str, str], unit: str, zone: ZoneInfo, dark: bool, span_s: int
) -> go.Figure:
    """Parts of a whole over time as stacked areas.

    frame: timestamp_epoch (the beginning of each step of `span_s` seconds) and one column for each of `parts`,
    which name the columns' colours, the lowest first; a step that is missing has no parts.
    """
    grid = _ink(dark)[1]
    times = wall_clock(frame["timestamp_epoch"], zone)
    # An area ends where its last step ends.
    end = wall_clock(frame["timestamp_epoch"].tail(1) + span_s, zone)
    times = pd.concat([times, end], ignore_index=True)
    data: list[dict[str, object]] = []
    for name, ink in parts.items():
        values = pd.concat([frame[name], frame[name].tail(1)], ignore_index=True)
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "stackgroup": "whole",
                "name": name,
                "x": times,
                "y": values.round(4),
                "line": {"width": 0, "shape": "hv", "color": ink},
                "fillcolor": ink,
                "hovertemplate": f"%{{y:.2f}} {unit}",
            }
        )
    layout = {
        **_layout(dark, 320),
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.12, "yanchor": "top"},
        "xaxis": {
            "type": "date",
            "gridcolor": grid,
            "hoverformat": "%a %d %b %H:%M" if span_s < 86400 else "%a %d %b",
        },
        "yaxis": {"gridcolor": grid, "zeroline": False, "fixedrange": True, "rangemode": "tozero", "nticks": 6},
    }
    layout["margin"] = {"l": 56, "r": 12, "t": 12, "b": 36}
    return go.Figure({"data": data, "layout": layout})


DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def week(frame: pd.DataFrame, dark: bool) -> go.Figure:
    """When the GPUs are used: a heat map, days of the week down and hours of the day across.

    frame: weekday (0 is Monday), hour and share (percent busy); what was never recorded is left empty.
    """
    table = frame.pivot_table(index="weekday", columns="hour", values="share", aggfunc="mean")
    table = table.reindex(index=range(7), columns=range(24))
    low, high = ("#161b22", "#56B4E9") if dark else ("#eef3f8", "#0072B2")
    data = {
        "type": "heatmap",
        "x": [f"{hour:02d}" for hour in range(24)],
        "y": list(DAYS),
        "z": table.to_numpy(),
        "zmin": 0,
        "zmax": 100,
        "xgap": 2,
        "ygap": 2,
        "colorscale": [[0, low], [1, high]],
        "colorbar": {"title": {"text": "busy"}, "ticksuffix": "%", "thickness": 12, "outlinewidth": 0},
        "hovertemplate": "%{y} %{x}:00<br>%{z:.0f}% busy<extra></extra>",
        "hoverongaps": False,
    }
    layout = _layout(dark, 280) | {
        "hovermode": "closest",
        "xaxis": {
            "fixedrange": True,
            "showgrid": False,
            "type": "category",
            "dtick": 3,
            "title": {"text": "hour"},
        },
        "yaxis": {"fixedrange": True, "showgrid": False, "autorange": "reversed", "type": "category"},
    }
    layout["margin"] = {"l": 44, "r": 12, "t": 12, "b": 44}
    return go.Figure({"data": [data], "layout": layout})


def time_split(frame: pd.DataFrame, labels: Sequence[str], dark: bool) -> go.Figure:
    """Where each GPU's time went: one bar a GPU. frame: busy_s, held_s, free_s, unrecorded_s."""
    whole = frame[["busy_s", "held_s", "free_s", "unrecorded_s"]].sum(axis=1).clip(lower=1)
    data: list[dict[str, object]] = []
    for column, name, ink, pattern in (
        ("busy_s", "busy", color(0, dark), ""),
        ("held_s", "held idle", color(1, dark), "/"),
        ("free_s", "free", "#3d4653" if dark else "#d5dbe2", ""),
        ("unrecorded_s", "not recorded", "#20262e" if dark else "#f0f2f5", "."),
    ):
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "y": list(labels),
                "x": (100 * frame[column] / whole).round(2),
                "customdata": frame[column].map(fmt.duration),
                "marker": {"color": ink, "pattern": {"shape": pattern, "fgopacity": 0.35, "size": 6}},
                "hovertemplate": f"%{{y}}: {name} %{{x:.1f}}%, %{{customdata}}<extra></extra>",
            }
        )
    layout = _layout(dark, max(180, 34 * len(labels) + 84)) | {
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
        "xaxis": {"range": [0, 100], "ticksuffix": "%", "fixedrange": True, "gridcolor": _ink(dark)[1]},
        "yaxis": {"autorange": "reversed", "fixedrange": True, "type": "category", "automargin": True},
        "bargap": 0.35,
    }
    layout["margin"] = {"l": 12, "r": 12, "t": 36, "b": 32}
    return go.Figure({"data": data, "layout": layout})


def _layout(dark: bool, height: int) -> dict[str, object]:
    """What all figures have in common."""
    return {
        "height": height,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": _ink(dark)[0], "size": 13, "family": "'Source Sans', sans-serif"},
        "hovermode": "x unified",
    }


def _ink(dark: bool) -> tuple[str, str]:
    """Colours of text and grid lines."""
    return ("#c9d1d9", "#2b323c") if dark else ("#24292f", "#e4e8ed")
