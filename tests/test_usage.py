"""What the ledger answers about use of the GPUs, with a load of which everything is known."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pandas as pd
import pytest
import sqlalchemy as sa
from ticks import GPUS, HOST, who

from gpumon_core.attribution.records import ProcessIdentity, Program
from gpumon_core.store import database
from gpumon_core.store.queries import costs, model_sessions, usage
from gpumon_core.store.queries.dimensions import Dimension
from gpumon_core.store.queries.usage import GPU_ROWS, Scope
from gpumon_core.store.schema import gpu_usage
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuReading, ProcessReading, Snapshot

DAWN = 1_800_000_000  # The beginning of an hour.
HOUR = 3600
HALF = 1800
HOURS = 6
STEP = 20
SERVER = Program(
    workload="vLLM", category="inference", model="a:7b", container_engine="docker", container_name="chat"
)
TRAINING = Program(workload="Training", category="training", model="vit", job_id="4711", pod="train-0")
NOTEBOOK = Program(workload="Jupyter", container_engine="docker", container_id="c1" * 32)
DESKTOP = Program(workload="Desktop")
PEOPLE = {
    7: ProcessIdentity(7, "boot:7", 1.0, "vllm", "ada", SERVER),
    8: ProcessIdentity(8, "boot:8", 1.0, "train.py", "grace", TRAINING),
    9: ProcessIdentity(9, "boot:9", 1.0, "ipykernel", "ada", NOTEBOOK),
    10: ProcessIdentity(10, "boot:10"),
    11: ProcessIdentity(11, "boot:11", 1.0, "Xorg", "root", DESKTOP),
}
# From this hour on the server has another model.
SWAP = 2
SWAPPED = replace(PEOPLE[7], program=replace(SERVER, model="b:70b"))
# What each dimension calls a process.
CALLED: dict[Dimension, dict[int, object]] = {
    "user": {7: "ada", 8: "grace", 9: "ada", 10: None, 11: "root"},
    "container": {7: "chat", 8: "train-0", 9: "c1" * 6, 10: None, 11: None},
    "workload": {7: "vLLM", 8: "Training", 9: "Jupyter", 10: None, 11: "Desktop"},
    "model": {8: "vit", 9: None, 10: None, 11: None},
    "job": {7: None, 8: "4711", 9: None, 10: None, 11: None},
}


def there(hour: int) -> list[tuple[int, int, str, int, int]]:
    """Who is on the GPUs in an hour of the load: GPU, PID, kind, MiB, percent of SMs."""
    rows = [(0, 7, "C", 8000, 20 if hour % 2 else 60), (1, 9, "C", 6000, 0), (2, 11, "G", 300, 5)]
    if 1 <= hour < 4:
        rows += [(0, 8, "C", 4000, 30), (1, 8, "C", 2000, 50)]
    if hour >= 3:
        rows.append((1, 10, "C", 500, 10))
    return rows


def utilization(hour: int, gpu: int) -> int:
    """Of a GPU in an hour. In the first hour something that is no known process uses the second GPU."""
    return 40 if (hour, gpu) == (0, 1) else sum(row[4] for row in there(hour) if row[0] == gpu)


def watts(hour: int, gpu: int) -> float:
    return 50.0 + 2 * utilization(hour, gpu)


@dataclass
class Part:
    """What somebody used, by the definition of the words."""

    pids: set[int]
    busy_s: float = 0.0
    seconds: float = 0.0
    memory_mib_s: float = 0.0
    energy_j: float = 0.0


def due(called: Callable[[int, int, int], object], hours: range = range(HOURS)) -> dict[object, Part]:
    """What a ranking must say; `called(hour, gpu, pid)` is the key."""
    parts: dict[object, Part] = defaultdict(lambda: Part(set()))
    for hour in hours:
        for gpu, pid, _, memory, sm in there(hour):
            part = parts[called(hour, gpu, pid)]
            part.pids.add(pid)
            part.seconds += HOUR
            part.busy_s += HOUR * sm / 100
            part.memory_mib_s += HOUR * memory
            # Of the first tick ever it is not known what the GPU had taken before.
            part.energy_j += (HOUR - (STEP if hour == 0 else 0)) * watts(hour, gpu) * sm / 100
    return parts


def whole_j(hours: range, gpus: tuple[int, ...] = (0, 1, 2)) -> float:
    return sum((HOUR - (STEP if hour == 0 else 0)) * watts(hour, gpu) for hour in hours for gpu in gpus)


def story() -> Iterator[tuple[Snapshot, dict[int, ProcessIdentity]]]:
    counters = [0.0, 0.0, 0.0]
    for step in range(HOURS * HOUR // STEP):
        hour = step * STEP // HOUR
        readings = []
        for gpu in range(3):
            counters[gpu] += watts(hour, gpu) * STEP
            values = {
                "utilization": float(utilization(hour, gpu)),
                "power": watts(hour, gpu),
                "energy": counters[gpu],
            }
            readings.append(GpuReading(f"GPU-{gpu}", values))
        rows = tuple(
            ProcessReading(f"GPU-{gpu}", pid, kind, memory, sm, None, None, None)
            for gpu, pid, kind, memory, sm in there(hour)
        )
        identities = {row.pid: SWAPPED if row.pid == 7 and hour >= SWAP else PEOPLE[row.pid] for row in rows}
        # A tick speaks of the time before it.
        yield Snapshot(DAWN + STEP * (step + 1), HOST, GPUS, tuple(readings), rows), identities


@pytest.fixture
def engine(database_url: str) -> sa.Engine:
    """The database with six hours of the load, by a recorder that has ended."""
    engine = database.open_for_writing(database_url)
    writer = Writer(engine, "here", "nvml", STEP)
    ticks = list(story())
    for start in range(0, len(ticks), 180):
        writer.write_all(ticks[start : start + 180])
    writer.settle()
    return database.open_for_reading(database_url)


def scope(first: int = 0, last: int = HOURS - 1, **filters: Any) -> Scope:
    """The hours from `first` to `last`, both of them whole."""
    return Scope(DAWN + first * HOUR + 7, DAWN + (last + 1) * HOUR, **filters)


def half_hours(first: int, end: int) -> list[int]:
    """When the half hours of the hours from `first` up to `end` begin."""
    return list(range(DAWN + first * HOUR, DAWN + end * HOUR, HALF))


def ids(engine: sa.Engine) -> dict[int, int]:
    """Id in the ledger -> PID."""
    with engine.connect() as connection:
        return {row[0]: row[1] for row in connection.exec_driver_sql("SELECT id, pid FROM gpu_processes")}


def parts(frame: pd.DataFrame) -> dict[object, dict[str, float]]:
    rows = frame[frame["kind"] == "part"].to_dict("records")
    return {None if pd.isna(row["key"]) else row["key"]: row for row in rows}  # type: ignore[misc]


def same(found: dict[object, dict[str, float]], expected: dict[object, Part]) -> None:
    assert set(found) == set(expected)
    for key, part in expected.items():
        row = found[key]
        assert row["processes"] == len(part.pids), key
        for name in ("busy_s", "seconds", "memory_mib_s", "energy_j"):
            assert row[name] == pytest.approx(getattr(part, name), rel=0.001, abs=1), (key, name)


# ---- Who used how much -----------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["user", "container", "workload", "job"])
def test_each_gets_what_its_processes_used(engine: sa.Engine, by: Dimension) -> None:
    same(parts(usage.ranking(engine, by, scope())), due(lambda _, __, pid: CALLED[by][pid]))


def test_a_model_gets_the_hours_in_which_it_was_loaded(engine: sa.Engine) -> None:
    def model(hour: int, _: int, pid: int) -> object:
        return CALLED["model"].get(pid, "b:70b" if hour >= SWAP else "a:7b")

    same(parts(usage.ranking(engine, "model", scope())), due(model))


def test_a_process_on_two_gpus_is_one_row_and_a_gpu_has_its_own(engine: sa.Engine) -> None:
    pids = ids(engine)
    found = {pids[key]: row for key, row in parts(usage.ranking(engine, "process", scope())).items()}  # type: ignore[index]
    same(found, due(lambda _, __, pid: pid))  # type: ignore[arg-type]
    by_gpu = {int(key) - 1: row for key, row in parts(usage.ranking(engine, "gpu", scope())).items()}  # type: ignore[call-overload]
    same(by_gpu, due(lambda _, gpu, __: gpu))  # type: ignore[arg-type]


def test_the_busiest_is_first_and_the_gpus_own_rows_are_last(engine: sa.Engine) -> None:
    frame = usage.ranking(engine, "user", scope())
    busy = frame.loc[frame["kind"] == "part", "busy_s"]
    assert busy.is_monotonic_decreasing
    assert frame["kind"].tolist()[-2:] == ["unattributed", "idle"]
    assert frame["key"].tolist()[-2:] == [GPU_ROWS["unattributed"], GPU_ROWS["idle"]]
    assert frame["estimated"].fillna(0).sum() == 0


WINDOWS = [(first, last) for first in range(HOURS) for last in (first, first + 1, HOURS - 1) if last < HOURS]


def test_over_any_window_the_parts_add_up_to_the_gpus(engine: sa.Engine) -> None:
    for first, last in dict.fromkeys(WINDOWS):
        hours = range(first, last + 1)
        seconds = sum(HOUR * utilization(hour, gpu) / 100 for hour in hours for gpu in range(3))
        for by in ("user", "model", "gpu"):
            frame = usage.ranking(engine, by, scope(first, last))  # type: ignore[arg-type]
            assert frame["energy_j"].sum() == pytest.approx(whole_j(hours), rel=0.001), (first, last, by)
            assert frame["busy_s"].sum() == pytest.approx(seconds, rel=0.001), (first, last, by)


def test_of_a_single_gpu_the_parts_add_up_too(engine: sa.Engine) -> None:
    for gpu in range(3):
        frame = usage.ranking(engine, "user", scope(gpu_ids=[gpu + 1]))
        assert frame["energy_j"].sum() == pytest.approx(whole_j(range(HOURS), (gpu,)), rel=0.001)


def test_use_by_no_known_process_is_a_row_of_its_own(engine: sa.Engine) -> None:
    frame = usage.ranking(engine, "user", scope(0, 0)).set_index("kind")
    assert frame.loc["unattributed", "busy_s"] == pytest.approx(HOUR * 0.4, rel=0.001)
    assert frame.loc["unattributed", "energy_j"] == pytest.approx((HOUR - STEP) * watts(0, 1) * 0.4, rel=0.001)
    assert "unattributed" not in set(usage.ranking(engine, "user", scope(1))["kind"])


@pytest.mark.parametrize(
    ("filters", "pids"),
    [
        ({"users": ["ada"]}, {7, 9}),
        ({"users": ["grace", "root"]}, {8, 11}),
        ({"programs_with": {"workload": ["vLLM", "Training"]}}, {7, 8}),
        ({"programs_with": {"workload": ["vLLM"], "model": ["vit"]}}, set()),
        ({"users": ["ada"], "programs_with": {"workload": ["Jupyter"]}}, {9}),
        ({"users": ["nobody"]}, set()),
    ],
)
def test_with_a_filter_there_are_no_own_rows_of_the_gpus(
    engine: sa.Engine, filters: dict[str, Any], pids: set[int]
) -> None:
    names = ids(engine)
    frame = usage.ranking(engine, "process", scope(**filters))
    assert {names[key] for key in frame["key"]} == pids
    assert set(frame["kind"]) <= {"part"}


def test_a_filter_of_gpus_leaves_in_their_rows_and_an_empty_one_all(engine: sa.Engine) -> None:
    names = ids(engine)
    frame = usage.ranking(engine, "process", scope(gpu_ids=[2]))
    assert {names[key] for key in frame.loc[frame["kind"] == "part", "key"]} == {8, 9, 10}
    same(
        {names[key]: row for key, row in parts(usage.ranking(engine, "process", scope(users=[]))).items()},  # type: ignore[index]
        due(lambda _, __, pid: pid),  # type: ignore[arg-type]
    )


def test_without_use_by_process_the_row_is_an_estimate(database_url: str) -> None:
    writer = Writer(database.open_for_writing(database_url), "here", "nvml", 4)
    for step in range(20):
        reading = GpuReading("GPU-0", {"utilization": 50.0, "power": 100.0})
        rows = (ProcessReading("GPU-0", 7, "C", 3000), ProcessReading("GPU-0", 9, "C", 1000))
        writer.write(Snapshot(DAWN + 4 * (step + 1), HOST, GPUS[:1], (reading,), rows), PEOPLE)
    frame = usage.ranking(database.open_for_reading(database_url), "process", scope())
    assert frame["busy_s"].tolist()[:2] == [30.0, 10.0]
    assert frame["estimated"].tolist()[:2] == [1.0, 1.0]


def test_time_without_a_recorder_is_a_row_of_its_own(database_url: str) -> None:
    engine = database.open_for_writing(database_url)
    for start, counter in ((0, 0.0), (1800, 90_000.0)):
        writer = Writer(engine, "here", "nvml", 4)
        for step in range(10):
            values = {"utilization": 0.0, "power": 50.0, "energy": counter + 200.0 * step}
            reading = GpuReading("GPU-0", values)
            writer.write(Snapshot(DAWN + start + 4 * step, HOST, GPUS[:1], (reading,)), {})
    frame = usage.ranking(database.open_for_reading(database_url), "user", scope()).set_index("kind")
    assert frame.loc["unrecorded", "energy_j"] == pytest.approx(90_000 - 9 * 200 - 200, abs=1)
    assert frame["energy_j"].sum() == pytest.approx(90_000 + 9 * 200, rel=0.001)


def test_what_many_processes_have_used_just_now_adds_up_too(database_url: str) -> None:
    """The ledger is brought up to date in turn: the newest ticks of some processes are not in it yet."""
    engine = database.open_for_writing(database_url)
    writer = Writer(engine, "here", "nvml", 4)
    pids = range(1000, 1100)
    identities = who(*pids)
    for step in range(15):
        rows = tuple(ProcessReading("GPU-0", pid, "C", 100, 1, None, None, None) for pid in pids)
        reading = GpuReading("GPU-0", {"utilization": 100.0, "power": 300.0})
        writer.write(Snapshot(DAWN + 4 * (step + 1), HOST, GPUS[:1], (reading,), rows), identities)
    frame = usage.ranking(database.open_for_reading(database_url), "user", scope())
    assert frame["busy_s"].sum() == pytest.approx(60, rel=0.01)
    assert frame["energy_j"].sum() == pytest.approx(18_000, rel=0.01)


# ---- Over time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["user", "model", "gpu", "process"])
def test_half_hour_by_half_hour_it_is_the_same(engine: sa.Engine, by: Dimension) -> None:
    frame = usage.trend(engine, by, scope())
    assert frame["timestamp_epoch"].is_monotonic_increasing
    assert sorted(set(frame["timestamp_epoch"])) == half_hours(0, HOURS)
    assert not frame.duplicated(["timestamp_epoch", "key"]).any()
    whole = parts(usage.ranking(engine, by, scope()))
    for key, rows in frame.groupby("key", dropna=False):
        row = whole[None if pd.isna(key) else key]
        for name in usage.SUMS:
            assert rows[name].sum() == pytest.approx(row[name]), (key, name)


def test_a_half_hour_has_what_was_used_in_it(engine: sa.Engine) -> None:
    frame = usage.trend(engine, "user", scope(users=["grace"]))
    assert frame["timestamp_epoch"].tolist() == half_hours(1, 4)
    assert frame["busy_s"].tolist() == pytest.approx([HALF * 0.8] * 6)


def test_the_processes_that_are_not_asked_for_are_one(engine: sa.Engine) -> None:
    """A chart of the largest few reads no more than those; what the others used is still part of the whole."""
    chosen = [key for key, pid in ids(engine).items() if pid in (7, 8)]
    frame = usage.trend(engine, "process", scope(), chosen)
    assert set(frame["key"]) == {*chosen, usage.ALL_OTHERS}
    every = usage.trend(engine, "process", scope())
    for name in usage.SUMS:
        assert frame[name].sum() == pytest.approx(every[name].sum()), name
    few = frame[frame["key"] != usage.ALL_OTHERS]
    assert few["busy_s"].sum() == pytest.approx(every[every["key"].isin(chosen)]["busy_s"].sum())


@dataclass
class Days:
    """Three local days of one GPU: it takes 100, 200 and 300 W, and Ada has it from 9 to 17 o'clock."""

    engine: sa.Engine
    zone: ZoneInfo
    midnights: list[int]

    @property
    def lengths(self) -> list[int]:
        return [after - before for before, after in pairwise(self.midnights)]

    def scope(self, first: int = 0, end: int = 3) -> Scope:
        return Scope(self.midnights[first], self.midnights[end])


