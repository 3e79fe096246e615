"""Opening the database: made once, brought up to date, never damaged."""

from __future__ import annotations

import os
import pwd
import shutil
import sqlite3
import tempfile
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from gpumon_core.store import database
from gpumon_core.store.lock import RecorderLock
from gpumon_core.store.schema import metadata


def shape(engine: sa.Engine) -> dict[str, object]:
    """Tables, columns, keys and indexes as the database itself describes them."""
    inspector = sa.inspect(engine)
    return {
        table: {
            "columns": sorted(
                (c["name"], str(c["type"]), c["nullable"], str(c["default"]).strip("'"))
                for c in inspector.get_columns(table)
            ),
            "key": inspector.get_pk_constraint(table),
            "foreign": sorted(map(str, inspector.get_foreign_keys(table))),
            "unique": sorted(map(str, inspector.get_unique_constraints(table))),
            "indexes": sorted(
                str({**index, "dialect_options": {k: str(v) for k, v in index["dialect_options"].items()}})
                for index in inspector.get_indexes(table)
            ),
        }
        for table in sorted(inspector.get_table_names())
    }


def rowless(engine: sa.Engine) -> set[str]:
    with engine.connect() as connection:
        query = "SELECT name FROM sqlite_master WHERE sql LIKE '%WITHOUT ROWID%'"
        return set(connection.exec_driver_sql(query).scalars())


def test_a_new_database_is_what_the_revisions_make(tmp_path: Path) -> None:
    fresh = database.open_for_writing(f"sqlite:///{tmp_path / 'fresh.db'}")
    stepped = database._engine(f"sqlite:///{tmp_path / 'stepped.db'}", write=True)
    with stepped.begin() as connection:
        database._migrate(connection)
    assert shape(fresh) == shape(stepped)
    assert rowless(fresh) == rowless(stepped)
    with fresh.connect() as one, stepped.connect() as two:
        assert database.revision(one) == database.revision(two) == database.head()


def test_the_schema_in_code_is_the_schema_of_the_revisions(tmp_path: Path) -> None:
    engine = database._engine(f"sqlite:///{tmp_path / 'stepped.db'}", write=True)
    with engine.begin() as connection:
        database._migrate(connection)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_opening_again_changes_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'gpumon.db'}"
    dumps = []
    for _ in range(2):
        database.open_for_writing(url).dispose()
        dumps.append(list(sqlite3.connect(tmp_path / "gpumon.db").iterdump()))
    assert dumps[0] == dumps[1]


def test_an_older_schema_is_upgraded_and_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = tmp_path / "migrations" / "versions"
    versions.mkdir(parents=True)
    for path in (database.MIGRATIONS / "versions").glob("*.py"):
        (versions / path.name).write_text(path.read_text())
    (versions.parent / "env.py").write_text((database.MIGRATIONS / "env.py").read_text())
    url = f"sqlite:///{tmp_path / 'gpumon.db'}"
    with database.open_for_writing(url).begin() as connection:
        connection.exec_driver_sql("INSERT INTO hosts VALUES (1, 'a', 'nvml', NULL, NULL, NULL, 4, 10, 20)")
    (versions / "9999_next.py").write_text(
        "from alembic import op\nimport sqlalchemy as sa\nrevision = '9999'\n"
        f"down_revision = '{database.head()}'\nbranch_labels = depends_on = None\n"
        "def upgrade():\n    op.add_column('hosts', sa.Column('note', sa.Text))\n"
    )
    monkeypatch.setattr(database, "MIGRATIONS", versions.parent)
    with database.open_for_writing(url).connect() as connection:
        assert connection.exec_driver_sql("SELECT name, note FROM hosts").all() == [("a", None)]
        assert database.revision(connection) == "9999"


def test_a_database_of_a_newer_gpumon_is_refused_with_a_reason(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'gpumon.db'}"
    with database.open_for_writing(url).begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(database.DatabaseError, match="newer gpumon"):
        database.open_for_writing(url)


