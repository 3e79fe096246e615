"""The pages and what they have in common."""

from __future__ import annotations

from pathlib import Path

import streamlit as st
from sqlalchemy.exc import DBAPIError

from pages.components import chrome, links

st.set_page_config(
    page_title="gpumon", page_icon=str(Path(__file__).parent / "components" / "icon.png"), layout="wide"
)
page = st.navigation(
    [
        st.Page(
            "overview.py",
            title="Overview",
            icon=":material/dashboard:",
            default=True,
            help="What every GPU does now, and which processes are on it.",
        ),
        st.Page(
            "gpu.py",
            title="GPU",
            icon=":material/memory_alt:",
            url_path="gpu",
            help="One GPU in depth: every metric it has, why it throttles, and who was on it.",
        ),
        st.Page(
            "history.py",
            title="History",
            icon=":material/monitoring:",
            url_path="history",
            help="Any metric of any GPU over time, with the processes on the same axis.",
        ),
        st.Page(
            "processes.py",
            title="Processes",
            icon=":material/list_alt:",
            url_path="processes",
            help="Every process that was seen on a GPU, to filter and download.",
        ),
        st.Page(
            "usage.py",
            title="Usage",
            icon=":material/receipt_long:",
            url_path="usage",
            help="Who used the GPUs, with which model, how much energy it took and what it cost.",
        ),
        st.Page(
            "system.py",
            title="System",
            icon=":material/monitor_heart:",
            url_path="system",
            help="The state of the recorder, the size of its history, and the settings in force.",
        ),
    ],
    position="top",
)
links.arrive(page.url_path)
try:
    page.run()
except DBAPIError as error:
    # Of what stands around the page's own fragment, which deals with its errors itself.
    chrome.unreachable(error)
