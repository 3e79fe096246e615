"""A PostgreSQL server of the tests' own: made from nothing in about a second, and gone with the session."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from rig import free_port

# Lasting nothing makes it fast.
# A server that has not started then never will, however busy the machine is.
STARTS_WITHIN_S = 300
OPTIONS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "shared_buffers": "16MB",
    "listen_addresses": "127.0.0.1",
}

# Stops the server and removes its folder when the pipe to pytest closes, which a crash does too.
GUARD = """
folder=$1
shift
"$@" </dev/null &
read -r _
kill -QUIT $!
wait
rm -rf "$folder"
"""


@dataclass(frozen=True, slots=True)
class Postgres:
    """A running server, whose databases anybody on this machine may use."""

    port: int
    folder: Path

    def processes(self) -> list[int]:
        """The server's processes, the one that started the others first."""
        first = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        children = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                # After the name, which may hold anything: the state and the parent.
                if int(path.read_text().rpartition(")")[2].split()[1]) == first:
                    children.append(int(path.parent.name))
        return [first, *children]

    @contextmanager
    def silent(self) -> Iterator[None]:
        """The server hangs: its kernel accepts connections and takes what is sent, and nobody answers."""
        stopped = []
        try:
            # Nobody new is started once the first is stopped.
            for pid in (self.processes()[0], *self.processes()[1:]):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    stopped.append(pid)
            yield
        finally:
            for pid in stopped:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def crash(self) -> None:
        """One of its sessions is killed: all others end, and it starts anew from its log."""
        with psycopg.connect(
            host="127.0.0.1", port=self.port, user="gpumon", dbname="postgres", autocommit=True
        ) as connection:
            # With these OPTIONS a commit may still be in memory alone.
            connection.execute("CHECKPOINT")
            os.kill(connection.info.backend_pid, signal.SIGKILL)
            with suppress(psycopg.OperationalError):
                while True:
                    connection.execute("SELECT 1")

    def url(self, name: str) -> str:
        """The URL of one of its databases, as GPUMON_DATABASE_URL takes it."""
        return f"postgresql+psycopg://gpumon@127.0.0.1:{self.port}/{name}"

    def execute(self, statement: str) -> None:
        """Run one statement outside of any transaction, as the superuser that owns everything."""
        with psycopg.connect(
            host="127.0.0.1", port=self.port, user="gpumon", dbname="postgres", autocommit=True
        ) as connection:
            connection.execute(statement.encode())

    def empty(self, name: str) -> str:
        """The URL of a database of this name without anything in it: what was there is dropped, with whoever is
        connected. That costs a fifth of a new one."""
        place = {"host": "127.0.0.1", "port": self.port, "user": "gpumon"}
        with psycopg.connect(**place, dbname="postgres", autocommit=True) as connection:
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchall():
                connection.execute(f"CREATE DATABASE {name}".encode())
                return self.url(name)
            connection.execute(f"ALTER DATABASE {name} RESET ALL".encode())
            connection.execute(
                "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE datname = %s", (name,)
            )
        with psycopg.connect(**place, dbname=name, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
            connection.execute("GRANT USAGE ON SCHEMA public TO PUBLIC")
        return self.url(name)

    @contextmanager
    def database(self) -> Iterator[str]:
        """The URL of a new database, dropped afterwards whoever is still connected."""
        name = f"gpumon_{uuid.uuid4().hex[:12]}"
        self.execute(f"CREATE DATABASE {name}")
        try:
            yield self.url(name)
        finally:
            self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def binaries() -> Path | None:
    """The folder of the newest `initdb` and `postgres` installed, on the PATH or where Debian has them."""
    on_path = shutil.which("initdb")
    if on_path is not None:
        return Path(on_path).resolve().parent
    found = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((path.parent for path in found), key=_version, default=None)


def _version(folder: Path) -> int:
    digits = re.match(r"\d+", folder.parent.name)
    return int(digits[0]) if digits else 0


@contextmanager
def running(bin_dir: Path) -> Iterator[Postgres]:
    """Start a server with the programs of `bin_dir`; it ends with the block, or with this process."""
    folder = Path(tempfile.mkdtemp(prefix="gpumon-pg-"))
    log = folder / "log"
    identity: dict[str, Any] = {}
    if os.geteuid() == 0:
        # PostgreSQL refuses to run as root.
        user = _unprivileged()
        identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        os.chown(folder, user.pw_uid, user.pw_gid)
    data = str(folder / "data")
    making = [str(bin_dir / "initdb"), "-D", data, "-U", "gpumon", "--auth=trust", "--no-sync"]
    making += ["--locale=C", "--encoding=UTF8"]
    try:
        subprocess.run(making, cwd=folder, check=True, capture_output=True, text=True, **identity)
    except subprocess.CalledProcessError as error:
        shutil.rmtree(folder)
        raise RuntimeError(f"initdb failed: {error.stderr}") from error
    server = Postgres(free_port(), folder)
    options = OPTIONS | {"port": str(server.port), "unix_socket_directories": str(folder)}
    command = [str(bin_dir / "postgres"), "-D", data]
    command += [f"--{name}={value}" for name, value in options.items()]
    with log.open("wb") as output:
        guard = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, "guard", str(folder), *command],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C is for pytest, which ends the server when the tests have given their databases back.
            start_new_session=True,
            **identity,
        )
    try:
        _wait(server, log)
        yield server
    finally:
        guard.communicate()


def _unprivileged() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _wait(server: Postgres, log: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_S
    while True:
        try:
            return server.execute("SELECT 1")
        except psycopg.OperationalError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"no PostgreSQL after {STARTS_WITHIN_S:g} s: {error}\n{log.read_text()}"
                ) from error
        time.sleep(0.05)
