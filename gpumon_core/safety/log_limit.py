"""Limits the log, so that no client can flood it: one line a minute of each kind, and a count of the lines left
out.

A kind is the origin of a record: its logger, the place in the code, and for an exception its type and the function
that raised it. The message does not count, because it often has text from a client.

The limit is a filter of every logger in the process, because no handler gets all records: Streamlit, uvicorn and
asyncio have handlers of their own. A place in gpumon's own code may log more lines: the recorder logs the same
line for every GPU.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from gpumon_core.safety.text import escaped

log = logging.getLogger(__name__)

WINDOW_S = 60.0
OURS = "gpumon_core"
# Loggers of our own with lines that a client can cause: they get the limit of a library.
FOR_CLIENTS = (
    "gpumon_core.api",
    "gpumon_core.export",
    "gpumon_core.prometheus",
    "gpumon_core.web",
    "gpumon_core.safety.log_limit",
)
# The most warnings and errors that a place in gpumon's own code may log in a window.
OUR_LINES = 60
MOST_KINDS = 1000
LONGEST_MESSAGE, LONGEST_TRACE = 1000, 8000

MessageKind = tuple[str | int | None, ...]


@dataclass(slots=True)
class _Window:
    """The lines of a kind since `since`, and the lines left out."""

    since: float
    logger: str
    level: int
    place: str
    lines: int = 0
    left_out: int = 0


class Limit(logging.Filter):
    """Passes one record of a kind in a window, and later logs how many it left out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, window_s: float = WINDOW_S) -> None:
        super().__init__()
        self._clock = clock
        self._window_s = window_s
        self._guard = threading.Lock()
        self._windows: dict[MessageKind, _Window] = {}
        self._timer: threading.Timer | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record may be logged."""
        most = _lines(record)
        if most is None:
            return True
        if getattr(record, "is_count", False):
            return True
        kind, now = kind_of(record), self._clock()
        left_out, over = 0, 0.0
        with self._guard:
            window = self._windows.get(kind)
            if window is None or now - window.since >= self._window_s:
                if window is not None:
                    left_out, over = window.left_out, now - window.since
                self._make_room(now)
                window = self._windows[kind] = _Window(now, record.name, record.levelno, _place(record))
            window.lines += 1
            if window.lines > most:
                window.left_out += 1
                self._count_later()
                return False
            if window.lines > 1:
                # The traceback of the first one is enough.
                record.exc_info = record.exc_text = record.stack_info = None
        _tidy(record, f" ({left_out:,} more like this in {over:.0f} s)" if left_out else "")
        return True

    def count(self, everything: bool = False) -> None:
        """Log how many lines were left out, for the kinds with a window that is over, or for all."""
        now = self._clock()
        with self._guard:
            self._timer = None
            counted = [
                (window, window.left_out, now - window.since)
                for window in self._windows.values()
                if window.left_out and (everything or now - window.since >= self._window_s)
            ]
            for window, _, _ in counted:
                # The line with the count begins a new window.
                window.since, window.lines, window.left_out = now, OUR_LINES, 0
            if any(window.left_out for window in self._windows.values()):
                self._count_later()
        for window, left_out, over in counted:
            logging.getLogger(window.logger).log(
                window.level,
                "%s more like this in %.0f s: %s",
                f"{left_out:,}",
                over,
                window.place,
                extra={"is_count": True},
            )

    def _count_later(self) -> None:
        if self._timer is None:
            # A little later than the window, so that it is over then.
            timer = threading.Timer(self._window_s * 1.01, self.count)
            timer.daemon = True
            # If no thread can start, the count comes with the next line of the kind.
            with suppress(RuntimeError):
                timer.start()
                self._timer = timer

    def _make_room(self, now: float) -> None:
        if len(self._windows) >= MOST_KINDS:
            over = [
                kind
                for kind, window in self._windows.items()
                if not window.left_out and now - window.since >= self._window_s
            ]
            # Kinds are places in code, and there are not so many. If there ever are, all windows begin again.
            for kind in over or list(self._windows):
                del self._windows[kind]


def _lines(record: logging.LogRecord) -> int | None:
    """The most lines of a kind in a window; None without a limit."""
    if record.name.startswith(FOR_CLIENTS) or not _is_ours(record):
        return 1
    # Messages below a warning are about the recorder's own steps.
    return OUR_LINES if record.levelno >= logging.WARNING else None


def _is_ours(record: logging.LogRecord) -> bool:
    return f"{record.name}.".startswith(f"{OURS}.")


def kind_of(record: logging.LogRecord) -> MessageKind:
    """The origin of a record."""
    return record.name, record.levelno, record.pathname, record.lineno, *raised(record)


def raised(record: logging.LogRecord) -> MessageKind:
    """The type of a record's exception, and the function that raised it."""
    if not isinstance(record.exc_info, tuple) or record.exc_info[0] is None:
        return ()
    return place_of(record.exc_info[1])


