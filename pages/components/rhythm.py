"""The rhythm of a page: the age of its newest sample, and when the page asks for the next one.

It runs in the browser. So the age is true when the server or the connection has stopped, a hidden tab asks for
nothing, and a reader can pause a page.
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
    """Draw it, and run the fragment around it again with every new sample.

    `age_s` is the age of the newest sample now, None where there is none yet. `refresh_s` is how often the page
    asks: some pages ask less often than there are samples.
    """
    data = {
        "age": age_s,
        "limit": fresh_within_s(sampled_every_s),
        "sampledEvery": sampled_every_s,
        "refresh": refresh_s,
    }
    _component(data=data, key="rhythm", on_beat_change=lambda: None)
