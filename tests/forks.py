"""Programs that begin as forks of a process that has imported what they need; that takes a new Python seconds."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NoReturn

from fake_nvml.loading import build

from gpumon_core.__main__ import VERBS, main

PR_SET_PDEATHSIG = 1  # linux/prctl.h
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
IMPORTED = [
    *("forks", *(f"gpumon_core.cli.{name}" for name in VERBS.values())),
    *("alembic.command", "pandas", "pyarrow.parquet", "plotly.graph_objects", "sqlalchemy.dialects.sqlite"),
    *("streamlit.web.cli", "streamlit.web.bootstrap", "streamlit.web.server", "streamlit.starlette", "uvicorn"),
    *("gpumon_core.api", "gpumon_core.figures", "gpumon_core.prometheus.exposition"),
    *("gpumon_core.recording.runtime", "gpumon_core.store.queries.frames", "gpumon_core.simulation.past"),
]


@cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    before = {name: os.environ.get(name) for name in ("LD_LIBRARY_PATH", "PYTHONPATH")}
    # The linker reads its path once. The fake library without a state says that there is no driver.
    libraries = [before["LD_LIBRARY_PATH"] or ""]
    # Without a compiler there is no such library, and only the tests that need one fail.
    with suppress(RuntimeError):
        libraries.insert(0, str(build().parent))
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(HERE)])
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    return context


def _inherited() -> tuple[int, list[tuple[int, tuple[int, int]]]]:
    """What a process has from the one that begins it: the mask of its files' modes, and its limits."""
    os.umask(mask := os.umask(0))
    return mask, [(which, resource.getrlimit(which)) for which in (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)]


def _begin(
    command: Sequence[str],
    environ: dict[str, str],
    output: Sequence[str],
    mask: int,
    limits: Sequence[tuple[int, tuple[int, int]]],
) -> NoReturn:
    """What the fork does: the program, as if it had begun with this environment and these files."""
    # However the tests end, it is killed with the server, which notices that by a pipe that is not held here.
    os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.umask(mask)
    for limit in limits:
        resource.setrlimit(*limit)
    os.environ.clear()
    os.environ.update(environ)
    time.tzset()
    os.chdir(ROOT)
    for number, path in zip((1, 2), output, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (
        os.fdopen(number, "w", buffering, closefd=False) for number, buffering in ((1, -1), (2, 1))
    )
    sys.path[:] = [
        str(ROOT),
        *(path for path in sys.path if not path.startswith(str(ROOT)) or "site-packages" in path),
    ]
    sys.argv = list(command)
    status: Any = 1
    try:
        if command[0] == "streamlit":
            from streamlit.web import cli

            cli.main(prog_name="streamlit")
        else:
            status = main(command[1:])
    except SystemExit as ending:
        status = ending.code
        raise
    finally:
        # What multiprocessing leaves out.
        atexit._run_exitfuncs()
    sys.exit(status)


class Fork:
    """A program that was forked, as subprocess.Popen would show it: `gpumon_core VERB` or `streamlit run`."""

    def __init__(self, command: Sequence[str], environ: dict[str, str], *output: Path) -> None:
        given = command, environ, [str(path) for path in output], *_inherited()
        self._process = _server().Process(target=_begin, args=given)
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        status: int | None = self._process.exitcode
        return status

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired("a fork", timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
