"""Opens the database: the only place that makes connections, and that brings a schema up to date."""

from __future__ import annotations

import errno
import logging
import random
import sqlite3
import threading
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.pool import ConnectionPoolEntry, NullPool, QueuePool

from gpumon_core.safety.private_files import make_file, make_folder
from gpumon_core.settings import Settings, mask_password
from gpumon_core.store import database_file
from gpumon_core.store.database_file import explain_foreign, identity
from gpumon_core.store.schema import for_postgresql, metadata

if TYPE_CHECKING:
    from gpumon_core.store.postgresql import ServerConnection

log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).with_name("migrations")
# How long a connection waits for another program's lock before it gives up; what the recorder could not write is
# tried again with the next tick.
BUSY_TIMEOUT_S = 5.0
WRITER_TIMEOUT_S = 1.0
# How long a start waits for another that makes or moves the tables of a server, and how often it looks. Longer
# than that it is a database that is away: a large one may take an hour.
MIGRATION_WAIT_S = 60.0
MIGRATION_LOOK_S = 0.2
# A migration among recorders that go on writing may lose a race for locks: nothing of it has happened then.
MIGRATION_ATTEMPTS = 5
MIGRATION_KEY = 7267860951

# Alembic's own table, as Alembic makes it.
_stamp = sa.Table(
    "alembic_version",
    sa.MetaData(),
    sa.Column("version_num", sa.String(32), nullable=False),
    sa.PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)


_REVISION = sa.select(_stamp.c.version_num)

# The open connections of every engine on a server.
_connections: WeakKeyDictionary[Engine, WeakSet[ServerConnection]] = WeakKeyDictionary()
_connecting = threading.Lock()


is_damage = database_file.is_damage


class DatabaseError(Exception):
    """The database cannot be used; `str()` says why and what to do."""


class DatabaseAway(DatabaseError):
    """The database cannot be used now, and may be at any moment without anybody's help: it is worth another try.

    A server that does not answer, starts or has no connection left; a lock that another holds; a full disk.
    A wrong password, a database that does not exist and a newer schema are plain DatabaseErrors: they stay.
    """


class DatabaseDamaged(DatabaseError):
    """The file is not a sound SQLite database."""


def open_for_writing(url: str, patience_s: float = WRITER_TIMEOUT_S) -> Engine:
    """The recorder's engine, on a database that is created or brought up to date first.

    `patience_s` is how long a transaction waits for another program's lock.
    Raises DatabaseDamaged where the file is not a sound database, DatabaseAway where it may be usable later, and
    DatabaseError where it will not.
    """
    path = file_of(url)
    engine = None
    foreign = path and explain_foreign(path)
    if foreign:
        raise DatabaseError(foreign)
    try:
        if path is not None:
            make_folder(path.parent)
            make_file(path)
        engine = _engine(url, write=True, patience_s=patience_s)
        _upgrade(engine, url)
    except (OSError, sa.exc.DBAPIError) as error:
        if engine is not None:
            engine.dispose()
        kind = DatabaseDamaged if is_damage(error) else DatabaseAway if _may_pass(error) else DatabaseError
        raise kind(_explain(url, error)) from error
    except DatabaseError:
        if engine is not None:
            engine.dispose()
        raise
    return engine


