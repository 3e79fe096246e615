"""What the GPUs did, and which processes ran on them."""

from __future__ import annotations

import streamlit as st

from gpumon_core.metrics import GPU_METRICS_BY_KEY
from gpumon_core.recording.health import Health
from gpumon_core.store.queries import frames
from pages.components import charts, chrome, data, filters, links

DEFAULT = tuple(GPU_METRICS_BY_KEY[key].label for key in ("utilization", "memory", "temperature", "power"))
LANES: dict[str, charts.Lanes | None] = {"Processes": "process", "Models": "model", "Off": None}

found = chrome.ready()
if found is not None and found.latest is not None:
    gpus = data.ask(data.tick(found), frames.gpu_table)
    window = filters.window(list(filters.RANGES), "1h", found.latest)
    chosen_gpus = filters.gpu_filter(gpus)
    offered = charts.offered(gpus)
    links.check("metrics", "metric", offered.__contains__, "the usual metrics")
    chosen_metrics = st.sidebar.multiselect(
        "Metrics",
        list(offered),
        default=[label for label in DEFAULT if label in offered],
        key="metrics",
        placeholder="No metric",
        bind="query-params",
        on_change=links.forget,
    )
    links.check("lanes", "lanes", LANES.__contains__, "processes")
    below = st.sidebar.segmented_control(
        "Lanes",
        list(LANES),
        default="Processes",
        key="lanes",
        bind="query-params",
        required=True,
        on_change=links.forget,
    )
    stacked = st.sidebar.toggle(
        "Memory by process", value=True, key="stacked", bind="query-params", on_change=links.forget
    )


def body(now: Health) -> None:
    """Charts of the metrics, and under them on the same axis the processes."""
    filters.follow_zoom()
    ids = filters.named_gpus(gpus)
    labels = {gpu_id: name for name, gpu_id in ids.items()}
    keys = tuple(offered[label] for label in chosen_metrics)
    if not keys and not stacked and not LANES[below or "Off"]:
        st.info("Nothing is chosen to be drawn. Choose a metric in the sidebar.")
        return
    charts.over_time(
        now,
        window,
        charts.Chosen(
            gpu_ids=tuple(ids[name] for name in chosen_gpus if name in ids) or tuple(labels),
            labels=labels,
            metrics=keys,
            lanes=LANES[below or "Off"],
            memory_by_process=stacked,
        ),
        key="history",
    )


refresh = None if found is None or found.latest is None else charts.refresh_s(window)
chrome.live("History", body, refresh)