def three_days(url: str, zone: ZoneInfo) -> Days:
    # On Lord Howe Island the clock is set back by half an hour in the second night.
    midnights = [int(datetime(2026, 4, day, tzinfo=zone).timestamp()) for day in (4, 5, 6, 7)]
    ticks = []
    for begin in range(midnights[0], midnights[-1], 60):
        local = datetime.fromtimestamp(begin, zone)
        busy = 9 <= local.hour < 17
        rows = (ProcessReading("GPU-0", 7, "C", 100, 100, None, None, None),) if busy else ()
        values = {"utilization": 100.0 if busy else 0.0, "power": 100.0 * (local.day - 3)}
        reading = GpuReading("GPU-0", values)
        ticks.append((Snapshot(begin + 60, HOST, GPUS[:1], (reading,), rows), {7: PEOPLE[7]} if busy else {}))
    writer = Writer(database.open_for_writing(url), "here", "nvml", 60)
    for first in range(0, len(ticks), 180):
        writer.write_all(ticks[first : first + 180])
    writer.settle()
    return Days(database.open_for_reading(url), zone, midnights)


@pytest.mark.parametrize(("name", "hours"), [("Asia/Kolkata", 72), ("Australia/Lord_Howe", 72.5)])
def test_where_the_hour_begins_at_half_past_a_day_has_its_own_energy(
    database_url: str, name: str, hours: float
) -> None:
    days = three_days(database_url, ZoneInfo(name))
    assert sum(days.lengths) == hours * HOUR
    used, whole = usage.trend(days.engine, "user", days.scope()), usage.gpu_hours(days.engine, days.scope())
    free = costs.Prices(None, None, "EUR")
    drawn = costs.by_step(used, whole, ["ada"], {"ada": "ada"}, "Energy", free, days.zone, costs.DAY_S)
    assert drawn["timestamp_epoch"].tolist() == days.midnights[:3]
    expected = [0.1 * number * length / HOUR for number, length in enumerate(days.lengths, 1)]
    assert (drawn["ada"] + drawn[GPU_ROWS["idle"]]).tolist() == pytest.approx(expected)
    assert drawn["ada"].tolist() == pytest.approx([0.8, 1.6, 2.4])
    week = costs.by_week(used, whole, days.zone)
    assert len(week) == 3 * 24
    assert week["share"].tolist() == pytest.approx([100.0 * (9 <= hour < 17) for hour in week["hour"]])


