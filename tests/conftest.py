"""What the tests share: the fake driver, real servers on free ports, and a real browser."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from fake_nvml import FakeNvml, environment
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "docs")]

import postgres as postgresql
from rig import CHROMIUM, OPTIONS, free_port

from gpumon_core.telemetry import cost

# How long a test waits for what it expects. Long, so that only what never happens fails, whatever the machine.
PATIENCE_S = 300.0
expect.set_options(timeout=1000 * PATIENCE_S)


Found = TypeVar("Found")


def eventually(condition: Callable[[], Found], seconds: float = PATIENCE_S, every_s: float = 0.05) -> Found:
    """The first answer of `condition` that is true of itself; fails where none is."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{condition} stayed {found!r} for {seconds:g} s"
        time.sleep(every_s)
    return found


def run_apart(task: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine function on a thread of its own: this one may have the browser's loop running."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: asyncio.run(task())).result()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = len(terminalreporter.stats.get("skipped", []))
    if skipped and os.environ.get("CI") == "true":
        terminalreporter.section("skipped under CI", sep="=")
        terminalreporter.line(f"CI=true allows no skipped test, and {skipped} were skipped: see above.")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") == "true" and exitstatus == 0 and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


# The files that take longest, which begin first: no worker is left with one of them at the end.
LONGEST = (
    *("test_browser_pages", "test_soak", "test_recorder", "test_server_limits", "test_browser", "test_ship"),
    *("test_browser_usage", "test_real_processes", "test_document", "test_import", "test_import_command"),
    *("test_every_call", "test_server", "test_lost_files", "test_postgres_silence", "test_postgres_start"),
    *("test_hostile_files", "test_driver_fuzz", "test_clockwork", "test_nvml_errors", "test_pages"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("GPUMON_", "STREAMLIT_")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _calls_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of the driver that takes long, since the machine is busy, would be asked less often (cost.py)."""
    monkeypatch.setattr(cost, "time", SimpleNamespace(thread_time=lambda: 0.0))


@pytest.fixture
def fake(tmp_path: Path) -> FakeNvml:
    """A fake driver without GPUs; it is what a server started with `serve` sees."""
    return FakeNvml(tmp_path / "nvml-state")


class Server:
    """A real `streamlit run app.py` of its own, with its own data folder and driver."""

    def __init__(self, data_dir: Path, driver: FakeNvml | None, **settings: str) -> None:
        self.data_dir = data_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = data_dir.parent / f"server-{self.port}.log"
        environ = {
            name: value for name, value in os.environ.items() if not name.startswith(("GPUMON_", "STREAMLIT_"))
        }
        environ |= {"GPUMON_DATA_DIR": str(data_dir), "GPUMON_HOST_NAME": "testhost", "GPUMON_INTERVAL": "1"}
        environ |= environment(driver) if driver is not None else {"GPUMON_SOURCE": "demo"}
        environ |= settings
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(self.port)],
                cwd=ROOT,
                env=environ,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status and answer of /healthz; 0 while nobody answers."""
        try:
            with urllib.request.urlopen(self.url + "/healthz", timeout=PATIENCE_S) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)
        except (OSError, http.client.HTTPException):
            return 0, {}

    def wait(
        self, condition: Callable[[int, dict[str, Any]], bool], seconds: float = PATIENCE_S
    ) -> dict[str, Any]:
        """The first answer of /healthz that satisfies `condition`; where nobody answers there is none."""
        deadline = time.monotonic() + seconds
        while True:
            status, answer = self.health()
            if status and condition(status, answer):
                return answer
            if time.monotonic() > deadline or self.process.poll() is not None:
                pytest.fail(f"/healthz: {status} {answer}\n{self.log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)

    def ready(self) -> Server:
        """Wait until there is a fresh sample."""
        self.wait(lambda status, _: status == 200)
        return self

    def stop(self) -> int:
        """End it as systemd and Docker do, and return its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout=PATIENCE_S)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers that end with the test. `serve(driver, NAME="value")`; None is the demo source."""
    servers: list[Server] = []

    def start(driver: FakeNvml | None, data_dir: Path | None = None, **settings: str) -> Server:
        servers.append(Server(data_dir or tmp_path / "history", driver, **settings))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Simulated GPUs with an hour behind them: one server for all tests of this worker that only look at it."""
    server = Server(tmp_path_factory.mktemp("demo") / "history", None, GPUMON_DEMO_GPUS="2")
    yield server.ready()
    server.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[postgresql.Postgres]:
    """A PostgreSQL server of this worker's own, started for the first test that asks."""
    found = postgresql.binaries()
    if found is None:
        pytest.skip("no PostgreSQL server is installed (Debian and Ubuntu: sudo apt-get install postgresql)")
    with postgresql.running(found) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database that does not exist yet (SQLite), or is empty (PostgreSQL)."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'gpumon.db'}"
        return
    server: postgresql.Postgres = request.getfixturevalue("postgres")
    yield server.empty("lent")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One headless Chromium for all tests of this worker."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of a viewer in Berlin, on a laptop; an error in the console fails the test."""
    context = browser.new_context(
        viewport={"width": 1440, "height": 900}, timezone_id="Europe/Berlin", locale="en-GB", accept_downloads=True
    )
    opened = context.new_page()
    opened.set_default_timeout(1000 * PATIENCE_S)
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    yield opened
    context.close()
    assert not errors
