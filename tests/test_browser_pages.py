"""How the pages feel: zoom, hover, pause, stories and links, on both screens and in both themes.

Pictures of every page and state are left in artifacts/, for people to look at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import stage as staging
from conftest import ROOT, Server, eventually
from fake_nvml import FakeNvml
from playwright.sync_api import Browser, BrowserContext, Locator, Page, WebSocketRoute, expect
from stage import Heard, Stage, chart, column, refreshed, settled, tile, traces

from gpumon_core.figures.base import LEFT, RIGHT
from pages.components.streamlit_private import STREAM, ForwardMsg

# The fixtures of a stage.
shared_stage, stage = staging.shared_stage, staging.stage

ARTIFACTS = ROOT / "artifacts"
SCREENS = {"laptop": (1440, 900), "phone": (390, 844)}
PAGES = {"overview": "/", "gpu": "/gpu", "history": "/history", "processes": "/processes"}
PAGES |= {"usage": "/usage", "system": "/system"}


@pytest.fixture(params=[(screen, theme) for screen in SCREENS for theme in ("light", "dark")], ids="-".join)
def viewer(request: pytest.FixtureRequest, browser: Browser) -> Iterator[tuple[str, BrowserContext]]:
    """A viewer's screen and theme by name, and a browser that has them."""
    screen, theme = request.param
    width, height = SCREENS[screen]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=theme,
        timezone_id="Europe/Berlin",
        has_touch=screen == "phone",
    )
    yield f"{screen}-{theme}", context
    context.close()


def drawn(page: Page) -> None:
    """Wait until a page has everything on it."""
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    expect(page.get_by_test_id("stSkeleton")).to_have_count(0)
    page.wait_for_load_state("networkidle")
    for plots in page.locator(".gm-plots").all():
        plots.locator(".js-plotly-plot[data-drawn]").first.wait_for()


def sideways(page: Page) -> int:
    """By how many pixels the page is wider than the screen."""
    found: int = page.evaluate(
        """() => Math.max(...[document.documentElement, document.querySelector('[data-testid=stMain]')].map(
            part => part.scrollWidth - part.clientWidth))"""
    )
    return found


def covered(page: Page) -> list[str]:
    """The texts below the tools that tables always show where nothing hovers."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll('[data-testid=stElementToolbar]')]
            .filter(tools => matchMedia('(hover: none)').matches)
            .map(tools => [tools, tools.closest('.stElementContainer').previousElementSibling])
            .filter(([, above]) => above)
            .filter(([tools, above]) => {
              const [top, bottom] = [tools.getBoundingClientRect().top, above.getBoundingClientRect().bottom]
              return bottom > top + 1
            })
            .map(([, above]) => above.innerText)"""
    )
    return found


def brightness(page: Page) -> float:
    """Of the page's ground, 0 to 255."""
    colour = page.get_by_test_id("stApp").evaluate("app => getComputedStyle(app).backgroundColor")
    return sum(int(part) for part in re.findall(r"\d+", colour)[:3]) / 3


def test_every_page_fits_every_screen_in_both_themes(stage: Stage, viewer: tuple[str, BrowserContext]) -> None:
    name, context = viewer
    eventually(lambda: stage.ask("SELECT count(DISTINCT timestamp_epoch) >= 12 FROM gpu_metrics") == [(1,)])
    page = context.new_page()
    ARTIFACTS.mkdir(exist_ok=True)
    for title, address in PAGES.items():
        page.goto(stage.url + address)
        drawn(page)
        page.screenshot(path=ARTIFACTS / f"{title}-{name}.png")
        assert sideways(page) <= 0, title
        assert covered(page) == [], title
        assert (brightness(page) < 60) == name.endswith("dark"), title
        expect(page.get_by_text("could not be drawn")).to_have_count(0)


def numbers(locator: Locator) -> list[float]:
    return [float(text) for text in re.findall(r"\d+(?:\.\d+)?", locator.inner_text())]


