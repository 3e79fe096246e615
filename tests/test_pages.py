"""The pages' scripts on databases in every state, without a browser (Streamlit's AppTest)."""

from __future__ import annotations

import json
import pickle
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import streamlit as st
from conftest import PATIENCE_S, ROOT
from sqlalchemy import event
from streamlit.testing.v1 import AppTest
from ticks import GPUS, runs, tick, who

from gpumon_core.attribution import local
from gpumon_core.attribution.records import ProcessIdentity, Program
from gpumon_core.recording import runtime
from gpumon_core.recording.state import Problem
from gpumon_core.store import database
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuInfo, GpuReading, ProcessReading, Snapshot
from pages.components import charts, data, usage_views
from pages.components import now as live


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("GPUMON_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("GPUMON_SOURCE", "nvml")
    monkeypatch.setenv("GPUMON_HOST_NAME", "here")
    # What is written is read at once.
    monkeypatch.setattr(runtime, "ELSEWHERE_S", 0.0)
    runtime.settings.cache_clear()
    yield f"sqlite:///{tmp_path / 'gpumon.db'}"
    runtime.settings.cache_clear()


@pytest.fixture
def writer(url: str) -> Writer:
    return Writer(database.open_for_writing(url), "here", "nvml", 4)


def open_page(name: str | None = None, **query: str | list[str]) -> AppTest:
    app = AppTest.from_file(str(ROOT / "pages" / "main.py"), default_timeout=PATIENCE_S)
    app.context = {"timezone": "Europe/Berlin", "timezone_offset": -60}
    for key, value in query.items():
        app.query_params[key] = value
    app.run()
    if name is not None:
        app.switch_page(f"{name}.py").run()
    assert not app.exception
    return app


def texts(app: AppTest) -> str:
    return " ".join(
        str(element.value)
        for kind in (app.warning, app.error, app.info, app.caption, app.html)
        for element in kind
    )


# The overview is what opens without a name.
PAGES = (
    None,
    *sorted({path.stem for path in (ROOT / "pages").glob("*.py")} - {"__init__", "main", "overview"}),
)


def test_utc_is_shown_without_its_offset_and_other_zones_with_it(writer: Writer) -> None:
    writer.write(tick(time.time(), {(0, 7): 100}), who(7))
    app = open_page("processes")
    assert re.search(r"Times in Europe/Berlin, UTC\+0[12]:00\.", texts(app))
    for zone in ("UTC", "Etc/UTC", "no/zone"):
        app.context = {"timezone": zone, "timezone_offset": 0}
        assert "Times in UTC." in texts(app.run())
    app.context = {"timezone": "Africa/Abidjan", "timezone_offset": 0}
    assert "Times in Africa/Abidjan, UTC+00:00." in texts(app.run())


@pytest.mark.parametrize("name", PAGES)
def test_before_the_first_sample_a_page_says_that_it_is_coming(url: str, name: str | None) -> None:
    assert "on its way" in texts(open_page(name))


@pytest.mark.parametrize("name", PAGES)
def test_an_empty_database_is_no_error(writer: Writer, name: str | None) -> None:
    assert "on its way" in texts(open_page(name))


def test_a_stopped_recording_is_shown_as_past(writer: Writer) -> None:
    writer.write(tick(time.time() - 4000, {(0, 7): 1000}), who(7))
    shown = texts(open_page())
    assert "Sampling has stopped." in shown
    assert "1h 6m" in shown


def test_the_active_processes_are_listed_with_share_and_units(writer: Writer) -> None:
    now = int(time.time())
    writer.write(tick(now - 8, {(0, 7): 6144, (1, 8): 12288}), who(7, 8))
    writer.write(tick(now - 4, {(0, 7): 6144, (1, 8): 12288}), who(7, 8))
    app = open_page()
    frame = app.dataframe[0].value
    assert frame["PID"].tolist() == [8, 7]
    assert frame["Memory"].tolist() == [12.0, 6.0]
    assert frame["Share"].tolist() == [50.0, 25.0]
    assert [text.strip() for text in frame["Lifetime"]] == ["4s", "4s"]
    assert frame["First seen"].dt.tz.key == "Europe/Berlin"  # type: ignore[union-attr]
    assert "Sampling has stopped." not in texts(app)


def test_a_moment_of_another_year_has_its_year(writer: Writer) -> None:
    now = int(time.time())
    year = datetime.now(UTC).year
    writer.write(tick(now - 4, {(0, 7): 6144}), who(7))

    def first_seen(app: AppTest) -> str:
        return json.loads(app.dataframe[0].proto.columns)["First seen"]["type_config"]["format"]

    assert {first_seen(open_page()), first_seen(open_page("processes"))} == {"D MMM HH:mm:ss"}
    long_ago = int(datetime(year - 1, 6, 1, 12, tzinfo=UTC).timestamp())
    with writer._engine.begin() as connection:
        for table in ("gpu_processes", "process_gpus", "gpus"):
            connection.exec_driver_sql(f"UPDATE {table} SET first_seen = {long_ago}")
    writer.write(tick(now, {(0, 7): 6144}), who(7))
    st.cache_resource.clear()
    assert {first_seen(open_page()), first_seen(open_page("processes"))} == {"D MMM YYYY HH:mm:ss"}
    assert f"01 Jun {year - 1} 14:00:00" in texts(open_page("gpu"))
    hover = {figure["layout"]["xaxis"].get("hoverformat") for figure in plots(open_page("history", range="1y"))}
    assert hover == {"%a %d %b %Y %H:%M:%S"}


def test_workload_model_and_command_are_in_the_tables(writer: Writer) -> None:
    program = Program(
        command="vllm serve Qwen/Qwen3-8B",
        workload="vLLM",
        model="Qwen/Qwen3-8B",
        container_engine="docker",
        container_id="a1" * 32,
    )
    writer.write(tick(time.time() - 2, {(0, 7): 6144, (1, 8): 100}), runs(7, program) | who(8))
    columns = ["PID", "Workload", "Model", "Container", "Command"]
    wanted = [7, "vLLM", "Qwen/Qwen3-8B", "a1a1a1a1a1a1", "vllm serve Qwen/Qwen3-8B"]
    active = open_page().dataframe[0].value[columns]
    assert active.iloc[0].tolist() == wanted
    assert active.iloc[1].tolist() == [8, "–", "–", "–", "–"]
    for query in ({"workload": "vLLM"}, {"model": "Qwen/Qwen3-8B"}, {"q": "serve qwen"}):
        past = open_page("processes", **query).dataframe[0].value[columns]
        assert past.to_numpy().tolist() == [wanted]


def columns(app: AppTest) -> list[str]:
    """Those of the first table that are shown."""
    return list(app.dataframe[0].proto.column_order)


def test_columns_that_know_nothing_give_their_place_away(writer: Writer) -> None:
    now = int(time.time())
    writer.write(tick(now - 8, {(0, 7): None}), {7: ProcessIdentity(7)})
    active, past = open_page(), open_page("processes", columns="Notebook")
    always = ["GPU", "PID", "Name"]
    assert columns(active) == [*always, "Type", "Memory", "First seen", "Lifetime"], "whatever else is not known"
    assert columns(past) == [*always, "State", "First seen", "Lifetime", "Energy", "Notebook"], "it was asked for"
    writer.write(tick(now - 4, {(1, 8): 12288}), runs(8, Program(workload="vLLM")))
    for app in (active, past):
        app.run()
        assert "Workload" in columns(app)
        assert "Model" not in columns(app)


def test_a_column_that_was_there_does_not_go_at_a_refresh_or_a_search(writer: Writer) -> None:
    now = int(time.time())
    writer.write(tick(now - 8, {(0, 7): 6144, (1, 8): 100}), runs(8, Program(workload="vLLM")) | who(7))
    app = open_page()
    before = columns(app)
    assert "Workload" in before
    app.text_input[0].set_value("7").run()
    assert app.dataframe[0].value["PID"].tolist() == [7]
    assert columns(app) == before
    app.text_input[0].set_value("").run()
    writer.write(tick(now - 4, {(0, 7): 6144}), who(7))
    app.run()
    assert app.dataframe[0].value["PID"].tolist() == [7]
    assert columns(app) == before


def test_processes_that_cannot_be_looked_at_are_explained(writer: Writer) -> None:
    writer.write(tick(time.time() - 2, {(0, 7): 6144, (1, 8): 100}), {7: ProcessIdentity(7)} | who(8))
    assert "1 of these processes" in texts(open_page())
    assert "--pid=host" in texts(open_page())
    writer.write(tick(time.time(), {(1, 8): 100}), who(8))
    assert "--pid=host" not in texts(open_page())


@pytest.mark.parametrize(
    ("role", "source", "sees", "wsl", "hinted"),
    [
        ("recording", "nvml", False, False, True),
        ("recording", "nvml", True, False, False),
        ("recording", "nvml", False, True, False),
        ("recording", "demo", False, False, False),
        ("viewing", "nvml", False, False, False),
    ],
)
def test_a_container_without_the_hosts_pids_says_why_there_are_no_processes(
    writer: Writer, monkeypatch: pytest.MonkeyPatch, role: str, source: str, sees: bool, wsl: bool, hinted: bool
) -> None:
    # As a driver answers there: memory is held, but by no process.
    writer.write(tick(time.time() - 2, {}), {})
    state = replace(runtime.state(), role=role, source=source)
    monkeypatch.setattr(runtime, "state", lambda: state)
    monkeypatch.setattr(local, "sees_host_processes", lambda: sees)
    monkeypatch.setattr(local, "is_wsl", lambda: wsl)
    said = texts(open_page())
    assert ("--pid=host" in said) == hinted
    assert ("No process is using a GPU right now." in said) != hinted


def cards_html(app: AppTest) -> str:
    [html] = [str(element.value) for element in app.html if "gm-cards" in str(element.value)]
    return html


def test_a_consumer_that_fails_is_named_on_every_page(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    writer.write(tick(time.time()), {})
    failing = Problem("mqtt failed to take a tick: no such host; everything is recorded", "Look at the log.")
    state = replace(runtime.state(), role="recording", consumers=(failing,))
    monkeypatch.setattr(runtime, "state", lambda: state)
    [shown] = [element.value for element in open_page().warning]
    assert "mqtt failed to take a tick" in shown
    assert "Look at the log" in shown


def test_hostile_names_stay_text(writer: Writer) -> None:
    evil = "<img src=x onerror=alert(1)>\"'&"
    info = GpuInfo(0, "GPU-0", evil, 24576, 300.0)
    reading = GpuReading("GPU-0", {"temperature": 50.0})
    plain = tick(time.time())
    snapshot = Snapshot(time.time(), plain.host, (info,), (reading,), (ProcessReading("GPU-0", 7, "C", 100),))
    writer.write(snapshot, who(7))
    html = cards_html(open_page())
    assert "<img" not in html
    assert "&lt;img" in html


def test_no_process_is_said_in_words(writer: Writer) -> None:
    writer.write(tick(time.time()), {})
    assert "No process is using a GPU right now." in texts(open_page())


def test_a_search_finds_names_and_pids_and_nothing_among_nothing(writer: Writer) -> None:
    now = time.time()
    writer.write(tick(now - 4, {(0, 7): 6144, (1, 81): 12288}), who(7, 81))
    app = open_page()

    def found(text: str) -> list[int]:
        app.text_input(key="active_search").set_value(text).run()
        assert not app.exception
        assert not app.error
        return app.dataframe[0].value["PID"].tolist() if app.dataframe else []

    assert (found("8"), found(" TRAIN "), found("")) == ([81], [81, 7], [81, 7])
    assert found("nobody") == []
    assert "None of the 2 active processes matches." in texts(app)
    writer.write(tick(now), {})
    assert found("nobody") == []
    assert "No process is using a GPU right now." in texts(app)


def test_a_driver_without_gpus_is_said_in_words(writer: Writer) -> None:
    writer.write(tick(time.time(), gpus=()), {})
    assert "lists no GPU" in texts(open_page())


def plots(app: AppTest) -> list[dict[str, Any]]:
    """The figures that a page draws."""
    found = [json.loads(element.proto.json) for element in app.get("bidi_component")]
    return [json.loads(figure) for data in found for figure in data.get("figures", ())]


def headings(app: AppTest) -> list[str]:
    return [note["text"] for figure in plots(app) for note in figure["layout"].get("annotations", ())]


def test_history_offers_every_range_and_the_metrics_that_gpus_have(writer: Writer) -> None:
    writer.write(tick(time.time(), {(0, 7): 1000}), who(7))
    app = open_page("history")
    ranges = ["15m", "30m", "1h", "6h", "12h", "24h", "3d", "7d", "30d", "1y", "Custom"]
    assert app.sidebar.pills[0].options == ranges
    metrics = next(box for box in app.sidebar.multiselect if box.label == "Metrics")
    assert metrics.options == ["Temperature", "Memory used"]
    assert headings(app) == [
        "<b>Memory used (GiB)</b>",
        "<b>Temperature (°C)</b>",
        "<b>Processes</b>",
        "<b>Memory by process (GiB)</b>",
    ]
    metrics.set_value([]).run()
    assert headings(app) == ["<b>Processes</b>", "<b>Memory by process (GiB)</b>"]


def test_a_custom_stretch_is_drawn_from_its_beginning_to_its_end(writer: Writer) -> None:
    now = int(time.time())
    writer.write(tick(now), {})
    app = open_page("history", range="Custom", **{"from": "2026-11-23T08:00", "to": "2026-11-23T09:30"})
    begin, end = plots(app)[0]["layout"]["xaxis"]["range"]
    assert (begin, end) == (1_795_417_200_000, 1_795_422_600_000), "on the viewer's clock"
    app = open_page("history", range="Custom", **{"from": "2026-11-23T09:30", "to": "2026-11-23T08:00"})
    assert "must be later" in " ".join(error.value for error in app.sidebar.error)


def test_an_address_with_nonsense_in_it_opens_the_page_all_the_same(writer: Writer) -> None:
    writer.write(tick(time.time()), {})
    assert plots(open_page("history", range="9 years", gpu="GPU 77", metrics="nonsense"))
    assert "GPU 0" in texts(open_page("gpu", gpu="GPU 77", range="9 years", groups="nonsense"))
    for query in ({"range": "Custom", "from": "yesterday"}, {"memory": "-5"}, {"lifetime": "forever"}):
        assert open_page("processes", **query).dataframe or True


NOT_HERE = {
    ("gpu", "range", "5m"): "time range “5m”. Shown instead: 1h.",
    ("history", "metrics", "Noise"): "metric “Noise”. Shown instead: the usual metrics.",
    ("processes", "user", "mallory"): "user “mallory”. Shown instead: all users.",
    ("usage", "workload", "[x](http://y)"): "workload “[x](http://y)”. Shown instead: all workloads.",
    ("usage", "by", "Height"): "grouping “Height”. Shown instead: by user.",
    ("usage", "gpu", "GPU 0,GPU 7"): "GPU “GPU 7”. Shown instead: GPU 0.",
}


@pytest.mark.parametrize(("name", "key", "value"), NOT_HERE)
def test_a_link_says_what_is_not_there_and_what_is_shown_instead(
    writer: Writer, name: str, key: str, value: str
) -> None:
    for age in (8, 4):
        writer.write(tick(time.time() - age, {(0, 7): 6144}), who(7))
    app = open_page(name, **{key: value.split(",")})
    assert any(NOT_HERE[name, key, value] in unescaped(one.value) for one in app.warning)
    assert "[x](" not in texts(app)
    app.run()
    assert any("does not exist" in one.value for one in app.warning), "until the reader chooses"
    app.sidebar.pills[0].set_value("3d").run()
    assert not app.warning


def unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


@pytest.mark.parametrize(
    "query",
    [
        {"range": "Custom"},
        {"range": "custom"},
        {},
    ],
    ids=["as it is written", "in other case", "without a range"],
)
def test_a_stretch_in_a_link_is_shown_however_it_is_asked_for(writer: Writer, query: dict[str, str]) -> None:
    writer.write(tick(time.time()), {})
    app = open_page("history", **query, **{"from": "2026-11-23T08:00", "to": "2026-11-23T09:30"})
    assert plots(app)[0]["layout"]["xaxis"]["range"] == [1_795_417_200_000, 1_795_422_600_000]
    assert not app.warning
    app.sidebar.pills[0].set_value("6h").run()
    assert app.sidebar.pills[0].value == "6h"


def test_the_case_of_a_range_does_not_matter_and_a_wrong_time_is_reported(writer: Writer) -> None:
    writer.write(tick(time.time()), {})
    assert open_page("history", range="6H").sidebar.pills[0].value == "6h"
    assert open_page("processes", range="all").sidebar.pills[0].value == "All"
    assert "“From” “yesterday”" in texts(open_page("history", **{"from": "yesterday"}))


def test_the_gpu_page_shows_facts_metrics_and_processes(writer: Writer) -> None:
    writer.write(tick(time.time() - 4, {(1, 7): 1000}), who(7))
    writer.write(tick(time.time(), {(1, 7): 1000}), who(7))
    app = open_page("gpu", gpu="GPU 1")
    shown = texts(app)
    for text in ("Board 1", "24.0 GiB", "300 W", "61 °C"):
        assert text in shown
    assert "<b>Temperature (°C)</b>" in headings(app)
    assert "<b>Processes</b>" in headings(app)


def test_a_chosen_process_shows_its_story_and_stays_when_newer_ones_come(writer: Writer) -> None:
    program = Program(
        command="vllm serve Qwen/Qwen3-8B", workload="vLLM", category="inference", model="Qwen/Qwen3-8B"
    )
    now = int(time.time())
    for age in (12, 8, 4):
        writer.write(tick(now - age, {(0, 7): 6144, (1, 8): 100}), runs(7, program) | who(8))
    app = open_page("processes")
    # The first process of the ledger, as choosing its row does.
    app.query_params["process"] = "1"
    app.run()
    shown = texts(app)
    for text in ("Qwen/Qwen3-8B", "6.0 GiB", "vLLM"):
        assert text in shown
    assert app.code[0].value == "vllm serve Qwen/Qwen3-8B"
    assert "<b>Memory (GiB)</b>" in headings(app)
    assert app.dataframe[1].value["Model"].tolist() == ["Qwen/Qwen3-8B"]
    before = app.dataframe[0].value["PID"].tolist()
    writer.write(tick(now, {(0, 7): 6144, (1, 9): 100}), runs(7, program) | who(9))
    app.run()
    assert app.dataframe[0].value["PID"].tolist() == before, "rows stay where they are"
    del app.query_params["process"]
    app.run()
    assert 9 in app.dataframe[0].value["PID"].tolist()


def test_every_filter_of_processes_is_one(writer: Writer) -> None:
    now = int(time.time())
    program = Program(container_name="web", container_id="ab" * 32)
    writer.write(tick(now - 4000, {(0, 7): 100, (1, 8): 9000}), who(7) | runs(8, program))
    writer.write(tick(now, {(1, 8): 9000}, kind="G"), runs(8, program))
    for query, pids in (
        ({}, [8, 7]),
        ({"container": "web"}, [8]),
        ({"type": "Graphics"}, [8]),
        ({"state": "ended"}, [7]),
        ({"memory": "5"}, [8]),
        ({"lifetime": "1 hour"}, [8]),
        ({"gpu": "GPU 0"}, [7]),
    ):
        shown = open_page("processes", **query).dataframe[0].value["PID"].tolist()
        assert sorted(shown) == sorted(pids), query


def test_process_history_finds_by_name_user_and_time(writer: Writer) -> None:
    now = int(time.time())
    writer.write(tick(now - 7200, {(0, 7): 100}), who(7))
    writer.write(tick(now, {(1, 8): 100}), who(8))
    app = open_page("processes")
    assert app.dataframe[0].value["PID"].tolist() == [8, 7]
    app.sidebar.pills[0].set_value("1h").run()
    assert app.dataframe[0].value["PID"].tolist() == [8]
    app.sidebar.pills[0].set_value("All").run()
    app.sidebar.multiselect[0].set_value(["GPU 0"]).run()
    assert app.dataframe[0].value["PID"].tolist() == [7]
    app.sidebar.text_input[0].set_value("nothing").run()
    assert "No process matches these filters" in texts(app)


def test_sixteen_gpus_and_a_mig_parent_are_drawn(writer: Writer) -> None:
    gpus = tuple(GpuInfo(index, f"GPU-{index}", "Board", 24576, 300.0) for index in range(16))
    instance = GpuInfo(0, "MIG-1", "Board MIG 1g", 9856, parent_uuid="GPU-0", mig_index=1)
    writer.write(tick(time.time(), gpus=(*gpus, instance)), {})
    html = cards_html(open_page())
    assert html.count('role="listitem"') == 16
    assert "<b>MIG 1</b>" in html.split('role="listitem"')[1]


@pytest.mark.parametrize("name", PAGES)
def test_a_further_viewer_asks_the_database_for_nothing(
    writer: Writer, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    # A range that ends at the newest sample is the same for all who look between two of them.
    now = int(time.time())
    for age in (12, 8, 4):
        writer.write(tick(now - age, {(0, 7): 6144, (1, 8): 100}), who(7, 8))
    # Longer than two viewers take, however busy the machine is.
    monkeypatch.setattr(runtime, "ELSEWHERE_S", 300.0)
    monkeypatch.setenv("GPUMON_INTERVAL", "300")
    runtime.settings.cache_clear()
    asked: list[str] = []

    def note(_: object, __: object, statement: str, *___: object) -> None:
        asked.append(statement)

    event.listen(runtime.engine(), "before_cursor_execute", note)
    try:
        open_page(name)
        assert asked
        asked.clear()
        open_page(name)
        assert asked == []
    finally:
        event.remove(runtime.engine(), "before_cursor_execute", note)


def test_what_has_no_name_is_shown_beside_what_has_one(writer: Writer) -> None:
    nameless = GpuInfo(1, "GPU-1", None, 24576, 300.0)
    snapshot = replace(tick(time.time() - 2, {(0, 7): 6144, (1, 8): 100}), gpus=(GPUS[0], nameless))
    readings = tuple(reading for reading in snapshot.readings if reading.uuid != "GPU-2")
    writer.write(replace(snapshot, readings=readings), who(7) | {8: ProcessIdentity(8)})
    for name in PAGES:
        assert "nan" not in texts(open_page(name)).lower().split()
    assert "unknown model" in texts(open_page("gpu", gpu="GPU 1"))
    app = open_page("processes")
    app.query_params["process"] = "2"
    app.run()
    assert not app.exception
    assert [element.value for element in app.subheader] == ["PID 8"]


def test_gpus_that_stood_in_one_place_one_after_the_other_have_names_of_their_own(writer: Writer) -> None:
    now = int(time.time())
    replaced = GpuInfo(0, "GPU-new", "Board", 24576, 300.0)
    writer.write(tick(now - 8, {(0, 7): 100}), who(7))
    reading = GpuReading("GPU-new", {"temperature": 50.0, "utilization": 50.0})
    writer.write(Snapshot(now, tick(now).host, (replaced,), (reading,), ()), {})
    app = open_page("usage")
    assert not app.exception
    split = next(figure for figure in plots(app) if figure["layout"].get("barmode") == "stack")
    assert len(set(split["data"][0]["y"])) == len(split["data"][0]["y"]) == 4
    assert "GPU 0" in split["data"][0]["y"]
    assert "GPU 0 #1" in split["data"][0]["y"]


def test_a_machine_that_has_fallen_silent_is_stale_beside_one_that_has_not(writer: Writer, url: str) -> None:
    now = int(time.time())
    other = Writer(database.open_for_writing(url), "there", "nvml", 4)
    other.write(tick(now - 500), {})
    writer.write(tick(now), {})
    html = cards_html(open_page())
    cards = html.split('role="listitem"')[1:]
    stale = [card for card in cards if ">Stale</span>" in card]
    assert len(stale) == 3
    assert all("there · GPU" in card for card in stale)
    assert re.search(r"\b8m [2-5]\ds\b", stale[0])


def test_a_viewer_without_a_recorder_follows_whoever_records(
    writer: Writer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = int(time.time())
    writer.write(tick(now - 500), {})
    other = Writer(database.open_for_writing(url), "there", "nvml", 4)
    other.write(tick(now), {})
    assert runtime.check_health().is_fresh
    assert runtime.check_health().latest == now
    assert "Sampling has stopped." not in texts(open_page())


def test_a_database_that_is_away_is_said_so_and_tried_again(writer: Writer) -> None:
    writer.write(tick(time.time(), {(0, 7): 100}), who(7))
    writer.settle()
    open_page("processes")
    with writer._engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE programs RENAME TO mislaid")
    st.cache_resource.clear()
    app = open_page("processes")
    assert any("cannot be read right now" in error.value for error in app.error)
    with writer._engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE mislaid RENAME TO programs")
    app.run()
    assert not app.error


def test_the_trends_are_read_once_for_each_of_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def history(_: object, __: object, ___: object, start: int, end: int, ____: int) -> pd.DataFrame:
        asked.append((start, end))
        return pd.DataFrame({"gpu_id": []})

    monkeypatch.setattr(live, "metrics_history", history)
    for end in (1000, 1004, 1019, 1020):
        live._trends(("sqlite://", end // live.TREND_EVERY_S), (1, 2), 90, end, [])
    assert asked == [(100, 1000), (120, 1020)]


def test_nobody_changes_what_all_viewers_share(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are cached as they are, and not copied for each viewer."""
    got: dict[str, list[tuple[object, bytes]]] = {}

    def watched(name: str, function: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            result = function(*args, **named)
            got.setdefault(name, []).append((result, pickle.dumps(result)))
            return result

        return call

    for module in (live, charts, usage_views):
        for name, function in list(vars(module).items()):
            if callable(function) and hasattr(function, "clear"):
                monkeypatch.setattr(module, name, watched(name, function))
    cached = data._cached
    monkeypatch.setattr(data, "_cached", lambda query: watched(query.__qualname__, cached(query)))
    now = time.time()
    for ago in (8, 4, 0):
        writer.write(tick(now - ago, {(0, 7): 6144, (1, 8): 12288}), runs(7, Program(command="a b")) | who(8))
    for name in (*PAGES, *PAGES):
        open_page(name)
    open_page("processes", process="1")
    assert {"gpus", "active_processes", "process_history", "ranking", "ranked", "_lanes"} <= set(got)
    for name, results in got.items():
        for result, before in results:
            assert pickle.dumps(result) == before, name
