"""What the pages cost: to open, to change, to keep open, and for many viewers at once.

    .venv/bin/python benchmarks/pages.py [--runs 5] [--history FOLDER] [--only
    opening,changing,refresh,many,memory]

Runs on simulated GPUs with a full database: 8 GPUs, about 64 processes, a year of history (made first, in seven
minutes, unless FOLDER has it already). Opening ends with the last chart and the last filter of the sidebar; it is
measured in turns with a bare Streamlit page that has one Plotly chart and the same widgets in its sidebar.
Opening and changing are measured in Chromium; the others by viewers that draw nothing (viewers.py), so that the
figures are the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from opening import BARE, PLOT, opening
from playwright.sync_api import Browser, sync_playwright
from rig import CHROMIUM, OPTIONS, free_port, say, wait_for_server
from viewers import Viewer, watch

HOST = "rack1"
TICKS_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# As much content as the overview has, without any work to get it.
BARE_FRAGMENT = """
import pandas as pd
import streamlit as st
table = pd.DataFrame({f"column {number}": [f"value {row}" for row in range(64)] for number in range(12)})
@st.fragment
def frame():
    st.title("bare")
    st.html("<div>" + "<span>text of a card</span>" * 1500 + "</div>")
    st.dataframe(table)
frame()
"""
# After its start the server first makes the rollups of the time before.
SETTLED_S = 20.0
# Each round contains the recorder's job of every minute once; it costs more than a refresh.
ROUND_S = 60.0
# How often a page asks, and the recorder ticks.
REFRESH_S = 4.0
LIMITS = {"changing": 0.7, "one": 40.0, "ten": 250.0, "p95": 1.0, "memory": 350.0}


@contextmanager
def gpumon(folder: Path, port: int, interval_s: float = REFRESH_S) -> Iterator[subprocess.Popen[bytes]]:
    """The server on the full history."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GPUMON_")}
    environ |= {"GPUMON_DATA_DIR": str(folder), "GPUMON_SOURCE": "demo", "GPUMON_DEMO_GPUS": "8"}
    environ |= {"GPUMON_DEMO_PROCESSES": "64"}
    environ |= {"GPUMON_HOST_NAME": HOST, "GPUMON_INTERVAL": str(interval_s), "GPUMON_LOG_LEVEL": "WARNING"}
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, env=environ)
    try:
        wait_for_server(port, "/healthz")
        yield server
    finally:
        server.terminate()
        server.wait()


@contextmanager
def bare(folder: Path, port: int, script: str = BARE) -> Iterator[subprocess.Popen[bytes]]:
    """A Streamlit server with one script."""
    (folder / "bare.py").write_text(script)
    options = ["--server.headless", "true", "--server.address", "127.0.0.1", "--browser.gatherUsageStats", "false"]
    command = [sys.executable, "-m", "streamlit", "run", "bare.py", "--server.port", str(port), *options]
    server = subprocess.Popen(command, cwd=folder)
    try:
        wait_for_server(port, "/_stcore/health")
        yield server
    finally:
        server.terminate()
        server.wait()


def make_history(folder: Path) -> None:
    """Write a year of 8 GPUs and 64 processes, unless the folder has it already."""
    if (folder / "demo.db").exists():
        return
    print("writing a year of history", flush=True)
    environ = os.environ | {"GPUMON_DATA_DIR": str(folder), "GPUMON_HOST_NAME": HOST, "GPUMON_SOURCE": "demo"}
    command = [sys.executable, "-m", "gpumon_core", "fill", "--days", "365", "--gpus", "8", "--processes", "64"]
    subprocess.run(command, cwd=ROOT, env=environ, check=True)


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far: proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_S


def resident_mb(pid: int) -> float:
    """Its resident memory in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES / 1e6


def recorder(port: int) -> dict[str, float]:
    """What /healthz says of the recorder."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as answer:
        found: dict[str, float] = json.load(answer)["recorder"]
    return found


