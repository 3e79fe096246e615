"""Who used the GPUs, with what, and what it cost."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from gpumon_core import format as fmt
from gpumon_core.export import usage as export
from gpumon_core.recording import runtime
from gpumon_core.recording.health import Health
from gpumon_core.store.queries import costs, frames, usage
from gpumon_core.store.queries.dimensions import DIMENSIONS, Dimension
from gpumon_core.store.queries.usage import Scope
from pages.components import charts, chrome, data, download, filters, links, plot, tables, usage_views

RANGES = ("6h", "24h", "3d", "7d", "30d", "1y")
TITLES: dict[str, Dimension] = {name.capitalize(): name for name in DIMENSIONS} | {"GPU": "gpu"}
TITLES.pop("Gpu")
# The ledger counts by the half hour: nothing on this page changes between two ticks.
REFRESH_S = 60

found = chrome.ready()
if found is not None and found.latest is not None:
    at = data.minute(found)
    gpus = data.ask(data.tick(found), frames.gpu_table)
    window = filters.window(RANGES, "7d", found.latest)
    chosen_gpus = filters.gpu_filter(gpus)
    users = filters.user_filter(at)
    programs_with = filters.program_filters(at, ("workload", "model"))
prices = data.prices()
MEASURES = [name for name in costs.MEASURES if name != "Cost" or prices.known]
links.check("by", "grouping", TITLES.__contains__, "by user")
links.check("measure", "measure", MEASURES.__contains__, MEASURES[0])
# Downloads are made outside this script, where the viewer is not known.
zone = chrome.zone()


def scope(newest: int) -> Scope:
    """What the sidebar chooses."""
    ids = filters.named_gpus(gpus)
    start, end = window.span(newest)
    return Scope(
        start=start,
        end=end,
        gpu_ids=tuple(ids[name] for name in chosen_gpus if name in ids) or None,
        users=tuple(users) or None,
        programs_with=programs_with,
    )


def body(now: Health) -> None:
    """The sums, and use by a dimension over time and as a table; then the hours of use, idle holders and
    models."""
    assert now.latest is not None
    at = data.minute(now)
    chosen = scope(now.latest)
    totals = data.ask(at, usage.gpu_totals, chosen)
    if totals.empty:
        st.info("Nothing was recorded in this time range. Choose a longer one.")
        return
    title = used(at, chosen, totals)
    # The charts are sent before the table above them: a browser takes longest to draw them.
    below = st.container()
    when(at, chosen)
    with below:
        ranked(at, chosen, title)
    idle(at, chosen, now.latest)
    models(at, chosen)


def used(at: data.Tick, chosen: Scope, totals: pd.DataFrame) -> str:
    """How much of the GPUs was used, and by whom; returns which of TITLES the reader has chosen."""
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    title = left.segmented_control(
        "By",
        list(TITLES),
        default="User",
        key="by",
        bind="query-params",
        required=True,
        wrap=True,
        on_change=links.forget,
    )
    title = title or "User"
    measure = right.segmented_control(
        "Drawn",
        MEASURES,
        default=MEASURES[0],
        key="measure",
        bind="query-params",
        required=True,
        wrap=True,
        on_change=links.forget,
    )
    measure = measure if measure in MEASURES else MEASURES[0]
    by = TITLES[title]
    headline(data.ask(at, usage.ranking, by, chosen), totals)
    trend = usage_views.trend(at, by, chosen, measure, charts.appearance())
    if trend is None:
        st.info("No process was on these GPUs in this time range with these filters.")
    else:
        plot.show(
            [trend],
            key="trend",
            alt=f"{measure} by {by} over {window.says()}, stacked",
            view=f"{by} {measure} {chosen.identity}",
        )
    return title


def ranked(at: data.Tick, chosen: Scope, title: str) -> None:
    """How much of the GPUs each user, container, ... had."""
    by = TITLES[title]
    shown = usage_views.ranked(at, by, title, chosen)
    tables.show(shown, f"usage_{by}", f"Use of the GPUs by {by}", currency=prices.currency)

    if not shown.empty:
        download.show("api/v1/usage", [("by", by), *chosen.query()], zone)
    since = fmt.plain(f"{fmt.moment(chosen.first_step, zone)} ({chrome.zone_label()})")
    notes = [f"Counted by the half hour, from {since}."]
    if not costs.fits(zone, chosen.end):
        notes.append(
            "This time zone is off by a quarter of an hour: its hours and days begin 15 minutes early here."
        )
    if "Estimate" in shown:
        notes.append(
            "Where the estimate is ticked, the driver reports no use by process: the GPU's use is split by the "
            "memory that each process held."
        )
    if not prices.known:
        notes.append("Set `GPUMON_PRICE_PER_KWH` to see what it cost.")
    st.caption(" ".join(notes))


def headline(ranking: pd.DataFrame, totals: pd.DataFrame) -> None:
    """The range in a few numbers."""
    sums = ranking[["busy_s", "energy_j", "memory_mib_s"]].sum()
    unknown_s = totals["unknown_s"].sum()
    seconds = totals["seconds"].sum() - unknown_s
    silent = f", but for {fmt.duration(unknown_s)} of unknown utilization" if unknown_s > 1 else ""
    numbers = [
        (
            "GPU-hours",
            f"{fmt.amount(sums['busy_s'] / 3600, 1)} h",
            "Hours in which GPUs were busy, at full utilization",
        ),
        (
            "Busy",
            f"{100 * sums['busy_s'] / seconds:.0f} %" if seconds > 0 else fmt.MISSING,
            f"Of all the time that was recorded{silent}",
        ),
        (
            "Memory-hours",
            f"{fmt.amount(sums['memory_mib_s'] / 1024 / 3600, 0)} GiB·h",
            "GPU memory held, times how long",
        ),
        ("Energy", fmt.energy(sums["energy_j"]), "Of the GPUs alone, idle ones included"),
    ]
    if prices.known:
        cost = costs.measure(ranking, "Cost", prices).sum()
        numbers.append(
            (
                "Cost",
                f"{cost:,.2f} {fmt.plain(prices.currency)}",
                "Of energy, and of busy hours where they have a price",
            )
        )
    with st.container(horizontal=True, gap="medium"):
        for label, value, hint in numbers:
            st.metric(label, value, help=hint)


def when(at: data.Tick, chosen: Scope) -> None:
    """The hours of the week in which the GPUs were busy, and where each GPU's time went."""
    left, right = st.columns(2)
    seen = charts.appearance()
    with left:
        st.subheader("Hours of the week", anchor=False)
        week = usage_views.week(at, chosen, seen)
        plot.show([week], key="week", alt="How busy the GPUs were, by day of the week and hour")
    with right:
        st.subheader("Where each GPU's time went", anchor=False)
        split, table = usage_views.time_split(at, chosen, seen)
        plot.show([split], key="split", alt="Each GPU's time: busy, held idle, free, unknown, not recorded")
        st.caption(
            "Held idle is time in which memory was held and nothing was computed; in the table above it is only "
            f"what lasted {runtime.settings().idle_minutes:g} minutes or longer. Unknown is time in which the "
            "driver reported no utilization, as for MIG instances."
        )
        tables.download("gpu-time", lambda: export.time_split(table).csv(table, zone), zone, "split_csv")


