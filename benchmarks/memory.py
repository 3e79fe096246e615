"""Resident memory of the recorder alone (python -m gpumon_core record), on the fake NVML library.

    .venv/bin/python benchmarks/memory.py [--seconds 30]

Printed beside a Python that has only imported its libraries. VmRSS from /proc/PID/status, in MB of
10^6 bytes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fake_nvml import FakeNvml, environment

LIMIT_MB = 70.0
LIBRARIES = "import pynvml, sqlalchemy, apscheduler.schedulers.background, pydantic_settings, filelock"


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fake = FakeNvml(Path(folder) / "state")
        for index in range(8):
            gpu = fake.add_gpu(name=f"Board {index}")
            for _ in range(8):
                gpu.add_process(os.getpid(), 1 << 30)
        environ = {**os.environ, **environment(fake), "GPUMON_DATA_DIR": folder, "GPUMON_INTERVAL": "1"}
        libraries = measured(["-c", f"{LIBRARIES}; import time; time.sleep(60)"], environ, 4)
        first = measured(["-m", "gpumon_core", "record"], environ, options.seconds)
        again = measured(["-m", "gpumon_core", "record"], environ, options.seconds)
    print(f"recorder alone after {options.seconds:.0f} ticks, 8 GPUs")
    print(f"  its libraries, only imported    {libraries:6.1f} MB")
    for name, figure in (("first start (makes the schema)", first), ("later start", again)):
        verdict = "within" if figure <= LIMIT_MB else "ABOVE"
        print(f"  {name:<31} {figure:6.1f} MB   {verdict} {LIMIT_MB:.0f} MB; {figure / libraries:.2f} times")


if __name__ == "__main__":
    main()
