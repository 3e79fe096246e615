"""The charts of a page are sent before the rest of it, and nothing of it is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from conftest import PATIENCE_S, Server
from playwright.sync_api import Page, WebSocket, expect
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

from pages.ui import turns

SIDEBAR = 1


@dataclass
class Run:
    """The elements that one run of a page's script sent, in order: their places and kinds."""

    sent: list[tuple[tuple[int, ...], str]] = field(default_factory=list)

    def places(self, *kinds: str, sidebar: bool = False) -> list[int]:
        """Where in the order those of some kinds stand (of all where none is named), on the page or beside it."""
        return [
            number
            for number, (path, kind) in enumerate(self.sent)
            if (path[0] == SIDEBAR) == sidebar and kind != "empty" and (kind in kinds or not kinds)
        ]


@pytest.fixture
def runs(page: Page) -> list[Run]:
    """What each run of the page's script has sent so far."""
    found: list[Run] = []
    known: dict[str, str] = {}

    def take(frame: str | bytes) -> None:
        message = ForwardMsg()
        assert isinstance(frame, bytes)
        message.ParseFromString(frame)
        kind = message.WhichOneof("type")
        called = None
        if kind == "new_session":
            found.append(Run())
        elif kind == "ref_hash":
            # What the browser has already.
            called = known.get(message.ref_hash)
        elif kind == "delta" and message.delta.WhichOneof("type") == "new_element":
            element = message.delta.new_element
            called = element.WhichOneof("type")
            if called == "bidi_component":
                called = element.bidi_component.component_name.rpartition(".")[2]
            known[message.hash] = called
        if called is not None:
            found[-1].sent.append((tuple(message.metadata.delta_path), called))

    def listen(socket: WebSocket) -> None:
        socket.on("framereceived", take)

    page.on("websocket", listen)
    return found


@pytest.mark.parametrize(("name", "charts"), [("gpu", 1), ("history", 1), ("usage", 3)])
def test_charts_come_before_filters_and_tables(
    serve: Callable[..., Server], page: Page, runs: list[Run], name: str, charts: int
) -> None:
    server = serve(None, GPUMON_SOURCE="demo").ready()
    page.goto(f"{server.url}/{name}")
    expect(page.locator(".gm-plots[data-drawn]")).to_have_count(charts)
    expect(page.get_by_test_id("stSidebar").get_by_role("radio").first).to_be_visible()
    [opened] = [run for run in runs if run.places("gpumon_plot")][:1]
    last = opened.places("gpumon_plot")[charts - 1]
    assert len(opened.places(sidebar=True)) >= 3
    assert min(opened.places(sidebar=True)) > last
    assert min(opened.places("dataframe", "download_button"), default=last + 1) > last
    # Later everything has its usual turn, and there is as much of it.
    before = len(runs)
    page.get_by_test_id("stSidebar").get_by_role("radio", name="6h", exact=True).click()
    changed = Run()
    for _ in range(int(10 * PATIENCE_S)):
        page.wait_for_timeout(100)
        changed = next((run for run in runs[before:] if run.places(sidebar=True)), changed)
        if len(changed.sent) >= len(opened.sent):
            break
    assert min(changed.places(sidebar=True)) < min(changed.places("gpumon_plot"))
    assert len(changed.places(sidebar=True)) == len(opened.places(sidebar=True))
    for kind in ("gpumon_plot", "dataframe", "download_button"):
        assert len(changed.places(kind)) == len(opened.places(kind)), kind


class Context:
    """As much of a script's context as it takes."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        # What had been sent when the rest began to wait.
        self.sent_first: list[str] | None = None

    def sleep(self, _: float) -> None:
        self.sent_first = list(self.sent)

    def _enqueue(self, message: ForwardMsg) -> None:
        self.sent.append(message.delta.new_element.markdown.body)


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Context:
    context = Context()
    monkeypatch.setattr(turns, "get_script_run_ctx", lambda: context)
    monkeypatch.setattr(turns.st, "session_state", {})
    monkeypatch.setattr(turns.time, "sleep", context.sleep)
    return context


def write(context: Context, text: str, root: int = 0) -> None:
    message = ForwardMsg()
    message.metadata.delta_path.extend([root, 0])
    message.delta.new_element.markdown.body = text
    context._enqueue(message)


def page_of(context: Context) -> None:
    with turns.charts_first():
        for text in ("room", "filter", "another filter"):
            write(context, text, SIDEBAR)
        write(context, "chart")
        turns.rest()
        write(context, "table")


def failing_page_of(context: Context) -> None:
    with turns.charts_first():
        write(context, "room", SIDEBAR)
        write(context, "filter", SIDEBAR)
        raise RuntimeError


def test_a_sidebar_takes_its_room_at_once_and_only_the_first_run_is_in_turns(context: Context) -> None:
    page_of(context)
    assert context.sent_first == ["room", "chart"]
    assert context.sent == ["room", "chart", "filter", "another filter", "table"]
    context.sent.clear()
    context.sent_first = None
    page_of(context)
    assert context.sent_first is None
    assert context.sent == ["room", "filter", "another filter", "chart", "table"]


def test_what_a_run_that_ends_early_has_told_is_sent_and_the_next_is_the_first(context: Context) -> None:
    with pytest.raises(RuntimeError):
        failing_page_of(context)
    assert context.sent == ["room", "filter"]
    assert context.sent_first is None
    context.sent.clear()
    page_of(context)
    assert context.sent == ["room", "chart", "filter", "another filter", "table"]


def test_without_a_page_nothing_has_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "get_script_run_ctx", lambda: None)
    with turns.charts_first():
        turns.rest()
