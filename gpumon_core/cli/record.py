"""Record without a server, until SIGTERM or Ctrl-C.

One recorder writes a database: a second one names it, and takes over when the
first ends.
"""

from __future__ import annotations

import argparse
import signal
import threading

from gpumon_core.cli import terminal
from gpumon_core.settings import Settings, check_data_dir

SUMMARY = "Record without a server, until SIGTERM or Ctrl-C."
EXAMPLES = (("", "every GPU every four seconds into history/gpumon.db; other settings come from the environment"),)


def add(_: argparse.ArgumentParser) -> None:
    """It takes no arguments."""


def run(settings: Settings, _: argparse.Namespace) -> int:
    """Record; 0 when a signal has ended it."""
    from gpumon_core.recording import allocator
    from gpumon_core.recording.recorder import run_until
    from gpumon_core.safety import log_limit
    from gpumon_core.web import descriptors

    if not settings.record:
        raise terminal.Failure("GPUMON_RECORD=false forbids what `record` is for: set it to true")
    check_data_dir(settings)
    allocator.limit_arenas()
    log_limit.install()
    descriptors.raise_limit()
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    run_until(settings, stopped)
    return terminal.FINE
