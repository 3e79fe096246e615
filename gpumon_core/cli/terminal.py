"""What the verbs share."""

from __future__ import annotations

import sys
import time

BAR_WIDTH = 40
REDRAW_S = 0.2


class Bar:
    """A bar on a terminal, as stderr is for most; nothing where that goes elsewhere."""

    def __init__(self, what: str, shown: bool = True) -> None:
        self._stream = sys.stderr
        self._what = what
        self._shown = shown and self._stream.isatty()
        self._next = 0.0
        self._drawn = False

    def show(self, done: float, whole: float) -> None:
        """Draw it, a few times a second."""
        now = time.monotonic()
        if not self._shown or (now < self._next and done < whole):
            return
        self._next = now + REDRAW_S
        self._drawn = True
        part = min(1.0, done / whole) if whole else 1.0
        full = "#" * round(BAR_WIDTH * part)
        self._stream.write(f"\r[{full:<{BAR_WIDTH}}] {part:4.0%}  {done:,.0f} of {whole:,.0f} {self._what} ")
        self._stream.flush()

    def end(self) -> None:
        """Leave its line."""
        if self._drawn:
            self._stream.write("\n")
            self._drawn = False