def test_a_card_reads_as_the_database_has_it(page: Page, stage: Stage) -> None:
    page.goto(stage.url)
    first = page.locator(".gm-card").first
    expect(first).to_contain_text("Busy")
    expect(first.locator(".gm-holders")).to_contain_text("sleep")
    [(used, total)] = stage.ask(
        "SELECT m.memory / 1024.0, g.memory_total_mib / 1024.0 FROM gpu_metrics m JOIN gpus g ON g.id = m.gpu_id "
        "WHERE g.gpu_index = 0 ORDER BY timestamp_epoch DESC LIMIT 1"
    )
    assert numbers(tile(page, 0, "memory").locator(".gm-value")) == pytest.approx([used, total], abs=0.05)
    shares = first.locator(".gm-thick i:not(.gm-other)").evaluate_all(
        "parts => parts.map(part => parseFloat(part.style.width))"
    )
    assert shares == pytest.approx([100 * 9 / 48, 100 * 3 / 48], abs=0.1)
    stage.gpus[0].clocks_event_reasons = 0x40
    expect(first).to_contain_text("Throttled")
    first.get_by_role("link", name="GPU 0").click()
    expect(page.locator(".gm-card.throttled")).to_contain_text("GPU 0")
    # The first GPU is the page's default, which soon leaves the address.
    expect(page).to_have_url(re.compile("/gpu$"))
    page.goto(stage.url)
    page.get_by_role("link", name="GPU 1", exact=True).click()
    expect(page).to_have_url(re.compile(r"/gpu\?gpu=GPU\+1$"))
    expect(page.locator(".gm-card")).to_contain_text("GPU 1")


def drag(page: Page, plot: Locator, begin: float, end: float) -> None:
    """Across a plot, from and to these parts of its width."""
    drawn(page)
    # Whatever still moves on the page would move the plot away from under the mouse.
    box = None
    while box is None or box != plot.bounding_box():
        box = plot.bounding_box()
        page.wait_for_timeout(1000)
    left, width = box["x"] + LEFT, box["width"] - LEFT - RIGHT
    height = box["y"] + min(140, box["height"] / 2)
    page.mouse.move(left + begin * width, height)
    page.mouse.down()
    for step in range(1, 9):
        page.mouse.move(left + (begin + step * (end - begin) / 8) * width, height)
    page.mouse.up()


def address(page: Page) -> str:
    """The address of the page now. page.url only changes while something else is asked of the browser."""
    found: str = page.evaluate("location.href")
    return found


def shown_range(page: Page, place: int = 0) -> tuple[datetime, datetime]:
    found = chart(page, place).evaluate(
        """plot => plot._fullLayout.xaxis.range.map(
            edge => typeof edge === 'number' ? edge : +new Date(edge.replace(' ', 'T') + 'Z'))"""
    )
    begin, end = (datetime.fromtimestamp(edge / 1000, UTC) for edge in found)
    return begin, end


def test_the_first_and_the_last_time_of_an_axis_are_complete_and_overlap_nothing(page: Page, demo: Server) -> None:
    end = datetime.now(ZoneInfo("Europe/Berlin")).replace(second=0, microsecond=0)
    edges = [f"{moment:%Y-%m-%dT%H:%M}" for moment in (end - timedelta(minutes=4), end)]
    page.goto(f"{demo.url}/history?range=Custom&from={edges[0]}&to={edges[1]}")
    assert traces(page)
    figure = chart(page).bounding_box()
    assert figure is not None
    times, values = (
        [
            box
            for label in chart(page).locator(f"[class^={name}][class$=tick] text").all()
            if (box := label.bounding_box())
        ]
        for name in "xy"
    )
    last = max(times, key=lambda box: box["x"])
    assert last["x"] + last["width"] <= figure["x"] + figure["width"]
    assert last["x"] > figure["x"] + figure["width"] - 80, "one label is at the very end"
    # A line of text is so much higher than its digits.
    assert max(box["y"] + box["height"] for box in values) <= min(box["y"] for box in times) + 5


