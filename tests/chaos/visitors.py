"""Clients of the server: ordinary ones, with answers that are searched for secrets, and hostile ones."""

from __future__ import annotations

import base64
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

from .programs import Server
from .zoo import Secrets

ROUTES = (
    "/healthz",
    "/metrics",
    "/api/v1/gpus",
    "/api/v1/processes",
    "/api/v1/processes/history?range=1h",
    "/api/v1/processes/history?range=1h&format=csv",
    "/api/v1/history?range=1h",
    "/api/v1/usage?range=1d",
    "/api/v1/models?range=1d",
    "/api/v1/original/current",
    "/api/v1/original/processes",
    "/api/v1/openapi.json",
    "/",
)
# Not the System page: it examines this machine, and so asks the driver for itself.
PAGES = ("", "gpu", "history", "processes", "usage")
METRICS = (
    *("temperature", "utilization", "memory", "power", "memory_utilization", "fan_speed", "sm_clock"),
    *("memory_clock", "graphics_clock", "video_clock", "encoder_utilization", "decoder_utilization"),
    *("jpeg_utilization", "ofa_utilization", "pcie_tx", "pcie_rx", "energy", "performance_state"),
)
HEAVY = "/api/v1/history?range=1d&points=10000&" + "&".join(f"metric={name}" for name in METRICS)
GARBAGE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET /\x00\xff\x1b[31m HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n",
    b"GET /api/v1/history?metric=" + b"%00" * 2000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /api/v1/gpus?" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PUT /_stcore/upload_file/x/y HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"u" * 100_000,
    b"\r\n" * 1000,
)
FRAMES = (
    b"\x81\x05hello",  # a text that is not masked
    b"\x82\xfe\xff\xff\x00\x00\x00\x00" + b"\xff" * 1000,
    b"\x82\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00",  # 2^63 bytes to come
    b"\x81\x85\x00\x00\x00\x00hello",  # text, where the server expects protocol buffers
    b"\x82\x84\x00\x00\x00\x00\xff\xff\xff\xff",
    b"\x89\x80\x00\x00\x00\x00" * 200,  # pings
    b"\xff\xff\xff\xff",
)


class Visitors:
    """They keep count of the answers, and of secrets in them."""

    def __init__(self, server: Server, secrets: Secrets, rng: random.Random) -> None:
        self._server, self._secrets, self._rng = server, secrets, rng
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.leaks: list[str] = []

    def look_at(self, what: str, content: bytes) -> None:
        """Search for secrets."""
        for place in self._secrets.seen_in(content):
            leak = f"a secret from {place} was in {what}"
            if leak not in self.leaks:
                self.leaks.append(leak)

    def round(self, patience_s: float = 60.0) -> None:
        """Ask for everything once, and open every page."""
        for route in ROUTES:
            status, body = self._server.get(route, patience_s)
            self.statuses[route, status] += 1
            self.look_at(route, body)
        for page in PAGES:
            self.open_page(page, patience_s)

    def open_page(self, page: str, patience_s: float = 60.0) -> None:
        """Open one page as a browser does."""
        with suppress(OSError):
            self.look_at(f"the page {page or 'overview'}", self._open(page, patience_s))

    def come(self) -> Iterator[None]:
        """Ordinary visitors."""
        self.round()
        yield

    def _open(self, page: str, patience_s: float) -> bytes:
        """What the server sends to a browser that opens a page, until its script has ended."""
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        from pages.components.streamlit_private import STREAM, BackMsg, ForwardMsg

        wanted = BackMsg()
        wanted.rerun_script.page_name = page
        url = f"ws://127.0.0.1:{self._server.port}{STREAM}"
        parts: list[bytes] = []
        try:
            with connect(url, subprotocols=["streamlit"], max_size=None, open_timeout=patience_s) as socket_:  # type: ignore[list-item]
                socket_.send(wanted.SerializeToString())
                deadline = time.monotonic() + patience_s
                while time.monotonic() < deadline:
                    part = socket_.recv(timeout=patience_s)
                    assert isinstance(part, bytes)
                    parts.append(part)
                    message = ForwardMsg()
                    message.ParseFromString(part)
                    if message.WhichOneof("type") == "script_finished":
                        break
        except (WebSocketException, TimeoutError) as error:
            raise OSError(str(error)) from error
        return b"".join(parts)

    def _connections(self, count: int) -> list[socket.socket]:
        found = []
        for _ in range(count):
            with suppress(OSError):
                found.append(socket.create_connection(("127.0.0.1", self._server.port), timeout=5))
        return found

    def half_sent(self) -> Iterator[None]:
        """Requests that do not end."""
        opened = self._connections(self._rng.randrange(40, 80))
        for one in opened:
            with suppress(OSError):
                one.sendall(b"GET /api/v1/gpus HTTP/1.1\r\nHost: x\r\nX-Slow: " + b"a" * self._rng.randrange(2000))
        yield
        _close(opened)

    def idle(self) -> Iterator[None]:
        """Connections on which nothing comes."""
        opened = self._connections(80)
        yield
        _close(opened)

    def garbage(self) -> Iterator[None]:
        """What is no request, and requests that are none of ours."""
        opened = self._connections(24)
        for number, one in enumerate(opened):
            with suppress(OSError):
                one.sendall(GARBAGE[number % len(GARBAGE)])
                one.settimeout(0.05)
                self.look_at("the answer to garbage", one.recv(65536))
        yield
        _close(opened)

    def heavy(self) -> Iterator[None]:
        """The dearest queries there are, several at once."""

        def ask() -> None:
            status, body = self._server.get(HEAVY, 120.0)
            self.statuses["heavy history", status] += 1
            self.look_at("a heavy history", body)

        asking = [threading.Thread(target=ask, daemon=True) for _ in range(6)]
        for one in asking:
            one.start()
        yield
        # One that is stopped does not answer.
        while self._server.ticks_expected and any(one.is_alive() for one in asking):
            asking[0].join(0.5)
            asking = [one for one in asking if one.is_alive()] or asking[:1]

    def websockets(self) -> Iterator[None]:
        """WebSockets with frames that no browser sends."""
        opened = self._connections(2 * len(FRAMES))
        for number, one in enumerate(opened):
            key = base64.b64encode(struct.pack("<QQ", number, self._rng.getrandbits(60))).decode()
            request = (
                "GET /_stcore/stream HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            )
            request += f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
            request += "Sec-WebSocket-Protocol: streamlit\r\n\r\n"
            with suppress(OSError):
                one.sendall(request.encode())
                one.recv(4096)
                one.sendall(FRAMES[number % len(FRAMES)])
        yield
        _close(opened)


def _close(opened: list[socket.socket]) -> None:
    for one in opened:
        with suppress(OSError):
            one.close()
