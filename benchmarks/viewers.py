"""Viewers without a browser: they open a page and refresh it as rhythm.js does, by Streamlit's own protocol.

A browser draws on the viewer's machine, not on the server. Where one machine is both, 25 browsers would measure
themselves. These viewers only receive what the server sends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import websockets

from pages.components.streamlit_private import STREAM, BackMsg, ForwardMsg

DELAY_S = 0.3
LARGEST = 64 << 20


@dataclass
class Viewer:
    """One open page. `waits_s` has the time from each request to the end of its answer, `failures` what failed."""

    port: int
    page: str
    refresh_s: float
    zone: str = "Europe/Berlin"
    waits_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    received: int = 0

    async def watch(self, seconds: float, opened: asyncio.Barrier) -> None:
        """Open the page, wait until the other viewers have opened theirs, and follow it for `seconds`."""
        url = f"ws://127.0.0.1:{self.port}{STREAM}"
        async with websockets.connect(url, subprotocols=["streamlit"], max_size=LARGEST) as socket:
            fragment = await self._ask(socket, "")
            self.waits_s.clear()
            self.received = 0
            await opened.wait()
            until = time.monotonic() + seconds
            while (now := time.monotonic()) < until:
                await asyncio.sleep(max(0.0, self.refresh_s - time.time() % self.refresh_s) + DELAY_S)
                if time.monotonic() - now > 4 * self.refresh_s:
                    self.failures.append("this machine is too busy to ask in time")
                await self._ask(socket, fragment)

    async def _ask(self, socket: websockets.ClientConnection, fragment: str) -> str:
        """Run the page, or its fragment, and wait for the end; returns the id of the page's fragment."""
        message = BackMsg()
        message.rerun_script.page_name = self.page
        message.rerun_script.fragment_id = fragment
        message.rerun_script.context_info.timezone = self.zone
        began = time.monotonic()
        await socket.send(message.SerializeToString())
        found = fragment
        while True:
            data = await asyncio.wait_for(socket.recv(decode=False), 60)
            self.received += len(data)
            answer = ForwardMsg()
            answer.ParseFromString(data)
            kind = answer.WhichOneof("type")
            if kind == "delta":
                found = found or answer.delta.fragment_id
                if "could not be drawn" in str(answer.delta.new_element.alert.body):
                    self.failures.append(answer.delta.new_element.alert.body)
            elif kind == "script_finished":
                self.waits_s.append(time.monotonic() - began)
                return found


async def watch(viewers: list[Viewer], seconds: float, begun: Callable[[], None] = lambda: None) -> None:
    """All viewers open their pages, one after the other; then `begun` is called, and they watch for `seconds`."""
    opened = asyncio.Barrier(len(viewers) + 1)

    async def open_page(viewer: Viewer, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await viewer.watch(seconds, opened)

    async def all_opened() -> None:
        await opened.wait()
        begun()

    await asyncio.gather(all_opened(), *(open_page(viewer, 0.2 * number) for number, viewer in enumerate(viewers)))