def test_a_zoom_in_one_chart_is_that_of_all_with_finer_data_and_is_in_the_address(
    page: Page, demo: Server, browser: Browser
) -> None:
    page.goto(demo.url + "/history?range=6h")
    before = traces(page)[0]["x"]
    apart = before[1] - before[0]
    drag(page, chart(page), 0.9, 0.97)
    eventually(lambda: "range=Custom" in address(page) and "from=" in address(page))
    eventually(lambda: len({shown_range(page, place) for place in range(3)}) == 1)
    # The page shows whole minutes; until it has answered, the browser shows what was dragged.
    eventually(lambda: not any(edge.second or edge.microsecond for edge in shown_range(page)))
    begin, end = shown_range(page)
    assert timedelta(minutes=20) < end - begin < timedelta(minutes=30)
    eventually(lambda: (x := traces(page)[0]["x"])[1] - x[0] < apart)
    # A colleague who opens the link sees the same.
    context = browser.new_context(timezone_id="Europe/Berlin", viewport={"width": 1440, "height": 900})
    colleague = context.new_page()
    colleague.goto(address(page))
    assert traces(colleague)
    assert shown_range(colleague) == (begin, end)
    context.close()
    # Deeper, and back step by step.
    once = address(page)
    drag(page, chart(page), 0.3, 0.6)
    eventually(lambda: address(page) != once and shown_range(page)[1] - shown_range(page)[0] < end - begin)
    box = chart(page).bounding_box()
    assert box is not None
    page.mouse.dblclick(box["x"] + 400, box["y"] + 140)
    eventually(lambda: shown_range(page) == (begin, end))
    page.wait_for_timeout(1000)
    page.mouse.dblclick(box["x"] + 400, box["y"] + 140)
    eventually(lambda: "range=6h" in address(page))
    eventually(lambda: shown_range(page)[1] - shown_range(page)[0] == timedelta(hours=6))


def test_a_hover_shows_every_series_under_one_line_through_all_charts(page: Page, demo: Server) -> None:
    page.goto(demo.url + "/history?range=1h")
    lines = traces(page)
    box = chart(page).bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 600, box["y"] + 140)
    label = chart(page).locator(".hoverlayer .legendtext, .hoverlayer text")
    label.first.wait_for()
    texts = " ".join(label.all_text_contents())
    for trace in lines:
        assert trace["name"] in texts
    for unit in ("Utilization", "Memory used", "Temperature", "Power"):
        assert unit in texts
    line = page.locator(".gm-line")
    expect(line).to_be_visible()
    drawn_line, frame = line.bounding_box(), page.locator(".gm-plots").bounding_box()
    assert drawn_line is not None
    assert frame is not None
    assert drawn_line["height"] == pytest.approx(frame["height"], abs=2)
    assert drawn_line["x"] == pytest.approx(box["x"] + 600, abs=2)


def shown_lines(page: Page) -> set[str]:
    """The names of the lines of the upper chart that are not hidden."""
    found: list[str] = chart(page).evaluate(
        "plot => plot._fullData.filter(t => t.visible === true && t.hoverinfo !== 'skip').map(t => t.name)"
    )
    return set(found)


def test_a_legends_lines_are_hidden_by_pointer_and_key_and_stay_hidden(page: Page, demo: Server) -> None:
    page.goto(demo.url + "/history?range=1h")
    everything = {trace["name"] for trace in traces(page)}
    assert len(everything) > 1
    name = sorted(everything)[1]
    button = page.get_by_role("group", name="Legend").first.get_by_role("button", name=name, exact=True)
    expect(button).to_have_attribute("aria-pressed", "true")
    button.click()
    expect(button).to_have_attribute("aria-pressed", "false")
    eventually(lambda: shown_lines(page) == everything - {name})
    # It stays so when newer samples are drawn.
    before = int(chart(page).get_attribute("data-drawn") or 0)
    eventually(lambda: int(chart(page).get_attribute("data-drawn") or 0) > before + 1)
    assert shown_lines(page) == everything - {name}
    expect(button).to_have_attribute("aria-pressed", "false")
    button.focus()
    page.keyboard.press("Enter")
    eventually(lambda: shown_lines(page) == everything)
    page.wait_for_timeout(600)  # What follows is no third click.
    button.dblclick()
    eventually(lambda: shown_lines(page) == {name})
    page.wait_for_timeout(600)
    button.dblclick()
    eventually(lambda: shown_lines(page) == everything)


