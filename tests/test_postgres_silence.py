"""A PostgreSQL that accepts and never answers, or cuts connections: every use ends in time, nothing is lost."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa
from conftest import PATIENCE_S, eventually
from postgres import Postgres
from ticks import ask, tick, who

from gpumon_core.store import database, postgresql
from gpumon_core.store.lock import recorder_lock
from gpumon_core.store.writer import Writer

TABLE = "SELECT DISTINCT timestamp_epoch FROM gpu_metrics ORDER BY 1"


@pytest.fixture
def url(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(postgresql.ServerConnection, "limit_s", 1.0)
    monkeypatch.setitem(postgresql.LINK, "connect_timeout", 2)
    with postgres.database() as url:
        yield url


@contextmanager
def black_hole() -> Iterator[int]:
    """The port of something that accepts connections, takes what is sent and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


class Proxy:
    """Stands between, until it swallows everything without a word."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.swallows = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if not self.swallows.is_set():
                    target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        self._listening.close()


def test_a_transaction_on_a_server_that_hangs_ends_and_is_written_later(postgres: Postgres, url: str) -> None:
    engine = database.open_for_writing(url)
    writer = Writer(engine, "here", "nvml", 4)
    writer.write(tick(100, {(0, 7): 1000}), who(7))
    with postgres.silent():
        for _ in range(2):
            # Once on the connection that it has, and once on none.
            with pytest.raises(sa.exc.OperationalError):
                writer.write(tick(104, {(0, 7): 1000}), who(7))
    writer.write(tick(104, {(0, 7): 1000}), who(7))
    assert ask(engine, TABLE) == [(100,), (104,)]
    engine.dispose()


def test_a_statement_under_way_ends_when_the_server_hangs(postgres: Postgres, url: str) -> None:
    engine = database.open_for_reading(url)
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        with postgres.silent():
            with pytest.raises(sa.exc.OperationalError, match="did not answer within 1 s") as caught:
                connection.exec_driver_sql("SELECT 2")
            assert caught.value.connection_invalidated
    assert ask(engine, "SELECT 3") == [(3,)]
    engine.dispose()


def test_an_answer_that_is_an_error_is_not_taken_for_silence(url: str) -> None:
    engine = database.open_for_reading(url)
    with engine.connect() as connection:
        connection.exec_driver_sql("SET statement_timeout = 100")
        with pytest.raises(sa.exc.OperationalError, match="statement timeout") as caught:
            connection.exec_driver_sql("SELECT pg_sleep(30)")
        assert not caught.value.connection_invalidated
        connection.rollback()
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
    engine.dispose()


def test_a_lock_that_is_not_free_in_time_is_no_silence_either(url: str) -> None:
    """Many rows at once go through a pipeline, in which an error comes while the rest is still under way."""
    engine = database.open_for_writing(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE numbers (a integer PRIMARY KEY)")
    with engine.begin() as holder:
        holder.exec_driver_sql("INSERT INTO numbers VALUES (7)")
        with engine.connect() as connection:
            connection.exec_driver_sql("SET LOCAL lock_timeout = 100")
            rows = [{"a": number} for number in range(50)]
            with pytest.raises(sa.exc.OperationalError, match="lock timeout") as caught:
                connection.exec_driver_sql("INSERT INTO numbers VALUES (%(a)s)", rows)
            assert database.is_busy(caught.value)
            assert not caught.value.connection_invalidated
    engine.dispose()


def test_a_proxy_that_swallows_everything_ends_no_recorder(postgres: Postgres, url: str) -> None:
    proxy = Proxy(postgres.port)
    engine = database.open_for_writing(url.replace(str(postgres.port), str(proxy.port)))
    writer = Writer(engine, "here", "nvml", 4)
    writer.write(tick(100), {})
    proxy.swallows.set()
    with pytest.raises(sa.exc.OperationalError):
        writer.write(tick(104), {})
    proxy.swallows.clear()
    writer.write(tick(104), {})
    assert ask(engine, TABLE) == [(100,), (104,)]
    engine.dispose()
    proxy.close()


def test_who_stops_does_not_wait_for_a_server_that_hangs(postgres: Postgres, url: str) -> None:
    engine = database.open_for_writing(url)
    ended = threading.Event()

    def wait() -> None:
        with engine.connect() as connection:
            begun.set()
            with pytest.raises(sa.exc.OperationalError):
                connection.exec_driver_sql("SELECT pg_sleep(600)")
        ended.set()

    postgresql.ServerConnection.limit_s, begun = 600.0, threading.Event()
    thread = threading.Thread(target=wait)
    thread.start()
    begun.wait()
    sleeping = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    eventually(lambda: ask(engine, sleeping) == [(1,)])
    with postgres.silent():
        database.break_off(engine)
        assert ended.wait(PATIENCE_S)
    thread.join()
    assert ask(engine, "SELECT 1") == [(1,)]
    engine.dispose()


def test_connections_that_were_cut_are_replaced(postgres: Postgres, url: str) -> None:
    engine = database.open_for_writing(url)
    writer = Writer(engine, "here", "nvml", 4)
    writer.write(tick(100), {})
    name = url.rsplit("/", 1)[1]
    postgres.execute(f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = '{name}'")
    writer.write(tick(104), {})
    assert ask(engine, TABLE) == [(100,), (104,)]
    engine.dispose()


def test_a_lock_is_not_lost_while_the_server_only_does_not_answer(postgres: Postgres, url: str) -> None:
    lock = recorder_lock(url, "here")
    assert lock.acquire()
    with postgres.silent():
        with pytest.raises(ConnectionError):
            lock.is_held()
        with pytest.raises(ConnectionError):
            lock.acquire()
        with pytest.raises(ConnectionError):
            recorder_lock(url, "here").acquire()

    def answers() -> bool:
        try:
            return lock.is_held() or pytest.fail("the lock was thrown away")
        except ConnectionError:
            return False

    assert eventually(answers)
    lock.release()


def test_what_begins_to_listen_and_never_speaks_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(postgresql.LINK, "connect_timeout", 2)
    with black_hole() as port:
        url = f"postgresql+psycopg://gpumon@127.0.0.1:{port}/gpumon"
        with pytest.raises(database.DatabaseAway, match="timeout"):
            database.open_for_writing(url)
        with pytest.raises(ConnectionError):
            recorder_lock(url, "here").acquire()
        assert not database.exists(url)
