"""Downloads: links to the routes, which stream files of any length; the browser shows how far they are."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from urllib.parse import urlencode
from zoneinfo import ZoneInfo

import streamlit as st

from gpumon_core.export.formats import served

_CSS = """
.gm-downloads { display: flex; flex-wrap: wrap; justify-content: flex-end; gap: 0.4rem; font-size: 0.9rem; }
.gm-downloads a, .gm-downloads a:visited {
  padding: 0.3rem 0.8rem; border: 1px solid light-dark(#d9dee5, #30363f); border-radius: 0.5rem;
  background: light-dark(#f6f8fa, #161b22); color: inherit !important; text-decoration: none !important;
}
.gm-downloads a:hover, .gm-downloads a:focus-visible { border-color: light-dark(#0b6bcb, #58a6ff); }
.gm-downloads a:focus-visible { outline: 2px solid light-dark(#0b6bcb, #58a6ff); outline-offset: 2px; }
"""


def show(route: str, query: Sequence[tuple[str, object]], zone: ZoneInfo) -> None:
    """Draw a link for each file format in which a route answers a query, with times in `zone`."""
    st.html(html(route, query, zone))


def html(route: str, query: Sequence[tuple[str, object]], zone: ZoneInfo) -> str:
    """The links. Their addresses are relative to the page's, so that they work below any base path and behind a
    proxy. The route names the file."""
    links = []
    for one in served().values():
        address = f"{route}?{urlencode([('tz', zone.key), *query, ('format', one.name)])}"
        links.append(f'<a href="{escape(address)}" download>↓ {escape(one.label)}</a>')
    return f'<style>{_CSS}</style><div class="gm-downloads">{"".join(links)}</div>'
