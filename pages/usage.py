"""Who used the GPUs, with what, and what it cost."""

from __future__ import annotations

from datetime import datetime
from typing import Any, get_args

import pandas as pd
import streamlit as st

from gpumon_core import figures, ledger, runtime
from gpumon_core import format as fmt
from gpumon_core.export import csv
from gpumon_core.store.usage import OWN, Dimension, Scope
from pages.ui import chrome, data, filters, tables

RANGES: dict[str, int | None] = {name: filters.RANGES[name] for name in ("6h", "24h", "3d", "7d", "30d", "1y")}
TITLES: dict[str, Dimension] = {name.capitalize(): name for name in get_args(Dimension)} | {"GPU": "gpu"}
TITLES.pop("Gpu")
# So many parts are drawn apart from each other.
TOP = 7
# The ledger counts by the hour: nothing on this page changes from one tick to the next.
REFRESH_S = 60
CHART: dict[str, Any] = {"theme": None, "config": {"displayModeBar": False}}

found = chrome.top("Usage")
if found is None:
    st.stop()

at = data.minute(found)
gpus = data.gpu_table(data.tick(found))
chosen_range = filters.range_filter(RANGES, "7d")
chosen_gpus = filters.gpu_filter(gpus)
users = filters.user_filter(at)
programs_with = filters.program_filters(at, ("workload", "model"))
prices = ledger.Prices(
    runtime.settings().price_per_kwh, runtime.settings().price_per_gpu_hour, runtime.settings().currency
)
MEASURES = [name for name in ledger.MEASURES if name != "Cost" or prices.known]


def scope(now: int) -> Scope:
    """What the sidebar chooses."""
    ids = filters.named_gpus(gpus)
    return Scope(
        start=now - (RANGES[chosen_range] or 0),
        end=now,
        gpu_ids=tuple(ids[name] for name in chosen_gpus) or None,
        users=tuple(users) or None,
        programs_with=programs_with,
    )


@st.fragment(run_every=REFRESH_S)
def used() -> None:
    """The sums, by whom the reader wants to know, over time and as a table."""
    now = data.health()
    if now is None or now.newest is None:
        return
    at = data.minute(now)
    chosen = scope(now.newest)
    totals = data.gpu_totals(at, chosen)
    if totals.empty:
        st.info("Nothing was recorded in this time range. Choose a longer one.")
        return
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    by_title = left.segmented_control(
        "By", list(TITLES), default="User", key="by", bind="query-params", required=True
    )
    by = TITLES.get(by_title or "User", "user")
    measure = right.segmented_control(
        "Drawn", MEASURES, default=MEASURES[0], key="measure", bind="query-params", required=True
    )
    measure = measure if measure in MEASURES else MEASURES[0]
    ranking = data.usage_ranking(at, by, chosen)
    headline(ranking, totals)
    parts = ranking[ranking["kind"] == "part"]
    if parts.empty:
        st.info("No process was on these GPUs in this time range with these filters.")
    else:
        top = parts.assign(value=ledger.measure(parts, measure, prices)).nlargest(TOP, "value")["key"].tolist()
        names = data.usage_labels(at, by, ranking)
        over_time(at, by, chosen, top, names, measure)
    ranked = ledger.ranked(ranking, data.usage_labels(at, by, ranking), by_title or "User", prices)
    tables.show(tables.usage(ranked), f"usage_{by}", f"Use of the GPUs by {by}", currency=prices.currency)
    tables.download(
        "usage", lambda: csv.usage_csv(ranked, prices.currency), ranked.empty, chrome.zone(), "usage_csv"
    )
    notes = [f"Counted by the hour, from {moment(chosen.first_hour)} ({chrome.zone_label()})."]
    if ranked["Estimate"].any():
        notes.append(
            "Where the estimate is ticked, the driver does not tell processes apart: their GPU's use is split by "
            "the memory that they held."
        )
    if not prices.known:
        notes.append("Set `GPUMON_PRICE_PER_KWH` to see what it cost.")
    st.caption(" ".join(notes))


def headline(ranking: pd.DataFrame, totals: pd.DataFrame) -> None:
    """The range in a few numbers."""
    sums = ranking[["busy_s", "energy_j", "memory_mib_s"]].sum()
    seconds = totals["seconds"].sum()
    numbers = [
        ("GPU-hours", f"{sums['busy_s'] / 3600:,.1f} h", "Hours in which GPUs were busy, at full utilization"),
        ("Busy", f"{100 * sums['busy_s'] / seconds if seconds else 0:.0f} %", "Of all the time that was recorded"),
        ("Memory-hours", f"{sums['memory_mib_s'] / 1024 / 3600:,.0f} GiB·h", "GPU memory held, times how long"),
        ("Energy", f"{sums['energy_j'] / 3.6e6:,.2f} kWh", "Of the GPUs alone, idle ones included"),
    ]
    if prices.known:
        cost = ledger.measure(ranking, "Cost", prices).sum()
        numbers.append(
            ("Cost", f"{cost:,.2f} {prices.currency}", "Of energy, and of busy hours where they have a price")
        )
    for column, (label, value, hint) in zip(st.columns(len(numbers)), numbers, strict=True):
        column.metric(label, value, help=hint)


