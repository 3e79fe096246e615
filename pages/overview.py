"""What the GPUs do now."""

from __future__ import annotations

import streamlit as st

from gpumon_core.recording import runtime
from gpumon_core.recording.health import Health
from gpumon_core.store.queries import current
from pages.components import chrome, data, download, tables
from pages.components import now as live


def body(now: Health) -> None:
    """One card per GPU, and the processes of the newest tick."""
    at = data.tick(now)
    chrome.stale_warning(now)
    if not data.ask(at, current.gpus):
        st.info("The driver answers, but lists no GPU. `nvidia-smi -L` shows what it sees.")
    st.html(live.overview_html(at))
    processes(at)


def processes(at: data.Tick) -> None:
    """The processes of the newest tick."""
    found = data.ask(at, current.processes)
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    left.subheader("Active processes", anchor=False)
    text = right.text_input(
        "Search",
        placeholder="Name or PID",
        key="active_search",
        label_visibility="collapsed",
        live=True,
        type="search",
    )
    shown = live.active_processes(at, chrome.zone().key)
    if text.strip():
        shown = tables.matching(shown, text)
    if not len(shown):
        if not found and not runtime.sees_processes():
            st.caption(
                "gpumon runs in a container with PIDs of its own, where the driver reports no process outside it: "
                "start it with `--pid=host` to see the processes on the GPUs."
            )
        elif not found:
            st.caption("No process is using a GPU right now.")
        else:
            st.caption(f"None of the {len(found)} active processes matches. Clear the search to see them.")
        return
    tables.show(shown, "active_processes", "Processes on the GPUs in the newest sample")
    download.show("api/v1/processes", [], chrome.zone())
    unread = len({row["process_id"] for row in found if row["start_time"] is None})
    if unread:
        st.caption(
            f"gpumon may not look at {unread} of these processes, so only what the driver reports of them is "
            "known: start the container with `--pid=host`, or gpumon as root, to see their users and programs."
        )


chrome.live("Overview", body)
