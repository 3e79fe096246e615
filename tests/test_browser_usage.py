"""The usage page as a person uses it: a history that was written before, a real server, a real Chromium."""

from __future__ import annotations

import csv
import io
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa
from conftest import Server, eventually
from fake_nvml import FakeNvml
from playwright.sync_api import Locator, Page, expect
from stage import column

from gpumon_core import format as fmt
from gpumon_core.attribution.records import ProcessIdentity, Program
from gpumon_core.store import database
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuInfo, GpuReading, HostInfo, ProcessReading, Snapshot

BERLIN = ZoneInfo("Europe/Berlin")
HOST = HostInfo("testhost", "580.159.03", "13.0", "13.580.159.03")
GPUS = tuple(GpuInfo(index, f"GPU-{index}", "NVIDIA RTX A6000", 49152, 300.0) for index in range(2))
HOUR = 3600
STEP = 30
HOURS = 3
PRICE = 0.5
OLLAMA = Program(workload="Ollama", category="inference", model="qwen3:14b", command="ollama runner")
TRAINING = Program(workload="Training", category="training", model="vit", container_name="lab", job_id="4711")
NOTEBOOK = Program(workload="Jupyter", command="python -m ipykernel_launcher", notebook="sketch.ipynb")
PEOPLE = {
    7: ProcessIdentity(7, "boot:7", 1.0, "ollama", "ada", OLLAMA),
    8: ProcessIdentity(8, "boot:8", 1.0, "train.py", "grace", TRAINING),
    9: ProcessIdentity(9, "boot:9", 1.0, "=cmd|' /C calc'!A0", "linus", NOTEBOOK),
}
SWAPPED = replace(PEOPLE[7], program=replace(OLLAMA, model="gemma3:27b"))


@dataclass
class History:
    """Three hours and a bit up to now, in a database."""

    url: str
    start: int
    end: int

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        engine = sa.create_engine(self.url)
        try:
            with engine.connect() as connection:
                return [tuple(row) for row in connection.exec_driver_sql(query)]
        finally:
            engine.dispose()

    def used(self, key: str, more: str = "") -> dict[str, tuple[float, float]]:
        """GPU-hours and kWh by a column, as the database has them."""
        rows = self.ask(
            f"SELECT {key}, sum(h.busy_s) / 3600, sum(h.energy_j) / 3.6e6 FROM process_hours h "
            "JOIN gpu_processes p ON p.id = h.process_id LEFT JOIN programs g ON g.id = h.program_id "
            f"{more} GROUP BY 1"
        )
        return {name: (hours, kwh) for name, hours, kwh in rows}


