"""Seconds until each page is drawn in headless Chromium, beside a bare Streamlit page with a chart.

    .venv/bin/python benchmarks/pages.py [--runs 5]

Cold is a new browser, warm another visit in the same one. A page counts as drawn when the last
thing on it is there: the cards and the process grid, the chart's lines, the ledger's rows.
Runs on the fake NVML library with 8 GPUs and 64 processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from fake_nvml import FakeNvml, environment
from playwright.sync_api import Page, sync_playwright
from rig import CHROMIUM, OPTIONS, free_port, wait_for_server

COLD_S, WARM_S = 4.0, 2.0

BARE = """
import plotly.graph_objects as go
import streamlit as st
st.title("bare")
st.plotly_chart(go.Figure(go.Scatter(x=list(range(1000)), y=list(range(1000)))))
"""

# What is drawn last on each page.
DRAWN = {
    "/": ".gm-card:nth-of-type(8) .gm-spark, [role=grid] tbody tr",
    "/history": ".js-plotly-plot .scatterlayer .trace path",
    "/processes": "[role=grid] tbody tr",
    "bare": ".js-plotly-plot .scatterlayer .trace path",
}


def drawn(page: Page, url: str, what: str) -> float:
    """Seconds from asking for the page until it is drawn."""
    started = time.monotonic()
    page.goto(url, wait_until="commit")
    for selector in what.split(", "):
        page.locator(selector).first.wait_for(state="attached")
    return time.monotonic() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fake = FakeNvml(folder / "state")
        sleepers = [subprocess.Popen(["sleep", "3600"]) for _ in range(64)]
        for index in range(8):
            gpu = fake.add_gpu(name=f"Board {index}")
            for sleeper in sleepers[index * 8 : index * 8 + 8]:
                gpu.add_process(sleeper.pid, 1 << 30)
        ports = {"gpumon": free_port(), "bare": free_port()}
        (folder / "bare.py").write_text(BARE)
        environ = {**os.environ, **environment(fake), "GPUMON_DATA_DIR": name}
        streamlit = [sys.executable, "-m", "streamlit", "run"]
        bare_options = [
            "--server.headless",
            "true",
            "--server.address",
            "127.0.0.1",
            "--browser.gatherUsageStats",
            "false",
        ]
        servers = [
            subprocess.Popen([*streamlit, "app.py", "--server.port", str(ports["gpumon"])], cwd=ROOT, env=environ),
            subprocess.Popen(
                [*streamlit, "bare.py", "--server.port", str(ports["bare"]), *bare_options], cwd=folder
            ),
        ]
        try:
            wait_for_server(ports["gpumon"], "/healthz")
            wait_for_server(ports["bare"], "/_stcore/health")
            time.sleep(60)
            measure(ports, runs)
        finally:
            for process in servers + sleepers:
                process.terminate()
            for process in servers + sleepers:
                process.wait()


def measure(ports: dict[str, int], runs: int) -> None:
    """Open every page cold and warm, in turns, so that all meet the same machine."""
    cold: dict[str, list[float]] = {page: [] for page in DRAWN}
    warm: dict[str, list[float]] = {page: [] for page in DRAWN}
    with sync_playwright() as playwright:
        for _ in range(runs):
            for name, what in DRAWN.items():
                base = f"http://127.0.0.1:{ports['bare' if name == 'bare' else 'gpumon']}"
                url = base + ("/" if name == "bare" else name)
                chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
                page = chromium.new_page(viewport={"width": 1440, "height": 900})
                cold[name].append(drawn(page, url, what))
                page.goto("about:blank")
                warm[name].append(drawn(page, url, what))
                chromium.close()
    beside = {"cold": statistics.median(cold["bare"]), "warm": statistics.median(warm["bare"])}
    print(f"medians of {runs} visits; 8 GPUs, 64 processes")
    for name in DRAWN:
        for kind, figures, limit in (("cold", cold[name], COLD_S), ("warm", warm[name], WARM_S)):
            middle = statistics.median(figures)
            verdict = "" if name == "bare" else f"{'within' if middle <= limit else 'ABOVE'} {limit} s; "
            ratio = f"{middle / beside[kind]:.2f} times the bare page"
            print(f"  {name:<11} {kind}  {middle:5.2f} s   {verdict}{ratio}")


if __name__ == "__main__":
    main()
