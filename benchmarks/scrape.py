"""What a scrape of /metrics costs the server, and whether 100 of them a second delay the ticks.

A real server on the fake NVML library, with 8 GPUs and 64 processes, all of them in the exposition:

    .venv/bin/python benchmarks/scrape.py [--gpus 8] [--processes 64] [--runs 5]

Each run has a quiet stretch and stretches with 100 requests a second: of /metrics, as Prometheus asks, and of the
smallest answer that Streamlit itself has. CPU time is that of the server's process beyond the quiet stretch's, for
each request. How long a tick took is its own count, and how late it came is told by the times of ticks.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fake_nvml import FakeNvml, environment, loaded
from rig import free_port, wait_for_server

from gpumon_core.attribution.local import LocalAttribution
from gpumon_core.prometheus import exposition
from gpumon_core.prometheus.scrape_data import ScrapeData
from gpumon_core.recording.collector import Observer
from gpumon_core.recording.counters import Counters
from gpumon_core.recording.latest_tick import follow
from gpumon_core.recording.state import State
from gpumon_core.telemetry.nvml import NvmlSource

LIMIT_MS = 10.0
LATE_S = 0.1
# An answer on a connection that is kept may take 40 ms to be acknowledged: several of them make the rate.
RATE, CLIENTS = 100, 10
SECONDS = 8.0
TIMES = ("gpumon_recorder_newest_tick_timestamp_seconds", "gpumon_recorder_tick_duration_seconds")
LOST = ("gpumon_recorder_skipped_ticks_total", "gpumon_recorder_failed_ticks_total")
ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Stretch:
    """CPU seconds of the server, requests that it answered, the duration of each tick in ms and how far each was
    from the one before, in seconds."""

    cpu: float
    requests: int
    durations_ms: list[float]
    steps_s: list[float]


class Client:
    """One that keeps its connection, as Prometheus does."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)

    def get(self, path: str) -> bytes:
        """The body of an answer, which must be 200."""
        self._connection.request("GET", path, headers={"Accept": ACCEPT, "Accept-Encoding": "gzip"})
        answer = self._connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status}")
        return body

    def values(self, port: int, names: tuple[str, ...]) -> list[float]:
        """Some numbers of the exposition."""
        own = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        own.request("GET", "/metrics?" + "&".join(f"name[]={name}" for name in names))
        text = own.getresponse().read().decode()
        found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return [next((float(found[key]) for key in found if key.startswith(name)), 0.0) for name in names]


def ask(port: int, path: str, until: float) -> int:
    """Ask for `path` at a client's part of RATE until then; how many requests that were."""
    client, began, requests = Client(port), time.monotonic(), 0
    while (now := time.monotonic()) < until:
        if requests > (now - began) * RATE / CLIENTS:
            time.sleep(0.002)
        else:
            client.get(path)
            requests += 1
    return requests


def stretch(pid: int, port: int, path: str | None) -> Stretch:
    """SECONDS of the server, with RATE requests of `path` in each of them."""
    watcher = Client(port)
    began, before = time.monotonic(), cpu_s(pid)
    durations, moments = [], []
    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(ask, port, path, began + SECONDS) for _ in range(CLIENTS if path else 0)]
        for second in range(int(SECONDS)):
            time.sleep(max(0.0, began + second + 1 - time.monotonic()))
            moment, duration = watcher.values(port, TIMES)
            if not moments or moment != moments[-1]:
                moments.append(moment)
                durations.append(1000 * duration)
        requests = sum(one.result() for one in asking)
    steps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    return Stretch(cpu_s(pid) - before, requests, durations, steps)


