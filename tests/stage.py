"""A server on two fake GPUs with three real processes, and what its pages show in a browser."""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import PATIENCE_S, Server, eventually
from fake_nvml import FakeGpu, FakeNvml
from playwright.sync_api import Locator, Page, expect

GIB = 1 << 30


class Stage:
    """A server on two fake GPUs with three real processes."""

    def __init__(self, serve: Callable[..., Server], fake: FakeNvml) -> None:
        self.fake = fake
        self.gpus: list[FakeGpu] = [
            fake.add_gpu(name="NVIDIA RTX A6000", memory_total=48 * GIB, memory_used=12 * GIB, temperature=61),
            fake.add_gpu(
                name="NVIDIA GeForce RTX 4090", memory_total=24 * GIB, memory_used=23 * GIB, temperature=93
            ),
        ]
        self.gpus[0].gpu_utilization = 42
        self.processes = [subprocess.Popen([program, "600"]) for program in ("sleep", "sleep", "sleep")]
        for process, gpu, size in zip(self.processes, (0, 0, 1), (9, 3, 20), strict=True):
            self.gpus[gpu].add_process(process.pid, size * GIB)
        self.server = serve(fake).ready()
        self.url = self.server.url
        self.database = self.server.data_dir / "gpumon.db"

    def reset(self) -> None:
        """Let the driver say again what it said at first."""
        for gpu, utilization in zip(self.gpus, (42, 0), strict=True):
            gpu.gpu_utilization, gpu.clocks_event_reasons = utilization, 1

    def end(self) -> None:
        """End its processes; its server ends with the fixture that serves."""
        for process in self.processes:
            process.kill()
            process.wait()

    def ask(self, query: str) -> list[tuple[object, ...]]:
        connection = sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=PATIENCE_S)
        try:
            return connection.execute(query).fetchall()
        finally:
            connection.close()

    def tick(self, times: int = 3) -> None:
        """Wait until the recorder has written so many more ticks."""
        query = "SELECT count(DISTINCT timestamp_epoch) FROM gpu_metrics"
        before = int(str(self.ask(query)[0][0]))
        eventually(lambda: int(str(self.ask(query)[0][0])) >= before + times)


def tile(page: Page, gpu: int, metric: str) -> Locator:
    return page.locator(f".gm-card:nth-child({gpu + 1}) [data-metric={metric}]")


def column(page: Page, name: str, which: int = 0, rows: str = "tr") -> list[str]:
    """The texts of one column, in the order in which the grid shows its rows (or those that a selector picks)."""
    # The drawn grid is a canvas; this table beside it is what screen readers get.
    grid = page.locator("[role=grid]").nth(which)
    grid.wait_for(state="attached")
    return grid.evaluate(
        """(grid, [name, rows]) => {
            const heads = [...grid.querySelectorAll('[role=columnheader]')].map(head => head.textContent)
            const at = heads.findIndex(head => head.replace(/^[↑↓] */, '') === name)
            return [...grid.querySelectorAll(`tbody ${rows}`)].map(
                row => row.querySelectorAll('[role=gridcell]')[at]?.textContent)
        }""",
        [name, rows],
    )


def refreshed(page: Page, stage: Stage, times: int = 2) -> None:
    """Wait until a page of tiles has been drawn again so often: each time with another utilization."""
    for _ in range(times):
        gpu = stage.gpus[1]
        gpu.gpu_utilization = 10 + (int(gpu.gpu_utilization) + 1) % 80
        expect(tile(page, 1, "utilization")).to_contain_text(f"{gpu.gpu_utilization} %")


def chart(page: Page, place: int = 0) -> Locator:
    """One of the figures that stand under each other."""
    return page.locator(".gm-plots .js-plotly-plot[data-drawn]").nth(place)


def traces(page: Page, place: int = 0) -> list[dict[str, Any]]:
    """What Plotly has drawn: name, axis and values of every line, without the bands."""
    chart(page, place).wait_for()
    found: list[dict[str, Any]] = chart(page, place).evaluate(
        """plot => plot._fullData.filter(t => t.hoverinfo !== 'skip').map(
            t => ({name: t.name, axis: t.yaxis, x: [...t.x], y: [...t.y]}))"""
    )
    return found


@pytest.fixture(scope="session")
def shared_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One for all tests of this worker that leave it as it is, but for what `reset` sets back."""
    folder = tmp_path_factory.mktemp("stage")
    made = Stage(lambda driver: Server(folder / "history", driver), FakeNvml(folder / "nvml-state"))
    yield made
    made.end()
    made.server.stop()


@pytest.fixture
def stage(shared_stage: Stage) -> Stage:
    shared_stage.reset()
    return shared_stage


@pytest.fixture
def own_stage(serve: Callable[..., Server], fake: FakeNvml) -> Iterator[Stage]:
    """One for a test that breaks something, or counts on a history without a past."""
    made = Stage(serve, fake)
    yield made
    made.end()


def settled(page: Page) -> None:
    """Wait until a page has everything on it, and its script has nothing more to do."""
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    expect(page.get_by_test_id("stSkeleton")).to_have_count(0)
    quiet = 0
    while quiet < 5:
        app = page.get_by_test_id("stApp")
        expect(app).to_have_attribute("data-test-script-state", "notRunning")
        page.wait_for_timeout(100)
        quiet = quiet + 1 if app.get_attribute("data-test-script-state") == "notRunning" else 0


class Heard:
    """How much a page has heard from its server since it was opened. To be made before."""

    def __init__(self, page: Page) -> None:
        self.page, self.frames = page, 0
        page.on("websocket", lambda socket: socket.on("framereceived", self._count))

    def _count(self, _: object) -> None:
        self.frames += 1

    def more(self) -> None:
        """Wait until the page has been drawn anew."""
        before = self.frames
        eventually(lambda: (self.page.wait_for_timeout(50), self.frames > before)[1])
        settled(self.page)
