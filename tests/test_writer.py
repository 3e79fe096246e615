"""What the ledger remembers of the ticks that it was given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.store import database
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuInfo, GpuReading, HostInfo, ProcessReading, Snapshot

HOST = HostInfo("here", "580.1", "13.0", "13.580.1")
GPUS = tuple(GpuInfo(index, f"GPU-{index}", f"Board {index}", 24576, 300.0) for index in range(3))


def tick(
    now: float,
    processes: dict[tuple[int, int], int | None] | None = None,
    gpus: tuple[GpuInfo, ...] = GPUS,
    lost: frozenset[str] = frozenset(),
    kind: str = "C",
) -> Snapshot:
    """A snapshot; `processes` is (gpu, pid) -> MiB."""
    readings = tuple(
        GpuReading(gpu.uuid, {"temperature": 60.0 + gpu.index, "memory": 1000})
        for gpu in gpus
        if gpu.uuid not in lost
    )
    rows = tuple(
        ProcessReading(f"GPU-{gpu}", pid, kind, memory) for (gpu, pid), memory in (processes or {}).items()
    )
    return Snapshot(now, HOST, gpus, readings, rows, lost)


def who(*pids: int, key: str = "boot:1") -> dict[int, ProcessIdentity]:
    return {pid: ProcessIdentity(pid, key, 1000.0, "train.py", "ada") for pid in pids}


@pytest.fixture
def engine(tmp_path: Path) -> sa.Engine:
    return database.open_for_writing(f"sqlite:///{tmp_path / 'gpumon.db'}")


@pytest.fixture
def writer(engine: sa.Engine) -> Writer:
    return Writer(engine, "here", "nvml", 4)


def ask(engine: sa.Engine, query: str) -> list[tuple[object, ...]]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(query)]


def test_a_tick_is_one_row_per_gpu_and_missing_values_are_null(engine: sa.Engine, writer: Writer) -> None:
    assert writer.write(tick(100.9), {})
    query = "SELECT gpu_id, timestamp_epoch, temperature, memory, power FROM gpu_metrics"
    assert ask(engine, query) == [
        (1, 100, 60.0, 1000, None),
        (2, 100, 61.0, 1000, None),
        (3, 100, 62.0, 1000, None),
    ]
    assert ask(engine, "SELECT name, driver_version, cuda_version, last_seen FROM hosts") == [
        ("here", "580.1", "13.0", 100)
    ]


def test_the_ledger_counts_and_averages(engine: sa.Engine, writer: Writer) -> None:
    for now, memory in ((100, 1000), (104, 3000), (108, 2000)):
        writer.write(tick(now, {(0, 7): memory}), who(7))
    query = "SELECT first_seen, last_seen, max_memory, avg_memory, sample_count, name, username FROM gpu_processes"
    assert ask(engine, query) == [(100, 108, 3000, 2000.0, 3, "train.py", "ada")]
    assert ask(engine, "SELECT memory FROM process_snapshots ORDER BY timestamp_epoch") == [
        (1000,),
        (3000,),
        (2000,),
    ]


def test_one_process_on_two_gpus_is_one_row_with_two_usages(engine: sa.Engine, writer: Writer) -> None:
    writer.write(tick(100, {(0, 7): 1000, (1, 7): 500}), who(7))
    writer.write(tick(104, {(0, 7): 2000}), who(7))
    assert ask(engine, "SELECT max_memory, avg_memory, sample_count FROM gpu_processes") == [(2000, 1750.0, 2)]
    query = "SELECT gpu_id, last_seen, max_memory, avg_memory, sample_count FROM process_gpus ORDER BY gpu_id"
    assert ask(engine, query) == [(1, 104, 2000, 1500.0, 2), (2, 100, 500, 500.0, 1)]


def test_a_reused_pid_starts_a_new_history(engine: sa.Engine, writer: Writer) -> None:
    writer.write(tick(100, {(0, 7): 1000}), who(7, key="boot:1"))
    writer.write(tick(104, {(0, 7): 5000}), who(7, key="boot:2"))
    assert ask(engine, "SELECT pid, start_key, max_memory, sample_count FROM gpu_processes ORDER BY id") == [
        (7, "boot:1", 1000, 1),
        (7, "boot:2", 5000, 1),
    ]


def test_a_restarted_recorder_goes_on_with_the_same_rows(engine: sa.Engine, writer: Writer) -> None:
    writer.write(tick(100, {(0, 7): 1000}), who(7))
    again = Writer(engine, "here", "nvml", 4)
    again.write(tick(200, {(0, 7): 3000}), who(7))
    assert ask(engine, "SELECT first_seen, last_seen, avg_memory, sample_count FROM gpu_processes") == [
        (100, 200, 2000.0, 2)
    ]
    assert ask(engine, "SELECT count(*) FROM gpus") == [(3,)]
    assert ask(engine, "SELECT count(*), min(first_seen), max(last_seen) FROM hosts") == [(1, 100, 200)]


def test_a_process_whose_start_is_unknown_is_the_same_only_while_it_is_seen(
    engine: sa.Engine, writer: Writer
) -> None:
    nobody = {7: ProcessIdentity(7)}
    writer.write(tick(100, {(0, 7): 1000}), nobody)
    writer.write(tick(104), {})
    writer.write(tick(108, {(0, 7): 1000}), nobody)
    assert ask(engine, "SELECT sample_count FROM gpu_processes") == [(2,)]
    writer.write(tick(500, {(0, 7): 1000}), nobody)
    assert ask(engine, "SELECT first_seen, sample_count FROM gpu_processes ORDER BY id") == [(100, 2), (500, 1)]


def test_memory_that_is_not_offered_is_null_all_the_way(engine: sa.Engine, writer: Writer) -> None:
    writer.write(tick(100, {(0, 7): None}), who(7))
    writer.write(tick(104, {(0, 7): None}), who(7))
    assert ask(engine, "SELECT max_memory, avg_memory, sample_count FROM gpu_processes") == [(None, None, 2)]
    writer.write(tick(108, {(0, 7): 900}), who(7))
    assert ask(engine, "SELECT max_memory, avg_memory, sample_count FROM gpu_processes") == [(900, 900.0, 3)]


def test_a_gpu_keeps_its_history_when_its_index_changes(engine: sa.Engine, writer: Writer) -> None:
    writer.write(tick(100), {})
    moved = (GpuInfo(5, "GPU-0", "Board 0", 24576, 300.0),)
    writer.write(tick(104, gpus=moved), {})
    assert ask(engine, "SELECT id, gpu_index, state FROM gpus ORDER BY id") == [
        (1, 5, "ok"),
        (2, 1, "gone"),
        (3, 2, "gone"),
    ]
    assert ask(engine, "SELECT count(*) FROM gpu_metrics WHERE gpu_id = 1") == [(2,)]
    writer.write(tick(108), {})
    assert ask(engine, "SELECT state FROM gpus") == [("ok",)] * 3


def test_a_lost_gpu_is_marked_and_its_last_seen_stands_still(engine: sa.Engine, writer: Writer) -> None:
    writer.write(tick(100), {})
    writer.write(tick(104, lost=frozenset({"GPU-1"})), {})
    assert ask(engine, "SELECT state, last_seen FROM gpus ORDER BY id") == [
        ("ok", 104),
        ("lost", 100),
        ("ok", 104),
    ]
    writer.write(tick(108), {})
    assert ask(engine, "SELECT state, last_seen FROM gpus WHERE id = 2") == [("ok", 108)]


def test_a_gpu_that_was_lost_before_the_start_is_lost_and_not_gone(engine: sa.Engine, writer: Writer) -> None:
    writer.write(tick(100), {})
    again = Writer(engine, "here", "nvml", 4)
    again.write(replace(tick(104, gpus=GPUS[:1]), nameless=frozenset({2})), {})
    assert ask(engine, "SELECT state, last_seen FROM gpus ORDER BY id") == [
        ("ok", 104),
        ("gone", 100),
        ("lost", 100),
    ]
    again.write(tick(108), {})
    assert ask(engine, "SELECT state FROM gpus") == [("ok",)] * 3


def test_a_mig_instance_has_its_parent(engine: sa.Engine, writer: Writer) -> None:
    instance = GpuInfo(0, "MIG-1", "1g.10gb", 9856, parent_uuid="GPU-0", mig_index=1)
    writer.write(tick(100, gpus=(*GPUS, instance)), {})
    query = "SELECT child.mig_index, parent.uuid FROM gpus child JOIN gpus parent ON parent.id = child.parent_id"
    assert ask(engine, query) == [(1, "GPU-0")]


def test_a_clock_set_back_makes_no_duplicate_and_no_negative_lifetime(engine: sa.Engine, writer: Writer) -> None:
    assert writer.write(tick(1000, {(0, 7): 100}), who(7))
    assert not writer.write(tick(1000.7, {(0, 7): 100}), who(7)), "a second tick in the same second"
    assert writer.write(tick(400, {(0, 7): 100}), who(7))
    assert writer.write(tick(404, {(0, 7): 100}), who(7))
    assert not writer.write(tick(400, {(0, 7): 100}), who(7))
    assert ask(engine, "SELECT count(*) FROM gpu_metrics WHERE gpu_id = 1") == [(3,)]
    assert ask(engine, "SELECT last_seen >= first_seen, sample_count FROM gpu_processes") == [(1, 3)]


def test_a_failed_tick_leaves_nothing_and_the_next_is_whole(
    engine: sa.Engine, writer: Writer, tmp_path: Path
) -> None:
    writer.write(tick(100, {(0, 7): 100}), who(7))
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER stop BEFORE INSERT ON process_snapshots BEGIN SELECT RAISE(ABORT, 'disk full'); END"
        )
    with pytest.raises(sa.exc.DBAPIError, match="disk full"):
        writer.write(tick(104, {(0, 8): 100}), who(8))
    assert ask(engine, "SELECT max(timestamp_epoch) FROM gpu_metrics") == [(100,)]
    assert ask(engine, "SELECT pid FROM gpu_processes") == [(7,)]
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER stop")
    assert writer.write(tick(108, {(0, 8): 100}), who(8))
    assert ask(engine, "SELECT pid, sample_count FROM gpu_processes ORDER BY pid") == [(7, 1), (8, 1)]


def test_two_hosts_in_one_database_do_not_touch_each_other(engine: sa.Engine, writer: Writer) -> None:
    other = Writer(engine, "there", "nvml", 4)
    writer.write(tick(100, {(0, 7): 1000}), who(7))
    other.write(tick(100, {(0, 7): 3000}), who(7))
    writer.write(tick(104, {(0, 7): 1000}), who(7))
    query = "SELECT host_id, avg_memory, sample_count FROM gpu_processes ORDER BY host_id"
    assert ask(engine, query) == [(1, 1000.0, 2), (2, 3000.0, 1)]
    assert ask(engine, "SELECT host_id, count(*), max(last_seen) FROM gpus GROUP BY host_id") == [
        (1, 3, 104),
        (2, 3, 100),
    ]


def test_what_is_kept_in_mind_does_not_grow_with_the_history(writer: Writer) -> None:
    for step in range(50):
        writer.write(tick(100 + step, {(0, 1000 + step): 10}), who(1000 + step))
    assert len(writer._processes) == 1
    assert len(writer._live) == 1


def test_compute_and_graphics_are_told_from_each_other(engine: sa.Engine, writer: Writer) -> None:
    writer.write(tick(100, {(0, 7): 10}, kind="C"), who(7))
    writer.write(tick(104, {(0, 7): 10}, kind="C+G"), who(7))
    assert ask(engine, "SELECT kind FROM process_gpus") == [("C+G",)]
