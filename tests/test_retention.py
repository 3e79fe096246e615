"""Raw ticks are stored for their time, and not longer."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from conftest import eventually
from ticks import ask, runs, tick, who

from gpumon_core.attribution.records import Program
from gpumon_core.store import database, retention
from gpumon_core.store.retention import BATCH_CHANGES, RetentionDays
from gpumon_core.store.rollups import roll_up
from gpumon_core.store.schema import gpu_changes
from gpumon_core.store.writer import Writer

NOW = 10_000_000
DAY = 86400


@pytest.fixture
def engine(tmp_path: Path) -> sa.Engine:
    return database.open_for_writing(f"sqlite:///{tmp_path / 'gpumon.db'}")


def forget(engine: sa.Engine, raw_days: float, **more: Any) -> int:
    """Roll up as the recorder does, and forget raw ticks only."""
    roll_up(engine, "here")
    return retention.forget(engine, RetentionDays(raw_days, 3000, 3000), NOW, **more)


def test_old_ticks_go_and_the_ledger_stays(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "BATCH_ROWS", 3)
    monkeypatch.setattr(retention, "PAUSE_S", 0)
    writer = Writer(engine, "here", "nvml", 4)
    for hours in range(100, 0, -1):
        writer.write(tick(NOW - hours * 3600, {(0, 7): 1000}), who(7))
    assert forget(engine, 3) == 28 * (3 + 3 + 1), "ticks, the twenty seconds they make, and a process"
    assert ask(engine, "SELECT min(timestamp_epoch), count(*) FROM gpu_metrics") == [(NOW - 3 * DAY, 72 * 3)]
    assert ask(engine, "SELECT min(timestamp_epoch), count(*) FROM process_snapshots") == [(NOW - 3 * DAY, 72)]
    assert ask(engine, "SELECT sample_count FROM gpu_processes") == [(100,)]
    assert forget(engine, 3) == 0, "a second run finds nothing to do"


def test_a_shorter_time_takes_effect_at_the_next_run(engine: sa.Engine) -> None:
    writer = Writer(engine, "here", "nvml", 4)
    for days in (2.5, 1.5, 0.5):
        writer.write(tick(NOW - days * DAY), {})
    assert forget(engine, 3) == 0
    assert forget(engine, 1) == 2 * (3 + 3)


def test_the_space_goes_back_to_the_file_system(
    engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "VACUUM_PAGES", 20)
    monkeypatch.setattr(retention, "PAUSE_S", 0)
    writer = Writer(engine, "here", "nvml", 4)
    for step in range(3000):
        writer.write(tick(NOW - 10 * DAY + step, {(0, 7): step}), who(7))
    with engine.connect() as connection:
        before = connection.exec_driver_sql("PRAGMA page_count").scalar()
    forget(engine, 3)
    with engine.connect() as connection:
        after = connection.exec_driver_sql("PRAGMA page_count").scalar()
    assert before is not None
    assert after is not None
    assert after < before / 2


def test_ticks_are_written_while_old_ones_are_forgotten(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH_ROWS", 5)
    writer = Writer(engine, "here", "nvml", 4)
    for step in range(120):
        writer.write(tick(NOW - 10 * DAY + step), {})
    writer.write(tick(NOW - 1), {})
    roll_up(engine, "here")
    written = 0

    class Turns(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            before = written
            return not eventually(lambda: written > before, every_s=0.001)

    # Each pause lasts until a tick was written, however slow the machine.
    worker = threading.Thread(target=retention.forget, args=(engine, RetentionDays(3, 3000, 3000), NOW, Turns()))
    worker.start()
    while worker.is_alive():
        written += writer.write(tick(NOW + written), {})
        time.sleep(0.005)
    worker.join()
    assert written > 10
    assert ask(engine, f"SELECT count(*) FROM gpu_metrics WHERE timestamp_epoch >= {NOW}") == [(written * 3,)]
    assert ask(engine, f"SELECT count(*) FROM gpu_metrics WHERE timestamp_epoch < {NOW - 3 * DAY}") == [(0,)]


def test_a_recorder_that_stops_does_not_wait_for_it(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "BATCH_ROWS", 1)
    writer = Writer(engine, "here", "nvml", 4)
    for step in range(50):
        writer.write(tick(NOW - 10 * DAY + step), {})
    writer.write(tick(NOW - 1), {})
    stopping = threading.Event()
    stopping.set()
    assert forget(engine, 3, stopping=stopping) == 1
    assert forget(engine, 3) == 149 + 3 * 3, "the other ticks, and their twenty seconds"


def test_programs_that_nobody_runs_any_more_are_forgotten(engine: sa.Engine) -> None:
    writer = Writer(engine, "here", "nvml", 4)
    writer.write(tick(NOW - 9 * DAY, {(0, 7): 1000}), runs(7, Program(command="old")))
    writer.write(tick(NOW - 8 * DAY, {(0, 8): 1000}), runs(8, Program(command="new")))
    writer.write(tick(NOW - 1 * DAY, {(0, 9): 1000}), runs(9, Program(command="new")))
    roll_up(engine, "here")
    retention.forget(engine, RetentionDays(3, 3, 3), NOW)
    assert ask(engine, "SELECT pid FROM gpu_processes") == [(9,)]
    assert ask(engine, "SELECT command FROM programs") == [("new",)]


def test_years_of_changes_are_thinned_a_few_at_a_time(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(engine, "here", "nvml", 4)
    writer.write(tick(1000), {})
    now = 40 * DAY
    rows = [
        {"gpu_id": 1, "metric": metric, "timestamp_epoch": 36 * DAY + 3 * step, "value": float(step)}
        for metric in ("performance_state", "clocks_event_reasons")
        for step in range(3000)
    ]
    with engine.begin() as connection:
        connection.execute(gpu_changes.insert(), rows)
    sizes: list[int] = []

    def note(_: object, __: object, statement: str, parameters: object, ___: object, many: bool) -> None:
        if statement.startswith("DELETE FROM gpu_changes"):
            sizes.append(len(parameters) if many else 10**9)  # type: ignore[arg-type]

    sa.event.listen(engine, "before_cursor_execute", note)
    retention.forget(engine, RetentionDays(3, 30, 730), now, pause_s=0)
    assert sizes
    assert max(sizes) <= BATCH_CHANGES, "nobody waits long for any of them"
    with engine.connect() as connection:
        stored = connection.execute(
            sa.select(gpu_changes.c.metric, gpu_changes.c.timestamp_epoch, gpu_changes.c.value)
            .where(gpu_changes.c.timestamp_epoch >= 36 * DAY)
            .order_by(gpu_changes.c.metric, gpu_changes.c.timestamp_epoch)
        ).all()
    # 9,000 seconds are two and a half hours: the last change of each is left.
    assert [(row.timestamp_epoch - 36 * DAY) // 3600 for row in stored] == [0, 1, 2] * 2
    assert [row.value for row in stored] == [1199.0, 2399.0, 2999.0] * 2
