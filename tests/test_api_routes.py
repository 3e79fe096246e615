"""Each route below /api/v1: what it answers, that its description says so, and that docs/api.md does."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import api_reference
import openapi_spec_validator
import pandas as pd
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from cli import gpumon, settings
from conftest import PATIENCE_S, Server
from fake_nvml import FakeNvml
from filled import NOW, filled, serving
from jsonschema import Draft202012Validator
from test_api import Answer, show
from ticks import GPUS, tick

from gpumon_core import api
from gpumon_core.api import original
from gpumon_core.api.resource import Resource
from gpumon_core.attribution.records import ProcessIdentity, Program
from gpumon_core.metrics import GPU_METRICS
from gpumon_core.recording import runtime
from gpumon_core.safety.parameters import LAST_MOMENT
from gpumon_core.settings import Settings
from gpumon_core.simulation.past import fill
from gpumon_core.store import database, schema
from gpumon_core.store.queries import costs, frames, history, model_sessions, processes, usage
from gpumon_core.store.queries.usage import Scope
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuInfo, GpuReading, HostInfo, ProcessReading, Snapshot

ROOT = Path(__file__).resolve().parent.parent
BERLIN = ZoneInfo("Europe/Berlin")
PAGE = (ROOT / "docs" / "api.md").read_text()
Ask = Callable[..., Answer]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving() as found:
        yield found


@pytest.fixture
def ask(port: int) -> Ask:
    """Asks for a path with its query. Every JSON answer is held to the description."""

    def send(target: str, method: str = "GET", **headers: str) -> Answer:
        connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        try:
            connection.request(method, target, headers=headers)
            found = connection.getresponse()
            answer = Answer(found.status, found.headers, found.read())
        finally:
            connection.close()
        if method == "GET":
            conforms(target.partition("?")[0], answer)
        return answer

    return send


def document() -> dict[str, Any]:
    return dict(api.openapi.document(api.RESOURCES))


def conforms(path: str, answer: Answer) -> None:
    """The answer is one that the description has for its path, status and type."""
    if path not in api.PATHS:
        assert answer.status == 404
        return
    payload = document()
    found = payload["paths"][path]["get"]["responses"][str(answer.status)]["content"]
    kind = answer.headers["Content-Type"].split(";")[0]
    if kind.endswith("json"):
        schema = {**found[kind]["schema"], "components": payload["components"]}
        Draft202012Validator(schema).validate(answer.json())
    else:
        assert kind in found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> str:
    return filled(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def gpus(demo: str, monkeypatch: pytest.MonkeyPatch) -> sa.Engine:
    """A database of some hours of simulated GPUs, which is shown."""
    monkeypatch.setattr(runtime, "settings", Settings)
    return show(demo, monkeypatch)


def example(one: Resource) -> str:
    return one.path + (f"?{one.example}" if one.example else "")


def test_the_description_is_valid_openapi(gpus: sa.Engine, ask: Ask) -> None:
    served = ask("/api/v1/openapi.json").json()
    assert served["openapi"] == "3.1.0"
    openapi_spec_validator.validate(served)
    for one in api.RESOURCES:
        Draft202012Validator.check_schema(one.schema())


def test_every_route_is_described_and_every_described_path_answers(gpus: sa.Engine, ask: Ask) -> None:
    routes = [route.path for route in api.ROUTES if route.path not in ("/api/v1", "/api/v1/{rest:path}")]
    assert sorted(routes) == sorted(document()["paths"])
    for one in api.RESOURCES:
        payload = document()["paths"][one.path]["get"]
        assert [each["name"] for each in payload["parameters"]] == [each.name for each in one.parameters]
        for kind in one.formats:
            query = re.sub(r"[?&]limit=\d+", "", example(one)) if kind != "json" else example(one)
            answer = ask(query, Accept=api.MEDIA_TYPES[kind])
            assert (answer.status, answer.headers["Content-Type"].split(";")[0]) == (200, api.MEDIA_TYPES[kind])
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_every_route_answers_on_both_databases(
    database_url: str, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    monkeypatch.setattr(runtime, "settings", Settings)
    writer = Writer(database.open_for_writing(database_url), "here", "nvml", 4)
    program = Program(workload="vLLM", category="inference", model="llama")
    people = {7: ProcessIdentity(7, "b:1", 1.0, "=vllm", "ada", program)}
    for second in range(100, 3800, 4):
        writer.write(tick(second, {(0, 7): 1000}), people)
    writer.settle()
    show(database_url, monkeypatch)
    for one in api.RESOURCES:
        for kind in one.formats:
            suffix = "?user=ada&q=VLLM&gpu=1" if one.path == "/api/v1/processes" else ""
            answer = ask(one.path + suffix, Accept=api.MEDIA_TYPES[kind])
            assert answer.status == 200, answer.body
            if kind == "csv" and one.path in ("/api/v1/processes", "/api/v1/models"):
                assert b",'=vllm," in answer.body, "no formula"
    assert ask("/api/v1/processes?user=ada&q=VLLM&gpu=1").pids() == [7]
    assert ask("/api/v1/processes?gpu=2").pids() == ask("/api/v1/processes?user=eve").pids() == []
    assert [row["model"] for row in ask("/api/v1/models").json()["models"]] == ["llama"]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
def test_another_method_is_a_problem(gpus: sa.Engine, ask: Ask, method: str) -> None:
    for path in api.PATHS:
        answer = ask(path, method)
        assert answer.status == 405
        assert answer.headers["Allow"] == "GET, HEAD"
        assert answer.headers["Content-Type"] == api.PROBLEM
        assert answer.json()["title"] == "Method Not Allowed"


@pytest.mark.parametrize("path", ["", "/", "/gpu", "/gpus/", "/gpus/1", "/processes/history/x", "/%00", "//gpus"])
def test_another_path_is_a_problem(gpus: sa.Engine, ask: Ask, path: str) -> None:
    for method in ("GET", "POST"):
        answer = ask(f"/api/v1{path}", method)
        assert answer.status == 404
        assert answer.headers["Content-Type"] == api.PROBLEM
        assert "/api/v1/openapi.json" in answer.json()["detail"]


def test_head_has_no_body(gpus: sa.Engine, ask: Ask) -> None:
    for one in api.RESOURCES:
        for kind in one.formats:
            answer = ask(one.path, "HEAD", Accept=api.MEDIA_TYPES[kind])
            assert (answer.status, answer.body) == (200, b"")


def test_without_a_database_all_but_the_description_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    show(f"sqlite:///{tmp_path / 'gpumon.db'}", monkeypatch)
    statuses = {one.path: ask(one.path).status for one in api.RESOURCES}
    assert statuses.pop("/api/v1/openapi.json") == 200
    assert set(statuses.values()) == {503}


def test_a_database_without_gpus_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask) -> None:
    monkeypatch.setattr(runtime, "settings", Settings)
    url = f"sqlite:///{tmp_path / 'gpumon.db'}"
    database.open_for_writing(url)
    show(url, monkeypatch)
    for one in api.RESOURCES:
        for kind in one.formats:
            answer = ask(one.path, Accept=api.MEDIA_TYPES[kind])
            assert answer.status == (404 if one.replaces else 200), answer.body


def test_gpus_have_every_metric_of_the_catalogue_with_its_unit(gpus: sa.Engine, ask: Ask) -> None:
    payload = ask("/api/v1/gpus?tz=Europe/Berlin").json()
    table = frames.gpu_table(gpus)
    assert [row["gpu_id"] for row in payload["gpus"]] == table["id"].tolist()
    for row, (_, known) in zip(payload["gpus"], table.iterrows(), strict=True):
        for metric in GPU_METRICS:
            assert (row[metric.key] is None) == math.isnan(known[metric.key])
            assert payload["units"].get(metric.key, "") == metric.unit
        assert (row["state"], row["sampling"], row["host"]) == ("ok", "interval", "demo")
        assert row["last_seen"].endswith("+01:00")
        assert row["driver_version"]
    assert [row["gpu_id"] for row in ask("/api/v1/gpus?gpu=2&gpu=id:2").json()["gpus"]] == [2]
    assert ask("/api/v1/gpus?host=elsewhere").json()["gpus"] == []


def test_a_gpu_that_does_not_answer_has_no_current_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    url = f"sqlite:///{tmp_path / 'gpumon.db'}"
    writer = Writer(database.open_for_writing(url), "here", "nvml", 4)
    now = pd.Timestamp.now("UTC").timestamp()
    writer.write(tick(now - 4), {})
    writer.write(tick(now, lost=frozenset({GPUS[1].uuid})), {})
    show(url, monkeypatch)
    rows = ask("/api/v1/gpus").json()["gpus"]
    assert [(row["state"], row["fresh"], row["temperature"]) for row in rows] == [
        ("ok", True, 60.0),
        ("lost", False, None),
        ("ok", True, 62.0),
    ]


def test_a_process_on_several_gpus_has_the_chosen_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    url = f"sqlite:///{tmp_path / 'gpumon.db'}"
    writer = Writer(database.open_for_writing(url), "here", "nvml", 4)
    writer.write(tick(100, {(0, 7): 10, (1, 7): 20, (2, 8): 30}), {pid: ProcessIdentity(pid) for pid in (7, 8)})
    show(url, monkeypatch)
    for query, rows in (
        ("", [(3, 30), (2, 20), (1, 10)]),
        ("gpu=2", [(2, 20)]),
        ("min_memory_mib=30&gpu=1", [(1, 10)]),
    ):
        found = ask(f"/api/v1/processes?{query}").json()["processes"]
        assert [(row["gpu_id"], row["memory_mib"]) for row in found] == rows


def test_history_is_that_of_the_store_with_gaps_as_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    url = f"sqlite:///{tmp_path / 'gpumon.db'}"
    writer = Writer(database.open_for_writing(url), "here", "nvml", 4)
    for second in (*range(1000, 1100, 4), *range(1500, 1600, 4)):
        writer.write(tick(second), {})
    engine = show(url, monkeypatch)
    payload = ask("/api/v1/history?from=1000&to=1600&metric=temperature&metric=power&points=1000").json()
    assert (payload["from_epoch"], payload["to_epoch"]) == (1000, 1600)
    assert payload["from"] == "1970-01-01T00:16:40+00:00"
    assert payload["units"] == {"temperature": "°C", "power": "W"}
    assert [gpu["gpu_id"] for gpu in payload["gpus"]] == [1, 2, 3]
    for gpu in payload["gpus"]:
        frame = history.metrics_history(engine, [gpu["gpu_id"]], ["temperature", "power"], 1000, 1600, 1000)
        assert gpu["epochs"] == frame["timestamp_epoch"].tolist()
        temperature = gpu["metrics"]["temperature"]
        known = frame["temperature"].notna().tolist()
        assert [value is not None for value in temperature["mean"]] == known
        assert known.count(False) == 1, "the pause"
        assert temperature["min"] == temperature["max"] == temperature["mean"]
        assert set(gpu["metrics"]["power"]["mean"]) == {None}, "not offered"
    table = ask("/api/v1/history?from=1000&to=1600&metric=temperature&points=1000&gpu=2&format=csv&tz=Asia/Tokyo")
    rows = list(csv.DictReader(io.StringIO(table.body.decode())))
    assert len(rows) == len(payload["gpus"][1]["epochs"])
    assert rows[0]["Time"] == "1970-01-01T09:16:40+09:00"
    assert [row["Temperature, mean (°C)"] for row in rows].count("") == 1


def test_of_a_long_history_one_gpu_is_read_at_a_time(
    gpus: sa.Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, alive = history.metrics_history, threading.Semaphore(0)
    together: list[int] = []

    def counted(engine: sa.Engine, ids: list[int], *more: Any) -> pd.DataFrame:
        together.append(len(ids))
        alive.release()
        return read(engine, ids, *more)

    monkeypatch.setattr(history, "metrics_history", counted)
    assert len(ask("/api/v1/history").json()["gpus"]) == len(together)
    assert set(together) == {1}


RANGES: list[tuple[str, tuple[int, int]]] = [
    ("", (5000 - 3600, 5000)),
    ("range=15m", (5000 - 900, 5000)),
    ("range=10", (4990, 5000)),
    ("range=1y", (0, 5000)),
    ("from=4000", (4000, 5000)),
    ("from=9000", (9000, 9000)),
    ("to=4000", (400, 4000)),
    ("from=1000&range=1m", (1000, 1060)),
    ("to=1000&range=1m", (940, 1000)),
    ("from=1000&to=2000", (1000, 2000)),
    ("from=1970-01-01T01:00&to=1970-01-01T01:10&tz=Europe/Berlin", (0, 600)),
    ("from=253402214399&range=1y", (253402214399, 253402214399)),
]


@pytest.fixture
def newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path / 'gpumon.db'}"
    Writer(database.open_for_writing(url), "here", "nvml", 4).write(tick(5000), {})
    show(url, monkeypatch)


@pytest.mark.parametrize(("query", "span"), RANGES)
def test_a_range_ends_at_the_newest_sample_unless_the_query_says_otherwise(
    newest: None, ask: Ask, query: str, span: tuple[int, int]
) -> None:
    payload = ask(f"/api/v1/history?{query}").json()
    assert (payload["from_epoch"], payload["to_epoch"]) == span


@pytest.mark.parametrize("path", ["/api/v1/history", "/api/v1/usage", "/api/v1/models"])
@pytest.mark.parametrize("zone", ["Pacific/Auckland", "Etc/GMT%2B12"])
def test_the_last_moment_can_be_written_in_every_zone(gpus: sa.Engine, ask: Ask, path: str, zone: str) -> None:
    assert ask(f"{path}?from=1&to={LAST_MOMENT}&tz={zone}").status == 200
    assert ask(f"{path}?from=1&to={LAST_MOMENT + 1}&tz={zone}").status == 400


def test_a_gpu_that_is_gone_has_its_history(database_url: str, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(database.open_for_writing(database_url), "here", "nvml", 4)
    for now in (NOW, NOW + 4):
        writer.write(tick(now), {})
    engine = show(database_url, monkeypatch)
    with database.open_for_writing(database_url).begin() as connection:
        connection.execute(sa.update(schema.gpus).where(schema.gpus.c.id == 1).values(state="gone"))
    listed = [gpu["gpu_id"] for gpu in ask("/api/v1/gpus").json()["gpus"]]
    assert 1 not in listed
    assert 1 not in [gpu["gpu_id"] for gpu in ask("/api/v1/history").json()["gpus"]]
    [gone] = ask(f"/api/v1/history?gpu=1&from={NOW}&to={NOW + 4}").json()["gpus"]
    assert (gone["gpu_id"], gone["epochs"]) == (1, [NOW, NOW + 4])
    assert 1 in frames.gpu_ids(engine)


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("range=0", "range"),
        ("range=", "range"),
        ("range=1month", "range"),
        ("range=-1h", "range"),
        ("range=99999999999y", "range"),
        ("range=1h&range=2h", "range"),
        ("from=1&to=2&range=1", "range"),
        ("from=2&to=1", "to"),
        ("metric=speed", "metric"),
        ("metric=utilization,power", "metric"),
        ("points=0", "points"),
        ("points=10001", "points"),
        ("gpu=", "gpu"),
        ("host=", "host"),
        ("limit=5", "limit"),
    ],
)
def test_what_no_history_can_be_made_of_is_refused_by_name(newest: None, ask: Ask, query: str, name: str) -> None:
    answer = ask(f"/api/v1/history?{query}")
    assert (answer.status, answer.json()["parameter"]) == (400, name)


@pytest.mark.parametrize("by", ["user", "container", "workload", "model", "process", "gpu", "job"])
def test_use_is_the_pages_ranking_in_pages_and_whole(gpus: sa.Engine, ask: Ask, by: Any) -> None:
    whole = ask(f"/api/v1/usage?by={by}&limit=1000").json()
    rows, query = [], f"by={by}&limit=2"
    while query:
        payload = ask(f"/api/v1/usage?{query}").json()
        rows += payload["usage"]
        query = f"by={by}&limit=2&cursor={payload['next']}" if payload["next"] else ""
    assert rows == whole["usage"]
    assert len(rows) == whole["total"]
    scope = Scope(whole["from_epoch"], whole["to_epoch"])
    ranking = usage.ranking(gpus, by, scope)
    names = usage.labels(gpus, by, ranking.loc[ranking["kind"] == "part", "key"].dropna().tolist())
    table = costs.ranked(ranking, names, "who", costs.Prices(None, None, "EUR"))
    assert [row["name"] for row in rows] == table["who"].tolist()
    for key, title in (("gpu_hours", "GPU-hours"), ("energy_kwh", "Energy"), ("energy_share_percent", "Share")):
        assert [row[key] for row in rows] == pytest.approx(table[title].tolist(), abs=1e-3)
    assert {row["cost"] for row in rows} == {None}
    assert whole["currency"] is None
    table = ask(f"/api/v1/usage?by={by}&format=parquet")
    assert pq.read_table(io.BytesIO(table.body))["Name"].to_pylist() == [row["name"] for row in rows]


def test_use_is_the_same_on_the_command_line(gpus: sa.Engine, ask: Ask) -> None:
    payload = ask("/api/v1/usage?by=process&limit=1000").json()
    environ = settings(Path(str(gpus.url.database)).parent, GPUMON_SOURCE="demo")
    words = (
        "usage",
        "--by",
        "process",
        "--since",
        str(payload["from_epoch"]),
        "--until",
        str(payload["to_epoch"]),
    )
    found = json.loads(gpumon(environ, *words, "--format", "json").stdout)
    assert found["usage"] == payload["usage"]
    assert (found["by"], found["currency"]) == (payload["by"], payload["currency"])
    served = ask(f"/api/v1/usage?by=process&from={payload['from_epoch']}&to={payload['to_epoch']}&format=csv")
    written = gpumon(environ, *words, "--format", "csv").stdout
    assert written.splitlines() == served.body.decode().splitlines()


def test_use_costs_what_the_settings_say(gpus: sa.Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "settings", lambda: Settings(price_per_kwh=2.0, currency="CHF"))
    payload = ask("/api/v1/usage").json()
    assert payload["currency"] == "CHF"
    for row in payload["usage"]:
        assert row["cost"] == pytest.approx(2 * row["energy_kwh"], abs=1e-5)
    assert b"Cost (CHF)" in ask("/api/v1/usage?format=csv").body


def test_model_sessions_are_the_pages_in_pages_and_whole(gpus: sa.Engine, ask: Ask) -> None:
    newest = int(frames.host_table(gpus)["last_seen"].max())
    known = model_sessions.loaded(gpus, Scope(newest - 7 * 86400, newest))
    assert len(known) > 1
    found, query = [], "limit=1"
    while query:
        payload = ask(f"/api/v1/models?{query}").json()
        assert payload["total"] == len(known)
        found += [row["session_id"] for row in payload["models"]]
        query = f"limit=1&cursor={payload['next']}" if payload["next"] else ""
    assert found == known["session_id"].tolist()
    table = ask("/api/v1/models?format=csv")
    assert table.headers["X-Total-Rows"] == str(len(known))
    assert len(list(csv.DictReader(io.StringIO(table.body.decode())))) == len(known)
    one = known["model"].iloc[0]
    payload = ask(f"/api/v1/models?model={one}").json()
    assert {row["model"] for row in payload["models"]} == {one}


def test_what_the_original_wrote_is_answered_under_its_keys(gpus: sa.Engine, ask: Ask) -> None:
    payload = ask("/api/v1/original/current?gpu=2").json()
    known = frames.gpu_table(gpus).set_index("id").loc[2]
    keys = ["timestamp", "temperature", "utilization", "memory", "power", "memory_total", "memory_percent"]
    assert list(payload) == [*keys, "current_processes"]
    assert payload["memory_total"] == known["memory_total_mib"]
    assert payload["memory_percent"] == round(100 * known["memory"] / known["memory_total_mib"], 2)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", payload["timestamp"])
    assert (payload["memory"], type(payload["memory"])) == (round(known["memory"]), int)
    process = ["pid", "process_name", "first_seen", "last_seen", "lifetime_seconds", "max_memory", "avg_memory"]
    process.append("sample_count")
    active = frames.active_processes(gpus)
    assert {row["pid"] for row in payload["current_processes"]} == set(active.loc[active["gpu_id"] == 2, "pid"])
    ended = ask("/api/v1/original/processes?gpu=2").json()
    on_it = processes.process_history(gpus, processes.ProcessFilter(gpu_ids=(2,)))
    assert {row["pid"] for row in ended} == set(on_it["pid"])
    assert [row["last_seen"] for row in ended] == sorted((row["last_seen"] for row in ended), reverse=True)
    percent = ["avg_memory_percent", "max_memory_percent"]
    assert all(list(row) == [*process, *percent] for row in ended)
    now = ["memory", "memory_percent", "process_start_time", "actual_lifetime_seconds", "lifetime_formatted"]
    assert all(list(row) == [*process, *now] for row in payload["current_processes"])


def test_the_originals_processes_have_their_part_of_the_memory_and_how_long_they_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    url = f"sqlite:///{tmp_path / 'gpumon.db'}"
    writer = Writer(database.open_for_writing(url), "here", "nvml", 4)
    noon = 1_774_785_600
    sizes = (24576, 8192, None)
    boards = tuple(GpuInfo(index, f"GPU-{index}", "Board", size) for index, size in enumerate(sizes))
    readings = tuple(GpuReading(board.uuid, {"memory": 12288}) for board in boards)
    held = [("GPU-0", 7, 6144), ("GPU-1", 7, 2048), ("GPU-0", 8, None), ("GPU-2", 9, 1000)]
    there = tuple(ProcessReading(uuid, pid, "C", memory) for uuid, pid, memory in held)
    who = {7: ProcessIdentity(7, "a", noon - 93784.5, "train"), 8: ProcessIdentity(8, "b"), 9: ProcessIdentity(9)}
    for second in (noon - 4, noon):
        writer.write(Snapshot(second, HostInfo("here"), boards, readings, there), who)
    writer.settle()
    show(url, monkeypatch)
    payload = ask("/api/v1/original/current?tz=Europe/Berlin").json()
    assert (payload["memory_total"], payload["memory_percent"]) == (24576, 50.0)
    seven, eight = sorted(payload["current_processes"], key=lambda row: row["pid"])
    assert (seven["memory"], seven["memory_percent"]) == (6144, 25.0)
    assert seven["process_start_time"] == "2026-03-28 10:56:55", "before summer time began"
    assert (seven["actual_lifetime_seconds"], seven["lifetime_formatted"]) == (93784, "1d 2h")
    assert (eight["memory"], eight["memory_percent"], eight["process_start_time"]) == (0, 0, None)
    assert (eight["actual_lifetime_seconds"], eight["lifetime_formatted"]) == (4, "4s")
    unknown = ask("/api/v1/original/current?gpu=3").json()
    assert (unknown["memory_total"], unknown["memory_percent"]) == (0, 0)
    # Its memory is that of both of its GPUs together, and so is what it is a part of.
    ended = {row["pid"]: row for row in ask("/api/v1/original/processes").json()}
    assert [ended[7][name] for name in ("max_memory", "avg_memory")] == [8192, 8192]
    assert [ended[7][name] for name in ("max_memory_percent", "avg_memory_percent")] == [25, 25]
    [nine] = ask("/api/v1/original/processes?gpu=3").json()
    assert (nine["pid"], nine["max_memory"], nine["max_memory_percent"]) == (9, 1000, 0)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0s"), (59, "59s"), (60, "1m 0s"), (3599, "59m 59s"), (3600, "1h 0m"), (90000, "1d 1h")],
)
def test_a_lifetime_is_said_as_the_original_says_it(seconds: int, said: str) -> None:
    assert original._lifetime(seconds) == said


def test_the_originals_history_has_every_tick_of_three_days_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    url = f"sqlite:///{tmp_path / 'gpumon.db'}"
    writer = Writer(database.open_for_writing(url), "here", "nvml", 4)
    newest = 1_774_800_000
    ticks = [newest - age for age in (3 * 86400 + 4, 3 * 86400, 20000, 14401, 14400, 14399, 8, 4, 0)]
    for second in ticks:
        writer.write(tick(second), {})
    show(url, monkeypatch)
    zone = "tz=Europe/Berlin"
    rows = ask(f"/api/v1/original/history?{zone}").json()
    assert [list(row) for row in rows] == [["timestamp", "temperature", "utilization", "memory", "power"]] * 8
    times = [pd.Timestamp(second, unit="s", tz="UTC").tz_convert(BERLIN) for second in ticks[1:]]
    assert [row["timestamp"] for row in rows] == [f"{time:%Y-%m-%d %H:%M:%S}" for time in times]
    assert {(row["temperature"], row["power"]) for row in rows} == {(60.0, 0.0)}, "0 where it is not offered"
    columns = ask(f"/api/v1/original/history?{zone}&shape=columns").json()
    assert list(columns) == ["timestamps", "temperatures", "utilizations", "memory", "power"]
    assert columns["timestamps"] == [f"{time:%m-%d %H:%M:%S}" for time in times]
    assert columns["memory"] == [1000.0] * 8


def test_where_ticks_are_forgotten_the_originals_history_has_each_mean_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    url = f"sqlite:///{tmp_path / 'gpumon.db'}"
    settings = Settings(interval=60, host_name="demo", retention_raw_days=0.05, retention_minute_days=0.2)
    fill(database.open_for_writing(url), settings, 2, 1, None, lambda *_: None, NOW)
    show(url, monkeypatch)
    rows = ask("/api/v1/original/history").json()
    times = [row["timestamp"] for row in rows]
    assert times == sorted(set(times))
    assert times[0] < "2026-11-23 04"
    assert times[-1] > "2026-11-24 23"
    spans = {20, 60, 300, 1200, 3600, 14400}
    steps = pd.to_datetime(pd.Series(times)).diff().dt.total_seconds().value_counts()
    assert set(steps[steps > 1].index) <= spans, "no two rows of one bucket"


def test_a_gpu_that_is_not_there_is_not_found_and_one_that_several_may_be_is_refused(
    gpus: sa.Engine, ask: Ask
) -> None:
    asked = [one.path for one in api.RESOURCES if any(each.name == "gpu" for each in one.parameters)]
    assert len(asked) == 9
    for path in asked:
        for name, status, says in (
            ("4711", 404, "There is no GPU 4711; there are demo/0 ("),
            ("elsewhere/0", 404, "There is no GPU elsewhere/0; "),
            ("GPU-", 400, "GPU GPU- means several: name one of demo/0 ("),
        ):
            answer = ask(f"{path}?gpu={name}")
            payload = answer.json()
            assert (answer.status, payload["parameter"]) == (status, "gpu")
            assert payload["detail"].startswith(says)


def test_every_route_takes_every_spelling_of_a_gpu(gpus: sa.Engine, ask: Ask) -> None:
    second = frames.gpu_table(gpus).set_index("id").loc[2]
    for name in ("2", "id:2", "index:1", "demo/1", second["uuid"], second["uuid"][:8], f"demo/{second['uuid']}"):
        assert [row["gpu_id"] for row in ask(f"/api/v1/gpus?gpu={name}").json()["gpus"]] == [2], name
        assert (
            ask(f"/api/v1/original/processes?gpu={name}").json() == ask("/api/v1/original/processes?gpu=2").json()
        )


def test_the_reference_is_that_of_the_routes() -> None:
    shown = api_reference.PLACE.search(PAGE)
    assert shown is not None
    due = api_reference.reference(dict.fromkeys(api.PATHS))
    blank = api_reference.ANSWERS.sub("", due)
    assert api_reference.ANSWERS.sub("", shown[0]) == blank, "run docs/api_reference.py"
    assert "/api/v1/openapi.json" in PAGE.split("<!-- routes -->")[0]


def same_shape(shown: Any, answered: Any) -> None:
    """What a shortened answer shows has the keys of the real one."""
    if isinstance(shown, dict):
        assert shown.keys() - {api_reference.MORE} <= answered.keys()
        for key in shown.keys() - {api_reference.MORE}:
            same_shape(shown[key], answered[key])
    elif isinstance(shown, list) and shown and isinstance(shown[0], dict):
        same_shape(shown[0], answered[0])


def test_every_example_of_the_page_is_answered_as_it_shows(
    serve: Callable[..., Server], fake: FakeNvml, tmp_path: Path
) -> None:
    data = tmp_path / "history"
    data.mkdir()
    filled(data)
    server = serve(None, GPUMON_RECORD="false")
    server.wait(lambda status, _: status != 0)
    port = server.port
    examples = re.findall(r"```sh\ncurl '([^']+)'\n```\n\n```json\n(.*?)\n```", PAGE, re.DOTALL)
    assert {address.split("?")[0].removeprefix(api_reference.SERVER) for address, _ in examples} == api.PATHS
    for address, text in examples:
        connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        connection.request("GET", address.removeprefix(api_reference.SERVER))
        answer = connection.getresponse()
        payload = json.load(answer)
        connection.close()
        shown = json.loads(text)
        assert answer.status == (shown.get("status", 200) if isinstance(shown, dict) else 200)
        same_shape(shown, payload)
        if answer.status != 200:
            assert shown == payload
