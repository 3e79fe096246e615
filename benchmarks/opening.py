"""How long a page takes to open, beside a bare Streamlit page with the same filters; pages.py runs it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from playwright.sync_api import Browser, Page
from rig import say

PLOT = ".gm-plots[data-drawn]"
# The table beside it, for screen readers, comes half a second after the drawn one.
GRID = "[data-testid=data-grid-canvas]"
# What is drawn last on each page.
DRAWN = {
    "/": f".gm-card:nth-of-type(8) .gm-spark, {GRID}",
    "/gpu": PLOT,
    "/history": PLOT,
    "/processes": GRID,
    "/usage": ", ".join(f".st-key-{key} {PLOT}" for key in ("trend", "week", "split")),
    "/system": f"{PLOT}, {GRID}",
}
BARE_DRAWN = ".js-plotly-plot .scatterlayer .trace path"
# The filters in the sidebar of each page: the name of Streamlit's function, and their labels.
FILTERS: dict[str, list[tuple[str, str]]] = {
    "/": [],
    "/gpu": [("selectbox", "GPU"), ("pills", "Time range"), ("pills", "Charts")],
    "/history": [
        *(("pills", "Time range"), ("multiselect", "GPUs"), ("multiselect", "Metrics")),
        *(("segmented_control", "Lanes"), ("toggle", "Memory by process")),
    ],
    "/processes": [
        *(("text_input", "Name, command or PID"), ("pills", "Seen within"), ("multiselect", "GPUs")),
        *(("multiselect", label) for label in ("Users", "Containers", "Workloads", "Models", "Types", "States")),
        *(
            ("number_input", "Held at least (GiB)"),
            ("selectbox", "Lived at least"),
            ("multiselect", "More columns"),
        ),
    ],
    "/usage": [
        ("pills", "Time range"),
        *(("multiselect", label) for label in ("GPUs", "Users", "Workloads", "Models")),
    ],
    "/system": [],
}
# One bare page for each of gpumon's.
BARE = f"""
import plotly.graph_objects as go
import streamlit as st
WITHOUT_OPTIONS = ("text_input", "number_input", "toggle")
for kind, label in {FILTERS!r}[st.query_params["as"]]:
    options = () if kind in WITHOUT_OPTIONS else ([f"option {{number}}" for number in range(8)],)
    getattr(st.sidebar, kind)(label, *options)
st.title("bare")
st.plotly_chart(go.Figure(go.Scatter(x=list(range(1000)), y=list(range(1000)))))
"""
# Whether everything that these selectors find is drawn, and the sidebar has these filters.
IS_DRAWN = """([selectors, filters]) => {
  const labels = document.querySelectorAll("[data-testid=stSidebarUserContent] [data-testid=stWidgetLabel]")
  const names = [...labels].map(label => label.textContent.trim())
  return selectors.every(one => document.querySelector(one)) && filters.every(name => names.includes(name))
}"""
# How many times as long as its bare page a page may take.
LIMIT = 1.8


def drawn(page: Page, url: str, what: str, filters: list[str]) -> float:
    """Seconds from asking for a page until it is drawn, filters included, to a frame."""
    started = time.monotonic()
    page.goto(url, wait_until="commit")
    # A locator would look less and less often, in the end twice a second.
    page.wait_for_function(IS_DRAWN, arg=[what.split(", "), filters])
    return time.monotonic() - started


def opening(launch: Callable[[], Browser], ports: dict[str, int], runs: int) -> None:
    """Open every page cold (a new browser) and warm (again in the same one), in turns with its bare one."""
    print(f"opening a page, medians of {runs} visits")
    found: dict[tuple[str, str, str], list[float]] = {}
    for _ in range(runs):
        for name, what in DRAWN.items():
            visits = (("gpumon", name, what), ("bare", f"/?as={name}", BARE_DRAWN))
            for server, path, last in visits:
                browser = launch()
                page = browser.new_page(viewport={"width": 1440, "height": 900})
                for kind in ("cold", "warm"):
                    seconds = drawn(
                        page,
                        f"http://127.0.0.1:{ports[server]}{path}",
                        last,
                        [label for _, label in FILTERS[name]],
                    )
                    found.setdefault((name, kind, server), []).append(seconds)
                    page.goto("about:blank")
                browser.close()
    for name in DRAWN:
        for kind in ("cold", "warm"):
            middle, beside = (statistics.median(found[name, kind, server]) for server in ("gpumon", "bare"))
            more = f"  ({middle:.2f} s; bare: {beside:.2f} s)"
            say(f"{name}, {kind}", middle / beside, "x", LIMIT, more)
