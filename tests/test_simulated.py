"""The simulated GPUs have one history, the same for every reader, and a plausible one."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import pytest

from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.metrics import GPU_METRICS_BY_KEY, TICK_COLUMNS, Level
from gpumon_core.recording.collector import SimulatedObserver
from gpumon_core.settings import Settings
from gpumon_core.simulation import people
from gpumon_core.simulation.identities import SimulatedAttribution
from gpumon_core.simulation.source import SimulatedSource
from gpumon_core.telemetry.records import GpuInfo, ProcessReading, Snapshot, Source

MINUTE, HOUR, DAY = 60, 3600, 86400
MONDAY = 1_788_739_200  # 2026-09-07 00:00 UTC


@lru_cache(maxsize=4)
def week(gpus: int, processes: int | None = None) -> tuple[Snapshot, ...]:
    source = SimulatedSource(gpus, processes=processes)
    return tuple(source.snapshot_at(MONDAY + offset) for offset in range(0, 7 * DAY, 10 * MINUTE))


def series(snapshots: tuple[Snapshot, ...], uuid: str, key: str) -> Iterator[float | None]:
    for snapshot in snapshots:
        yield next(reading.values[key] for reading in snapshot.readings if reading.uuid == uuid)


def of(snapshot: Snapshot, gpu: GpuInfo) -> list[ProcessReading]:
    return [process for process in snapshot.processes if process.gpu_uuid == gpu.uuid]


@pytest.mark.parametrize(("gpus", "processes"), [(1, None), (4, None), (8, 64), (64, 512), (5, 0)])
def test_the_same_seed_and_time_give_the_same_snapshot_in_any_order(gpus: int, processes: int | None) -> None:
    times = [MONDAY + 3 * DAY * number / 40 + 0.25 for number in range(40)]
    forwards = {time: SimulatedSource(gpus, processes=processes).snapshot_at(time) for time in times[::8]}
    source = SimulatedSource(gpus, processes=processes)
    random.Random(1).shuffle(times)
    shuffled = {time: source.snapshot_at(time) for time in times}
    assert all(shuffled[time] == forwards[time] for time in forwards)


def test_another_seed_gives_another_history_on_other_gpus() -> None:
    one, other = (SimulatedSource(seed=seed).snapshot_at(MONDAY + 14 * HOUR) for seed in (1, 2))
    assert not {gpu.uuid for gpu in one.gpus} & {gpu.uuid for gpu in other.gpus}
    assert [r.values for r in one.readings] != [r.values for r in other.readings]


def test_it_reads_the_clock_it_is_given_and_is_a_source() -> None:
    source: Source = SimulatedSource(2, host="lab-7", clock=lambda: MONDAY + 0.5)
    snapshot = source.read()
    assert (snapshot.timestamp, snapshot.host.name, source.name) == (MONDAY + 0.5, "lab-7", "demo")
    assert all(source.process_name(process.pid) for process in snapshot.processes)
    assert source.process_name(1) is None
    source.close()
    source.close()


@pytest.mark.parametrize(("gpus", "processes"), [(0, None), (65, None), (4, -1), (4, 5000)])
def test_numbers_out_of_range_are_refused(gpus: int, processes: int | None) -> None:
    with pytest.raises(ValueError, match="can be simulated, not"):
        SimulatedSource(gpus, processes=processes)


def test_every_gpu_has_its_own_well_formed_uuid_and_place_on_the_bus() -> None:
    gpus = SimulatedSource(64).snapshot_at(MONDAY).gpus
    form = re.compile(r"(GPU|MIG)-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
    assert all(form.fullmatch(gpu.uuid) for gpu in gpus)
    assert len({gpu.uuid for gpu in gpus}) == len(gpus)
    whole = [gpu for gpu in gpus if gpu.parent_uuid is None]
    assert [gpu.index for gpu in whole] == list(range(64))
    assert len({gpu.pci_bus_id for gpu in whole}) == 64
    assert all(re.fullmatch(r"[0-9A-F]{8}:[0-9A-F]{2}:00\.0", gpu.pci_bus_id or "") for gpu in whole)


def test_the_first_gpus_are_the_same_however_many_follow() -> None:
    assert SimulatedSource(8).snapshot_at(MONDAY).gpus[:4] == SimulatedSource(4).snapshot_at(MONDAY).gpus


@pytest.mark.parametrize("gpus", [1, 4, 8])
def test_every_catalogue_key_is_present_in_every_reading(gpus: int) -> None:
    snapshot = SimulatedSource(gpus).snapshot_at(MONDAY)
    assert [reading.uuid for reading in snapshot.readings] == [gpu.uuid for gpu in snapshot.gpus]
    for reading in snapshot.readings:
        assert list(reading.values)[: len(TICK_COLUMNS)] == list(TICK_COLUMNS)
        assert set(reading.values) <= set(TICK_COLUMNS) | set(GPU_METRICS_BY_KEY)


def test_a_mig_parent_has_no_utilization_and_its_instances_have_memory_only() -> None:
    assert not any(gpu.parent_uuid for gpu in SimulatedSource(4).snapshot_at(MONDAY).gpus)
    snapshots = week(8)
    parent = next(gpu for gpu in snapshots[0].gpus if gpu.index == people.MIG_INDEX and gpu.mig_index is None)
    instances = [gpu for gpu in snapshots[0].gpus if gpu.parent_uuid == parent.uuid]
    assert [gpu.mig_index for gpu in instances] == list(range(len(people.MIG_INSTANCES)))
    assert all(gpu.uuid.startswith("MIG-") and gpu.index == parent.index for gpu in instances)
    for snapshot in snapshots:
        values = {reading.uuid: reading.values for reading in snapshot.readings}
        of_parent = values[parent.uuid]
        missing = {key for key, value in of_parent.items() if value is None}
        assert {
            "utilization",
            "utilization_max",
            "memory_utilization",
            "encoder_utilization",
            "fan_speed",
        } <= missing
        assert {"temperature", "power", "memory", "memory_temperature", "sm_clock"}.isdisjoint(missing)
        assert not of(snapshot, parent)
        for instance in instances:
            assert {key for key, value in values[instance.uuid].items() if value is not None} == {"memory"}
        assert of_parent["memory"] == sum(values[instance.uuid]["memory"] or 0 for instance in instances)


@pytest.mark.parametrize("gpus", [4, 8])
def test_readings_stay_inside_physical_limits_over_a_week(gpus: int) -> None:
    models = {model.name: model for model, _, _ in people.GPUS}
    for snapshot in week(gpus):
        infos = {gpu.uuid: gpu for gpu in snapshot.gpus if gpu.parent_uuid is None}
        for reading in snapshot.readings:
            if (info := infos.get(reading.uuid)) is None:
                continue
            model, values = models[info.name or ""], reading.values
            power, temperature = values["power"] or 0, values["temperature"] or 0
            assert 0.9 * model.power.idle_w < power < 1.13 * model.power.limit_w
            assert 18 <= temperature <= 95
            for key in ("utilization", "memory_utilization", "fan_speed"):
                value = values[key]
                assert value is None or (0 <= value <= 100 and value == int(value))
            assert model.sm_mhz[0] <= (values["sm_clock"] or 0) <= model.sm_mhz[1]
            assert (values["sm_clock"] or 0) % 15 == 0
            assert values["memory_clock"] in model.memory_mhz
            assert temperature == int(temperature)
            assert power == round(power, 3)
            assert (values["fan_speed"] is None) == (model.fan_min is None)


@pytest.mark.parametrize(("gpus", "processes"), [(4, None), (8, None), (8, 64), (4, 400)])
def test_memory_is_the_processes_and_a_little_more_and_never_exceeds_the_gpu(
    gpus: int, processes: int | None
) -> None:
    for snapshot in week(gpus, processes):
        used = {reading.uuid: reading.values["memory"] or 0 for reading in snapshot.readings}
        parents = {gpu.parent_uuid for gpu in snapshot.gpus}
        held: dict[str, int] = defaultdict(int)
        for process in snapshot.processes:
            assert process.memory_mib is not None
            assert process.memory_mib > 0
            held[process.gpu_uuid] += process.memory_mib
        for gpu in snapshot.gpus:
            assert used[gpu.uuid] <= (gpu.memory_total_mib or 0)
            if gpu.uuid not in parents:
                assert 0 < used[gpu.uuid] - held[gpu.uuid] < 50


def test_what_coincides_on_a_gpu_always_fits() -> None:
    pairs = (people.PAIR, *people.ROLES["pair"][1:])
    for habits in (*people.ROLES.values(), pairs):
        assert sum(habit.share[1] for habit in habits) < 0.99


@pytest.mark.parametrize(("gpus", "processes"), [(8, None), (8, 64), (64, 512)])
def test_a_pid_is_one_process_at_a_time_and_has_an_identity(gpus: int, processes: int | None) -> None:
    source = SimulatedSource(gpus, processes=processes)
    attribution = SimulatedAttribution(source)
    for offset in range(0, DAY, 50 * MINUTE):
        snapshot = source.snapshot_at(MONDAY + offset)
        pids = {process.pid for process in snapshot.processes}
        identities = attribution.identify(pids, snapshot.timestamp)
        assert identities.keys() == pids
        assert len({identity.start_key for identity in identities.values()}) == len(pids)
        places = [(process.gpu_uuid, process.pid) for process in snapshot.processes]
        assert len(set(places)) == len(places)
        for identity in identities.values():
            assert 0 < identity.pid < 4_194_304
            assert identity.start_time is not None
            assert identity.start_time <= snapshot.timestamp
            assert identity.name
            assert identity.user


def test_an_identity_stays_the_same_while_its_process_lives() -> None:
    source = SimulatedSource(4)
    attribution = SimulatedAttribution(source)
    by_key: dict[str | None, set[object]] = defaultdict(set)
    for offset in range(0, DAY, 5 * MINUTE):
        snapshot = source.snapshot_at(MONDAY + offset)
        pids = {process.pid for process in snapshot.processes}
        for identity in attribution.identify(pids, snapshot.timestamp).values():
            by_key[identity.start_key].add(identity)
    assert None not in by_key
    assert all(len(identities) == 1 for identities in by_key.values())


def test_an_unused_pid_has_no_identity() -> None:
    source = SimulatedSource()
    attribution = SimulatedAttribution(source)
    assert attribution.identify({1, 2_000_000}, MONDAY) == {
        1: ProcessIdentity(1),
        2_000_000: ProcessIdentity(2_000_000),
    }
    alive: set[int] = set()
    ended = 0
    for offset in range(0, DAY, 5 * MINUTE):
        before, snapshot = alive, source.snapshot_at(MONDAY + offset)
        alive = {process.pid for process in snapshot.processes}
        for pid, identity in attribution.identify(before - alive, snapshot.timestamp).items():
            assert identity == ProcessIdentity(pid)
            ended += 1
    assert ended > 5


def test_a_reused_pid_has_another_start_key() -> None:
    source = SimulatedSource(4, processes=300)
    attribution = SimulatedAttribution(source)
    runs: dict[int, set[tuple[str | None, float | None]]] = defaultdict(set)
    for offset in range(0, 14 * DAY, 4 * HOUR):
        snapshot = source.snapshot_at(MONDAY + offset)
        pids = {process.pid for process in snapshot.processes}
        for pid, identity in attribution.identify(pids, snapshot.timestamp).items():
            runs[pid].add((identity.start_key, identity.start_time))
    reused = [lives for lives in runs.values() if len(lives) > 1]
    assert reused
    for lives in reused:
        assert len({key for key, _ in lives}) == len({start for _, start in lives}) == len(lives)


def test_one_process_spans_two_gpus_and_loads_both() -> None:
    apart: list[float] = []
    for snapshot in week(4):
        where: dict[int, list[str]] = defaultdict(list)
        for process in snapshot.processes:
            where[process.pid].append(process.gpu_uuid)
        utilization = {reading.uuid: reading.values["utilization"] or 0 for reading in snapshot.readings}
        twos = [uuids for uuids in where.values() if len(uuids) == 2]
        apart.extend(abs(utilization[one] - utilization[other]) for one, other in twos)
    assert len(apart) > 50
    assert sum(difference <= 5 for difference in apart) > 0.9 * len(apart)


@pytest.mark.parametrize("day", range(5))
def test_a_mix_of_states_appears_within_a_day(day: int) -> None:
    source = SimulatedSource(4)
    seen: set[str] = set()
    pids: list[set[int]] = []
    for offset in range(0, DAY, 5 * MINUTE):
        snapshot = source.snapshot_at(MONDAY + day * DAY + offset)
        pids.append({process.pid for process in snapshot.processes})
        for gpu, reading in zip(snapshot.gpus, snapshot.readings, strict=True):
            busy = (reading.values["utilization"] or 0) >= 90
            still = reading.values["utilization"] == 0
            held = (reading.values["memory"] or 0) > 0.1 * (gpu.memory_total_mib or 0)
            seen |= {"busy"} if busy else {"held"} if still and held else {"idle"} if still else set()
    assert seen == {"busy", "held", "idle"}
    ended = sum(len(before - after) for before, after in pairwise(pids))
    assert ended > 5
    assert any(before & after for before, after in pairwise(pids))


def test_requests_follow_the_day() -> None:
    server = next(gpu for gpu in week(4)[0].gpus if gpu.name == people.L40S.name)
    hours: dict[int, list[float]] = defaultdict(list)
    for snapshot, value in zip(week(4), series(week(4), server.uuid, "utilization"), strict=True):
        hours[int(snapshot.timestamp) // HOUR % 24].append(value or 0)
    day, night = (sum(sum(hours[hour]) for hour in some) / 4 for some in ((10, 11, 14, 15), (1, 2, 3, 4)))
    assert day > 3 * night


def test_warmth_follows_power_with_a_delay_and_without_jumps() -> None:
    source = SimulatedSource(4)
    gpu = next(gpu for gpu in source.snapshot_at(MONDAY).gpus if gpu.name == people.H100.name)
    powers: list[float] = []
    temperatures: list[float] = []
    for offset in range(0, 2 * DAY, 4):
        values = next(r.values for r in source.snapshot_at(MONDAY + offset).readings if r.uuid == gpu.uuid)
        powers.append(values["power"] or 0)
        temperatures.append(values["temperature"] or 0)
    rises = [i for i in range(30, len(powers) - 100) if powers[i] > 500 and max(powers[i - 30 : i]) < 200]
    assert rises
    for i in rises:
        assert temperatures[i] < temperatures[i + 5] < max(temperatures[i + 5 : i + 100])
    assert max(abs(after - before) for before, after in pairwise(temperatures)) <= 14


def test_nothing_jumps_where_one_piece_of_schedule_meets_the_next() -> None:
    source = SimulatedSource(8)
    for number in range(8):
        for hour in range(1, 48):
            edge = MONDAY + hour * HOUR - 450 * number
            before, after = (source.snapshot_at(edge + step).readings for step in (-0.01, 0))
            for one, other in zip(before, after, strict=True):
                assert abs((one.values["temperature"] or 0) - (other.values["temperature"] or 0)) <= 1


def test_warning_and_critical_levels_are_reached_now_and_then() -> None:
    source = SimulatedSource(8)
    reached: dict[str, set[Level]] = defaultdict(set)
    for offset in range(0, 60 * DAY, 3 * HOUR):
        snapshot = source.snapshot_at(MONDAY + offset)
        for gpu, reading in zip(snapshot.gpus, snapshot.readings, strict=True):
            for key, metric in GPU_METRICS_BY_KEY.items():
                value = reading.values.get(key)
                whole = getattr(gpu, metric.share_of) if metric.share_of else None
                reached[key].add(metric.level(value, whole))
    assert {Level.CALM, Level.WARNING, Level.CRITICAL} <= reached["temperature"]
    assert {Level.CALM, Level.WARNING, Level.CRITICAL} <= reached["memory"]
    assert {Level.CALM, Level.WARNING} <= reached["fan_speed"]
    assert {Level.CALM, Level.WARNING} <= reached["power"]


@pytest.mark.parametrize(("gpus", "wanted"), [(8, 0), (8, 64), (4, 100), (64, 512), (1, 300)])
def test_about_as_many_processes_exist_as_were_asked_for(gpus: int, wanted: int) -> None:
    source = SimulatedSource(gpus, processes=wanted)
    counts = [len(source.snapshot_at(MONDAY + offset).processes) for offset in range(0, DAY, HOUR)]
    assert 0.85 * wanted <= sum(counts) / len(counts) <= 1.15 * wanted


def test_memory_of_a_training_run_rises_and_then_stays() -> None:
    source = SimulatedSource(4)
    attribution = SimulatedAttribution(source)
    memory: dict[tuple[str, int], list[int]] = defaultdict(list)
    for offset in range(0, DAY, 30):
        snapshot = source.snapshot_at(MONDAY + offset)
        names = attribution.identify({process.pid for process in snapshot.processes}, snapshot.timestamp)
        for process in snapshot.processes:
            if names[process.pid].name in {"train.py", "train_ddp.py", "pretrain.py", "finetune.py"}:
                memory[process.gpu_uuid, process.pid].append(process.memory_mib or 0)
    assert memory
    for values in memory.values():
        assert values == sorted(values)
        assert len(set(values[20:])) == 1


# ---- What each process does ----------------------------------------------------------------------


def test_processes_share_what_their_gpu_does() -> None:
    source = SimulatedSource(8, processes=64)
    busiest = 0
    for offset in range(0, 2 * DAY, 601):
        snapshot = source.snapshot_at(MONDAY + offset)
        for gpu, reading in zip(snapshot.gpus, snapshot.readings, strict=True):
            shares = [process.sm_utilization for process in of(snapshot, gpu)]
            utilization = reading.values["utilization"]
            if utilization is None:
                assert all(share is None for share in shares), "NVML does not tell the processes of MIG apart"
                continue
            assert all(share is not None and 0 <= share <= 100 for share in shares)
            whole = sum(share or 0 for share in shares)
            assert whole <= 100
            # Each share is rounded down, and the GPU's own number wobbles.
            assert utilization - len(shares) - 4 <= whole <= utilization + 4
            busiest = max(busiest, *(share or 0 for share in shares), 0)
    assert busiest > 80


def test_what_does_nothing_new_is_the_same_record_again() -> None:
    source = SimulatedSource(8, processes=64)
    before = {(p.gpu_uuid, p.pid): p for p in source.snapshot_at(MONDAY).processes}
    new = ticks = 0
    for step in range(1, 200):
        now = {(p.gpu_uuid, p.pid): p for p in source.snapshot_at(MONDAY + 4 * step).processes}
        new += sum(before.get(key) is not process for key, process in now.items())
        ticks += len(now)
        before = now
    assert new < ticks / 10


def test_an_encoding_job_keeps_the_encoders_busy_and_others_do_not() -> None:
    source = SimulatedSource(8)
    seen: set[bool] = set()
    for offset in range(0, 7 * DAY, 1800):
        snapshot = source.snapshot_at(MONDAY + offset)
        for gpu, reading in zip(snapshot.gpus, snapshot.readings, strict=True):
            mine = [process.encoder_utilization or 0 for process in of(snapshot, gpu)]
            if reading.values["encoder_utilization"] is not None:
                assert reading.values["encoder_utilization"] == min(100, sum(mine))
                seen.add(sum(mine) > 0)
    assert seen == {True, False}


def test_a_moment_inside_a_tick_is_never_below_its_mean() -> None:
    for offset in range(0, DAY, 900):
        for reading in SimulatedSource(8).snapshot_at(MONDAY + offset).readings:
            for key in ("utilization", "memory_utilization", "power"):
                mean, highest = reading.values[key], reading.values[f"{key}_max"]
                assert (mean is None) == (highest is None)
                assert mean is None or highest is None or mean <= highest


def test_the_settings_say_how_many_processes_there_are() -> None:
    def at_once(**settings: int) -> int:
        observer = SimulatedObserver(Settings(source="demo", demo_gpus=8, **settings))
        [(snapshot, _)] = observer.past(MONDAY + 14 * HOUR, MONDAY + 14 * HOUR + 4, 4)
        return len({process.pid for process in snapshot.processes})

    assert at_once(demo_processes=0) == 0
    assert 48 <= at_once(demo_processes=64) <= 80
    assert 0 < at_once() < 48