def measure(pid: int, port: int, runs: int) -> None:
    """Take the runs and print their medians."""
    client = Client(port)
    size, lost = len(client.get("/metrics")), client.values(port, LOST)
    kinds = {"quiet": None, "bare": "/_stcore/health", "scraped": "/metrics"}
    taken: dict[str, list[Stretch]] = {name: [] for name in kinds}
    for _ in range(runs):
        for name, path in kinds.items():
            taken[name].append(stretch(pid, port, path))

    def cost(name: str) -> float:
        pairs = zip(taken[name], taken["quiet"], strict=True)
        return statistics.median(1000 * (one.cpu - quiet.cpu) / one.requests for one, quiet in pairs)

    def over(name: str, of: Callable[[Stretch], list[float]]) -> list[float]:
        return [figure for one in taken[name] for figure in of(one)]

    scrape, bare = cost("scraped"), cost("bare")
    verdict = "within" if scrape <= LIMIT_MS else "ABOVE"
    rate = statistics.median(one.requests / SECONDS for one in taken["scraped"])
    print(f"{runs} runs, {rate:.0f} requests a second, {size / 1000:.1f} kB compressed; medians")
    print(f"  CPU of a bare request    {bare:7.2f} ms")
    print(f"  CPU of a scrape          {scrape:7.2f} ms   {scrape / bare:.1f} times   {verdict} {LIMIT_MS:.0f} ms")
    for name in ("quiet", "bare", "scraped"):
        took = statistics.median(over(name, lambda one: one.durations_ms))
        late = max(abs(step - round(step)) for step in over(name, lambda one: one.steps_s))
        quiet = statistics.median(over("quiet", lambda one: one.durations_ms))
        verdict = "within" if late <= LATE_S else "ABOVE"
        times = f"{took:7.2f} ms   {took / quiet:.2f} times"
        print(f"  a tick, {name:<17}{times}   at most {1000 * late:.0f} ms early or late   {verdict} 100 ms")
    now = client.values(port, LOST)
    print(f"  ticks skipped or failed  {sum(now) - sum(lost):4.0f}")


def anew_ms(fake: FakeNvml, processes: int) -> float:
    """CPU of the first scrape after a tick, which renders and compresses; the median of many, in this process."""
    state = State("recording", "nvml", "")
    figures = []
    with loaded(fake):
        observer = Observer(NvmlSource("bench"), LocalAttribution())
        latest = None
        for number in range(100):
            latest = follow(latest, *observer.observe())
            data = ScrapeData("bench", state, Counters(number), 1.0, processes, latest, is_fresh=True)
            before = time.process_time_ns()
            exposition.cache.body(data, as_openmetrics=True, zipped=True)
            figures.append((time.process_time_ns() - before) / 1e6)
        observer.close()
    return statistics.median(figures)


def main() -> None:
    """Serve, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--processes", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fake = FakeNvml(Path(folder) / "state")
        gpus = [fake.add_gpu(name=f"Board {index}", gpm_supported=1) for index in range(options.gpus)]
        for gpu in gpus:
            for metric in (1, 2, 3, 5, 10, 20, 21, 60, 61):
                gpu.set_gpm(metric, 40.0 + metric)
        running = [subprocess.Popen(["sleep", "3600"]) for _ in range(options.processes)]
        for position, process in enumerate(running):
            gpus[position % len(gpus)].add_process(process.pid, (position + 1) << 25, sm=20)
        port = free_port()
        settings = {"GPUMON_DATA_DIR": folder, "GPUMON_INTERVAL": "1", "GPUMON_LOG_LEVEL": "ERROR"}
        settings["GPUMON_METRICS_PROCESSES"] = str(options.processes)
        server = subprocess.Popen(
            [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)],
            cwd=ROOT,
            env={**os.environ, **environment(fake), **settings},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for_server(port, "/healthz")
            # What the pages need is loaded in the background, which is nothing to measure.
            time.sleep(10)
            print(f"{options.gpus} GPUs, {options.processes} processes, a tick a second")
            print(f"  CPU to render it anew    {anew_ms(fake, options.processes):7.2f} ms")
            measure(server.pid, port, options.runs)
        finally:
            for process in (server, *running):
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
