"""The pages as a person uses them: a real server, a real Chromium, and what it shows."""

from __future__ import annotations

import csv
import io
import os
import re
import sqlite3
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import stage as staging
from conftest import PATIENCE_S, Server, eventually
from fake_nvml import FakeNvml
from playwright.sync_api import Page, expect
from stage import Stage, chart, column, refreshed, settled, tile, traces

GIB = 1 << 30
BERLIN = ZoneInfo("Europe/Berlin")
# The fixtures of a stage.
shared_stage, stage, own_stage = staging.shared_stage, staging.stage, staging.own_stage


def test_the_overview_shows_what_the_driver_says(page: Page, stage: Stage) -> None:
    page.goto(stage.url)
    expect(page.get_by_role("heading", name="Overview")).to_be_visible()
    for fact in ("testhost", "580.159.03", "13.0"):
        expect(page.locator(".gm-host")).to_contain_text(fact)
    expect(page.locator(".gm-card")).to_have_count(2)
    expect(page.locator(".gm-card").first).to_contain_text("NVIDIA RTX A6000")
    expect(tile(page, 0, "utilization")).to_contain_text("42 %")
    expect(tile(page, 0, "memory")).to_contain_text("12.0 of 48.0 GiB")
    expect(tile(page, 0, "temperature")).to_contain_text("61 °C")
    expect(tile(page, 0, "power")).to_contain_text(re.compile(r"25 of 300 W"))
    expect(tile(page, 0, "fan_speed")).to_contain_text("30 %")
    expect(tile(page, 0, "sm_clock")).to_contain_text("210 MHz")
    expect(tile(page, 0, "memory_clock")).to_contain_text("405 MHz")


def test_levels_have_a_colour_a_sign_and_a_word(page: Page, stage: Stage) -> None:
    page.goto(stage.url)
    hot = tile(page, 1, "temperature")
    expect(hot).to_have_class(re.compile("gm-critical"))
    expect(hot.locator(".gm-sign")).to_have_attribute("aria-label", "critical")
    expect(tile(page, 1, "memory")).to_have_class(re.compile("gm-warning"))
    expect(tile(page, 0, "temperature")).to_have_class(re.compile("gm-calm"))
    colours = [
        tile(page, gpu, "temperature").locator(".gm-value").evaluate("e => getComputedStyle(e).color")
        for gpu in (0, 1)
    ]
    assert colours[0] != colours[1]


def test_live_values_change_by_themselves_and_draw_a_trend(page: Page, own_stage: Stage) -> None:
    page.goto(own_stage.url)
    expect(tile(page, 0, "utilization")).to_contain_text("42 %")
    own_stage.gpus[0].gpu_utilization = 77
    expect(tile(page, 0, "utilization")).to_contain_text("77 %")
    expect(tile(page, 0, "utilization").locator(".gm-spark")).to_have_attribute(
        "aria-label", re.compile("42 % to 77 %")
    )
    assert (
        tile(page, 0, "utilization").locator(".gm-spark").evaluate("e => getComputedStyle(e).maskImage") != "none"
    )


def test_the_processes_are_those_of_the_database(page: Page, stage: Stage) -> None:
    page.goto(stage.url)
    pids = {str(process.pid) for process in stage.processes}
    eventually(lambda: set(column(page, "PID")) == pids)
    assert set(column(page, "Name")) == {"sleep"}
    assert column(page, "Memory") == ["20", "9", "3"], "most memory first, in GiB"
    assert column(page, "GPU") == ["1", "0", "0"]
    assert set(column(page, "Type")) == {"C"}
    eventually(lambda: all(re.fullmatch(r"(\d+m\s+)?\d+s", text.strip()) for text in column(page, "Lifetime")))
    seen = stage.ask("SELECT first_seen FROM gpu_processes ORDER BY max_memory DESC")
    shown = [datetime.fromtimestamp(int(str(epoch)), BERLIN).isoformat(" ") for (epoch,) in seen]
    assert column(page, "First seen") == shown, "in the viewer's time zone"


def test_search_finds_by_name_and_pid_and_survives_refreshes(page: Page, stage: Stage) -> None:
    page.goto(stage.url)
    eventually(lambda: len(column(page, "PID")) == 3)
    wanted = str(stage.processes[1].pid)
    search = page.get_by_placeholder("Name or PID")
    search.fill(wanted)
    eventually(lambda: column(page, "PID") == [wanted])
    refreshed(page, stage)
    eventually(lambda: column(page, "PID") == [wanted])
    expect(search).to_have_value(wanted)
    search.fill("nothing like this")
    expect(page.get_by_text("None of the 3 active processes matches")).to_be_visible()
    search.fill("SLEEP")
    eventually(lambda: len(column(page, "PID")) == 3)


