"""A terminal of which a program has the whole screen, and which it gives back as it was, however it ends."""

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

# Sequences of xterm, which all terminals of today know: the alternate screen, with the cursor hidden. Source:
# invisible-island.net/xterm/ctlseqs.
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l\x1b[2J", "\x1b[0m\x1b[?25h\x1b[?1049l"
# What is between them a terminal that knows them shows at once; others ignore them.
TOGETHER, SHOWN = "\x1b[?2026h", "\x1b[?2026l"
HOME, REST_OF_LINE, REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


class Screen:
    """The screen, and the keys that are pressed. Made by `whole_screen`."""

    def __init__(self, keys: int | None, woken: int) -> None:
        self._keys = keys
        self._woken = woken

    def draw(self, lines: Sequence[str]) -> None:
        """Show these lines in the place of what was there, in one go and without wiping it first."""
        text = "\r\n".join(line + REST_OF_LINE for line in lines)
        _write(TOGETHER + HOME + text + REST_OF_SCREEN + SHOWN)

    def wait(self, seconds: float) -> str:
        """The keys that are pressed within so many seconds; none where time is up or the size has changed."""
        watched = [self._woken] if self._keys is None else [self._woken, self._keys]
        ready, _, _ = select.select(watched, [], [], max(0.0, seconds))
        if self._woken in ready:
            os.read(self._woken, 1024)
        if self._keys not in ready or self._keys is None:
            return ""
        pressed = os.read(self._keys, 1024)
        if not pressed:
            # The other end is closed: there will be no more keys.
            self._keys = None
        return pressed.decode(errors="replace")


def size() -> tuple[int, int]:
    """Columns and lines of the terminal."""
    return shutil.get_terminal_size()


@contextmanager
def whole_screen() -> Iterator[Screen]:
    """Take the screen, and give it back with the block's end, on errors and signals too."""
    keys = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
    before: list[Any] | None = None if keys is None else termios.tcgetattr(keys)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)

    def take() -> None:
        if keys is not None:
            # Keys come one by one and unseen; Ctrl-C stays what it is.
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
        """That it is called wakes `wait`."""

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
