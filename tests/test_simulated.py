"""The simulation is believable, and the same for everybody who asks."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import pytest

from gpumon_core.attribution.simulated import SimulatedAttribution
from gpumon_core.metrics import GPU_METRICS
from gpumon_core.telemetry.records import Snapshot
from gpumon_core.telemetry.simulated import SimulatedSource

START = 1_795_456_000
WEEK = [START + step for step in range(0, 7 * 86400, 600)]


@pytest.fixture(scope="module")
def week() -> list[Snapshot]:
    source = SimulatedSource(gpus=8)
    return [source.snapshot_at(moment) for moment in WEEK]


def test_the_same_seed_and_time_give_the_same_snapshot_in_any_order() -> None:
    moments = WEEK[:200]
    one, two = SimulatedSource(gpus=8), SimulatedSource(gpus=8)
    forth = [one.snapshot_at(moment) for moment in moments]
    back = [two.snapshot_at(moment) for moment in reversed(moments)]
    assert forth == back[::-1]
    assert SimulatedSource(gpus=8, seed=8).snapshot_at(START) != forth[0]


def test_readings_stay_within_what_boards_can_do(week: list[Snapshot]) -> None:
    for snapshot in week:
        gpus = {gpu.uuid: gpu for gpu in snapshot.gpus}
        for reading in snapshot.readings:
            values, gpu = reading.values, gpus[reading.uuid]
            assert set(values) == {metric.key for metric in GPU_METRICS}
            assert 0 <= (values["memory"] or 0) <= (gpu.memory_total_mib or 0)
            if gpu.parent_uuid is not None:
                assert values["temperature"] is values["utilization"] is values["power"] is None
                continue
            assert 25 <= (values["temperature"] or 0) <= 95
            assert 0 <= (values["utilization"] or 0) <= 100
            assert 0 < (values["power"] or 0) <= 1.03 * (gpu.power_limit_w or 0)
            assert values["fan_speed"] is None or 0 <= values["fan_speed"] <= 100


def test_the_processes_of_a_gpu_fit_into_its_memory(week: list[Snapshot]) -> None:
    for snapshot in week:
        held: Counter[str] = Counter()
        for process in snapshot.processes:
            held[process.gpu_uuid] += process.memory_mib or 0
        for reading in snapshot.readings:
            assert held[reading.uuid] <= (reading.values["memory"] or 0)


def test_a_week_has_everything_that_people_see(week: list[Snapshot]) -> None:
    utilizations = [reading.values["utilization"] for snapshot in week for reading in snapshot.readings]
    assert any(value == 0 for value in utilizations)
    assert any(value is not None and value > 94 for value in utilizations)
    hottest = max(reading.values["temperature"] or 0 for snapshot in week for reading in snapshot.readings)
    assert hottest >= 80
    pids = [{process.pid for process in snapshot.processes} for snapshot in week]
    ended = sum(len(before - after) for before, after in itertools.pairwise(pids))
    assert ended > 100, "jobs come and go"
    spans: defaultdict[tuple[float, int], int] = defaultdict(int)
    for snapshot in week:
        for process in snapshot.processes:
            spans[snapshot.timestamp, process.pid] += 1
    assert 2 in spans.values(), "one process on two GPUs"
    assert {process.kind for snapshot in week for process in snapshot.processes} == {"C", "G", "C+G"}
    held_idle = any(
        reading.values["utilization"] == 0 and (reading.values["memory"] or 0) > 4000
        for snapshot in week
        for reading in snapshot.readings
    )
    assert held_idle


def test_a_pid_belongs_to_one_program_at_a_time_and_can_be_reused() -> None:
    source = SimulatedSource(gpus=8, processes=64)
    attribution = SimulatedAttribution(source)
    keys: defaultdict[int, set[str | None]] = defaultdict(set)
    for moment in WEEK:
        runs = source.runs_at(moment)
        assert len({run.pid for run in runs}) == len(runs)
        for pid, identity in attribution.identify({run.pid for run in runs}, moment).items():
            assert identity.name
            assert identity.user
            assert identity.start_time is not None
            assert identity.start_time <= moment
            keys[pid].add(identity.start_key)
    assert any(len(found) > 1 for found in keys.values())


def test_a_program_keeps_its_identity_for_as_long_as_it_runs() -> None:
    source = SimulatedSource(gpus=4)
    attribution = SimulatedAttribution(source)
    [run] = [run for run in source.runs_at(START) if run.program.name in {"vllm", "ollama"}]
    ages = {attribution.identify({run.pid}, START + step)[run.pid] for step in range(0, 600, 60)}
    assert len(ages) == 1


@pytest.mark.parametrize(("gpus", "instances"), [(1, 0), (4, 0), (5, 2), (64, 2)])
def test_any_number_of_gpus_with_one_split_where_there_are_many(gpus: int, instances: int) -> None:
    snapshot = SimulatedSource(gpus=gpus).snapshot_at(START)
    parents = [gpu for gpu in snapshot.gpus if gpu.parent_uuid is None]
    assert [gpu.index for gpu in parents] == list(range(gpus))
    assert len(snapshot.gpus) - gpus == instances
    assert len({gpu.uuid for gpu in snapshot.gpus}) == len(snapshot.gpus)


def test_about_as_many_processes_as_asked_for() -> None:
    source = SimulatedSource(gpus=8, processes=64)
    counts = [len({process.pid for process in source.snapshot_at(moment).processes}) for moment in WEEK[::50]]
    assert min(counts) >= 52
    assert max(counts) <= 72