def test_days_one_by_one_are_all_of_them_at_once(database_url: str) -> None:
    days = three_days(database_url, ZoneInfo("Asia/Kolkata"))
    numbers = [*usage.TOTALS, "free_s"]
    one_by_one = [usage.gpu_totals(days.engine, days.scope(day, day + 1))[numbers].iloc[0] for day in range(3)]
    at_once = usage.gpu_totals(days.engine, days.scope())[numbers].iloc[0]
    assert sum(one_by_one).to_dict() == pytest.approx(at_once.to_dict())  # type: ignore[union-attr]
    assert [each["seconds"] for each in one_by_one] == [24 * HOUR] * 3
    assert [each["energy_j"] for each in one_by_one] == pytest.approx(
        [24 * HOUR * watt for watt in (100, 200, 300)]
    )
    parts = [usage.ranking(days.engine, "user", days.scope(day, day + 1)) for day in range(3)]
    whole = usage.ranking(days.engine, "user", days.scope())
    for name in ("busy_s", "seconds", "energy_j"):
        assert sum(frame[name].sum() for frame in parts) == pytest.approx(whole[name].sum()), name


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        pytest.param(HOUR + 200, {HALF: 1000, HOUR: 200}, id="it straddles the hour"),
        pytest.param(HOUR, {HALF: 1200}, id="it is on the hour"),
        pytest.param(HOUR + 600, {HALF: 600, HOUR: 600}, id="it begins on the hour"),
    ],
)
def test_a_long_tick_is_in_the_half_hours_that_it_covers(
    database_url: str, last: int, expected: dict[int, int]
) -> None:
    writer = Writer(database.open_for_writing(database_url), "here", "nvml", 600)
    for moment in (last - 600, last):
        reading = GpuReading("GPU-0", {"utilization": 50.0, "power": 100.0})
        rows = (ProcessReading("GPU-0", 7, "C", 100, 50, None, None, None),)
        writer.write(Snapshot(DAWN + moment, HOST, GPUS[:1], (reading,), rows), PEOPLE)
    writer.settle()
    engine = database.open_for_reading(database_url)
    for frame in (usage.gpu_hours(engine, scope()), usage.trend(engine, "user", scope())):
        assert dict(zip(frame["timestamp_epoch"] - DAWN, frame["seconds"], strict=True)) == expected
        assert frame["busy_s"].tolist() == pytest.approx([seconds / 2 for seconds in expected.values()])
    energy = usage.gpu_hours(engine, scope())["energy_j"]
    assert energy.tolist() == pytest.approx([100 * seconds for seconds in expected.values()])


