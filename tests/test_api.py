"""The routes for machines, asked through a real HTTP server, and the files that the page downloads from them."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from http.client import HTTPConnection, IncompleteRead
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode
from zoneinfo import ZoneInfo

import pandas as pd
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from conftest import PATIENCE_S, Server
from fake_nvml import FakeNvml
from filled import serving
from playwright.sync_api import Page, expect
from rig import free_port
from test_processes import PEOPLE
from ticks import tick

from gpumon_core import api
from gpumon_core.attribution.records import ProcessIdentity, Program
from gpumon_core.export.processes import LEDGER
from gpumon_core.recording import runtime
from gpumon_core.store import database
from gpumon_core.store.queries import processes
from gpumon_core.store.queries.processes import process_history
from gpumon_core.store.writer import Writer

PATH = "/api/v1/processes/history"
[HISTORY] = (one for one in api.RESOURCES if one.path == PATH)
BERLIN = ZoneInfo("Europe/Berlin")


@dataclass(frozen=True)
class Answer:
    """What a route answered."""

    status: int
    headers: Message
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def pids(self) -> list[int]:
        assert self.status == 200, self.body
        return [row["pid"] for row in self.json()["processes"]]


Ask = Callable[..., Answer]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Where a server has the routes, and nothing else."""
    with serving() as found:
        yield found


@pytest.fixture
def ask(port: int) -> Ask:
    """Asks for the history with a query: pairs, or a text that is sent as it is."""

    def send(query: Any = (), method: str = "GET", **headers: str) -> Answer:
        connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        try:
            text = query if isinstance(query, str) else urlencode(query)
            connection.request(method, f"{PATH}?{text}", headers=headers)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    return send


def show(url: str, monkeypatch: pytest.MonkeyPatch) -> sa.Engine:
    """Make a database the one that is shown."""
    engine = database.open_for_reading(url)
    monkeypatch.setattr(runtime, "engine", lambda: engine)
    return engine


