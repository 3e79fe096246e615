"""From the sums of the ledger to what pages show: steps of time, shares, costs. DataFrames in, DataFrames out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pandas as pd

from gpumon_core.format import JOULES_PER_KWH
from gpumon_core.store.accounting import STEP_S
from gpumon_core.store.queries.usage import GPU_ROWS

HOUR_S, DAY_S = 3600, 86400
MIB_PER_GIB = 1024
OTHERS = "Others"
UNKNOWN = "unknown"
# Ranges up to this are drawn hour by hour, longer ones day by day.
HOURLY_UP_TO_S = 3 * DAY_S


@dataclass(frozen=True, slots=True)
class Prices:
    """What energy and busy GPUs cost; None where no price is set."""

    per_kwh: float | None
    per_gpu_hour: float | None
    currency: str

    @property
    def known(self) -> bool:
        """Whether anything has a price."""
        return self.per_kwh is not None or self.per_gpu_hour is not None

    def cost(self, energy_j: pd.Series, busy_s: pd.Series) -> pd.Series:
        """Of energy in joules and busy seconds."""
        energy = energy_j.fillna(0) / JOULES_PER_KWH * (self.per_kwh or 0.0)
        return energy + busy_s.fillna(0) / HOUR_S * (self.per_gpu_hour or 0.0)


# What can be ranked and drawn: title -> unit.
MEASURES = {"GPU-hours": "h", "Memory-hours": "GiB·h", "Energy": "kWh", "Cost": ""}


def measure(frame: pd.DataFrame, name: str, prices: Prices) -> pd.Series:
    """One of MEASURES of the rows of a ranking or trend."""
    if name == "Cost":
        return prices.cost(frame["energy_j"], frame["busy_s"])
    if name == "Energy":
        return frame["energy_j"] / JOULES_PER_KWH
    if name == "Memory-hours":
        return frame["memory_mib_s"] / MIB_PER_GIB / HOUR_S
    return frame["busy_s"] / HOUR_S


def called(ranking: pd.DataFrame, names: Mapping[Any, str]) -> pd.Series:
    """The name of each row of a ranking."""
    own = ranking["kind"] != "part"
    known = ranking["key"].map(lambda key: _label(key, names), na_action=None)
    return known.where(~own, ranking["kind"].map(GPU_ROWS)).fillna(UNKNOWN)


def _label(key: Any, names: Mapping[Any, str]) -> str | None:
    return names.get(key) if pd.notna(key) else UNKNOWN


def shares(ranking: pd.DataFrame) -> pd.Series:
    """Each row's share of the energy of all rows of a ranking, in percent."""
    energy = ranking["energy_j"].sum()
    return 100 * ranking["energy_j"] / (energy or 1.0)


def ranked(ranking: pd.DataFrame, names: Mapping[Any, str], by: str, prices: Prices) -> pd.DataFrame:
    """A ranking as people see it: `by` (the name), Processes, GPU-hours, On GPU (s), Held idle (s), Memory-hours,
    Energy, Share (percent of all energy), Cost where there are prices, and Estimate. Files: export.usage."""
    table = pd.DataFrame(
        {
            by: called(ranking, names),
            "Processes": ranking["processes"],
            **{name: measure(ranking, name, prices) for name in MEASURES if name != "Cost"},
            "Share": shares(ranking),
            "On GPU": ranking["seconds"],
            "Held idle": ranking["idle_s"],
        }
    )
    if prices.known:
        table["Cost"] = measure(ranking, "Cost", prices)
    table["Estimate"] = ranking["estimated"] > 0
    return table