# ---- The GPUs themselves -----------------------------------------------------------------------------


def test_a_gpus_time_is_busy_held_or_free(engine: sa.Engine) -> None:
    frame = usage.gpu_totals(engine, scope())
    assert frame["gpu_index"].tolist() == [0, 1, 2]
    assert frame["host"].tolist() == ["here"] * 3
    assert frame["seconds"].tolist() == [HOURS * HOUR] * 3
    busy = [sum(HOUR * utilization(hour, gpu) / 100 for hour in range(HOURS)) for gpu in range(3)]
    assert frame["busy_s"].tolist() == pytest.approx(busy, rel=0.001)
    # A desktop leaves its GPU free; a process that computes holds it.
    held = [HOURS * HOUR - busy[0], HOURS * HOUR - busy[1], 0]
    assert frame["held_s"].tolist() == pytest.approx(held, rel=0.001, abs=1)
    assert (frame["busy_s"] + frame["held_s"] + frame["free_s"]).tolist() == pytest.approx([HOURS * HOUR] * 3)
    assert frame["energy_j"].sum() == pytest.approx(whole_j(range(HOURS)), rel=0.001)


def test_time_of_unknown_utilization_is_neither_free_nor_idle(database_url: str) -> None:
    engine = database.open_for_writing(database_url)
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO hosts (id, name, source, interval_s, first_seen, last_seen) "
                f"VALUES (1, 'one', 'nvml', 4, {DAWN}, {DAWN})"
            )
        )
        connection.execute(
            sa.text(
                "INSERT INTO gpus (id, host_id, uuid, gpu_index, state, first_seen, last_seen) "
                f"VALUES (1, 1, 'GPU-1', 0, 'ok', {DAWN}, {DAWN})"
            )
        )
        connection.execute(
            sa.insert(gpu_usage).values(
                timestamp_epoch=DAWN,
                gpu_id=1,
                seconds=3600,
                busy_s=600,
                held_s=300,
                unattributed_s=600,
                energy_j=0,
                idle_j=0,
                unattributed_j=0,
                unrecorded_j=0,
                unknown_s=2400,
            )
        )
    [totals] = usage.gpu_totals(engine, scope()).to_dict("records")
    assert (totals["unknown_s"], totals["free_s"]) == (2400, 300)
    rows = usage.ranking(engine, "user", scope()).set_index("kind")
    assert rows.loc["unknown", "key"] == GPU_ROWS["unknown"]
    assert rows.loc["unknown", "seconds"] == 2400
    assert rows.loc["unknown", ["busy_s", "energy_j"]].tolist() == [0, 0]


