"""Resident memory of the server while many long answers are asked for at once, and how long short ones take then.

    .venv/bin/python benchmarks/heavy.py [--at-once 12] [--hours 14]

A real server on hours of simulated history of four GPUs. Each round asks for the same thing, so many times at
once: all metrics at 10,000 points (refused), as many as an answer may have, and the same as CSV of all GPUs.
Memory is VmRSS from /proc/PID/status, in MB of 10^6 bytes: before, the highest seen in the round, and after it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from rig import free_port, resident_mb, wait_for_server

from gpumon_core.api.history import MOST_CELLS
from gpumon_core.metrics import GPU_METRICS_BY_KEY


def status(url: str) -> int:
    """What is answered, read to its end; 0 where nothing is."""
    try:
        with urllib.request.urlopen(url, timeout=600) as answer:
            while answer.read(1 << 20):
                pass
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def round_of(pid: int, url: str, query: str, at_once: int) -> str:
    """One round in words."""
    before, highest, slowest, over = resident_mb(pid), 0.0, 0.0, threading.Event()

    def watch() -> None:
        nonlocal highest, slowest
        while not over.is_set():
            highest = max(highest, resident_mb(pid))
            begun = time.monotonic()
            status(f"{url}/healthz")
            slowest = max(slowest, time.monotonic() - begun)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        answers = Counter(pool.map(status, [f"{url}/api/v1/history?{query}"] * at_once))
    took = time.monotonic() - begun
    over.set()
    watcher.join()
    counts = ", ".join(f"{count} x {code}" for code, count in sorted(answers.items()))
    return (
        f"{before:6.0f} {highest:6.0f} {resident_mb(pid):6.0f} MB   {took:5.1f} s   {counts}; "
        f"/healthz within {slowest:.2f} s"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at-once", type=int, default=12)
    parser.add_argument("--hours", type=float, default=14)
    options = parser.parse_args()
    metrics = "&".join(f"metric={key}" for key in GPU_METRICS_BY_KEY)
    allowed = MOST_CELLS // (4 * len(GPU_METRICS_BY_KEY))
    rounds = {
        "10,000 points of everything": f"range={options.hours * 3600:.0f}&points=10000&{metrics}",
        "as many as are allowed": f"range={options.hours * 3600:.0f}&points={allowed}&{metrics}",
        "the same of one GPU": f"range={options.hours * 3600:.0f}&points={4 * allowed}&gpu=1&{metrics}",
        "the same as CSV of all": f"range={options.hours * 3600:.0f}&points={4 * allowed}&format=csv&{metrics}",
    }
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "GPUMON_DATA_DIR": folder, "GPUMON_SOURCE": "demo"}
        fill = [sys.executable, "-m", "gpumon_core", "fill", "--days", str(options.hours / 24)]
        subprocess.run(fill, cwd=ROOT, env=environ, check=True, stdout=subprocess.DEVNULL)
        port = free_port()
        server = subprocess.Popen(
            [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for_server(port, "/healthz")
            url = f"http://127.0.0.1:{port}"
            status(f"{url}/api/v1/history")
            print(f"{options.at_once} at once          before highest after")
            for what, query in rounds.items():
                print(f"  {what:<28} {round_of(server.pid, url, query, options.at_once)}", flush=True)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
