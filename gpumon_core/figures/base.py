"""What all figures share: colours, time axes, and the text that a browser draws.

A figure is a plain dict of Plotly's schema (https://plotly.com/javascript/reference/). Its arrays are typed and
sent in base64, which both sides read several times faster than numbers in text.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd

from gpumon_core import format as fmt

Figure = dict[str, Any]

# Okabe and Ito's palette, which colour-blind eyes can distinguish, darkened or lightened for contrast.
PALETTE_LIGHT = (
    *("#0072B2", "#D55E00", "#009E73", "#AA4499", "#B8860B", "#3DA5D9"),
    *("#6B4FBB", "#555555", "#117733", "#882255", "#7A9A01", "#C46A9B"),
)
PALETTE_DARK = (
    *("#56B4E9", "#FF8A4C", "#2FD6A3", "#E091C4", "#F0C541", "#9AD9FF"),
    *("#B39DFF", "#BBBBBB", "#7BC67E", "#D9738F", "#C3D86B", "#F4B6D2"),
)
# Suffixes that make a colour paler, step by step: its opacity, as CSS writes it.
PALER = ("", "b8", "80", "58", "40")
# The place of a grey in both palettes, which only lines may have.
GREY_LINE = 7
# GPUs are lines: with dashes more of them can be distinguished than by colour alone.
LINES = 8
DASHES = ("solid", "dash", "dot", "dashdot")
# The greys of what has no colour of its own: the rest, the unknown, the idle.
GREYS = {False: ("#8a94a0", "#a9b1ba", "#cfd6dd"), True: ("#8a94a0", "#a9b1ba", "#4a535e")}

# Figures under each other share these, so that their time axes are aligned.
# Right of the plot is room for half of the last label, such as 18:24:00.
LEFT, RIGHT = 60, 28


def as_json(figure: Figure) -> str:
    """A figure as the text that the browser draws. An array that occurs several times is sent once: each place has
    {"array": n}, and `arrays` has them all."""
    arrays: list[Figure] = []
    # The array is stored beside its place, so that no other array gets its address meanwhile.
    places: dict[int, tuple[int, object]] = {}

    def plain(value: object) -> object:
        if isinstance(value, pd.Series):
            return plain(value.to_numpy())
        if isinstance(value, np.ndarray):
            if value.dtype.kind == "O":
                return value.tolist()
            if id(value) not in places:
                places[id(value)] = len(arrays), value
                arrays.append(_typed(value))
            return {"array": places[id(value)][0]}
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"a figure cannot hold a {type(value).__name__}")

    text = json.dumps(figure, default=plain, separators=(",", ":"))
    return f'{{"arrays":{json.dumps(arrays, separators=(",", ":"))},{text[1:]}'


def _typed(value: np.ndarray[Any, Any]) -> Figure:
    """An array as Plotly takes it: its type, its bytes, and its shape where it has several dimensions."""
    # Plotly has no integers of eight bytes; a double holds ours exactly.
    kind = {"f4": "f4", "i4": "i4", "i2": "i2"}.get(value.dtype.str[1:], "f8")
    typed = {"dtype": kind, "bdata": base64.b64encode(value.astype(kind).tobytes()).decode()}
    return typed | ({"shape": ", ".join(map(str, value.shape))} if value.ndim > 1 else {})


def color(position: int, dark: bool) -> str:
    """The colour of the GPU at a position in the list of all GPUs, the same in every chart."""
    palette = PALETTE_DARK if dark else PALETTE_LIGHT
    return palette[position % len(palette)]


def hue(position: int, dark: bool) -> str:
    """The colour at a position in a list of names; never grey, which is for the rest and the unknown."""
    palette = PALETTE_DARK if dark else PALETTE_LIGHT
    hues = [ink for place, ink in enumerate(palette) if place != GREY_LINE]
    return hues[position % len(hues)]


def colors_of(names: Iterable[str], dark: bool) -> dict[str, str]:
    """A colour for each name, by its place: the same names in the same order always have the same colours."""
    return {name: hue(position, dark) for position, name in enumerate(dict.fromkeys(names))}


def shades(groups: Mapping[str, str | None], colors: Mapping[str, str], dark: bool) -> dict[str, str]:
    """For each name the colour of its group, and paler for each name of the group before it; grey where `colors`
    has none for the group."""
    before: Counter[str] = Counter()
    found = {}
    for name, group in groups.items():
        ink = colors.get(group or "", GREYS[dark][0])
        found[name] = ink + PALER[min(before[ink], len(PALER) - 1)]
        before[ink] += 1
    return found


def milliseconds(
    epoch: pd.Series | Sequence[float] | np.ndarray[Any, Any],
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """UTC seconds as a time axis takes them. Plotly shows such numbers by the viewer's clock, so that a figure is
    the same for viewers in every time zone."""
    return 1000 * np.asarray(epoch, dtype="float64")


def lengths(begin: pd.Series, finish: pd.Series, zone: ZoneInfo) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The lengths of bars from `begin` to `finish` (UTC seconds), in milliseconds of an axis that shows the clock
    of `zone`: where that clock is set between the two, an hour more or less than has passed."""
    begins, ends = (
        pd.to_datetime(edge.astype("float64"), unit="s", utc=True).dt.tz_convert(zone).dt.tz_localize(None)
        for edge in (begin, finish)
    )
    return np.asarray(1000 * (ends - begins).dt.total_seconds(), dtype="float64")