def test_gpus_are_in_the_order_of_hosts_and_indices(engine: sa.Engine, database_url: str) -> None:
    other = Writer(database.open_for_writing(database_url), "a-host", "nvml", STEP)
    other.write(Snapshot(DAWN + STEP, HOST, GPUS[:1], (GpuReading("GPU-0", {"utilization": 0.0}),)), {})
    frame = usage.gpu_totals(engine, scope())
    assert list(zip(frame["host"], frame["gpu_index"], strict=True)) == [
        ("a-host", 0),
        ("here", 0),
        ("here", 1),
        ("here", 2),
    ]
    assert usage.gpu_totals(engine, scope(gpu_ids=[2]))["gpu_index"].tolist() == [1]


def test_all_gpus_together_by_the_half_hour(engine: sa.Engine) -> None:
    frame = usage.gpu_hours(engine, scope(1, 3, gpu_ids=[1, 2]))
    assert frame["timestamp_epoch"].tolist() == half_hours(1, 4)
    assert frame["seconds"].tolist() == [2 * HALF] * 6
    expected = [sum(HALF * utilization(hour, gpu) / 100 for gpu in (0, 1)) for hour in (1, 1, 2, 2, 3, 3)]
    assert frame["busy_s"].tolist() == pytest.approx(expected, rel=0.001)


