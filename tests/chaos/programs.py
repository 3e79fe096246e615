"""The programs that chaos happens to: `gpumon record` and the server, each with a database of its own."""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .stores import Store

ROOT = Path(__file__).resolve().parents[2]
# How long anything is waited for: only what never happens takes so long.
PATIENCE_S = 60.0
# How long a program may take to end after a signal, on a machine with a core for it.
END_WITHIN_S = 10.0

Found = TypeVar("Found")


class Failed(Exception):
    """Something that was promised did not happen; `str()` says what."""


def eventually(condition: Callable[[], Found], what: str, seconds: float = PATIENCE_S) -> Found:
    """The first answer of `condition` that is true of itself. Raises Failed."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise Failed(f"{what}: not within {seconds:g} s")
        time.sleep(0.05)
    return found


def busy() -> float:
    """How many times slower than alone a program runs here now, by how many wait for a core."""
    return min(3.0, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it ends: prctl(2), PR_SET_PDEATHSIG."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process takes: resident memory in MiB, and what its open descriptors are of."""

    memory_mib: float
    opened: tuple[str, ...]

    @property
    def descriptors(self) -> int:
        """How many."""
        return len(self.opened)

    def more_than(self, other: Footprint) -> str:
        """What is open here and was not there, in words."""
        more = Counter(self.opened) - Counter(other.opened)
        return ", ".join(f"{count} x {what}" for what, count in more.most_common(8))


@dataclass(slots=True)
class Life:
    """One process of a program, from its start to its end (seconds of time.monotonic)."""

    pid: int
    began: float
    ended: float | None = None
    # Readings that were in no file when it was killed: nobody can have them.
    lost_by_kill: set[int] = field(default_factory=set)
    footprint: Footprint | None = None
    # What /healthz said last of its recorder.
    vitals: dict[str, Any] = field(default_factory=dict)


class Program:
    """One of them. Its log goes on through its lives."""

    def __init__(
        self, name: str, command: list[str], store: Store, log: Path, environment: dict[str, str]
    ) -> None:
        self.name, self.store, self.log = name, store, log
        self._command, self._environment = command, environment
        self.lives: list[Life] = []
        self.stopped = False
        # Whether it was found not to record: nothing waits for its ticks then.
        self.stuck = False
        self._process: subprocess.Popen[bytes] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def pid(self) -> int:
        """Of the process that runs, or ran last."""
        return self.lives[-1].pid

    @property
    def runs(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    @property
    def ticks_expected(self) -> bool:
        """Whether it should be taking ticks now."""
        return self.runs and not self.stopped and not self.stuck

    def start(self) -> None:
        """Begin another life."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=end_with_parent,  # noqa: PLW1509 - it only asks the kernel
            )
        self.lives.append(Life(self._process.pid, time.monotonic()))
        self.stopped = self.stuck = False

    def signal(self, number: int) -> None:
        """Send it a signal."""
        if self.runs:
            os.kill(self.pid, number)

    def end(self, number: int, seconds: float) -> float | None:
        """End it with a signal; how long it took, or None where it had to be killed after `seconds`."""
        assert self._process is not None
        began = time.monotonic()
        self.signal(signal.SIGCONT)
        self.signal(number)
        took = None
        try:
            self._process.wait(timeout=seconds)
            took = time.monotonic() - began
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.lives[-1].ended = time.monotonic()
        return took

    @property
    def status(self) -> int | None:
        """The exit status of a process that has ended."""
        return None if self._process is None else self._process.poll()

    @property
    def ended_well(self) -> bool:
        """Whether it ended as it should on SIGTERM: by itself, or, as the server, by that signal at last."""
        return self.status in (0, -signal.SIGTERM)

    def footprint(self) -> Footprint:
        """What it takes now."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
        opened = []
        for name in os.listdir(f"/proc/{self.pid}/fd"):
            with suppress(OSError):
                # Sockets and the like have a number of their own.
                opened.append(os.readlink(f"/proc/{self.pid}/fd/{name}").split(":[")[0])
        return Footprint(kib / 1024, tuple(opened))

    def limit(self, what: int, soft: int) -> Callable[[], None]:
        """Set a soft limit of the running process; what is returned gives the old one back."""
        pid, before = self.pid, resource.prlimit(self.pid, what)
        resource.prlimit(pid, what, (soft, before[1]))

        def undo() -> None:
            if self.runs and self.pid == pid:
                resource.prlimit(pid, what, before)

        return undo


class Server(Program):
    """The server, whose /healthz is looked at all the time."""

    def __init__(self, store: Store, log: Path, environment: dict[str, str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(self.port)]
        # Streamlit keeps what a page had for two minutes after its reader has gone.
        command += ["--server.disconnectedSessionTTL", "2"]
        super().__init__("server", command, store, log, environment)
        threading.Thread(target=self._watch, daemon=True).start()

    def get(self, path: str, seconds: float = 5.0) -> tuple[int, bytes]:
        """Status and body of an answer; 0 where nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def health(self) -> dict[str, Any]:
        """What /healthz says; nothing where it does not answer."""
        try:
            return dict(json.loads(self.get("/healthz")[1] or b"{}"))
        except ValueError:
            return {}

    def _watch(self) -> None:
        while True:
            time.sleep(1)
            if self.lives and self.runs and not self.stopped:
                life = self.lives[-1]
                recorder = self.health().get("recorder")
                if recorder and life is self.lives[-1]:
                    life.vitals = recorder


def recorder(store: Store, log: Path, environment: dict[str, str]) -> Program:
    """The recorder that runs alone."""
    return Program("recorder", [sys.executable, "-m", "gpumon_core", "record"], store, log, environment)