def test_a_long_legend_has_room_on_a_phone(page: Page, demo: Server) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(demo.url + "/history?range=1h")
    traces(page)
    for place in range(2):
        figure = page.locator(".gm-figure").nth(place)
        words, legend = figure.locator(".gm-heading").first, figure.get_by_role("group", name="Legend")
        above, top = legend.bounding_box(), words.bounding_box()
        frame = figure.bounding_box()
        assert above is not None
        assert top is not None
        assert frame is not None
        assert frame["y"] <= above["y"] + 1
        assert above["y"] + above["height"] <= top["y"] + 2
        assert above["x"] >= frame["x"]
        assert above["x"] + above["width"] <= frame["x"] + frame["width"]


def test_processes_are_below_the_charts_on_the_same_axis(page: Page, demo: Server) -> None:
    page.goto(demo.url + "/history?range=1h")
    edges = {
        tuple(plot.evaluate("plot => [plot._fullLayout._size.l, plot._fullLayout._size.w]"))
        for plot in (chart(page, place) for place in range(3))
    }
    assert len(edges) == 1, "the axes are above each other"
    bars = chart(page, 1).evaluate(
        "plot => plot._fullData.flatMap(t => [...t.base].map((b, i) => [t.name, b, b + t.x[i], t.customdata[i]]))"
    )
    begin, end = shown_range(page)
    assert bars
    assert all(start < finish for _, start, finish, _ in bars)
    stories = " ".join(story for *_, story in bars)
    assert "PID" in stories
    assert "GiB at most" in stories or "MiB at most" in stories
    page.get_by_role("radio", name="Models").click()
    eventually(lambda: "lanes=Models" in address(page))
    expect(page.locator(".gm-heading").get_by_text("Models", exact=True)).to_be_visible()
    assert begin < end


@pytest.mark.parametrize(("width", "past"), [(1440, "24h"), (390, "1h")])
def test_the_name_of_a_bar_ends_where_the_bar_does(page: Page, demo: Server, width: int, past: str) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(f"{demo.url}/history?range={past}")
    names = chart(page, 1).evaluate(
        """plot => [...plot.querySelectorAll(".bars .point")].flatMap(point => {
          const text = point.querySelector("text"), bar = point.querySelector("path")
          return text ? [[text.textContent, text.getBBox().width, bar.getBBox().width]] : []
        })"""
    )
    assert names
    assert all(written <= bar for _, written, bar in names)


def test_a_paused_page_does_not_change_until_it_is_resumed(page: Page, stage: Stage) -> None:
    page.goto(stage.url)
    expect(tile(page, 0, "utilization")).to_contain_text("42 %")
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_text(re.compile(r"Paused, showing \ds ago"))).to_be_visible()
    stage.gpus[0].gpu_utilization = 77
    stage.tick(4)
    expect(tile(page, 0, "utilization")).to_contain_text("42 %")
    page.get_by_role("link", name="System").click()
    expect(page.get_by_role("button", name="Resume")).to_be_visible()
    page.get_by_role("link", name="Overview").click()
    page.get_by_role("button", name="Resume").click()
    expect(tile(page, 0, "utilization")).to_contain_text("77 %")


def test_a_hidden_tab_asks_for_nothing_and_catches_up_when_it_is_seen(page: Page, stage: Stage) -> None:
    heard = Heard(page)
    page.goto(stage.url)
    expect(tile(page, 0, "utilization")).to_contain_text("42 %")
    page.evaluate(
        """() => {
            window.hiddenNow = true
            Object.defineProperty(document, 'hidden', { configurable: true, get: () => window.hiddenNow })
            document.dispatchEvent(new Event('visibilitychange'))
        }"""
    )

    def is_silent() -> bool:
        """Whether the page hears nothing while the recorder goes on. What it asked for before may still come."""
        before = heard.frames
        stage.tick(4)
        page.wait_for_timeout(100)
        return heard.frames == before

    eventually(is_silent)
    stage.gpus[0].gpu_utilization = 88
    before = page.locator(".gm-cards").inner_html()
    assert is_silent()
    assert page.locator(".gm-cards").inner_html() == before
    page.evaluate("() => { window.hiddenNow = false; document.dispatchEvent(new Event('visibilitychange')) }")
    expect(tile(page, 0, "utilization")).to_contain_text("88 %")


def marked(page: Page) -> list[str]:
    """The PIDs of the rows that have a mark."""
    return column(page, "PID", rows="tr[aria-selected=true]")


