"""A server's own words are believed of it alone: real processes, and real sockets that listen."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import eventually
from test_attribution import FakeProc

from gpumon_core.attribution import endpoints, listeners
from gpumon_core.attribution.describe import Describer
from gpumon_core.attribution.inquirer import Inquirer
from gpumon_core.attribution.listeners import Member, find, started
from gpumon_core.attribution.local import LocalAttribution
from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.telemetry.records import ProcessReading

# Listens where its first argument says and answers with its second, or is the parent of one that does.
SERVER = """
import http.server, json, os, socket, subprocess, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"data": [{"id": os.environ["MODEL"]}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6 if ":" in os.environ["HOST"] else socket.AF_INET

if os.environ["HOST"] == "none":
    print(0, flush=True)
    time.sleep(600)
elif os.environ["HOST"].startswith("child "):
    host = os.environ["HOST"].removeprefix("child ")
    subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=os.environ | {"HOST": host})
else:
    server = Server((os.environ["HOST"], int(os.environ.get("AT", 0))), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
"""

Start = Callable[..., tuple[int, int]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a program of a given name that listens at a host; its PID and port. `host` is an address, "none", or
    "child ADDRESS" where a child listens. Between it and this test is a shell, which listens nowhere."""
    running: list[subprocess.Popen[str]] = []

    def begin(
        name: str, *arguments: str, host: str = "127.0.0.1", model: str = "own", at: int = 0
    ) -> tuple[int, int]:
        path = tmp_path / name
        path.write_text(SERVER)
        environment = os.environ | {"HOST": host, "MODEL": model, "AT": str(at)}
        line = [sys.executable, str(path), *arguments]
        shell = subprocess.Popen(
            ["sh", "-c", '"$@" & echo $!; wait', "sh", *line], stdout=subprocess.PIPE, env=environment, text=True,
            start_new_session=True,
        )  # fmt: skip
        running.append(shell)
        assert shell.stdout is not None
        return int(shell.stdout.readline()), int(shell.stdout.readline())

    yield begin
    for shell in running:
        os.killpg(shell.pid, 9)
        shell.wait()


def family(*pids: int) -> tuple[Member, ...]:
    return tuple((pid, started(pid)) for pid in pids)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::", "child 127.0.0.1"])
def test_a_server_is_asked_that_listens_itself_or_by_a_child(start: Start, host: str) -> None:
    pid, port = start("vllm", host=host)
    found = find(family(pid), None, "127.0.0.1", port)
    assert (found.verdict, found.host) == ("own", "127.0.0.1")
    assert find(family(pid), None, "127.0.0.1", port, known=found.inodes) == found


def test_who_else_has_the_port_is_not_asked(start: Start) -> None:
    pid, _ = start("vllm", host="none")
    _, port = start("other")
    assert find(family(pid), None, "127.0.0.1", port).verdict == "foreign"
    (parent,) = family(os.getpid())
    assert find(family(pid), parent, "127.0.0.1", port).verdict == "foreign", "that of another child of its parent"


def test_a_port_without_a_socket_is_no_servers(start: Start) -> None:
    pid, _ = start("vllm", host="none")
    assert find(family(pid), None, "127.0.0.1", 1).verdict == "none"


def test_who_listens_at_the_loopback_does_not_speak_for_who_listens_elsewhere(start: Start) -> None:
    """Two may have one port at two addresses; a server that is bound to one of them is asked there."""
    pid, port = start("vllm", host="127.0.0.2")
    start("other", host="127.0.0.1", at=port)
    found = find(family(pid), None, "127.0.0.1", port)
    assert (found.verdict, found.host) == ("own", "127.0.0.2")


def test_the_socket_of_who_launched_it_is_its_own_and_a_reused_pids_is_not(start: Start) -> None:
    launcher, port = start("launcher")
    pid, _ = start("vllm", host="none")
    (member,) = family(launcher)
    assert find(family(pid), member, "127.0.0.1", port).verdict == "own"
    assert find(family(pid), (launcher, 1), "127.0.0.1", port).verdict == "foreign"
    assert find((*family(pid), (launcher, 1)), None, "127.0.0.1", port).verdict == "foreign"


@pytest.mark.parametrize(("uid", "verdict"), [(1000, "unknown"), (1001, "foreign")])
def test_where_descriptors_may_not_be_read_the_owner_of_the_socket_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int, verdict: str
) -> None:
    proc = FakeProc(tmp_path / "proc")
    proc.put(7, 100)
    (proc.path / "self" / "net").mkdir(parents=True)
    line = f"   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000 {uid} 0 4711 1 0 100 0"
    (proc.path / "self" / "net" / "tcp").write_text(f"  sl  local_address\n{line}\n  1: gar")
    (proc.path / "self" / "net" / "tcp6").write_text("  sl\n   0: " + "0" * 31 + "\n")
    monkeypatch.setattr(listeners, "_sockets", lambda pid, proc: None)
    monkeypatch.setattr(listeners, "_users", lambda family, proc: {1000})
    assert find(((7, None),), None, "127.0.0.1", 8000, str(proc.path)).verdict == verdict
    assert find(((7, None),), None, "10.0.2.9", 8000, str(proc.path)).verdict == "unknown", "no table at all"


