"""Seconds from `./setup.sh run` on an installed tree to the first stored tick and the first answer.

    .venv/bin/python benchmarks/startup.py [--runs 5]

On the fake NVML library; printed beside the start of a bare Streamlit server in the same run.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from fake_nvml import FakeNvml, environment
from rig import free_port

LIMIT_S = 5.0


def seconds_until(
    condition: Callable[[], bool], command: list[str], environ: dict[str, str], folder: Path
) -> float:
    """Start a command, wait for the condition, and end it."""
    started = time.monotonic()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log)
    try:
        while not condition():
            if process.poll() is not None or time.monotonic() - started > 60:
                raise RuntimeError((folder / "log").read_text())
            time.sleep(0.01)
        return time.monotonic() - started
    finally:
        process.terminate()
        process.wait()


def stored(database: Path) -> bool:
    """Whether a tick has been committed."""
    if not database.exists():
        return False
    connection = sqlite3.connect(database, timeout=1)
    try:
        return connection.execute("SELECT count(*) FROM gpu_metrics").fetchone()[0] > 0
    except sqlite3.Error:
        return False
    finally:
        connection.close()


def answers(port: int) -> bool:
    """Whether the server answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1):
            return True
    except OSError:
        return False


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    first_tick, bare = [], []
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            fake = FakeNvml(folder / "state")
            for index in range(8):
                fake.add_gpu(name=f"Board {index}").add_process(os.getpid(), 1 << 30)
            port = str(free_port())
            environ = {**os.environ, **environment(fake), "GPUMON_DATA_DIR": str(folder / "history")}
            command = [str(ROOT / "setup.sh"), "run", "--server.port", port]
            database = folder / "history" / "gpumon.db"
            first_tick.append(seconds_until(lambda database=database: stored(database), command, environ, folder))
            (folder / "bare.py").write_text("import streamlit as st\nst.title('bare')\n")
            port = free_port()
            options_of_bare = [
                "--server.port",
                str(port),
                "--server.headless",
                "true",
                "--server.address",
                "127.0.0.1",
            ]
            command = [str(ROOT / ".venv/bin/streamlit"), "run", "bare.py", *options_of_bare]
            bare.append(seconds_until(lambda port=port: answers(port), command, dict(os.environ), folder))
    middle, beside = statistics.median(first_tick), statistics.median(bare)
    verdict = "within" if middle <= LIMIT_S else "ABOVE"
    print(f"medians of {options.runs} starts")
    print(f"  bare Streamlit server answers       {beside:5.2f} s")
    ratio = f"{middle / beside:.2f} times the bare server"
    print(f"  ./setup.sh run to the first tick    {middle:5.2f} s   {verdict} {LIMIT_S} s; {ratio}")


if __name__ == "__main__":
    main()
