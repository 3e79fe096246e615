"""CPU time of one tick, from the first NVML call to the commit, beside the bare NVML calls.

Runs the real source, attribution and store on the fake NVML library:

    .venv/bin/python benchmarks/tick.py [--gpus 8] [--processes 64]

CPU time is that of this process, user and system; the figures are medians over the ticks.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pynvml
from fake_nvml import FakeNvml, loaded

from gpumon_core.attribution.local import LocalAttribution
from gpumon_core.observer import Observer
from gpumon_core.store import database
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.nvml import NvmlSource

LIMIT_MS = 5.0


def cpu_ms(action: Callable[[], object]) -> float:
    """CPU milliseconds of one call."""
    before = time.process_time_ns()
    action()
    return (time.process_time_ns() - before) / 1e6


def recorded(source: NvmlSource) -> list[tuple[Callable[..., object], tuple[object, ...]]]:
    """The NVML functions that one tick calls, with their arguments, in order."""
    made: list[tuple[Callable[..., object], tuple[object, ...]]] = []
    find = pynvml._nvmlGetFunctionPointer

    def spy(name: str) -> Callable[..., object]:
        function = find(name)

        def call(*arguments: object) -> object:
            made.append((function, arguments))
            return function(*arguments)

        return call

    pynvml._nvmlGetFunctionPointer = spy
    try:
        source.read()
    finally:
        pynvml._nvmlGetFunctionPointer = find
    return made


def bare_loop(calls: list[tuple[Callable[..., object], tuple[object, ...]]]) -> None:
    """The same calls once more, with nothing done to their results."""
    for function, arguments in calls:
        function(*arguments)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--processes", type=int, default=64)
    parser.add_argument("--ticks", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fake = FakeNvml(Path(folder) / "state")
        gpus = [fake.add_gpu(name=f"Board {index}") for index in range(options.gpus)]
        running = [subprocess.Popen(["sleep", "600"]) for _ in range(options.processes)]
        try:
            for position, process in enumerate(running):
                gpus[position % len(gpus)].add_process(process.pid, (position + 1) << 25)
            with loaded(fake):
                measure(fake, Path(folder), options.ticks)
        finally:
            for process in running:
                process.kill()
            for process in running:
                process.wait()


def measure(fake: FakeNvml, folder: Path, ticks: int) -> None:
    """Take the ticks, a second of simulated time apart."""
    clock = iter(range(1_800_000_000, 2_000_000_000))
    source = NvmlSource("bench", clock=lambda: float(next(clock)))
    observer = Observer(source, LocalAttribution())
    engine = database.open_for_writing(f"sqlite:///{folder / 'bench.db'}")
    writer = Writer(engine, "bench", "nvml", 1)
    parts: dict[str, list[float]] = {"read and identify": [], "write and commit": [], "bare NVML calls": []}
    observer.observe()
    calls = recorded(source)
    fake.time_calls = True
    for number in range(ticks + 20):
        taken = []
        read = cpu_ms(lambda taken=taken: taken.append(observer.observe()))
        write = cpu_ms(lambda taken=taken: writer.write(*taken[0]))
        bare = cpu_ms(lambda: bare_loop(calls))
        if number >= 20:
            for name, figure in zip(parts, (read, write, bare), strict=True):
                parts[name].append(figure)
    tick = statistics.median(map(sum, zip(parts["read and identify"], parts["write and commit"], strict=True)))
    bare = statistics.median(parts["bare NVML calls"])
    print(f"{len(fake.gpus)} GPUs, {len(taken[0][0].processes)} processes, {ticks} ticks, medians of CPU time")
    for name, figures in parts.items():
        worst = statistics.quantiles(figures, n=20)[-1]
        print(f"  {name:<20} {statistics.median(figures):7.2f} ms   (p95 {worst:.2f})")
    verdict = "within" if tick <= LIMIT_MS else "ABOVE"
    print(
        f"  whole tick           {tick:7.2f} ms   {verdict} {LIMIT_MS} ms; {tick / bare:.1f} times the bare calls"
    )
    observer.close()
    engine.dispose()


if __name__ == "__main__":
    main()
