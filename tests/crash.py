"""Writes ticks as fast as it can, for a test that kills it: `python crash.py DATABASE` then answers each line
on its standard input with a child that writes until it is killed, and prints every second that it committed."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.store import database
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuInfo, GpuReading, HostInfo, ProcessReading, Snapshot

GPUS = (GpuInfo(0, "GPU-0", "Board"), GpuInfo(1, "GPU-1", "Board"))
FIRST = 1_790_000_000
PIDS = range(100, 140)


def tick(now: int) -> Snapshot:
    """A tick of two GPUs; its processes change from one to the next, and some come and go."""
    step = now - FIRST
    processes = tuple(
        ProcessReading(f"GPU-{pid % 2}", pid, "C", 100 + (step + pid) % 7, (step * pid) % 3, 0, 0, 0)
        for pid in PIDS
        if pid < 130 or step // 5 % 2
    )
    readings = tuple(GpuReading(gpu.uuid, {"power": 100.0, "utilization": 50.0}) for gpu in GPUS)
    return Snapshot(now, HostInfo("here"), GPUS, readings, processes)


WHO = {pid: ProcessIdentity(pid, "boot:1", 1.0, "train.py", "ada") for pid in PIDS}


def write(url: str, start: int) -> None:
    """Write from `start` on, and say so after each commit, until killed."""
    writer = Writer(database.open_for_writing(url), "here", "nvml", 1)
    for now in range(start, start + 10**6):
        writer.write(tick(now), WHO)
        os.write(1, b"%d\n" % now)


def main() -> None:
    """Fork a writer for every line `start` that comes in; its PID is the first line that comes out."""
    url = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        # What writing imports is imported once, and not by every child.
        engine = database.open_for_writing(f"sqlite:///{folder}/gpumon.db")
        Writer(engine, "here", "nvml", 1).write(tick(FIRST), WHO)
        engine.dispose()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            write(url, int(line))
        os.write(1, b"pid %d\n" % child)
        os.waitpid(child, 0)
        os.write(1, b"dead\n")


if __name__ == "__main__":
    main()
