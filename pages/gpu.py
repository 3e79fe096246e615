"""One GPU in depth."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from gpumon_core import format as fmt
from gpumon_core import gpu_state
from gpumon_core.metrics import GPU_METRICS, Group
from gpumon_core.recording.health import Health
from gpumon_core.store.queries import frames
from pages.components import charts, chrome, data, filters, links
from pages.components import now as live

# What each group's charts show by default; the others are a click away.
OPEN = (Group.COMPUTE, Group.MEMORY, Group.CLOCKS, Group.THERMALS)

SAMPLING = {
    "interval": "mean since the tick before",
    "partial": "mean of the newest samples since the tick before",
    "point": "as it was at the tick",
}

found = chrome.ready()
if found is not None and found.latest is not None:
    gpus = data.ask(data.tick(found), frames.gpu_table)
    named = filters.named_gpus(gpus)
    links.check("gpu", "GPU", named.__contains__, next(iter(named), "nothing"))
    chosen = st.sidebar.selectbox(
        "GPU",
        list(named),
        key="gpu",
        bind="query-params",
        disabled=len(named) < 2,
        on_change=links.forget,
    )
    window = filters.window([name for name in filters.RANGES if name != "15m"], "1h", found.latest)
    links.check("groups", "charts", [str(group) for group in Group].__contains__, "the usual charts")
    groups = st.sidebar.pills(
        "Charts",
        [str(group) for group in Group],
        selection_mode="multi",
        default=[str(group) for group in OPEN],
        key="groups",
        bind="query-params",
        on_change=links.forget,
    )


def body(now: Health) -> None:
    """Its state, its facts, every metric, and its processes."""
    filters.follow_zoom()
    if chosen is None or chosen not in named:
        st.info("There is no GPU to show. `nvidia-smi -L` lists what the driver sees.")
        return
    at = data.tick(now)
    table = data.ask(at, frames.gpu_table)
    gpu = table[table["id"] == named[chosen]]
    if gpu.empty:
        st.info(f"{fmt.plain(chosen)} is gone. Choose another GPU in the sidebar.")
        return
    chrome.stale_warning(now)
    st.html(live.gpu_html(at, named[chosen]) + facts(gpu.iloc[0]))
    values(gpu.iloc[0])
    charts.device(now, window, named[chosen], {gpu_id: name for name, gpu_id in named.items()}, groups)


def facts(gpu: pd.Series) -> str:
    """What does not change, as HTML."""
    shared = f", {gpu_state.SHARED}" if gpu_state.shares_memory(gpu["memory_from"]) else ""
    pieces = {
        "UUID": gpu["uuid"],
        "PCI": gpu["pci_bus_id"],
        "Architecture": gpu["architecture"],
        "Compute capability": gpu["compute_capability"],
        "Memory": fmt.memory(gpu["memory_total_mib"]) + shared,
        "Power limit": fmt.MISSING if fmt.missing(gpu["power_limit_w"]) else f"{gpu['power_limit_w']:.0f} W",
        "First seen": fmt.moment(gpu["first_seen"], chrome.zone()),
        "Utilization": SAMPLING.get(gpu["sampling"], fmt.MISSING),
    }
    return chrome.facts_html(pieces)


def values(gpu: pd.Series) -> None:
    """Every metric that this GPU has now; nothing for a GPU that does not answer."""
    if not gpu_state.answers(gpu["state"]):
        return
    shown = {}
    for group in Group:
        has = {
            metric.label: fmt.value(metric, gpu[metric.key])
            for metric in GPU_METRICS
            if metric.group is group and metric.key not in charts.UNDRAWN and not fmt.missing(gpu[metric.key])
        }
        if has:
            shown[str(group)] = has
    with st.expander("All metrics now", icon=":material/table_rows:", key="all_metrics"):
        st.html(chrome.groups_html(shown))


refresh = None if found is None or found.latest is None else charts.refresh_s(window)
chrome.live("GPU", body, min(refresh, 10.0) if refresh is not None else None)
