"""Resident memory of the recorder alone, on the fake NVML library: at its start, and after 10,000 ticks.

    .venv/bin/python benchmarks/memory.py [--ticks 10000]

The recorder is `python -m gpumon_core record` with everything on; for the long run its own jobs are called
one after another, as fast as they go, on a clock that moves by the interval. Printed beside a Python that has
only imported its libraries. VmRSS from /proc/PID/status, in MB of 10^6 bytes.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

LIMIT_MB, GROWTH_MB = 65.0, 1.0
LIBRARIES = "import pynvml, sqlalchemy, apscheduler.schedulers.background, pydantic, filelock"


def resident_mb(pid: int) -> float:
    """VmRSS of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"no VmRSS for {pid}")


def measured(arguments: list[str], environ: dict[str, str], seconds: float) -> float:
    """Resident memory of `python arguments` after so many seconds."""
    process = subprocess.Popen([sys.executable, *arguments], env=environ, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        time.sleep(seconds)
        return resident_mb(process.pid)
    finally:
        process.terminate()
        process.wait()


def long_run(ticks: int) -> None:
    """In a process of its own: the jobs of a recorder, tick after tick; prints memory on the way."""
    from gpumon_core.recording.recorder import Recorder
    from gpumon_core.settings import load

    recorder = Recorder(load(interval=3600))
    recorder.start()
    while recorder.observer is None or recorder.counters.ticks == 0:
        time.sleep(0.05)
    recorder._settings = load(interval=4)
    source = recorder.observer.source
    now = [time.time()]
    source._clock = lambda: now[0]
    marks = {ticks // 100, ticks // 5, ticks}
    for number in range(1, ticks + 1):
        now[0] += 4
        recorder._tick()
        recorder._write()
        if number % 15 == 0:
            recorder._every_minute()
        if number % 900 == 0:
            recorder._keep_house()
        if number in marks:
            gc.collect()
            print(number, resident_mb(os.getpid()), flush=True)
    recorder.stop()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ticks", type=int, default=10_000)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        long_run(options.ticks)
        return
    from fake_nvml import FakeNvml, environment

    with tempfile.TemporaryDirectory() as folder:
        fake = FakeNvml(Path(folder) / "state")
        running = [subprocess.Popen(["sleep", "3600"]) for _ in range(64)]
        try:
            for index in range(8):
                gpu = fake.add_gpu(name=f"Board {index}", gpm_supported=1, memory_temperature=60)
                for metric in (1, 2, 3, 5, 10, 20, 21, 60, 61):
                    gpu.set_gpm(metric, 40.0 + metric)
                for process in running[8 * index : 8 * index + 8]:
                    gpu.add_process(process.pid, 1 << 30, sm=10)
            environ = {**os.environ, **environment(fake), "GPUMON_DATA_DIR": folder, "GPUMON_LOG_LEVEL": "ERROR"}
            libraries = measured(["-c", f"{LIBRARIES}; import time; time.sleep(60)"], environ, 4)
            alone = measured(["-m", "gpumon_core", "record"], environ, 20)
            child = [sys.executable, __file__, "--child", "--ticks", str(options.ticks)]
            printed = subprocess.run(
                child, env=environ, cwd=ROOT, check=True, capture_output=True, text=True
            ).stdout
        finally:
            for process in running:
                process.kill()
                process.wait()
    marks = [(int(number), float(mb)) for number, mb in map(str.split, printed.splitlines())]
    print("recorder alone, 8 GPUs, 64 processes, everything on")
    print(f"  its libraries, only imported     {libraries:6.1f} MB")
    for what, figure in (("20 s after its start", alone), *((f"after {n:,} ticks", mb) for n, mb in marks)):
        verdict = "within" if figure <= LIMIT_MB else "ABOVE"
        print(f"  {what:<32} {figure:6.1f} MB   {verdict} {LIMIT_MB:.0f} MB; {figure / libraries:.2f} times")
    growth = marks[-1][1] - marks[-2][1]
    verdict = "within" if growth < GROWTH_MB else "ABOVE"
    print(f"  growth over the last four fifths {growth:6.2f} MB   {verdict} {GROWTH_MB:.0f} MB")


if __name__ == "__main__":
    main()