def test_a_row_shows_its_story_and_stays_chosen(page: Page, stage: Stage) -> None:
    page.goto(stage.url + "/processes")
    eventually(lambda: len(column(page, "PID")) == 3)
    wanted = column(page, "PID")[1]
    canvas = page.get_by_test_id("data-grid-canvas").first
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + 14, box["y"] + 35 * 2 + 17)
    expect(page.get_by_role("heading", name="sleep")).to_be_visible()
    expect(page.locator(".gm-facts").first).to_contain_text(wanted)
    expect(page.get_by_test_id("stCode")).to_contain_text("sleep 600")
    values = traces(page)
    held = {str(process.pid): size for process, size in zip(stage.processes, (9, 3, 20), strict=True)}
    assert set(values[0]["y"]) == {held[wanted]}
    page.get_by_role("link", name="What its GPU did then").click()
    expect(page).to_have_url(re.compile(r"/history\?.*range=Custom"))
    assert {trace["name"] for trace in traces(page)} <= {"GPU 0", "GPU 1"}


def test_the_chosen_process_is_in_the_address(page: Page, stage: Stage, browser: Browser) -> None:
    heard = Heard(page)
    page.goto(stage.url + "/processes?lifetime=Any")
    eventually(lambda: len(column(page, "PID")) == 3)
    drawn(page)
    pid = column(page, "PID")[1]
    box = page.get_by_test_id("data-grid-canvas").first.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + 14, box["y"] + 35 * 2 + 17)
    story = page.get_by_role("heading", name="sleep")
    facts = page.locator(".gm-facts").first
    expect(facts).to_contain_text(pid)
    [(process_id,)] = stage.ask(f"SELECT id FROM gpu_processes WHERE pid = {pid}")
    eventually(lambda: f"process={process_id}" in address(page))
    # A colleague sees the same story, also where the list does not have its row, and may choose another.
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    colleague = context.new_page()
    colleague.goto(address(page) + "&q=nowhere")
    expect(colleague.get_by_text("No process matches these filters")).to_be_visible()
    expect(colleague.locator(".gm-facts").first).to_contain_text(pid)
    colleague.goto(address(page))
    expect(colleague.locator(".gm-facts").first).to_contain_text(pid)
    grid = colleague.get_by_test_id("data-grid-canvas").first.bounding_box()
    assert grid is not None
    other = column(colleague, "PID")[0]
    colleague.mouse.click(grid["x"] + 14, grid["y"] + 35 + 17)
    expect(colleague.locator(".gm-facts").first).to_contain_text(other)
    eventually(lambda: f"process={process_id}" not in address(colleague) and "process=" in address(colleague))
    colleague.get_by_role("link", name="History").click()
    expect(colleague.get_by_role("heading", name="History")).to_be_visible()
    eventually(lambda: "process=" not in address(colleague))
    colleague.goto(stage.url + "/processes?process=999999999")
    expect(colleague.get_by_text("or no longer: process “999999999”")).to_be_visible()
    context.close()
    # It outlasts refreshes, and other filters that it matches.
    heard.more()
    expect(facts).to_contain_text(pid)
    assert f"process={process_id}" in address(page)
    page.get_by_role("radio", name="6h").click()
    eventually(lambda: "range=6h" in address(page))
    search = page.get_by_placeholder("train.py or 4711")
    search.fill(pid)
    expect(page.get_by_text("1 processes, newest first")).to_be_visible()
    # The mark is where the process now is.
    eventually(lambda: marked(page) == [pid])
    expect(facts).to_contain_text(pid)
    # With others it ends, and no other row is marked for it.
    search.fill(other)
    expect(story).to_have_count(0)
    eventually(lambda: column(page, "PID") == [other])
    settled(page)
    eventually(lambda: marked(page) == [])
    eventually(lambda: "process=" not in address(page))
    search.fill("")
    eventually(lambda: len(column(page, "PID")) == 3)
    assert marked(page) == []
    # The way back leads out of a story, and forward into it again.
    settled(page)
    page.mouse.click(box["x"] + 14, box["y"] + 35 * 2 + 17)
    eventually(lambda: "process=" in address(page) and len(marked(page)) == 1)
    [again] = marked(page)
    page.go_back()
    expect(story).to_have_count(0)
    eventually(lambda: "process=" not in address(page) and marked(page) == [])
    page.go_forward()
    eventually(lambda: "process=" in address(page) and marked(page) == [again])
    expect(facts).to_contain_text(again)


