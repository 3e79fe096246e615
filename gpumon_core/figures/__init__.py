"""DataFrames in, Plotly figures out."""

from gpumon_core.figures.base import (
    GREYS,
    Figure,
    as_json,
    color,
    colors_of,
    from_wall_clock,
    hue,
    milliseconds,
    shades,
)
from gpumon_core.figures.history import device, history, life
from gpumon_core.figures.lanes import lanes, reasons
from gpumon_core.figures.system import growth, pulse
from gpumon_core.figures.usage import stacked, time_split, week

__all__ = [
    "GREYS",
    "Figure",
    "as_json",
    "color",
    "colors_of",
    "device",
    "from_wall_clock",
    "growth",
    "history",
    "hue",
    "lanes",
    "life",
    "milliseconds",
    "pulse",
    "reasons",
    "shades",
    "stacked",
    "time_split",
    "week",
]