def write(url: str) -> Writer:
    """The ledger of test_processes: PIDs 9 and 8 are running, 70 and 7 have ended, newest first."""
    writer = Writer(database.open_for_writing(url), "here", "nvml", 4)
    writer.write(tick(100, {(0, 7): 10, (1, 7): 20}), PEOPLE)
    writer.write(tick(160, {(0, 7): 10, (1, 7): 20}), PEOPLE)
    writer.write(tick(200, {(1, 70): 10}), PEOPLE)
    writer.write(tick(300, {(2, 8): 10}, kind="C+G"), PEOPLE)
    writer.write(tick(400, {(2, 8): 10, (0, 9): 5000}, kind="C+G"), PEOPLE)
    return writer


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database that tests only read."""
    url = f"sqlite:///{tmp_path_factory.mktemp('ledger') / 'gpumon.db'}"
    write(url)
    return url


@pytest.fixture
def ledger(written: str, monkeypatch: pytest.MonkeyPatch) -> sa.Engine:
    return show(written, monkeypatch)


TAKEN: list[tuple[list[tuple[str, object]], list[int]]] = [
    ([], [9, 8, 70, 7]),
    ([("from", 150), ("to", 250)], [70, 7]),
    ([("from", "1970-01-01T00:02:41Z")], [9, 8, 70]),
    ([("to", "1970-01-01T01:03:20+01:00")], [70, 7]),
    ([("to", "1970-01-01T00:03:19.999Z")], [7]),
    ([("to", "1970-01-01T01:03:20"), ("tz", "Europe/Berlin")], [70, 7]),
    ([("tz", "Europe/Berlin"), ("to", "1970-01-01 01:03")], [7]),
    ([("to", "1970-01-01")], []),
    ([("gpu", 2)], [70, 7]),
    ([("gpu", 1), ("gpu", 3)], [9, 8, 7]),
    ([("gpu", "id:2"), ("gpu", "here/1")], [70, 7]),
    ([("user", "grace"), ("user", "nobody")], [70]),
    ([("container", "chat-0"), ("container", "ollama")], [9, 70]),
    ([("workload", "vLLM"), ("workload", "PyTorch")], [9, 7]),
    ([("model", "qwen3"), ("model", "qwen3")], [70]),
    ([("workload", "vLLM"), ("model", "qwen3")], []),
    ([("type", "G"), ("type", "M")], [9, 8]),
    ([("type", "G")] * 1000, [9, 8]),
    ([("state", "ended")], [70, 7]),
    ([("state", "ended"), ("state", "running")], [9, 8, 70, 7]),
    ([("min_memory_mib", 30)], [9, 7]),
    ([("min_lifetime_s", 60)], [8, 7]),
    ([("q", "TRAIN")], [7]),
    ([("q", "")], [9, 8, 70, 7]),
    ([("q", "' OR 1=1 --")], []),
    ([("q", "7" * 1000)], []),
    ([("limit", 1)], [9]),
    ([("limit", 1000)], [9, 8, 70, 7]),
    ([("cursor", api.cursor((300, 3)))], [70, 7]),
    ([("cursor", api.cursor((0, 0)))], []),
    ([("format", "json")], [9, 8, 70, 7]),
]


@pytest.mark.parametrize(("query", "pids"), TAKEN, ids=lambda one: str(one)[:60])
def test_every_parameter_chooses_rows(
    ledger: sa.Engine, ask: Ask, query: list[tuple[str, object]], pids: list[int]
) -> None:
    answer = ask(query)
    assert answer.pids() == pids
    if not {"limit", "cursor"} & dict(query).keys():
        assert answer.json()["total"] == len(pids)


REFUSED: list[tuple[list[tuple[str, object]], str]] = [
    ([("from", "yesterday")], "from"),
    ([("from", "")], "from"),
    ([("from", -1)], "from"),
    ([("from", 10**17)], "from"),
    ([("from", "9" * 5000)], "from"),
    ([("from", "1969-12-31T23:59:59Z")], "from"),
    ([("from", "0001-01-01T00:00:00"), ("tz", "Asia/Tokyo")], "from"),
    ([("from", "2026-02-30")], "from"),
    ([("from", 1.5)], "from"),
    ([("from", 100), ("from", 200)], "from"),
    ([("to", "9999-12-31T23:59:59-12:00")], "to"),
    ([("to", "nan")], "to"),
    ([("from", 200), ("to", 199)], "to"),
    ([("gpu", "")], "gpu"),
    ([("gpu", "1\0")], "gpu"),
    ([("gpu", 1)] * 1001, "gpu"),
    ([("user", "")], "user"),
    ([("user", "a" * 1001)], "user"),
    ([("user", "a\0b")], "user"),
    ([("container", "")], "container"),
    ([("workload", "\0")], "workload"),
    ([("model", "")], "model"),
    ([("type", "c")], "type"),
    ([("type", "C+G")], "type"),
    ([("state", "Running")], "state"),
    ([("min_memory_mib", 2**31)], "min_memory_mib"),
    ([("min_memory_mib", "-0")], "min_memory_mib"),
    ([("min_memory_mib", "1e3")], "min_memory_mib"),
    ([("min_lifetime_s", 10**30)], "min_lifetime_s"),
    ([("min_lifetime_s", "1 hour")], "min_lifetime_s"),
    ([("q", "x" * 1001)], "q"),
    ([("q", "\0")], "q"),
    ([("q", "a"), ("q", "b")], "q"),
    ([("tz", "Mars/Olympus")], "tz"),
    ([("tz", "")], "tz"),
    ([("tz", "../../etc/passwd")], "tz"),
    ([("tz", "/etc/passwd")], "tz"),
    ([("tz", "Europe")], "tz"),
    ([("tz", "Europe/" + "x" * 300)], "tz"),
    ([("tz", "Europe/Berlin\0")], "tz"),
    ([("tz", "Größe")], "tz"),
    ([("format", "xml")], "format"),
    ([("format", "CSV")], "format"),
    ([("limit", 0)], "limit"),
    ([("limit", 1001)], "limit"),
    ([("limit", 5), ("format", "csv")], "limit"),
    ([("cursor", "")], "cursor"),
    ([("cursor", "!")], "cursor"),
    ([("cursor", "a")], "cursor"),
    ([("cursor", "Größe")], "cursor"),
    ([("cursor", api.cursor((300, 3)) + "=")], "cursor"),
    ([("cursor", api.cursor((10**12 - 1, 3)))], "cursor"),
    ([("cursor", api.cursor((300, 2**31)))], "cursor"),
    ([("cursor", api.cursor((300, 3))), ("format", "parquet")], "cursor"),
    ([("gpus", 1)], "gpus"),
    ([("FROM", 1)], "FROM"),
    ([("", "x")], ""),
    ([("<script>", "x")], "<script>"),
]


@pytest.mark.parametrize(("query", "name"), REFUSED, ids=lambda one: str(one)[:60])
def test_what_cannot_be_answered_is_a_problem_with_its_parameter(
    ledger: sa.Engine, ask: Ask, query: list[tuple[str, object]], name: str
) -> None:
    answer = ask(query)
    assert answer.status == 400, answer.body
    assert answer.headers["Content-Type"] == "application/problem+json"
    payload = answer.json()
    assert payload["detail"]
    assert payload == {
        "type": "about:blank",
        "title": "Bad Request",
        "status": 400,
        "detail": payload["detail"],
        "parameter": name,
    }


def test_every_parameter_of_the_table_was_tried_right_and_wrong() -> None:
    names = {one.name for one in HISTORY.parameters}
    assert {name for query, _ in TAKEN for name, _ in query} == names
    assert {name for _, name in REFUSED} >= names
    assert all(one.description.endswith(".") and one.kind.schema for one in HISTORY.parameters)


def test_a_parameter_with_a_long_name_is_named_in_short(ledger: sa.Engine, ask: Ask) -> None:
    answer = ask([("x" * 5000, "")])
    assert answer.status == 400
    assert len(answer.body) < 1000


def test_a_plus_sign_that_a_query_lost_is_found_again(ledger: sa.Engine, ask: Ask) -> None:
    for text in ("1970-01-01T01:03:20+01:00", "1970-01-01T01:03:20.000+0100", "1970-01-01T01:04+01:00"):
        assert ask(f"to={text}").pids() == [70, 7]
        assert ask([("to", text)]).pids() == [70, 7]


@pytest.mark.parametrize("query", ["q=%FF%FE", "q=%ED%A0%80", "q=%", "q=\\", "&&=&", "q=a;b", "q=_%25"])
def test_bytes_that_are_no_text_are_no_error(ledger: sa.Engine, ask: Ask, query: str) -> None:
    assert ask(query).status in (200, 400)


def test_the_largest_values_are_no_error_in_any_database(
    database_url: str, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    write(database_url)
    show(database_url, monkeypatch)
    largest = 2**31 - 1
    last = 253_402_214_399
    for query in (
        [("from", last), ("to", last)],
        [("to", last), ("min_lifetime_s", last)],
        [("user", f"{'ö' * 10}{number}") for number in range(1000)],
        [("min_memory_mib", largest)],
        [("q", "ö%_\\" * 250)],
        [("q", str(largest))],
        [("q", str(largest + 1))],
        [("cursor", api.cursor((0, largest)))],
        [("from", last), ("cursor", api.cursor((last, largest)))],
    ):
        assert ask(query).pids() == []
    assert ask([("cursor", api.cursor((last, largest)))]).pids() == [9, 8, 70, 7]
    for number in (0, largest, largest + 1, "9" * 1000, "١"):
        answer = ask([("gpu", 1), ("gpu", number)])
        assert (answer.status, answer.json()["parameter"]) == (404, "gpu")


def test_json_has_the_ledgers_values(ledger: sa.Engine, ask: Ask) -> None:
    answer = ask([("tz", "Europe/Berlin")])
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    payload = answer.json()
    assert payload == {"processes": LEDGER.plain_rows(process_history(ledger), BERLIN), "total": 4, "next": None}
    assert payload["processes"][0]["first_seen"] == "1970-01-01T01:06:40+01:00"


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5])
def test_the_last_page_says_that_it_is(ledger: sa.Engine, ask: Ask, limit: int) -> None:
    query: list[tuple[str, object]] = [("limit", limit)]
    pids, pages = [], 0
    while query:
        answer = ask(query)
        pids += answer.pids()
        pages += 1
        following = answer.json()["next"]
        query = [("limit", limit), ("cursor", following)] if following else []
    assert pids == [9, 8, 70, 7]
    assert pages == -(-4 // limit)


def test_pages_neither_repeat_nor_miss_a_row_while_rows_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    url = f"sqlite:///{tmp_path / 'gpumon.db'}"
    writer = write(url)
    show(url, monkeypatch)
    answer = ask([("limit", 2)])
    pids = answer.pids()
    for number in range(2):
        crowd = {
            pid: ProcessIdentity(pid, f"b:{pid}", 1.0, "w", "ada")
            for pid in range(100 + 10 * number, 110 + 10 * number)
        }
        writer.write(tick(500 + number, {(0, pid): 10 for pid in crowd}), crowd)
        answer = ask([("limit", 1), ("cursor", answer.json()["next"])])
        pids += answer.pids()
    assert pids == [9, 8, 70, 7]
    assert answer.json()["next"] is None
    assert answer.json()["total"] == 24, "how many there are now"


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("text/csv", "text/csv; charset=utf-8"),
        ("TEXT/CSV ; q=0.3", "text/csv; charset=utf-8"),
        ("application/vnd.apache.parquet", "application/vnd.apache.parquet"),
        ("text/csv;q=0.5, application/json", "application/json"),
        ("application/json;q=0.1, text/*;q=0.2", "text/csv; charset=utf-8"),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "application/json"),
        ("text/csv;q=0", "application/json"),
        ("image/png", "application/json"),
        ("application/json;q=0, */*", "text/csv; charset=utf-8"),
        (";;q=,,;q=nan, text/csv;q=inf;x", "application/json"),
    ],
)
def test_accept_chooses_the_format_where_the_query_does_not(
    ledger: sa.Engine, ask: Ask, accept: str, kind: str
) -> None:
    answer = ask([], Accept=accept)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == kind
    assert answer.headers["Vary"] == "Accept"
    assert ask([("format", "json")], Accept=accept).headers["Content-Type"] == "application/json"


def rows_of(answer: Answer) -> list[str]:
    """The ids in a file."""
    if answer.headers["Content-Type"] == api.MEDIA_TYPES["parquet"]:
        return [str(number) for number in pq.read_table(io.BytesIO(answer.body))["Id in gpumon"].to_pylist()]
    return [row["Id in gpumon"] for row in csv.DictReader(io.StringIO(answer.body.decode(), newline=""))]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_file_has_all_rows_that_the_filters_leave(ledger: sa.Engine, ask: Ask, kind: str) -> None:
    answer = ask([("format", kind), ("user", "ada"), ("tz", "Asia/Tokyo")])
    assert answer.status == 200
    assert answer.headers["X-Total-Rows"] == "2"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    disposition = answer.headers["Content-Disposition"]
    name = f"gpumon-processes-%Y%m%d-%H%M%S.{kind}"
    made = datetime.strptime(disposition, f'attachment; filename="{name}"').replace(tzinfo=ZoneInfo("Asia/Tokyo"))
    assert abs((datetime.now(UTC) - made).total_seconds()) < 60
    frame = process_history(ledger, processes.ProcessFilter(users=("ada",)))
    assert rows_of(answer) == [str(number) for number in frame["process_id"]]
    if kind == "csv":
        assert answer.body == b"".join(LEDGER.write("csv", [frame], ZoneInfo("Asia/Tokyo")))
    none = ask([("format", kind), ("user", "nobody")])
    assert (none.status, none.headers["X-Total-Rows"], rows_of(none)) == (200, "0", [])


def test_head_says_how_many_without_reading_them(
    ledger: sa.Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "page", lambda *_: pytest.fail("read"))
    answer = ask([("format", "csv")], method="HEAD")
    assert (answer.status, answer.headers["X-Total-Rows"], answer.body) == (200, "4", b"")
    assert ask([], method="POST").status == 405


def paged(ledger: sa.Engine, second: Callable[[], None]) -> Callable[..., Iterator[pd.DataFrame]]:
    """Pages of one row, before the second of which something happens."""
    first, *others = processes.pages(ledger, size=1)

    def pages(*_: object) -> Iterator[pd.DataFrame]:
        yield first
        second()
        yield from others

    return pages


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_file_that_breaks_off_is_seen_to_be_incomplete(
    ledger: sa.Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def lost() -> None:
        raise sa.exc.OperationalError("SELECT", {}, sqlite3.OperationalError("disk I/O error"))

    monkeypatch.setattr(processes, "pages", paged(ledger, lost))
    with pytest.raises(IncompleteRead):
        ask([("format", kind)])


def test_a_database_that_fails_at_the_first_row_is_reported_as_a_problem(
    ledger: sa.Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> Iterator[pd.DataFrame]:
        raise sa.exc.OperationalError("SELECT secret", {}, sqlite3.OperationalError("disk I/O error"))
        yield

    monkeypatch.setattr(processes, "pages", lost)
    answer = ask([("format", "csv")])
    assert answer.status == 503
    assert "disk I/O error" in answer.json()["detail"]
    assert "secret" not in answer.json()["detail"]


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_a_slow_answer_keeps_nobody_waiting(
    ledger: sa.Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    waiting, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        if not waiting.is_set():
            waiting.set()
            assert go_on.wait(PATIENCE_S)

    count = processes.count
    if kind == "csv":
        monkeypatch.setattr(processes, "pages", paged(ledger, slow))
    else:
        monkeypatch.setattr(processes, "count", lambda *given: (slow(), count(*given))[1])
    with ThreadPoolExecutor() as pool:
        first = pool.submit(ask, [("format", kind)])
        try:
            assert waiting.wait(PATIENCE_S)
            assert pool.submit(ask).result(timeout=PATIENCE_S).pids() == [9, 8, 70, 7]
            assert not first.done()
        finally:
            go_on.set()
        answer = first.result(timeout=PATIENCE_S)
    assert answer.pids() == [9, 8, 70, 7] if kind == "json" else len(rows_of(answer)) == 4


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_without_a_database_the_service_is_unavailable_and_makes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask, kind: str
) -> None:
    path = tmp_path / "gpumon.db"
    show(f"sqlite:///{path}", monkeypatch)
    answer = ask([("format", kind)])
    assert answer.status == 503
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["Cache-Control"] == "no-store"
    payload = answer.json()
    assert (payload["type"], payload["title"], payload["status"]) == ("about:blank", "Service Unavailable", 503)
    assert "parameter" not in payload
    assert not path.exists()
    assert ask([("format", kind), ("type", "x")]).status == 400, "what is wrong is reported before"


@pytest.mark.parametrize("content", [b"", b"this is not a database at all" * 100])
def test_a_database_that_cannot_be_read_is_reported_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask, content: bytes
) -> None:
    path = tmp_path / "gpumon.db"
    path.write_bytes(content)
    show(f"sqlite:///{path}", monkeypatch)
    for kind in ("json", "csv", "parquet"):
        answer = ask([("format", kind)])
        assert answer.status == 503
        detail = answer.json()["detail"]
        assert detail.startswith("The database cannot be read (")
        assert "SELECT" not in detail
        assert "\n" not in detail


def test_a_server_that_is_away_is_reported_without_its_password(monkeypatch: pytest.MonkeyPatch, ask: Ask) -> None:
    show(f"postgresql+psycopg://gpumon:geheim@127.0.0.1:{free_port()}/gpumon", monkeypatch)
    answer = ask()
    assert answer.status == 503
    assert b"geheim" not in answer.body


def test_the_page_downloads_exactly_the_rows_that_it_shows(
    page: Page, serve: Callable[..., Server], fake: FakeNvml, tmp_path: Path
) -> None:
    (tmp_path / "history").mkdir()
    url = f"sqlite:///{tmp_path / 'history' / 'gpumon.db'}"
    writer = Writer(database.open_for_writing(url), "testhost", "nvml", 4)
    now = int(time.time()) - 600
    users = ("ada", "grace")
    people = {
        pid: ProcessIdentity(
            pid, f"b:{pid}", now - 1.25, f'=cmd {pid}\r\n,"', users[pid % 2], Program(command="a\rb, “c”")
        )
        for pid in range(1, 41)
    }
    for number in range(4):
        writer.write(tick(now + 4 * number, {(pid % 3, pid): pid for pid in people if pid % 4 == number}), people)
    writer.settle()
    fake.add_gpu(name="NVIDIA RTX A6000")
    server = serve(fake, GPUMON_RECORD="false")
    server.wait(lambda status, _: status != 0)

    page.goto(f"{server.url}/processes?range=1h&user={quote('ada')}&q=cmd")
    expect(page.get_by_text("20 processes, newest first")).to_be_visible()
    frame = process_history(database.open_for_reading(url), processes.ProcessFilter(users=("ada",)))
    assert len(frame) == 20
    files = {}
    for label, kind in (("CSV", "csv"), ("Parquet", "parquet")):
        with page.expect_download() as loading:
            page.get_by_role("link", name=f"↓ {label}", exact=True).click()
        assert loading.value.suggested_filename.endswith(f".{kind}")
        loading.value.save_as(tmp_path / kind)
        files[kind] = (tmp_path / kind).read_bytes()
    assert files["csv"] == b"".join(LEDGER.write("csv", [frame], BERLIN))
    due = io.BytesIO(b"".join(LEDGER.write("parquet", [frame], BERLIN)))
    assert pq.read_table(io.BytesIO(files["parquet"])).equals(pq.read_table(due))
