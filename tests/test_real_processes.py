"""The ledger on processes that really run: the fake driver, /proc as it is, small servers, a real database."""

from __future__ import annotations

import ctypes
import gc
import http.server
import json
import os
import pickle
import pwd
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually
from fake_nvml import FakeNvml, loaded

from gpumon_core.attribution import describe
from gpumon_core.attribution.cgroups import Placement
from gpumon_core.attribution.describe import Describer
from gpumon_core.attribution.inquirer import Inquirer
from gpumon_core.attribution.local import LocalAttribution
from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.recording.collector import Observer
from gpumon_core.store import database
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.nvml import NvmlSource

MIB = 1 << 20
DAWN = 1_800_000_000
SLEEP = shutil.which("sleep") or "/bin/sleep"
# Without letting other threads run in between, in the child too.
LIBC = ctypes.PyDLL(None, use_errno=True)
SYS_CLONE3, CLONE_VFORK = 435, 0x4000
# The kernel counts a process's start in these.
CLOCK_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can choose a PID or become another user")


class Machine:
    """The recording path over a fake driver, on a clock that moves by an interval with each tick."""

    def __init__(
        self,
        fake: FakeNvml,
        url: str,
        interval_s: float = 4,
        inquirer: Inquirer | None = None,
        attribution: Any = None,
    ) -> None:
        self.fake = fake
        self.now = float(DAWN)
        self.interval_s = interval_s
        self.attribution = attribution or LocalAttribution(trusted=True, describer=Describer())
        self.inquirer = inquirer
        self.observer = Observer(NvmlSource("here", clock=lambda: self.now), self.attribution, inquirer)
        self.engine = database.open_for_writing(url)
        self.writer = Writer(self.engine, "here", "nvml", interval_s)

    def tick(self) -> None:
        self.now += self.interval_s
        snapshot, identities = self.observer.observe()
        assert self.writer.write(replace(snapshot, elapsed=self.now), identities)

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.exec_driver_sql(query)]

    def close(self) -> None:
        self.observer.close()
        self.engine.dispose()


@pytest.fixture
def machine(fake: FakeNvml, database_url: str) -> Iterator[Callable[..., Machine]]:
    """Makes the machine, once the fake driver has its GPUs."""
    made: list[Machine] = []

    def make(**options: Any) -> Machine:
        made.append(Machine(fake, database_url, **options))
        return made[-1]

    with loaded(fake):
        yield make
        for each in made:
            each.close()


def start(program: str | Path = SLEEP) -> subprocess.Popen[bytes]:
    """A process that runs the program for good; what it is called is settled before this returns."""
    process = subprocess.Popen([str(program), "600"])
    settle(process.pid, program)
    return process


def settle(pid: int, program: str | Path) -> None:
    """Wait until the process is called as the program."""
    name = Path(program).name[:15]
    while Path(f"/proc/{pid}/comm").read_text().strip() != name:
        time.sleep(0.0005)


