"""What the whole recorder costs, idle time included, at the usual interval, beside a bare loop of NVML calls.

    .venv/bin/python benchmarks/whole.py [--minutes 4] [--beside ANOTHER_CHECKOUT]

The recorder is `python -m gpumon_core record` on the fake NVML library, with 8 GPUs and 64 living processes. The
loop is a process of its own that asks 16 functions of every GPU and then sleeps as long: the caches of both are as
cold. CPU time is that of the process, of all its threads, from one moment between two ticks to the next.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from rig import cpu_s, live, machine, resident_mb

INTERVAL_S, MINUTE_S = 4.0, 60.0
LIMIT_RATIO, LIMIT_MB, LIMIT_TICKS = 8.0, 65.0, 3.0
# Imports, and the jobs that a start and the first minute have.
SETTLES_S = 72.0
BARE = """
import sys, time, pynvml as n
n.nvmlInit()
gpus = [n.nvmlDeviceGetHandleByIndex(index) for index in range(n.nvmlDeviceGetCount())]
CALLS = (
    n.nvmlDeviceGetUtilizationRates, n.nvmlDeviceGetMemoryInfo, n.nvmlDeviceGetPowerUsage,
    n.nvmlDeviceGetEnforcedPowerLimit, n.nvmlDeviceGetPerformanceState, n.nvmlDeviceGetFanSpeed,
    n.nvmlDeviceGetCurrentClocksEventReasons, n.nvmlDeviceGetEncoderUtilization,
    n.nvmlDeviceGetDecoderUtilization, n.nvmlDeviceGetTotalEnergyConsumption,
    n.nvmlDeviceGetComputeRunningProcesses_v3, n.nvmlDeviceGetGraphicsRunningProcesses_v3,
)
CLOCKS = (n.NVML_CLOCK_GRAPHICS, n.NVML_CLOCK_SM, n.NVML_CLOCK_MEM)
while True:
    for gpu in gpus:
        for call in CALLS:
            call(gpu)
        n.nvmlDeviceGetTemperature(gpu, n.NVML_TEMPERATURE_GPU)
        for clock in CLOCKS:
            n.nvmlDeviceGetClockInfo(gpu, clock)
    time.sleep(float(sys.argv[1]))
"""


class Measured:
    """A process, with what it used in every interval so far."""

    def __init__(self, command: list[str], environ: dict[str, str], folder: Path) -> None:
        self._process = subprocess.Popen([sys.executable, *command], env=environ, cwd=folder)
        self.used_ms: list[float] = []
        self.resident_mb: list[float] = []
        self._before = 0.0

    def begin(self) -> None:
        """Forget the start."""
        self._before = cpu_s(self._process.pid)

    def look(self) -> None:
        """Note what it used since it was looked at before."""
        now = cpu_s(self._process.pid)
        self.used_ms.append(1000 * (now - self._before))
        self.resident_mb.append(resident_mb(self._process.pid))
        self._before = now

    def end(self) -> None:
        """Stop it."""
        self._process.terminate()
        self._process.wait()


def report(name: str, recorder: Measured, bare: Measured) -> None:
    """Print what a recorder cost."""
    middle, loop = statistics.median(recorder.used_ms), statistics.median(bare.used_ms)
    mean = statistics.fmean(recorder.used_ms)
    a_minute = round(MINUTE_S / INTERVAL_S)
    # Whatever is done once a minute falls into one interval of them.
    minutes = [recorder.used_ms[at : at + a_minute] for at in range(0, len(recorder.used_ms), a_minute)]
    whole = [one for one in minutes if len(one) == a_minute] or minutes
    job = statistics.median(max(one) - statistics.median(one) for one in whole)
    print(f"{name}: whole process, {len(recorder.used_ms)} intervals of {INTERVAL_S:g} s, CPU time")
    print(f"  bare loop, 16 calls a GPU   {loop:6.2f} ms   (mean {statistics.fmean(bare.used_ms):.2f})")
    print(f"  an interval with a tick     {middle:6.2f} ms   {middle / loop:.1f} times")
    verdict = "within" if mean <= LIMIT_RATIO * loop else "ABOVE"
    print(f"  a tick, with all jobs       {mean:6.2f} ms   {mean / loop:.1f} times   {verdict} {LIMIT_RATIO:g}")
    verdict = "within" if job <= LIMIT_TICKS * middle else "ABOVE"
    print(f"  the job of every minute     {job:6.2f} ms   {job / middle:.1f} ticks   {verdict} {LIMIT_TICKS:g}")
    last = recorder.resident_mb[-1]
    verdict = "within" if last <= LIMIT_MB else "ABOVE"
    print(
        f"  resident at the start, then {recorder.resident_mb[0]:6.1f} MB, {last:.1f} MB   {verdict} {LIMIT_MB:g}"
    )


def measure(minutes: float, checkouts: list[Path], gpus: int = 8, processes: int = 64) -> None:
    """Run a recorder from every checkout beside one loop, and print what they cost."""
    from fake_nvml import environment

    with tempfile.TemporaryDirectory() as folder, machine(Path(folder) / "state", gpus, processes) as fake:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("GPUMON_")}
        environ |= environment(fake) | {"GPUMON_LOG_LEVEL": "ERROR"}
        bare = Measured(["-c", BARE, str(INTERVAL_S)], environ, ROOT)
        recorders = []
        try:
            for number, checkout in enumerate(checkouts):
                mine = {**environ, "GPUMON_DATA_DIR": f"{folder}/{number}"}
                recorders.append(Measured(["-m", "gpumon_core", "record"], mine, checkout))
            started = time.monotonic()
            for number in range(round((SETTLES_S + 60 * minutes) / INTERVAL_S)):
                live(fake, number)
                # Ticks come some time after a start: between two of them is half an interval later.
                time.sleep(max(0.0, started + INTERVAL_S * (number + 0.75) - time.monotonic()))
                for one in (bare, *recorders):
                    if INTERVAL_S * number < SETTLES_S:
                        one.begin()
                    else:
                        one.look()
        finally:
            for one in (bare, *recorders):
                one.end()
    for checkout, recorder in zip(checkouts, recorders, strict=True):
        report(checkout.name, recorder, bare)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument(
        "--beside", type=Path, action="append", default=[], help="another checkout, at the same time"
    )
    options = parser.parse_args()
    measure(options.minutes, [ROOT, *(path.resolve() for path in options.beside)])


if __name__ == "__main__":
    main()