def changing(launch: Callable[[], Browser], port: int, runs: int) -> None:
    """Choose another range, GPU, filter: seconds until the page is drawn anew."""
    print(f"changing what is shown, medians of {runs}")
    browser = launch()
    page = browser.new_page(viewport={"width": 1440, "height": 900})

    def redrawn(act: Callable[[], None]) -> float:
        box = page.locator(PLOT).first
        before = box.get_attribute("data-view")
        started = time.monotonic()
        act()
        page.wait_for_function(
            "before => document.querySelector('.gm-plots').dataset.view !== before", arg=before, polling=10
        )
        return time.monotonic() - started

    def choose(name: str) -> Callable[[], None]:
        return lambda: page.get_by_role("radio", name=name, exact=True).click()

    page.goto(f"http://127.0.0.1:{port}/history?range=15m")
    page.locator(PLOT).first.wait_for()
    times: dict[str, list[float]] = {}
    for _ in range(runs):
        for name in ("1h", "24h", "7d", "30d", "1y", "15m"):
            page.wait_for_timeout(700)
            times.setdefault(f"history, range {name}", []).append(redrawn(choose(name)))
    for name in ("15m", "1y"):
        page.goto(f"http://127.0.0.1:{port}/history?range={name}")
        page.locator(PLOT).first.wait_for()
        for number in range(runs):
            page.wait_for_timeout(700)
            page.get_by_label("GPUs", exact=True).first.click()
            page.wait_for_timeout(300)
            option = page.get_by_role("option", name=f"GPU {number % 8}", exact=True)
            times.setdefault(f"history of {name}, another GPU", []).append(redrawn(option.click))
            page.keyboard.press("Escape")
    page.goto(f"http://127.0.0.1:{port}/processes?range=1y")
    count = page.get_by_text("processes, newest first")
    count.wait_for()
    for number in range(runs):
        for what, text in (("train.py", f"train{'.py'[: number % 4]}"), ("everything", "")):
            before = count.inner_text()
            page.wait_for_timeout(700)
            started = time.monotonic()
            page.get_by_placeholder("train.py or 4711").fill(text)
            page.wait_for_function(
                "before => [...document.querySelectorAll('p')].some("
                "p => p.textContent.includes('processes, newest first') && p.textContent !== before)",
                arg=before,
                polling=10,
            )
            times.setdefault(f"processes of a year, filtered to {what}", []).append(time.monotonic() - started)
    browser.close()
    for name, seconds in times.items():
        say(name, statistics.median(seconds), "s", LIMITS["changing"])


