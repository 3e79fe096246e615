"""What the writer remembers of the ticks that it is given (store/writer.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sqlalchemy as sa
import ticks
from ticks import GPUS, HOST, ask, busy, measured, runs, tick, who

from gpumon_core.attribution.records import ProcessIdentity, Program
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuInfo, GpuReading, Snapshot

# The fixtures that these tests share.
engine, writer = ticks.engine, ticks.writer


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


RUNNING = """SELECT p.pid, g.command, g.model FROM gpu_processes p LEFT JOIN programs g ON g.id = p.program_id
             ORDER BY p.id"""


def test_what_a_process_runs_is_stored_once_for_all_that_run_the_same(engine: sa.Engine, writer: Writer) -> None:
    program = Program(command="python train.py", workload="PyTorch training")
    for number in range(5):
        writer.write(tick(100 + 4 * number, {(0, 7): 1000}), runs(7, program, f"boot:{number}"))
    writer.write(tick(120, {(0, 8): 1000}), who(8))
    assert ask(engine, RUNNING) == [(7, "python train.py", None)] * 5 + [(8, None, None)]
    assert ask(engine, "SELECT count(*) FROM programs") == [(1,)]


def test_what_is_learned_later_is_stored_with_the_same_row(engine: sa.Engine, writer: Writer) -> None:
    writer.write(tick(100, {(0, 7): 1000}), runs(7, Program(command="ollama runner")))
    writer.write(tick(104, {(0, 7): 1000}), runs(7, Program(command="ollama runner", model="qwen3:8b")))
    assert ask(engine, RUNNING) == [(7, "ollama runner", "qwen3:8b")]
    # A tick at which it could not be read takes nothing back.
    writer.write(tick(108, {(0, 7): 1000}), who(7))
    Writer(engine, "here", "nvml", 4).write(tick(112, {(0, 7): 1000}), who(7))
    assert ask(engine, RUNNING) == [(7, "ollama runner", "qwen3:8b")]


def test_a_user_whose_name_becomes_known_later_has_it_from_the_beginning(
    engine: sa.Engine, writer: Writer
) -> None:
    def called(user: str | None) -> dict[int, ProcessIdentity]:
        return {7: replace(who(7)[7], user=user)}

    for now, user in ((100, "4711"), (104, "ada"), (108, None), (112, "ada")):
        writer.write(tick(now, {(0, 7): 1000, (1, 7): 1000}), called(user))
        assert ask(engine, "SELECT username FROM gpu_processes") == [("4711" if now == 100 else "ada",)]
    program = Program(command="python train.py")
    later = Writer(engine, "here", "nvml", 4)
    later.write(tick(116, {(0, 7): 1000}), {7: replace(called("ada@house")[7], program=program)})
    assert ask(engine, "SELECT username FROM gpu_processes") == [("ada@house",)]


def test_a_row_from_before_an_upgrade_gets_what_it_runs(engine: sa.Engine, writer: Writer) -> None:
    writer.write(tick(100, {(0, 7): 1000}), who(7))
    Writer(engine, "here", "nvml", 4).write(tick(104, {(0, 7): 1000}), runs(7, Program(command="x")))
    assert ask(engine, RUNNING) == [(7, "x", None)]


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


def test_a_lost_gpu_is_marked_and_its_last_seen_does_not_move(engine: sa.Engine, writer: Writer) -> None:
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


def test_time_that_repeats_is_recorded_and_no_lifetime_is_negative(engine: sa.Engine, writer: Writer) -> None:
    for now in (1000, 1000.7, 400, 404, 400):
        assert writer.write(tick(now, {(0, 7): 100}), who(7))
    assert ask(engine, "SELECT count(*) FROM gpu_metrics WHERE gpu_id = 1") == [(3,)]
    assert ask(engine, "SELECT last_seen >= first_seen, last_seen, sample_count FROM gpu_processes") == [
        (1, 400, 5)
    ]
    assert ask(engine, "SELECT first_seen, last_seen FROM hosts") == [(400, 400)]


def test_a_second_that_repeats_has_the_mean_of_both_times(engine: sa.Engine, writer: Writer) -> None:
    for now, elapsed, watts, memory in ((100, 10.0, 100.0, 5), (104, 14.0, 100.0, 5), (104, 17.0, 240.0, None)):
        values = {"power": watts, "power_max": watts + 1, "memory": memory}
        snapshot = Snapshot(now, HOST, GPUS[:1], (GpuReading("GPU-0", values),), elapsed=elapsed)
        writer.write(snapshot, {})
    query = "SELECT power, power_max, memory, recorded_ms FROM gpu_metrics ORDER BY timestamp_epoch DESC LIMIT 1"
    assert ask(engine, query) == [(160.0, 241.0, 5, 7000)]


@pytest.mark.parametrize("step", [-86400, -3600, -61, -3, 3, 61, 3600, 86400])
def test_a_wall_clock_that_is_set_changes_labels_and_no_amount(
    engine: sa.Engine, writer: Writer, step: int
) -> None:
    """An hour of 100 W and 50 %, in whose middle the wall clock is set, while the other clock goes on."""
    begin = 1_000_000_000
    both, identities, ticks = (busy(7, 1000, 50), busy(8, 10, 0)), who(7, 8), []
    for place in range(900):
        now = begin + 4 * place + (step if place >= 450 else 0)
        snapshot = measured(now, processes=both, energy=400.0 * place, power=100.0, utilization=50.0)
        ticks.append((replace(snapshot, elapsed=50.0 + 4 * place), identities))
    for place in range(0, 900, 60):
        writer.write_all(ticks[place : place + 60])
    writer.settle()
    query = "SELECT sum(seconds), sum(busy_s), sum(energy_j), sum(unrecorded_j) FROM gpu_usage"
    assert ask(engine, query) == [(3600.0, 1800.0, 899 * 400.0, 0.0)]
    query = "SELECT sum(seconds), sum(busy_s), sum(idle_s), sum(energy_j) FROM process_hours GROUP BY process_id"
    assert sorted(ask(engine, query)) == [(3600.0, 0.0, 3596.0, 0.0), (3600.0, 1800.0, 0.0, 899 * 200.0)]
    end = begin + 4 * 899 + step
    assert ask(engine, "SELECT last_seen FROM hosts") == [(end,)]
    assert ask(engine, "SELECT max(first_seen) <= max(last_seen), max(last_seen) FROM gpu_processes") == [(1, end)]
    assert ask(engine, "SELECT last_busy FROM process_gpus ORDER BY process_id") == [(end,), (begin + step,)]


def test_a_history_that_began_in_1970_does_not_become_a_million_rows(engine: sa.Engine, writer: Writer) -> None:
    writer.write(measured(100, energy=1000.0, power=100.0), {})
    Writer(engine, "here", "nvml", 4).write(measured(1_800_000_000, energy=500_000.0, power=100.0), {})
    [(rows, joules)] = ask(engine, "SELECT count(*), sum(energy_j) FROM gpu_usage")
    assert rows < 20_000
    assert joules == pytest.approx(499_000, rel=0.001)


def test_a_failed_tick_leaves_nothing_and_the_next_is_whole(engine: sa.Engine, writer: Writer) -> None:
    writer.write(tick(100, {(0, 7): 100}), who(7))

    def full(_: object, __: object, statement: str, *___: object) -> None:
        if statement.startswith("INSERT INTO process_snapshots"):
            raise sa.exc.OperationalError(statement, {}, RuntimeError("disk full"))

    sa.event.listen(engine, "before_cursor_execute", full)
    with pytest.raises(sa.exc.DBAPIError, match="disk full"):
        writer.write(tick(104, {(0, 8): 100}), who(8))
    sa.event.remove(engine, "before_cursor_execute", full)
    assert ask(engine, "SELECT max(timestamp_epoch) FROM gpu_metrics") == [(100,)]
    assert ask(engine, "SELECT pid FROM gpu_processes") == [(7,)]
    assert writer.write(tick(108, {(0, 8): 100}), who(8))
    assert ask(engine, "SELECT pid, sample_count FROM gpu_processes ORDER BY pid") == [(7, 1), (8, 1)]


def test_two_hosts_in_one_database_do_not_touch_each_other(engine: sa.Engine, writer: Writer) -> None:
    other = Writer(engine, "there", "nvml", 4)
    writer.write(tick(100, {(0, 7): 1000}), who(7))
    other.write(tick(100, {(0, 7): 3000}), who(7))
    writer.write(tick(104, {(0, 7): 1000}), who(7))
    query = "SELECT host_id, avg_memory, sample_count FROM gpu_processes ORDER BY host_id"
    assert ask(engine, query) == [(1, 1000.0, 2), (2, 3000.0, 1)]
    assert ask(engine, "SELECT host_id, count(*), max(last_seen) FROM gpus GROUP BY host_id ORDER BY 1") == [
        (1, 3, 104),
        (2, 3, 100),
    ]


def test_what_the_writer_remembers_does_not_grow_with_the_history(writer: Writer) -> None:
    for step in range(50):
        writer.write(tick(100 + step, {(0, 1000 + step): 10}), who(1000 + step))
    assert len(writer._processes.known) == 1
    assert len(writer._processes.live) == 1


def test_compute_and_graphics_are_distinguished(engine: sa.Engine, writer: Writer) -> None:
    writer.write(tick(100, {(0, 7): 10}, kind="C"), who(7))
    writer.write(tick(104, {(0, 7): 10}, kind="C+G"), who(7))
    assert ask(engine, "SELECT kind FROM process_gpus") == [("C+G",)]