def _may_pass(error: Exception) -> bool:
    cause = getattr(error, "orig", None) or error
    if isinstance(cause, (sqlite3.Error, OSError)):
        full = getattr(cause, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
        return is_busy(error) or full or getattr(cause, "errno", None) == errno.ENOSPC
    from gpumon_core.store.postgresql import may_come_back

    return may_come_back(error)


def break_off(engine: Engine) -> None:
    """Let everything that any thread waits for on a server fail now, as when a program must end: it raises
    sqlalchemy.exc.DBAPIError there. Whether a COMMIT among it was done is not known. A file never takes long."""
    with _connecting:
        open_now = list(_connections.get(engine, ()))
    for connection in open_now:
        connection.break_off()


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
    parts = (path, database_file.beside(path, database_file.LOG))
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


def files_of(settings: Settings) -> list[Path]:
    """The SQLite files of an installation: of real GPUs, wherever they are kept, and of simulated ones."""
    found = map(file_of, (settings.real_database_url, settings.demo_database_url))
    return [*(path for path in found if path is not None), settings.data_dir / "gpumon.db"]


def revision(connection: sa.Connection) -> str | None:
    """The revision of the schema, or None where there is none yet."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(_REVISION).scalar()


def newer_revision(engine: Engine) -> str | None:
    """The revision of a database that a newer gpumon has moved on while this one ran, or None.

    What this one writes is taken as long as its statements succeed: what a newer one adds may stay empty. Raises
    sqlalchemy.exc.DBAPIError.
    """
    with engine.connect() as connection:
        found = connection.execute(_REVISION).scalar()
    return found if found is not None and found > head() else None


def head() -> str:
    """The revision that this program writes: the last file of the migrations."""
    return _last_of(MIGRATIONS)


@cache
def _last_of(migrations: Path) -> str:
    # As they were when this program began: an upgrade puts newer ones there while an older program still runs.
    return max(path.name for path in (migrations / "versions").glob("[0-9]*.py")).split("_", 1)[0]


def _engine(url: str, write: bool, patience_s: float = BUSY_TIMEOUT_S, often: bool = False) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        for_postgresql()
        return _server_engine(parsed, write)
    options: dict[str, Any] = {"timeout": patience_s, "check_same_thread": False}
    # The recorder and frequent readers hold a few connections. The one used last is used next, because its
    # statements are prepared and its pages cached. Another reader's connection is made for each query.
    pool: dict[str, Any] = {"poolclass": QueuePool, "pool_use_lifo": True}
    if often:
        pool |= {"pool_size": 2, "max_overflow": -1}
    elif not write:
        pool = {"poolclass": NullPool}
    engine = sa.create_engine(parsed, connect_args=options, **pool)
    path = file_of(url)
    if path is not None and not write:
        _await_recorder(engine, path)
        if often:
            _follow_file(engine, path)

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


def _await_recorder(engine: Engine, path: Path) -> None:
    """Open no file that took the place of the one that this program records into, before the recorder has."""

    @event.listens_for(engine, "do_connect")
    def _connect(*_: object) -> None:
        database_file.await_recorder(path)


def _follow_file(engine: Engine, path: Path) -> None:
    """Let no connection be used whose file, or the log of it, was replaced since: it would show what is not there
    any more. They are read-only: one that outlives the recorder's could write the log into whatever file is there.
    """
    log_file = database_file.beside(path, database_file.LOG)
    database_file.reads(engine, path)

    @event.listens_for(engine, "do_connect")
    def _connect(_: object, __: object, arguments: list[Any], options: dict[str, Any]) -> sqlite3.Connection:
        made: sqlite3.Connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, **options)
        return made

    @event.listens_for(engine, "connect")
    def _remember(_: object, record: ConnectionPoolEntry) -> None:
        record.info["file"], record.info["log"] = identity(path), identity(log_file)

    @event.listens_for(engine, "checkout")
    def _compare(_: object, record: ConnectionPoolEntry, __: object) -> None:
        file, log_now = identity(path), identity(log_file)
        if record.info["log"] is None:
            # It appears with the first transaction.
            record.info["log"] = log_now
        if (record.info["file"], record.info["log"]) != (file, log_now):
            # Connections of one program share what SQLite knows of a file: all that are idle go at once.
            engine.pool.dispose()
            raise sa.exc.DisconnectionError(f"{path} was replaced")


def _server_engine(url: sa.URL, write: bool) -> Engine:
    """An engine on PostgreSQL. A connection that broke is replaced before it is used, and one on which the server
    does not answer in time is closed: see `server`."""
    from gpumon_core.store import postgresql

    limits = f"-c statement_timeout={postgresql.STATEMENT_S}s -c lock_timeout=5s"
    if not write:
        limits += " -c default_transaction_read_only=on"
    options = {
        **postgresql.LINK,
        "application_name": "gpumon recorder" if write else "gpumon",
        "options": limits,
    }
    # Whatever the server's default is: who waited for another's commit sees what was committed.
    engine = sa.create_engine(
        url,
        connect_args=options,
        isolation_level="READ COMMITTED",
        pool_pre_ping=True,
        pool_size=5,
        max_overflow=10,
    )

    @event.listens_for(engine, "do_connect")
    def _connect(
        _: object, __: object, arguments: list[Any], options: dict[str, Any]
    ) -> postgresql.ServerConnection:
        made = postgresql.ServerConnection.connect(*arguments, **options)
        with _connecting:
            _connections.setdefault(engine, WeakSet()).add(made)
        return made

    if write:

        @event.listens_for(engine, "connect")
        def _configure(connection: postgresql.ServerConnection, _: object) -> None:
            connection.autocommit = True
            connection.execute(postgresql.SESSION)
            connection.autocommit = False

    return engine


def _upgrade(engine: Engine, url: str) -> None:
    # Without a lock: nearly every start finds nothing to do.
    with engine.connect() as connection:
        if revision(connection) == head():
            return
    if engine.dialect.name == "postgresql":
        _upgrade_server(engine, url)
        return
    with engine.begin() as connection:
        _bring_up_to_date(connection, url)


def _upgrade_server(engine: Engine, url: str) -> None:
    """As `_bring_up_to_date`, by one of those that start together; the others wait for it.

    They ask again and again instead of waiting in the server: no time-out of a lock ends that, a server that goes
    away meanwhile is noticed, and whoever waits holds nothing.
    """
    deadline = time.monotonic() + MIGRATION_WAIT_S
    attempts = 0
    while True:
        try:
            if _upgrade_alone(engine, url):
                return
        except sa.exc.OperationalError as error:
            attempts += 1
            if not is_busy(error) or attempts == MIGRATION_ATTEMPTS:
                raise
            log.warning("the migration lost a race for locks, and begins anew: %s", error.orig)
        if time.monotonic() > deadline:
            raise DatabaseAway(
                f"Another gpumon has been bringing the database {mask_password(url)} up to date for "
                f"{MIGRATION_WAIT_S:g} s. Recording begins when it is done."
            )
        time.sleep(random.uniform(0.5, 1.5) * MIGRATION_LOOK_S)


def _upgrade_alone(engine: Engine, url: str) -> bool:
    """Bring the schema up to date unless another does; whether it is."""
    from gpumon_core.store import postgresql

    with engine.connect() as connection:
        session = connection.connection.driver_connection
        if not isinstance(session, postgresql.ServerConnection):
            raise TypeError(f"a connection to PostgreSQL is a {type(session).__name__}")
        try:
            with connection.begin():
                if not connection.exec_driver_sql(f"SELECT pg_try_advisory_xact_lock({MIGRATION_KEY})").scalar():
                    return revision(connection) == head()
                connection.exec_driver_sql(postgresql.UNLIMITED)
                session.limit_s = None
                _bring_up_to_date(connection, url)
        finally:
            session.limit_s = postgresql.ANSWER_S
    return True


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