class CloneArgs(ctypes.Structure):
    """`struct clone_args` of clone3(2)."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("flags", "pidfd", "child_tid", "parent_tid", "exit_signal")),
        *((name, ctypes.c_uint64) for name in ("stack", "stack_size", "tls", "set_tid", "set_tid_size", "cgroup")),
    ]


class Clone:
    """A process that the kernel was asked to give this PID, as when its numbers have gone round."""

    def __init__(self, pid: int, program: str | Path) -> None:
        wanted = ctypes.c_int(pid)
        arguments = (ctypes.c_char_p * 3)(os.fsencode(program), b"600", None)
        options = CloneArgs(
            exit_signal=signal.SIGCHLD, set_tid=ctypes.addressof(wanted), set_tid_size=1, flags=CLONE_VFORK
        )
        self.pid = LIBC.syscall(SYS_CLONE3, ctypes.byref(options), ctypes.sizeof(options))
        if self.pid == 0:
            LIBC.execv(arguments[0], arguments)
            LIBC._exit(127)
        if self.pid < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        os.waitpid(self.pid, 0)


Process = subprocess.Popen[bytes] | Clone


def start_as(pid: int, program: str | Path = SLEEP) -> Clone:
    """The same under the PID of a process that has ended. Raises FileExistsError where another has it by now."""
    process = Clone(pid, program)
    settle(pid, program)
    return process


def end(process: Process) -> None:
    process.kill()
    process.wait()


@pytest.fixture
def programs(tmp_path: Path) -> tuple[Path, Path]:
    """Two programs by different names."""
    for name in ("first", "second"):
        shutil.copy(SLEEP, tmp_path / name)
    return tmp_path / "first", tmp_path / "second"


# ---- Whose history it is -----------------------------------------------------------------------------


@needs_root
def test_two_processes_under_one_pid_are_two_rows_even_between_two_ticks(
    fake: FakeNvml, machine: Callable[..., Machine], programs: tuple[Path, Path]
) -> None:
    gpu = fake.add_gpu()
    here = machine(interval_s=1)
    first = start(programs[0])
    gpu.add_process(first.pid, 1000 * MIB)
    here.tick()
    time.sleep(2 * CLOCK_TICK_S)
    end(first)
    # The driver lists the same number: only their starts differ.
    second = start_as(first.pid, programs[1])
    try:
        here.tick()
        here.tick()
    finally:
        end(second)
    rows = here.ask(
        "SELECT pid, name, max_memory, sample_count, last_seen - first_seen FROM gpu_processes ORDER BY id"
    )
    assert rows == [(first.pid, "first", 1000, 1, 0), (first.pid, "second", 1000, 2, 1)]
    starts = here.ask("SELECT start_time FROM gpu_processes ORDER BY id")
    assert starts[0][0] < starts[1][0]
    assert here.ask("SELECT count(DISTINCT start_key) FROM gpu_processes") == [(2,)]
    here.writer.settle()
    assert here.ask("SELECT process_id, seconds FROM process_hours ORDER BY 1") == [(1, 1.0), (2, 2.0)]
    assert here.ask("SELECT process_id, active FROM process_gpus ORDER BY 1") == [(1, 0), (2, 1)]


@needs_root
def test_a_pid_that_is_reused_while_no_recorder_runs_is_another_row(
    fake: FakeNvml, machine: Callable[..., Machine], programs: tuple[Path, Path]
) -> None:
    gpu = fake.add_gpu()
    before = machine()
    first = start(programs[0])
    gpu.add_process(first.pid, 1000 * MIB)
    before.tick()
    before.close()
    time.sleep(2 * CLOCK_TICK_S)
    end(first)
    second = start_as(first.pid, programs[1])
    try:
        after = machine()
        after.now = before.now
        after.tick()
    finally:
        end(second)
    rows = after.ask(
        "SELECT name, p.sample_count, active FROM gpu_processes p JOIN process_gpus ON id = process_id ORDER BY id"
    )
    assert rows == [("first", 1, 0), ("second", 1, 1)]


def test_one_process_on_two_gpus_is_one_row_with_two_usages(
    fake: FakeNvml, machine: Callable[..., Machine]
) -> None:
    one, two = fake.add_gpu(gpu_utilization=60), fake.add_gpu(gpu_utilization=20)
    here = machine()
    process = start()
    try:
        one.add_process(process.pid, 3000 * MIB, sm=60)
        two.add_process(process.pid, 500 * MIB, sm=20)
        for _ in range(5):
            here.tick()
    finally:
        end(process)
    here.writer.settle()
    assert here.ask("SELECT pid, max_memory, sample_count FROM gpu_processes") == [(process.pid, 3500, 5)]
    query = "SELECT gpu_id, max_memory, sample_count, seconds, busy_s, max_sm FROM process_gpus ORDER BY gpu_id"
    assert here.ask(query) == [(1, 3000, 5, 20.0, 12.0, 60), (2, 500, 5, 20.0, 4.0, 20)]
    assert here.ask("SELECT gpu_id, busy_s FROM process_hours ORDER BY 1") == [(1, 12.0), (2, 4.0)]


def in_memory(here: Machine) -> dict[str, int]:
    """How much the parts of a tick keep in mind."""
    writer, attribution = here.writer, here.attribution
    rows = writer._processes
    found = {
        name: len(getattr(rows, name)) for name in ("known", "_running", "_unloaded", "live", "here", "_ended")
    }
    found["gpus"] = len(writer._machine.gpus)
    found |= {"identities": len(attribution._known), "handles": len(attribution._handles)}
    found |= {"named": len(here.observer._named), "open files": len(os.listdir("/proc/self/fd"))}
    if here.inquirer is not None:
        found["asked"] = len(here.inquirer._subjects)
    return found


@needs_root
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_thousand_short_processes_an_hour_are_a_thousand_rows_and_nothing_stays_in_memory(
    fake: FakeNvml, machine: Callable[..., Machine]
) -> None:
    """One that stays, beside a thousand that live for a tick, every other under the PID of the one before."""
    gpu = fake.add_gpu(gpu_utilization=50)
    here = machine(interval_s=3.6, inquirer=Inquirer())
    steady = start()
    gpu.add_process(steady.pid, 100 * MIB, sm=10)
    pid, sizes, memory = 0, [], []
    # Of a fixed size, so that what this test notes is not taken for a tick's.
    pids, work = array("q", bytes(8 * 1000)), array("q", bytes(8 * 1000))
    # What the database has to do for a tick, in steps of ten of SQLite's instructions: no clock says that.
    steps = array("q", [0])

    def step() -> None:
        steps[0] += 1

    with here.engine.connect() as connection:
        pooled = connection.connection.dbapi_connection
        assert isinstance(pooled, sqlite3.Connection)
        pooled.set_progress_handler(step, 10)
    try:
        for number in range(1000):
            process: Process = start_as(pid) if number % 2 else start()
            pid = process.pid
            pids[number] = pid
            entry = gpu.add_process(pid, (number + 1) * MIB, sm=40)
            steps[0] = 0
            here.tick()
            work[number] = steps[0]
            if number % 2 == 0:
                # Numbers go round in hours. That two begin within a hundredth of a second is no part of this.
                time.sleep(CLOCK_TICK_S)
            end(process)
            entry.remove()
            if number in (200, 600, 999):
                gc.collect()
                sizes.append(in_memory(here))
                memory.append(sys.getallocatedblocks())
    finally:
        end(steady)
    here.tick()
    # Each of them was seen once, with its own memory: nobody was taken for another.
    query = "SELECT pid, sample_count, max_memory FROM gpu_processes WHERE pid <> {} ORDER BY id"
    assert here.ask(query.format(steady.pid)) == [(pid, 1, number + 1) for number, pid in enumerate(pids)]
    assert len(set(pids)) < 600, "most of the numbers were used twice"
    assert here.ask(f"SELECT sample_count FROM gpu_processes WHERE pid = {steady.pid}") == [(1001,)]
    assert sizes[0] == sizes[1] == sizes[2]
    assert min(work) > 0
    assert statistics.median(work[-200:]) < 1.2 * statistics.median(work[100:300])
    # 800 processes later: less than one of Python's objects for each.
    assert memory[2] - memory[0] < 400, memory


@contextmanager
def forking_server(folder: Path) -> Iterator[Callable[[], list[int]]]:
    """A server whose workers are forks of itself, eight at a time; each call replaces them by eight others."""
    path = folder / "server.py"
    path.write_text(
        "import os, signal, sys, time\n"
        "children = []\n"
        "while sys.stdin.readline():\n"
        "    for child in children:\n"
        "        os.kill(child, signal.SIGKILL)\n"
        "        os.waitpid(child, 0)\n"
        "    children = []\n"
        "    for _ in range(8):\n"
        "        child = os.fork()\n"
        "        if child == 0:\n"
        "            time.sleep(600)\n"
        "        children.append(child)\n"
        "    print(*children, flush=True)\n"
    )
    server = subprocess.Popen(
        [sys.executable, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    workers: list[int] = []

    def renew() -> list[int]:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write("\n")
        server.stdin.flush()
        workers[:] = map(int, server.stdout.readline().split())
        return list(workers)

    try:
        yield renew
    finally:
        for pid in workers:
            os.kill(pid, 9)
        server.kill()
        server.wait()


def test_the_workers_of_a_server_that_forks_are_rows_of_their_own_and_one_program(
    fake: FakeNvml, machine: Callable[..., Machine], tmp_path: Path
) -> None:
    gpu = fake.add_gpu()
    here = machine()
    seen: list[int] = []
    with forking_server(tmp_path) as renew:
        for _ in range(5):
            entries = [gpu.add_process(pid, 100 * MIB) for pid in renew()]
            seen += [entry.pid for entry in entries]
            here.tick()
            here.tick()
            for entry in entries:
                entry.remove()
    here.tick()
    assert here.ask("SELECT count(*), min(sample_count), max(sample_count) FROM gpu_processes") == [(40, 2, 2)]
    assert sorted(pid for (pid,) in here.ask("SELECT pid FROM gpu_processes")) == sorted(seen)
    assert here.ask("SELECT count(DISTINCT name), count(*) FROM programs, gpu_processes") == [(1, 40)]
    assert here.ask("SELECT count(*) FROM process_gpus WHERE active = 1") == [(0,)]
    assert not here.writer._processes.live
    assert not here.attribution._known


# ---- Those that may not be looked at -----------------------------------------------------------------


class AsNobody:
    """Attribution as an unprivileged recorder does it: each time in a child that has become another user."""

    def identify(self, pids: set[int], timestamp: float) -> dict[int, ProcessIdentity]:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setgroups([])
                os.setgid(pwd.getpwnam("nobody").pw_gid)
                os.setuid(pwd.getpwnam("nobody").pw_uid)
                found = LocalAttribution(trusted=True, describer=Describer(ask=False)).identify(pids, timestamp)
                os.write(writing, pickle.dumps(found))
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            content = pipe.read()
        os.waitpid(child, 0)
        return pickle.loads(content)

    def close(self) -> None:
        pass


@needs_root
def test_of_another_users_process_everything_that_the_driver_reports_is_stored(
    fake: FakeNvml, machine: Callable[..., Machine]
) -> None:
    gpu = fake.add_gpu(gpu_utilization=30)
    here = machine(attribution=AsNobody())
    process = start()
    try:
        gpu.add_process(process.pid, 700 * MIB, sm=30)
        here.tick()
        here.tick()
    finally:
        end(process)
    here.writer.settle()
    query = "SELECT pid, name, username, max_memory, sample_count, start_key IS NOT NULL FROM gpu_processes"
    assert [tuple(row) for row in here.ask(query)] == [(process.pid, "sleep", "root", 700, 2, True)]
    assert here.ask("SELECT executable, working_directory FROM programs") == [(None, None)]
    assert here.ask("SELECT kind, memory, sm_utilization, busy_s FROM process_gpus") == [("C", 700, 30, 2.4)]


def test_without_the_hosts_pids_everything_that_the_driver_reports_is_stored(
    fake: FakeNvml, machine: Callable[..., Machine]
) -> None:
    gpu = fake.add_gpu(gpu_utilization=30)
    here = machine(attribution=LocalAttribution(trusted=False))
    gpu.add_process(os.getpid(), 700 * MIB, sm=30, name="/opt/conda/bin/python3.12")
    here.tick()
    here.tick()
    here.writer.settle()
    query = "SELECT pid, name, username, max_memory, sample_count, start_key FROM gpu_processes"
    assert here.ask(query) == [(os.getpid(), "python3.12", None, 700, 2, None)]
    assert here.ask("SELECT kind, memory, sm_utilization, busy_s FROM process_gpus") == [("C", 700, 30, 2.4)]


# ---- Servers that are asked --------------------------------------------------------------------------


class Endpoint:
    """A small server that answers as Ollama or vLLM do; it can be made silent."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.silent = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                while outer.silent.is_set():
                    time.sleep(0.05)
                body = json.dumps(outer.answers.get(self.path, {})).encode()
                self.send_response(200 if self.path in outer.answers else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.silent.clear()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.close()


@contextmanager
def called(folder: Path, name: str, *arguments: str, **environment: str) -> Iterator[int]:
    """A real process whose arguments and environment are those of a model server; its PID."""
    path = folder / name
    path.write_text("import time\nprint('here', flush=True)\ntime.sleep(600)\n")
    process = subprocess.Popen(
        [sys.executable, str(path), *arguments], stdout=subprocess.PIPE, env=os.environ | environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


SESSIONS = "SELECT model, max_memory, active, last_seen - first_seen FROM model_sessions ORDER BY id"


def until(here: Machine, condition: Callable[[], bool]) -> None:
    """Ticks, until it is so."""
    eventually(lambda: condition() or here.tick(), every_s=0.02)


def test_each_model_that_is_loaded_swapped_and_dropped_has_its_span(
    fake: FakeNvml, machine: Callable[..., Machine], endpoint: Endpoint, tmp_path: Path
) -> None:
    gpu = fake.add_gpu()
    here = machine(inquirer=Inquirer(every_s=0.05))
    endpoint.answers["/v1/models"] = {"data": [{"id": "org/one-7b"}]}
    with called(tmp_path, "vllm", "serve", "org/one-7b", "--port", str(endpoint.port)) as pid:
        entry = gpu.add_process(pid, 9000 * MIB)
        here.tick()
        until(here, lambda: here.ask(SESSIONS) != [])
        first = here.ask("SELECT first_seen FROM model_sessions")
        assert first == here.ask("SELECT first_seen FROM gpu_processes"), "it came with its server"
        endpoint.answers["/v1/models"] = {"data": [{"id": "org/two-70b"}]}
        entry.memory = 40_000 * MIB
        until(here, lambda: len(here.ask(SESSIONS)) == 2)
        endpoint.answers["/v1/models"] = {"data": []}
        entry.memory = 500 * MIB
        until(here, lambda: here.ask("SELECT sum(active) FROM model_sessions") == [(0,)])
        here.tick()
        entry.remove()
    here.tick()
    spans = here.ask("SELECT model, first_seen, last_seen, max_memory, active FROM model_sessions ORDER BY id")
    assert [(model, active) for model, _, _, _, active in spans] == [("org/one-7b", 0), ("org/two-70b", 0)]
    assert spans[0][2] < spans[1][1], "one after the other"
    assert spans[1][3] == 40_000
    assert len(here.ask("SELECT id FROM gpu_processes")) == 1, "one process all the while"


def test_each_of_ollamas_runners_has_the_span_of_its_model(
    fake: FakeNvml, machine: Callable[..., Machine], endpoint: Endpoint, tmp_path: Path
) -> None:
    gpu = fake.add_gpu()
    here = machine(inquirer=Inquirer(every_s=0.05))
    endpoint.answers["/api/ps"] = {
        "models": [
            {"name": "qwen3:14b", "size_vram": 9000 * MIB},
            {"name": "gemma3:1b", "size_vram": 900 * MIB},
        ]
    }
    host = f"127.0.0.1:{endpoint.port}"
    with (
        called(tmp_path, "ollama", "runner", "--ollama-engine", "--port", "1", OLLAMA_HOST=host) as large,
        called(tmp_path, "ollama", "runner", "--ollama-engine", "--port", "2", OLLAMA_HOST=host) as small,
    ):
        gpu.add_process(large, 9300 * MIB)
        entry = gpu.add_process(small, 1100 * MIB)
        here.tick()
        until(here, lambda: len(here.ask(SESSIONS)) == 2)
        query = "SELECT pid, model FROM model_sessions s JOIN gpu_processes p ON p.id = s.process_id"
        assert dict(here.ask(query)) == {large: "qwen3:14b", small: "gemma3:1b"}
        entry.remove()
    here.tick()
    assert here.ask("SELECT model FROM model_sessions WHERE active = 0") == [("gemma3:1b",)]


connected_by: list[str] | None = None


def _heard(event: str, _: tuple[object, ...]) -> None:
    if event == "socket.connect" and connected_by is not None:
        connected_by.append(threading.current_thread().name)


sys.addaudithook(_heard)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_tick_never_waits_for_a_socket(
    fake: FakeNvml,
    machine: Callable[..., Machine],
    endpoint: Endpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model server and a container engine that take the connection and then say nothing."""
    global connected_by  # noqa: PLW0603 - a hook cannot be taken back
    engine = socket.socket(socket.AF_UNIX)
    engine.bind(str(tmp_path / "engine.sock"))
    engine.listen()
    endpoint.silent.set()
    gpu = fake.add_gpu()
    here = machine(inquirer=Inquirer(container_socket=str(tmp_path / "engine.sock")))
    inside = Placement(container_engine="docker", container_id="a1" * 32)
    monkeypatch.setattr(describe, "placement", lambda _: inside)
    with called(tmp_path, "vllm", "serve", "org/one-7b", "--port", str(endpoint.port)) as pid:
        gpu.add_process(pid, 9000 * MIB)
        connected_by = []
        try:
            # Each of the two is asked and given up, while ticks go on.
            eventually(lambda: here.tick() or len(connected_by or ()) >= 2, every_s=0.01)
            for _ in range(50):
                here.tick()
        finally:
            heard, connected_by = connected_by, None
    engine.close()
    assert heard, "somebody did ask"
    assert set(heard) == {"inquirer"}
    assert here.ask("SELECT sample_count > 20 FROM gpu_processes") == [(1,)]
