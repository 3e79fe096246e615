"""Charts: Plotly figures drawn by a small component, which keeps zoom, legend and hover through every refresh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import streamlit as st

from pages.ui import assets

_CSS = """
.gm-frame { position: relative; width: 100%; }
.gm-plots { width: 100%; min-height: 60px; }
.gm-line {
  position: absolute; top: 0; bottom: 0; width: 0; pointer-events: none; z-index: 1;
  border-left: 1px solid var(--st-text-color); opacity: .45;
}
"""

_component = st.components.v2.component(
    "gpumon_plot",
    html='<div class="gm-frame"><div class="gm-plots" role="img"></div><div class="gm-line" hidden></div></div>',
    css=_CSS,
    js=f'const LIBRARY = "{assets.PLOTLY_URL}"\n' + Path(__file__).with_suffix(".js").read_text("utf-8"),
    # Plotly's styles stand in the page's head, where a shadow tree would not see them.
    isolate_styles=False,
)


def show(
    figures: Sequence[str],
    key: str,
    alt: str,
    view: str = "",
    on_zoom: Callable[[], None] | None = None,
) -> None:
    """Draw figures (JSON, from figures.as_json) under each other on one time axis.

    `view` names what is shown: as long as it stays the same the reader's zoom and legend stay, too. Where
    `on_zoom` is given a chosen stretch of time is handed to `zoomed` there, and the caller shows it.
    """
    _component(
        key=key,
        data={"figures": list(figures), "view": view, "alt": alt, "zooms": on_zoom is not None},
        on_zoom_change=on_zoom or (lambda: None),
    )


def zoomed(key: str) -> tuple[str, str] | None:
    """Within `on_zoom`: the stretch that the reader chose, as two wall-clock times; None to go back."""
    chosen = st.session_state[key].zoom
    return (chosen[0], chosen[1]) if isinstance(chosen, list) and len(chosen) == 2 else None
