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

from pages.components.assets import PLOTLY_URL

_STATIC = Path(streamlit.__file__).parent / "static"
_MODULES = _STATIC / "static" / "js"
_IMPORT = re.compile(r'(?:from|import)"\./([^"/]+\.js)"')

# What changes in an address within this time belongs to the same choice of its reader.
ONE_CHOICE_MS = 1000

# Below a page's address Streamlit would look for its server first, and above it when nobody answers there. And it
# would ask for its configuration before it connects: that no other site's page may steer this one.
_SERVER = """<script>
      window.__streamlit = {
        BACKEND_BASE_URL: new URL(".", location.href).href,
        HOST_CONFIG: { allowedOrigins: [location.origin], useExternalAuthToken: false },
      }
    </script>"""
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
# Of one choice Streamlit tells the address in several steps, each of which would be one for the way back, too.
_HISTORY = f"""<script>
      {{
        const {{ pushState, replaceState }} = history
        let changed = -Infinity
        history.replaceState = function (...step) {{
          changed = performance.now()
          replaceState.apply(this, step)
        }}
        history.pushState = function (...step) {{
          const isSamePage = new URL(step[2], location.href).pathname === location.pathname
          const isMore = isSamePage && performance.now() - changed < {ONE_CHOICE_MS}
          changed = performance.now()
          ;(isMore ? replaceState : pushState).apply(this, step)
        }}
      }}
    </script>"""
# Streamlit leaves 5 rem free on both sides, where a table has room for one more column. And where nothing hovers
# it always shows the tools of a table, over whatever stands above.
_ROOM = """<style>
      @media (min-width: 768px) { .stMain .stMainBlockContainer { padding-inline: 2.5rem } }
      @media (hover: none) { .stElementContainer:has(.stDataFrame) { padding-top: 1.75rem } }
    </style>"""
# Plotly takes its time to start: it does so while the page waits for the server, not before it has asked. What is
# drawn for the first time takes twice as long as later, so something is, where nobody looks.
_CHARTS = f"""<link rel="preload" as="script" href="{PLOTLY_URL}" />
    <script type="module">
      requestIdleCallback(() => {{
        if (document.querySelector(`script[src="{PLOTLY_URL}"]`)) return
        const script = document.createElement("script")
        script.src = "{PLOTLY_URL}"
        script.onload = () => requestIdleCallback(() => {{
          if (document.querySelector(".gm-plots")) return
          const div = document.createElement("div")
          const layout = {{ width: 600, height: 300, xaxis: {{ type: "date" }} }}
          Plotly.newPlot(div, [{{ x: [1, 2], y: [1, 2] }}], layout).then(() => Plotly.purge(div))
        }})
        document.head.append(script)
      }}, {{ timeout: 500 }})
    </script>"""
# The modules of what stands on each page, and whether charts do. What is named in vain costs as much as the rest.
_CHOICES = ("BidiComponent", "ButtonGroup", "Multiselect")
_PAGES: dict[str, tuple[tuple[str, ...], bool]] = {
    "": (("BidiComponent", "Html", "TextInput", "DataFrame"), False),
    "gpu": (("BidiComponent", "Html", "ButtonGroup", "Selectbox"), True),
    "history": ((*_CHOICES, "Checkbox"), True),
    "processes": ((*_CHOICES, "Html", "TextInput", "Selectbox", "NumberInput", "DataFrame"), False),
    "usage": ((*_CHOICES, "Html", "NumberInput", "DataFrame", "DownloadButton", "Metric"), True),
    "system": (("BidiComponent", "Html", "DataFrame", "Metric"), True),
}


@lru_cache(maxsize=len(_PAGES))
def document(page: str) -> str:
    """The HTML of one page, by its path."""
    text = (_STATIC / "index.html").read_text(encoding="utf-8")
    names, charts = _PAGES[page]
    lines = [_SERVER, _THEME, _HISTORY, _ROOM, *([_CHARTS] if charts else [])]
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
