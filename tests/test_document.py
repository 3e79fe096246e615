"""The first answer that a browser gets tells it what it will need."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

import plotly
import pytest
from conftest import PATIENCE_S, Server, eventually
from playwright.sync_api import Page, expect

from pages.components import assets, document

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


def test_the_library_that_draws_is_of_the_version_whose_schema_the_figures_are_tested_with() -> None:
    whole = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    versions = []
    for library in (assets.PLOTLY_JS, whole):
        with library.open(encoding="utf-8") as file:
            versions += re.findall(r"plotly\.js.* v(\d+\.\d+\.\d+)", file.read(200))
    assert len(versions) == 2
    assert versions[0] == versions[1]
    assert versions[0] in assets.PLOTLY_URL


def test_what_is_named_is_served(demo: Server) -> None:
    named = set()
    for page in PAGES:
        with urllib.request.urlopen(f"{demo.url}/{page}", timeout=PATIENCE_S) as answer:
            text = answer.read().decode()
            assert answer.headers["Cache-Control"] == "no-cache"
        assert text == document.document(page)
        named |= set(re.findall(r'(?:href|src)="(?:\./)?((?:static/js|assets)/[^"]+\.js)"', text))
    assert len(named) > 60
    for address in sorted(named):
        request = urllib.request.Request(f"{demo.url}/{address}", method="HEAD")
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            assert "javascript" in answer.headers["Content-Type"], address


@pytest.mark.parametrize("name", PAGES)
def test_a_page_names_what_it_runs_and_nothing_else(
    demo: Server, page: Page, name: str, texts: dict[str, str]
) -> None:
    # What stands on a page of which there is something to show.
    session = page.context.new_cdp_session(page)
    session.send("Profiler.enable")
    session.send("Profiler.startPreciseCoverage", {"callCount": True, "detailed": False})
    page.goto(f"{demo.url}/{name}")
    drawn = ".gm-plots[data-drawn]" if name in ("gpu", "history", "usage") else "[data-testid=data-grid-canvas]"
    expect(page.locator(drawn).last).to_be_attached()
    named = set(re.findall(r'(?:href|src)="\./static/js/([^"]+\.js)"', texts[name]))
    ran: set[str] = set()

    def look() -> set[str]:
        # What has run since it was asked last.
        ran.update(
            script["url"].rpartition("/")[2]
            for script in session.send("Profiler.takePreciseCoverage")["result"]
            if "/static/js/" in script["url"] and any(one["ranges"][0]["count"] for one in script["functions"])
        )
        return ran

    eventually(lambda: look() >= named)
    page.wait_for_timeout(1000)
    assert look() == named


def test_below_a_page_nobody_looks_for_the_server(demo: Server, page: Page) -> None:
    failed: list[str] = []
    page.on("response", lambda answer: failed.append(answer.url) if answer.status >= 400 else None)
    page.goto(f"{demo.url}/history?range=1h")
    expect(page.locator(".gm-plots[data-drawn]").first).to_be_attached()
    assert failed == []


def test_charts_are_loaded_once(demo: Server, page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/assets/plotly-" in request.url else None)
    page.goto(f"{demo.url}/history?range=1h")
    expect(page.locator(".gm-plots[data-drawn]").first).to_be_attached()
    assert len(asked) == 1
    assert page.evaluate("document.querySelectorAll('script[src*=plotly]').length") == 1
    # What was drawn beforehand is gone again.
    assert page.evaluate("document.querySelectorAll('.js-plotly-plot:not(.gm-plots *)').length") == 0


def test_the_page_does_not_wait_to_hear_how_the_server_is_set_up(demo: Server, page: Page) -> None:
    for asked in ("health", "host-config"):
        # Neither is ever answered.
        page.route(f"**/_stcore/{asked}", lambda route: None)
    page.goto(demo.url)
    expect(page.locator(".gm-card").first).to_be_visible()
    # No other site's page may steer this one, whatever Streamlit allows by itself.
    assert page.evaluate("window.__streamlit.HOST_CONFIG.allowedOrigins") == [demo.url]


def test_one_choice_of_light_or_dark_is_for_every_page(demo: Server, page: Page) -> None:
    background = "getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor"
    for chosen, colour in (("Dark", "rgb(13, 17, 23)"), ("Light", "rgb(246, 248, 250)")):
        page.goto(demo.url)
        expect(page.locator(".gm-card").first).to_be_visible()
        page.evaluate("chosen => localStorage.setItem('stActiveTheme-/-v2', JSON.stringify(chosen))", chosen)
        page.goto(f"{demo.url}/system")
        expect(page.get_by_role("heading", name="System")).to_be_visible()
        assert page.evaluate(background) == colour


def test_on_a_phone_the_menu_leaves_once_it_has_led_somewhere(demo: Server, page: Page) -> None:
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
