"""Limits a request to the server: a query and headers of some kilobytes, a small body, and no file.

An ASGI middleware around all routes, those of Streamlit and its WebSocket included.
"""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus

from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpumon_core.web import connections

log = logging.getLogger(__name__)

MOST_QUERY_BYTES = 16 << 10
MOST_HEADER_BYTES = 32 << 10
MOST_BODY_BYTES = 64 << 10
# From the head of a request until its complete body is there.
BODY_S = 10.0


class RequestLimits:
    """Refuses requests that are too large, and lets a connection know when its request begins and ends."""

    def __init__(self, app: ASGIApp, accepted: connections.Connections, uploads: str) -> None:
        """`uploads` is the path of Streamlit's route for st.file_uploader, which no page has: what a client sends
        to it would stay in memory."""
        self._app = app
        self._small = RequestBodyLimitMiddleware(app, max_body_size=MOST_BODY_BYTES)
        self._accepted = accepted
        self._uploads = uploads
        self._has_warned = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is within the limits."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if not (self._accepted.is_installed or self._has_warned):
            self._has_warned = True
            log.warning(
                "this server does not limit its connections, because it opened its port too early: start it with "
                "`streamlit run app.py`"
            )
        connection = connections.current.get()
        if connection is not None:
            connection.asked()
        try:
            refusal = refused(scope, self._uploads)
            if refusal is None and scope["type"] == "http":
                await self._small(scope, _Body(receive, connection), send)
            elif refusal is None:
                await self._app(scope, receive, send)
            else:
                await refusal(scope, receive, send)
        finally:
            if connection is not None:
                connection.answered()


class _Body:
    """The `receive` of a request, with a limit of time for the body."""

    def __init__(self, receive: Receive, connection: connections.Connection | None) -> None:
        self._receive = receive
        self._connection = connection
        self._deadline = asyncio.get_running_loop().time() + BODY_S
        self._is_complete = False

    async def __call__(self) -> Message:
        """The next piece of the body; where it comes too late, that the client has disconnected."""
        if self._is_complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            if self._connection is not None:
                self._connection.end()
            self._is_complete = True
            return {"type": "http.disconnect"}
        self._is_complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message


def refused(scope: Scope, uploads: str) -> Response | None:
    """The answer to a request beyond the limits; None where it is within."""
    headers = scope["headers"]
    if len(scope["query_string"]) > MOST_QUERY_BYTES:
        return _refusal(
            HTTPStatus.REQUEST_URI_TOO_LONG, f"A query has {MOST_QUERY_BYTES:,} bytes at most: name fewer values."
        )
    if sum(len(name) + len(value) for name, value in headers) > MOST_HEADER_BYTES:
        return _refusal(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"All headers have {MOST_HEADER_BYTES:,} bytes at most."
        )
    if scope["type"] == "websocket":
        return None
    if uploads in scope["path"]:
        return _refusal(HTTPStatus.FORBIDDEN, "No page takes a file.")
    length = next((value for name, value in headers if name == b"content-length"), b"0")
    if not length.isdigit() or len(length) > len(str(MOST_BODY_BYTES)) or int(length) > MOST_BODY_BYTES:
        return _refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A request's body has {MOST_BODY_BYTES:,} bytes at most."
        )
    return None


def _refusal(status: HTTPStatus, detail: str) -> Response:
    answer = {"type": "about:blank", "title": status.phrase, "status": status.value, "detail": detail}
    # The rest of the request is not read.
    return JSONResponse(
        answer, status.value, {"Connection": "close", "Cache-Control": "no-store"}, "application/problem+json"
    )
