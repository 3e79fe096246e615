"""GPUs and their processes, live: like nvidia-smi, with users, containers,
workloads and models.

If a recorder writes this machine's history, this shows its newest tick, which
costs the driver nothing. Without a recorder, and with --live, it asks the
driver itself. The first line says which. q or Ctrl-C ends it. In a pipe it
prints one table and ends, as with --once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from typing import TYPE_CHECKING

from gpumon_core.cli import glance, terminal
from gpumon_core.recording import collector
from gpumon_core.settings import Settings
from gpumon_core.telemetry.records import SourceUnavailable

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

SUMMARY = "GPUs and their processes, live in this terminal."
EXAMPLES = (
    ("", "every two seconds, until q is pressed"),
    ("--interval 10", "every ten seconds"),
    ("--live", "ask the driver, although a recorder runs"),
    ("--once > gpus.txt", "one table, as text"),
)
# The longest wait of a single table for model servers and container engines.
PATIENCE_S = 2.0


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "--interval",
        metavar="SECONDS",
        type=terminal.number(0.5, 3600, float),
        default=2.0,
        help="seconds between two looks, 0.5 to 3600 (2)",
    )
    parser.add_argument("--once", action="store_true", help="print one table and end")
    parser.add_argument("--live", action="store_true", help="ask the driver, although a recorder runs")


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Show the view until the user ends it."""
    once = arguments.once or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb"
    looking = Looking(settings, arguments.live, once)
    try:
        # Errors of the first view are printed as plain text, not on the whole screen.
        view = looking.look()
        colours = terminal.colours(sys.stdout)
        if once:
            columns = terminal.columns() if sys.stdout.isatty() else None
            print("\n".join(glance.lines(view, columns, None, colours, glance.trouble(view))))
        else:
            _follow(looking, view, arguments.interval, colours)
    finally:
        looking.close()
    return terminal.FINE


def _follow(looking: Looking, view: glance.View, interval_s: float, colours: bool) -> None:
    from gpumon_core.cli.screen import size, whole_screen

    if sys.stderr.isatty():
        # Lines of the log would spoil the screen.
        logging.disable(logging.CRITICAL)
    due = time.monotonic() + interval_s
    note = glance.trouble(view)
    with whole_screen() as screen:
        while True:
            screen.draw(glance.lines(view, *size(), colours, note))
            if "q" in screen.wait(due - time.monotonic()).lower():
                return
            if time.monotonic() >= due:
                due = time.monotonic() + interval_s
                try:
                    view = looking.look()
                    note = glance.trouble(view)
                except SourceUnavailable as error:
                    note = f"{error}. {error.remedy}"


class Looking:
    """The present view: from the recorder where one writes, otherwise from the driver."""

    def __init__(self, settings: Settings, live: bool, patient: bool) -> None:
        self._settings = settings
        self._live = live
        self._patient = patient
        self._engines: dict[str, Engine] = {}
        self._observer: collector.Observer | None = None

    def look(self) -> glance.View:
        """The view of this moment. Raises SourceUnavailable."""
        settings = self._settings
        demo = settings.source == "demo"
        recorded = self._recorded(settings.database_of(settings.source))
        if recorded is not None:
            self._rest()
            return recorded
        if self._observer is None:
            try:
                self._observer = collector.SimulatedObserver(settings) if demo else collector.real(settings)
            except SourceUnavailable:
                if settings.source == "nvml":
                    raise
                recorded = self._recorded(settings.demo_database_url)
                if recorded is not None:
                    return recorded
                self._observer = collector.SimulatedObserver(settings)
        seen = self._observer.observe_once(PATIENCE_S) if self._patient else self._observer.observe()
        return glance.of_snapshot(*seen, simulated=self._observer.source.name == "demo")

    def _recorded(self, url: str) -> glance.View | None:
        from sqlalchemy.exc import DBAPIError, TimeoutError

        from gpumon_core.store import database

        path = database.file_of(url)
        if self._live or (path is not None and not path.is_file()):
            return None
        if url not in self._engines:
            self._engines[url] = database.open_for_reading(url)
        simulated = url == self._settings.demo_database_url
        try:
            return glance.of_recorder(self._engines[url], self._settings.host_name, time.time(), simulated)
        except (DBAPIError, TimeoutError):
            # The database does not exist yet, has another version or cannot be reached: ask the driver.
            return None

    def _rest(self) -> None:
        if self._observer is not None:
            self._observer.close()
            self._observer = None

    def close(self) -> None:
        """Close the database and the driver."""
        self._rest()
        for engine in self._engines.values():
            engine.dispose()
