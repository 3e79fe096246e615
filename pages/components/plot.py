"""Charts: Plotly figures in a small component that preserves zoom, legend and hover through every refresh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import streamlit as st

from pages.components import assets

_CSS = """
.gm-frame { position: relative; width: 100%; }
.gm-plots { width: 100%; min-height: 60px; }
.gm-figure { position: relative; }
/* The pointer passes through, so that the chart below shows what it points at. */
.gm-words { position: absolute; inset: 0; pointer-events: none; z-index: 1; font-size: 13px; line-height: 1.2; }
.gm-words > * { position: absolute; white-space: nowrap; }
.gm-label { padding: 0 3px; }
.gm-heading { font-weight: 600; }
.gm-legend { display: flex; flex-wrap: wrap; gap: 0 .9rem; }
.gm-legend button {
  display: inline-flex; align-items: center; gap: .35rem; min-height: 1.25rem; padding: 0; pointer-events: auto;
  border: 0; border-radius: 3px; background: none; color: inherit; font: inherit; cursor: pointer;
}
.gm-legend button[aria-pressed=false] { opacity: .4; }
.gm-legend button:hover { text-decoration: underline; }
.gm-legend button:focus-visible { outline: 2px solid var(--st-primary-color); outline-offset: 1px; }
.gm-line {
  position: absolute; top: 0; bottom: 0; width: 0; pointer-events: none; z-index: 1;
  border-left: 1px solid var(--st-text-color); opacity: .45;
}
"""

_component = st.components.v2.component(
    "gpumon_plot",
    html='<div class="gm-frame"><div class="gm-plots" role="group"></div><div class="gm-line" hidden></div></div>',
    css=_CSS,
    js="\n".join(
        [
            f'const LIBRARY = "{assets.PLOTLY_URL}"',
            *((Path(__file__).parent / name).read_text("utf-8") for name in ("words.js", "plot.js")),
        ]
    ),
    # Plotly adds its styles to the page's head; a shadow tree would not get them.
    isolate_styles=False,
)


def show(
    figures: Sequence[str],
    key: str,
    alt: str,
    view: str = "",
    on_zoom: Callable[[], None] | None = None,
) -> None:
    """Draw figures (JSON, from figures.as_json) below each other on one time axis.

    `view` names what is shown: while it is the same, the reader's zoom and legend stay. `on_zoom` is called when
    the reader chooses a time range in a chart; it gets the range from `zoomed`, and the caller shows it.
    """
    _component(
        key=key,
        data={"figures": list(figures), "view": view, "alt": alt, "zooms": on_zoom is not None},
        on_zoom_change=on_zoom or (lambda: None),
    )


def zoomed(key: str) -> tuple[str, str] | None:
    """Within `on_zoom`: the time range that the reader chose, as two wall-clock times; None to go back."""
    chosen = st.session_state[key].zoom
    return (chosen[0], chosen[1]) if isinstance(chosen, list) and len(chosen) == 2 else None
