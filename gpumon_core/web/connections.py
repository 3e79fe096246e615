"""Limits the server's connections: how many are open, and how long one may wait before it sends a request.

uvicorn closes a connection that is idle after an answer, but not one that never sends a request, or never
completes one. And it accepts as many as there are descriptors, so that none is left for the recorder. Streamlit
has no setting for either. So the protocol that uvicorn gives to asyncio for each connection is put into one of
ours. It passes everything on, and closes a connection that has waited for too long.

Only documented parts of asyncio are used: `loop.create_server` gets a function that makes a protocol for each
connection. The method is replaced on this one loop, before the server calls it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from gpumon_core.web import descriptors

log = logging.getLogger(__name__)

# From the accept, or the end of an answer, until the complete head of a request is there.
HEAD_S = 10.0
# How long a client may take to read 64 KiB of an answer.
READ_S = 30.0
# How long a server that stops waits for answers that are not finished: uvicorn would wait for all.
STOP_S = 5.0
# The most connections, even if more descriptors are free. Each costs some 20 KB.
MOST_CONNECTIONS = 1000
# asyncio accepts connections in batches, and some batches before the first one is refused and closed: all of these
# must fit into the reserve.
_BATCHES = 8
_LOOK_S = 0.5
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\nRetry-After: 10\r\n"
    b"Content-Length: 26\r\nConnection: close\r\n\r\nToo many open connections\n"
)

# The connection that is being read. The tasks that answer its requests inherit it.
current: ContextVar[Connection | None] = ContextVar("connection", default=None)


class Connections:
    """All connections of a server. Everything runs on its event loop."""

    def __init__(self, most: int = MOST_CONNECTIONS) -> None:
        limit = descriptors.limit()
        self._most = most
        self._most_files = limit - descriptors.reserve(limit)
        # The descriptor of each; and the connections that wait for a request, the one that waits longest first.
        self._open: dict[Connection, int] = {}
        self._waiting: dict[Connection, None] = {}
        self.is_installed = False

    def limit(self, loop: asyncio.AbstractEventLoop, ending: Callable[[], None] | None = None) -> None:
        """Limit the connections of every server that this loop makes from now on. `ending` is called on a thread
        of its own once a server accepts no more: it need not wait for answers that are not finished."""
        create_server = loop.create_server

        async def create(factory: Callable[[], asyncio.Protocol], *args: Any, **given: Any) -> asyncio.Server:
            backlog = max(1, descriptors.reserve(descriptors.limit()) // _BATCHES)
            given["backlog"] = min(given.get("backlog", backlog), backlog)
            if given.get("ssl"):
                given.setdefault("ssl_handshake_timeout", HEAD_S)
            self.is_installed = True
            server = await create_server(lambda: Connection(factory(), loop, self), *args, **given)
            self._end_with(server, loop, ending)
            return server

        setattr(loop, "create_server", create)  # noqa: B010 - mypy knows it as a method

    def _end_with(
        self, server: asyncio.Server, loop: asyncio.AbstractEventLoop, ending: Callable[[], None] | None
    ) -> None:
        """Close all connections some time after a server accepts no more."""
        if server.is_serving():
            loop.call_later(_LOOK_S, self._end_with, server, loop, ending)
            return
        if ending is not None:
            threading.Thread(target=ending, name="ending", daemon=True).start()
        loop.call_later(STOP_S, self._end_all)

    def _end_all(self) -> None:
        for connection in list(self._open):
            connection.end()

    def come(self, connection: Connection, descriptor: int) -> bool:
        """Whether there is room for a new connection. Where there is none, the connection that has waited longest
        for a request is closed for it."""
        # The kernel gives the lowest free number: all lower ones are in use, by connections or by something else.
        others = descriptor - sum(one < descriptor for one in self._open.values())
        if len(self._open) >= min(self._most, self._most_files - others):
            longest = next(iter(self._waiting), None)
            if longest is None:
                return False
            longest.end()
        self._open[connection] = descriptor
        self._waiting[connection] = None
        return True

    def asks(self, connection: Connection) -> None:
        """A request has begun."""
        self._waiting.pop(connection, None)

    def waits(self, connection: Connection) -> None:
        """The request was answered, and the connection waits for the next one."""
        self._waiting[connection] = None

    def gone(self, connection: Connection) -> None:
        """The connection is closed."""
        self._waiting.pop(connection, None)
        self._open.pop(connection, None)


class Connection(asyncio.Protocol):
    """One connection: the server's protocol, and how long it has been waiting.

    The bytes of a WebSocket do not pass here: only its end is noticed (`answered`).
    """

    def __init__(self, inner: asyncio.Protocol, loop: asyncio.AbstractEventLoop, all_: Connections) -> None:
        self._inner = inner
        self._loop = loop
        self._all = all_
        self._transport: asyncio.Transport | None = None
        self._requests = 0
        self._is_refused = False
        self._until_asked: asyncio.TimerHandle | None = None
        self._until_read: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, or refuse the connection where there is no room."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if not self._all.come(self, transport.get_extra_info("socket").fileno()):
            self._is_refused = True
            log.warning(
                "a connection was refused: nearly all of %s files that may be open are open. Close idle clients, "
                "or raise the limit (ulimit -n)",
                descriptors.limit(),
            )
            transport.write(_FULL)
            transport.close()
            return
        self._inner.connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Pass on what the client sent."""
        if not self._is_refused:
            current.set(self)
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        """Pass on that the client sends no more."""
        return None if self._is_refused else self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop_waiting()
        self._stop_reading()
        self._all.gone(self)
        if not self._is_refused:
            self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads more slowly than it is answered."""
        self._until_read = self._loop.call_later(READ_S, self.end)
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """The client has read."""
        self._stop_reading()
        self._inner.resume_writing()

    def asked(self) -> None:
        """The complete head of a request is there."""
        self._requests += 1
        self._stop_waiting()
        self._all.asks(self)

    def answered(self) -> None:
        """The request was answered."""
        self._requests -= 1
        if self._requests:
            return
        if self._transport is None or self._transport.is_closing():
            self._all.gone(self)
            return
        self._all.waits(self)
        self._wait()

    def end(self) -> None:
        """Close it at once, even if something is still to be sent."""
        self._stop_waiting()
        self._stop_reading()
        self._all.gone(self)
        if self._transport is not None:
            self._transport.abort()

    def _wait(self) -> None:
        self._stop_waiting()
        self._until_asked = self._loop.call_later(HEAD_S, self.end)

    def _stop_waiting(self) -> None:
        if self._until_asked is not None:
            self._until_asked.cancel()
            self._until_asked = None

    def _stop_reading(self) -> None:
        if self._until_read is not None:
            self._until_read.cancel()
            self._until_read = None
