"""The pages, and what happens before each of them."""

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
            help="What every GPU does now, and which processes use it.",
        ),
        st.Page(
            "gpu.py",
            title="GPU",
            icon=":material/memory_alt:",
            url_path="gpu",
            help="One GPU in depth: every metric that it reports, why it throttles, and its processes.",
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
            help="The state of the recorder, the size of its history, and the settings in use.",
        ),
    ],
    position="top",
)
links.arrive(page.url_path)
try:
    page.run()
except DBAPIError as error:
    # From outside the page's fragment, which handles its errors itself.
    chrome.unreachable(error)
