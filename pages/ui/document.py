"""The document that a browser gets first: Streamlit's own, which tells of what it will need besides.

A browser that finds out step by step (from the socket which widget, from the widget which module, from the module
which others) waits at every step. Here it is told with the first answer, and has all of it when the page's content
arrives. A name that this version of Streamlit does not have is left out, and costs nothing but that wait.
"""

from __future__ import annotations

import re
from functools import lru_cache, partial
from pathlib import Path

import streamlit
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route

from pages.ui.assets import PLOTLY_URL

_STATIC = Path(streamlit.__file__).parent / "static"
_MODULES = _STATIC / "static" / "js"
_IMPORT = re.compile(r'(?:from|import)"\./([^"/]+\.js)"')

# Below a page's address Streamlit would look for its server first, and above it when nobody answers there.
_SERVER = '<script>window.__streamlit = { BACKEND_BASE_URL: new URL(".", location.href).href }</script>'
# Streamlit keeps the choice of light or dark for each page by itself: here one choice is for all.
_THEME = """<script>
      {
        const ours = "gpumon.theme", theirs = `stActiveTheme-${location.pathname}-v2`
        const set = Storage.prototype.setItem
        const chosen = localStorage.getItem(ours)
        if (chosen !== null) localStorage.setItem(theirs, chosen)
        Storage.prototype.setItem = function (key, value) {
          set.call(this, key, value)
          if (this === localStorage && key.startsWith("stActiveTheme-")) set.call(this, ours, value)
        }
      }
    </script>"""
_CHARTS = f'<script async src="{PLOTLY_URL}"></script>'
# The modules of what stands on each page.
_FRAME = ("BidiComponent",)
_SIDEBAR = ("TextInput", "ButtonGroup", "Multiselect", "Selectbox")
_GRID = ("DataFrame",)
_PAGES: dict[str, tuple[tuple[str, ...], bool]] = {
    "": ((*_FRAME, "TextInput", *_GRID), False),
    "gpu": ((*_FRAME, *_SIDEBAR, *_GRID), True),
    "history": ((*_FRAME, *_SIDEBAR), True),
    "processes": ((*_FRAME, *_SIDEBAR, "NumberInput", *_GRID), False),
    "usage": ((*_FRAME, *_SIDEBAR, *_GRID, "Metric"), True),
    "system": ((*_FRAME, *_GRID, "Metric"), True),
}


@lru_cache(maxsize=len(_PAGES))
def document(page: str) -> str:
    """The HTML of one page, by its path."""
    text = (_STATIC / "index.html").read_text(encoding="utf-8")
    names, charts = _PAGES[page]
    lines = [_SERVER, _THEME, *([_CHARTS] if charts else [])]
    for module in _with_imports(names):
        address = f"./static/js/{module}"
        if address not in text:
            lines.append(f'<link rel="modulepreload" crossorigin href="{address}">')
    return text.replace("</head>", "\n    ".join(["", *lines]) + "\n  </head>", 1)


def _with_imports(names: tuple[str, ...]) -> list[str]:
    """The files of these modules and of all that they import."""
    waiting = [path.name for name in names for path in sorted(_MODULES.glob(f"{name}.*.js"))]
    found: dict[str, None] = {}
    while waiting:
        module = waiting.pop()
        if module not in found and (path := _MODULES / module).is_file():
            found[module] = None
            waiting += _IMPORT.findall(path.read_text(encoding="utf-8"))
    return list(found)


def _serve(page: str, _: Request) -> HTMLResponse:
    return HTMLResponse(document(page), headers={"Cache-Control": "no-cache"})


ROUTES = [Route(f"/{page}", partial(_serve, page)) for page in _PAGES]