def from_wall_clock(text: str, zone: ZoneInfo) -> int:
    """UTC seconds of a time on the viewer's clock, such as "2026-11-24 08:15:30.1234". Raises ValueError."""
    local = pd.Timestamp(text)
    # Of an hour that the clock shows twice the first is meant; for one that it skips, the moment after.
    return int(local.tz_localize(zone, ambiguous=True, nonexistent="shift_forward").timestamp())


def time_layout(dark: bool, height: int, start: int, end: int) -> Figure:
    """What figures on a time axis have in common."""
    grid = ink_of(dark)[1]
    return {
        **layout_of(dark, height),
        "margin": {"l": LEFT, "r": RIGHT, "t": 28, "b": 38},
        "xaxis": {
            "range": milliseconds([start, end]).tolist(),
            "type": "date",
            "gridcolor": grid,
            "zeroline": False,
            # The first label may be below the 0 of the other axis.
            "ticklabelstandoff": 4,
            "hoverformat": f"{fmt.date_form(start)} %H:%M:%S",
            "spikecolor": ink_of(dark)[0],
            "spikethickness": 1,
            "spikedash": "solid",
        },
    }


def layout_of(dark: bool, height: int) -> Figure:
    """What all figures have in common."""
    return {
        "height": height,
        # Plotly chooses the colours of what it lays over a figure, such as hover texts, by this one.
        "paper_bgcolor": ground_of(dark),
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": ink_of(dark)[0], "size": 13, "family": "'Source Sans', sans-serif"},
        "hovermode": "x unified",
        "hoverlabel": {
            "bgcolor": ground_of(dark),
            "bordercolor": GREYS[dark][1],
            "font": {"color": ink_of(dark)[0]},
        },
    }


def ground_of(dark: bool) -> str:
    """The colour of the page: as in .streamlit/config.toml."""
    return "#0d1117" if dark else "#f6f8fa"


def ink_of(dark: bool) -> tuple[str, str]:
    """Colours of text and grid lines."""
    return ("#c9d1d9", "#2b323c") if dark else ("#24292f", "#e4e8ed")


def heading_of(text: str, top: float) -> Figure:
    """A chart's heading above its plot, whose upper edge is at `top` of the figure (0 to 1)."""
    return {
        **{"text": f"<b>{text}</b>", "xref": "paper", "yref": "paper", "x": 0, "y": top},
        **{"xanchor": "left", "yanchor": "bottom", "showarrow": False},
    }
