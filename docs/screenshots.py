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

from playwright.sync_api import sync_playwright
from rig import CHROMIUM, OPTIONS, free_port, wait_for_server

# File -> address, theme, window.
PICTURES = {
    "overview.png": ("/", "light", (1440, 1000)),
    "overview-dark.png": ("/", "dark", (1440, 1000)),
    "history.png": ("/history?range=1h", "dark", (1440, 1000)),
    "system.png": ("/system", "light", (1440, 1000)),
    "processes.png": ("/processes", "light", (1440, 800)),
}


def main() -> None:
    """Serve a demo with its hour of history, and take one picture after another."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        environ = os.environ | {
            "GPUMON_SOURCE": "demo",
            "GPUMON_DATA_DIR": folder,
            "GPUMON_HOST_NAME": "workstation",
        }
        command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)]
        server = subprocess.Popen(command, cwd=ROOT, env=environ)
        try:
            wait_for_server(port, "/healthz")
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
                    time.sleep(6)
                    page.screenshot(path=ROOT / "docs" / name)
                    page.close()
                chromium.close()
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
