"""What the measuring scripts and the picture script share: ports, servers, Chromium, lines of results, and a
machine with GPUs."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fake_nvml import FakeNvml

CHROMIUM = shutil.which("chromium")
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


# Below those that the kernel gives to connections, which come and go until a server listens (ip_local_port_range).
PORTS = range(10_000, 32_000)


def free_port() -> int:
    """A TCP port that nothing listens on, and that nobody is given by chance before a server has started."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def wait_for_server(port: int, path: str) -> None:
    """Until the server answers with 200. Raises RuntimeError after a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"nothing answers on port {port}")


@contextmanager
def machine(state: Path, gpus: int = 8, processes: int = 64) -> Iterator[FakeNvml]:
    """A fake NVML library with GPUs that offer everything, and processes that run on them."""
    from fake_nvml import FakeNvml

    fake = FakeNvml(state)
    boards = [fake.add_gpu(name=f"Board {index}", gpm_supported=1, memory_temperature=60) for index in range(gpus)]
    for board in boards:
        for metric in (1, 2, 3, 5, 10, 20, 21, 60, 61):
            board.set_gpm(metric, 40.0 + metric)
    running = [subprocess.Popen(["sleep", "infinity"]) for _ in range(processes)]
    try:
        for place, process in enumerate(running):
            boards[place % len(boards)].add_process(process.pid, (place + 1) << 25, sm=20)
        yield fake
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait()


def live(fake: FakeNvml, number: int) -> int:
    """Let four seconds pass on a busy machine: samples, energy, and processes of which half do something else.

    Returns the time before them, in microseconds.
    """
    now = time.time_ns() // 1000
    for index, gpu in enumerate(fake.gpus):
        gpu.energy_mj += 900_000 + 1000 * (number % 7)
        gpu.temperature = 60 + (number + index) % 9
        for step in range(24):
            for kind in (1, 2):
                gpu.add_sample(kind, (number * 13 + step * 7 + index) % 101, now - 4_000_000 + step * 166_000)
        for step in range(100):
            gpu.add_sample(0, 250_000 + 100 * ((number + step) % 90), now - 4_000_000 + step * 40_000)
    for slot, process in enumerate(fake.state.processes):
        if process.presence and slot % 2:
            process.sm = (number + slot) % 13
    return now - 4_000_000


def cpu_s(pid: int) -> float:
    """CPU seconds, user and system, of all threads of a process since it began: clock_getcpuclockid(3), which is
    what /proc/PID/stat shows, but not in hundredths of a second."""
    return time.clock_gettime((~pid << 3) | 2)


def resident_mb(pid: int) -> float:
    """VmRSS of a process, in MB of 10^6 bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"no VmRSS for {pid}")


def say(what: str, figure: float, unit: str, limit: float, more: str = "") -> None:
    """One line of the result."""
    verdict = "within" if figure <= limit else "ABOVE"
    print(f"  {what:<44} {figure:8.2f} {unit:<3} {verdict} {limit:g} {unit}{more}", flush=True)
