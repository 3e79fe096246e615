"""CPU time of telling who the processes of a tick are: all of them anew, and when nothing has changed.

    .venv/bin/python benchmarks/attribution.py [--processes 64]

Beside them, in the same run, the least that the same could cost: reading /proc/PID/stat of each.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from gpumon_core.attribution.describe import Describer
from gpumon_core.attribution.inquirer import Inquirer
from gpumon_core.attribution.local import LocalAttribution
from gpumon_core.attribution.records import Ask, Endpoint
from gpumon_core.telemetry.records import ProcessReading

STEADY_LIMIT_MS, NEW_LIMIT_MS = 0.5, 20.0
SCRIPT = "import time\nprint(flush=True)\ntime.sleep(600)\n"


def cpu_ms(action: Callable[[], object]) -> float:
    """CPU milliseconds of one call."""
    before = time.process_time_ns()
    action()
    return (time.process_time_ns() - before) / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=64)
    parser.add_argument("--ticks", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "train.py"
        script.write_text(SCRIPT)
        command = [
            sys.executable,
            str(script),
            "--model",
            "Qwen/Qwen3-8B",
            "--hf-token",
            "made-up",
            *["--x=1"] * 30,
        ]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(options.processes)]
        try:
            for process in running:
                process.stdout.readline()
            measure({process.pid for process in running}, options.ticks)
        finally:
            for process in running:
                process.kill()
                process.wait()


def measure(pids: set[int], ticks: int) -> None:
    """Print the figures of these processes."""
    bare = [cpu_ms(lambda: [Path(f"/proc/{pid}/stat").read_bytes() for pid in pids]) for _ in range(20)]
    describer = Describer()
    news = []
    for _ in range(5):
        attribution = LocalAttribution(trusted=True, describer=describer)
        news.append(cpu_ms(lambda: attribution.identify(pids, 0)) / len(pids))  # noqa: B023 - called at once
        attribution.close()
    attribution = LocalAttribution(trusted=True, describer=describer)
    attribution.identify(pids, 0)
    steady = [cpu_ms(lambda: attribution.identify(pids, 0)) for _ in range(ticks)]
    servers = serving(attribution, pids, ticks)
    attribution.close()
    base, new, same, asked = (statistics.median(values) for values in (bare, news, steady, servers))
    print(f"reading /proc/PID/stat of {len(pids)} processes  {base:8.3f} ms")
    print(f"a process that is new                  {new:8.3f} ms   {_verdict(new, NEW_LIMIT_MS)}")
    print(f"a tick with {len(pids)} that are known           {same:8.3f} ms   {_verdict(same, STEADY_LIMIT_MS)}")
    print(f"    as a ratio to the reading          {same / base:8.2f}")
    print(f"the same, each a server that is asked  {asked:8.3f} ms   {_verdict(asked, STEADY_LIMIT_MS)}")


def serving(attribution: LocalAttribution, pids: set[int], ticks: int) -> list[float]:
    """CPU milliseconds of a tick's thread when each process is a model server that does not answer."""
    ask = Ask(Endpoint("/v1/models", "data.0.id", port=9), ("127.0.0.1", 9))
    known = attribution.identify(pids, 0)
    servers = {pid: replace(identity, pending=True, ask=ask) for pid, identity in known.items()}
    readings = [ProcessReading("GPU-0", pid, "C", 1000) for pid in pids]
    inquirer = Inquirer()
    inquirer.add(dict(servers), readings)
    inquirer.wait(10)
    taken = []
    for _ in range(ticks):
        before = time.thread_time_ns()
        attribution.identify(pids, 0)
        inquirer.add(dict(servers), readings)
        taken.append((time.thread_time_ns() - before) / 1e6)
    inquirer.close()
    return taken


def _verdict(value: float, limit: float) -> str:
    return f"within {limit:g} ms" if value <= limit else f"OVER {limit:g} ms"


if __name__ == "__main__":
    main()
