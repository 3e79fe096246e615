"""The rhythm of a page: how old its newest sample is, and when it asks for the next.

The browser keeps it, so that the age tells the truth when the server or the connection to it has stopped,
a hidden tab asks for nothing, and a reader can hold a page still.
"""

from __future__ import annotations

import json
from pathlib import Path

import streamlit as st

from gpumon_core.recording.health import fresh_within_s
from pages.components.streamlit_private import CLOSE_MENU

_HERE = Path(__file__).parent

_component = st.components.v2.component(
    "gpumon_rhythm",
    html=(_HERE / "rhythm.html").read_text("utf-8"),
    css=(_HERE / "rhythm.css").read_text("utf-8"),
    js=f"const CLOSE_MENU = {json.dumps(CLOSE_MENU)}\n" + (_HERE / "rhythm.js").read_text("utf-8"),
)


def show(age_s: float | None, sampled_every_s: float, refresh_s: float) -> None:
    """Draw it, and run the fragment that it stands in again with every new sample.

    `age_s` is the newest sample's age at this moment, None where nothing was sampled yet; `refresh_s` is how often
    the page asks, which some pages do less often than there are samples.
    """
    data = {
        "age": age_s,
        "limit": fresh_within_s(sampled_every_s),
        "sampledEvery": sampled_every_s,
        "refresh": refresh_s,
    }
    _component(data=data, key="rhythm", on_beat_change=lambda: None)
