"""Long answers take turns: whoever waits for too long is asked to come back, whoever leaves gives up the place."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import pandas as pd
import pytest
from conftest import PATIENCE_S, eventually
from filled import filled, serving
from test_api import show

from gpumon_core import api
from gpumon_core.api import history
from gpumon_core.metrics import GPU_METRICS_BY_KEY
from gpumon_core.store.queries import history as queried
from gpumon_core.web import turns

LONG = "/api/v1/history?metric=utilization"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return filled(tmp_path_factory.mktemp("filled"))


@pytest.fixture
def port(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A server with one place for long answers."""
    show(url, monkeypatch)
    monkeypatch.setattr(turns, "places", lambda: 1)
    monkeypatch.setattr(turns, "WAIT_S", 0.5)
    with serving() as found:
        yield found


def asked(port: int, path: str) -> tuple[int, dict[str, Any], Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), answer.headers
    finally:
        connection.close()


class Slow:
    """A history that waits until it is let go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()
        read = queried.metrics_history

        def slow(*given: Any) -> pd.DataFrame:
            self.began.set()
            assert self.go_on.wait(PATIENCE_S)
            return read(*given)

        monkeypatch.setattr(queried, "metrics_history", slow)


@pytest.fixture
def slow(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    found = Slow(monkeypatch)
    yield found
    found.go_on.set()


def test_who_waits_for_too_long_is_asked_to_come_back(port: int, slow: Slow) -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(asked, port, LONG)
        assert slow.began.wait(PATIENCE_S)
        status, problem, headers = asked(port, LONG)
        assert (status, problem["status"]) == (429, 429)
        assert int(headers["Retry-After"]) >= 0
        assert "fewer points" in problem["detail"]
        # Short ones wait for nobody.
        assert asked(port, "/api/v1/gpus")[0] == 200
        assert asked(port, "/api/v1/processes")[0] == 200
        slow.go_on.set()
        assert first.result(timeout=PATIENCE_S)[0] == 200
    assert asked(port, LONG)[0] == 200, "the place is free again"


def test_who_waits_in_time_is_answered(port: int, slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(asked, port, LONG)
        assert slow.began.wait(PATIENCE_S)
        second = pool.submit(asked, port, LONG)
        slow.go_on.set()
        assert first.result(timeout=PATIENCE_S)[0] == 200
        assert second.result(timeout=PATIENCE_S)[0] in (200, 429)


@pytest.mark.parametrize("path", [LONG, f"{LONG}&format=csv"])
def test_a_client_that_leaves_gives_up_its_place(port: int, slow: Slow, path: str) -> None:
    gone = socket.create_connection(("127.0.0.1", port))
    gone.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert slow.began.wait(PATIENCE_S)
    gone.close()
    slow.go_on.set()
    eventually(lambda: asked(port, LONG)[0] == 200)


def test_an_answer_that_fails_gives_up_its_place(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:

        def broken(*_: Any) -> pd.DataFrame:
            raise RuntimeError("broken")

        patch.setattr(queried, "metrics_history", broken)
        connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        connection.request("GET", LONG)
        assert connection.getresponse().status == 500
        connection.close()
    assert asked(port, LONG)[0] == 200


def test_files_of_pages_take_turns_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_files", threading.BoundedSemaphore(1))
    monkeypatch.setattr(turns, "WAIT_S", 0.1)
    began, go_on = threading.Event(), threading.Event()

    def slow() -> bytes:
        began.set()
        assert go_on.wait(PATIENCE_S)
        return b"slow"

    with ThreadPoolExecutor() as pool:
        first = pool.submit(turns.made, slow)
        assert began.wait(PATIENCE_S)
        with pytest.raises(turns.Busy, match="try again"):
            turns.made(lambda: b"never")
        go_on.set()
        assert first.result(timeout=PATIENCE_S) == b"slow"
    with pytest.raises(ZeroDivisionError):
        turns.made(lambda: bytes(1 // 0))
    assert turns.made(lambda: b"free again") == b"free again"


def test_what_reads_much_takes_turns_and_what_does_not_waits_for_nobody() -> None:
    short = {"/api/v1/gpus", "/api/v1/processes", "/api/v1/original/current", "/api/v1/openapi.json"}
    assert {one.path for one in api.RESOURCES if not one.takes_turns} == short


EVERYTHING = "&".join(f"metric={key}" for key in GPU_METRICS_BY_KEY)


@pytest.mark.parametrize("query", ["", "&gpu=index:0", "&format=csv", "&gpu=index:0&format=parquet"])
def test_more_than_an_answer_may_have_is_refused_and_what_is_offered_is_answered(
    port: int, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "MOST_CELLS", 10_000)
    status, problem, _ = asked(port, f"/api/v1/history?range=2h&points=10000&{EVERYTHING}{query}")
    assert (status, problem["parameter"]) == (400, "points")
    points = int(problem["detail"].rpartition("points=")[2].rstrip("."))
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request("GET", f"/api/v1/history?range=2h&points={points}&{EVERYTHING}{query}")
    assert connection.getresponse().status == 200
    connection.close()


def test_a_short_range_may_be_asked_for_with_any_points(port: int) -> None:
    assert asked(port, f"/api/v1/history?range=1m&points=10000&{EVERYTHING}")[0] == 200
