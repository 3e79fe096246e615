"""A recorder whose PostgreSQL server goes away, does not answer, restarts or is migrated loses no tick."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_nvml
import psycopg
import pytest
import sqlalchemy as sa
from conftest import PATIENCE_S, ROOT, Server
from conftest import eventually as until
from fake_nvml import FakeNvml
from postgres import Postgres
from test_lost_files import Handed, committed, watch

from gpumon_core.recording import roles
from gpumon_core.recording.recorder import Recorder
from gpumon_core.settings import load
from gpumon_core.store import database


@pytest.fixture
def url(postgres: Postgres) -> Iterator[str]:
    with postgres.database() as made:
        yield made


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles, "RETRY_S", 0.5)


@contextmanager
def recording(fake: FakeNvml, folder: Path, url: str, **more: Any) -> Iterator[Recorder]:
    with fake_nvml.loaded(fake):
        made = Recorder(
            load(data_dir=folder, database_url=url, host_name="here", interval=1, source="nvml", **more)
        )
        made.start()
        try:
            yield made
        finally:
            made.stop()


def ask(url: str, query: str) -> list[Any]:
    engine = database.open_for_reading(url)
    try:
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(query))]
    finally:
        engine.dispose()


def stored(url: str) -> list[int]:
    return [second for (second,) in ask(url, "SELECT timestamp_epoch FROM gpu_metrics ORDER BY 1")]


def test_a_server_that_starts_anew_costs_no_tick_and_one_recorder_goes_on(
    fake: FakeNvml, tmp_path: Path, postgres: Postgres, url: str
) -> None:
    fake.add_gpu()
    with recording(fake, tmp_path, url) as first, recording(fake, tmp_path, url) as second:
        committed(first, 2)
        assert second.state.role == "standby"
        seconds = watch(first)
        before = {made: made.counters.ticks for made in (first, second)}
        postgres.crash()
        # Whoever of the two takes the lock first.
        one = until(
            lambda: next((made for made, ticks in before.items() if made.counters.ticks >= ticks + 3), None)
        )
        assert one is not None
        until(lambda: {first.state.role, second.state.role} == {"recording", "standby"})
        until(lambda: one.counters.buffered == 0)
        # What one sampled before the other took over waits in it: only the next who has the lock may write.
        waiting = (
            set()
            if one is first
            else {tick for target in first._roles.targets.values() for tick in target.buffer.seconds()}
        )
        assert first.counters.dropped == 0
    assert set(seconds) - waiting <= set(stored(url))


def test_a_server_that_hangs_does_not_keep_the_recorder_from_sampling(
    fake: FakeNvml, tmp_path: Path, postgres: Postgres, url: str
) -> None:
    fake.add_gpu()
    with recording(fake, tmp_path, url) as made:
        committed(made, 1)
        seconds = watch(made)
        with postgres.silent():
            until(lambda: made.counters.buffered >= 4)
        until(lambda: made.counters.buffered == 0)
        committed(made, 1)
        assert (made.counters.dropped, made.counters.failed) == (0, 0)
    found = stored(url)
    assert set(seconds) <= set(found)
    assert len(found) == len(set(found))


def test_a_recorder_that_starts_while_the_server_is_away_waits_for_it(
    fake: FakeNvml, tmp_path: Path, postgres: Postgres, url: str
) -> None:
    fake.add_gpu()
    with postgres.silent(), fake_nvml.loaded(fake):
        made = Recorder(load(data_dir=tmp_path, database_url=url, host_name="here", interval=1, source="nvml"))
        made.start()
    with fake_nvml.loaded(fake):
        try:
            assert made.state.recording is not None
            seconds = watch(made)
            committed(made, 2)
        finally:
            made.stop()
    assert set(seconds) <= set(stored(url))


def test_the_end_does_not_wait_for_a_server_that_hangs_and_leaves_its_ticks_to_the_next(
    fake: FakeNvml, tmp_path: Path, postgres: Postgres, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add_gpu()
    handed = Handed(monkeypatch)
    with recording(fake, tmp_path, url) as made:
        committed(made, 1)
        seconds = watch(made)
        with postgres.silent():
            until(lambda: made.counters.buffered >= 2)
            began = time.monotonic()
            made.stop()
            assert time.monotonic() - began < PATIENCE_S, "the server never answers again"
    (left,) = tmp_path.glob("waiting-*.ticks")
    with recording(fake, tmp_path, url) as made:
        committed(made, 1)
        until(lambda: not left.exists())
    found = stored(url)
    assert set(seconds) <= set(found)
    assert handed.is_once(dict(ask(url, "SELECT timestamp_epoch, recorded_ms FROM gpu_metrics")))


def test_a_text_that_the_server_refuses_costs_itself_only(fake: FakeNvml, tmp_path: Path, url: str) -> None:
    gpu = fake.add_gpu()
    gpu.add_process(os.getpid(), 1 << 30)
    gpu.add_process(os.getppid(), 1 << 30)
    with recording(fake, tmp_path, url) as made:
        observer = made.observer
        assert observer is not None
        observe = observer.observe

        def odd() -> Any:
            snapshot, identities = observe()
            mine = identities[os.getpid()]
            identities[os.getpid()] = replace(
                mine, start_key="bad:1", program=replace(mine.program, namespace="a\0b")
            )
            return snapshot, identities

        observer.observe = odd  # type: ignore[method-assign]
        until(lambda: "cannot be written" in (made.counters.last_error or ""))
        seconds = watch(made)
        committed(made, 3)
        assert made.counters.failed == 0
    assert set(seconds) <= set(stored(url))
    assert ask(url, "SELECT count(*) FROM gpu_processes WHERE start_key = 'bad:1'") == [(1,)]


def test_an_older_recorder_beside_a_newer_schema_says_so_and_goes_on(
    fake: FakeNvml, tmp_path: Path, url: str
) -> None:
    fake.add_gpu()
    with recording(fake, tmp_path, url) as made:
        committed(made, 1)
        engine = database.open_for_writing(url)
        with engine.begin() as connection:
            connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
            connection.execute(sa.text("ALTER TABLE gpu_metrics ADD COLUMN novelty integer"))
        made._every_minute()
        assert made.state.recording is not None
        assert "newer gpumon" in made.state.recording.reason
        assert made.state.recording.remedy == "Update this gpumon."
        committed(made, 2)
        # And where it cannot go on, ticks wait.
        with engine.begin() as connection:
            connection.execute(sa.text("ALTER TABLE gpu_metrics RENAME COLUMN temperature TO heat"))
        seconds = watch(made)
        until(lambda: made.counters.buffered >= 2)
        assert (made.counters.failed, made.counters.dropped) == (0, 0)
        with engine.begin() as connection:
            connection.execute(sa.text("ALTER TABLE gpu_metrics RENAME COLUMN heat TO temperature"))
        until(lambda: made.counters.buffered == 0)
        engine.dispose()
    assert set(seconds) <= set(stored(url))


def test_a_wrong_password_is_not_waited_for(fake: FakeNvml, tmp_path: Path, postgres: Postgres) -> None:
    fake.add_gpu()
    url = postgres.url("no_such_database")
    with pytest.raises(database.DatabaseError) as raised, recording(fake, tmp_path, url):
        pass
    assert not isinstance(raised.value, database.DatabaseAway)
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(url.replace("+psycopg", ""))


def test_a_server_whose_database_hangs_ends_with_requests_that_wait_for_it(
    serve: Callable[..., Server], fake: FakeNvml, tmp_path: Path, postgres: Postgres, url: str
) -> None:
    fake.add_gpu()
    # A statement may take for ever, and not 35 s: the program must not wait for any to end.
    (tmp_path / "sitecustomize.py").write_text(
        "from gpumon_core.store import postgresql\n"
        f"postgresql.ANSWER_S = postgresql.ServerConnection.limit_s = {10 * PATIENCE_S}\n"
    )
    patched = os.pathsep.join([str(tmp_path), str(ROOT)])
    server = serve(fake, is_forked=False, GPUMON_DATABASE_URL=url, PYTHONPATH=patched).ready()
    with postgres.silent():
        asking = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        for one in asking:
            one.sendall(b"GET /api/v1/usage HTTP/1.1\r\nHost: localhost\r\n\r\n")
        server.wait(lambda _, answer: answer.get("recorder", {}).get("buffered", 0) >= 2)
        server.stop()
        for one in asking:
            one.close()
    assert "recorder stopped" in server.log.read_text()
    assert list(server.data_dir.glob("waiting-*.ticks"))
    again = serve(fake, GPUMON_DATABASE_URL=url).ready()
    until(lambda: not list(again.data_dir.glob("waiting-*.ticks")))
