"""What every page has: banners, the age of the newest sample, and the viewer's clock."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import datetime
from html import escape
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import pandas as pd
import streamlit as st
from sqlalchemy.exc import DBAPIError

from gpumon_core import format as fmt
from gpumon_core.recording import runtime
from gpumon_core.recording.health import Health
from gpumon_core.recording.state import State
from gpumon_core.safety.masking import hide
from gpumon_core.telemetry import remedies
from pages.components import data, links, rhythm

log = logging.getLogger(__name__)

# How often a page without a database tries again.
RETRY_S = 5.0
# What browsers call the zone that needs no offset.
UTC = ("UTC", "Etc/UTC")
# What a page depends on outside its fragment: the recorder's state, whether there is a sample, and how many GPUs.
Situation = tuple[State, bool | None, int]


def zone() -> ZoneInfo:
    """The viewer's time zone; UTC where the browser does not say."""
    try:
        return ZoneInfo(st.context.timezone or "UTC")
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return ZoneInfo("UTC")


def zone_label() -> str:
    """The viewer's time zone with its present offset: "Europe/Berlin, UTC+01:00"; UTC itself is "UTC" alone."""
    here = zone()
    if here.key in UTC:
        return "UTC"
    offset = datetime.now(here).strftime("%z")
    return f"{here.key}, UTC{offset[:3]}:{offset[3:]}"


def is_dark() -> bool:
    """Whether the viewer sees the dark theme."""
    return st.context.theme.type == "dark"


def ready() -> Health | None:
    """The state of the recording, for a page with filters; None before the first sample, when there is nothing to
    choose from."""
    found = data.health()
    if found is None or found.newest is None:
        return None
    # The sidebar takes its room now: later, with the filters, it would move the charts.
    st.sidebar.empty()
    return found


def live(title: str, body: Callable[[Health], None], refresh_s: float | None = None) -> None:
    """A page: its title, the rhythm beside it, the banners, and `body`. `body` gets the state of the recording. It
    is drawn again with every new sample, or every `refresh_s` seconds."""
    shown = _situation(data.health())

    @st.fragment
    def frame() -> None:
        found = data.health()
        if _situation(found) != shown:
            # What is outside this fragment would no longer be true.
            st.rerun()
        sampled_every = found.interval_s if found else runtime.settings().interval
        with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
            st.title(title, anchor=False, width="content")
            with st.container(width="content"):
                age_s = found.age_s if found else None
                rhythm.show(age_s, sampled_every, max(refresh_s or 0, sampled_every))
        banners(found)
        links.show()
        if found is None or found.newest is None:
            _first_minute(found)
        else:
            body(found)

    frame()


def unreachable(error: DBAPIError) -> None:
    """A page without its database: the reason, and a new attempt every few seconds."""
    log.error("a page cannot read the database: %s", error.orig)
    runs = iter((False,))

    @st.fragment
    def waiting() -> None:
        if next(runs, True):
            st.rerun()
        st.error(
            f"The database cannot be read right now: {fmt.plain(_sentence(hide(str(error.orig))))} "
            "This page tries again by itself.",
            icon=":material/database:",
        )
        rhythm.show(None, RETRY_S, RETRY_S)

    waiting()


def _situation(found: Health | None) -> Situation:
    if found is None:
        return runtime.state(), None, 0
    return found.state, found.newest is not None, found.gpus


def banners(found: Health | None) -> None:
    """What the reader must know before believing a number."""
    state = found.state if found else runtime.state()
    if state.source == "demo":
        why = (
            f" {_sentence(state.driver.reason)} {state.driver.remedy} Real GPUs take over when the driver answers."
            if state.driver
            else " GPUMON_SOURCE is set to demo."
        )
        st.warning(f"**Simulated GPUs.** Nothing on this page is real.{fmt.plain(why)}", icon=":material/science:")
    elif state.driver:
        st.error(
            f"**No NVIDIA driver.** {fmt.plain(_sentence(state.driver.reason))} {fmt.plain(state.driver.remedy)}",
            icon=":material/error:",
        )
    if state.notice:
        st.warning(
            f"{fmt.plain(_sentence(state.notice.reason))} {fmt.plain(state.notice.remedy)}",
            icon=":material/healing:",
        )
    for problem in state.problems:
        st.warning(f"{fmt.plain(_sentence(problem.reason))} {fmt.plain(problem.remedy)}", icon=":material/info:")


def stale_warning(found: Health) -> None:
    """A warning above live numbers that are no longer live."""
    if not found.is_fresh:
        st.error(
            f"**Sampling has stopped.** The newest sample is {fmt.duration(found.age_s)} old; what follows shows "
            "that moment, not now. Look at the log of the program that records.",
            icon=":material/timer_off:",
        )
    elif found.lost:
        hanging = (
            f" In {found.hung} the driver does not return from a call; it is asked again when it does."
            if found.hung
            else ""
        )
        remedy = "" if found.hung == found.lost else f" {remedies.of_lost()}"
        st.warning(f"**{found.lost} GPU(s) do not answer.**{hanging}{remedy}", icon=":material/warning:")


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."


def _first_minute(found: Health | None) -> None:
    state = found.state if found else runtime.state()
    if state.source == "nvml" and state.driver:
        st.info("Nothing has been recorded here yet. The first GPU appears as soon as the driver answers.")
    elif state.role == "viewing":
        st.info(
            "Nothing has been recorded into this database yet, and GPUMON_RECORD is false here. "
            "Start a recorder that writes into it."
        )
    else:
        st.info("The first sample is on its way.")


_FACTS_CSS = """<style>
.gm-facts { display: flex; flex-wrap: wrap; gap: .15rem 1.5rem; font-size: .86rem; }
.gm-cards ~ .gm-facts { margin-top: 1rem; }
.gm-facts span { color: light-dark(#5a6470, #9aa4b0); }
.gm-facts b { color: light-dark(#1f2328, #e6edf3); font-weight: 600; overflow-wrap: anywhere; }
.gm-groups { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem 2rem; }
.gm-groups dl { margin: .3rem 0 0; display: grid; grid-template-columns: 1fr auto; gap: .1rem 1rem; font-size:
.86rem; } .gm-groups dt { color: light-dark(#5a6470, #9aa4b0); font-weight: 400; }
.gm-groups dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
</style>"""


def facts_html(facts: Mapping[str, Any]) -> str:
    """Names and values in a line, as HTML; what is not known is a dash."""
    spans = (
        f"<span>{escape(name)} <b>{escape(str(value) if value and not pd.isna(value) else fmt.MISSING)}</b></span>"
        for name, value in facts.items()
    )
    return f'{_FACTS_CSS}<div class="gm-facts">{"".join(spans)}</div>'


def groups_html(groups: Mapping[str, Mapping[str, str]]) -> str:
    """Names and values in several lists side by side, as HTML."""
    lists = (
        f"<div><b>{escape(title)}</b><dl>"
        + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows.items())
        + "</dl></div>"
        for title, rows in groups.items()
    )
    return f'{_FACTS_CSS}<div class="gm-groups">{"".join(lists)}</div>'