class Delayed:
    """A page's WebSocket, on which what the server sends can be held back. To be made before."""

    def __init__(self, page: Page) -> None:
        self._page, self.is_holding = page, False
        self._held: list[str | bytes] = []
        page.route_web_socket(re.compile(STREAM), self._connect)

    def _connect(self, browser: WebSocketRoute) -> None:
        server = browser.connect_to_server()
        browser.on_message(server.send)
        server.on_message(lambda message: self._held.append(message) if self.is_holding else browser.send(message))
        self._browser = browser

    def finished_runs(self) -> int:
        """How many runs of the script have ended without the browser's knowledge."""
        self._page.wait_for_timeout(50)
        messages = [ForwardMsg.FromString(message) for message in self._held if isinstance(message, bytes)]
        return sum(message.WhichOneof("type") == "script_finished" for message in messages)

    def release(self) -> None:
        """Let the browser know of everything."""
        self.is_holding = False
        for message in self._held:
            self._browser.send(message)
        self._held.clear()


def test_a_row_that_the_browser_still_marks_is_not_chosen_again(page: Page, stage: Stage) -> None:
    line = Delayed(page)
    page.goto(stage.url + "/processes")
    eventually(lambda: len(column(page, "PID")) == 3)
    drawn(page)
    box = page.get_by_test_id("data-grid-canvas").first.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + 14, box["y"] + 35 * 2 + 17)
    eventually(lambda: "process=" in address(page) and len(marked(page)) == 1)
    settled(page)
    # The server has let go of the row, but the browser still marks it when the reader chooses something else.
    line.is_holding = True
    page.go_back()
    eventually(line.finished_runs)
    before = line.finished_runs()
    page.get_by_role("radio", name="6h").click()
    eventually(lambda: line.finished_runs() > before)
    line.release()
    eventually(lambda: "range=6h" in address(page) and len(column(page, "PID")) == 3)
    settled(page)
    assert "process=" not in address(page)
    assert marked(page) == []
    expect(page.get_by_role("heading", name="sleep")).to_have_count(0)


def test_a_story_scrolls_into_view(page: Page, stage: Stage) -> None:
    page.set_viewport_size({"width": 1440, "height": 500})
    heard = Heard(page)
    page.goto(stage.url + "/processes")
    eventually(lambda: len(column(page, "PID")) == 3)
    box = page.get_by_test_id("data-grid-canvas").first.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + 14, box["y"] + 35 * 2 + 17)
    expect(page.get_by_role("heading", name="sleep")).to_be_in_viewport()
    top, before = "main => main.scrollTop", -1.0
    # It has come to rest: half way, it would go on under the reader's hand.
    while (now := page.get_by_test_id("stMain").evaluate(top)) != before or now <= 0:
        before = now
        page.wait_for_timeout(500)
    # The reader may go back to the list: no refresh scrolls away from it.
    page.get_by_role("heading", name="Processes").scroll_into_view_if_needed()
    heard.more()
    expect(page.get_by_role("heading", name="Processes")).to_be_in_viewport()


def test_the_way_back_leads_out_of_a_zoom(page: Page, demo: Server) -> None:
    page.goto(demo.url + "/history?range=6h")
    drawn(page)
    settled(page)
    drag(page, chart(page), 0.9, 0.97)
    eventually(lambda: "range=Custom" in address(page) and "to=" in address(page))
    # How many steps that takes is Streamlit's to decide.
    for _ in range(5):
        settled(page)
        if "range=6h" in address(page):
            break
        page.go_back()
    eventually(lambda: shown_range(page)[1] - shown_range(page)[0] == timedelta(hours=6))


