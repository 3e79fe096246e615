"""Short files of the kernel: /sys and /proc, each with a root that tests replace."""

from __future__ import annotations

import os
from pathlib import Path

SYS = Path("/sys")
PROC = Path("/proc")
# None of the files that are read here is nearly as long.
LONGEST = 65536


def text(path: Path) -> str | None:
    """What a file says, without the blanks around it; None where it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(LONGEST).decode(errors="replace").strip(" \t\r\n\0")
    except (OSError, ValueError):
        return None


def link(path: Path) -> str:
    """The name of what a link leads to; empty where it is none."""
    try:
        return os.path.basename(os.readlink(path))
    except OSError:
        return ""


def number(path: Path) -> int | None:
    """A whole number that is not negative; None where there is none."""
    found = text(path)
    return int(found) if found is not None and found.isascii() and found.isdigit() and len(found) < 20 else None
