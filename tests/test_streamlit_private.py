"""The private parts of Streamlit that gpumon uses are as gpumon knows them: one test for each.

Where an upgrade of Streamlit makes one fail, pages/components/streamlit_private.py says what it is for.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from conftest import PATIENCE_S, ROOT, eventually
from playwright.sync_api import Page, expect
from rig import free_port
from websockets.sync.client import connect

from pages.components import streamlit_private as private

# A page of Streamlit without any of gpumon.
SCRIPT = """
import streamlit as st
def other():
    st.title("Other")
def first():
    st.title("First")
    st.dataframe({"a": [1, 2]})
    st.sidebar.text_input("In the sidebar")
st.navigation([st.Page(first, default=True), st.Page(other, url_path="other")], position="top").run()
"""


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=PATIENCE_S):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of a Streamlit server with its own page, and gpumon's configuration."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "bare.py").write_text(SCRIPT)
    (folder / ".streamlit").mkdir()
    (folder / ".streamlit" / "config.toml").write_text((ROOT / ".streamlit" / "config.toml").read_text("utf-8"))
    found = free_port()
    command = [sys.executable, "-m", "streamlit", "run", "bare.py", "--server.port", str(found)]
    server = subprocess.Popen(command, cwd=folder)
    eventually(lambda: answers(found))
    yield found
    server.terminate()
    server.wait(timeout=PATIENCE_S)


@pytest.fixture
def url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def opened(page: Page, url: str) -> Page:
    page.goto(url)
    expect(page.get_by_role("heading", name="First")).to_be_visible()
    return page


def test_the_html_page_has_one_head_and_is_served_below_every_page(url: str) -> None:
    text = private.INDEX.read_text("utf-8")
    assert text.count(private.HEAD_END) == 1
    with urllib.request.urlopen(f"{url}/other", timeout=PATIENCE_S) as answer:
        assert answer.read().decode() == text


def test_a_page_may_say_where_its_server_is(page: Page, url: str) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "_stcore/health" in request.url else None)
    page.add_init_script(private.SERVER_ADDRESS % json.dumps(f"{url}/"))
    page.goto(f"{url}/other")
    expect(page.get_by_role("heading", name="Other")).to_be_visible()
    assert asked == [f"{url}/_stcore/health"]


def test_the_choice_of_light_or_dark_is_stored_under_this_key(page: Page, url: str) -> None:
    opened(page, url)
    before, after = private.THEME_KEY
    page.get_by_role("button", name="Main menu").click()
    for theme in ("Dark", "Light", "System"):
        page.get_by_role("menuitemradio", name=theme).click()
        page.wait_for_function(
            "([key, theme]) => localStorage.getItem(key) === JSON.stringify(theme)",
            arg=[f"{before}/{after}", theme],
        )


def test_the_stored_choice_is_read_when_a_page_opens(page: Page, url: str) -> None:
    before, after = private.THEME_KEY
    page.add_init_script(f"localStorage.setItem({json.dumps(f'{before}/{after}')}, '\"Dark\"')")
    opened(page, url)
    expect(page.get_by_test_id("stApp")).to_have_css("background-color", "rgb(13, 17, 23)")


def test_a_page_its_elements_and_its_tables_have_these_classes(page: Page, url: str) -> None:
    opened(page, url)
    block = page.locator(private.MAIN_BLOCK)
    expect(block).to_have_count(1)
    expect(block.get_by_role("heading", name="First")).to_be_visible()
    expect(page.locator(f"{private.ELEMENT}:has({private.TABLE}) [data-testid=data-grid-canvas]")).to_be_attached()
    expect(page.locator(private.ELEMENT).first).to_be_attached()


def test_the_open_sidebar_has_a_button_that_closes_it(page: Page, url: str) -> None:
    opened(page, url)
    box = page.get_by_label("In the sidebar")
    expect(box).to_be_in_viewport()
    page.evaluate("selector => document.querySelector(selector).click()", private.CLOSE_MENU)
    expect(box).not_to_be_in_viewport()
    expect(page.locator(private.CLOSE_MENU)).to_have_count(0)


def test_no_other_site_may_steer_a_page(url: str) -> None:
    with urllib.request.urlopen(f"{url}/_stcore/host-config", timeout=PATIENCE_S) as answer:
        assert json.load(answer)[private.ALLOWED_ORIGINS.rpartition(".")[2]] == []


def test_files_are_sent_to_this_route(url: str) -> None:
    # Without the cookie that belongs to it, a request is refused; a route that does not exist answers otherwise.
    request = urllib.request.Request(f"{url}{private.UPLOADS}/session/file", b"x", method="PUT")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=PATIENCE_S)
    assert caught.value.code in (400, 403)


def test_the_websocket_speaks_in_these_messages(port: int) -> None:
    wanted = private.BackMsg()
    wanted.rerun_script.query_string = ""
    kinds = set()
    with connect(f"ws://127.0.0.1:{port}{private.STREAM}", subprotocols=["streamlit"], proxy=None) as socket:  # type: ignore[list-item]
        socket.send(wanted.SerializeToString())
        while "script_finished" not in kinds:
            message = private.ForwardMsg()
            message.ParseFromString(socket.recv(timeout=PATIENCE_S))
            kinds.add(message.WhichOneof("type"))
    assert {"new_session", "delta"} <= kinds