def place_of(error: BaseException | None) -> MessageKind:
    """The type of an exception and the function that raised it."""
    last = error.__traceback__ if error is not None else None
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code if last is not None else None
    return (
        type(error).__name__,
        code.co_filename if code is not None else None,
        code.co_name if code is not None else None,
    )


def _place(record: logging.LogRecord) -> str:
    """A kind in words: the place, and what was raised."""
    named = raised(record)
    where = f"{record.module}.{record.funcName}"
    return f"{named[0]} in {named[2]}, {where}" if named else where


def _tidy(record: logging.LogRecord, count: str) -> None:
    """Make a message safe to read and limit its length: a client may have written parts of it."""
    try:
        message = record.getMessage()
    except (TypeError, ValueError, KeyError):
        # An error of a library, which logging itself reports.
        return
    if isinstance(record.exc_info, tuple) and record.exc_info[0] is not None and not record.exc_text:
        if _is_ours(record):
            trace = "".join(traceback.format_exception(*record.exc_info, limit=-10))
            record.exc_text = _safe(trace, LONGEST_TRACE)
        else:
            # Mostly a client has caused it: one line with what and where is enough.
            raised_by = traceback.extract_tb(record.exc_info[2])[-1:]
            where = "".join(f", {one.filename}:{one.lineno} in {one.name}" for one in raised_by)
            what = "".join(traceback.format_exception_only(*record.exc_info[:2])).strip()
            message = f"{message.strip()}: {what}{where}"
            record.exc_info = record.exc_text = record.stack_info = None
    record.msg, record.args = _safe(message, LONGEST_MESSAGE) + count, ()


def _safe(text: str, longest: int) -> str:
    # Indent further lines, so that none looks like a line of the log.
    shown = escaped(text.rstrip("\n"), "\n\t").replace("\n", "\n    ")
    # Show both ends: the exception is at the end of a traceback.
    return shown if len(shown) <= longest else f"{shown[: longest // 2]} … {shown[-longest // 2 :]}"


class _Logger(logging.Logger):
    """A logger with the limit from its first line on."""

    def __init__(self, name: str, level: int = logging.NOTSET) -> None:
        super().__init__(name, level)
        self.addFilter(LIMIT)


LIMIT = Limit()


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    """Log it: Python itself would print it every time, without a limit."""
    if ended.exc_type is not SystemExit and ended.exc_value is not None:
        name = ended.thread.name if ended.thread is not None else "unknown"
        log.error(
            "the thread %s ended by an exception, and does not run any more: restart gpumon, and report it",
            name,
            exc_info=ended.exc_value,
        )


def install() -> None:
    """Limit every logger, also later ones, and what Python prints about threads."""
    if logging.getLoggerClass() is _Logger:
        return
    logging.setLoggerClass(_Logger)
    existing = [one for one in logging.Logger.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    for one in (logging.getLogger(), *existing):
        one.addFilter(LIMIT)
    threading.excepthook = _thread_ended
    atexit.register(LIMIT.count, everything=True)
