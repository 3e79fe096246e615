"""Long answers take turns: as many at a time as the machine has cores.

To read a history and write it as text takes a core and some tens of megabytes. More of them at once would not be
answered sooner; they would only need more memory. The others wait, without a thread, and are asked to come back if
it takes too long. What is answered from memory or from a few rows waits for none of them.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from http import HTTPStatus

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Two on one core, so that a client that reads slowly does not keep everybody waiting; and no more than half of the
# threads that the server has for all its routes.
LEAST_PLACES, MOST_PLACES = 2, 14
WAIT_S = 10.0


def places() -> int:
    """How many answers are made at a time."""
    return max(LEAST_PLACES, min(MOST_PLACES, len(os.sched_getaffinity(0))))


class Busy(Exception):
    """Others were making their files for all the time that this one could wait."""


_files = threading.BoundedSemaphore(places())


def made(content: Callable[[], bytes]) -> bytes:
    """A file that a page offers, made when it is its turn. Raises Busy."""
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
        """Answer with `app` once there is a place. It keeps the place until its answer is sent, or its client is
        gone and what it was doing has ended."""
        gone = asyncio.ensure_future(_gone(receive))
        turn = asyncio.ensure_future(self._free.acquire())
        try:
            await asyncio.wait({gone, turn}, timeout=self._wait_s, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                # Or its body was too large, which is raised here.
                gone.result()
                return
            if not turn.done():
                await _busy(self._wait_s)(scope, receive, send)
                return

            async def once_gone() -> Message:
                # No answer has a use for a body, which has been read by now.
                return await asyncio.shield(gone)

            await app(scope, once_gone, send)
        finally:
            gone.cancel()
            # To cancel one that has its turn does nothing, and it has to give it back.
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
