"""Rows that the recorders of all hosts share: nobody loses a tick to them, and nobody waits for another's tick."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from conftest import PATIENCE_S, eventually
from postgres import Postgres
from ticks import ask, tick

from gpumon_core.attribution.records import ProcessIdentity, Program
from gpumon_core.store import database
from gpumon_core.store.writer import Writer

WRITERS = 16
TICKS = 3
PROGRAMS = 12


@pytest.fixture
def url(postgres: Postgres) -> Iterator[str]:
    with postgres.database() as url:
        yield url


def running(programs: list[str]) -> dict[int, ProcessIdentity]:
    """A process for each of these commands."""
    return {
        10 + place: ProcessIdentity(10 + place, "boot:1", 1000.0, "train.py", "ada", Program(command=command))
        for place, command in enumerate(programs)
    }


def write(engine: sa.Engine, host: str, now: int, programs: list[str]) -> None:
    processes = {(0, pid): 100 for pid in running(programs)}
    Writer(engine, host, "nvml", 4).write(tick(now, processes), running(programs))


def test_the_same_new_programs_on_all_hosts_at_once_cost_no_tick(url: str) -> None:
    database.open_for_writing(url).dispose()
    together = threading.Barrier(WRITERS)
    failed: list[BaseException] = []

    def record(number: int) -> None:
        engine = database.open_for_writing(url)
        writer = Writer(engine, f"host {number}", "nvml", 4)
        try:
            for now in range(TICKS):
                # New ones with every tick, which half of the hosts meet in the other order.
                commands = [f"python train.py {now} {program}" for program in range(PROGRAMS)]
                who = running(commands[:: 1 if number % 2 else -1])
                together.wait(PATIENCE_S)
                writer.write(tick(100 + 4 * now, {(0, pid): 100 for pid in who}), who)
        except BaseException as error:
            failed.append(error)
            together.abort()
        finally:
            engine.dispose()

    threads = [threading.Thread(target=record, args=(number,)) for number in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    engine = database.open_for_reading(url)
    query = "SELECT count(*), count(DISTINCT h.name) FROM gpu_metrics m JOIN gpus g ON g.id = m.gpu_id "
    assert ask(engine, query + "JOIN hosts h ON h.id = g.host_id") == [(WRITERS * TICKS * 3, WRITERS)]
    assert ask(engine, "SELECT count(*) FROM programs") == [(TICKS * PROGRAMS,)]
    runs = "SELECT count(*) FROM gpu_processes p JOIN programs r ON r.id = p.program_id"
    # A process that runs something new is the same process.
    assert ask(engine, runs) == [(WRITERS * PROGRAMS,)]
    engine.dispose()


def test_a_tick_does_not_wait_for_another_host_with_the_same_new_program(url: str) -> None:
    engine = database.open_for_writing(url)
    with engine.begin() as connection:
        # A recorder that is stopped in the middle of its tick.
        slow = Writer(engine, "slow", "nvml", 4)
        slow._write(connection, [(tick(100, {(0, 10): 100}), running(["python new.py"]))])
        write(engine, "quick", 100, ["python new.py"])
    assert ask(engine, "SELECT count(*) FROM programs") == [(1,)]
    assert ask(engine, "SELECT count(*) FROM gpu_metrics") == [(6,)]
    engine.dispose()


def test_a_host_and_its_gpus_that_two_meet_for_the_first_time_are_one(url: str) -> None:
    """As a recorder and an import that begin together."""
    engine = database.open_for_writing(url)
    begun, done = threading.Event(), threading.Event()

    def other() -> None:
        begun.set()
        write(engine, "here", 104, ["python b.py"])
        done.set()

    thread = threading.Thread(target=other)
    with engine.begin() as connection:
        Writer(engine, "here", "nvml", 4)._write(
            connection, [(tick(100, {(0, 10): 100}), running(["python a.py"]))]
        )
        thread.start()
        begun.wait()
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        eventually(lambda: ask(engine, waiting) != [(0,)])
    thread.join()
    assert done.is_set()
    assert ask(engine, "SELECT name FROM hosts") == [("here",)]
    assert ask(engine, "SELECT count(*) FROM gpus") == [(3,)]
    assert ask(engine, "SELECT count(*) FROM gpu_metrics") == [(6,)]
    engine.dispose()


def test_a_program_is_found_whatever_isolation_the_server_likes(postgres: Postgres, url: str) -> None:
    name = url.rsplit("/", 1)[1]
    postgres.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    engine = database.open_for_writing(url)
    write(engine, "here", 100, ["python new.py"])
    assert ask(engine, "SELECT count(*) FROM programs") == [(1,)]
    engine.dispose()