def test_the_readers_sort_survives_refreshes(page: Page, stage: Stage) -> None:
    page.goto(stage.url)
    eventually(lambda: column(page, "Memory") == ["20", "9", "3"])
    canvas = page.get_by_test_id("data-grid-canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    # The second column is the PID, and 100 px from the left is its name, left of its menu. Most memory first is
    # not its order.
    page.mouse.click(box["x"] + 100, box["y"] + 15)
    pids = sorted(str(process.pid) for process in stage.processes)
    eventually(lambda: column(page, "PID") in (pids, pids[::-1]))
    order = column(page, "PID")
    refreshed(page, stage)
    # Within a refresh the table is empty for a moment.
    eventually(lambda: column(page, "PID") == order)


def test_the_age_of_the_newest_sample_turns_into_a_warning(page: Page, own_stage: Stage) -> None:
    page.goto(own_stage.url)
    status = page.get_by_role("status").filter(has_text="ewest sample")
    expect(status).to_have_text(re.compile(r"Newest sample \ds ago"))
    own_stage.fake.driver_loaded = False
    expect(page.get_by_text(re.compile(r"No new sample for \d+s"))).to_be_visible()
    expect(page.get_by_text("Sampling has stopped.")).to_be_visible()
    own_stage.fake.driver_loaded = True
    expect(page.get_by_text("Sampling has stopped.")).to_be_hidden()
    expect(page.get_by_text(re.compile(r"Newest sample \ds ago"))).to_be_visible()


def test_the_age_is_true_even_when_the_server_has_died(page: Page, own_stage: Stage) -> None:
    page.goto(own_stage.url)
    expect(page.get_by_text(re.compile(r"Newest sample \ds ago"))).to_be_visible()
    own_stage.server.process.kill()
    expect(page.get_by_text(re.compile(r"No new sample for \d+s"))).to_be_visible()


def test_a_lost_gpu_is_shown_as_lost(page: Page, own_stage: Stage) -> None:
    page.goto(own_stage.url)
    expect(page.locator(".gm-card")).to_have_count(2)
    own_stage.gpus[1].lost = True
    expect(page.locator(".gm-card.lost")).to_contain_text("No answer")
    expect(tile(page, 0, "temperature")).to_contain_text("61 °C")


def test_the_history_draws_every_gpu_and_metric_in_local_time(page: Page, own_stage: Stage) -> None:
    eventually(lambda: own_stage.ask("SELECT count(*) >= 8 FROM gpu_metrics") == [(1,)])
    page.goto(own_stage.url + "/history?range=15m")
    drawn = traces(page)
    assert [trace["name"] for trace in drawn] == ["GPU 0", "GPU 1"] * 4
    assert {trace["axis"] for trace in drawn} == {"y", "y2", "y3", "y4"}
    stored = own_stage.ask("SELECT timestamp_epoch, utilization FROM gpu_metrics WHERE gpu_id = 1 ORDER BY 1")
    first = datetime.fromtimestamp(int(str(stored[0][0])), BERLIN)
    # The labels of the axis, not what was sent.
    shown = chart(page).evaluate("plot => plot._fullLayout.xaxis.c2d(plot.calcdata[0][0].x)")
    assert shown[:19] == first.strftime("%Y-%m-%d %H:%M:%S")[: len(shown[:19])]
    assert drawn[0]["y"][:3] == [row[1] for row in stored[:3]]
    for text in ("Temperature (°C)", "Utilization (%)", "Memory used (GiB)", "Power (W)"):
        expect(page.locator(".gm-heading").get_by_text(text, exact=True)).to_be_visible()


def test_range_gpus_and_metrics_can_be_chosen_and_are_in_the_address(page: Page, stage: Stage) -> None:
    page.goto(stage.url + "/history")
    assert len(traces(page)) == 8
    page.get_by_role("radio", name="6h").click()
    expect(page).to_have_url(re.compile("range=6h"))
    span = "plot => { const [a, b] = plot._fullLayout.xaxis.range; return (new Date(b) - new Date(a)) / 3600000 }"
    eventually(lambda: chart(page).evaluate(span) == 6)
    page.get_by_role("button", name="Remove Temperature").click()
    eventually(lambda: len(traces(page)) == 6)
    page.goto(page.url)
    eventually(lambda: len(traces(page)) == 6)
    page.goto(stage.url + "/history?range=30m&gpu=GPU+1")
    eventually(lambda: {trace["name"] for trace in traces(page)} == {"GPU 1"})


def test_a_gap_in_the_recording_is_a_gap_in_the_line(page: Page, own_stage: Stage) -> None:
    eventually(lambda: own_stage.ask("SELECT count(DISTINCT timestamp_epoch) >= 6 FROM gpu_metrics") == [(1,)])
    own_stage.fake.driver_loaded = False
    # Longer than the pause that is still drawn as a line.
    own_stage.server.wait(lambda _, answer: (answer.get("age_seconds") or 0) >= 8)
    own_stage.fake.driver_loaded = True
    own_stage.tick()
    page.goto(own_stage.url + "/history?range=15m")
    values = traces(page)[0]["y"]
    broken = [at for at, value in enumerate(values) if value is None or value != value]  # noqa: PLR0124 - NaN
    assert broken
    assert 0 < broken[0] < len(values) - 1
    assert not any(chart(page).evaluate("plot => plot._fullData.map(t => t.connectgaps)"))


def test_the_csv_holds_exactly_what_the_filters_show(page: Page, own_stage: Stage, tmp_path: Path) -> None:
    own_stage.processes[2].kill()
    own_stage.processes[2].wait()
    own_stage.fake.remove_process(own_stage.processes[2].pid)
    page.goto(own_stage.url + "/processes")
    eventually(lambda: len(column(page, "PID")) == 3)
    for search, expected in (("", 3), (str(own_stage.processes[0].pid), 1)):
        page.get_by_placeholder("train.py or 4711").fill(search)
        eventually(lambda expected=expected: len(column(page, "PID")) == expected)
        with page.expect_download() as download:
            page.get_by_role("link", name="↓ CSV").click()
        path = tmp_path / "download.csv"
        download.value.save_as(path)
        read = list(csv.DictReader(io.StringIO(path.read_text())))
        assert [row["PID"] for row in read] == column(page, "PID")
        stored = {
            str(pid): (name, first, maximum)
            for pid, name, first, maximum in own_stage.ask(
                "SELECT pid, name, first_seen, max_memory FROM gpu_processes"
            )
        }
        for row in read:
            name, first, maximum = stored[row["PID"]]
            assert row["Name"] == name
            assert int(row["Maximum memory (MiB)"]) == maximum
            assert datetime.fromisoformat(row["First seen"]).timestamp() == first
            assert row["First seen"].endswith(("+01:00", "+02:00"))
    assert page.url.endswith(f"q={own_stage.processes[0].pid}"), "the filters are in the address"


def test_process_history_filters_by_gpu_and_has_ended_processes(page: Page, own_stage: Stage) -> None:
    gone = own_stage.processes[2].pid
    own_stage.fake.remove_process(gone)
    page.goto(own_stage.url + "/processes?gpu=GPU+1")
    eventually(lambda: column(page, "PID") == [str(gone)])
    eventually(lambda: (page.reload(), column(page, "State") == ["ended"])[1])
    page.goto(own_stage.url + "/processes?q=no-such-program")
    expect(page.get_by_text("No process matches these filters")).to_be_visible()


def test_every_page_opens_by_its_own_address_and_from_the_menu(page: Page, stage: Stage) -> None:
    for address, title in (
        ("/", "Overview"),
        ("/gpu", "GPU"),
        ("/history", "History"),
        ("/processes", "Processes"),
        ("/usage", "Usage"),
        ("/system", "System"),
    ):
        page.goto(stage.url + address)
        expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()
    page.get_by_role("link", name="Overview").click()
    expect(page.get_by_role("heading", name="Overview")).to_be_visible()
    expect(page).to_have_url(re.compile(r"/$"))


def test_nothing_is_fetched_from_anywhere_else(page: Page, stage: Stage) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for address in ("/", "/gpu", "/history", "/processes", "/usage", "/system"):
        page.goto(stage.url + address)
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        settled(page)
    foreign = [url for url in asked if not url.startswith((stage.url, "data:", "blob:", "ws://127.0.0.1"))]
    assert asked
    assert foreign == []


def test_simulated_gpus_are_said_to_be_simulated_on_every_page(page: Page, demo: Server) -> None:
    for address in ("/", "/gpu", "/history", "/processes", "/usage", "/system"):
        page.goto(demo.url + address)
        expect(page.get_by_text("Simulated GPUs.")).to_be_visible()


def test_an_error_in_a_page_is_a_sentence_with_a_reference_that_the_log_repeats(
    page: Page, own_stage: Stage
) -> None:
    page.goto(own_stage.url)
    expect(page.locator(".gm-card")).to_have_count(2)
    connection = sqlite3.connect(own_stage.database, timeout=PATIENCE_S)
    # Something that pages read and ticks do not write.
    connection.execute("ALTER TABLE gpus RENAME COLUMN pci_bus_id TO mislaid")
    connection.commit()
    connection.close()
    failure = page.get_by_text("could not be drawn")
    expect(failure.first).to_be_visible()
    reference = re.search(r"reference (\w+)", failure.first.inner_text())
    assert reference is not None
    assert reference.group(1) in own_stage.server.log.read_text()
    expect(page.get_by_text("Traceback")).to_have_count(0)


def test_an_open_page_follows_the_driver_from_missing_to_simulated_to_real(
    page: Page, serve: Callable[..., Server], fake: FakeNvml
) -> None:
    fake.driver_loaded = False
    fake.add_gpu(name="NVIDIA RTX A6000")
    waiting = serve(fake, GPUMON_SOURCE="nvml")
    waiting.wait(lambda status, _: status == 503)
    page.goto(waiting.url)
    expect(page.get_by_text("No NVIDIA driver.")).to_be_visible()
    expect(page.get_by_text("Nothing has been recorded here yet.")).to_be_visible()
    fake.driver_loaded = True
    expect(page.locator(".gm-card")).to_contain_text("NVIDIA RTX A6000")
    expect(page.get_by_text("No NVIDIA driver.")).to_be_hidden()
    waiting.stop()
    fake.driver_loaded = False
    simulating = serve(fake, GPUMON_SOURCE="auto").ready()
    page.goto(simulating.url)
    expect(page.get_by_text("Simulated GPUs.")).to_be_visible()
    fake.driver_loaded = True
    expect(page.get_by_text("Simulated GPUs.")).to_be_hidden()
    expect(page.locator(".gm-card")).to_have_count(1)
    expect(page.locator(".gm-card")).to_contain_text("NVIDIA RTX A6000")


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_every_page_works_on_postgresql(
    page: Page, serve: Callable[..., Server], fake: FakeNvml, database_url: str
) -> None:
    gpu = fake.add_gpu(name="NVIDIA RTX A6000", memory_total=48 * GIB, memory_used=12 * GIB, temperature=61)
    gpu.add_process(os.getpid(), 9 * GIB)
    server = serve(fake, GPUMON_DATABASE_URL=database_url).ready()
    server.wait(lambda _, answer: answer["recorder"]["ticks"] >= 4)
    page.goto(server.url)
    expect(page.locator(".gm-card")).to_contain_text("61")
    eventually(lambda: column(page, "Memory") == ["9"])
    page.goto(server.url + "/history")
    assert traces(page)
    page.goto(server.url + "/gpu")
    assert traces(page)
    page.goto(server.url + "/usage")
    expect(page.get_by_role("heading", name="Idle holders")).to_be_visible()
    page.goto(server.url + "/processes")
    expect(page.get_by_text("processes, newest first")).to_contain_text("1")
    page.goto(server.url + "/system")
    expect(page.get_by_role("heading", name="Settings in force")).to_be_visible()
    expect(page.get_by_text("postgresql+psycopg://").first).to_be_visible()
    assert "Traceback" not in server.log.read_text()


def test_the_system_page_shows_the_state_of_the_recorder(page: Page, stage: Stage) -> None:
    page.goto(stage.url + "/system")
    ticks = page.get_by_test_id("stMetric").filter(has_text="Ticks")
    expect(ticks.get_by_test_id("stMetricValue")).not_to_have_text("0")
    before = ticks.get_by_test_id("stMetricValue").inner_text()
    expect(ticks.get_by_test_id("stMetricValue")).not_to_have_text(before)
    for name in ("Failed", "Waiting", "Dropped"):
        metric = page.get_by_test_id("stMetric").filter(has_text=name)
        expect(metric.get_by_test_id("stMetricValue")).to_have_text("0")
    # On a busy machine that may be more than none.
    skipped = page.get_by_test_id("stMetric").filter(has_text="Skipped").get_by_test_id("stMetricValue")
    eventually(lambda: skipped.inner_text() == str(stage.server.health()[1]["recorder"]["skipped"]))

    def is_counted() -> bool:
        # A counter that does not move is not believed, and on a busy machine it is asked less often.
        for gpu in stage.gpus:
            gpu.energy_mj += 1000
        return column(page, "Energy") == ["counted by the driver"] * 2

    eventually(is_counted)
    assert column(page, "Utilization") == ["point: the value at the moment of the tick"] * 2
    assert column(page, "Resolution", 1)[:2] == ["every tick", "20 seconds"]
    assert "GPUMON_RETENTION_HOUR_DAYS" in column(page, "Setting", 3)
