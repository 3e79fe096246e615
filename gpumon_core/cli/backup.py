"""Copy a live SQLite database into one consistent file, while the recorder goes
on.

The copy is the database at one moment. It is checked, and gets its name when
it is complete. To restore it, replace history/gpumon.db with it while gpumon
does not run. For PostgreSQL this prints the command for pg_dump.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpumon_core.cli import stored, terminal
from gpumon_core.safety.masking import STARS
from gpumon_core.safety.private_files import make_file
from gpumon_core.settings import Settings, mask_password

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

SUMMARY = "Copy the live database into a file."
EXAMPLES = (
    ("", "a copy beside the database, named after the time"),
    ("--out /mnt/backup/gpumon.db --force", "each night over the copy of the night before"),
)
# The pages of 4 KiB that are copied between two updates of the bar.
PAGES = 1000
# The space that stays free on the disk for the recorder.
SPARE_BYTES = 64 * 2**20
COMPANIONS = ("", "-wal", "-shm", "-journal")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the copy."""
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=terminal.named_file,
        help="the copy (beside the database, named after the time)",
    )
    parser.add_argument("--force", action="store_true", help="write over a FILE that exists")


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Copy the database, check the copy and name it."""
    from gpumon_core.store import database

    url = stored.url_of(settings)
    source = database.file_of(url)
    if source is None:
        raise terminal.Failure(f"gpumon copies SQLite only; PostgreSQL has a program for it: {dump_command(url)}")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = terminal.destination(
        arguments.out or source.with_name(f"{source.stem}-{stamp}{source.suffix}"), arguments.force
    )
    own = [source.with_name(source.name + suffix) for suffix in (*COMPANIONS, ".lock")]
    if any(os.path.realpath(one) == str(path) for one in own):
        raise terminal.Failure(f"{path} belongs to the database itself: name another file")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    began = time.monotonic()
    try:
        with stored.history(settings, url) as engine:
            copy(engine, part)
        check(part)
        terminal.destination(path, arguments.force)
        part.replace(path)
    finally:
        for suffix in COMPANIONS:
            part.with_name(part.name + suffix).unlink(missing_ok=True)
    size = path.stat().st_size / 1e6
    print(f"{source} copied to {path}: {size:.1f} MB, checked, in {time.monotonic() - began:.1f} s")
    return terminal.FINE


def copy(engine: Engine, path: Path) -> None:
    """Make `path` a copy of a SQLite database. Raises Failure, sqlalchemy.exc.DBAPIError."""
    bar = terminal.Bar("pages")
    with engine.connect() as connection, closing(_new(path)) as copied:
        # From now on this connection sees one moment. Otherwise SQLite would begin again with every tick that is
        # recorded meanwhile. Source: sqlite.org/backup.html, and sqlite3_backup_step in its C interface.
        pages = int(connection.exec_driver_sql("PRAGMA page_count").scalar_one())
        connection.exec_driver_sql("SELECT count(*) FROM sqlite_schema").scalar_one()
        needed = pages * int(connection.exec_driver_sql("PRAGMA page_size").scalar_one())
        free = shutil.disk_usage(path.parent).free
        if free < needed + SPARE_BYTES:
            raise terminal.Failure(
                f"the copy takes {needed / 1e6:,.0f} MB, and {path.parent} has {free / 1e6:,.0f} MB free: free "
                "some space, or name another folder with --out"
            )
        driver: Any = connection.connection.driver_connection
        try:
            driver.backup(copied, pages=PAGES, progress=lambda _, left, total: bar.show(total - left, total))
            # The log of a live database is a file beside it; a copy is one file.
            copied.execute("PRAGMA journal_mode = DELETE")
        except sqlite3.Error as error:
            raise terminal.Failure(
                f"{path.parent} cannot hold the copy ({error}): check the disk, or name another folder with --out"
            ) from error
        finally:
            bar.end()


def _new(path: Path) -> sqlite3.Connection:
    make_file(path)
    return sqlite3.connect(path)


def check(path: Path) -> None:
    """Check that the copy is not damaged, and write it to the disk. Raises Failure."""
    with closing(sqlite3.connect(path)) as copied:
        try:
            found = " ".join(str(copied.execute("PRAGMA quick_check(1)").fetchone()[0]).split())
        except sqlite3.Error as error:
            found = str(error)
    if found != "ok":
        raise terminal.Failure(f"the copy is damaged ({found}) and was deleted: check the database and the disk")
    for place in (path, path.parent):
        # Some file systems cannot synchronize a folder.
        with suppress(OSError):
            handle = os.open(place, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def dump_command(url: str) -> str:
    """The command of pg_dump that copies the database at a URL, with stars for the password."""
    import shlex

    from sqlalchemy.engine import make_url

    parsed = make_url(url)
    shown = mask_password(parsed.set(drivername="postgresql").render_as_string(hide_password=False))
    name = f"gpumon-{time.strftime('%Y%m%d-%H%M%S')}.dump"
    command = f"pg_dump --format=custom --file={name} {shlex.quote(shown)}"
    note = " (write the password instead of ***, or leave out `:***` and set PGPASSWORD)" if STARS in shown else ""
    return command + note
