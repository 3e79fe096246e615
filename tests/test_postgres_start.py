"""Starting on a PostgreSQL: together, beside a migration, on a newer schema, and while it is away or refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from conftest import eventually
from postgres import Postgres
from rig import free_port
from ticks import ask, tick, who

from gpumon_core.store import database, postgresql
from gpumon_core.store.lock import recorder_lock
from gpumon_core.store.writer import Writer

STARTS = 48


@pytest.fixture
def url(postgres: Postgres) -> Iterator[str]:
    with postgres.database() as url:
        yield url


def start_together(url: str) -> list[BaseException]:
    """What goes wrong when so many recorders start at once."""
    together = threading.Barrier(STARTS)
    failed: list[BaseException] = []

    def start() -> None:
        together.wait()
        try:
            database.open_for_writing(url).dispose()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=start) for _ in range(STARTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


@pytest.fixture
def newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Gives this program one more revision: the statement it is called with, and a new column."""
    versions = tmp_path / "migrations" / "versions"
    versions.mkdir(parents=True)
    for path in (database.MIGRATIONS / "versions").glob("*.py"):
        (versions / path.name).write_text(path.read_text())
    (versions.parent / "env.py").write_text((database.MIGRATIONS / "env.py").read_text())

    def add(statement: str) -> None:
        (versions / "9999_next.py").write_text(
            "from alembic import op\nimport sqlalchemy as sa\nrevision = '9999'\n"
            f"down_revision = '{database.head()}'\nbranch_labels = depends_on = None\n"
            f"def upgrade():\n    op.execute({statement!r})\n"
            "    op.add_column('gpu_metrics', sa.Column('note', sa.Text))\n"
        )
        monkeypatch.setattr(database, "MIGRATIONS", versions.parent)

    return add


def test_many_that_start_together_make_one_schema(url: str) -> None:
    assert start_together(url) == []
    engine = database.open_for_reading(url)
    assert ask(engine, "SELECT version_num FROM alembic_version") == [(database.head(),)]
    engine.dispose()


def test_many_that_start_together_move_it_forward_once(url: str, newer: Callable[[str], None]) -> None:
    database.open_for_writing(url).dispose()
    newer("CREATE TABLE made_once (a integer)")
    assert start_together(url) == []
    engine = database.open_for_reading(url)
    assert ask(engine, "SELECT version_num FROM alembic_version") == [("9999",)]
    engine.dispose()


def test_a_current_schema_needs_no_lock(url: str) -> None:
    database.open_for_writing(url).dispose()
    with psycopg.connect(url.replace("+psycopg", "")) as other:
        other.execute(f"SELECT pg_advisory_lock({database.MIGRATION_KEY})".encode())
        assert start_together(url) == []


def test_who_waits_for_a_long_migration_is_informed_and_may_come_again(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "MIGRATION_WAIT_S", 0.3)
    with psycopg.connect(url.replace("+psycopg", "")) as other:
        other.execute(f"SELECT pg_advisory_lock({database.MIGRATION_KEY})".encode())
        with pytest.raises(database.DatabaseAway, match="up to date"):
            database.open_for_writing(url)
    monkeypatch.undo()
    database.open_for_writing(url).dispose()


