"""The first answer that a browser gets tells it what it will need."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable

import pytest
from conftest import Server
from playwright.sync_api import Page, expect

from pages.ui import document

PAGES = ["", "gpu", "history", "processes", "usage", "system"]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return {page: document.document(page) for page in PAGES}


def test_every_page_names_more_than_streamlit_does_and_nothing_twice(texts: dict[str, str]) -> None:
    for page, text in texts.items():
        named = re.findall(r'<link rel="modulepreload" crossorigin href="([^"]+)">', text)
        assert len(set(named)) == len(named), page
        assert any("/BidiComponent." in one for one in named)
        assert text.index("window.__streamlit") < text.index("</head>")
        assert ("plotly-" in text) == (page in ("gpu", "history", "usage", "system")), page


def test_what_is_named_is_served(serve: Callable[..., Server]) -> None:
    server = serve(None).ready()
    named = set()
    for page in PAGES:
        with urllib.request.urlopen(f"{server.url}/{page}", timeout=10) as answer:
            text = answer.read().decode()
            assert answer.headers["Cache-Control"] == "no-cache"
        assert text == document.document(page)
        named |= set(re.findall(r'(?:href|src)="(?:\./)?((?:static/js|assets)/[^"]+\.js)"', text))
    assert len(named) > 60
    for address in sorted(named):
        request = urllib.request.Request(f"{server.url}/{address}", method="HEAD")
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert "javascript" in answer.headers["Content-Type"], address


def test_below_a_page_nobody_looks_for_the_server(serve: Callable[..., Server], page: Page) -> None:
    server = serve(None).ready()
    failed: list[str] = []
    page.on("response", lambda answer: failed.append(answer.url) if answer.status >= 400 else None)
    page.goto(f"{server.url}/history?range=1h")
    expect(page.locator(".gm-plots[data-drawn]").first).to_be_attached(timeout=20_000)
    assert failed == []
