"""What the GPUs do now."""

from __future__ import annotations

import streamlit as st

from gpumon_core.recording import runtime
from gpumon_core.recording.health import Health
from pages.components import chrome, data, download, sheets, tables


def body(now: Health) -> None:
    """One card per GPU, and the processes of the newest tick."""
    at = data.tick(now)
    chrome.stale_warning(now)
    if not data.gpus(at):
        st.info("The driver answers, but lists no GPU. `nvidia-smi -L` shows what it sees.")
    st.html(data.overview_html(at))
    processes(at)


def processes(at: data.Tick) -> None:
    """Who is on the GPUs."""
    found = data.active_processes(at)
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
    shown = sheets.active(at, chrome.zone().key)
    if text.strip():
        shown = tables.matching(shown, text)
    if not len(shown):
        if not found and not runtime.sees_processes():
            st.caption(
                "gpumon has PIDs of its own here, and the driver names no process outside: start its container "
                "with `--pid=host` to see who is on the GPUs."
            )
        elif not found:
            st.caption("No process is using a GPU right now.")
        else:
            st.caption(f"None of the {len(found)} active processes matches. Clear the search to see them.")
        return
    tables.show(shown, "active_processes", "Processes on the GPUs in the newest sample")
    files = download.of_route("api/v1/processes", [], "active", chrome.zone())
    download.show(files, len(found), "active_download")
    unread = len({row["process_id"] for row in found if row["start_time"] is None})
    if unread:
        st.caption(
            f"{unread} of these processes cannot be looked at from here, so only what the driver says of them is "
            "known: start the container with `--pid=host`, or gpumon as root, to see who they are."
        )


chrome.live("Overview", body)
