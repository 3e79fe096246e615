"""A PostgreSQL server that can be stopped and started, of the run's own."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import postgres
import psycopg

from .programs import end_with_parent, eventually


class Cluster:
    """The server, with one database for both programs."""

    def __init__(self, server: postgres.Postgres, url: str) -> None:
        self._server, self.url = server, url
        with psycopg.connect(url.replace("+psycopg", "")) as connection:
            row = connection.execute("SHOW data_directory").fetchone()
            assert row is not None
            self._folder = Path(row[0])
        self._command = [os.fsdecode(part) for part in self._read("cmdline").split(b"\0")[:-1]]
        self._user = os.stat(f"/proc/{self._postmaster}").st_uid
        self._again: subprocess.Popen[bytes] | None = None

    def _read(self, name: str) -> bytes:
        return Path(f"/proc/{self._postmaster}/{name}").read_bytes()

    @property
    def _postmaster(self) -> int:
        return int((self._folder / "postmaster.pid").read_text().split()[0])

    def processes(self) -> list[int]:
        """The PIDs of the server's processes, the first of them first."""
        first = self._postmaster
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        return [first, *map(int, children)]

    def stop(self) -> None:
        """End it, whoever is connected."""
        first = self._postmaster
        os.kill(first, signal.SIGINT)
        if self._again is not None:
            self._again.wait(60)
        eventually(lambda: not (self._folder / "postmaster.pid").exists(), "the database server ends")
        with suppress(ProcessLookupError):
            os.kill(first, signal.SIGKILL)

    def start(self) -> None:
        """Start it again, and wait until it answers."""
        self._again = subprocess.Popen(
            self._command,
            cwd=self._folder,
            user=self._user if os.geteuid() == 0 else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - it only asks the kernel
        )

        def answers() -> bool:
            with suppress(psycopg.Error):
                self._server.execute("SELECT 1")
                return True
            return False

        eventually(answers, "the database server answers again")

    def close(self) -> None:
        """End what was started here; what was there before ends by itself."""
        with suppress(OSError):
            for pid in self.processes():
                os.kill(pid, signal.SIGCONT)
        if self._again is not None and self._again.poll() is None:
            self.stop()


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A new one. Raises RuntimeError where PostgreSQL is not installed."""
    found = postgres.binaries()
    if found is None:
        raise RuntimeError("no PostgreSQL server is installed")
    with postgres.running(found) as server:
        server.execute("CREATE DATABASE chaos")
        made = Cluster(server, server.url("chaos"))
        try:
            yield made
        finally:
            made.close()
