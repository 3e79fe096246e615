"""Makes the pictures of the documentation from the program itself, on simulated GPUs:

.venv/bin/python docs/screenshots.py [PICTURE.png ...]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

try:
    from playwright.sync_api import Browser, Page, sync_playwright
except ImportError:
    sys.exit(
        "screenshots.py: Playwright is missing; ./setup.sh test installs it, or pip with requirements-dev.txt."
    )
from rig import CHROMIUM, OPTIONS, free_port, wait_for_server

# File -> address, theme, window.
TALL, PHONE = (1440, 1500), (390, 844)
PICTURES = {
    "overview.png": ("/", "light", (1440, 1000)),
    "overview-dark.png": ("/", "dark", (1440, 1000)),
    "overview-phone.png": ("/", "dark", PHONE),
    "gpu.png": ("/gpu?gpu=GPU+2&range=6h", "light", TALL),
    "history.png": ("/history?range=6h&gpu=GPU+0&gpu=GPU+2", "dark", TALL),
    "processes.png": ("/processes?range=7d&memory=4", "light", TALL),
    "usage.png": ("/usage?range=3d&by=Workload&measure=Energy", "light", TALL),
    "system.png": ("/system", "dark", (1440, 1000)),
}
DAYS, FIRST_MINUTE_S = "2", 75


def main(names: Sequence[str]) -> None:
    """Serve a demo with two days behind it, and take one picture after another: those named, or all."""
    if unknown := sorted(set(names) - set(PICTURES)):
        sys.exit(f"screenshots.py: {', '.join(unknown)} is none of the pictures: {', '.join(PICTURES)}.")
    if CHROMIUM is None:
        sys.exit("screenshots.py: Chromium is missing; on Debian and Ubuntu: sudo apt-get install chromium")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        # The pictures must not depend on the settings of the user who runs this.
        environ = {
            name: value for name, value in os.environ.items() if not name.startswith(("GPUMON_", "STREAMLIT_"))
        }
        environ |= {
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
            time.sleep(FIRST_MINUTE_S)
            with sync_playwright() as playwright:
                chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
                for name in names or PICTURES:
                    take(chromium, f"http://127.0.0.1:{port}", name)
                chromium.close()
        finally:
            server.terminate()
            server.wait()


def take(chromium: Browser, server: str, name: str) -> None:
    """One picture, into its file beside this script."""
    address, theme, (width, height) = PICTURES[name]
    page = chromium.new_page(
        viewport={"width": width, "height": height},
        color_scheme="dark" if theme == "dark" else "light",
        timezone_id="Europe/Berlin",
    )
    page.goto(server + address)
    page.get_by_role("heading", level=1).wait_for()
    time.sleep(4)
    if address.startswith("/processes"):
        choose_a_row(page)
    page.screenshot(path=ROOT / "docs" / name)
    page.close()
    print(f"docs/{name}")


def choose_a_row(page: Page) -> None:
    """For its story."""
    box = page.get_by_test_id("data-grid-canvas").first.bounding_box()
    if box is not None:
        page.mouse.click(box["x"] + 14, box["y"] + 35 * 3 + 17)
        time.sleep(3)


if __name__ == "__main__":
    main(sys.argv[1:])