def test_a_file_that_is_no_database_is_refused_and_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "gpumon.db"
    path.write_bytes(b"precious notes, not a database" * 100)
    with pytest.raises(database.DatabaseError, match="is no SQLite database, and is left as it is"):
        database.open_for_writing(f"sqlite:///{path}")
    assert path.read_bytes().startswith(b"precious notes")


def test_a_file_that_may_only_be_read_is_named_with_what_to_do(tmp_path: Path) -> None:
    # Where nobody may look, nobody could find it either.
    folder = Path(tempfile.mkdtemp())
    path = folder / "gpumon.db"
    database.open_for_writing(f"sqlite:///{path}").dispose()
    path.chmod(0o444)
    folder.chmod(0o555)
    before = path.read_bytes()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                # Root may write anything.
                os.setgroups([])
                os.setuid(pwd.getpwnam("nobody").pw_uid)
            database.open_for_writing(f"sqlite:///{path}")
        except database.DatabaseError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        complaint = pipe.read()
    os.waitpid(child, 0)
    kept = path.read_bytes()
    folder.chmod(0o755)
    shutil.rmtree(folder)
    assert str(path) in complaint
    assert "write access" in complaint
    assert "GPUMON_DATA_DIR" in complaint
    assert kept == before


def test_a_reader_cannot_write(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'gpumon.db'}"
    database.open_for_writing(url)
    with database.open_for_reading(url).connect() as connection, pytest.raises(sa.exc.OperationalError):
        connection.exec_driver_sql("DELETE FROM hosts")


def test_the_file_is_in_wal_mode_and_gives_space_back(tmp_path: Path) -> None:
    database.open_for_writing(f"sqlite:///{tmp_path / 'gpumon.db'}")
    connection = sqlite3.connect(tmp_path / "gpumon.db")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA auto_vacuum").fetchone() == (2,)


def test_one_lock_one_holder_who_signs(tmp_path: Path) -> None:
    first, second = (RecorderLock(tmp_path / "gpumon.db", "here") for _ in range(2))
    assert first.acquire()
    assert not second.acquire()
    assert not second.is_free()
    holder = second.holder()
    assert holder is not None
    assert holder.host == "here"
    first.release()
    assert second.is_free()
    assert second.acquire()
    second.release()


_HOST = "INSERT INTO hosts (name, source, interval_s, first_seen, last_seen) VALUES (?, 'nvml', 5, 1, 1)"


def test_who_reads_often_keeps_a_connection_and_sees_what_is_written(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'often.db'}"
    writer, reader = database.open_for_writing(url), database.open_for_reading(url, often=True)
    opened: list[object] = []
    sa.event.listen(reader, "connect", lambda connection, _: opened.append(connection))
    for count in range(3):
        with reader.connect() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM hosts").scalar() == count
        with writer.begin() as connection:
            connection.exec_driver_sql(_HOST, (f"host {count}",))
    assert len(opened) == 1
    with pytest.raises(sa.exc.OperationalError, match="readonly"), reader.begin() as connection:
        connection.exec_driver_sql("DELETE FROM hosts")


@pytest.mark.parametrize("kind", ["replaced", "removed"])
def test_who_reads_often_shows_nothing_of_a_file_that_is_gone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "often.db"
    writer = database.open_for_writing(f"sqlite:///{path}")
    with writer.begin() as connection:
        connection.exec_driver_sql(_HOST, ("old",))
    writer.dispose()
    reader = database.open_for_reading(f"sqlite:///{path}", often=True)
    names = sa.text("SELECT name FROM hosts")
    with reader.connect() as connection:
        assert connection.scalars(names).all() == ["old"]
    if kind == "replaced":
        other = database.open_for_writing(f"sqlite:///{tmp_path / 'other.db'}")
        with other.begin() as connection:
            connection.exec_driver_sql(_HOST, ("new",))
        other.dispose()
        os.replace(tmp_path / "other.db", path)
        for log in ("-wal", "-shm"):
            Path(f"{path}{log}").unlink(missing_ok=True)
        with reader.connect() as connection:
            assert connection.scalars(names).all() == ["new"]
    else:
        path.unlink()
        with pytest.raises(sa.exc.OperationalError, match="unable to open"), reader.connect() as connection:
            connection.execute(names)
