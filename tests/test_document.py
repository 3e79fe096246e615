"""The HTML page that a browser gets first is Streamlit's own, with three small insertions."""

from __future__ import annotations

import logging
import re
import urllib.request
from pathlib import Path

import plotly
import pytest
from conftest import PATIENCE_S, Server
from playwright.sync_api import Page, expect
from starlette.applications import Starlette

from pages.components import assets, document, streamlit_private

PAGES = ["", "gpu", "history", "processes", "usage", "system"]


def test_every_page_gets_the_insertions(demo: Server) -> None:
    expected = document.document()
    assert expected is not None
    for page in PAGES:
        with urllib.request.urlopen(f"{demo.url}/{page}", timeout=PATIENCE_S) as answer:
            assert answer.read().decode() == expected
            assert answer.headers["Cache-Control"] == "no-cache"


def test_without_its_insertions_the_page_is_streamlits_own() -> None:
    text = document.document()
    assert text is not None
    for inserted in (document._SERVER, document._THEME, document._ROOM):
        assert text.count(inserted) == 1
        text = text.replace(inserted, "")
    assert text.split() == streamlit_private.INDEX.read_text("utf-8").split()


@pytest.mark.parametrize(
    "text", [None, b"", b"<html><body>a page of another kind</body></html>", b"</head></head>", b"\xff</head>"]
)
def test_a_page_that_looks_different_is_left_to_streamlit(
    text: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index = tmp_path / "index.html"
    if text is not None:
        index.write_bytes(text)
    monkeypatch.setattr(streamlit_private, "INDEX", index)
    with caplog.at_level(logging.WARNING):
        assert document.routes() == []
    assert "another HTML page than gpumon expects" in caplog.text
    Starlette(routes=document.routes())


def test_the_library_that_draws_is_of_the_version_whose_schema_the_figures_are_tested_with() -> None:
    full = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    versions = []
    for library in (assets.PLOTLY_JS, full):
        with library.open(encoding="utf-8") as file:
            versions += re.findall(r"plotly\.js.* v(\d+\.\d+\.\d+)", file.read(200))
    assert len(versions) == 2
    assert versions[0] == versions[1]
    assert versions[0] in assets.PLOTLY_URL


def test_below_a_page_nobody_looks_for_the_server(demo: Server, page: Page) -> None:
    failed: list[str] = []
    page.on("response", lambda answer: failed.append(answer.url) if answer.status >= 400 else None)
    page.goto(f"{demo.url}/history?range=1h")
    expect(page.locator(".gm-plots[data-drawn]").first).to_be_attached()
    assert failed == []


def test_the_library_of_charts_is_loaded_once(demo: Server, page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/assets/plotly-" in request.url else None)
    page.goto(f"{demo.url}/history?range=1h")
    expect(page.locator(".gm-plots[data-drawn]").first).to_be_attached()
    assert len(asked) == 1
    assert page.evaluate("document.querySelectorAll('script[src*=plotly]').length") == 1


def choose(page: Page, theme: str) -> None:
    """Light, dark or the system's, from Streamlit's menu."""
    page.get_by_role("button", name="Main menu").click()
    page.get_by_role("menuitemradio", name=theme).click()
    page.keyboard.press("Escape")


def test_one_choice_of_light_or_dark_is_for_every_page(demo: Server, page: Page) -> None:
    dark, light = "rgb(13, 17, 23)", "rgb(246, 248, 250)"
    # Each page that is opened follows the newest choice, wherever the reader made it.
    for opened, theme, colour in (("", "Dark", dark), ("usage", "Light", light), ("usage", "Dark", dark)):
        page.goto(f"{demo.url}/{opened}")
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        choose(page, theme)
        expect(page.get_by_test_id("stApp")).to_have_css("background-color", colour)
        for name in ("system", opened, "history"):
            page.goto(f"{demo.url}/{name}")
            expect(page.get_by_test_id("stApp")).to_have_css("background-color", colour)


def test_on_a_phone_the_menu_closes_once_it_has_led_somewhere(demo: Server, page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(demo.url)
    expect(page.locator(".gm-card").first).to_be_visible()
    page.get_by_test_id("stExpandSidebarButton").click()
    page.get_by_role("link", name="History").click()
    expect(page.get_by_role("heading", name="History")).to_be_visible()
    expect(page.get_by_test_id("stSidebar")).to_have_attribute("data-collapsed", "true")


def test_a_page_that_asks_less_often_does_not_cry_silence(demo: Server, page: Page) -> None:
    page.goto(f"{demo.url}/history?range=6h")
    # Ticks come every second, and silence begins after five; this page asks every so many.
    expect(page.get_by_text(re.compile(r"Newest sample (8|9|1\d)s ago"))).to_be_visible()
