"""What stands on every page: banners, the age of the newest sample, and the viewer's clock."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import streamlit as st

from gpumon_core import format as fmt
from gpumon_core import runtime
from gpumon_core.health import Health
from gpumon_core.recorder import State
from pages.ui import data, freshness

# What a whole page depends on: the recorder's state, and whether there is anything to show.
Situation = tuple[State, bool]


def zone() -> ZoneInfo:
    """The viewer's time zone; UTC where the browser does not say."""
    try:
        return ZoneInfo(st.context.timezone or "UTC")
    except (ZoneInfoNotFoundError, ValueError):
        return ZoneInfo("UTC")


def zone_label() -> str:
    """The viewer's time zone with its present offset: "Europe/Berlin, UTC+01:00"."""
    here = zone()
    offset = datetime.now(here).strftime("%z")
    return f"{here.key}, UTC{offset[:3]}:{offset[3:]}"


def is_dark() -> bool:
    """Whether the viewer sees the dark theme."""
    return st.context.theme.type == "dark"


def refresh_s() -> float:
    """How often a live part of a page asks for news."""
    return runtime.settings().interval


def top(title: str) -> Health | None:
    """A page's title, the live status beside it, and the banners. None where nothing is recorded yet."""
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    left.title(title, anchor=False)
    found = data.health()
    with right:
        status_line(_situation(found))
    banners(found)
    if found is None or found.newest is None:
        _first_minute(found)
        return None
    return found


@st.fragment(run_every=refresh_s())
def status_line(shown: Situation) -> None:
    """How old the newest sample is, counted on in the browser; and a new page when the page's
    banners would no longer be true, or the first sample has come."""
    found = data.health()
    if _situation(found) != shown:
        st.rerun()
    freshness.show(found.age_s if found else None, found.interval_s if found else refresh_s())


def _situation(found: Health | None) -> Situation:
    return (found.state if found else runtime.state()), found is not None and found.newest is not None


def banners(found: Health | None) -> None:
    """Whatever the reader must know before believing a number."""
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
    if state.recording:
        st.warning(
            f"{fmt.plain(_sentence(state.recording.reason))} {fmt.plain(state.recording.remedy)}",
            icon=":material/info:",
        )


def stale_warning(found: Health) -> None:
    """Said loudly where live numbers are shown that are no longer live."""
    if not found.fresh:
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
        st.warning(f"**{found.lost} GPU(s) do not answer.**{hanging}", icon=":material/warning:")


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."


def _first_minute(found: Health | None) -> None:
    state = found.state if found else runtime.state()
    if state.source == "nvml" and state.driver:
        st.info("Nothing has been recorded here yet. The first GPU appears as soon as the driver answers.")
    elif state.role == "viewing":
        st.info("Nothing has been recorded into this database yet, and GPUMON_RECORD is false here.")
    else:
        st.info("The first sample is on its way.")
