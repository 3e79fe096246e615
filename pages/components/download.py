"""Downloads of any length, streamed by this server and counted by the browser as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import urlencode
from zoneinfo import ZoneInfo

import streamlit as st

_CSS = """
.downloads { display: flex; flex-wrap: wrap; align-items: center; justify-content: flex-end; gap: .4rem .8rem;
             font-family: var(--st-font); font-size: .9rem; color: var(--st-text-color); }
.buttons { display: inline-flex; gap: .4rem; }
.buttons button { padding: .3rem .8rem; border: 1px solid var(--st-widget-border-color, var(--st-border-color));
                  border-radius: var(--st-button-radius); background: var(--st-secondary-background-color);
                  color: inherit; font: inherit; cursor: pointer; }
.buttons button:hover:enabled { border-color: var(--st-primary-color); color: var(--st-primary-color); }
.buttons button:focus-visible { outline: 2px solid var(--st-primary-color); outline-offset: 2px; }
.buttons button:disabled { opacity: .5; cursor: default; }
progress { width: 8rem; accent-color: var(--st-primary-color); }
.told { font-variant-numeric: tabular-nums; }
"""

_component = st.components.v2.component(
    "gpumon_download",
    html=(
        '<div class="downloads"><span class="told" role="status"></span><progress max="1" hidden></progress>\n'
        '<span class="buttons"></span></div>'
    ),
    css=_CSS,
    js=Path(__file__).with_suffix(".js").read_text("utf-8"),
)


@dataclass(frozen=True, slots=True)
class File:
    """One thing to download: its button, where it comes from, what it is called, its MIME type, and whether each
    line of it is a row."""

    label: str
    url: str
    name: str
    type: str
    rows: bool = False


# The formats in which a route gives its rows: what a button says, the format, its MIME type.
_FORMATS = (("CSV", "csv", "text/csv"), ("Parquet", "parquet", "application/vnd.apache.parquet"))


def of_route(route: str, query: Sequence[tuple[str, object]], what: str, zone: ZoneInfo) -> list[File]:
    """The rows of one of this server's routes as files, with their times in `zone`."""
    stamp = f"{datetime.now(zone):%Y%m%d-%H%M%S}"
    return [
        File(
            label,
            f"{route}?{urlencode([('tz', zone.key), *query, ('format', kind)])}",
            f"gpumon-{what}-{stamp}.{kind}",
            mime,
            rows=kind == "csv",
        )
        for label, kind, mime in _FORMATS
    ]


def show(files: Sequence[File], total: int, key: str) -> None:
    """Draw a button for each file; `total` is how many rows there are."""
    _component(key=key, data={"files": [asdict(file) for file in files], "total": total})