def over_time(
    at: data.Tick, by: Dimension, chosen: Scope, top: list[Any], names: dict[Any, str], measure: str
) -> None:
    """The trend as stacked areas."""
    span_s = 3600 if chosen.end - chosen.start <= ledger.HOURLY_UP_TO_S else 86400
    trend = data.usage_trend(at, by, chosen, tuple(top) if by == "process" else None)
    own = data.gpu_hours(at, chosen)
    frame = ledger.over_time(
        trend, own if not chosen.chooses else own.head(0), top, names, measure, prices, chrome.zone(), span_s
    )
    dark = chrome.is_dark()
    grey = {ledger.OTHERS: "#8a94a0", ledger.UNKNOWN: "#a9b1ba", OWN["idle"]: "#4a535e" if dark else "#cfd6dd"}
    parts = [part for part in frame.columns if part != "timestamp_epoch"]
    colors = {part: grey.get(part) or figures.color(number, dark) for number, part in enumerate(parts)}
    unit = ledger.MEASURES[measure] or prices.currency
    st.markdown(f"**{measure}** per {'hour' if span_s == 3600 else 'day'} ({fmt.plain(unit)})")
    st.plotly_chart(
        figures.stacked(frame, colors, unit, chrome.zone(), dark, span_s),
        key="trend",
        alt=f"{measure} by {by} over {chosen_range}, stacked",
        **CHART,
    )


@st.fragment(run_every=REFRESH_S)
def when() -> None:
    """The hours of the week, and where each GPU's time went."""
    now = data.health()
    if now is None or now.newest is None:
        return
    at = data.minute(now)
    chosen = scope(now.newest)
    totals = data.gpu_totals(at, chosen)
    if totals.empty:
        return
    left, right = st.columns(2)
    own = data.gpu_hours(at, chosen)
    mine = data.usage_trend(at, "gpu", chosen, None) if chosen.chooses else own
    with left:
        st.subheader("Hours of the week", anchor=False)
        st.plotly_chart(
            figures.week(ledger.by_week(mine, own, chrome.zone()), chrome.is_dark()),
            key="week",
            alt="How busy the GPUs were, by day of the week and hour",
            **CHART,
        )
    with right:
        st.subheader("Where each GPU's time went", anchor=False)
        begins = totals["first_seen"].clip(lower=chosen.first_hour)
        missed = (now.newest - begins - totals["seconds"]).clip(lower=0)
        # A few ticks at both ends are no gap.
        split = totals.assign(unrecorded_s=missed.where(missed > 60, 0.0))
        labels = [name for name, gpu_id in filters.named_gpus(totals.assign(id=totals["gpu_id"])).items()]
        st.plotly_chart(
            figures.time_split(split, labels, chrome.is_dark()),
            key="split",
            alt="Each GPU's time: busy, held idle, free, not recorded",
            **CHART,
        )
        table = tables.time_split(split, labels)
        tables.download(
            "gpu-time", lambda: csv.plain_csv(table, csv.TIME_UNITS), False, chrome.zone(), "split_csv"
        )


@st.fragment(run_every=REFRESH_S)
def idle() -> None:
    """Who keeps memory and does nothing."""
    now = data.health()
    if now is None or now.newest is None:
        return
    chosen = scope(now.newest)
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    left.subheader("Idle holders", anchor=False)
    minutes = right.number_input(
        "Idle for at least (minutes)",
        min_value=1,
        max_value=1440,
        value=round(runtime.settings().idle_minutes),
        key="idle",
        bind="query-params",
    )
    frame = data.idle_holders(data.minute(now), chosen, 60 * minutes)
    if frame.empty:
        st.caption("No process has kept GPU memory in this time range without using it for so long.")
        return
    shown = tables.idle_holders(frame, chrome.zone(), now.newest)
    tables.show(shown, "idle_holders", "Processes that kept memory and did nothing")
    tables.download("idle", lambda: csv.idle_csv(frame, zone), False, zone, "idle_csv")


@st.fragment(run_every=REFRESH_S)
def models() -> None:
    """Which models were loaded."""
    now = data.health()
    if now is None or now.newest is None:
        return
    st.subheader("Model sessions", anchor=False)
    frame = data.model_sessions(data.minute(now), scope(now.newest))
    if frame.empty:
        st.caption("No model server had a model loaded in this time range, or none could be asked.")
        return
    shown = tables.sessions(frame, chrome.zone())
    tables.show(shown, "sessions", "Models and when they were loaded", height=420 if len(frame) > 10 else "auto")
    tables.download("models", lambda: csv.sessions_csv(frame, zone), False, zone, "sessions_csv")


def moment(epoch: int) -> str:
    """A time for the reader."""
    return datetime.fromtimestamp(epoch, chrome.zone()).strftime("%a %d %b %Y, %H:%M")


# Downloads are made outside this script, where the viewer is not known any more.
zone = chrome.zone()
used()
when()
idle()
models()
