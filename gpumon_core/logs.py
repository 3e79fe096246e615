"""One log format for the server and the command line, on stderr."""

from __future__ import annotations

import logging
import sys

FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def configure(level: str) -> None:
    """Send gpumon's log to stderr at `level`, and other libraries' only where they warn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT))
    ours = logging.getLogger("gpumon_core")
    ours.handlers[:] = [handler]
    ours.setLevel(level)
    ours.propagate = False
    # The scheduler warns about every late run, which would be a line per tick on a slow machine.
    scheduler = logging.getLogger("apscheduler")
    scheduler.handlers[:] = [handler]
    scheduler.setLevel(logging.ERROR)
    scheduler.propagate = False