# ---- Memory that is held for nothing -----------------------------------------------------------------


def test_an_idle_holder_is_listed_with_what_it_wastes(engine: sa.Engine) -> None:
    [row] = usage.idle_holders(engine, scope(), 600).to_dict("records")
    assert (row["pid"], row["username"], row["name"], row["workload"]) == (9, "ada", "ipykernel", "Jupyter")
    assert (row["gpu_index"], row["memory"], row["running"]) == (1, 6000, True)
    assert row["idle_since"] == DAWN + STEP, "when it was first seen"
    assert row["idle_s"] == pytest.approx(HOURS * HOUR, abs=STEP)
    assert row["wasted_mib_s"] == pytest.approx(6000 * row["idle_s"])


def test_within_a_part_of_the_time_only_that_part_is_wasted(engine: sa.Engine) -> None:
    [row] = usage.idle_holders(engine, scope(4), 600).to_dict("records")
    assert row["idle_s"] == pytest.approx(2 * HOUR, abs=STEP)
    assert row["idle_since"] == DAWN + STEP, "since when, whatever the range"
    assert usage.idle_holders(engine, scope(), 7 * HOUR).empty
    assert usage.idle_holders(engine, scope(users=["grace"]), 600).empty
    assert usage.idle_holders(engine, scope(gpu_ids=[1]), 600).empty
    assert len(usage.idle_holders(engine, scope(programs_with={"workload": ["Jupyter"]}), 600)) == 1


