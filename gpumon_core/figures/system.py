"""The state of the recorder over time."""

from __future__ import annotations

import pandas as pd

from gpumon_core.figures.base import Figure, color, heading_of, ink_of, milliseconds, time_layout

BYTES_PER_MIB = 2**20


def pulse(frame: pd.DataFrame, dark: bool) -> Figure:
    """How long ticks took: the mean and the longest duration in each minute, and marks at the minutes in which
    ticks were skipped, failed, waited or were dropped. `frame` is from frames.health_history."""
    times = milliseconds(frame["timestamp_epoch"])
    lines = (("mean", "duration_ms", 0, "solid"), ("longest", "duration_max_ms", 1, "dot"))
    data: list[Figure] = [
        {
            **{"type": "scatter", "mode": "lines", "name": name, "x": times, "y": frame[column]},
            "line": {"color": color(position, dark), "width": 1.6, "dash": dash},
            "hovertemplate": "%{y:.1f} ms",
        }
        for name, column, position, dash in lines
    ]
    symbols = {"skipped": "triangle-up", "failed": "x", "dropped": "square", "buffered": "circle"}
    for position, (column, symbol) in enumerate(symbols.items(), 2):
        bad = (frame[column] > 0).to_numpy()
        if bad.any():
            data.append(
                {
                    **{
                        "type": "scatter",
                        "mode": "markers",
                        "name": "waiting" if column == "buffered" else column,
                    },
                    **{"x": times[bad], "y": frame.loc[bad, "duration_max_ms"].fillna(0)},
                    "customdata": frame.loc[bad, column].tolist(),
                    "marker": {"color": color(position, dark), "symbol": symbol, "size": 9},
                    "hovertemplate": "%{customdata} ticks",
                }
            )
    return {"data": data, "layout": _over_minutes(frame, dark, "Duration of a tick (ms)")}


def growth(frame: pd.DataFrame, dark: bool) -> Figure:
    """The size of the database, minute by minute, in MiB. `frame` is from frames.health_history."""
    known = frame.dropna(subset="database_bytes")
    line = {
        **{"type": "scatter", "mode": "lines", "name": "size", "fill": "tozeroy"},
        **{"x": milliseconds(known["timestamp_epoch"]), "y": known["database_bytes"] / BYTES_PER_MIB},
        "line": {"color": color(0, dark), "width": 1.6},
        "hovertemplate": "%{y:,.1f} MiB",
    }
    layout = _over_minutes(frame, dark, "Size of the database (MiB)", 200)
    return {"data": [line], "layout": layout | {"showlegend": False}}


def _over_minutes(frame: pd.DataFrame, dark: bool, heading: str, height: int = 230) -> Figure:
    times = frame["timestamp_epoch"]
    layout = time_layout(dark, height, int(times.min()), int(times.max()))
    layout |= {
        "showlegend": True,
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        "annotations": [heading_of(heading, 1.0)],
        "yaxis": {"gridcolor": ink_of(dark)[1], "zeroline": False, "fixedrange": True, "rangemode": "tozero"},
    }
    layout["xaxis"]["fixedrange"] = True
    layout["margin"]["t"] = 40
    return layout
