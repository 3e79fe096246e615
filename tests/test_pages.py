"""The pages' scripts on databases in every state, without a browser (Streamlit's AppTest)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from streamlit.testing.v1 import AppTest
from test_writer import runs, tick, who

from gpumon_core import runtime
from gpumon_core.attribution.records import ProcessIdentity, Program
from gpumon_core.store import database
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuInfo, GpuReading, ProcessReading, Snapshot


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("GPUMON_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("GPUMON_SOURCE", "nvml")
    monkeypatch.setenv("GPUMON_HOST_NAME", "here")
    runtime.settings.cache_clear()
    yield f"sqlite:///{tmp_path / 'gpumon.db'}"
    runtime.settings.cache_clear()


@pytest.fixture
def writer(url: str) -> Writer:
    return Writer(database.open_for_writing(url), "here", "nvml", 4)


def open_page(name: str | None = None, **query: str) -> AppTest:
    app = AppTest.from_file(str(ROOT / "pages" / "main.py"), default_timeout=30)
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


PAGES = (None, "history", "processes")


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


def test_workload_model_and_command_stand_in_the_tables(writer: Writer) -> None:
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


def test_processes_that_cannot_be_looked_at_are_explained(writer: Writer) -> None:
    writer.write(tick(time.time() - 2, {(0, 7): 6144, (1, 8): 100}), {7: ProcessIdentity(7)} | who(8))
    assert "1 of these processes" in texts(open_page())
    assert "--pid=host" in texts(open_page())
    writer.write(tick(time.time(), {(1, 8): 100}), who(8))
    assert "--pid=host" not in texts(open_page())


def test_hostile_names_stay_text(writer: Writer) -> None:
    evil = "<img src=x onerror=alert(1)>\"'&"
    info = GpuInfo(0, "GPU-0", evil, 24576, 300.0)
    reading = GpuReading("GPU-0", {"temperature": 50.0})
    plain = tick(time.time())
    snapshot = Snapshot(time.time(), plain.host, (info,), (reading,), (ProcessReading("GPU-0", 7, "C", 100),))
    writer.write(snapshot, who(7))
    [html] = [element.value for element in open_page().html]
    assert "<img" not in html
    assert "&lt;img" in html


def test_no_process_is_said_in_words(writer: Writer) -> None:
    writer.write(tick(time.time()), {})
    assert "No process is using a GPU right now." in texts(open_page())


def test_a_driver_without_gpus_is_said_in_words(writer: Writer) -> None:
    writer.write(tick(time.time(), gpus=()), {})
    assert "lists no GPU" in texts(open_page())


def test_history_offers_every_range_and_metric(writer: Writer) -> None:
    writer.write(tick(time.time()), {})
    app = open_page("history")
    assert app.sidebar.pills[0].options == ["15m", "30m", "1h", "6h", "12h", "24h", "3d", "7d", "30d", "1y"]
    assert app.sidebar.pills[1].options == ["Temperature", "Utilization", "Memory used", "Power"]
    app.sidebar.pills[1].set_value([]).run()
    assert "No metric is chosen." in texts(app)


def test_an_address_with_nonsense_in_it_opens_the_page_all_the_same(writer: Writer) -> None:
    writer.write(tick(time.time()), {})
    app = open_page("history", range="9 years", gpu="GPU 77", metrics="nonsense")
    assert app.get("plotly_chart")


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
    [html] = [element.value for element in open_page().html]
    assert html.count('role="listitem"') == 17
    assert "GPU 0 · MIG 1" in html
