"""Connections of a server: the one that has waited longest makes room, one that is answered stays."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import PATIENCE_S, run_apart

from gpumon_core.web import connections
from gpumon_core.web.connections import Connections


class Server(asyncio.Protocol):
    """What answers "done" to "end", holds a request from "ask" on, and counts the ends that it has noticed."""

    lost = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        connection = connections.current.get()
        assert connection is not None
        if data == b"ask":
            connection.asked()
            self.transport.write(b"asked")
        elif data == b"end":
            connection.answered()
            self.transport.write(b"done!")

    def connection_lost(self, exc: Exception | None) -> None:
        Server.lost += 1


class Client:
    """One client of it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def say(self, what: bytes) -> bytes:
        self.writer.write(what)
        return await self.reader.readexactly(5)

    async def ended(self) -> bytes:
        """What the server sent before it closed the connection."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""


@dataclass(frozen=True)
class Open:
    """Opens connections to a server."""

    server: asyncio.Server
    open: Callable[[], Awaitable[Client]]

    async def __call__(self) -> Client:
        return await self.open()


@asynccontextmanager
async def served(most: int, tls: ssl.SSLContext | None = None) -> AsyncIterator[Open]:
    loop = asyncio.get_running_loop()
    accepted = Connections(most)
    accepted.limit(loop)
    server = await loop.create_server(Server, "127.0.0.1", 0, ssl=tls)
    assert accepted.is_installed
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    writers = []

    async def opened() -> Client:
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting if tls else None)
        writers.append(writer)
        return Client(reader, writer)

    async with asyncio.timeout(PATIENCE_S):
        yield Open(server, opened)
    for writer in writers:
        writer.close()
    server.close()


@pytest.fixture
def tls(tmp_path: Path) -> ssl.SSLContext:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate]
    subprocess.run([*made, "-days", "2", "-subj", "/CN=localhost"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def test_who_has_waited_longest_makes_room() -> None:
    async def run() -> None:
        async with served(3) as opened:
            first, busy, third = await opened(), await opened(), await opened()
            assert await busy.say(b"ask") == b"asked"
            fourth = await opened()
            assert await first.ended() == b""
            fifth = await opened()
            assert await third.ended() == b""
            assert await busy.say(b"end") == b"done!"
            assert await fifth.say(b"ask") == b"asked"
            # It has asked before the others, and waits since it was answered.
            sixth = await opened()
            assert await fourth.ended() == b""
            assert await busy.say(b"ask") == b"asked"
            assert await sixth.say(b"ask") == b"asked"

    run_apart(run)


def test_where_all_are_being_answered_a_new_one_gets_503() -> None:
    async def run() -> None:
        async with served(2) as opened:
            for _ in range(2):
                assert await (await opened()).say(b"ask") == b"asked"
            answer = await (await opened()).ended()
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert f"Content-Length: {len(body)}".encode() in head

    run_apart(run)


@pytest.mark.parametrize("secure", [False, True])
def test_one_that_never_asks_ends_and_one_that_is_being_answered_does_not(
    secure: bool, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.2)

    async def run() -> None:
        async with served(10, tls if secure else None) as opened:
            idle, busy, half = await opened(), await opened(), await opened()
            assert await busy.say(b"ask") == b"asked"
            half.writer.write(b"as")
            assert await idle.ended() == b""
            assert await half.ended() == b""
            assert await busy.say(b"end") == b"done!"
            assert await busy.ended() == b"", "it waits again"

    run_apart(run)


def test_a_server_that_stops_waits_for_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "STOP_S", 0.1)

    async def run() -> None:
        async with served(10) as opened:
            busy = await opened()
            assert await busy.say(b"ask") == b"asked"
            opened.server.close()
            assert await busy.ended() == b""

    run_apart(run)


def test_places_of_those_who_left_are_free() -> None:
    async def run() -> None:
        async with served(2) as opened:
            for _ in range(20):
                one = await opened()
                assert await one.say(b"ask") == b"asked"
                lost = Server.lost
                one.writer.close()
                while Server.lost == lost:
                    await asyncio.sleep(0.001)

    run_apart(run)
