"""One log format for the server and the command line, on stderr and, for the server, in a file as well."""

from __future__ import annotations

import logging
import sys
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

from gpumon_core.safety.masking import hide
from gpumon_core.safety.private_files import make_folder, opener
from gpumon_core.settings import SettingsError, shown, variable

FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
FILE_BYTES = 10_000_000
OLDER_FILES = 3


class _Hiding(logging.Formatter):
    """Masks the secrets of the settings in every line: an error of a library may quote one."""

    def format(self, record: logging.LogRecord) -> str:
        return hide(super().format(record))


class _File(RotatingFileHandler):
    """A log file. If it cannot be written, lines are missing from it, stderr says so once, and the server goes
    on."""

    is_reported = False

    def _open(self) -> TextIOWrapper:
        # Called after each rotation too.
        file = open(self.baseFilename, self.mode, encoding=self.encoding, errors=self.errors, opener=opener)  # noqa: SIM115
        assert isinstance(file, TextIOWrapper)
        return file

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Say once why the file lacks lines."""
        if not self.is_reported:
            self.is_reported = True
            problem = f"gpumon: {self.baseFilename} cannot be written ({sys.exc_info()[1]}): it lacks lines"
            print(f"{problem}, which stderr has", file=sys.stderr)  # noqa: T201


def _is_failure(record: logging.LogRecord) -> bool:
    """Whether a record is an error: SQLAlchemy also logs Ctrl-C and SIGTERM while it closes a connection."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or issubclass(kind, Exception)


def configure(level: str, file: Path | None = None) -> None:
    """Send gpumon's log at `level` to stderr and to `file`, and only the warnings of libraries. Raises
    SettingsError where the file cannot be written."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None:
        try:
            make_folder(file.parent)
            handlers.append(_File(file, maxBytes=FILE_BYTES, backupCount=OLDER_FILES, encoding="utf-8"))
        except OSError as error:
            raise SettingsError(
                f"{variable('log_file')}={shown('log_file', file)}: must be a file that this user can write to "
                f"({error.strerror})"
            ) from None
    for handler in handlers:
        handler.setFormatter(_Hiding(FORMAT))
        handler.addFilter(_is_failure)
    ours = logging.getLogger("gpumon_core")
    ours.handlers[:] = handlers
    ours.setLevel(level)
    ours.propagate = False
    for name in ("sqlalchemy.pool", "asyncio", "uvicorn.error"):
        library = logging.getLogger(name)
        library.handlers[:] = handlers
        library.setLevel(logging.WARNING)
        library.propagate = False
    # The scheduler warns about every late run: that would be a line per tick on a slow machine.
    scheduler = logging.getLogger("apscheduler")
    scheduler.handlers[:] = handlers
    scheduler.setLevel(logging.ERROR)
    scheduler.propagate = False
