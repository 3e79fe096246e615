"""Every process that was seen on a GPU."""

from __future__ import annotations

import time
from datetime import datetime

import streamlit as st

from gpumon_core.export.csv import ledger_csv
from gpumon_core.store.processes import ProcessFilter
from pages.ui import chrome, data, filters, tables

# A table this long gets a height of its own; a shorter one takes what it needs.
FEW, TALL = 10, 640

RANGES: dict[str, int | None] = {**filters.RANGES, "All": None}

found = chrome.top("Process history")
if found is None:
    st.stop()

at = data.tick(found)
text = st.sidebar.text_input(
    "Name, command or PID", placeholder="train.py or 4711", key="q", bind="query-params", live=True, type="search"
)
gpus = data.gpu_table(at)
chosen_gpus = filters.gpu_filter(gpus)
users = filters.user_filter(at)
programs_with = filters.program_filters(at, ("workload", "model"))
length = RANGES[filters.range_filter(RANGES, "24h", "Seen within the last")]

ids = filters.named_gpus(gpus)
wanted = ProcessFilter(
    start=None if length is None else int(time.time()) // 10 * 10 - length,
    gpu_ids=tuple(ids[name] for name in chosen_gpus),
    users=tuple(users),
    programs_with=tuple(programs_with.items()),
    text=text,
)
frame = data.process_history(at, wanted)
# The button's function runs later, outside this script, where the viewer is not known any more.
zone = chrome.zone()
left, right = st.columns([3, 1], vertical_alignment="center")
left.markdown(f"**{len(frame):,}** processes, newest first", width="content")
right.download_button(
    "Download CSV",
    data=lambda: ledger_csv(frame, zone),
    file_name=f"gpumon-processes-{datetime.now(zone):%Y%m%d-%H%M%S}.csv",
    mime="text/csv",
    icon=":material/download:",
    on_click="ignore",
    disabled=frame.empty,
    width="stretch",
)
if frame.empty:
    st.info("No process matches these filters. Choose a longer time range, or clear a filter in the sidebar.")
else:
    shown = tables.ledger(frame, zone)
    tables.show(
        shown,
        "process_history",
        "Processes seen on the GPUs, newest first",
        height=TALL if len(frame) > FEW else "auto",
    )
st.caption(f"Times in {chrome.zone_label()}.")