def write(url: str) -> History:
    """A server that swaps its model, a training on two GPUs, and a notebook that only holds memory."""
    now = int(time.time())
    start = now - now % HOUR - HOURS * HOUR
    writer = Writer(database.open_for_writing(url), "testhost", "nvml", STEP)
    counters = [0.0, 0.0]
    batch = []
    for at in range(start, now, STEP):
        swapped = at >= start + HOUR
        rows = [(0, 7, 12000 if swapped else 9000, 30), (1, 9, 6000, 0)]
        if at < start + 2 * HOUR:
            rows += [(0, 8, 4000, 50), (1, 8, 4000, 80)]
        readings = []
        for gpu in range(2):
            load = sum(row[3] for row in rows if row[0] == gpu)
            counters[gpu] += (60 + 2 * load) * STEP
            values = {"utilization": float(load), "power": 60.0 + 2 * load, "energy": counters[gpu]}
            readings.append(GpuReading(f"GPU-{gpu}", {**values, "memory": 20000, "temperature": 50.0}))
        processes = tuple(
            ProcessReading(f"GPU-{gpu}", pid, "C", memory, sm, None, None, None) for gpu, pid, memory, sm in rows
        )
        identities = {7: SWAPPED if swapped else PEOPLE[7], 8: PEOPLE[8], 9: PEOPLE[9]}
        batch.append((Snapshot(at, HOST, GPUS, tuple(readings), processes), identities))
    writer.write_all(batch)
    writer.settle()
    return History(url, start, batch[-1][0].timestamp)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a history that these tests only read."""
    folder = tmp_path_factory.mktemp("usage") / "history"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def history(recorded: Path) -> History:
    return write(f"sqlite:///{recorded / 'gpumon.db'}")


def begin(folder: Path, driver: FakeNvml, **settings: str) -> Server:
    """A server that only shows what is recorded."""
    driver.add_gpu(name="NVIDIA RTX A6000")
    server = Server(folder, driver, GPUMON_RECORD="false", **settings)
    server.wait(lambda status, _: status != 0)
    return server


@pytest.fixture(scope="module")
def view(recorded: Path) -> Iterator[Callable[..., Server]]:
    """One server for each choice of settings, which all tests of this file use."""
    begun: dict[tuple[tuple[str, str], ...], Server] = {}

    def of(**settings: str) -> Server:
        chosen = tuple(sorted(settings.items()))
        if chosen not in begun:
            begun[chosen] = begin(recorded, FakeNvml(recorded.parent / f"nvml-state-{len(begun)}"), **settings)
        return begun[chosen]

    yield of
    for server in begun.values():
        server.stop()


@pytest.fixture
def view_of(tmp_path: Path, fake: FakeNvml) -> Iterator[Callable[..., Server]]:
    """A server on a history of the test's own."""
    begun: list[Server] = []

    def of(**settings: str) -> Server:
        begun.append(begin(tmp_path / "history", fake, **settings))
        return begun[-1]

    yield of
    for server in begun:
        server.stop()


def numbers(page: Page, name: str, which: int = 0) -> list[float]:
    """A column of numbers, as it is shown."""
    return [float(re.sub(r"[^0-9.eE-]", "", text)) for text in column(page, name, which)]


def metric(page: Page, label: str) -> Locator:
    return page.get_by_test_id("stMetric").filter(has_text=label).first.get_by_test_id("stMetricValue")


def table_of(page: Page, name: str) -> int:
    """Which of the page's tables has a column of that name."""
    heads = (
        "grids => grids.map(g => [...g.querySelectorAll('[role=columnheader]')].map(h => h.textContent.trim()))"
    )

    def places() -> list[int]:
        tables = page.locator("[role=grid]").evaluate_all(heads)
        # A table that is not there yet may come before another.
        if len(tables) < page.get_by_test_id("stDataFrame").count() or page.get_by_test_id("stSkeleton").count():
            return []
        return [number for number, titles in enumerate(tables) if name in titles]

    found = eventually(places)
    assert isinstance(found, list)
    return int(found[0])


def download(page: Page, role: Literal["link", "button"], which: int, path: Path) -> list[dict[str, str]]:
    with page.expect_download() as loading:
        page.get_by_role(role, name="CSV").nth(which).click()
    loading.value.save_as(path)
    return list(csv.DictReader(io.StringIO(path.read_text(), newline="")))


def test_the_page_says_what_the_database_says_of_everybody(
    page: Page, history: History, view: Callable[..., Server]
) -> None:
    page.goto(view().url + "/usage?range=6h")
    expect(page.get_by_role("heading", name="Usage", exact=True)).to_be_visible()
    used = history.used("p.username")
    assert set(used) == {"ada", "grace", "linus"}
    eventually(lambda: len(column(page, "User")) == 4)
    assert column(page, "User") == ["grace", "ada", "linus", "Idle GPUs"], "the busiest first"
    hours, kwh = numbers(page, "GPU-hours"), numbers(page, "Energy")
    for name, shown_hours, shown_kwh in zip(column(page, "User"), hours, kwh, strict=True):
        if name in used:
            assert (shown_hours, shown_kwh) == pytest.approx(used[name], rel=0.01, abs=0.001), name
    [(busy_h, energy)] = history.ask("SELECT sum(busy_s) / 3600, sum(energy_j) / 3.6e6 FROM gpu_usage")
    assert (sum(hours), sum(kwh)) == pytest.approx((busy_h, energy), rel=0.01)
    expect(metric(page, "GPU-hours")).to_have_text(f"{fmt.amount(busy_h, 1)} h")
    expect(metric(page, "Energy")).to_have_text(fmt.energy(3.6e6 * energy))
    assert sum(numbers(page, "Share of energy")) == pytest.approx(100, abs=0.5)
    expect(page.get_by_text("GPUMON_PRICE_PER_KWH")).to_be_visible()
    assert "Cost" not in page.locator("[role=grid]").first.inner_text()


