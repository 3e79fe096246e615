"""The command line as its users meet it: the real program, and a database for it to read."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import pytest
import sqlalchemy as sa
from conftest import PATIENCE_S, ROOT
from fake_nvml import FakeNvml, environment
from fake_nvml.loading import build

from gpumon_core.__main__ import VERBS, main
from gpumon_core.attribution.records import ProcessIdentity, Program
from gpumon_core.store import database, rollups
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuInfo, GpuReading, HostInfo, ProcessReading, Snapshot

PROGRAM = [sys.executable, "-m", "gpumon_core"]
NOON = 1_763_982_000  # 2025-11-24 12:00 in Berlin, 11:00 UTC.
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31mevil\r\n\u202etxt"
FORMULA = '=cmd|" /C calc"!A0'
HOST = HostInfo("box", "580.159.03", "13.0", "13.580")
GPUS = (
    GpuInfo(0, "GPU-0", "NVIDIA H100 80GB HBM3", 81559, 700.0),
    GpuInfo(1, "GPU-1", "NVIDIA RTX A6000", 49140, 300.0),
)
PEOPLE = {
    7: ProcessIdentity(
        7, "b:7", NOON - 60.5, HOSTILE, "ada", Program(workload="vLLM", model="a:7b", pod="chat-0")
    ),
    9: ProcessIdentity(9, "b:9", NOON - 60.0, FORMULA, "grace", Program(command="train größe", job_id="4711")),
}


def settings(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a machine called box, which reads real histories and has no driver."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GPUMON_")}
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        inherited.pop(name, None)
    own = {"GPUMON_DATA_DIR": str(folder), "GPUMON_HOST_NAME": "box", "GPUMON_SOURCE": "nvml"}
    return {**inherited, **own, "GPUMON_LOG_LEVEL": "ERROR", **more}


def with_driver(folder: Path, fake: FakeNvml) -> dict[str, str]:
    """The environment of a machine called box, whose driver is the fake one."""
    return settings(folder, **environment(fake), GPUMON_SOURCE="auto", GPUMON_LOG_LEVEL="INFO")


def _locale(environ: Mapping[str, str]) -> dict[str, str]:
    """What a Python reads before it runs anything."""
    return {name: value for name, value in environ.items() if name.startswith(("LC_", "LANG", "PYTHON"))}


@cache
def _fork_server() -> Any:
    """A process that has imported the program and forks for each call: a new Python costs ten times as much."""
    context = multiprocessing.get_context("forkserver")
    verbs = [f"gpumon_core.cli.{name}" for name in VERBS.values()]
    context.set_forkserver_preload(["gpumon_core.__main__", *verbs, "pandas", "alembic.command", "cli"])
    with pytest.MonkeyPatch.context() as patched:
        # The linker reads it once. Without a state the fake library says that there is none.
        patched.setenv(
            "LD_LIBRARY_PATH", os.pathsep.join([str(build().parent), os.environ.get("LD_LIBRARY_PATH", "")])
        )
        patched.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
        forkserver.ensure_running()
    return context


def _run(folder: Path, environ: dict[str, str], arguments: Sequence[str]) -> NoReturn:
    """What the fork does: the program, as if it had begun in this environment."""
    os.environ.clear()
    os.environ.update(environ)
    time.tzset()
    os.chdir(ROOT)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    sys.argv = ["gpumon_core", *arguments]
    sys.exit(main())


def gpumon(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program from its start to its end."""
    if _locale(environ) != _locale(os.environ):
        return subprocess.run(
            [*PROGRAM, *arguments],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
    with TemporaryDirectory() as folder:
        process = _fork_server().Process(target=_run, args=(Path(folder), environ, arguments))
        process.start()
        process.join(PATIENCE_S)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(["gpumon", *arguments], PATIENCE_S)
        output = [Path(folder, name).read_text("utf-8") for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(arguments, process.exitcode, *output)


def tick(at: float, number: int = 0) -> Snapshot:
    """Two GPUs and two processes, one of them on both; every tick a little different."""
    readings = tuple(
        GpuReading(
            gpu.uuid,
            {"temperature": 93.0, "utilization": 12.5 + number % 40, "memory": 4000 + number % 7, "power": 250.5},
        )
        for gpu in GPUS
    )
    processes = (
        ProcessReading("GPU-0", 7, "C", 3000 + number % 7, 10),
        ProcessReading("GPU-1", 7, "C", 1000, 5),
        ProcessReading("GPU-1", 9, "C", 2000, 20 + number % 3),
    )
    return Snapshot(at, HOST, GPUS, readings, processes)


def record(
    url: str, ticks: int, step_s: float = 4, begin: float = NOON, interval_s: float | None = None
) -> sa.Engine:
    """So many ticks from `begin` on, rolled up; the engine that wrote them."""
    engine = database.open_for_writing(url)
    writer = Writer(engine, "box", "nvml", interval_s or step_s)
    writer.write_all([(tick(begin + step_s * number, number), PEOPLE) for number in range(ticks)])
    writer.settle()
    rollups.roll_up(engine, "box")
    return engine


def recorded_just_now(folder: Path) -> None:
    """A history whose newest tick is fresh for hours."""
    record(f"sqlite:///{folder / 'gpumon.db'}", 3, 4, time.time() - 12, 3600).dispose()
