"""On PostgreSQL a recorder that lost its lock writes nothing more, whatever happened to the server meanwhile."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import psycopg
import pytest
import sqlalchemy as sa
from conftest import eventually
from postgres import Postgres
from test_lock import terminate
from ticks import ask, tick, who

from gpumon_core.store import database
from gpumon_core.store.lock import LockLost, ServerRecorderLock
from gpumon_core.store.writer import Writer


class Recorder:
    """A lock, and an engine that writes under it."""

    def __init__(self, url: str) -> None:
        self.lock = ServerRecorderLock(url, "here")
        self.engine = database.open_for_writing(url)
        sa.event.listen(self.engine, "begin", self.lock.fence)
        self.writer = Writer(self.engine, "here", "nvml", 4)

    def write(self, now: float) -> None:
        self.writer.write(tick(now, {(0, 7): 1000}), who(7))

    def close(self) -> None:
        self.engine.dispose()
        self.lock.release()


@contextmanager
def recorders(url: str, count: int) -> Iterator[list[Recorder]]:
    with ExitStack() as stack:
        made = []
        for _ in range(count):
            made.append(Recorder(url))
            stack.callback(made[-1].close)
        yield made


@pytest.fixture
def url(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(ServerRecorderLock, "SETTLE_S", 0.3)
    with postgres.database() as url:
        yield url


def ticks(url: str) -> list[object]:
    engine = database.open_for_reading(url)
    try:
        return [row[0] for row in ask(engine, "SELECT DISTINCT timestamp_epoch FROM gpu_metrics ORDER BY 1")]
    finally:
        engine.dispose()


def test_nothing_is_written_without_the_lock(url: str) -> None:
    with recorders(url, 1) as [recorder]:
        with pytest.raises(LockLost):
            recorder.write(100)
        assert recorder.lock.acquire()
        recorder.write(100)
        recorder.lock.release()
        with pytest.raises(LockLost):
            recorder.write(104)
        assert ticks(url) == [100]


def test_a_recorder_whose_server_crashed_writes_nothing_once_another_records(postgres: Postgres, url: str) -> None:
    with recorders(url, 2) as [first, second]:
        assert first.lock.acquire()
        first.write(100)
        postgres.crash()

        def taken() -> bool:
            try:
                return second.lock.acquire()
            except OSError:
                return False

        assert eventually(taken)
        with pytest.raises(LockLost):
            first.write(104)
        assert not first.lock.is_held()
        assert not first.lock.acquire()
        second.write(108)
        assert ticks(url) == [100, 108]


def test_who_is_first_after_a_crash_goes_on_with_the_same_engine(postgres: Postgres, url: str) -> None:
    with recorders(url, 2) as [first, second]:
        assert first.lock.acquire()
        first.write(100)
        postgres.crash()

        def again() -> bool:
            try:
                return not first.lock.is_held() and first.lock.acquire()
            except OSError:
                return False

        assert eventually(again)
        first.write(104)
        assert not second.lock.acquire()
        assert ticks(url) == [100, 104]


def test_a_transaction_under_way_keeps_others_from_recording(postgres: Postgres, url: str) -> None:
    """The session that held the lock ends alone: what was begun under it is committed before another begins."""
    with recorders(url, 2) as [first, second]:
        assert first.lock.acquire()
        first.write(100)
        with first.engine.begin() as connection:
            connection.exec_driver_sql("UPDATE hosts SET source = 'first'")
            terminate(postgres)
            assert not second.lock.is_free()
            assert not second.lock.acquire()
        # It does not know yet, and nobody else can record: it may go on.
        first.write(104)
        assert not second.lock.acquire()
        assert not first.lock.is_held()
        assert second.lock.is_free()
        assert second.lock.acquire()
        with pytest.raises(LockLost):
            first.write(108)
        second.write(112)
        assert ask(second.engine, "SELECT source FROM hosts") == [("nvml",)]
        assert ticks(url) == [100, 104, 112]


def test_another_session_of_the_same_process_id_is_not_the_holder(url: str) -> None:
    with recorders(url, 1) as [recorder]:
        assert recorder.lock.acquire()
        held = recorder.lock._held
        assert held is not None
        with psycopg.connect(url.replace("+psycopg", "")) as other:
            began = other.execute(
                "SELECT backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()"
            ).fetchone()
            assert began is not None
            recorder.lock._held = replace(held, began=began[0])
            with pytest.raises(LockLost):
                recorder.write(100)
        assert ticks(url) == []


def test_a_fence_costs_a_tick_no_statement(url: str) -> None:
    with recorders(url, 1) as [recorder]:
        assert recorder.lock.acquire()
        recorder.write(100)
        statements: list[str] = []
        sa.event.listen(
            recorder.engine, "before_cursor_execute", lambda _, __, statement, *rest: statements.append(statement)
        )
        recorder.write(104)
        assert statements
        assert not [statement for statement in statements if "pg_" in statement]


def test_given_back_is_free_though_connections_stay_open(url: str) -> None:
    with recorders(url, 2) as [first, second]:
        assert first.lock.acquire()
        first.write(100)
        first.lock.release()
        assert second.lock.acquire()
        second.write(104)


def test_it_takes_no_privilege(postgres: Postgres, url: str) -> None:
    """What other roles do is hidden from one that is no superuser; what it does itself is not."""
    name = url.rsplit("/", 1)[1]
    postgres.execute("CREATE ROLE plain LOGIN")
    postgres.execute(f"ALTER DATABASE {name} OWNER TO plain")
    with recorders(url.replace("gpumon@", "plain@"), 1) as [recorder]:
        assert recorder.lock.acquire()
        recorder.write(100)
        assert recorder.lock.is_held()
        terminate(postgres)
        assert not recorder.lock.is_held()
        assert recorder.lock.acquire()
        recorder.write(104)
    assert ticks(url) == [100, 104]
    postgres.execute(f"ALTER DATABASE {name} OWNER TO gpumon")
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("REASSIGN OWNED BY plain TO gpumon")
        connection.execute("DROP ROLE plain")


def test_two_that_race_while_sessions_die_never_write_side_by_side(postgres: Postgres, url: str) -> None:
    """Whoever takes the lock has a number; once a later number was committed, none before it ever is."""
    database.open_for_writing(url).dispose()
    plain = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with plain.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE written (at serial PRIMARY KEY, epoch integer, alone boolean)")
    epochs, guard, done = itertools.count(1), threading.Lock(), threading.Event()
    unexpected: list[BaseException] = []

    def record(one: Recorder) -> None:
        lock, engine = one.lock, one.engine
        while not done.is_set():
            try:
                if not lock.acquire():
                    continue
                with guard:
                    epoch = next(epochs)
                for _ in range(20):
                    with engine.begin() as connection:
                        alone = connection.exec_driver_sql("SELECT pg_try_advisory_xact_lock(1)").scalar()
                        time.sleep(0.002)
                        connection.exec_driver_sql(
                            "INSERT INTO written (epoch, alone) VALUES (%(epoch)s, %(alone)s)",
                            {"epoch": epoch, "alone": alone},
                        )
                if random.random() < 0.3:
                    lock.release()
            except (OSError, sa.exc.DBAPIError, LockLost):
                continue
            except BaseException as error:
                unexpected.append(error)
                raise
        one.close()

    threads = [threading.Thread(target=record, args=(Recorder(url),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    victims = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'gpumon%%' AND datname = %(name)s"
    name = url.rsplit("/", 1)[1]
    with plain.connect() as connection:

        def enough() -> bool:
            pids = list(connection.exec_driver_sql(victims, {"name": name}).scalars())
            if pids:
                connection.exec_driver_sql(f"SELECT pg_terminate_backend({random.choice(pids)})")
            counted = connection.exec_driver_sql("SELECT count(DISTINCT epoch), count(*) FROM written").one()
            return counted[0] >= 25 and counted[1] >= 250

        try:
            eventually(enough)
        finally:
            done.set()
            for thread in threads:
                thread.join()
        written = list(connection.exec_driver_sql("SELECT epoch, alone FROM written ORDER BY at"))
    plain.dispose()
    assert unexpected == []
    assert all(alone for _, alone in written)
    assert [epoch for epoch, _ in written] == sorted(epoch for epoch, _ in written)
