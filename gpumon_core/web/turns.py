"""Long answers take turns: as many at a time as the machine has cores.

An answer that reads a history and writes it as text takes a core and some tens of megabytes. More answers at once
would not be ready sooner; they would only need more memory. So the others wait, without a thread, and get 429 if
they wait too long. Answers from memory or from a few rows do not wait.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from http import HTTPStatus

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# At least two, so that one client that reads slowly does not block all others; at most half of the threads that
# the server has for all its routes.
LEAST_PLACES, MOST_PLACES = 2, 14
WAIT_S = 10.0


def places() -> int:
    """How many answers may be made at once."""
    return max(LEAST_PLACES, min(MOST_PLACES, len(os.sched_getaffinity(0))))


class Busy(Exception):
    """Other files took all places for as long as this one could wait."""


_files = threading.BoundedSemaphore(places())


def made(content: Callable[[], bytes]) -> bytes:
    """The file of a page's download button, made when it is its turn. Raises Busy."""
    if not _files.acquire(timeout=WAIT_S):
        raise Busy("As many files as this machine has cores for are being made: try again in a moment.")
    try:
        return content()
    finally:
        _files.release()


class Turns:
    """The places of one server. Everything runs on its event loop."""

    def __init__(self, places: int, wait_s: float) -> None:
        self._free = asyncio.Semaphore(places)
        self._wait_s = wait_s

    async def answer(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with `app` once there is a place. The request holds the place until its answer is sent, or until
        its client is gone and its work has ended."""
        gone = asyncio.ensure_future(_gone(receive))
        turn = asyncio.ensure_future(self._free.acquire())
        try:
            await asyncio.wait({gone, turn}, timeout=self._wait_s, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                # Raises where its body was too large.
                gone.result()
                return
            if not turn.done():
                await _busy(self._wait_s)(scope, receive, send)
                return

            async def once_gone() -> Message:
                # No route needs the body, which has been read by now.
                return await asyncio.shield(gone)

            await app(scope, once_gone, send)
        finally:
            gone.cancel()
            # A request that already has its place cannot be cancelled: it gives the place back.
            if not turn.cancel() and not turn.cancelled():
                self._free.release()


async def _gone(receive: Receive) -> Message:
    """Wait until the client is."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return message


def _busy(wait_s: float) -> JSONResponse:
    status = HTTPStatus.TOO_MANY_REQUESTS
    detail = (
        f"As many long answers as this machine has cores for are being made, and none was done in {wait_s:.0f} "
        "seconds. Ask again later, or for less: a shorter range, fewer points, metrics or GPUs."
    )
    answer = {"type": "about:blank", "title": status.phrase, "status": status.value, "detail": detail}
    headers = {"Retry-After": f"{wait_s:.0f}", "Cache-Control": "no-store"}
    return JSONResponse(answer, status.value, headers, "application/problem+json")


class InTurn:
    """A middleware of a route whose answers take turns."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer when it is this request's turn."""
        loop = asyncio.get_running_loop()
        # A server has one loop; a test has several after each other.
        if loop not in _of_loop:
            _of_loop.clear()
            _of_loop[loop] = Turns(places(), WAIT_S)
        await _of_loop[loop].answer(self._app, scope, receive, send)


_of_loop: dict[asyncio.AbstractEventLoop, Turns] = {}
