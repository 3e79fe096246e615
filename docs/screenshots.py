"""Makes the pictures of the documentation from the program itself, on simulated GPUs:

.venv/bin/python docs/screenshots.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from playwright.sync_api import Page, sync_playwright
from rig import CHROMIUM, OPTIONS, free_port, wait_for_server

# File -> address, theme, window.
LAPTOP, TALL, PHONE = (1440, 900), (1440, 1500), (390, 844)
PICTURES = {
    "overview.png": ("/", "light", (1440, 1000)),
    "overview-dark.png": ("/", "dark", (1440, 1000)),
    "overview-phone.png": ("/", "dark", PHONE),
    "gpu.png": ("/gpu?gpu=GPU+2&range=6h", "light", TALL),
    "history.png": ("/history?range=6h&gpu=GPU+0&gpu=GPU+2", "dark", TALL),
    "processes.png": ("/processes", "light", LAPTOP),
    "usage.png": ("/usage?range=3d&by=Workload&measure=Energy", "light", TALL),
    "system.png": ("/system", "dark", (1440, 1000)),
}
DAYS = "2"


def main() -> None:
    """Serve a demo with two days behind it, and take one picture after another."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        environ = os.environ | {
            "GPUMON_SOURCE": "demo",
            "GPUMON_DATA_DIR": folder,
            "GPUMON_HOST_NAME": "workstation",
            "GPUMON_PRICE_PER_KWH": "0.30",
        }
        fill = [sys.executable, "-m", "gpumon_core", "fill", "--days", DAYS, "--gpus", "4"]
        subprocess.run(fill, cwd=ROOT, env=environ, check=True)
        command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)]
        server = subprocess.Popen(command, cwd=ROOT, env=environ)
        try:
            wait_for_server(port, "/healthz")
            # The first minute is not what a picture is for.
            time.sleep(75)
            with sync_playwright() as playwright:
                chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
                for name, (address, theme, (width, height)) in PICTURES.items():
                    page = chromium.new_page(
                        viewport={"width": width, "height": height},
                        color_scheme="dark" if theme == "dark" else "light",
                        timezone_id="Europe/Berlin",
                    )
                    page.goto(f"http://127.0.0.1:{port}{address}")
                    page.get_by_role("heading", level=1).wait_for()
                    time.sleep(4)
                    if address == "/processes":
                        choose_a_row(page)
                    page.screenshot(path=ROOT / "docs" / name)
                    page.close()
                chromium.close()
        finally:
            server.terminate()
            server.wait()


def choose_a_row(page: Page) -> None:
    """For its story."""
    box = page.get_by_test_id("data-grid-canvas").first.bounding_box()
    if box is not None:
        page.mouse.click(box["x"] + 14, box["y"] + 35 * 3 + 17)
        time.sleep(3)


if __name__ == "__main__":
    main()
