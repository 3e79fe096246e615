"""Lanes, areas of memory and throttle reasons, from histories of which everything is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import occupied
import pandas as pd
import pytest
import sqlalchemy as sa
from occupied import DAWN, GAP, HOUR, Attributed, Held, at, gpu_ids, held, ids
from ticks import GPUS, HOST, runs, tick, who

from gpumon_core.attribution.records import Program
from gpumon_core.store import database, retention
from gpumon_core.store.queries import occupancy
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuReading, HostInfo, Snapshot

# The fixtures that these tests share.
write, ticked, hourly = occupied.write, occupied.ticked, occupied.hourly


def bars(engine: sa.Engine, start: int, end: int, *, of: Any = "process", most: int = 100) -> pd.DataFrame:
    return occupancy.lanes(engine, gpu_ids(engine), start, end, of, most)


# ---- Lanes -----------------------------------------------------------------------------------------


def test_a_bar_has_the_process_its_times_and_its_memory(write: Callable[..., sa.Engine]) -> None:
    program = Program(workload="Training", model="vit")
    engine = write(
        [
            (tick(DAWN, {(0, 7): 1000, (0, 8): 10}), runs(7, program) | who(8)),
            (tick(DAWN + 4, {(0, 7): 3000, (0, 8): 10}), runs(7, program) | who(8)),
            (tick(DAWN + 8, {(0, 8): 10}), who(8)),
        ]
    )
    bar, other = bars(engine, DAWN, DAWN + 8).to_dict("records")
    assert bar == {
        **{"gpu_id": 1, "process_id": ids(engine)[7], "first": DAWN, "last": DAWN + 4, "running": False},
        **{"pid": 7, "name": "train.py", "username": "ada", "workload": "Training", "model": "vit"},
        **{"memory": 2000.0, "max_memory": 3000.0, "share": 3000 / 24576, "found": 2},
    }
    assert (other["pid"], other["running"], other["last"]) == (8, True, DAWN + 8)
    assert other["workload"] is None
    assert other["model"] is None


@pytest.mark.parametrize(
    ("start", "end", "there"),
    [
        (100, 108, True),
        (50, 99, False),
        (50, 100, True),
        (108, 150, True),
        (109, 150, False),
        (102, 103, True),
        (0, 1000, True),
    ],
)
def test_a_process_that_only_touches_the_range_is_in_it(
    write: Callable[..., sa.Engine], start: int, end: int, there: bool
) -> None:
    engine = write([at(100, {(0, 7): 1}), at(104, {(0, 7): 1}), at(108, {(0, 7): 1}), at(112, {}), at(116, {})])
    assert (bars(engine, start, end)["pid"].tolist() == [7]) is there


def test_a_running_process_lasts_until_the_newest_tick_however_late_its_row_is(
    write: Callable[..., sa.Engine],
) -> None:
    crowd: Held = {(0, pid): pid for pid in range(100, 180)}
    engine = database.open_for_writing(str(write([], settle=False).url.render_as_string(hide_password=False)))
    writer = Writer(engine, "here", "nvml", 4)
    for step in range(3):
        writer.write(*at(DAWN + 4 * step, crowd))
    with engine.connect() as connection:
        late = connection.exec_driver_sql(
            f"SELECT count(*) FROM process_gpus WHERE last_seen < {DAWN + 8}"
        ).scalar()
    assert late, "not every row is brought up to date with every tick"
    found = bars(engine, DAWN + 8, DAWN + 8)
    assert len(found) == 80
    assert (found["last"] == DAWN + 8).all()
    assert found["running"].all()


def test_on_a_lost_gpu_no_process_lasts_beyond_its_last_tick(write: Callable[..., sa.Engine]) -> None:
    held: Held = {(0, 7): 100, (1, 8): 100}
    dead = frozenset({"GPU-1"})
    ticks = [at(DAWN + 4 * step, held) for step in range(3)]
    ticks += [at(DAWN + 4 * step, {(0, 7): 100}, lost=dead) for step in range(3, 6)]
    found = bars(write(ticks), DAWN, DAWN + 20).set_index("pid")
    assert found["last"].to_dict() == {7: DAWN + 20, 8: DAWN + 8}
    assert found["running"].to_dict() == {7: True, 8: False}
    assert bars(write([]), DAWN + 12, DAWN + 20)["pid"].tolist() == [7]


def test_processes_found_by_the_hours_are_the_same_as_those_found_among_all(
    write: Callable[..., sa.Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def held(moment: int) -> Held:
        # Lives of all lengths, some of a single tick on the hour, some that come back, one that stays.
        step = (moment - DAWN) // 60
        lives = {100 + n: (7 * n % 400, 7 * n % 400 + (0, 1, 13, 59, 60, 180)[n % 6]) for n in range(60)}
        lives |= {200 + n: (60 * n, 60 * n) for n in range(7)}
        found: Held = {(0, pid): 100 + pid for pid, (first, last) in lives.items() if first <= step <= last}
        return found | {(1, 99): 64} | ({(1, 98): 32} if step % 90 < 20 else {})

    engine = write([at(moment, held(moment)) for moment in range(DAWN, DAWN + 8 * HOUR, 60)], interval=60)
    pairs = [(DAWN + a * 600, DAWN + b * 600) for a in range(-6, 50, 5) for b in range(a, 54, 7)]
    by_hours = [occupancy.lanes(engine, (1, 2), start, end, "process", 500) for start, end in pairs]
    monkeypatch.setattr(occupancy, "LONGEST_BY_HOURS_S", -1)
    for (start, end), found in zip(pairs, by_hours, strict=True):
        pd.testing.assert_frame_equal(found, occupancy.lanes(engine, (1, 2), start, end, "process", 500))
    assert sum(len(found) for found in by_hours) > 1000


def test_of_too_many_processes_the_largest_are_returned_and_all_are_counted(
    write: Callable[..., sa.Engine],
) -> None:
    def held(step: int) -> dict[tuple[int, int], int]:
        # Much for a moment, and less for long.
        return {(0, 7): 900} | ({(0, 8): 5000} if step == 0 else {}) | {(1, pid): pid for pid in range(100, 120)}

    engine = write(at(DAWN + 4 * step, {**held(step)}) for step in range(20))
    found = bars(engine, DAWN, DAWN + 76, most=3)
    assert sorted(found["pid"]) == [7, 118, 119]
    assert found["found"].unique().tolist() == [22]
    assert len(bars(engine, DAWN, DAWN + 76)) == 22
    # What counts is what they held within the stretch.
    assert sorted(bars(engine, DAWN, DAWN, most=2)["pid"]) == [7, 8]


def test_of_equal_processes_the_first_are_returned(write: Callable[..., sa.Engine]) -> None:
    # On one GPU after the other, and not GPU by GPU.
    engine = write(at(DAWN + 4 * step, {(2 - pid % 3, pid): 64 for pid in range(100, 140)}) for step in range(3))
    number = ids(engine)
    for most in (1, 5, 20):
        found = bars(engine, DAWN, DAWN + 8, most=most)
        assert sorted(found["process_id"]) == sorted(number.values())[:most]


def test_gpus_are_in_the_order_asked_for_and_bars_by_time(write: Callable[..., sa.Engine]) -> None:
    def held(step: int) -> dict[tuple[int, int], int]:
        return {(0, 8): 1, (2, 7): 1, (1, 10): 1} | ({(0, 9): 500} if step else {})

    engine = write(at(DAWN + 4 * step, {**held(step)}) for step in range(3))
    found = occupancy.lanes(engine, [3, 1], DAWN, DAWN + 8, "process", 10)
    assert found["pid"].tolist() == [7, 8, 9]
    assert found["gpu_id"].tolist() == [3, 1, 1]


def test_the_share_is_of_the_gpus_memory_and_unknown_where_either_is(write: Callable[..., sa.Engine]) -> None:
    gpus = (*GPUS[:2], replace(GPUS[2], memory_total_mib=None))
    held: Held = {(0, 7): 6144, (0, 8): None, (1, 9): 30000, (2, 10): 100}
    found = bars(write([at(DAWN, held, gpus)]), DAWN, DAWN).set_index("pid")
    assert found["share"].fillna(-1).to_dict() == {7: 0.25, 8: -1, 9: 1, 10: -1}
    assert found["memory"].isna().to_dict() == {7: False, 8: True, 9: False, 10: False}


def test_a_model_lasts_from_when_it_is_loaded_to_when_it_is_dropped(write: Callable[..., sa.Engine]) -> None:
    server = Program(workload="vLLM", category="inference", model="a:7b")
    ticks: list[Attributed] = []
    for step in range(20):
        program = server if step < 10 else replace(server, model="b:70b")
        ticks.append((tick(DAWN + 20 * step, {(0, 7): 1000, (1, 8): 1}), runs(7, program) | who(8)))
    found = bars(write(ticks, interval=20), DAWN, DAWN + 380, of="model")
    assert found[["model", "first", "last", "running"]].to_numpy().tolist() == [
        ["a:7b", DAWN, DAWN + 180, False],
        ["b:70b", DAWN + 200, DAWN + 380, True],
    ]
    assert found["workload"].tolist() == ["vLLM", "vLLM"]
    assert bars(write([]), DAWN, DAWN + 100, of="model")["model"].tolist() == ["a:7b"]


def test_without_processes_there_are_no_bars(write: Callable[..., sa.Engine]) -> None:
    engine = write([at(DAWN, {(0, 7): 1}), at(DAWN + 4, {})])
    some, none = bars(engine, DAWN, DAWN), bars(engine, DAWN + 100, DAWN + 200)
    assert none.empty
    assert list(none.columns) == list(some.columns)
    assert occupancy.lanes(engine, [], DAWN, DAWN, "process", 10).empty


def test_each_host_has_its_own_newest_tick(write: Callable[..., sa.Engine]) -> None:
    write([at(DAWN + 4 * step, {(0, 7): 1}) for step in range(3)])
    elsewhere = HostInfo("there", "580.1", "13.0", "13.580.1")
    ticks = [at(DAWN + 4 * step, {(0, 8): 1}) for step in range(6)]
    engine = write([(replace(snapshot, host=elsewhere), known) for snapshot, known in ticks], host="there")
    found = bars(engine, DAWN, DAWN + 20).set_index("pid")
    assert found["last"].to_dict() == {7: DAWN + 8, 8: DAWN + 20}
    assert found["running"].all()


# ---- Memory by process -----------------------------------------------------------------------------


def memory(engine: sa.Engine, start: int, end: int, points: int, most: int = 10, on: Any = None) -> pd.DataFrame:
    return occupancy.memory_by_process(engine, on or gpu_ids(engine), start, end, points, most)


@pytest.mark.parametrize(
    ("first", "last", "points"),
    [(0, 599, 30), (0, 599, 599), (0, 599, 7), (90, 110, 20), (290, 340, 25), (400, 599, 40)],
)
@pytest.mark.parametrize("gpus", [(0, 1, 2), (1,), (0, 2)])
def test_memory_is_what_the_tick_at_each_step_says(
    ticked: sa.Engine, first: int, last: int, points: int, gpus: tuple[int, ...]
) -> None:
    start, end = DAWN + 4 * first, DAWN + 4 * last
    frame = memory(ticked, start, end, points, on=[gpu + 1 for gpu in gpus])
    pids = {number: pid for pid, number in ids(ticked).items()}
    moments = frame["timestamp_epoch"]
    assert moments.iloc[0] == start
    assert moments.diff().dropna().nunique() <= 1
    assert start < end - (end - moments.iloc[-1]) <= end
    assert len(frame) <= points
    for row in frame.rename(columns=pids).to_dict("records"):
        step = (row["timestamp_epoch"] - DAWN) // 4
        # A tick holds until the next one is due.
        there = {} if step in GAP else held(step)
        for pid in (7, 8, 11):
            due = sum(mib or 0 for (gpu, who_is), mib in there.items() if who_is == pid and gpu in gpus)
            assert row.get(pid, 0) == due, (pid, step)
        assert 10 not in row


def test_a_process_between_two_steps_is_not_lost(ticked: sa.Engine) -> None:
    frame = memory(ticked, DAWN, DAWN + 2400, 30)
    brief = frame.set_index("timestamp_epoch")[ids(ticked)[9]]
    # The most that it held, on both GPUs, once.
    assert brief[brief > 0].to_dict() == {DAWN + 800: 4207 + 300}


def test_the_largest_have_columns_of_their_own_and_the_others_share_one(ticked: sa.Engine) -> None:
    whole, number = memory(ticked, DAWN, DAWN + 2400, 30), ids(ticked)
    assert list(whole.columns) == ["timestamp_epoch", number[7], number[8], number[9], number[11]]
    for most in (0, 1, 2):
        few = memory(ticked, DAWN, DAWN + 2400, 30, most)
        assert list(few.columns) == [*whole.columns[: most + 1], occupancy.OTHER_PROCESSES]
        sums = [frame.drop(columns="timestamp_epoch").sum(axis=1).round(3).tolist() for frame in (whole, few)]
        assert sums[0] == sums[1]
    assert occupancy.OTHER_PROCESSES not in memory(ticked, DAWN, DAWN + 2400, 30, 4)


def test_without_memory_there_is_no_column(ticked: sa.Engine) -> None:
    for frame in (
        memory(ticked, DAWN - 9000, DAWN - 8000, 10),
        memory(ticked, DAWN - 90000, DAWN - 8000, 10),
        memory(ticked, DAWN + 9000, DAWN + 9600, 10),
        memory(ticked, DAWN + 90000, DAWN + 190000, 10),
    ):
        assert list(frame.columns) == ["timestamp_epoch"]


def test_on_a_lost_gpu_nothing_is_held_until_it_answers_again(write: Callable[..., sa.Engine]) -> None:
    ticks = []
    for step in range(60):
        dead = 20 <= step < 40
        ticks.append(at(DAWN + 4 * step, {} if dead else {(0, 7): 100}, lost=frozenset({"GPU-0"} if dead else ())))
    frame = memory(write(ticks), DAWN, DAWN + 236, 59)
    shown = frame.set_index("timestamp_epoch").iloc[:, 0]
    assert shown[shown > 0].index.tolist() == [DAWN + 4 * step for step in range(59) if not 20 <= step < 40]


def test_in_a_long_range_memory_is_the_mean_of_each_hour(hourly: sa.Engine) -> None:
    start, end = DAWN, DAWN + 479 * 60
    frame, number = memory(hourly, start, end, 96), ids(hourly)
    by_pid = {pid: dict(zip(frame["timestamp_epoch"], frame[number[pid]], strict=True)) for pid in (7, 8, 9, 11)}
    assert {mib for at, mib in by_pid[7].items() if at > DAWN} == {1000}, "once, whatever it ran"
    # It left for three hours and returned; it was seen first with the first minute's tick.
    first = DAWN + HOUR + 60
    assert by_pid[8] == {at: 2000 * ((at - DAWN) // HOUR in (1, 5) and at >= first) for at in by_pid[8]}
    assert by_pid[11] == {at: 96 * (at > DAWN + 9000) for at in by_pid[11]}
    # Between two steps, and not lost.
    assert [(at, mib) for at, mib in by_pid[9].items() if mib] == [(DAWN + 22500, 7000)]


def test_a_part_of_a_long_range_has_the_same_values(hourly: sa.Engine) -> None:
    whole = memory(hourly, DAWN, DAWN + 8 * HOUR, 96)
    part = memory(hourly, DAWN + 2 * HOUR, DAWN + 6 * HOUR, 48)
    inside = whole[whole["timestamp_epoch"].isin(part["timestamp_epoch"])]
    assert len(inside) == len(part) == 48
    assert {name: part[name].tolist() for name in part} == {name: inside[name].tolist() for name in part}


def test_a_running_process_holds_memory_until_the_newest_tick_and_not_beyond(hourly: sa.Engine) -> None:
    frame, number = memory(hourly, DAWN + 4 * HOUR, DAWN + 12 * HOUR, 480), ids(hourly)
    there = frame.loc[frame[number[7]] > 0, "timestamp_epoch"]
    assert (there.min(), there.max()) == (DAWN + 4 * HOUR, DAWN + 479 * 60)


def test_where_the_ticks_are_deleted_the_hours_are_read(hourly: sa.Engine, database_url: str) -> None:
    days = retention.RetentionDays(raw_days=2 / 24, minute_days=30, hour_days=730)
    retention.forget(database.open_for_writing(database_url), days, now=DAWN + 8 * HOUR, pause_s=0)
    number = ids(hourly)
    old = memory(hourly, DAWN + HOUR, DAWN + 2 * HOUR, 60)
    assert (old[number[7]] == 1000).all()
    assert (old.loc[1:, number[8]] == 2000).all()
    stored = memory(hourly, DAWN + 7 * HOUR, DAWN + 8 * HOUR, 60)
    assert (stored[number[7]] == 1000).all()


# ---- Why clocks are held down ----------------------------------------------------------------------


def throttled(write: Callable[..., sa.Engine], *bits: int | None, lost: int = 0) -> sa.Engine:
    """A GPU that reports these reasons, tick after tick; at the last `lost` ticks it does not answer."""
    ticks: list[Attributed] = []
    for step, value in enumerate(bits):
        dead = step >= len(bits) - lost
        readings = [GpuReading("GPU-1", {"temperature": 50.0})]
        readings += [] if dead else [GpuReading("GPU-0", {"temperature": 60.0, "clocks_event_reasons": value})]
        gone = frozenset({"GPU-0"} if dead else ())
        ticks.append((Snapshot(1000 + 10 * step, HOST, GPUS[:2], tuple(readings), (), gone), {}))
    return write(ticks, interval=10)


def why(engine: sa.Engine, start: int, end: int) -> list[tuple[str, int, int]]:
    frame = occupancy.throttling(engine, 1, start, end)
    assert list(frame.columns) == ["reason", "first", "last"]
    return [(str(reason), int(first), int(last)) for reason, first, last in frame.itertuples(index=False)]


def test_each_reason_has_its_own_times(write: Callable[..., sa.Engine]) -> None:
    # Idle; power cap; power cap and thermal; thermal; nothing; power cap again until the end.
    engine = throttled(write, 0x1, 0x4, 0x24, 0x20, 0, 0x4, 0x4)
    assert why(engine, 1000, 1060) == [
        ("Idle", 1000, 1010),
        ("Power cap", 1010, 1030),
        ("Power cap", 1050, 1060),
        ("Software thermal", 1020, 1040),
    ]


def test_a_reason_from_before_the_range_begins_with_it(write: Callable[..., sa.Engine]) -> None:
    engine = throttled(write, 0x4, 0x4, 0x4, 0x4, 0, 0)
    assert why(engine, 1015, 1025) == [("Power cap", 1015, 1025)]
    assert why(engine, 1035, 1050) == [("Power cap", 1035, 1040)]
    assert why(engine, 1041, 1050) == []
    assert why(engine, 900, 950) == []


def test_what_the_driver_does_not_report_is_no_reason(write: Callable[..., sa.Engine]) -> None:
    engine = throttled(write, 0x4, None, 0x4, 0x4)
    assert why(engine, 1000, 1030) == [("Power cap", 1000, 1010), ("Power cap", 1020, 1030)]
    assert occupancy.throttling(engine, 2, 1000, 1030).empty
    assert occupancy.throttling(engine, 4711, 1000, 1030).empty


def test_there_is_no_reason_after_the_last_tick_of_a_gpu(write: Callable[..., sa.Engine]) -> None:
    engine = throttled(write, 0x4, 0x4, 0x4, 0x4, 0x4, lost=2)
    assert why(engine, 1000, 1040) == [("Power cap", 1000, 1020)]
    assert why(engine, 1000, 9000) == [("Power cap", 1000, 1020)]
    assert why(engine, 1030, 1040) == []