def idle_story(url: str, *loads: tuple[int, dict[int, int]]) -> sa.Engine:
    """So many seconds of each load, PID -> percent of SMs, a tick every 4 seconds, beside an idle desktop."""
    writer = Writer(database.open_for_writing(url), "here", "nvml", 4, idle_after_s=600)
    now = DAWN
    for seconds, load in loads:
        for now in range(now, now + seconds, 4):  # noqa: B020 - the clock goes on
            rows = tuple(ProcessReading("GPU-0", pid, "C", 1000, sm, None, None, None) for pid, sm in load.items())
            rows += (ProcessReading("GPU-0", 11, "G", 300, 0, None, None, None),)
            reading = GpuReading("GPU-0", {"utilization": float(sum(load.values())), "power": 100.0})
            writer.write(Snapshot(now, HOST, GPUS[:1], (reading,), rows), PEOPLE)
        now += 4
    writer.settle()
    return database.open_for_reading(url)


def test_an_idle_holder_that_works_again_or_has_ended_is_still_listed(database_url: str) -> None:
    engine = idle_story(database_url, (40, {7: 50, 9: 50}), (1200, {7: 0, 9: 0}), (40, {7: 50}))
    frame = usage.idle_holders(engine, scope(), 600).set_index("pid")
    assert frame["running"].to_dict() == {7: True, 9: False}
    assert frame["idle_since"].isna().all()
    assert frame["idle_s"].tolist() == pytest.approx([1200, 1200], abs=8)
    assert frame.loc[9, "memory"] == pytest.approx(1000), "of one that has ended, its average"


def test_a_new_idle_holder_is_listed_by_a_shorter_time(database_url: str) -> None:
    engine = idle_story(database_url, (40, {7: 50}), (120, {7: 0}))
    assert usage.idle_holders(engine, scope(), 600).empty
    [row] = usage.idle_holders(engine, scope(), 60).to_dict("records")
    assert row["idle_s"] == pytest.approx(120, abs=4)


