"""No client stops the server: connections, floods, uploads and frames cost their sender, not the recording."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE_S, ROOT, Server, eventually, run_apart
from fake_nvml import FakeNvml
from test_server import more_ticks
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from gpumon_core.web import connections, descriptors, request_limits
from pages.components.streamlit_private import STREAM, UPLOADS, BackMsg, ForwardMsg

Serve = Callable[..., Server]
# Python, the database and the log need 13 to 20 of them.
FEW_FILES = 64
LINES = 40


@contextmanager
def with_few_files(most: int = FEW_FILES) -> Iterator[None]:
    """Processes that are started meanwhile may open so many files, which they cannot change."""
    mine = resource.getrlimit(resource.RLIMIT_NOFILE)
    started = subprocess.Popen

    def limited(arguments: list[str], **given: Any) -> subprocess.Popen[bytes]:
        return started(["prlimit", f"--nofile={most}:{most}", *arguments], **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", limited)
        yield
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == mine


def log_lines(server: Server) -> list[str]:
    return server.log.read_text(errors="replace").splitlines()


def resident_mb(server: Server) -> float:
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def opened(server: Server) -> socket.socket:
    found = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S)
    found.settimeout(PATIENCE_S)
    return found


def is_closed(one: socket.socket) -> bool:
    """Whether the server has closed it, whatever it has said before."""
    one.settimeout(0)
    try:
        while one.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextmanager
def page(server: Server, **given: Any) -> Iterator[ClientConnection]:
    """The socket of a page."""
    url = f"ws://127.0.0.1:{server.port}{STREAM}"
    with connect(url, proxy=None, open_timeout=PATIENCE_S, max_size=None, **given) as found:
        yield found


def draw(socket_: ClientConnection, message: BackMsg | None = None) -> Iterator[ForwardMsg]:
    """What the server sends for a page that is drawn anew, to its end."""
    wanted = message or BackMsg()
    if message is None:
        wanted.rerun_script.query_string = ""
    socket_.send(wanted.SerializeToString())
    while True:
        found = ForwardMsg()
        found.ParseFromString(socket_.recv(timeout=PATIENCE_S))
        yield found
        if found.WhichOneof("type") == "script_finished":
            return


def asked(request: urllib.request.Request | str) -> tuple[int, str, Any]:
    """Status, text and headers of an answer."""
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


def test_idle_connections_take_no_file_from_the_recorder(serve: Serve, fake: FakeNvml) -> None:
    fake.add_gpu().add_process(os.getpid(), 1 << 30)
    with with_few_files():
        server = serve(fake, is_forked=False).ready()
    with ExitStack() as stack:
        for _ in range(80):
            stack.enter_context(opened(server))
        recorded = more_ticks(server, 4)
        eventually(recorded)
        # Whoever asks something is answered meanwhile.
        answer = server.health()[1]
        assert answer["status"] in ("ok", "degraded")
        assert answer["recorder"]["failed"] == 0
        assert len(os.listdir(f"/proc/{server.process.pid}/fd")) < FEW_FILES
    with page(server) as drawn:
        assert any(one.WhichOneof("type") == "delta" for one in draw(drawn))
    lines = log_lines(server)
    assert len(lines) < LINES, "\n".join(lines)
    assert "Traceback" not in "\n".join(lines)


def test_connections_that_are_busy_leave_the_recorder_its_files(serve: Serve, fake: FakeNvml) -> None:
    fake.add_gpu()
    with with_few_files():
        server = serve(fake, is_forked=False).ready()
    with ExitStack() as stack:
        refused = 0
        for _ in range(60):
            try:
                stack.enter_context(page(server))
            except Exception:
                # It is refused in several ways.
                refused += 1
        assert 0 < refused < 60
        recorded = more_ticks(server, 3)
        eventually(recorded)
    answer = server.wait(lambda status, _: status == 200)
    assert answer["recorder"]["failed"] == 0
    assert len(log_lines(server)) < LINES


HALVES = {
    "nothing": b"",
    "half a line": b"GET /heal",
    "headers without an end": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-More: ",
    "half a handshake": b"GET /_stcore/stream HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n",
    "a body that does not come": b"POST /_stcore/agent HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf",
    "chunks without an end": b"PUT /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    "an answered request, and then nothing": b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    "an answered request, and half of another": b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /",
}


def test_a_request_that_never_ends_is_ended_and_a_page_that_is_open_is_not(serve: Serve, fake: FakeNvml) -> None:
    fake.add_gpu()
    server = serve(fake).ready()
    with page(server) as drawn, ExitStack() as stack:
        assert list(draw(drawn))
        waiting = {}
        for what, sent in HALVES.items():
            waiting[what] = stack.enter_context(opened(server))
            waiting[what].sendall(sent)
        began = time.monotonic()
        slow = stack.enter_context(opened(server))
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: ")

        def all_closed() -> bool:
            with suppress(OSError):
                # A byte now and then is no progress.
                slow.sendall(b"x")
            for what in [what for what, one in waiting.items() if is_closed(one)]:
                del waiting[what]
            return not waiting and is_closed(slow)

        eventually(all_closed, every_s=0.2)
        assert time.monotonic() - began >= connections.HEAD_S / 2, "those who are slow have some time"
        # Longer open than any of them, and asked nothing all the while.
        assert list(draw(drawn))
    assert len(log_lines(server)) < LINES


def test_a_client_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    monkeypatch.setattr(connections, "READ_S", 0.1)

    class Talker(asyncio.Protocol):
        lost = False

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            transport.write(b"x" * (64 << 20))

        def connection_lost(self, exc: Exception | None) -> None:
            Talker.lost = True

    async def serve_one() -> None:
        loop = asyncio.get_running_loop()
        connections.Connections().limit(loop)
        server = await loop.create_server(Talker, "127.0.0.1", 0)
        with socket.socket() as client:
            client.setblocking(False)
            await loop.sock_connect(client, server.sockets[0].getsockname())
            async with asyncio.timeout(PATIENCE_S):
                while not Talker.lost:
                    await asyncio.sleep(0.01)
        server.close()

    run_apart(serve_one)


def crafted(number: int) -> BackMsg:
    """A page's message whose ids and values no page has."""
    message = BackMsg()
    message.rerun_script.query_string = f"by=%00{number}&gpu={'x' * 1000}"
    message.rerun_script.page_script_hash = f"{number:032x}"
    for name, value in (
        (f"$$ID-{number}-None", {"int_value": 5}),
        (f"\n2026-11-28 ERROR made up {number}", {"string_value": "\x1b[2J"}),
        (f"$$ID-{number}-range", {"json_value": "{"}),
        ("range", {"trigger_value": True}),
        ("q" * 10_000, {"bytes_value": b"\xff"}),
    ):
        widget = message.rerun_script.widget_states.widgets.add()
        widget.id = name
        for kind, given in value.items():
            setattr(widget, kind, given)
    return message