def steps(epochs: pd.Series, span_s: int, zone: ZoneInfo) -> pd.Series:
    """The beginning of the hour or of the viewer's day that each time (UTC seconds) is in, as UTC seconds."""
    local = pd.to_datetime(epochs, unit="s", utc=True).dt.tz_convert(zone)
    if span_s < DAY_S:
        shown = local.dt.tz_localize(None).astype("datetime64[s]").astype("int64")
        return epochs - shown % span_s
    midnight = local.dt.tz_localize(None).dt.normalize()
    # In a night in which the clock is set, midnight may come once, twice, or not at all.
    aware = midnight.dt.tz_localize(zone, ambiguous=True, nonexistent="shift_forward").dt.tz_convert("UTC")
    return aware.dt.tz_localize(None).astype("datetime64[s]").astype("int64")


def fits(zone: ZoneInfo, moment: float) -> bool:
    """Whether the hours of a zone consist of half hours of the ledger at a moment (UTC seconds): not in Nepal."""
    offset = datetime.fromtimestamp(moment, zone).utcoffset() or timedelta()
    return offset.total_seconds() % STEP_S == 0


def by_step(
    trend: pd.DataFrame,
    own: pd.DataFrame,
    top: Sequence[Any],
    names: Mapping[Any, str],
    name: str,
    prices: Prices,
    zone: ZoneInfo,
    span_s: int,
) -> pd.DataFrame:
    """A measure step by step: timestamp_epoch and a column for each of the `top` keys, for the others, and, of
    energy and cost, for what the idle GPUs took. `own` is usage.gpu_hours. No step between the first and the last
    is missing: one without processes is 0, because a figure would draw the value before it again."""
    parts = trend.assign(step=steps(trend["timestamp_epoch"], span_s, zone), value=measure(trend, name, prices))
    first = list(dict.fromkeys(_label(key, names) or OTHERS for key in top))
    parts["part"] = parts["key"].map(lambda key: _label(key, names) or OTHERS, na_action=None)
    parts["part"] = parts["part"].where(parts["part"].isin(first), OTHERS)
    wide = parts.pivot_table(index="step", columns="part", values="value", aggfunc="sum")
    if name in ("Energy", "Cost") and len(own):
        idle = pd.DataFrame(
            {
                "energy_j": own["idle_j"] + own["unattributed_j"] + own["unrecorded_j"],
                "busy_s": own["unattributed_s"],
                "memory_mib_s": 0.0,
            }
        )
        values = measure(idle, name, prices).groupby(steps(own["timestamp_epoch"], span_s, zone)).sum()
        wide = wide.reindex(wide.index.union(values.index))
        wide[GPU_ROWS["idle"]] = values
    order = [part for part in dict.fromkeys((*first, OTHERS, GPU_ROWS["idle"])) if part in wide.columns]
    if len(wide):
        hours = pd.Series(range(int(wide.index[0]), int(wide.index[-1]) + 1, HOUR_S))
        wide = wide.reindex(wide.index.union(steps(hours, span_s, zone).drop_duplicates().tolist()))
    return wide[order].fillna(0.0).rename_axis("timestamp_epoch").reset_index()


def by_week(used: pd.DataFrame, recorded: pd.DataFrame, zone: ZoneInfo) -> pd.DataFrame:
    """How busy the GPUs were at each hour of the week: weekday, hour, share (percent).

    used: timestamp_epoch, busy_s; recorded: timestamp_epoch, seconds and unknown_s (of all GPUs together). Time in
    which the driver reported no utilization does not count.
    """
    busy = used.groupby("timestamp_epoch")["busy_s"].sum()
    local = pd.to_datetime(recorded["timestamp_epoch"], unit="s", utc=True).dt.tz_convert(zone)
    frame = pd.DataFrame(
        {
            "weekday": local.dt.day_of_week,
            "hour": local.dt.hour,
            "seconds": recorded["seconds"] - recorded["unknown_s"],
            "busy_s": recorded["timestamp_epoch"].map(busy).fillna(0.0),
        }
    )
    sums = frame.groupby(["weekday", "hour"])[["busy_s", "seconds"]].sum()
    sums = sums[sums["seconds"] > 0]
    return (100 * sums["busy_s"] / sums["seconds"]).rename("share").reset_index()
