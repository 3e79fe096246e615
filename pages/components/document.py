"""The HTML page that a browser gets first: Streamlit's own, with three small insertions."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route

from pages.components import streamlit_private as private

log = logging.getLogger(__name__)

# A page's file is named as its address is. Without these insertions a page works, too.
_PAGES = ["", *sorted({path.stem for path in Path(__file__).parents[1].glob("*.py")} - {"__init__", "main"})]

# Below the address of a page, Streamlit would look for its server there first, and wait after the failure.
_SERVER = f"""<script>
      {private.SERVER_ADDRESS % 'new URL(".", location.href).href'}
    </script>"""
# Streamlit stores the choice of light or dark for each page. Whenever a page is opened here, all pages get the
# same one: so a page that has another choice is where the reader has chosen since then.
_THEME = f"""<script>
      {{
        const [before, after] = {json.dumps(private.THEME_KEY)}
        const paths = {json.dumps(_PAGES)}.map(page => new URL(page || ".", location.href).pathname)
        const keys = paths.map(path => before + path + after)
        const common = localStorage.getItem("gpumon.theme")
        const choices = keys.map(key => localStorage.getItem(key))
        const newest = choices.find(choice => choice && choice !== common) ?? common
        if (newest) for (const key of [...keys, "gpumon.theme"]) localStorage.setItem(key, newest)
      }}
    </script>"""
# Streamlit leaves 5 rem free on both sides, where a table has room for one more column. And where nothing hovers,
# it always shows the tools of a table, over the element above.
_ROOM = f"""<style>
      @media (min-width: 768px) {{ {private.MAIN_BLOCK} {{ padding-inline: 2.5rem }} }}
      @media (hover: none) {{ {private.ELEMENT}:has({private.TABLE}) {{ padding-top: 1.75rem }} }}
    </style>"""


def document() -> str | None:
    """The HTML of every page; None where Streamlit's own cannot be found, or has no head to insert these into."""
    try:
        text = private.INDEX.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if text.count(private.HEAD_END) != 1:
        return None
    inserted = "\n    ".join(["", _SERVER, _THEME, _ROOM])
    return text.replace(private.HEAD_END, f"{inserted}\n  {private.HEAD_END}")


def routes() -> list[Route]:
    """One for each page; none where Streamlit serves its own page untouched."""
    text = document()
    if text is None:
        log.warning(
            "this version of Streamlit has another HTML page than gpumon expects: pages open more slowly, have "
            "less room, and each has its own choice of light or dark; install the versions of requirements.txt"
        )
        return []

    def serve(_: Request) -> HTMLResponse:
        return HTMLResponse(text, headers={"Cache-Control": "no-cache"})

    return [Route(f"/{page}", serve) for page in _PAGES]
