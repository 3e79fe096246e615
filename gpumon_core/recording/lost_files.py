"""What happens when the database is damaged, or its file is removed or replaced while gpumon records into it."""

from __future__ import annotations

import logging

from sqlalchemy.engine import Engine

from gpumon_core.recording.counters import LiveCounters
from gpumon_core.recording.state import Problem
from gpumon_core.settings import mask_password
from gpumon_core.store import database, database_file
from gpumon_core.store.database_file import OpenFile

log = logging.getLogger(__name__)

WORDS = {"gone": "removed", "replaced": "replaced by another file", "without log": "left without its log"}
_MARKS = {"gone": "removed", "replaced": "replaced"}


def open_database(url: str, counters: LiveCounters) -> tuple[Engine, Problem | None]:
    """The database, and what happened to it: a damaged file is set aside, and a new one is made. Raises
    database.DatabaseError."""
    try:
        return database.open_for_writing(url), None
    except database.DatabaseDamaged:
        notice = set_aside(url)
        counters.failed(notice.reason, tick=False)
        return database.open_for_writing(url), notice


def prepare(file: OpenFile, found: database_file.FileState, is_saved: bool = False) -> Problem:
    """Make the path ready to be opened again after its file was removed or replaced; what to say about it.
    `is_saved`: where the log alone was removed, its content was written into the file. Raises
    database.DatabaseError."""
    if found == "without log":
        file.clear_way()
        file.close()
        lost = "its content was written into the file" if is_saved else "what was recorded last may be lost"
        return Problem(
            f"The log of the database {file.path} was removed while it was recorded into; {lost}",
            f"Leave the files {file.path.name}{database_file.LOG} and {database_file.INDEX} alone "
            "while gpumon runs.",
        )
    try:
        log_file = file.put_log_aside(_MARKS[found])
        file.close()
    except OSError as error:
        raise database.DatabaseError(
            f"The database {file.path} was replaced, and the write-ahead log of the file before cannot be "
            f"renamed: {error.strerror}. Move {database_file.beside(file.path, database_file.LOG)} away."
        ) from error
    beside = f" The log of the file before lies beside it as {log_file.name}." if log_file else ""
    if found == "gone":
        return Problem(
            f"The database {file.path} was removed while it was recorded into; recording goes on in a new one",
            f"Only a backup has the history before that. Stop gpumon before you put one in its place.{beside}",
        )
    return Problem(
        f"The database {file.path} was replaced while it was recorded into; recording goes on in the file that is "
        "there now",
        f"Stop gpumon before you put another database in its place: the last ticks may be lost.{beside}",
    )


def set_aside(url: str) -> Problem:
    """Move a damaged file out of the way; what to say about it. Raises database.DatabaseError."""
    path = database.file_of(url)
    if path is None:
        raise database.DatabaseError(f"The database {mask_password(url)} is damaged.")
    try:
        aside = database_file.set_aside(path)
    except OSError as reason:
        raise database.DatabaseError(
            f"The database {path} is damaged, and could not be set aside: {reason.strerror}."
        ) from reason
    problem = Problem(
        f"The database {path} was damaged and has been set aside as {aside.name}; recording goes on in a new one",
        "Nothing was deleted: `sqlite3 FILE .recover` may save what is in it.",
    )
    log.error("%s. %s", problem.reason, problem.remedy)
    return problem
