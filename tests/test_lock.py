"""One recorder at a time, on SQLite and on PostgreSQL."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from conftest import PATIENCE_S, ROOT, eventually
from filelock import FileLock
from postgres import Postgres
from sqlalchemy.event import listen

from gpumon_core.store import database
from gpumon_core.store.lock import FileRecorderLock, Holder, Lock, LockLost, recorder_lock

Locks = Callable[..., Lock]

# Of "gpumon recorder" and "here": the first 8 bytes of a SHA-256.
KEY_OF_HERE = 7614059671874024322

# A recorder that does nothing but hold the lock of argv until it is killed.
HOLD = """
import sys, time
from gpumon_core.store.lock import recorder_lock
lock = recorder_lock(sys.argv[1], "here")
print(lock.acquire(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def locks(database_url: str) -> Iterator[Locks]:
    """Makes locks on one database: `locks()`, or `locks("another host")`."""
    made: list[Lock] = []

    def make(host: str = "here") -> Lock:
        made.append(recorder_lock(database_url, host))
        return made[-1]

    yield make
    for lock in made:
        lock.release()


def terminate(postgres: Postgres) -> None:
    """End the sessions of all locks on this server, as an administrator or a restart does."""
    postgres.execute(
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE application_name LIKE 'gpumon %@%'"
    )


def test_only_one_holds_it(locks: Locks) -> None:
    first, second = locks(), locks()
    assert first.is_free()
    assert first.acquire()
    assert not second.acquire()
    assert first.is_held()
    assert not second.is_held()


def test_the_holder_signs(locks: Locks) -> None:
    first, second = locks(), locks()
    before = int(time.time())
    assert first.acquire()
    assert not second.acquire()
    holder = second.holder()
    assert holder is not None
    assert holder == Holder(os.getpid(), "here", holder.since)
    assert before <= holder.since <= time.time()


@pytest.mark.parametrize("host", ["büro-müller", "a name with spaces", "n" * 255])
def test_any_host_name_is_signed_whole(locks: Locks, host: str) -> None:
    assert locks(host).acquire()
    holder = locks(host).holder()
    assert holder is not None
    assert (holder.pid, holder.host) == (os.getpid(), host)


def test_asking_takes_nothing(locks: Locks) -> None:
    first, second = locks(), locks()
    assert second.is_free()
    assert first.acquire()
    for _ in range(3):
        assert not second.is_free()
        assert not first.is_free()
    assert first.is_held()
    assert not locks().acquire()


def test_acquiring_twice_is_acquiring_once(locks: Locks) -> None:
    first, second = locks(), locks()
    assert first.acquire()
    assert first.acquire()
    first.release()
    assert second.acquire()


def test_it_is_free_again_after_release(locks: Locks) -> None:
    first, second = locks(), locks()
    assert first.acquire()
    first.release()
    first.release()
    assert not first.is_held()
    assert second.is_free()
    assert second.acquire()
    assert not first.acquire()


def test_a_killed_holder_holds_nothing(locks: Locks, database_url: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, database_url], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as holding:
        try:
            assert holding.stdout is not None
            assert holding.stdout.readline() == "True\n"
            lock = locks()
            assert not lock.is_free()
            assert not lock.acquire()
            holder = lock.holder()
            assert holder is not None
            assert holder.pid == holding.pid
        finally:
            holding.kill()
    eventually(lock.is_free)
    assert lock.acquire()


def test_a_sqlite_file_has_one_recorder_whatever_its_host(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/gpumon.db"
    first, second = recorder_lock(url, "here"), recorder_lock(url, "there")
    assert first.acquire()
    assert not second.acquire()
    assert str(second.holder()) == f"process {os.getpid()} on here"
    first.release()


def test_asking_for_a_moment_does_not_turn_a_recorder_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's `is_free`, which takes the file's lock for its duration, is waited for."""
    monkeypatch.setattr(FileRecorderLock, "PROBE_S", PATIENCE_S)
    path = tmp_path / "gpumon.db"
    asking = FileLock(f"{path}.lock", thread_local=False)
    asking.acquire()
    answered = threading.Timer(0.05, asking.release)
    answered.start()
    recorder = recorder_lock(f"sqlite:///{path}", "here")
    assert recorder.acquire()
    answered.join()
    recorder.release()


@pytest.mark.parametrize("kind", ["removed", "replaced"])
def test_a_lock_file_that_is_not_there_any_more_is_a_lost_lock(tmp_path: Path, kind: str) -> None:
    """Whoever comes next locks the file that is there: the first must not write beside it."""
    url, path = f"sqlite:///{tmp_path}/gpumon.db", tmp_path / "gpumon.db.lock"
    first, second = recorder_lock(url, "here"), recorder_lock(url, "here")
    engine = database.open_for_writing(url)
    assert first.acquire()
    with engine.begin() as connection:
        first.fence(connection)
    if kind == "removed":
        path.unlink()
    else:
        other = tmp_path / "other"
        other.touch()
        other.replace(path)
    assert not first.is_held()
    with pytest.raises(LockLost), engine.begin() as connection:
        first.fence(connection)
    assert second.acquire()
    assert not first.acquire()
    second.release()
    assert first.acquire()
    with engine.begin() as connection:
        first.fence(connection)
    first.release()
    engine.dispose()


def test_a_fence_holds_for_all_that_an_engine_begins(locks: Locks, database_url: str) -> None:
    lock = locks()
    engine = database.open_for_writing(database_url)
    listen(engine, "begin", lock.fence)
    with pytest.raises(LockLost), engine.begin():
        pytest.fail("a transaction has begun")
    assert lock.acquire()
    with engine.begin() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
    lock.release()
    with pytest.raises(LockLost), engine.begin():
        pytest.fail("a transaction has begun")
    assert lock.acquire()
    with engine.begin() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
    engine.dispose()


def test_every_host_records_into_a_shared_server(postgres: Postgres) -> None:
    with postgres.database() as url:
        first, second = recorder_lock(url, "here"), recorder_lock(url, "there")
        assert first.acquire()
        assert second.is_free()
        assert second.holder() is None
        assert second.acquire()
        assert first.is_held()
        first.release()
        second.release()


def test_every_database_of_a_server_has_its_own_recorder(postgres: Postgres) -> None:
    with postgres.database() as one, postgres.database() as another:
        first, second = recorder_lock(one, "here"), recorder_lock(another, "here")
        assert first.acquire()
        assert second.is_free()
        assert second.holder() is None
        assert second.acquire()
        first.release()
        second.release()


def test_a_lost_connection_is_a_lost_lock(postgres: Postgres) -> None:
    with postgres.database() as url:
        lock, other = recorder_lock(url, "here"), recorder_lock(url, "here")
        assert lock.acquire()
        assert lock.is_held()
        terminate(postgres)
        assert other.acquire()
        assert not lock.is_held()
        assert not lock.is_held()
        assert not lock.acquire()
        other.release()
        assert lock.acquire()
        assert lock.is_held()
        terminate(postgres)
        lock.release()
        assert lock.is_free()


def test_everybody_may_read_who_records(postgres: Postgres) -> None:
    """A reader's role, without any privilege, sees the signature."""
    with postgres.database() as url:
        lock = recorder_lock(url, "here")
        assert lock.acquire()
        postgres.execute("CREATE ROLE reader LOGIN")
        reader = recorder_lock(url.replace("gpumon@", "reader@"), "here")
        assert not reader.is_free()
        assert str(reader.holder()) == f"process {os.getpid()} on here"
        lock.release()
        postgres.execute("DROP ROLE reader")


def test_the_servers_idle_timeout_spares_the_lock(postgres: Postgres) -> None:
    with postgres.database() as url:
        name = url.rsplit("/", 1)[1]
        postgres.execute(f"ALTER DATABASE {name} SET idle_session_timeout = '1s'")
        lock = recorder_lock(url, "here")
        assert lock.acquire()
        with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as idle:
            mine = f"SELECT count(*) FROM pg_stat_activity WHERE pid = {idle.info.backend_pid}"
            with psycopg.connect(postgres.url("postgres").replace("+psycopg", ""), autocommit=True) as looking:
                # Another session of this database, as idle and begun later, is ended meanwhile.
                eventually(lambda: looking.execute(mine).fetchone() == (0,))
        assert lock.is_held()
        lock.release()


def test_a_server_that_does_not_answer_is_named_in_one_line() -> None:
    lock = recorder_lock("postgresql+psycopg://u:geheim@127.0.0.1:1/gpumon", "here")
    for ask in (lock.is_free, lock.acquire):
        with pytest.raises(OSError, match="port 1 failed: Connection refused") as caught:
            ask()
        assert "\n" not in str(caught.value)
        assert "geheim" not in str(caught.value)
    assert lock.holder() is None
    assert not lock.is_held()
    lock.release()


def test_sqlite_needs_no_driver_of_postgresql(tmp_path: Path) -> None:
    code = """
import sys
from gpumon_core.store.lock import recorder_lock
lock = recorder_lock(sys.argv[1], "here")
print(lock.acquire(), lock.is_held(), "psycopg" in sys.modules)
"""
    url = f"sqlite:///{tmp_path}/gpumon.db"
    done = subprocess.run([sys.executable, "-c", code, url], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "False"]


def test_the_key_never_changes(postgres: Postgres) -> None:
    """Recorders of different versions exclude each other."""
    with postgres.database() as url, psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        lock = recorder_lock(url, "here")
        assert lock.acquire()
        row = connection.execute("SELECT pg_try_advisory_lock(%s)", [KEY_OF_HERE]).fetchone()
        assert row == (False,)
        lock.release()