def test_a_long_migration_is_not_cut_off(
    postgres: Postgres, url: str, newer: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    database.open_for_writing(url).dispose()
    monkeypatch.setattr(postgresql, "STATEMENT_S", 1)
    monkeypatch.setattr(postgresql.ServerConnection, "limit_s", 1.5)
    monkeypatch.setattr(postgresql, "ANSWER_S", 1.5)
    postgres.execute(f"ALTER DATABASE {url.rsplit('/', 1)[1]} SET idle_in_transaction_session_timeout = '1s'")
    newer(
        "DO $$ BEGIN IF current_setting('lock_timeout') <> '0' OR "
        "current_setting('idle_in_transaction_session_timeout') <> '0' THEN RAISE 'limited'; END IF; "
        "PERFORM pg_sleep(2.5); END $$"
    )
    engine = database.open_for_writing(url)
    with engine.connect() as connection:
        assert database.revision(connection) == "9999"
        with pytest.raises(sa.exc.OperationalError, match="statement timeout"):
            connection.exec_driver_sql("SELECT pg_sleep(600)")
    engine.dispose()


def test_a_migration_that_lost_a_race_for_locks_begins_anew(
    postgres: Postgres, url: str, newer: Callable[[str], None]
) -> None:
    engine = database.open_for_writing(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE SEQUENCE attempts")
    newer("DO $$ BEGIN IF nextval('attempts') = 1 THEN RAISE 'deadlock' USING ERRCODE = '40P01'; END IF; END $$")
    database.open_for_writing(url).dispose()
    assert ask(engine, "SELECT last_value FROM attempts") == [(2,)]
    assert ask(engine, "SELECT version_num FROM alembic_version") == [("9999",)]
    engine.dispose()


def test_an_older_recorder_goes_on_beside_a_newer_schema_and_knows(
    url: str, newer: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = database.open_for_writing(url)
    writer = Writer(engine, "here", "nvml", 4)
    writer.write(tick(100, {(0, 7): 1000}), who(7))
    assert database.newer_revision(engine) is None
    newer("SELECT 1")
    database.open_for_writing(url).dispose()
    monkeypatch.undo()
    assert database.newer_revision(engine) == "9999"
    writer.write(tick(104, {(0, 7): 2000}), who(7))
    writer.settle()
    assert ask(engine, "SELECT DISTINCT timestamp_epoch FROM gpu_metrics ORDER BY 1") == [(100,), (104,)]
    with pytest.raises(database.DatabaseError, match="newer gpumon") as caught:
        database.open_for_writing(url)
    assert not isinstance(caught.value, database.DatabaseAway)
    engine.dispose()


def test_a_program_keeps_the_revision_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade puts newer files beside a program that still runs."""
    (tmp_path / "versions").mkdir()
    (tmp_path / "versions" / "0001_first.py").touch()
    monkeypatch.setattr(database, "MIGRATIONS", tmp_path)
    assert database.head() == "0001"
    (tmp_path / "versions" / "0002_next.py").touch()
    assert database.head() == "0001"


def away(url: str) -> bool:
    """Whether both the database and the lock say that it may come back; they must agree."""
    with pytest.raises(database.DatabaseError) as caught:
        database.open_for_writing(url)
    with pytest.raises(OSError, match="failed") as refused:
        recorder_lock(url, "here").acquire()
    assert isinstance(caught.value, database.DatabaseAway) != isinstance(refused.value, PermissionError)
    return isinstance(caught.value, database.DatabaseAway)


def test_a_closed_port_and_an_unknown_machine_may_come_back() -> None:
    assert away(f"postgresql+psycopg://gpumon@127.0.0.1:{free_port()}/gpumon")
    assert away("postgresql+psycopg://gpumon@nowhere.invalid/gpumon")


def test_a_server_without_a_free_connection_may_come_back(postgres: Postgres, url: str) -> None:
    postgres.execute("CREATE ROLE many LOGIN CONNECTION LIMIT 0")
    assert away(url.replace("gpumon@", "many@"))
    postgres.execute("DROP ROLE many")


def test_a_server_that_starts_or_recovers_may_come_back(postgres: Postgres, url: str) -> None:
    database.open_for_writing(url).dispose()
    postgres.crash()

    def opened() -> bool:
        try:
            database.open_for_writing(url).dispose()
        except database.DatabaseAway:
            return False
        return True

    assert eventually(opened)


@pytest.mark.parametrize(
    ("prepare", "user", "why"),
    [
        ("", "nobody-of-that-name", "does not exist"),
        ("CREATE ROLE mute", "mute", "not permitted to log in"),
        ("CREATE ROLE strange LOGIN PASSWORD 'right'", "strange:wrong", "password authentication failed"),
        ("CREATE ROLE strange LOGIN PASSWORD 'right'", "strange", "no password supplied"),
        ("CREATE ROLE strange LOGIN PASSWORD 'right'", "strange:right", "permission denied"),
    ],
)
def test_what_a_server_refuses_stays_refused(
    postgres: Postgres, url: str, prepare: str, user: str, why: str
) -> None:
    access = postgres.folder / "data" / "pg_hba.conf"
    before = access.read_text()
    access.write_text(f"host all strange 127.0.0.1/32 scram-sha-256\n{before}")
    try:
        for statement in (prepare, "SELECT pg_reload_conf()"):
            if statement:
                postgres.execute(statement)
        if "PASSWORD" in prepare:
            # The server reads its files a moment later.
            eventually(lambda: _asks_for_password(url))
        refused = url.replace("gpumon@", f"{user}@")
        with pytest.raises(database.DatabaseError, match=why) as caught:
            database.open_for_writing(refused)
        assert not isinstance(caught.value, database.DatabaseAway)
        assert "wrong" not in str(caught.value)
    finally:
        access.write_text(before)
        postgres.execute("SELECT pg_reload_conf()")
        postgres.execute("DROP ROLE IF EXISTS strange, mute")


def _asks_for_password(url: str) -> bool:
    try:
        psycopg.connect(url.replace("+psycopg", "").replace("gpumon@", "strange@")).close()
    except psycopg.OperationalError:
        return True
    return False


def test_a_database_that_does_not_exist_stays_away(postgres: Postgres) -> None:
    assert not away(postgres.url("no_such_database"))