# ---- Models ------------------------------------------------------------------------------------------


def test_which_model_was_loaded_when_and_how_much_memory_it_took(engine: sa.Engine) -> None:
    frame = model_sessions.loaded(engine, scope())
    assert frame["model"].tolist() == ["b:70b", "a:7b"], "the newest first; a training run serves none"
    assert frame["running"].tolist() == [True, False]
    assert frame["first_seen"].tolist() == [DAWN + SWAP * HOUR + STEP, DAWN + STEP]
    assert frame["last_seen"].tolist() == [DAWN + HOURS * HOUR, DAWN + SWAP * HOUR]
    assert frame["lifetime_s"].tolist() == [(HOURS - SWAP) * HOUR - STEP, SWAP * HOUR - STEP]
    assert frame["max_memory"].tolist() == [8000, 8000]
    assert frame["avg_memory"].tolist() == pytest.approx([8000, 8000])
    assert frame["pid"].tolist() == [7, 7]
    assert frame["gpu_index"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("filters", "models"),
    [
        ({"first": 0, "last": 1}, ["a:7b"]),
        ({"first": 3}, ["b:70b"]),
        ({"programs_with": {"model": ["a:7b"]}}, ["a:7b"]),
        ({"programs_with": {"workload": ["vLLM"]}}, ["b:70b", "a:7b"]),
        ({"users": ["grace"]}, []),
        ({"gpu_ids": [2]}, []),
    ],
)
def test_sessions_are_those_of_the_time_and_the_filters(
    engine: sa.Engine, filters: dict[str, Any], models: list[str]
) -> None:
    assert model_sessions.loaded(engine, scope(**filters))["model"].tolist() == models


def test_a_range_of_one_moment_has_the_model_that_was_loaded(engine: sa.Engine) -> None:
    at = DAWN + HOUR + 1234
    assert model_sessions.loaded(engine, Scope(at, at))["model"].tolist() == ["a:7b"]
    assert model_sessions.loaded(engine, scope(), limit=1)["model"].tolist() == ["b:70b"]


# ---- Names -------------------------------------------------------------------------------------------


def test_keys_have_the_names_that_people_use(
    engine: sa.Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of more keys than a query may name there are pieces.
    monkeypatch.setattr(usage, "PIECE", 1)
    by_pid = {pid: key for key, pid in ids(engine).items()}
    found = usage.labels(engine, "process", [by_pid[8], by_pid[10]])
    assert found == {by_pid[8]: "train.py (8)", by_pid[10]: "PID (10)"}
    assert usage.labels(engine, "gpu", [1, 2])[2] == "GPU 1"
    assert usage.labels(engine, "user", ["ada", None]) == {"ada": "ada"}
    other = Writer(database.open_for_writing(database_url), "there", "nvml", STEP)
    other.write(Snapshot(DAWN, HOST, GPUS[:1], (GpuReading("GPU-0", {}),)), {})
    assert usage.labels(engine, "gpu", [1, 4]) == {
        1: "here GPU 0",
        2: "here GPU 1",
        3: "here GPU 2",
        4: "there GPU 0",
    }


def test_scopes_that_mean_the_same_half_hours_are_the_same() -> None:
    assert scope().identity == replace(scope(), start=DAWN + 1799).identity
    assert scope().identity != replace(scope(), users=("ada",)).identity
    assert scope().identity != replace(scope(), programs_with={"model": ("a",)}).identity


def test_an_empty_ledger_has_no_rows_and_is_no_error(database_url: str) -> None:
    database.open_for_writing(database_url).dispose()
    engine = database.open_for_reading(database_url)
    for by in (*CALLED, "process", "gpu"):
        assert usage.ranking(engine, by, scope()).empty  # type: ignore[arg-type]
        assert usage.trend(engine, by, scope()).empty  # type: ignore[arg-type]
    for read in (usage.gpu_totals, usage.gpu_hours, model_sessions.loaded):
        assert read(engine, scope()).empty  # type: ignore[operator]
    assert usage.idle_holders(engine, scope(), 60).empty
    assert usage.labels(engine, "process", []) == {}