def test_a_custom_time_range_is_in_the_address_as_soon_as_it_is_shown(page: Page, stage: Stage) -> None:
    page.goto(stage.url + "/processes")
    eventually(lambda: len(column(page, "PID")) == 3)
    page.get_by_role("radio", name="Custom").click()
    eventually(lambda: all(part in address(page) for part in ("range=Custom", "from=", "to=")))
    chosen = address(page)
    settled(page)
    box = page.get_by_test_id("data-grid-canvas").first.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + 14, box["y"] + 35 + 17)
    eventually(lambda: "process=" in address(page))
    page.go_back()
    eventually(lambda: address(page) == chosen)
    settled(page)
    expect(page.get_by_text("must be later than")).to_have_count(0)
    eventually(lambda: len(column(page, "PID")) == 3)


def test_a_link_that_cannot_be_followed_says_so_until_the_reader_chooses(page: Page, stage: Stage) -> None:
    page.goto(stage.url + "/gpu?gpu=GPU%2099&range=6H")
    warning = page.get_by_text("This link asks for something that does not exist, or no longer")
    expect(warning).to_have_text(
        "This link asks for something that does not exist, or no longer: GPU “GPU 99”. Shown instead: GPU 0."
    )
    eventually(lambda: "range=6h" in address(page) and "gpu=" not in address(page))
    drawn(page)
    # The same element is there through every refresh: the mark that this puts on it stays.
    warning.evaluate("sentence => { sentence.dataset.seen = 'yes' }")
    stage.tick(4)
    expect(warning).to_have_attribute("data-seen", "yes")
    page.get_by_role("radio", name="12h").click()
    expect(warning).to_have_count(0)
    eventually(lambda: "range=12h" in address(page))
    # A beginning and an end are enough for a stretch; the address says what it is.
    since, until = (datetime.now(UTC) + timedelta(hours=ahead) for ahead in (-2, 1))
    page.goto(stage.url + f"/history?from={since:%Y-%m-%dT%H:%M}&to={until:%Y-%m-%dT%H:%M}")
    eventually(lambda: "range=Custom" in address(page) and "from=" in address(page))
    begin, end = shown_range(page)
    assert end - begin == timedelta(hours=3)


def test_a_half_typed_filter_survives_every_refresh(page: Page, stage: Stage) -> None:
    page.goto(stage.url)
    search = page.get_by_placeholder("Name or PID")
    search.press_sequentially("sle", delay=30)
    for _ in range(4):
        refreshed(page, stage, 1)
        expect(search).to_have_value("sle")
        expect(search).to_be_focused()


def test_the_theme_can_be_toggled(page: Page, stage: Stage) -> None:
    page.goto(stage.url)
    drawn(page)
    before = brightness(page)
    page.get_by_role("button", name="Main menu").click()
    page.get_by_role("menuitemradio", name="Dark").click()
    eventually(lambda: brightness(page) < 60 < before)


def test_the_machines_findings_are_shown(page: Page, stage: Stage) -> None:
    page.goto(stage.url + "/system")
    expect(page.get_by_role("heading", name="Doctor")).to_be_visible()
    eventually(lambda: "NVML" in column(page, "What", 2))
    assert any("580.159.03" in (found or "") for found in column(page, "Found", 2))


def picture(page: Page, name: str) -> Path:
    ARTIFACTS.mkdir(exist_ok=True)
    path = ARTIFACTS / f"{name}.png"
    page.screenshot(path=path)
    return path


@pytest.mark.parametrize("count", [1, 8, 16])
def test_any_number_of_gpus_is_readable(
    page: Page, serve: Callable[..., Server], fake: FakeNvml, count: int
) -> None:
    for index in range(count):
        gpu = fake.add_gpu(name=f"NVIDIA H100 80GB HBM3 {index}", memory_total=80 << 30, memory_used=index << 30)
        gpu.gpu_utilization = 6 * index
    server = serve(fake).ready()
    page.goto(server.url)
    cards = page.locator(".gm-card")
    expect(cards).to_have_count(count)
    expect(cards.last).to_contain_text(f"GPU {count - 1}")
    drawn(page)
    picture(page, f"overview-{count}")
    boxes: list[Any] = cards.evaluate_all(
        "cards => cards.map(card => { const b = card.getBoundingClientRect(); return [b.width, b.bottom] })"
    )
    assert all(width >= 280 for width, _ in boxes)
    if count == 1:
        assert boxes[0][0] > 1200, "one GPU has the page to itself"
    if count == 8:
        assert boxes[-1][1] <= 900, "eight fit on a laptop's screen"
