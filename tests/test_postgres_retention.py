"""On a shared server each recorder forgets by its own settings, and what is its own."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

import psycopg
import pytest
import sqlalchemy as sa
from conftest import ROOT, eventually
from postgres import Postgres
from ticks import ask, runs, tick

from gpumon_core.attribution.records import Program
from gpumon_core.store import database, recorder_stats, retention
from gpumon_core.store.retention import RetentionDays
from gpumon_core.store.rollups import roll_up
from gpumon_core.store.schema import TIERS, metadata
from gpumon_core.store.writer import Writer

NOW = 100_000_000
DAY = 86400
OLD = NOW - 50 * DAY
PROGRAM = Program(command="python own.py")
SHORT, LONG = RetentionDays(1, 1, 1), RetentionDays(3650, 3650, 3650)


@pytest.fixture
def url(postgres: Postgres) -> Iterator[str]:
    with postgres.database() as url:
        yield url


@pytest.fixture
def engine(url: str) -> Iterator[sa.Engine]:
    engine = database.open_for_writing(url)
    yield engine
    engine.dispose()


def record(engine: sa.Engine, host: str, at: int, program: Program = PROGRAM) -> None:
    """Two hours with a process that ends, in all tables that know time."""
    writer = Writer(engine, host, "nvml", 4)
    for now in (at, at + 4, at + 3600):
        writer.write(tick(now, {(0, 7): 1000}), runs(7, program))
    writer.write(tick(at + 7200), {})
    writer.settle()
    roll_up(engine, host)
    assert writer.host_id is not None
    recorder_stats.write(engine, writer.host_id, at, recorder_stats.Minute(1, 0, 0, 0, 0, None, None, None))


def rows(engine: sa.Engine, host: str) -> dict[str, int]:
    """How many rows of a host every table has."""
    found = {}
    with engine.connect() as connection:
        for table in metadata.sorted_tables:
            if "gpu_id" in table.columns:
                mine = (
                    f"gpu_id IN (SELECT g.id FROM gpus g JOIN hosts h ON h.id = g.host_id WHERE h.name = '{host}')"
                )
            elif "host_id" in table.columns:
                mine = f"host_id IN (SELECT id FROM hosts WHERE name = '{host}')"
            else:
                continue
            count = f"SELECT count(*) FROM {table.name} WHERE {mine}"
            found[table.name] = connection.exec_driver_sql(count).scalar_one()
    return found


def test_a_short_memory_costs_other_hosts_nothing(engine: sa.Engine) -> None:
    for host in ("short", "long"):
        record(engine, host, OLD, Program(command=f"python {host}.py"))
    before = rows(engine, "long")
    filled = [name for name, count in before.items() if count]
    assert {"gpu_metrics", "gpu_hours", "process_snapshots", "process_hours", "gpu_usage"} < set(filled)
    assert {"recorder_health", "gpu_processes", "process_gpus"} < set(filled)
    assert retention.forget(engine, SHORT, NOW, pause_s=0, host="short") > 0
    assert rows(engine, "long") == before
    left = {name: count for name, count in rows(engine, "short").items() if count}
    assert left.keys() <= {"gpus", "gpu_metrics"}, "ticks after the last minute wait for their rollup"
    assert ask(engine, "SELECT command FROM programs") == [("python long.py",)]
    assert retention.forget(engine, SHORT, NOW, pause_s=0, host="short") == 0
    assert retention.forget(engine, LONG, NOW, pause_s=0, host="long") == 0
    assert rows(engine, "long") == before


def test_a_host_that_is_not_there_forgets_nothing(engine: sa.Engine) -> None:
    record(engine, "long", OLD)
    assert retention.forget(engine, SHORT, NOW, pause_s=0, host="new") == 0


def test_without_a_host_all_of_them_forget(engine: sa.Engine) -> None:
    for host in ("one", "two"):
        record(engine, host, OLD)
    retention.forget(engine, SHORT, NOW, pause_s=0)
    assert ask(engine, "SELECT count(*) FROM process_hours") == [(0,)]
    assert ask(engine, "SELECT count(*) FROM programs") == [(0,)]


def test_a_program_that_another_hosts_hours_speak_of_stays(engine: sa.Engine) -> None:
    """Its process has gone on to something else since, so that only the hours know it."""
    record(engine, "short", OLD)
    writer = Writer(engine, "long", "nvml", 4)
    for now, command in ((OLD, "first"), (OLD + 4, "first"), (OLD + 8, "second")):
        writer.write(tick(now, {(0, 7): 1000}), runs(7, Program(command=command)))
    writer.settle()
    retention.forget(engine, SHORT, NOW, pause_s=0, host="short")
    assert ask(engine, "SELECT command FROM programs ORDER BY 1") == [("first",), ("second",)]


def test_a_program_about_to_be_used_is_left_alone(engine: sa.Engine) -> None:
    program = Program(command="python again.py")
    record(engine, "short", OLD, program)
    other = Writer(engine, "other", "nvml", 4)
    with engine.begin() as connection:
        # Its process is not committed yet.
        other._write(connection, [(tick(NOW, {(0, 8): 1000}), runs(8, program))])
        retention.forget(engine, SHORT, NOW, pause_s=0, host="short")
    query = "SELECT p.pid, r.command FROM gpu_processes p JOIN programs r ON r.id = p.program_id"
    assert ask(engine, query) == [(8, "python again.py")]


def test_a_program_that_is_just_being_deleted_is_made_anew(engine: sa.Engine) -> None:
    program = Program(command="python again.py")
    record(engine, "short", OLD, program)
    other = Writer(engine, "other", "nvml", 4)
    thread = threading.Thread(target=other.write, args=(tick(NOW, {(0, 8): 1000}), runs(8, program)))
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE gpu_processes SET program_id = NULL")
        connection.exec_driver_sql("DELETE FROM programs")
        thread.start()
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        eventually(lambda: ask(engine, waiting) != [(0,)])
    thread.join()
    query = "SELECT p.pid, r.command FROM gpu_processes p JOIN programs r ON r.id = p.program_id"
    assert ask(engine, query) == [(8, "python again.py")]


def test_the_documented_statement_forgets_a_host_that_is_gone(engine: sa.Engine, url: str) -> None:
    text = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    found = re.search(r"```sql\n(DO .*?)```", text, re.DOTALL)
    assert found is not None
    statement = found[1].replace("old-machine", "gone")
    for host in ("gone", "here"):
        record(engine, host, OLD)
    before = rows(engine, "here")
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(statement.encode())
    assert not any(rows(engine, "gone").values())
    assert rows(engine, "here") == before
    assert ask(engine, "SELECT name FROM hosts") == [("here",)]
    assert all(table.name in statement for table in metadata.sorted_tables if "gpu_id" in table.columns)
    assert all(tier.table.name in statement for tier in TIERS)
