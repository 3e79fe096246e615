"""Lanes: one bar per process, model or throttle reason, on the time axis of the charts above."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping
from html import escape
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd

from gpumon_core import format as fmt
from gpumon_core.figures.base import Figure, heading_of, ink_of, lengths, milliseconds, time_layout

LANE_HEIGHT = 20
# Parts of a lane's height: what every bar gets, and what a process that fills its GPU's memory gets in addition.
THINNEST, THICKER = 0.28, 0.6
# Two bars in one lane are at least this part of the axis apart.
APART = 0.004
# A bar shorter than this part of the axis is drawn as long as it, so that it can be seen.
SHORTEST = 0.002
# The most lanes, of all GPUs together.
MOST_LANES = 32
# A bar thinner than this has no room for its name.
NAMED = 0.5
UNKNOWN = "other programs"


def pack(frame: pd.DataFrame, start: int, end: int, most_lanes: int = MOST_LANES) -> pd.DataFrame:
    """Places bars in lanes. `frame` is from occupancy.lanes; added are `lane` (0 is the uppermost, GPU after GPU)
    and begin and finish (UTC seconds, within the range).

    The largest bars are placed first, so that they are above the smaller ones. All GPUs together have
    `most_lanes`, but each at least two; a bar for which no lane is free is left out.
    """
    span = max(1, end - start)
    placed = frame.assign(begin=frame["first"].clip(lower=start), finish=frame["last"].clip(upper=end))
    placed["finish"] = placed["finish"].clip(lower=placed["begin"] + SHORTEST * span)
    weight = placed["memory"].fillna(0) * (placed["finish"] - placed["begin"])
    placed = placed.assign(weight=weight).sort_values("weight", ascending=False, kind="stable")
    order = list(frame["gpu_id"].drop_duplicates())
    each = max(2, most_lanes // max(1, len(order)))
    taken: dict[int, list[list[tuple[float, float]]]] = {gpu_id: [] for gpu_id in order}
    lanes: list[int | None] = []
    for gpu_id, begin, finish in zip(placed["gpu_id"], placed["begin"], placed["finish"], strict=True):
        lanes.append(_place(taken[gpu_id], begin, finish + APART * span, each))
    above = dict(zip(order, np.cumsum([0, *(len(taken[gpu_id]) for gpu_id in order)]), strict=False))
    placed["lane"] = pd.Series(lanes, index=placed.index, dtype="float64") + placed["gpu_id"].map(above)
    found = placed[placed["lane"].notna()].astype({"lane": "int64"})
    return found.sort_values(["lane", "begin"]).drop(columns="weight").reset_index(drop=True)


def _place(lanes: list[list[tuple[float, float]]], begin: float, finish: float, most: int) -> int | None:
    """The first lane that is free from `begin` to `finish`, which is marked as taken; None where none is free."""
    for number, bars in enumerate(lanes):
        at = bisect(bars, (begin, finish))
        if (at == 0 or bars[at - 1][1] <= begin) and (at == len(bars) or finish <= bars[at][0]):
            bars.insert(at, (begin, finish))
            return number
    if len(lanes) >= most:
        return None
    lanes.append([(begin, finish)])
    return len(lanes) - 1


def lanes(
    packed: pd.DataFrame,
    labels: Mapping[int, str],
    colors: Mapping[str, str],
    start: int,
    end: int,
    zone: ZoneInfo,
    dark: bool,
    heading: str,
) -> Figure:
    """Bars by workload, as thick as their share of the GPU's memory. `packed` is from `pack`; `labels` names the
    GPUs by id, and `colors` has a colour for every workload and UNKNOWN."""
    count = int(packed["lane"].max()) + 1 if len(packed) else 1
    data = []
    # Once for all workloads: a frame for each would cost more than all the rest.
    groups = packed["workload"].fillna(UNKNOWN).to_numpy()
    thickness = (THINNEST + THICKER * packed["share"].fillna(0)).to_numpy("float64")
    begins = milliseconds(packed["begin"])
    widths = lengths(packed["begin"], packed["finish"], zone)
    lane = packed["lane"].to_numpy("float64")
    hovers = [(_caption(row), _hover(row, zone)) for row in packed.itertuples()]
    for name in dict.fromkeys((*colors, *groups)):
        mine = np.flatnonzero(groups == name)
        if not len(mine):
            continue
        data.append(
            {
                **{"type": "bar", "orientation": "h", "name": escape(name, quote=False), "legendgroup": name},
                "base": begins[mine],
                "x": widths[mine],
                "y": lane[mine],
                "width": thickness[mine],
                "marker": {"color": colors.get(name, "#8a94a0"), "line": {"width": 0}},
                "text": [hovers[place][0] if thickness[place] >= NAMED else "" for place in mine],
                "customdata": [hovers[place][1] for place in mine],
                "hovertemplate": "%{customdata}<extra></extra>",
                **{"textposition": "inside", "insidetextanchor": "start", "textangle": 0, "cliponaxis": True},
                "insidetextfont": {"color": "#0d1117" if dark else "#ffffff", "size": 11},
                "constraintext": "none",
            }
        )
    layout = time_layout(dark, max(2, count) * LANE_HEIGHT + 84, start, end)
    first_lanes = packed.groupby("gpu_id", sort=False)["lane"].min()
    edges = [lane - 0.5 for lane in first_lanes if lane]
    layout |= {
        **{"barmode": "overlay", "hovermode": "closest", "showlegend": True, "bargap": 0},
        "uniformtext": {"mode": "hide", "minsize": 10},
        "legend": {
            **{"orientation": "h", "x": 1, "xanchor": "right", "yanchor": "bottom"},
            "y": 1 + 22 / (max(2, count) * LANE_HEIGHT),
        },
        "annotations": [heading_of(heading, 1.0)],
        "yaxis": {
            **{"range": [count - 0.4, -0.6], "fixedrange": True, "showgrid": False, "zeroline": False},
            "tickvals": [int(lane) for lane in first_lanes],
            "ticktext": [escape(labels.get(gpu_id, "")[-9:], quote=False) for gpu_id in first_lanes.index],
        },
        "shapes": [
            {
                **{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": edge, "y1": edge},
                "line": {"color": ink_of(dark)[1], "width": 1},
            }
            for edge in edges
        ],
    }
    layout["margin"]["t"] = 48
    return {"data": data, "layout": layout}


def _caption(row: object) -> str:
    name = getattr(row, "name", None) or f"PID {getattr(row, 'pid')}"  # noqa: B009
    model = getattr(row, "model", None)
    return escape(f"{name} · {model}" if model else str(name), quote=False)


def _hover(row: object, zone: ZoneInfo) -> str:
    """What a hover says about a bar."""
    get = row._asdict()  # type: ignore[attr-defined]
    facts = [
        f"<b>{_caption(row)}</b>",
        f"PID {get['pid']}" + (f", {escape(get['username'], quote=False)}" if get["username"] else ""),
        escape(get["workload"] or "", quote=False),
        f"{fmt.memory(get['memory'])} on average, {fmt.memory(get['max_memory'])} at most",
        f"{fmt.moment(get['first'], zone)} – " + ("now" if get["running"] else fmt.moment(get["last"], zone)),
        fmt.duration(get["last"] - get["first"]),
    ]
    return "<br>".join(fact for fact in facts if fact)


def reasons(
    frame: pd.DataFrame, names: Mapping[str, str], start: int, end: int, zone: ZoneInfo, dark: bool, heading: str
) -> Figure:
    """Throttle reasons as a timeline. `frame` is from occupancy.throttling; `names` has the reasons to draw, the
    uppermost first, and their colours."""
    order = [name for name in names if (frame["reason"] == name).any()]
    data = []
    for lane, name in enumerate(order):
        mine = frame[frame["reason"] == name]
        begins = milliseconds(mine["first"])
        lasted = (mine["last"] - mine["first"]).map(fmt.duration)
        data.append(
            {
                **{"type": "bar", "orientation": "h", "name": name, "base": begins},
                "x": lengths(mine["first"], mine["last"], zone).clip(min=1000 * SHORTEST * (end - start)),
                "y": [float(lane)] * len(mine),
                "width": 0.62,
                "marker": {"color": names[name]},
                "customdata": lasted.tolist(),
                "hovertemplate": f"{name}<br>%{{customdata}}<extra></extra>",
            }
        )
    layout = time_layout(dark, max(1, len(order)) * LANE_HEIGHT + 76, start, end) | {
        **{"barmode": "overlay", "hovermode": "closest", "showlegend": False},
        "annotations": [heading_of(heading, 1.0)],
        "yaxis": {
            **{"range": [max(1, len(order)) - 0.4, -0.6], "fixedrange": True, "showgrid": False},
            **{"tickvals": [], "zeroline": False},
        },
    }
    for lane, name in enumerate(order):
        # Inside the plot, beside the bars: the margin is too narrow for these names.
        layout["annotations"].append(
            {
                **{"text": name, "xref": "paper", "x": 0.002, "y": lane, "xanchor": "left", "showarrow": False},
                **{"bgcolor": "rgba(13,17,23,.65)" if dark else "rgba(255,255,255,.75)", "font": {"size": 11}},
            }
        )
    return {"data": data, "layout": layout}
