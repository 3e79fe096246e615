"""What of a page is sent first: its charts, which its reader came for.

A browser that gets a whole page at once builds all of it before it draws the first line: the filters, each a small
program of its own, and the tables. Sent a moment later these are there a quarter of a second later, and the charts
as much sooner on a page that has many of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import streamlit as st
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from streamlit.proto.RootContainer_pb2 import RootContainer
from streamlit.runtime.scriptrunner import get_script_run_ctx

# So long most browsers take to draw a page's charts.
LEAD_S = 0.25


class _Queue:
    """Sends what has its turn, and keeps the rest in order."""

    def __init__(self, send: Callable[[ForwardMsg], None]) -> None:
        self.send = send
        self.kept: list[ForwardMsg] = []
        self.is_past_charts = False
        self._has_sidebar = False

    def take(self, message: ForwardMsg) -> None:
        """A message of the page's script."""
        (self.kept.append if self._waits(message) else self.send)(message)

    def _waits(self, message: ForwardMsg) -> bool:
        place = message.metadata.delta_path
        if not place:
            return False
        if place[0] != RootContainer.SIDEBAR:
            return self.is_past_charts
        # With its first element, which chrome.ready puts there, the sidebar takes its room.
        is_first, self._has_sidebar = not self._has_sidebar, True
        return not is_first

    def release(self) -> None:
        """Send the rest."""
        for message in self.kept:
            self.send(message)


_queue: ContextVar[_Queue | None] = ContextVar("queue", default=None)


@contextmanager
def charts_first() -> Iterator[None]:
    """While a page opens in a browser: keep the sidebar, and what follows `rest`, until the charts are drawn."""
    context = get_script_run_ctx()
    send: Callable[[ForwardMsg], None] | None = getattr(context, "_enqueue", None)
    if context is None or send is None or "opened" in st.session_state:
        yield
        return
    queue = _Queue(send)
    token = _queue.set(queue)
    context._enqueue = queue.take
    try:
        yield
        # Not where the page begins anew at once, and opens then.
        st.session_state["opened"] = True
        if queue.kept:
            time.sleep(LEAD_S)
    finally:
        context._enqueue = send
        _queue.reset(token)
        queue.release()


def rest() -> None:
    """The charts of this page are told of: what follows can wait for them."""
    queue = _queue.get()
    if queue is not None:
        queue.is_past_charts = True
