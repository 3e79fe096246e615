"""Takes the whole screen of a terminal, and restores it, however the program ends."""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

# Sequences of xterm, which all present terminals know: the alternate screen, with the cursor hidden. Source:
# invisible-island.net/xterm/ctlseqs.
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l\x1b[2J", "\x1b[0m\x1b[?25h\x1b[?1049l"
# A terminal that knows these shows everything between them at once; others ignore them.
TOGETHER, SHOWN = "\x1b[?2026h", "\x1b[?2026l"
HOME, REST_OF_LINE, REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


class Screen:
    """The screen and the pressed keys. `whole_screen` makes it."""

    def __init__(self, keys: int | None, woken: int) -> None:
        self._keys = keys
        self._woken = woken

    def draw(self, lines: Sequence[str]) -> None:
        """Replace the lines on the screen by these, at once and without clearing it first."""
        text = "\r\n".join(line + REST_OF_LINE for line in lines)
        _write(TOGETHER + HOME + text + REST_OF_SCREEN + SHOWN)

    def wait(self, seconds: float) -> str:
        """The keys that are pressed within this time; none when the time is over or the size has changed."""
        watched = [self._woken] if self._keys is None else [self._woken, self._keys]
        ready, _, _ = select.select(watched, [], [], max(0.0, seconds))
        if self._woken in ready:
            os.read(self._woken, 1024)
        if self._keys not in ready or self._keys is None:
            return ""
        pressed = os.read(self._keys, 1024)
        if not pressed:
            # The other end is closed: no more keys will come.
            self._keys = None
        return pressed.decode(errors="replace")


def size() -> tuple[int, int]:
    """Columns and lines of the terminal."""
    return shutil.get_terminal_size()


@contextmanager
def whole_screen() -> Iterator[Screen]:
    """Take the screen, and restore it at the end of the block, also after errors and signals."""
    keys = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
    before: list[Any] | None = None if keys is None else termios.tcgetattr(keys)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)

    def take() -> None:
        if keys is not None:
            # Read single keys without echo; Ctrl-C still works.
            tty.setcbreak(keys)
        _write(ENTER)

    def give_back() -> None:
        with suppress(OSError, ValueError):
            _write(LEAVE)
        if keys is not None and before is not None:
            with suppress(OSError, termios.error):
                termios.tcsetattr(keys, termios.TCSADRAIN, before)

    def suspend(_: int, __: FrameType | None) -> None:
        give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        take()

    def look_again(_: int, __: FrameType | None) -> None:
        """Being called wakes `wait`."""

    handlers: dict[int, Callable[[int, FrameType | None], None]] = {
        signal.SIGWINCH: look_again,
        signal.SIGTSTP: suspend,
    }
    earlier = {number: signal.getsignal(number) for number in handlers}
    woken_by = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        take()
        yield Screen(keys, woken)
    finally:
        give_back()
        for number, one in earlier.items():
            signal.signal(number, one)
        signal.set_wakeup_fd(woken_by)
        os.close(woken)
        os.close(wake)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