def test_every_choice_is_in_the_address(page: Page, history: History, view: Callable[..., Server]) -> None:
    server = view()
    page.goto(server.url + "/usage?range=6h")
    for title, key, expected in (
        ("Model", "g.model", {"qwen3:14b", "gemma3:27b", "vit", "unknown", "Idle GPUs"}),
        ("Workload", "g.workload", {"Ollama", "Training", "Jupyter", "Idle GPUs"}),
        ("Container", "g.container_name", {"lab", "unknown", "Idle GPUs"}),
        ("Job", "g.job_id", {"4711", "unknown", "Idle GPUs"}),
        ("Process", "p.name || ' (' || p.pid || ')'", {"ollama (7)", "train.py (8)", "Idle GPUs"}),
        ("GPU", "'GPU ' || (h.gpu_id - 1)", {"GPU 0", "GPU 1", "Idle GPUs"}),
    ):
        page.get_by_role("radio", name=title, exact=True).click()
        eventually(lambda expected=expected, title=title: expected <= set(column(page, title)))
        eventually(lambda title=title: f"by={title}" in page.url)
        used = history.used(key)
        for name, hours in zip(column(page, title), numbers(page, "GPU-hours"), strict=True):
            if name in used:
                assert hours == pytest.approx(used[name][0], rel=0.01, abs=0.001), (title, name)
    page.get_by_role("radio", name="Energy", exact=True).click()
    eventually(lambda: "measure=Energy" in page.url)
    # Somebody else who opens the link sees the same.
    page.goto(page.url)
    eventually(lambda: {"GPU 0", "GPU 1"} <= set(column(page, "GPU")))
    expect(page.get_by_text("Energy per hour")).to_be_visible()


def test_every_choice_is_in_sight_on_a_phone(page: Page, history: History, view: Callable[..., Server]) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(view(GPUMON_PRICE_PER_KWH="0.5").url + "/usage?range=6h")
    for label, last in (("By", "GPU"), ("Drawn", "Cost")):
        group = page.get_by_test_id("stButtonGroup").filter(has_text=label)
        expect(group.get_by_role("radio", name=last, exact=True)).to_be_visible()
        inside = group.bounding_box()
        assert inside is not None
        for choice in group.get_by_role("radio").all():
            box = choice.bounding_box()
            assert box is not None
            assert inside["x"] <= box["x"] < box["x"] + box["width"] <= min(390, inside["x"] + inside["width"] + 1)


def test_filters_of_the_sidebar_leave_out_everything_else(
    page: Page, history: History, view: Callable[..., Server]
) -> None:
    server = view()
    page.goto(server.url + "/usage?range=6h&user=grace")
    assert table_of(page, "GPU-hours") == 0
    eventually(lambda: column(page, "User") == ["grace"])
    assert numbers(page, "GPU-hours") == pytest.approx([history.used("p.username")["grace"][0]], rel=0.01)
    page.goto(server.url + "/usage?range=6h&by=Model&model=gemma3%3A27b")
    assert table_of(page, "GPU-hours") == 0
    eventually(lambda: column(page, "Model") == ["gemma3:27b"])
    page.goto(server.url + "/usage?range=6h&gpu=GPU+1")
    eventually(lambda: set(column(page, "User")) == {"grace", "linus", "Idle GPUs"})
    on_second = history.used("p.username", "WHERE h.gpu_id = 2")
    shown = dict(zip(column(page, "User"), numbers(page, "GPU-hours"), strict=True))
    assert shown["grace"] == pytest.approx(on_second["grace"][0], rel=0.01)
    page.goto(server.url + "/usage?range=nonsense&by=Nobody&measure=Beauty&user=nobody&idle=-5")
    expect(page.get_by_role("heading", name="Usage", exact=True)).to_be_visible()
    eventually(lambda: column(page, "User"))


