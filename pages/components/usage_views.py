"""What the Usage page shows, as figures and tables: made once a minute and view, for all viewers."""

from __future__ import annotations

from typing import Any
from zoneinfo import ZoneInfo

import pandas as pd

from gpumon_core import figures
from gpumon_core.store.queries import costs, model_sessions, processes, usage
from gpumon_core.store.queries.dimensions import Dimension
from gpumon_core.store.queries.usage import GPU_ROWS, Scope
from pages.components import data, filters, tables
from pages.components.charts import Appearance

# The largest parts of the ledger have areas of their own, at most this many.
TOP_PARTS = 7
# A GPU's time without ticks at both ends of a range is no gap up to this length.
NO_GAP_S = 60


def _labels(at: data.Tick, by: Dimension, ranking: pd.DataFrame) -> dict[Any, str]:
    """The names of a ranking's keys."""
    keys = ranking.loc[ranking["kind"] == "part", "key"].dropna()
    return data.ask(at, usage.labels, by, tuple(keys))


@data.shared(max_entries=24)
def trend(at: data.Tick, by: Dimension, scope: Scope, measure: str, appearance: Appearance) -> str | None:
    """A measure (of costs.MEASURES) by a dimension, by the hour or by the day; None where there was no process."""
    ranking = data.ask(at, usage.ranking, by, scope)
    parts = ranking[ranking["kind"] == "part"]
    if parts.empty:
        return None
    prices = data.prices()
    names = _labels(at, by, ranking)
    value = costs.measure(parts, measure, prices)
    top = parts.assign(value=value).nlargest(TOP_PARTS, "value")["key"].tolist()
    span_s = costs.HOUR_S if scope.end - scope.start <= costs.HOURLY_UP_TO_S else costs.DAY_S
    parts_by_step = data.ask(at, usage.trend, by, scope, tuple(top) if by == "process" else None)
    own = data.ask(at, usage.gpu_hours, scope)
    own = own[own["timestamp_epoch"] >= scope.first_step] if not scope.chooses else own.head(0)
    frame = costs.by_step(parts_by_step, own, top, names, measure, prices, appearance.zone, span_s)
    rest, unknown, idle = figures.GREYS[appearance.dark]
    drawn = [part for part in frame.columns if part != "timestamp_epoch"]
    # A workload has the colour that it has on the other pages.
    workloads = data.ask(at, processes.workloads) if by == "workload" else []
    known = figures.colors_of(workloads, appearance.dark)
    known |= {costs.OTHERS: rest, costs.UNKNOWN: unknown, GPU_ROWS["idle"]: idle}
    colors = {part: known.get(part) or figures.hue(number, appearance.dark) for number, part in enumerate(drawn)}
    unit = costs.MEASURES[measure] or prices.currency
    figure = figures.stacked(
        frame,
        colors,
        unit,
        appearance.dark,
        span_s,
        within=(scope.first_step, scope.end),
        heading=f"{measure} per {'hour' if span_s == costs.HOUR_S else 'day'} ({unit})",
    )
    return figures.as_json(figure)


@data.shared(max_entries=24)
def week(at: data.Tick, scope: Scope, appearance: Appearance) -> str:
    """How busy the GPUs were at each hour of the week, in the time in which their utilization is known."""
    own = data.ask(at, usage.gpu_hours, scope)
    mine = data.ask(at, usage.trend, "gpu", scope, None) if scope.chooses else own
    return figures.as_json(figures.week(costs.by_week(mine, own, appearance.zone), appearance.dark))


@data.shared(max_entries=24)
def time_split(at: data.Tick, scope: Scope, appearance: Appearance) -> tuple[str, pd.DataFrame]:
    """Where each GPU's time went, as a figure and as a table."""
    totals = data.ask(at, usage.gpu_totals, scope)
    begins = totals["first_seen"].clip(lower=scope.first_step)
    missed = (scope.end - begins - totals["seconds"]).clip(lower=0)
    split = totals.assign(unrecorded_s=missed.where(missed > NO_GAP_S, 0.0))
    names = list(filters.named_gpus(totals.assign(id=totals["gpu_id"])))
    figure = figures.time_split(split, names, appearance.dark)
    return figures.as_json(figure), tables.time_split(split, names)


@data.shared(max_entries=24)
def ranked(at: data.Tick, by: Dimension, title: str, scope: Scope) -> pd.DataFrame:
    """The ranking as a table."""
    ranking = data.ask(at, usage.ranking, by, scope)
    return tables.usage(costs.ranked(ranking, _labels(at, by, ranking), title, data.prices()))


@data.shared(max_entries=24)
def idle_holders(
    at: data.Tick, scope: Scope, idle_s: float, zone_name: str, _newest: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Processes that held memory and did nothing: the rows for a file, and the table of the page."""
    frame = usage.idle_holders(data.engine(at), scope, idle_s)
    return frame, tables.idle_holders(frame, ZoneInfo(zone_name), _newest)


@data.shared(max_entries=24)
def sessions(at: data.Tick, scope: Scope, zone_name: str) -> pd.DataFrame:
    """Which models were loaded, as a table."""
    return tables.sessions(model_sessions.loaded(data.engine(at), scope), ZoneInfo(zone_name))
