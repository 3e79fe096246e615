"""Answers that no board can mean: each costs itself, and neither the tick nor the other GPUs."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fake_nvml
import pynvml
import pytest
import sqlalchemy as sa
from fake_nvml import GIB, FakeNvml

from gpumon_core.attribution.local import LocalAttribution
from gpumon_core.metrics import GPU_METRICS, PROCESS_METRICS, TICK_METRICS, Aggregate
from gpumon_core.recording.collector import Observer
from gpumon_core.store import database, schema
from gpumon_core.store.queries import current
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry import nvml, plan
from gpumon_core.telemetry.limits import PID_LIMIT, is_pid
from gpumon_core.telemetry.nvml import NvmlSource
from gpumon_core.telemetry.records import Snapshot

NOT_PIDS = (0, PID_LIMIT + 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)


@pytest.fixture
def driver(fake: FakeNvml) -> Iterator[FakeNvml]:
    """Two equal GPUs, and pynvml pointed at them."""
    for uuid in ("GPU-first", "GPU-second"):
        fake.add_gpu(uuid=uuid, temperature=61, gpu_utilization=87, memory_used=GIB)
    with fake_nvml.loaded(fake):
        yield fake


@pytest.fixture
def observer(driver: FakeNvml) -> Iterator[Observer]:
    found = Observer(NvmlSource("here"), LocalAttribution(trusted=True))
    yield found
    found.close()


def read() -> Snapshot:
    """What a source that begins now says first."""
    source = NvmlSource("here")
    try:
        return source.read()
    finally:
        source.close()


def values(snapshot: Snapshot, uuid: str = "GPU-first") -> dict[str, float | None]:
    (found,) = (reading.values for reading in snapshot.readings if reading.uuid == uuid)
    return dict(found)


# ---- Numbers -------------------------------------------------------------------------------------


def test_every_range_fits_its_columns() -> None:
    for metric in (*GPU_METRICS, *PROCESS_METRICS):
        lowest, highest = metric.range
        assert lowest < highest < 2**53 + 1
        if metric.column == "integer" and metric.stored == "tick":
            assert highest < 2**31
    for metric in TICK_METRICS:
        if metric.aggregate is not Aggregate.COUNTER:
            assert metric.range[1] * schema.scale(metric) < 2**31, f"{metric.key} in a rollup"


@pytest.mark.parametrize("pid", NOT_PIDS)
def test_a_pid_that_cannot_be_costs_itself(
    driver: FakeNvml, observer: Observer, database_url: str, pid: int
) -> None:
    gpu = driver.gpus[0]
    gpu.add_process(os.getpid(), GIB, sm=20)
    gpu.add_process(pid, GIB, sm=30)
    engine = database.open_for_writing(database_url)
    snapshot, who = observer.observe()
    assert Writer(engine, "here", "nvml", 1).write(snapshot, who)
    assert [row["pid"] for row in current.processes(engine)] == [os.getpid()]
    assert who[os.getpid()].name is not None
    engine.dispose()


@pytest.mark.parametrize("pid", [-1, *NOT_PIDS])
def test_nobody_looks_for_a_pid_that_cannot_be(pid: int) -> None:
    attribution = LocalAttribution(trusted=True)
    assert not is_pid(pid)
    assert attribution.identify({pid, os.getpid()}, 0.0)[pid].name is None
    attribution.close()


def test_a_driver_that_names_more_processes_than_there_can_be_is_not_given_the_room(
    driver: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms: list[int] = []
    real = pynvml._nvmlGetFunctionPointer

    def pointer(name: str) -> Any:
        if "RunningProcesses" not in name:
            return real(name)

        def call(_: object, count: Any, __: object) -> int:
            asked = ctypes.cast(count, ctypes.POINTER(ctypes.c_uint))
            rooms.append(asked[0])
            asked[0] = 2**32 - 1
            return int(pynvml.NVML_SUCCESS if len(rooms) % 2 else pynvml.NVML_ERROR_INSUFFICIENT_SIZE)

        return call

    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer", pointer)
    snapshot = read()
    assert snapshot.processes == ()
    assert values(snapshot)["temperature"] == 61
    assert max(rooms) < 1000


@pytest.mark.parametrize(
    ("attribute", "number", "key"),
    [
        ("temperature", 2**31 - 1, "temperature"),
        ("power_mw", 2**32 - 2, "power"),
        ("fan", 65535, "fan_speed"),
        ("sm_clock", 2**32 - 2, "sm_clock"),
        ("memory_used", 2**64 // 2 - 2, "memory"),
        ("pcie_tx_kib_s", 2**32 - 2, "pcie_tx"),
        ("pcie_generation", 2**32 - 2, "pcie_generation"),
        ("bar1_used", 2**63 - 1, "bar1_used"),
        ("memory_temperature", 2**32 - 2, "memory_temperature"),
    ],
)
def test_a_number_beyond_its_range_is_not_known(driver: FakeNvml, attribute: str, number: int, key: str) -> None:
    setattr(driver.gpus[0], attribute, number)
    snapshot = read()
    assert values(snapshot).get(key) is None
    unknown = {key: None, f"{key}_max": None}
    assert {**values(snapshot), **unknown} == {**values(snapshot, "GPU-second"), **unknown}


@pytest.mark.parametrize(("number", "total"), [(0, None), (2**63 - 1, None), (24 * GIB, 24 * 1024)])
def test_a_total_that_no_board_has_is_not_known(driver: FakeNvml, number: int, total: int | None) -> None:
    driver.gpus[0].memory_total = number
    driver.gpus[0].memory_reserved = 0
    assert read().gpus[0].memory_total_mib == total


def test_more_memory_than_there_is_is_not_known(driver: FakeNvml) -> None:
    gpu = driver.gpus[0]
    gpu.memory_total, gpu.memory_used = 24 * GIB, 25 * GIB
    gpu.add_process(7, 26 * GIB)
    gpu.add_process(8, 24 * GIB)
    snapshot = read()
    assert values(snapshot)["memory"] is None
    assert {each.pid: each.memory_mib for each in snapshot.processes} == {7: None, 8: 24 * 1024}


@pytest.mark.parametrize("limit", [0, 2**32 - 2])
def test_a_power_limit_that_no_board_has_is_not_known(driver: FakeNvml, limit: int) -> None:
    gpu = driver.gpus[0]
    gpu.power_enforced_limit_mw = limit
    assert read().gpus[0].power_limit_w == 300, "the other way to ask is used"
    gpu.power_limit_mw = limit
    assert read().gpus[0].power_limit_w is None


def test_a_power_that_follows_from_a_counter_that_cannot_be_is_not_known(
    driver: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = [1000.0]
    monkeypatch.setattr(plan, "time", SimpleNamespace(monotonic=lambda: at[0]))
    source = NvmlSource("here")
    source.read()
    at[0] += 4
    driver.gpus[0].energy_mj = 10**15
    driver.gpus[1].energy_mj += 400_000
    snapshot = source.read()
    source.close()
    assert (values(snapshot)["power"] or 0.0) <= 10_000
    assert values(snapshot, "GPU-second")["power"] == 100


@pytest.mark.parametrize("version", [-1, 0, 99, 2**31 - 1])
def test_a_cuda_version_that_is_none_is_not_known(driver: FakeNvml, version: int) -> None:
    driver.cuda_version = version
    assert read().host.cuda_version is None


def test_a_count_that_cannot_be_finds_the_gpus_that_there_are(
    driver: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2**32 - 2)
    monkeypatch.setattr(nvml, "RECOUNT_S", 0.0)
    source = NvmlSource("here")
    for _ in range(2):
        snapshot = source.read()
        assert [gpu.uuid for gpu in snapshot.gpus] == ["GPU-first", "GPU-second"]
        assert not snapshot.nameless
    source.close()


def test_an_answer_that_nobody_thought_of_costs_one_reading(
    driver: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pynvml, "nvmlDeviceGetFanSpeed", lambda _: {}["speed"])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", lambda _: None)
    found = values(read())
    assert found["fan_speed"] is None
    assert found["temperature"] == 61


@pytest.mark.parametrize("stamp", [2**64 - 1, 2**63])
def test_a_sample_from_no_time_costs_itself(driver: FakeNvml, stamp: int) -> None:
    """Believed, it would be the newest for good, and what comes after it nothing new."""
    gpu = driver.gpus[0]
    process = gpu.add_process(7, GIB, sm=40)
    source = NvmlSource("here")
    for second in range(4):
        gpu.add_sample(pynvml.NVML_GPU_UTILIZATION_SAMPLES, 40, (1000 + second) * 1_000_000)
        process.time_us = (1000 + second) * 1_000_000
        if second == 1:
            gpu.add_sample(pynvml.NVML_GPU_UTILIZATION_SAMPLES, 90, stamp)
            process.time_us = stamp
        snapshot = source.read()
        if second == 1:
            # The fake's ring is in order of time from here on.
            gpu._raw.rings[pynvml.NVML_GPU_UTILIZATION_SAMPLES].written -= 1
    assert (values(snapshot)["utilization"], snapshot.readings[0].sampling) == (40, "interval")
    assert snapshot.processes[0].sm_utilization == 40
    source.close()


# ---- Two of one name -----------------------------------------------------------------------------


def test_gpus_that_share_a_uuid_are_distinguished(driver: FakeNvml, database_url: str) -> None:
    driver.gpus[1].uuid = "GPU-first"
    driver.add_gpu(uuid="GPU-first", pci_bus_id=None)
    source = NvmlSource("here")
    engine = database.open_for_writing(database_url)
    writer = Writer(engine, "here", "nvml", 1)
    for _ in range(2):
        snapshot = source.read()
        assert [gpu.uuid for gpu in snapshot.gpus] == ["GPU-first", "PCI-00000000:02:00.0", "PCI-2"]
        assert len(snapshot.readings) == 3
        writer.write(snapshot, {})
    assert [row["state"] for row in current.gpus(engine)] == ["ok"] * 3
    source.close()
    engine.dispose()


def test_mig_instances_that_share_a_uuid_are_distinguished(driver: FakeNvml) -> None:
    for slot in (0, 1):
        driver.gpus[0].add_mig(uuid="MIG-x", slot=slot, gpu_instance_id=7 + slot)
    assert [gpu.uuid for gpu in read().gpus] == [
        *("GPU-first", "MIG-x", "PCI-00000000:01:00.0-MIG-1", "GPU-second"),
    ]


# ---- Texts ---------------------------------------------------------------------------------------

NO_TEXTS = [b"\xff\xfe", b"A\x1b[2Jboard", b"A\nboard", b"A\x7f", "A\u202eboard".encode(), b"\x00", b""]
NO_TEXTS += ["A\u200bboard".encode(), "A\u3164".encode(), b"Z" + "\u0301".encode() * 30]


@pytest.mark.parametrize("text", NO_TEXTS)
def test_a_text_that_is_none_is_not_known(driver: FakeNvml, database_url: str, text: bytes) -> None:
    gpu = driver.gpus[0]
    gpu.name = gpu.uuid = text
    driver.driver_version = driver.nvml_version = text
    snapshot = read()
    first = snapshot.gpus[0]
    assert (first.name, first.uuid) == (None, "PCI-00000000:01:00.0")
    assert (snapshot.host.driver_version, snapshot.host.nvml_version) == (None, None)
    engine = database.open_for_writing(database_url)
    assert Writer(engine, "here", "nvml", 1).write(snapshot, {})
    engine.dispose()


@pytest.mark.parametrize(
    ("reported", "shown"),
    [(b"/opt/a\x1b[2Jb", "a\ufffd[2Jb"), (b"/opt/" + b"x" * 110, "x" * 110), (b"/opt/", None)],
)
def test_the_name_of_a_program_is_text(driver: FakeNvml, reported: bytes, shown: str | None) -> None:
    driver.gpus[0].add_process(77, GIB, name=reported)
    source = NvmlSource("here")
    assert source.process_name(77) == shown
    assert [source.process_name(pid) for pid in NOT_PIDS] == [None] * len(NOT_PIDS)
    source.close()


# ---- What is written -----------------------------------------------------------------------------


def test_no_metric_of_a_mad_driver_reaches_the_database(driver: FakeNvml, database_url: str) -> None:
    gpu = driver.gpus[0]
    for name in ("temperature", "power_mw", "fan", "sm_clock", "memory_clock", "graphics_clock", "video_clock"):
        setattr(gpu, name, 2**31 - 1)
    source = NvmlSource("here")
    snapshot = source.read()
    source.close()
    engine = database.open_for_writing(database_url)
    Writer(engine, "here", "nvml", 1).write(snapshot, {})
    with engine.connect() as connection:
        row = connection.execute(sa.select(schema.gpu_metrics).where(schema.gpu_metrics.c.gpu_id == 1)).one()
    assert row.temperature is row.sm_clock is row.power is row.fan_speed is None
    assert row.utilization == 87
    engine.dispose()