class Spent:
    """CPU seconds of a server in two parts. The background is the threads that it has when nobody watches, but for
    the main thread, which talks to browsers; it and all other threads work for viewers. They are separate because
    the recorder's work varies by more than a refresh takes."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        # What each thread has taken so far, those that have ended included.
        self._background: dict[int, float] = {}
        self.nobody_watches()

    def nobody_watches(self) -> None:
        """All threads that exist now belong to the background."""
        threads = self._threads()
        self._background |= {thread: threads[thread] for thread in threads.keys() - {self._pid}}

    def _threads(self) -> dict[int, float]:
        found = {}
        for thread in Path(f"/proc/{self._pid}/task").iterdir():
            # A thread may end meanwhile.
            with suppress(OSError):
                found[int(thread.name)] = int((thread / "schedstat").read_text().split()[0]) / 1e9
        return found

    def now(self) -> tuple[float, float]:
        """For viewers, and in the background."""
        total, threads = cpu_s(self._pid), self._threads()
        self._background |= {thread: threads[thread] for thread in self._background.keys() & threads.keys()}
        background = sum(self._background.values())
        return total - background, background


def follow(
    port: int, spent: Spent, pages: list[str], seconds: float, refresh_s: float
) -> tuple[tuple[float, float], float, list[Viewer]]:
    """CPU seconds of the server while so many watch, for them and in the background, how long that was (to the end
    of the last refresh), and the viewers."""
    viewers = [Viewer(port, page, refresh_s) for page in pages]
    before: list[tuple[tuple[float, float], float]] = []
    asyncio.run(watch(viewers, seconds, lambda: before.append((spent.now(), time.monotonic()))))
    (used, began), *_ = before
    return _since(used, spent), time.monotonic() - began, viewers


def _since(before: tuple[float, float], spent: Spent) -> tuple[float, float]:
    after = spent.now()
    return after[0] - before[0], after[1] - before[1]


def refresh(servers: dict[str, tuple[int, int]], seconds: float, runs: int) -> None:
    """The CPU time of one automatic refresh of the overview, and of a bare page with as much on it. What a
    server takes when nobody watches, measured before and after, is subtracted. `servers` has ports and PIDs."""
    print(f"one automatic refresh of the overview, medians of {runs} times {seconds:.0f} s")
    rounds = (("gpumon", 1), ("gpumon", 10), ("bare", 1))
    found: dict[tuple[str, int], list[float]] = {round_: [] for round_ in rounds}
    spent = {name: Spent(pid) for name, (_, pid) in servers.items()}
    ticks: dict[int, list[float]] = {0: [], 1: [], 10: []}

    def alone() -> dict[str, float]:
        # The server first ends the work that the viewers before have caused.
        time.sleep(SETTLED_S)
        began, before = time.monotonic(), {name: of.now() for name, of in spent.items()}
        time.sleep(seconds)
        lasted = time.monotonic() - began
        for of in spent.values():
            of.nobody_watches()
        taken = {name: _since(before[name], of) for name, of in spent.items()}
        ticks[0].append(taken["gpumon"][1] / lasted)
        return {name: used / lasted for name, (used, _) in taken.items()}

    # The first viewer fills the caches for all later ones.
    for name, (port, _) in servers.items():
        follow(port, spent[name], [""], 10, REFRESH_S)
    before = alone()
    for _ in range(runs):
        taken = {
            (name, count): follow(servers[name][0], spent[name], [""] * count, seconds, REFRESH_S)
            for name, count in rounds
        }
        after = alone()
        for (name, count), ((used, background), lasted, viewers) in taken.items():
            for viewer in viewers:
                assert not viewer.failures, viewer.failures
            unwatched = (before[name] + after[name]) / 2
            refreshes = max(len(viewer.waits_s) for viewer in viewers)
            found[name, count].append(1000 * (used - unwatched * lasted) / refreshes)
            if name == "gpumon":
                ticks[count].append(background / lasted)
        before = after
    beside = statistics.median(found["bare", 1])
    for number, (name, count) in (("one", rounds[0]), ("ten", rounds[1])):
        what = f"CPU, {number} viewer{'s together' * (count > 1)}"
        figures = found[name, count]
        middle = statistics.median(figures)
        more = f"  ({min(figures):.0f} to {max(figures):.0f}; {middle / beside:.2f} times a bare page's)"
        say(what, middle, "ms", LIMITS[number], more)
    print(f"  {'CPU, a bare page':<44} {beside:8.2f} ms")
    recorder = ", ".join(f"{1000 * REFRESH_S * statistics.median(ticks[count]):.0f}" for count in (0, 1, 10))
    print(f"  {'CPU, background by tick':<44} {recorder} ms with nobody, one, and ten watching")


def many(port: int, pid: int, count: int, seconds: float) -> None:
    """Many viewers on two pages: whether ticks are missed, and how long a refresh takes."""
    print(f"{count} viewers on Overview and History for {seconds / 60:.0f} minutes")
    before = recorder(port)
    pages = [("", "history")[number % 2] for number in range(count)]
    used, lasted, viewers = follow(port, Spent(pid), pages, seconds, REFRESH_S)
    after = recorder(port)
    waits = sorted(wait for viewer in viewers for wait in viewer.waits_s)
    failures = [failure for viewer in viewers for failure in viewer.failures]
    missed = sum(after[name] - before[name] for name in ("skipped", "failed", "dropped"))
    say("ticks missed", missed, "", 0)
    say("refresh, 95th percentile", waits[int(0.95 * len(waits))], "s", LIMITS["p95"], f"  (of {len(waits):,})")
    print(f"  {'CPU of the server':<44} {100 * sum(used) / lasted:8.0f} % of one core")
    print(f"  {'failures':<44} {failures[:3] or 'none'}")


def memory(folder: Path, refreshes: int) -> None:
    """Resident memory with 5 viewers after as many refreshes as an hour has, one a second."""
    print(f"5 viewers on five pages, {refreshes} refreshes at one a second")
    port = free_port()
    with gpumon(folder, port, 1) as server:
        pages = ["", "history", "gpu", "processes", "usage"]
        sizes = []
        for _ in range(5):
            follow(port, Spent(server.pid), pages, refreshes / 5, 1)
            sizes.append(resident_mb(server.pid))
    say("resident", sizes[-1], "MB", LIMITS["memory"], f"  (by fifths: {', '.join(f'{mb:.0f}' for mb in sizes)})")


PARTS = ("opening", "changing", "refresh", "many", "memory")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--history", type=Path, help="folder with a history, or for one")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--viewers", type=int, default=25)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--refreshes", type=int, default=900)
    options = parser.parse_args()
    wanted = set(options.only.split(","))
    with tempfile.TemporaryDirectory() as name:
        folder = options.history or Path(name)
        make_history(folder)
        if {"opening", "changing"} & wanted:
            in_browsers(folder, Path(name), wanted, options.runs)
        if {"refresh", "many"} & wanted:
            port = free_port()
            with gpumon(folder, port) as server:
                time.sleep(SETTLED_S)
                if "refresh" in wanted:
                    beside = free_port()
                    with bare(Path(name), beside, BARE_FRAGMENT) as other:
                        servers = {"gpumon": (port, server.pid), "bare": (beside, other.pid)}
                        refresh(servers, ROUND_S, options.runs)
                if "many" in wanted:
                    many(port, server.pid, options.viewers, 60 * options.minutes)
        if "memory" in wanted:
            memory(folder, options.refreshes)


def in_browsers(folder: Path, scratch: Path, wanted: set[str], runs: int) -> None:
    """What Chromium sees."""
    ports = {"gpumon": free_port(), "bare": free_port()}
    with (
        gpumon(folder, ports["gpumon"]),
        bare(scratch, ports["bare"]),
        sync_playwright() as playwright,
    ):
        time.sleep(SETTLED_S)

        def launch() -> Browser:
            return playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)

        if "opening" in wanted:
            opening(launch, ports, runs)
        if "changing" in wanted:
            changing(launch, ports["gpumon"], runs)


if __name__ == "__main__":
    main()