RAW = (
    b"\x00\x01\r\n\r\n",
    b"GET / HTTP/9.9\r\nHost: \xff\r\n\r\n",
    b"GET /\x1b[2J HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nx: " + b"b" * 200_000 + b"\r\n\r\n",
    b"GET /%00%ff/..%2f HTTP/1.1\r\nHost: x\r\nUpgrade: foo\r\nConnection: upgrade\r\n\r\n",
    b"GET /_stcore/stream HTTP/1.1\r\nHost: x\r\nOrigin: http://[\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
    b"GET /_stcore/stream HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"GET /static/%E0%A4%A HTTP/1.1\r\nHost: x\r\nRange: bytes=9-1\r\nCookie: \xff=\x01\r\n\r\n",
    b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
)


def test_no_client_floods_the_log(serve: Serve, fake: FakeNvml) -> None:
    fake.add_gpu()
    server = serve(fake).ready()
    for number in range(20):
        for sent in (f"text {number}", os.urandom(100), b"\xff" * number, b""):
            with page(server) as bad, suppress(ConnectionClosed, TimeoutError):
                bad.send(sent)
                # It is dropped at once, or waits for more.
                bad.recv(timeout=0.2)
        for raw in RAW:
            with opened(server) as one, suppress(OSError):
                one.sendall(raw)
                one.shutdown(socket.SHUT_WR)
                one.recv(100)
    with page(server) as odd:
        for number in range(20):
            odd.send(crafted(number).SerializeToString())
        assert list(draw(odd))
    lines = log_lines(server)
    # The kinds of what was sent, each in one line.
    assert not [line for line in lines if "Traceback" in line], "\n".join(lines)
    assert len(lines) < 200, "\n".join(lines)
    assert not any(re.match(r"2026-11-28 ERROR made up", line) or "\x1b" in line for line in lines)
    assert server.health()[0] == 200


def test_no_file_is_taken(serve: Serve, fake: FakeNvml) -> None:
    fake.add_gpu()
    server = serve(fake).ready()
    with page(server, subprotocols=["streamlit"]) as drawn:
        (session,) = [
            one.new_session.initialize.session_id for one in draw(drawn) if one.WhichOneof("type") == "new_session"
        ]
        before = resident_mb(server)
        token = "2|00000000|" + "0" * 32 + "|1"
        for owner in (session, "00000000-0000-0000-0000-000000000000"):
            for method in ("PUT", "POST", "DELETE", "OPTIONS"):
                address = f"{server.url}{UPLOADS}/{owner}/{'1' * 32}"
                for body in (b"x", b"x" * (8 << 20)):
                    headers = {
                        "Content-Type": "multipart/form-data; boundary=b",
                        "X-Xsrftoken": token,
                        "Cookie": f"_streamlit_xsrf={token}",
                    }
                    content = (
                        b"--b\r\nContent-Disposition: form-data; name=f; filename=f\r\n\r\n" + body + b"\r\n--b--"
                    )
                    request = urllib.request.Request(address, content, headers, method=method)
                    # Who goes on sending after the answer may not get to see it.
                    with suppress(urllib.error.URLError, ConnectionError):
                        assert asked(request)[0] == 403
        assert asked(f"{server.url}{UPLOADS}/{session}/1")[0] == 403
    assert resident_mb(server) - before < 16


