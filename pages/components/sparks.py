"""The last minutes of a metric as a small drawing on a card, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import quote

import pandas as pd

from gpumon_core import format as fmt
from gpumon_core.metrics import GPU_METRICS_BY_KEY, Metric
from gpumon_core.store.queries.current import NamedRow

# What cards draw over time.
METRICS = ("utilization", "temperature", "power")
WIDTH, HEIGHT = 160, 32
# A drawing as a quoted URL within an attribute. Only numbers, letters and blanks are filled in.
DRAWING = quote(
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
    'preserveAspectRatio="none"><path d="{area}" fill-opacity=".16"/><path d="{line}" fill="none" '
    'stroke="#000" stroke-width="1.5" stroke-linejoin="round" vector-effect="non-scaling-stroke"/></svg>',
    safe=" =:/.,-{}",
)
# The place of the newest sample in a drawing, at the end of its line, and the greatest age of the point before it.
PRESENT = "\0"
PRESENT_WITHIN_S = 60
# A row of current.gpus, and the columns of metrics_history of one GPU.
Trend = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Spark:
    """The last minutes of a metric, drawn once for several ticks: a text with a place for the end of the line, and
    the value at the top of the drawing. There is no place where the line ended earlier."""

    text: str
    top: float

    def up_to(self, value: float) -> str:
        """The drawing, with a line that ends at the present value."""
        y = _y(min(max(value, 0.0), self.top), self.top)
        return self.text.replace(PRESENT, f"{WIDTH} {y}")


def _y(value: float, top: float) -> int:
    return round(HEIGHT - 1 - value * (HEIGHT - 2) / top)


def sparkline(trend: Trend, metric: Metric, total: float | None, span: tuple[int, int]) -> Spark | None:
    """The last minutes of a metric as a drawing: a line over a shaded area, broken at gaps. None for less than two
    values."""
    times, values = trend["timestamp_epoch"].tolist(), trend[metric.key].tolist()
    known = _known(values)
    if len(known) < 2:
        return None
    top = total if total and not fmt.missing(total) else metric.maximum
    top = max(*known, top or 0.0) or 1.0
    start, end = span
    across = WIDTH / max(1, end - start)
    runs: list[list[str]] = [[]]
    edges: list[list[int]] = [[]]
    for time, value in zip(times, values, strict=True):
        if value != value:  # noqa: PLR0124
            runs.append([])
            edges.append([])
        else:
            x = round((time - start) * across)
            runs[-1].append(f"{x} {_y(value, top)}")
            edges[-1].append(x)
    if edges[-1] and end - times[-1] <= PRESENT_WITHIN_S:
        runs[-1].append(PRESENT)
        edges[-1].append(WIDTH)
    drawn = [("L".join(run), edge[0], edge[-1]) for run, edge in zip(runs, edges, strict=True) if len(run) > 1]
    line = "".join(f"M{points}" for points, _, _ in drawn)
    area = "".join(f"M{first} {HEIGHT}L{points}L{last} {HEIGHT}Z" for points, first, last in drawn)
    lowest = fmt.value(metric, min(_known(trend[f"{metric.key}_min"].tolist()), default=None))
    highest = fmt.value(metric, max(_known(trend[f"{metric.key}_max"].tolist()), default=None))
    # Streamlit removes SVG, but not a mask: the drawing gives the shape, and CSS the colour.
    drawing = DRAWING.format(area=area, line=line)
    return Spark(
        f'<div class="gm-spark" role="img" aria-label="{escape(metric.label)} in the last minutes: {lowest} to '
        f'{highest}" style="--drawing:url(\'data:image/svg+xml,{drawing}\')"></div>',
        top,
    )


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if value == value]  # noqa: PLR0124 - NaN is not


def of_gpus(gpus: Sequence[NamedRow], trend: pd.DataFrame, span: tuple[int, int]) -> dict[int, dict[str, Spark]]:
    """The drawings of the cards' trends, by GPU id and metric. `gpus` as from current.gpus, `trend` as
    from metrics_history of METRICS over `span` (UTC seconds)."""
    drawn = {}
    for row in gpus:
        mine = trend["gpu_id"].to_numpy() == row["id"]
        if mine.any():
            columns = {name: trend[name].to_numpy()[mine] for name in trend.columns}
            metrics = (GPU_METRICS_BY_KEY[key] for key in METRICS)
            mine_drawn = {
                metric.key: sparkline(columns, metric, row[metric.share_of] if metric.share_of else None, span)
                for metric in metrics
            }
            drawn[row["id"]] = {key: spark for key, spark in mine_drawn.items() if spark is not None}
    return drawn
