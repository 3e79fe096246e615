"""Each kind of line is logged once a minute, with a count, and what it says of a client is safe to read."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from gpumon_core.safety.log_limit import LONGEST_MESSAGE, OUR_LINES, Limit

FORMAT = logging.Formatter("%(levelname)s %(name)s: %(message)s")


class Log:
    """A logger of a library whose lines are collected, and a minute that passes when the test says so."""

    def __init__(self, name: str) -> None:
        self.now = 0.0
        self.lines: list[str] = []
        self.limit = Limit(lambda: self.now, window_s=60)
        self.logger = logging.getLogger(name)
        self.logger.filters[:] = [self.limit]
        self.logger.propagate = False
        self.logger.setLevel(logging.INFO)
        handler = logging.Handler()
        handler.emit = lambda record: self.lines.append(FORMAT.format(record))  # type: ignore[method-assign]
        self.logger.handlers[:] = [handler]


@pytest.fixture
def library() -> Iterator[Log]:
    yield from _log("some.library")


@pytest.fixture
def ours() -> Iterator[Log]:
    yield from _log("gpumon_core.of_a_test")


def _log(name: str) -> Iterator[Log]:
    log = Log(name)
    yield log
    log.logger.filters.clear()
    log.logger.handlers.clear()


def fail(log: Log, what: str) -> None:
    log.logger.error("no request: %s", what, exc_info=raised(what))


def raised(what: str) -> ValueError:
    """An exception with its trace."""
    try:
        int(what)
    except ValueError as error:
        return error
    raise AssertionError(what)


def test_what_differs_in_its_text_is_one_kind(library: Log) -> None:
    for number in range(1000):
        library.logger.warning("widget %s", number)
        fail(library, f"client {number}")
    assert len(library.lines) == 2
    assert library.lines[0] == "WARNING some.library: widget 0"
    assert "ValueError: invalid literal for int()" in library.lines[1]
    assert f"{__file__}:" in library.lines[1]
    assert "\n" not in library.lines[1], "what and where, in one line"
    library.now = 61
    library.logger.warning("another place")
    fail(library, "later")
    assert library.lines[2] == "WARNING some.library: another place"
    assert library.lines[3].startswith("ERROR some.library: no request: later: ValueError")
    assert library.lines[3].endswith(" (999 more like this in 61 s)")


def test_what_was_left_out_is_counted_though_nothing_follows(library: Log) -> None:
    for number in range(5):
        library.logger.warning("widget %s", number)
    library.limit.count()
    assert len(library.lines) == 1, "the minute is not over"
    library.now = 60
    library.limit.count()
    (line,) = library.lines[1:]
    assert line.startswith("WARNING some.library: 4 more like this in 60 s: ")
    library.limit.count(everything=True)
    assert len(library.lines) == 2, "each is counted once"


def test_a_flood_that_lasts_is_a_line_a_minute(library: Log) -> None:
    for second in range(600):
        library.now = second
        for _ in range(20):
            library.logger.warning("again")
        if second % 61 == 60:
            library.limit.count()
    assert 10 <= len(library.lines) <= 20


def test_another_exception_or_place_is_another_kind(library: Log) -> None:
    for error in (ValueError, OSError):
        for _ in range(3):
            library.logger.error("failed", exc_info=error("x"))
    library.logger.error("failed here")
    assert len(library.lines) == 3


def test_a_line_of_a_client_is_one_line(library: Log) -> None:
    library.logger.warning("from %s", "a\n2026-01-01 ERROR gpumon_core: made up\r\x1b[2J\u202e" + "x" * 5000)
    (line,) = library.lines
    assert "\n    2026-01-01" in line
    assert not set("\r\x1b\u202e") & set(line)
    assert len(line) < LONGEST_MESSAGE + 100


def test_a_trace_is_of_bounded_length(library: Log) -> None:
    def deep(left: int) -> None:
        if left:
            deep(left - 1)
        raise ValueError("x\n" * 10_000)

    try:
        deep(500)
    except ValueError:
        library.logger.exception("failed")
    (line,) = library.lines
    assert "ValueError" in line
    assert len(line) < 10_000
    assert all(one.startswith(" ") for one in line.splitlines()[2:])


def test_a_line_that_cannot_be_formatted_raises_nothing(library: Log) -> None:
    record = logging.LogRecord("some.library", logging.WARNING, __file__, 1, "%d of %s", ("x",), None)
    assert library.limit.filter(record)


def test_the_recorder_may_say_the_same_of_every_gpu_and_what_it_does(ours: Log) -> None:
    for number in range(OUR_LINES):
        ours.logger.warning("GPU %s is lost", number)
    for number in range(300):
        ours.logger.info("step %s", number)
    assert len(ours.lines) == OUR_LINES + 300
    for number in range(300):
        ours.logger.error("failed %s", number)
    assert len(ours.lines) == 2 * OUR_LINES + 300


def test_the_error_of_a_thread_is_one_line_too() -> None:
    program = """
import logging, sys, threading
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
from gpumon_core.safety import log_limit
log_limit.install()
for number in range(20):
    one = threading.Thread(target=int, args=(f"x{number}",), name="asker")
    one.start()
    one.join()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].startswith("ERROR the thread asker ended by an exception, and does not run")
    assert done.stdout.count("Traceback") == 1
    assert "19 more like this" in done.stdout
    assert not done.stderr


def test_every_logger_of_the_process_is_limited_old_and_new() -> None:
    program = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(name)s %(message)s")
old = logging.getLogger("old.library")
from gpumon_core.safety import log_limit
log_limit.install()
for one in (old, logging.getLogger("new.library"), logging.getLogger()):
    for number in range(100):
        one.warning("line %s", number)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[:3] == ["old.library line 0", "new.library line 0", "root line 0"]
    # The rest is counted at the end.
    assert [line.split(" in ")[0] for line in lines[3:]] == [
        f"{name} 99 more like this" for name in ("old.library", "new.library", "root")
    ]


def test_a_page_that_fails_by_what_it_was_sent_is_one_line_and_one_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
import streamlit as st
shown = []
st.error = lambda sentence, **_: shown.append(sentence)
import app
for logger in ("gpumon_core", "gpumon_core.server"):
    logging.getLogger(logger).handlers.clear()
    logging.getLogger(logger).propagate = True
for number in range(50):
    try:
        int(f"sent by client {number}")
    except ValueError as error:
        assert app.show_script_error(error)
print(len(set(shown)))
"""
    environ = {**os.environ, "GPUMON_DATA_DIR": str(tmp_path), "GPUMON_SOURCE": "demo"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("page error") == 1
    assert done.stdout.splitlines()[-1] == "1"
