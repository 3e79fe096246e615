"""Opens the database: the only place that makes connections, and that brings a schema up to date."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.pool import ConnectionPoolEntry, NullPool, QueuePool

from gpumon_core.settings import mask_password
from gpumon_core.store.schema import for_postgresql, metadata
from gpumon_core.store.sqlite_file import explain_foreign, identity

log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).with_name("migrations")
# How long a connection waits for another program's lock before it gives up: the recorder's ticks wait in
# memory then, so that none comes late.
BUSY_TIMEOUT_S = 5.0
WRITER_TIMEOUT_S = 1.0
# A server that does not answer is given up after this; a query for a page after this.
CONNECT_TIMEOUT_S = 3
QUERY_TIMEOUT_S = 30


# Alembic's own table, as Alembic makes it.
_stamp = sa.Table(
    "alembic_version",
    sa.MetaData(),
    sa.Column("version_num", sa.String(32), nullable=False),
    sa.PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)


class DatabaseError(Exception):
    """The database cannot be used; `str()` says why and what to do."""


class DatabaseAway(DatabaseError):
    """The database does not answer now, and may come back by itself."""


class DatabaseDamaged(DatabaseError):
    """The file is not a sound SQLite database."""


def open_for_writing(url: str, patience_s: float = WRITER_TIMEOUT_S) -> Engine:
    """The recorder's engine, on a database that is created or brought up to date first.

    `patience_s` is how long a transaction waits for another program's lock.
    Raises DatabaseDamaged where the file is not a sound database, DatabaseError where it cannot be used.
    """
    path = file_of(url)
    engine = None
    foreign = path and explain_foreign(path)
    if foreign:
        raise DatabaseError(foreign)
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        engine = _engine(url, write=True, patience_s=patience_s)
        _upgrade(engine, url)
    except (OSError, sa.exc.DBAPIError) as error:
        if engine is not None:
            engine.dispose()
        kind = DatabaseDamaged if is_damage(error) else DatabaseError
        raise kind(_explain(url, error)) from error
    return engine


def is_damage(error: BaseException) -> bool:
    """Whether an error means that the SQLite file itself is broken."""
    code = getattr(getattr(error, "orig", error), "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def checkpoint(engine: Engine) -> None:
    """Bring what was committed from SQLite's log into its file, so that no other program's commit has to.

    Nobody waits for it, and where others read or write it does what it can.
    """
    if engine.dialect.name != "sqlite":
        return
    connection = engine.raw_connection()
    try:
        connection.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)")
    except sqlite3.OperationalError as error:
        log.debug("no checkpoint: %s", error)
    finally:
        connection.close()


def is_busy(error: BaseException) -> bool:
    """Whether an error means that another transaction was in the way: the same may work a moment later."""
    cause = getattr(error, "orig", error)
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
    # PostgreSQL documentation, "Error Codes": serialization failure, deadlock, lock not available.
    return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or getattr(cause, "sqlstate", None) in (
        *("40001", "40P01", "55P03"),
    )


def size_bytes(engine: Engine) -> int | None:
    """What the database takes on disk, its write-ahead log included. Raises sqlalchemy.exc.DBAPIError."""
    if engine.dialect.name == "postgresql":
        with engine.connect() as connection:
            return connection.execute(sa.text("SELECT pg_database_size(current_database())")).scalar()
    path = file_of(str(engine.url))
    if path is None:
        return None
    parts = (path, path.with_name(path.name + "-wal"))
    return sum(part.stat().st_size for part in parts if part.exists())


def open_for_reading(url: str, often: bool = False) -> Engine:
    """An engine that cannot write. It may name a database that does not exist yet: see `exists`.

    Read `often`, it keeps connections to a file open: opening one takes 0.7 ms, as long as many a query. Whoever
    asks for that disposes of the engine before the recorder stops, whose last connection tidies up the file.
    """
    return _engine(url, write=False, often=often)


def exists(url: str) -> bool:
    """Whether there is a gpumon database with a schema at `url`."""
    path = file_of(url)
    if path is not None and not path.is_file():
        return False
    engine = _engine(url, write=False)
    try:
        with engine.connect() as connection:
            return revision(connection) is not None
    except sa.exc.DBAPIError:
        return False
    finally:
        engine.dispose()


def file_of(url: str) -> Path | None:
    """The SQLite file that `url` names, or None for a database that is not a file."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        return None
    return Path(parsed.database)


