"""What the GPUs did."""

from __future__ import annotations

from datetime import datetime

import streamlit as st

from gpumon_core import figures
from gpumon_core.metrics import GPU_METRICS_BY_KEY
from pages.ui import chrome, data, filters

METRICS = {GPU_METRICS_BY_KEY[key].label: key for key in ("temperature", "utilization", "memory", "power")}
POINTS = 600

found = chrome.top("History")
if found is None:
    st.stop()

gpus = data.gpu_table(data.tick(found))
chosen_range = filters.range_filter(dict(filters.RANGES), "1h")
chosen_gpus = filters.gpu_filter(gpus)
chosen_metrics = st.sidebar.pills(
    "Metrics", list(METRICS), selection_mode="multi", default=list(METRICS), key="metrics", bind="query-params"
)
live = st.sidebar.toggle(
    "Live",
    key="live",
    bind="query-params",
    help="Follow the newest sample. A zoomed chart jumps back with each one.",
)


@st.fragment(run_every=chrome.refresh_s() if live else None)
def charts() -> None:
    """One chart per metric over the chosen range, up to the newest sample."""
    now = data.health()
    if now is None or now.newest is None:
        return
    ids = filters.named_gpus(gpus)
    labels = {ids[name]: name for name in ids if name in chosen_gpus or not chosen_gpus}
    keys = [key for label, key in METRICS.items() if label in chosen_metrics]
    if not keys:
        st.info("No metric is chosen. Choose one in the sidebar.")
        return
    end = now.newest
    start = end - filters.RANGES[chosen_range]
    frame = data.history(data.tick(now), tuple(labels), tuple(keys), start, end, POINTS)
    if frame.empty:
        st.info("These GPUs have no samples in this time range. Choose a longer one.")
        return
    everyone = {gpu_id: name for name, gpu_id in ids.items()}
    figure = figures.history(frame, everyone, keys, start, end, chrome.zone(), chrome.is_dark())
    st.plotly_chart(
        figure,
        key="history",
        theme=None,
        config={"displaylogo": False, "modeBarButtonsToRemove": ["select2d", "lasso2d"]},
        alt=f"{', '.join(chosen_metrics)} of {', '.join(labels.values())} over {chosen_range}",
    )
    until = datetime.fromtimestamp(end, chrome.zone()).strftime("%a %d %b %Y, %H:%M:%S")
    st.caption(f"Up to {until} ({chrome.zone_label()}). Drag across a chart to zoom, double-click to go back.")


charts()
