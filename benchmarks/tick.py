"""CPU time of one tick, from the first NVML call to the commit, beside the bare NVML calls; and of a recorder.

Runs the real source, attribution and store on the fake NVML library:

    .venv/bin/python benchmarks/tick.py [--gpus 8] [--processes 64] [--minutes 3]

CPU time is that of this process, user and system; the figures are medians over the ticks. One tick follows another
here, so that all caches are warm. For so many minutes a real recorder is measured at the usual interval: whole.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import pynvml
import whole
from fake_nvml import FakeNvml, loaded
from rig import live, machine

from gpumon_core.attribution.local import LocalAttribution
from gpumon_core.recording.collector import Observer
from gpumon_core.store import database
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.nvml import NvmlSource

LIMIT_MS = 3.0
LIMIT_RATIO = 6.0


def cpu_ms(action: Callable[[], object]) -> float:
    """CPU milliseconds of one call."""
    before = time.process_time_ns()
    action()
    return (time.process_time_ns() - before) / 1e6


def bare_loop(source: NvmlSource, since_us: int) -> None:
    """The calls of one tick through pynvml, with nothing done to their results."""
    for device in source._devices.all:
        handle, plan = device.handle, device.plan
        for call in plan._calls:
            if not call.fallback:
                call.function(handle, *call.arguments)
        for kind in (0, 1, 2):
            pynvml.nvmlDeviceGetSamples(handle, kind, since_us)
        pynvml.nvmlDeviceGetFieldValues(handle, [entry.fieldId for entry in plan._fields.array])
        if plan._gpm is not None:
            pynvml.nvmlGpmSampleGet(handle, plan._gpm._samples[0])
            pynvml.nvmlGpmMetricsGet(plan._gpm._request)
        pynvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
        pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3(handle)
        pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v3(handle)
        pynvml.nvmlDeviceGetProcessesUtilizationInfo(handle, 0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--processes", type=int, default=64)
    parser.add_argument("--ticks", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=3, help="of the whole recorder; 0 leaves it out")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        machine(Path(folder) / "state", options.gpus, options.processes) as fake,
        loaded(fake),
    ):
        measure(fake, Path(folder), options.ticks)
    if options.minutes:
        whole.measure(options.minutes, [ROOT], options.gpus, options.processes)


def measure(fake: FakeNvml, folder: Path, ticks: int) -> None:
    """Take the ticks, a second of simulated time apart."""
    clock = iter(range(1_800_000_000, 2_000_000_000, 4))
    source = NvmlSource("bench", clock=lambda: float(next(clock)))
    observer = Observer(source, LocalAttribution())
    engine = database.open_for_writing(f"sqlite:///{folder / 'bench.db'}")
    writer = Writer(engine, "bench", "nvml", 4)
    parts: dict[str, list[float]] = {"read and identify": [], "write and commit": [], "bare NVML calls": []}
    for _ in range(3):
        observer.observe()
    fake.time_calls = True
    library: dict[str, list[float]] = {"tick": [], "bare": []}

    def inside(name: str, action: Callable[[], float]) -> float:
        """CPU time of an action without what the fake library itself took."""
        before = fake.total_nanoseconds
        took = action()
        own = (fake.total_nanoseconds - before) / 1e6
        library[name].append(own)
        return took - own

    for number in range(ticks + 20):
        taken = []
        since = live(fake, number)
        read = inside("tick", lambda taken=taken: cpu_ms(lambda: taken.append(observer.observe())))
        write = cpu_ms(lambda taken=taken: writer.write(*taken[0]))
        bare = inside("bare", lambda since=since: cpu_ms(lambda: bare_loop(source, since)))
        if number >= 20:
            for name, figure in zip(parts, (read, write, bare), strict=True):
                parts[name].append(figure)
    tick = statistics.median(map(sum, zip(parts["read and identify"], parts["write and commit"], strict=True)))
    bare = statistics.median(parts["bare NVML calls"])
    print(f"{len(fake.gpus)} GPUs, {len(taken[0][0].processes)} processes, {ticks} ticks, medians of CPU time")
    for name, figures in parts.items():
        worst = statistics.quantiles(figures, n=20)[-1]
        print(f"  {name:<20} {statistics.median(figures):7.2f} ms   (p95 {worst:.2f})")
    verdict = "within" if tick <= LIMIT_MS and tick <= LIMIT_RATIO * bare else "ABOVE"
    print(f"  whole tick           {tick:7.2f} ms   {tick / bare:.1f} times the bare calls")
    print(f"  {verdict} {LIMIT_MS} ms and {LIMIT_RATIO} times")
    observer.close()
    engine.dispose()


if __name__ == "__main__":
    main()