def revision(connection: sa.Connection) -> str | None:
    """The revision of the schema, or None where there is none yet."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def head() -> str:
    """The revision that this program writes: the last file of the migrations."""
    return max(path.name for path in (MIGRATIONS / "versions").glob("[0-9]*.py")).split("_", 1)[0]


def _engine(url: str, write: bool, patience_s: float = BUSY_TIMEOUT_S, often: bool = False) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        for_postgresql()
        return _server_engine(parsed, write)
    options: dict[str, Any] = {"timeout": patience_s, "check_same_thread": False}
    # The recorder keeps its one connection, and who reads often keeps two; another reader's is made per query.
    pool: dict[str, Any] = {"poolclass": NullPool}
    if often:
        pool = {"poolclass": QueuePool, "pool_size": 2, "max_overflow": -1, "pool_use_lifo": True}
    engine = sa.create_engine(parsed, connect_args=options, **({} if write else pool))
    if often:
        _follow_file(engine, url)

    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _: object) -> None:
        # SQLAlchemy begins transactions itself (below), so that they hold for DDL too.
        connection.isolation_level = None
        cursor = connection.cursor()
        if write:
            # Takes effect on a new file only; lets retention give space back.
            cursor.execute("PRAGMA auto_vacuum = INCREMENTAL")
            cursor.execute("PRAGMA journal_mode = WAL")
            # With WAL a killed program loses nothing that was committed.
            cursor.execute("PRAGMA synchronous = NORMAL")
            # In KiB, for each of the recorder's few connections: what a tick touches fits.
            cursor.execute("PRAGMA cache_size = -512")
            # A log that once was long, as while another program held a lock, gives its space back.
            cursor.execute("PRAGMA journal_size_limit = 16000000")
        else:
            cursor.execute("PRAGMA query_only = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _follow_file(engine: Engine, url: str) -> None:
    """Let no connection be used whose file was replaced since: it would show what is not there any more."""
    path = file_of(url)

    @event.listens_for(engine, "connect")
    def _remember(_: object, record: ConnectionPoolEntry) -> None:
        record.info["file"] = identity(path)

    @event.listens_for(engine, "checkout")
    def _compare(_: object, record: ConnectionPoolEntry, __: object) -> None:
        if record.info["file"] != identity(path):
            raise sa.exc.DisconnectionError(f"{path} was replaced")


def _server_engine(url: sa.URL, write: bool) -> Engine:
    """An engine on PostgreSQL. A connection that broke is replaced before it is used."""
    limits = f"-c statement_timeout={QUERY_TIMEOUT_S}s -c lock_timeout=5s"
    if not write:
        limits += " -c default_transaction_read_only=on"
    options = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "tcp_user_timeout": 5000,
        "application_name": "gpumon recorder" if write else "gpumon",
        "options": limits,
    }
    return sa.create_engine(url, connect_args=options, pool_pre_ping=True, pool_size=5, max_overflow=10)


def _upgrade(engine: Engine, url: str) -> None:
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            # Two recorders that start together must not both make the tables.
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7267860951)")
            _bring_up_to_date(connection, url)
        return
    with engine.connect() as connection:
        if revision(connection) == head():
            return
    with engine.begin() as connection:
        _bring_up_to_date(connection, url)


def _bring_up_to_date(connection: sa.Connection, url: str) -> None:
    found = revision(connection)
    wanted = head()
    if found == wanted:
        return
    if found is not None and found > wanted:
        raise DatabaseError(
            f"The database {mask_password(url)} was written by a newer gpumon (revision {found}, this one knows "
            f"{wanted}): start that version again, or name another database in GPUMON_DATABASE_URL."
        )
    if found is None:
        # A test holds these tables to what the revisions make, one after the other.
        metadata.create_all(connection)
        _stamp.create(connection)
        connection.execute(_stamp.insert().values(version_num=wanted))
    else:
        _migrate(connection)
    log.info("database %s: schema %s -> %s", mask_password(url), found or "new", wanted)


def _migrate(connection: sa.Connection) -> None:
    """Run the revisions that the database lacks."""
    # Imported only now: Alembic is a sixth of the recorder's memory, and few starts need it.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _explain(url: str, error: Exception) -> str:
    cause = getattr(error, "orig", None) or error
    name = str(file_of(url) or mask_password(url))
    text = str(cause)
    if is_damage(error):
        remedy = "It is not a sound SQLite file: move it away, and gpumon starts a new one."
    elif isinstance(cause, PermissionError) or "readonly" in text or "unable to open" in text:
        remedy = "Give this user write access to the folder, or choose another with GPUMON_DATA_DIR."
    elif "locked" in text:
        remedy = "Another program holds a lock on it: close that program."
    elif "full" in text:
        remedy = "Free some disk space."
    elif file_of(url) is None:
        remedy = "Look at the server and at GPUMON_DATABASE_URL."
        text = " ".join(text.split())
    else:
        remedy = "Look at the file and its folder, or choose another with GPUMON_DATA_DIR."
    return f"The database {name} cannot be opened ({text}). {remedy}"
