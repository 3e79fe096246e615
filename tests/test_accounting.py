"""Whose the time, the energy and the memory of a tick are: processes, GPUs, hours and model sessions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sqlalchemy as sa
import ticks
from ticks import GPUS, HOST, ask, busy, measured, tick, who

from gpumon_core.attribution.records import ProcessIdentity, Program
from gpumon_core.store import writer as writer_module
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuReading, ProcessReading, Snapshot

# The fixtures that these tests share.
engine, writer = ticks.engine, ticks.writer


def test_what_rarely_changes_is_stored_when_it_changes(engine: sa.Engine, writer: Writer) -> None:
    for now, state in ((100, 0), (104, 0), (108, 8), (112, 8), (116, 0)):
        writer.write(measured(now, performance_state=state), {})
    # A tick at which it was not asked for, and another program that goes on.
    writer.write(measured(120), {})
    Writer(engine, "here", "nvml", 4).write(measured(124, performance_state=0), {})
    query = "SELECT timestamp_epoch, value FROM gpu_changes WHERE metric = 'performance_state' ORDER BY 1"
    assert ask(engine, query) == [(100, 0.0), (108, 8.0), (116, 0.0)]


def test_a_process_that_does_nothing_new_costs_a_row_now_and_then(engine: sa.Engine, writer: Writer) -> None:
    for step in range(301):
        memory = 2000 if step == 200 else 1000
        processes = (busy(7, memory, 0),) if step < 300 else ()
        writer.write(measured(4 * step + 4, processes=processes), who(7))
    query = "SELECT timestamp_epoch, memory, present FROM process_snapshots ORDER BY 1"
    assert ask(engine, query) == [(4, 1000, 1), (604, 1000, 1), (804, 2000, 1), (808, 1000, 1), (1204, None, 0)]


def test_energy_goes_on_when_the_driver_counts_anew(engine: sa.Engine, writer: Writer) -> None:
    for now, counter in ((100, 5000.0), (104, 5400.0), (108, 90.0), (112, 290.0)):
        writer.write(measured(now, energy=counter, power=100.0), {})
    # What came before the counter began anew is estimated by power. Another recorder, later: the driver has
    # counted what was taken meanwhile.
    Writer(engine, "here", "nvml", 4).write(measured(900, energy=2290.0, power=100.0), {})
    query = "SELECT timestamp_epoch, energy FROM gpu_metrics ORDER BY 1"
    assert ask(engine, query) == [(100, 0), (104, 400), (108, 800), (112, 1000), (900, 3000)]
    assert ask(engine, "SELECT energy_j, energy_counter_j, energy_from FROM gpus") == [(3000.0, 2290.0, "counter")]


def test_energy_follows_from_the_power_where_nothing_counts_it(engine: sa.Engine, writer: Writer) -> None:
    for now in (100, 104, 109):
        writer.write(measured(now, power=50.0), {})
    assert ask(engine, "SELECT energy FROM gpu_metrics ORDER BY timestamp_epoch") == [(200,), (400,), (650,)]
    assert ask(engine, "SELECT energy_from FROM gpus") == [("power",)]


def test_an_hour_of_a_process_is_its_share_of_the_gpu(engine: sa.Engine, writer: Writer) -> None:
    both = (busy(7, 1000, 60), busy(8, 3000, 20))
    for step in range(11):
        writer.write(measured(3604 + 4 * step, processes=both, power=100.0, utilization=80.0), who(7, 8))
    writer.settle()
    query = (
        "SELECT pid, h.seconds, busy_s, memory_mib_s, energy_j, h.max_memory, estimated "
        "FROM process_hours h JOIN gpu_processes ON id = process_id WHERE timestamp_epoch = 3600 ORDER BY pid"
    )
    rows = [tuple(round(value, 3) for value in row) for row in ask(engine, query)]
    assert rows == [
        (7, 44.0, 26.4, 44000.0, 2640.0, 1000, 0),
        (8, 44.0, 8.8, 132000.0, 880.0, 3000, 0),
    ]
    lives = "SELECT seconds, busy_s, energy_j, sm_percent_s, sm_told_s, max_sm, estimated FROM process_gpus"
    assert ask(engine, f"{lives} ORDER BY process_id") == [
        (44.0, 26.4, 2640.0, 2640.0, 44.0, 60, 0),
        (44.0, 8.8, 880.0, 880.0, 44.0, 20, 0),
    ]


def test_the_parts_are_scaled_to_what_the_gpu_was_busy(engine: sa.Engine, writer: Writer) -> None:
    both = (busy(7, 1000, 90), busy(8, 3000, 30))
    writer.write(measured(3604, processes=both, power=100.0, utilization=60.0), who(7, 8))
    assert ask(engine, "SELECT busy_s, energy_j FROM process_hours ORDER BY process_id") == [
        (1.8, 180.0),
        (0.6, 60.0),
    ]
    assert ask(engine, "SELECT busy_s, energy_j, idle_j, unattributed_j FROM gpu_usage") == [
        (2.4, 400.0, 160.0, 0.0)
    ]


def test_where_the_driver_does_not_distinguish_processes_memory_splits_the_use(
    engine: sa.Engine, writer: Writer
) -> None:
    both = (busy(7, 1000), busy(8, 3000))
    writer.write(measured(3604, processes=both, power=100.0, utilization=50.0), who(7, 8))
    query = "SELECT busy_s, energy_j, estimated FROM process_hours ORDER BY process_id"
    assert ask(engine, query) == [(0.5, 50.0, 1), (1.5, 150.0, 1)]
    # One that the driver distinguishes, and that did nothing, has no part in it.
    writer.write(
        measured(7204, processes=(busy(7, 1000, 0), busy(8, 3000)), power=100.0, utilization=50.0), who(7, 8)
    )
    query = "SELECT busy_s, estimated FROM process_hours WHERE timestamp_epoch = 7200 ORDER BY process_id"
    assert ask(engine, query) == [(0.0, 0), (2.0, 1)]


def test_what_the_mps_server_did_is_its_clients_work(engine: sa.Engine, writer: Writer) -> None:
    # As on an H100: the server (C) is said to have done everything, its clients (M+C) nothing.
    def mps(pid: int, memory: int, sm: int = 0) -> ProcessReading:
        return replace(busy(pid, memory, sm), kind="M+C")

    server = busy(7, 66, 50)
    identities = who(8, 9, 10) | {7: replace(who(7)[7], name="nvidia-cuda-mps-server")}
    query = "SELECT busy_s, energy_j, estimated FROM process_hours WHERE timestamp_epoch = {} ORDER BY process_id"

    writer.write(
        measured(3604, processes=(server, mps(8, 1000)), power=100.0, utilization=50.0),
        {pid: identities[pid] for pid in (7, 8)},
    )
    assert ask(engine, query.format(3600)) == [(0.0, 0.0, 0), (2.0, 200.0, 0)]
    # Two share it by their memory, beside one that needs no server.
    processes = (server, mps(8, 1000), mps(9, 3000), busy(10, 500, 30))
    writer.write(measured(7204, processes=processes, power=100.0, utilization=80.0), identities)
    assert ask(engine, query.format(7200)) == [(0.0, 0.0, 0), (0.5, 50.0, 1), (1.5, 150.0, 1), (1.2, 120.0, 0)]
    # With its last client gone, the work was still done.
    writer.write(measured(10804, processes=(server,), power=100.0, utilization=50.0), {7: identities[7]})
    assert ask(engine, query.format(10800)) == [(2.0, 200.0, 0)]
    assert ask(engine, "SELECT unattributed_s FROM gpu_usage") == [(0.0,)] * 3


def test_a_gpus_hour_is_busy_held_or_free_and_its_energy_all_accounted_for(
    engine: sa.Engine, writer: Writer
) -> None:
    def write(now: int, utilization: float | None, *processes: ProcessReading) -> None:
        pids = [process.pid for process in processes]
        values = {} if utilization is None else {"utilization": utilization}
        writer.write(measured(now, processes=processes, power=100.0, **values), who(*pids))

    write(3604, 25.0, busy(7, 1000, 25))  # One second of four.
    write(3608, 0.0, busy(7, 1000, 0))  # It only holds its memory.
    write(3612, 0.0, replace(busy(9, 300), kind="G"))  # A desktop holds nothing back.
    write(3616, 50.0)  # Somebody, but nobody knows who.
    write(3620, None)  # A card that does not tell.
    query = (
        "SELECT seconds, busy_s, held_s, unattributed_s, energy_j, idle_j, unattributed_j, unrecorded_j "
        "FROM gpu_usage"
    )
    assert ask(engine, query) == [(20.0, 3.0, 7.0, 2.0, 2000.0, 1300.0, 600.0, 0.0)]


def test_energy_of_a_time_in_which_nobody_recorded_is_a_part_of_its_own(engine: sa.Engine, writer: Writer) -> None:
    for now, counter in ((3604, 1000.0), (3608, 1400.0)):
        writer.write(measured(now, energy=counter, power=100.0, utilization=0.0), {})
    again = Writer(engine, "here", "nvml", 4)
    again.write(measured(4604, energy=91400.0, power=100.0, utilization=0.0), {})
    query = "SELECT seconds, energy_j, idle_j, unrecorded_j FROM gpu_usage"
    assert ask(engine, query) == [(12.0, 90400.0, 800.0, 89600.0)]


def test_a_reading_of_the_counter_that_fails_is_not_shared_out_twice(engine: sa.Engine, writer: Writer) -> None:
    for now, counter in ((3604, 1000.0), (3608, 1400.0), (3612, None), (3616, 2200.0)):
        writer.write(measured(now, energy=counter, power=100.0, utilization=0.0), {})
    assert ask(engine, "SELECT energy_j FROM gpus") == [(1200.0,)]
    assert ask(engine, "SELECT energy_j, idle_j FROM gpu_usage") == [(1200.0, 1200.0)]


def test_over_a_day_of_load_the_parts_equal_the_gpus(engine: sa.Engine, writer: Writer) -> None:
    """A known load of ten processes that come and go: GPU-seconds and energy add up, each and together."""
    counter, due = 0.0, {"busy": 0.0, "energy": 0.0, "mine": 0.0}
    batch = []
    for step in range(2400):
        now = 36000 + 4 * step
        sm = [10 * ((step // 7 + n) % 4) if (step // 50 + n) % 3 else 0 for n in range(6)]
        there = [busy(20 + n, 500 * n, share) for n, share in enumerate(sm) if (step // 200 + n) % 5]
        load = float(min(100, sum(process.sm_utilization or 0 for process in there)))
        watts = 60 + 3 * load
        counter += watts * 4
        batch.append(
            (
                measured(now, processes=tuple(there), energy=counter, power=watts, utilization=load),
                who(*(process.pid for process in there)),
            )
        )
        due["busy"] += 4 * load / 100
        due["energy"] += watts * 4 if step else 0
        whole = sum(process.sm_utilization or 0 for process in there)
        own = next((process.sm_utilization or 0 for process in there if process.pid == 23), 0)
        due["mine"] += 4 * load / 100 * own / whole if whole else 0
    for start in range(0, len(batch), 300):
        writer.write_all(batch[start : start + 300])
    writer.settle()
    [(busy_s, energy, idle, rest)] = ask(
        engine, "SELECT sum(busy_s), sum(energy_j), sum(idle_j), sum(unattributed_j) FROM gpu_usage"
    )
    [(parts_s, parts_j)] = ask(engine, "SELECT sum(busy_s), sum(energy_j) FROM process_hours")
    [(mine,)] = ask(
        engine, "SELECT sum(busy_s) FROM process_hours JOIN gpu_processes ON id = process_id WHERE pid = 23"
    )
    assert (busy_s, parts_s) == (pytest.approx(due["busy"], rel=0.001), pytest.approx(due["busy"], rel=0.001))
    assert mine == pytest.approx(due["mine"], rel=0.001)
    assert energy == pytest.approx(due["energy"], rel=0.001)
    assert parts_j + idle + rest == pytest.approx(due["energy"], rel=0.001)
    assert 0.1 < idle / energy < 0.9


def test_the_average_is_weighted_by_time(engine: sa.Engine, writer: Writer) -> None:
    for now, memory in ((100, 1000), (104, 1000), (114, 3000)):
        writer.write(tick(now, {(0, 7): memory}), who(7))
    for table in ("gpu_processes", "process_gpus"):
        [(average, seconds)] = ask(engine, f"SELECT avg_memory, seconds FROM {table}")
        assert (average, seconds) == (pytest.approx((8 * 1000 + 10 * 3000) / 18), 18.0)


def test_memory_that_is_held_for_nothing_is_idleness_from_its_beginning(engine: sa.Engine) -> None:
    writer = Writer(engine, "here", "nvml", 4, idle_after_s=600)
    for step in range(301):
        now = 7000 + 4 * step
        shares = (50 if step < 25 or step == 300 else 0, 0)
        both = (busy(7, 1000, shares[0]), busy(8, 2000, shares[1]))
        writer.write(measured(now, processes=both, power=100.0, utilization=float(sum(shares))), who(7, 8))
    writer.settle()
    query = "SELECT process_id, timestamp_epoch, idle_s FROM process_hours ORDER BY 1, 2"
    # The first worked until 7096; the second never did. The half hour ends at 7200.
    assert ask(engine, query) == [(1, 5400, 104.0), (1, 7200, 996.0), (2, 5400, 200.0), (2, 7200, 1000.0)]
    assert ask(engine, "SELECT last_busy FROM process_gpus ORDER BY process_id") == [(8200,), (7000,)]


def test_a_restart_goes_on_with_what_was_used(engine: sa.Engine, writer: Writer) -> None:
    for start in (3604, 3624, 3644):
        for step in range(5):
            both = (busy(7, 1000, 40), busy(8, 3000, 0))
            writer.write(measured(start + 4 * step, processes=both, power=100.0, utilization=40.0), who(7, 8))
        writer.settle()
        writer = Writer(engine, "here", "nvml", 4)
    [used] = ask(engine, "SELECT seconds, busy_s, held_s, energy_j FROM gpu_usage")
    assert used == pytest.approx((60.0, 24.0, 36.0, 6000.0))
    query = "SELECT seconds, busy_s, energy_j, max_sm, last_busy FROM process_gpus ORDER BY process_id"
    assert ask(engine, query) == [(60.0, 24.0, 2400.0, 40, 3660), (60.0, 0.0, 0.0, 0, 3604)]


SERVER = Program(command="ollama runner", workload="Ollama", category="inference")
SESSIONS = (
    "SELECT model, first_seen, last_seen, max_memory, round(avg_memory), active FROM model_sessions ORDER BY id"
)


def serving(model: str | None, pid: int = 7, pending: bool = False) -> dict[int, ProcessIdentity]:
    program = replace(SERVER, model=model)
    return {pid: replace(who(pid)[pid], program=program, pending=pending)}


def test_a_model_that_is_loaded_swapped_and_dropped_leaves_its_sessions(engine: sa.Engine, writer: Writer) -> None:
    story = [("a:7b", 4000), ("a:7b", 6000), ("b:1b", 2000), (None, 500), ("a:7b", 4000), ("a:7b", 4000)]
    for step, (model, memory) in enumerate(story):
        writer.write(tick(100 + 4 * step, {(0, 7): memory}), serving(model))
    writer.write(tick(124, {}), {})
    assert ask(engine, SESSIONS) == [
        ("a:7b", 100, 104, 6000, 5000, 0),
        ("b:1b", 108, 108, 2000, 2000, 0),
        ("a:7b", 116, 120, 4000, 4000, 0),
    ]


def test_the_hours_know_which_model_they_were_spent_on(engine: sa.Engine, writer: Writer) -> None:
    for step, model in enumerate(("a", "a", "a", "b")):
        one = (busy(7, 1000, 50),)
        writer.write(measured(3604 + 4 * step, processes=one, power=100.0, utilization=50.0), serving(model))
    query = "SELECT model, seconds, busy_s FROM process_hours JOIN programs ON id = program_id ORDER BY 1"
    assert ask(engine, query) == [("a", 12.0, 6.0), ("b", 4.0, 2.0)]


def test_a_models_name_may_become_known_later(engine: sa.Engine, writer: Writer) -> None:
    writer.write(tick(100, {(0, 7): 1000}), serving(None, pending=True))
    writer.write(tick(104, {(0, 7): 5000}), serving("sha256-0123456789ab"))
    assert ask(engine, SESSIONS) == [("sha256-0123456789ab", 100, 104, 5000, 3000, 1)]
    writer.write(tick(108, {(0, 7): 6000}), serving("qwen3:14b"))
    assert ask(engine, SESSIONS) == [("qwen3:14b", 100, 108, 6000, 4000, 1)]


def test_a_session_outlives_the_recorder_and_ends_with_its_process(engine: sa.Engine, writer: Writer) -> None:
    writer.write(tick(100, {(0, 7): 1000}), serving("qwen3:14b"))
    again = Writer(engine, "here", "nvml", 4)
    # The server has not been asked yet.
    again.write(tick(104, {(0, 7): 1000}), serving("sha256-0123456789ab", pending=True))
    again.write(tick(108, {(0, 7): 1000}), serving("qwen3:14b"))
    assert ask(engine, SESSIONS) == [("qwen3:14b", 100, 108, 1000, 1000, 1)]
    third = Writer(engine, "here", "nvml", 4)
    third.write(tick(900, {}), {})
    assert ask(engine, SESSIONS) == [("qwen3:14b", 100, 108, 1000, 1000, 0)]


def test_a_training_run_serves_no_model(engine: sa.Engine, writer: Writer) -> None:
    program = Program(command="train.py --model a", category="training", model="a")
    writer.write(tick(100, {(0, 7): 1000}), {7: replace(who(7)[7], program=program)})
    assert ask(engine, SESSIONS) == []


def test_a_pause_of_the_recorder_is_nobodys_time(engine: sa.Engine, writer: Writer) -> None:
    one = (busy(7, 1000, 100),)
    for now in (3604, 3608, 5304, 5308):
        writer.write(measured(now, processes=one, power=100.0), who(7))
    writer.settle()
    assert ask(engine, "SELECT seconds, busy_s FROM process_hours") == [(16.0, 16.0)]
    assert ask(engine, "SELECT seconds, busy_s FROM gpu_usage") == [(16.0, 16.0)]


def test_many_ticks_in_one_transaction_are_the_same_as_one_by_one(database_url: str, engine: sa.Engine) -> None:
    story = [
        (
            measured(
                100 + 4 * step, processes=tuple(busy(7 + n, 100 * step, 10) for n in range(step % 4)), power=80.0
            )
        )
        for step in range(40)
    ]
    ticks = [(snapshot, who(*(process.pid for process in snapshot.processes))) for snapshot in story]
    one_by_one, at_once = Writer(engine, "here", "nvml", 4), Writer(engine, "there", "nvml", 4)
    for snapshot, identities in ticks:
        assert one_by_one.write(snapshot, identities)
    assert at_once.write_all(ticks) == 40
    for writer in (one_by_one, at_once):
        writer.settle()
    query = (
        "SELECT pid, gpu_processes.first_seen, gpu_processes.last_seen, gpu_processes.max_memory, "
        "gpu_processes.sample_count, process_gpus.sample_count, active FROM gpu_processes "
        "JOIN process_gpus ON id = process_id WHERE host_id = {} ORDER BY pid"
    )
    assert ask(engine, query.format(1)) == ask(engine, query.format(2)) != []
    hours = (
        "SELECT pid, round(sum(busy_s)), round(sum(memory_mib_s)), round(sum(energy_j)) FROM process_hours "
        "JOIN gpu_processes ON id = process_id WHERE host_id = {} GROUP BY pid ORDER BY pid"
    )
    assert ask(engine, hours.format(1)) == ask(engine, hours.format(2)) != []


@pytest.mark.parametrize("killed_after", [1, 3, 5, 19, 33])
def test_what_a_killed_recorder_had_not_settled_is_counted_by_the_next(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    monkeypatch.setattr(writer_module, "SETTLED_PER_TICK", 1)

    def story(step: int) -> Snapshot:
        processes = [busy(pid, 100 * pid + step // 10, (step + pid) % 5) for pid in range(10, 16)]
        if step > 12:
            del processes[2]
        return measured(7200 + 4 * step, processes=tuple(processes), power=100.0, utilization=10.0)

    identities = who(*range(10, 16))
    whole = Writer(engine, "whole", "nvml", 4)
    killed = Writer(engine, "killed", "nvml", 4)
    for step in range(40):
        if step == killed_after:
            # Nothing is settled: it is as if it had been killed.
            killed = Writer(engine, "killed", "nvml", 4)
        for writer in (whole, killed):
            assert writer.write(story(step), identities)
    for writer in (whole, killed):
        writer.settle()
    query = (
        "SELECT pid, p.last_seen, p.sample_count, round(CAST(p.avg_memory AS numeric), 3), g.sample_count, "
        "round(g.seconds), round(g.sm_percent_s), max_sm, last_busy "
        "FROM gpu_processes p JOIN process_gpus g ON g.process_id = p.id WHERE host_id = {} ORDER BY pid"
    )
    assert ask(engine, query.format(2)) == ask(engine, query.format(1)) != []
    sums = (
        "SELECT sum(h.busy_s), sum(h.energy_j), sum(g.busy_s), sum(g.energy_j) FROM process_hours h "
        "JOIN process_gpus g ON g.process_id = h.process_id JOIN gpu_processes p ON p.id = h.process_id "
        "WHERE host_id = {}"
    )
    # Joules and milliseconds are whole ones.
    assert ask(engine, sums.format(2))[0] == pytest.approx(ask(engine, sums.format(1))[0], rel=0.005)


def test_what_a_process_did_before_it_ended_is_its_own(engine: sa.Engine, writer: Writer) -> None:
    rows = (ProcessReading("GPU-0", 7, "C", 1000, 60),)
    for now, utilization, there, ended in ((100, 60.0, rows, {}), (104, 60.0, rows, {}), (108, 30.0, (), {7: 30})):
        reading = GpuReading("GPU-0", {"utilization": utilization, "power": 100.0}, ended=ended)
        writer.write(Snapshot(now, HOST, GPUS[:1], (reading,), there), who(7))
    writer.settle()
    assert ask(engine, "SELECT busy_s, energy_j FROM process_hours") == [pytest.approx((6.0, 600.0))]
    assert ask(engine, "SELECT busy_s, active FROM process_gpus") == [(6.0, 0)]
    assert ask(engine, "SELECT busy_s, unattributed_s FROM gpu_usage") == [(6.0, 0.0)]
