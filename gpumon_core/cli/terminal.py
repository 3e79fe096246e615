"""What the verbs share: errors, exit statuses, types of arguments, bars and colours."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from gpumon_core.safety.masking import hide

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

    from gpumon_core.metrics import Level

# Exit statuses; that of a program which a signal ends is 128 and the number of the signal.
FINE, FAILED, WRONG = 0, 1, 2
INTERRUPTED = 128 + signal.SIGINT
NO_READER = 128 + signal.SIGPIPE
TERMINATED = 128 + signal.SIGTERM
STATUSES = {
    FINE: "done",
    FAILED: "something failed, or needs to be repaired; one sentence on stderr says what",
    WRONG: "wrong usage; one sentence on stderr says what is allowed",
    INTERRUPTED: "ended by Ctrl-C",
    NO_READER: "the reader of a pipe ended, as `head` does",
    TERMINATED: "ended by SIGTERM",
}

# The launcher, gpumon, changes to its own folder, and passes on its name and the folder that it was called from.
# These are no settings, and programs that gpumon starts do not get them.
PROGRAM = os.environ.pop("_GPUMON_CALLED_AS", "") or "python -m gpumon_core"
CALLED_FROM = os.environ.pop("_GPUMON_CALLED_FROM", "")

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
BAR_WIDTH = 40
REDRAW_S = 0.2


class Failure(Exception):
    """A verb cannot go on; `str()` says what happened and what to do."""


class Usage(Exception):
    """Arguments that cannot be used; `str()` says what is allowed."""


def say(sentence: str) -> None:
    """Print a sentence for the user to stderr."""
    print(f"gpumon: {hide(sentence)}", file=sys.stderr)


def ends_with_cleanup() -> None:
    """Let SIGTERM and a closed terminal end the program as Ctrl-C does, so that it can clean up."""

    def end(_: int, __: FrameType | None) -> NoReturn:
        sys.exit(TERMINATED)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)


# ---- Arguments ---------------------------------------------------------------------------------------


def number(low: float, high: float, kind: type[float] | type[int]) -> Callable[[str], Any]:
    """A parser of numbers between two limits."""

    def parse(text: str) -> float:
        try:
            found = kind(text)
        except ValueError:
            found = None
        if found is None or not low <= found <= high:
            whole = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {whole} from {low:g} to {high:g}")
        return found

    return parse


def zone(text: str) -> ZoneInfo:
    """The time zone of that IANA name."""
    from zoneinfo import ZoneInfo

    try:
        return ZoneInfo(text)
    except (KeyError, ValueError, OSError):
        # Zones are files: the name of a folder, a path outside and a long name raise other errors.
        what = f"{text!r} is not the name of a time zone, such as Europe/Berlin"
        raise argparse.ArgumentTypeError(what) from None


def add_range(parser: argparse.ArgumentParser, since: str | None) -> None:
    """The arguments --since, --until and --tz."""
    how = "3d, 12h, 30m or 90s before now; a time such as 2026-03-29T12:00; or UTC seconds"
    begin = "the beginning" if since is None else since
    parser.add_argument("--since", metavar="WHEN", default=since, help=f"from when on: {how} ({begin})")
    parser.add_argument("--until", metavar="WHEN", help="up to when, in the same words (now)")
    parser.add_argument(
        "--tz",
        metavar="ZONE",
        type=zone,
        default="UTC",
        help="time zone of the times that are shown, and of those given without an offset (UTC)",
    )


def span(arguments: argparse.Namespace, now: float) -> tuple[int | None, int | None]:
    """What --since and --until mean, in UTC seconds; None where they are not given. Raises Usage."""
    start = None if arguments.since is None else moment(arguments.since, "--since", arguments.tz, now)
    end = None if arguments.until is None else moment(arguments.until, "--until", arguments.tz, now)
    if start is not None and start > (now if end is None else end):
        raise Usage(f"--since {arguments.since} is later than " + ("now" if end is None else "--until"))
    return start, end


def moment(text: str, option: str, zone: ZoneInfo, now: float) -> int:
    """A time as users write it, in UTC seconds. Raises Usage."""
    from gpumon_core.safety.parameters import MOMENT

    before = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s*([smhdw])", text.strip(), re.ASCII | re.IGNORECASE)
    if before:
        return max(0, round(now - float(before[1]) * UNITS_S[before[2].lower()]))
    try:
        return int(MOMENT.read(text.strip(), zone))
    except ValueError:
        raise Usage(
            f"{option} {text!r} is not a time: write 3d, 12h, 30m or 90s before now, a time such as "
            "2026-03-29T12:00+02:00, or UTC seconds"
        ) from None


# ---- Output ------------------------------------------------------------------------------------------


def colours(stream: TextIO) -> bool:
    """Whether a stream is a terminal, and the user wants colours: see no-color.org."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def columns() -> int:
    """The width of the terminal."""
    return shutil.get_terminal_size().columns


def painted(text: str, level: Level) -> str:
    """Text in the colour of a level."""
    code = {"warning": "33", "critical": "1;31"}.get(level)
    return text if code is None else f"\x1b[{code}m{text}\x1b[0m"


class Bar:
    """A progress bar on stderr; nothing where stderr is not a terminal."""

    def __init__(self, what: str, shown: bool = True) -> None:
        self._stream = sys.stderr
        self._what = what
        self.shown = shown and self._stream.isatty()
        self._next = 0.0
        self._drawn = False

    def show(self, done: float, total: float) -> None:
        """Draw it, a few times a second."""
        now = time.monotonic()
        if not self.shown or (now < self._next and done < total):
            return
        self._next = now + REDRAW_S
        self._drawn = True
        part = min(1.0, done / total) if total else 1.0
        full = "#" * round(BAR_WIDTH * part)
        self._stream.write(f"\r[{full:<{BAR_WIDTH}}] {part:4.0%}  {done:,.0f} of {total:,.0f} {self._what} ")
        self._stream.flush()

    def end(self) -> None:
        """End the line of the bar."""
        if self._drawn:
            self._stream.write("\n")
            self._drawn = False


# ---- Files -------------------------------------------------------------------------------------------


def named_file(text: str) -> Path:
    """A file that the user named, relative to the folder that the program was called from."""
    return Path(text) if not CALLED_FROM or os.getcwd() == CALLED_FROM else Path(CALLED_FROM, text)


def destination(out: Path, force: bool) -> Path:
    """The path to write a file to, with links followed. Raises Failure where that would overwrite another file."""
    path = Path(os.path.realpath(out))
    if path.exists() and not path.is_file():
        raise Failure(f"{out} is not a file")
    if path.exists() and not force:
        raise Failure(
            f"{out} exists already, and was not changed: name another file, or overwrite it with --force"
        )
    if not path.parent.is_dir():
        raise Failure(f"there is no folder {path.parent}, and nothing was written: make it first")
    return path
