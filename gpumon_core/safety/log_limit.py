"""No client floods the log: one line a minute of each kind, and a count of what was left out.

A kind is where a record comes from: its logger, the place in the code, and of an exception its type and the
function that raised it. What a record says is no part of it: that often has what a client sent.

The limit is a filter of every logger in the process. Streamlit, uvicorn and asyncio have handlers of their
own, so that no handler sees all records. A place of gpumon's own may log more: the recorder says the same of
every GPU.
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

log = logging.getLogger(__name__)

WINDOW_S = 60.0
OURS = "gpumon_core"
# What a client of the server can make these say is limited like the words of a library.
ASKED = (
    "gpumon_core.api",
    "gpumon_core.export",
    "gpumon_core.prometheus",
    "gpumon_core.web",
    "gpumon_core.safety.log_limit",
)
# So many warnings and errors a place of gpumon's own may log in a window.
OUR_LINES = 60
MOST_KINDS = 1000
LONGEST_MESSAGE, LONGEST_TRACE = 1000, 8000
# What ends a line, moves a terminal's cursor or turns the direction of a text.
_UNSAFE = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))} | {
    code: f"\\u{code:04x}" for code in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}

Kind = tuple[str | int | None, ...]


@dataclass(slots=True)
class _Window:
    """What a kind has logged since `since`, and what was left out."""

    since: float
    logger: str
    level: int
    place: str
    lines: int = 0
    left_out: int = 0


class Limit(logging.Filter):
    """Lets through one record of a kind in a window, and says later how many it did not."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, window_s: float = WINDOW_S) -> None:
        super().__init__()
        self._clock = clock
        self._window_s = window_s
        self._guard = threading.Lock()
        self._windows: dict[Kind, _Window] = {}
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
                # The trace of the first one is enough.
                record.exc_info = record.exc_text = record.stack_info = None
        _tidy(record, f" ({left_out:,} more like this in {over:.0f} s)" if left_out else "")
        return True

    def count(self, everything: bool = False) -> None:
        """Log how many were left out of the kinds whose window is over, or of all."""
        now = self._clock()
        with self._guard:
            self._timer = None
            told = [
                (window, window.left_out, now - window.since)
                for window in self._windows.values()
                if window.left_out and (everything or now - window.since >= self._window_s)
            ]
            for window, _, _ in told:
                # The count is the line of a window of its own.
                window.since, window.lines, window.left_out = now, OUR_LINES, 0
            if any(window.left_out for window in self._windows.values()):
                self._count_later()
        for window, left_out, over in told:
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
            # A little later than the window, so that the timer finds it over.
            timer = threading.Timer(self._window_s * 1.01, self.count)
            timer.daemon = True
            # Without a thread to spare the count comes with the next line of the kind.
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
            # Kinds are places in code: so many at once do not exist, and if they do, they share a limit no longer.
            for kind in over or list(self._windows):
                del self._windows[kind]


def _lines(record: logging.LogRecord) -> int | None:
    """How many lines a kind may log in a window; None for any number."""
    if record.name.startswith(ASKED) or not _is_ours(record):
        return 1
    # What is not even a warning is said of the recorder's own steps.
    return OUR_LINES if record.levelno >= logging.WARNING else None


def _is_ours(record: logging.LogRecord) -> bool:
    return f"{record.name}.".startswith(f"{OURS}.")


def kind_of(record: logging.LogRecord) -> Kind:
    """Where a record comes from."""
    return record.name, record.levelno, record.pathname, record.lineno, *raised(record)


def raised(record: logging.LogRecord) -> Kind:
    """The type of a record's exception, and the function that raised it."""
    if not isinstance(record.exc_info, tuple) or record.exc_info[0] is None:
        return ()
    return place_of(record.exc_info[1])


def place_of(error: BaseException | None) -> Kind:
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
    """A kind in words: where, and what was raised."""
    named = raised(record)
    where = f"{record.module}.{record.funcName}"
    return f"{named[0]} in {named[2]}, {where}" if named else where


def _tidy(record: logging.LogRecord, count: str) -> None:
    """Make what a client may have written safe to read, and of a bounded length."""
    try:
        message = record.getMessage()
    except (TypeError, ValueError, KeyError):
        # A library's mistake, which logging itself tells.
        return
    if isinstance(record.exc_info, tuple) and record.exc_info[0] is not None and not record.exc_text:
        if _is_ours(record):
            trace = "".join(traceback.format_exception(*record.exc_info, limit=-10))
            record.exc_text = _safe(trace, LONGEST_TRACE)
        else:
            # What a client sent made it, mostly: a line that says what and where is enough.
            raised_by = traceback.extract_tb(record.exc_info[2])[-1:]
            where = "".join(f", {one.filename}:{one.lineno} in {one.name}" for one in raised_by)
            what = "".join(traceback.format_exception_only(*record.exc_info[:2])).strip()
            message = f"{message.strip()}: {what}{where}"
            record.exc_info = record.exc_text = record.stack_info = None
    record.msg, record.args = _safe(message, LONGEST_MESSAGE) + count, ()


def _safe(text: str, longest: int) -> str:
    # A second line does not pass for a line of the log.
    shown = text.rstrip("\n").translate(_UNSAFE).replace("\n", "\n    ")
    # What was raised stands at a trace's end.
    return shown if len(shown) <= longest else f"{shown[: longest // 2]} … {shown[-longest // 2 :]}"


class _Logger(logging.Logger):
    """A logger that is limited from its first line on."""

    def __init__(self, name: str, level: int = logging.NOTSET) -> None:
        super().__init__(name, level)
        self.addFilter(LIMIT)


LIMIT = Limit()


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    """Python would print it, every time."""
    if ended.exc_type is not SystemExit and ended.exc_value is not None:
        name = ended.thread.name if ended.thread is not None else "unknown"
        log.error("the thread %s ended by an exception", name, exc_info=ended.exc_value)


def install() -> None:
    """Limit every logger there is and will be, and what Python prints of threads."""
    if logging.getLoggerClass() is _Logger:
        return
    logging.setLoggerClass(_Logger)
    existing = [one for one in logging.Logger.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    for one in (logging.getLogger(), *existing):
        one.addFilter(LIMIT)
    threading.excepthook = _thread_ended
    atexit.register(LIMIT.count, everything=True)