def test_a_large_frame_is_refused_before_it_costs_memory(serve: Serve, fake: FakeNvml) -> None:
    fake.add_gpu()
    server = serve(fake).ready()
    with page(server) as drawn:
        assert list(draw(drawn))
        before = resident_mb(server)
        for size in (2 << 20, 60 << 20, 150 << 20):
            with page(server) as large:
                with suppress(ConnectionClosed):
                    large.send(b"\0" * size)
                with pytest.raises(ConnectionClosed) as closed:
                    large.recv(timeout=PATIENCE_S)
                assert closed.value.rcvd is None or closed.value.rcvd.code == 1009
        assert resident_mb(server) - before < 32
        assert list(draw(drawn)), "others go on"


def test_queries_headers_and_bodies_are_bounded(serve: Serve, fake: FakeNvml) -> None:
    fake.add_gpu()
    server = serve(fake).ready()
    long = "gpu=1&" * (request_limits.MOST_QUERY_BYTES // 6 + 1)
    for path in ("/api/v1/gpus", "/metrics", "/", "/_stcore/health"):
        with opened(server) as one:
            one.sendall(f"GET {path}?{long} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert one.recv(12) in (b"HTTP/1.1 414", b"HTTP/1.1 400")
    with opened(server) as one:
        headers = "".join(f"X-{number}: {'y' * 1000}\r\n" for number in range(40))
        one.sendall(f"GET /healthz HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())
        assert one.recv(12) in (b"HTTP/1.1 431", b"HTTP/1.1 400")
    for path in ("/api/v1/gpus", "/healthz", "/_stcore/agent/interact"):
        with opened(server) as one:
            one.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999999\r\n\r\n".encode())
            assert one.recv(12) == b"HTTP/1.1 413"
    # Repeated values within the limit are answered as ever.
    assert asked(f"{server.url}/api/v1/gpus?{'&'.join(['gpu=1'] * 1000)}")[0] == 200


def test_the_soft_limit_of_files_is_raised_to_the_hard_one(serve: Serve, fake: FakeNvml, tmp_path: Path) -> None:
    fake.add_gpu()
    started = subprocess.Popen

    def low(arguments: list[str], **given: Any) -> subprocess.Popen[bytes]:
        return started(["prlimit", "--nofile=200:500", *arguments], **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", low)
        server = serve(fake, is_forked=False).ready()
    recorder = low(
        [sys.executable, "-m", "gpumon_core", "record"],
        cwd=ROOT,
        env={**os.environ, "GPUMON_DATA_DIR": str(tmp_path / "other"), "GPUMON_SOURCE": "demo"},
    )
    try:
        for pid in (server.process.pid, recorder.pid):
            limits = Path(f"/proc/{pid}/limits")
            eventually(lambda limits=limits: re.search(r"Max open files +500 +500 ", limits.read_text()))
    finally:
        recorder.terminate()
        assert recorder.wait(timeout=PATIENCE_S) == 0


def test_a_reserve_is_left_at_every_limit() -> None:
    for limit in (64, 256, 1024, 20_000, 1 << 20):
        assert 0 < descriptors.reserve(limit) < limit
        assert descriptors.reserve(limit) // 8 >= 1


def test_short_answers_come_while_long_ones_are_made(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "history"
    environ = {**os.environ, "GPUMON_DATA_DIR": str(folder), "GPUMON_SOURCE": "demo"}
    environ["GPUMON_HOST_NAME"] = "testhost"
    fill = [sys.executable, "-m", "gpumon_core", "fill", "--days", "0.2"]
    subprocess.run(fill, cwd=ROOT, env=environ, check=True, capture_output=True)
    server = serve(None, folder).ready()
    from gpumon_core.metrics import GPU_METRICS_BY_KEY

    metrics = "&".join(f"metric={key}" for key in GPU_METRICS_BY_KEY)
    history = f"{server.url}/api/v1/history?range=5h&gpu=index:0&points=4000&{metrics}"
    status, text, _ = asked(f"{server.url}/api/v1/history?range=1w&points=10000&{metrics}")
    problem = json.loads(text)
    assert (status, problem["parameter"]) == (400, "points")
    assert "metrics" in problem["detail"]
    assert asked(history)[0] == 200
    before = resident_mb(server)
    with ThreadPoolExecutor(16) as pool:
        long = [pool.submit(asked, history) for _ in range(12)]
        short = 0
        while not all(one.done() for one in long):
            for path in ("/healthz", "/metrics", "/api/v1/gpus", "/api/v1/processes"):
                assert asked(server.url + path)[0] == 200
                short += 1
        answers = [one.result() for one in long]
    assert short
    assert {status for status, _, _ in answers} <= {200, 429}
    assert any(status == 200 for status, _, _ in answers)
    assert all(headers["Retry-After"] for status, _, headers in answers if status == 429)
    # 12 at once took 1,200 MB.
    assert resident_mb(server) - before < 250