def test_the_csv_is_the_table(page: Page, history: History, view: Callable[..., Server], tmp_path: Path) -> None:
    page.goto(view(GPUMON_PRICE_PER_KWH="0.5", GPUMON_CURRENCY="CHF").url + "/usage?range=6h&by=Process")
    eventually(lambda: len(column(page, "Process")) == 4)
    rows = download(page, "link", 0, tmp_path / "usage.csv")
    evil = "'=cmd|' /C calc'!A0 (9)"
    assert [row["Name"] for row in rows] == [
        evil if name.startswith("=") else name for name in column(page, "Process")
    ]
    for title, shown in (("GPU-hours (h)", "GPU-hours"), ("Energy (kWh)", "Energy"), ("Cost (CHF)", "Cost")):
        values = numbers(page, shown)
        assert [float(row[title]) for row in rows] == pytest.approx(values, rel=0.01, abs=0.006), title
    [(seconds,)] = history.ask(
        "SELECT sum(h.seconds) FROM process_hours h JOIN gpu_processes p ON p.id = process_id WHERE pid = 8"
    )
    assert next(float(row["On GPU (s)"]) for row in rows if row["Name"] == "train.py (8)") == seconds


def test_cost_is_shown_with_its_currency(page: Page, history: History, view: Callable[..., Server]) -> None:
    server = view(GPUMON_PRICE_PER_KWH=str(PRICE), GPUMON_PRICE_PER_GPU_HOUR="2", GPUMON_CURRENCY="CHF")
    page.goto(server.url + "/usage?range=6h&measure=Cost")
    eventually(lambda: len(column(page, "User")) == 4)
    used = history.used("p.username")
    for name, cost in zip(column(page, "User"), numbers(page, "Cost"), strict=True):
        if name in used:
            assert cost == pytest.approx(2 * used[name][0] + PRICE * used[name][1], rel=0.01, abs=0.006), name
    [(busy_h, kwh)] = history.ask("SELECT sum(busy_s) / 3600, sum(energy_j) / 3.6e6 FROM gpu_usage")
    expect(metric(page, "Cost")).to_have_text(f"{2 * busy_h + PRICE * kwh:,.2f} CHF")
    expect(page.get_by_text("Cost per hour (CHF)")).to_be_visible()
    expect(page.get_by_text("to see what it cost")).to_have_count(0)


def test_who_holds_memory_for_nothing_is_listed(
    page: Page, history: History, view: Callable[..., Server], tmp_path: Path
) -> None:
    server = view()
    page.goto(server.url + "/usage?range=6h")
    which = table_of(page, "Idle since")
    eventually(lambda: column(page, "PID", which) == ["9"])
    assert column(page, "User", which) == ["linus"]
    assert numbers(page, "Memory held", which) == pytest.approx([6000 / 1024], rel=0.01)
    assert column(page, "State", which) == ["idle"]
    since = datetime.fromtimestamp(history.start, BERLIN)
    assert column(page, "Idle since", which)[0].startswith(since.strftime("%Y-%m-%d %H:%M")), (
        "in the viewer's time"
    )
    [row] = download(page, "button", 1, tmp_path / "idle.csv")
    assert row["PID"] == "9"
    assert row["Name"].startswith("'=cmd")
    assert datetime.fromisoformat(row["Idle since"]).timestamp() == history.start
    wasted_gib_h = 6000 / 1024 * (history.end - history.start) / HOUR
    assert float(row["Memory wasted (GiB h)"]) == pytest.approx(wasted_gib_h, rel=0.02)
    minutes = page.get_by_label("Idle for at least (minutes)")
    minutes.fill("1000")
    minutes.press("Enter")
    expect(page.get_by_text("No process has held GPU memory for this long")).to_be_visible()
    eventually(lambda: "idle=1000" in page.url)