LOOPBACK, ALL = "0100007F", "00000000"


@pytest.mark.parametrize(
    ("host", "listening", "verdict"),
    [
        ("172.17.0.3", ALL, "own"),
        ("172.17.0.3", LOOPBACK, "foreign"),
        ("127.0.0.1", ALL, "none"),
        ("127.0.0.1", LOOPBACK, "none"),
        ("192.168.1.5", ALL, "none"),
    ],
)
def test_a_server_in_a_network_of_its_own_does_not_speak_for_who_answers_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, listening: str, verdict: str
) -> None:
    """Its loopback is not this one, and an address that both have (as with pasta) is answered here."""
    proc = FakeProc(tmp_path / "proc")
    proc.put(7, 100)
    for name in ("self", "7"):
        (proc.path / name / "net").mkdir(parents=True)
        (proc.path / name / "net" / "tcp").write_text("  sl\n")
    (proc.path / "self" / "net" / "fib_trie").write_text("     |-- 192.168.1.5\n        /32 host LOCAL\n")
    (proc.path / "7" / "net" / "tcp").write_text(f"  sl\n   0: {listening}:1F40 0:0 0A 0:0 00:0 0 0 0 4711 1\n")
    monkeypatch.setattr(listeners, "_sockets", lambda pid, proc: {4711})
    assert find(((7, None),), None, host, 8000, str(proc.path)).verdict == verdict


def learned(*pids: int, until: Callable[[dict[int, ProcessIdentity]], bool]) -> dict[int, ProcessIdentity]:
    attribution, inquirer = LocalAttribution(trusted=True, describer=Describer()), Inquirer(every_s=0.2)
    readings = [ProcessReading("GPU-0", pid, "C", 6000) for pid in pids]

    def look() -> dict[int, ProcessIdentity] | None:
        found = inquirer.add(attribution.identify(set(pids), time.time()), readings)
        return found if until(found) else None

    try:
        return eventually(look)
    finally:
        inquirer.close()
        attribution.close()


def test_a_server_that_loads_has_not_the_model_of_who_has_its_port(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "get", lambda *where: pytest.fail(f"{where} was asked"))
    _, port = start("other", model="somebody-elses")
    pid, _ = start("vllm", "serve", "--port", str(port), "org/own", host="none")
    found = learned(pid, until=lambda known: not known[pid].pending)
    assert found[pid].program.model == "org/own"


@pytest.mark.parametrize(
    ("line", "model"),
    [
        (("llama-server", "-m", "/models/mine.gguf", "--port", "1"), "mine.gguf"),
        (("llama-server", "--port", "1"), "somebody-elses"),
    ],
)
def test_an_answer_from_an_unknown_program_does_not_win_over_what_a_process_says(
    start: Start, monkeypatch: pytest.MonkeyPatch, line: tuple[str, ...], model: str
) -> None:
    monkeypatch.setattr(endpoints, "get", lambda *where: {"data": [{"id": "somebody-elses"}]})
    pid, _ = start(*line, host="none")
    assert learned(pid, until=lambda known: not known[pid].pending)[pid].program.model == model


def test_what_listens_only_once_it_is_asked_is_looked_at_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the request somebody else takes the port."""
    ports: list[int] = []

    def get(host: str, port: int, path: str) -> object:
        if not ports:
            ports.append(start("other", at=port)[1])
        return {"data": [{"id": "somebody-elses"}]}

    monkeypatch.setattr(endpoints, "get", get)
    gone, free = start("placeholder")
    os.killpg(os.getpgid(gone), 9)
    eventually(lambda: not any(one.port == free for one in listeners.listeners(os.getpid()) or ()))
    pid, _ = start("vllm", "serve", "org/own", "--port", str(free), host="none")
    found = learned(pid, until=lambda known: not known[pid].pending)
    assert ports == [free]
    assert found[pid].program.model == "org/own"