def idle(at: data.Tick, chosen: Scope, newest: int) -> None:
    """Processes that hold memory and do nothing."""
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    left.subheader("Idle holders", anchor=False)
    minutes = right.number_input(
        "Idle for at least (minutes)",
        min_value=1,
        max_value=1440,
        value=round(runtime.settings().idle_minutes),
        key="idle",
        bind="query-params",
        on_change=links.forget,
    )
    frame, shown = usage_views.idle_holders(at, chosen, 60 * minutes, zone.key, newest)
    if frame.empty:
        st.caption("No process has held GPU memory for this long in this time range without using the GPU.")
        return
    tables.show(shown, "idle_holders", "Processes that held memory and did nothing")
    tables.download("idle", lambda: export.IDLE.csv(frame, zone), zone, "idle_csv")


def models(at: data.Tick, chosen: Scope) -> None:
    """Which models were loaded."""
    st.subheader("Model sessions", anchor=False)
    shown = usage_views.sessions(at, chosen, zone.key)
    if shown.empty:
        st.caption("No model server had a model loaded in this time range, or gpumon could not ask any.")
        return
    tables.show(shown, "sessions", "Models and when they were loaded", height=420 if len(shown) > 10 else "auto")
    download.show("api/v1/models", chosen.query(), zone)


chrome.live("Usage", body, REFRESH_S)