def test_which_model_was_loaded_when_is_listed(
    page: Page, history: History, view: Callable[..., Server], tmp_path: Path
) -> None:
    page.goto(view().url + "/usage?range=6h")
    which = table_of(page, "Loaded")
    eventually(lambda: column(page, "Model", which) == ["gemma3:27b", "qwen3:14b"])
    stored = history.ask("SELECT first_seen, last_seen, max_memory FROM model_sessions ORDER BY first_seen DESC")
    loaded = [datetime.fromtimestamp(row[0], BERLIN).strftime("%Y-%m-%d %H:%M") for row in stored]
    assert [text[:16] for text in column(page, "Loaded", which)] == loaded
    assert numbers(page, "Maximum", which) == pytest.approx([row[2] / 1024 for row in stored], rel=0.01)
    rows = download(page, "link", 1, tmp_path / "models.csv")
    assert [row["Model"] for row in rows] == ["gemma3:27b", "qwen3:14b"]
    assert [row["Still loaded"] for row in rows] == ["True", "False"]
    assert [datetime.fromisoformat(row["Loaded"]).timestamp() for row in rows] == [row[0] for row in stored]


def test_the_charts_draw_what_the_tables_say(page: Page, history: History, view: Callable[..., Server]) -> None:
    page.goto(view().url + "/usage?range=6h")
    page.locator(".js-plotly-plot").nth(2).wait_for()
    drawn = page.locator(".js-plotly-plot").evaluate_all(
        "plots => plots.map(p => p._fullData.map(t => ({name: t.name, type: t.type, x: [...t.x].map(String),"
        " y: [...t.y], z: t.z})))"
    )
    areas, [week], split = drawn
    [(latest,)] = history.ask("SELECT max(timestamp_epoch) FROM process_hours")
    for area in areas:
        # The last value is drawn once more, where its hour ends.
        hours = area["y"][:-1]
        # The first tick speaks of the time before it.
        assert len(hours) == latest // HOUR - (history.start - 1) // HOUR + 1
        assert sum(hours) == pytest.approx(history.used("p.username")[area["name"]][0], abs=0.001)
    assert {area["name"] for area in areas} == {"ada", "grace", "linus"}
    assert week["type"] == "bar"
    assert [bar["name"] for bar in split] == ["busy", "held idle", "free", "not recorded"]
    times = history.ask(
        "SELECT sum(busy_s), sum(held_s), sum(seconds) FROM gpu_usage GROUP BY gpu_id ORDER BY gpu_id"
    )
    for gpu, (busy_s, held_s, seconds) in enumerate(times):
        assert float(split[0]["x"][gpu]) == pytest.approx(100 * busy_s / seconds, abs=0.011)
        assert float(split[1]["x"][gpu]) == pytest.approx(100 * held_s / seconds, abs=0.02)


def test_a_time_range_without_records_says_so(page: Page, view_of: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "history").mkdir()
    writer = Writer(
        database.open_for_writing(f"sqlite:///{tmp_path / 'history' / 'gpumon.db'}"), "testhost", "nvml", 4
    )
    writer.write(Snapshot(time.time(), HOST, GPUS, (GpuReading("GPU-0", {"utilization": 0.0}),)), {})
    page.goto(view_of().url + "/usage")
    expect(page.get_by_text("No process was on these GPUs in this time range")).to_be_visible()
    expect(page.get_by_text("No model server had a model loaded")).to_be_visible()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_the_page_is_the_same_on_postgresql(page: Page, view_of: Callable[..., Server], database_url: str) -> None:
    history = write(database_url)
    server = view_of(GPUMON_DATABASE_URL=database_url)
    page.goto(server.url + "/usage?range=6h&by=Model")
    eventually(lambda: {"qwen3:14b", "gemma3:27b", "vit"} <= set(column(page, "Model")))
    used = history.used("g.model")
    for name, hours in zip(column(page, "Model"), numbers(page, "GPU-hours"), strict=True):
        if name in used:
            assert hours == pytest.approx(used[name][0], rel=0.01, abs=0.001), name
    eventually(lambda: column(page, "Model", table_of(page, "Loaded")) == ["gemma3:27b", "qwen3:14b"])
    assert "Traceback" not in server.log.read_text()
