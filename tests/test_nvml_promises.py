"""What the NVML source promises, on the real pynvml over the fake library."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest
from fake_nvml import FakeNvml, loaded

from gpumon_core.metrics import GPU_METRICS
from gpumon_core.telemetry import gate, nvml
from gpumon_core.telemetry.nvml import NvmlSource
from gpumon_core.telemetry.records import Snapshot, SourceUnavailable

GIB = 1 << 30


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[FakeNvml]:
    fake = FakeNvml(tmp_path / "state")
    with loaded(fake):
        yield fake


def values(snapshot: Snapshot, position: int = 0) -> dict[str, float | None]:
    return dict(snapshot.readings[position].values)


def test_facts_and_metrics_arrive_in_their_units(driver: FakeNvml) -> None:
    gpu = driver.add_gpu(name="NVIDIA RTX A6000", memory_total=48 * GIB, memory_used=12 * GIB, memory_reserved=GIB)
    gpu.temperature, gpu.gpu_utilization, gpu.memory_utilization = 61, 42, 17
    gpu.power_mw, gpu.fan, gpu.sm_clock, gpu.memory_clock = 123_456, 33, 1800, 8001
    snapshot = NvmlSource("here").read()
    assert values(snapshot) == {
        "temperature": 61,
        "utilization": 42,
        "memory": 12 * 1024,
        "power": 123.456,
        "memory_utilization": 17,
        "fan_speed": 33,
        "sm_clock": 1800,
        "memory_clock": 8001,
    }
    [info] = snapshot.gpus
    assert (info.name, info.memory_total_mib, info.power_limit_w) == ("NVIDIA RTX A6000", 48 * 1024, 300.0)
    assert (info.architecture, info.compute_capability, info.index) == ("Ampere", "8.6", 0)
    assert info.uuid.startswith("GPU-")
    assert (snapshot.host.driver_version, snapshot.host.cuda_version) == ("580.159.03", "13.0")


def test_an_older_driver_is_asked_in_its_own_way(driver: FakeNvml) -> None:
    driver.add_gpu(memory_used=12 * GIB, memory_reserved=GIB, temperature=61)
    for function in ("nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetTemperatureV"):
        driver.hide(function)
    read = values(NvmlSource("here").read())
    assert read["temperature"] == 61
    assert read["memory"] == 13 * 1024, "the first version counts what the driver keeps"


def test_what_is_not_supported_is_none_and_asked_once(driver: FakeNvml) -> None:
    passive, cooled = driver.add_gpu(), driver.add_gpu(fan=44)
    passive.fan = None
    source = NvmlSource("here")
    for _ in range(20):
        snapshot = source.read()
    assert [values(snapshot, position)["fan_speed"] for position in (0, 1)] == [None, 44]
    assert driver.calls("nvmlDeviceGetFanSpeed", passive) == 1
    assert driver.calls("nvmlDeviceGetFanSpeed", cooled) == 20
    assert driver.calls("nvmlDeviceGetName") == 2, "facts are asked once"


ASKED = (
    "nvmlDeviceGetTemperatureV",
    "nvmlDeviceGetUtilizationRates",
    "nvmlDeviceGetMemoryInfo_v2",
    "nvmlDeviceGetPowerUsage",
    "nvmlDeviceGetFanSpeed",
    "nvmlDeviceGetClockInfo",
    "nvmlDeviceGetComputeRunningProcesses_v3",
    "nvmlDeviceGetGraphicsRunningProcesses_v3",
    "nvmlDeviceGetMPSComputeRunningProcesses_v3",
)
ERRORS = sorted(
    value
    for name, value in vars(pynvml).items()
    if name.startswith("NVML_ERROR_") and isinstance(value, int) and value != pynvml.NVML_ERROR_INSUFFICIENT_SIZE
)


@pytest.mark.parametrize("function", ASKED)
def test_no_error_of_a_call_costs_more_than_its_reading(driver: FakeNvml, function: str) -> None:
    sick, sound = driver.add_gpu(temperature=50), driver.add_gpu(temperature=60)
    sound.add_process(os.getpid(), GIB)
    for code in ERRORS:
        source = NvmlSource("here")
        driver.fail(function, code, gpu=sick)
        if code in gate.SESSION_OVER:
            with pytest.raises(SourceUnavailable):
                source.read()
        else:
            snapshot = source.read()
            assert (sick.uuid in snapshot.lost) == (code in gate.LOST)
            assert values(snapshot, -1)["temperature"] == 60
            assert [process.pid for process in snapshot.processes] == [os.getpid()]
        driver.recover()
        source.close()


def test_a_failing_call_is_one_line_in_the_log(driver: FakeNvml, caplog: pytest.LogCaptureFixture) -> None:
    driver.add_gpu()
    logging.getLogger("gpumon_core").propagate = True
    source = NvmlSource("here")
    driver.fail("nvmlDeviceGetPowerUsage", pynvml.NVML_ERROR_UNKNOWN)
    with caplog.at_level(logging.DEBUG, "gpumon_core"):
        for _ in range(10):
            assert values(source.read())["power"] is None
    assert len(caplog.records) == 1
    driver.recover()
    assert values(source.read())["power"] == 25


def test_a_lost_gpu_is_named_and_comes_back(driver: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = driver.add_gpu(), driver.add_gpu()
    source = NvmlSource("here")
    second.lost = True
    snapshot = source.read()
    assert snapshot.lost == {second.uuid}
    assert [reading.uuid for reading in snapshot.readings] == [first.uuid]
    second.lost = False
    assert source.read().lost == {second.uuid}, "left alone for a while"
    monkeypatch.setattr(nvml, "RETRY_S", 0)
    assert source.read().lost == set()


def test_a_gpu_lost_before_the_start_is_counted_and_found_again(
    driver: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.add_gpu()
    lost = driver.add_gpu()
    lost.lost = True
    source = NvmlSource("here")
    assert source.read().nameless == {1}
    lost.lost = False
    monkeypatch.setattr(nvml, "RECOUNT_S", 0)
    snapshot = source.read()
    assert snapshot.nameless == set()
    assert len(snapshot.readings) == 2


def test_a_driver_that_goes_is_reported_and_one_that_returns_is_used(driver: FakeNvml) -> None:
    driver.add_gpu(temperature=50)
    source = NvmlSource("here")
    driver.driver_loaded = False
    for _ in range(3):
        with pytest.raises(SourceUnavailable) as caught:
            source.read()
        assert caught.value.remedy
    driver.driver_loaded = True
    assert values(source.read())["temperature"] == 50


def test_without_a_driver_the_reason_and_a_remedy_are_given(driver: FakeNvml) -> None:
    driver.driver_loaded = False
    with pytest.raises(SourceUnavailable, match="Driver Not Loaded") as caught:
        NvmlSource("here")
    assert "modprobe" in caught.value.remedy


def test_a_new_gpu_is_noticed(driver: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "RECOUNT_S", 0)
    driver.add_gpu()
    source = NvmlSource("here")
    assert len(source.read().gpus) == 1
    driver.add_gpu()
    assert len(source.read().gpus) == 2


@pytest.mark.parametrize("entry", [24, 32])
@pytest.mark.parametrize("hidden", [(), ("_v3",), ("_v3", "_v2")])
@pytest.mark.parametrize("count", [0, 1, 2, 31, 32, 33, 200])
def test_no_driver_version_garbles_a_pid(
    driver: FakeNvml, entry: int, hidden: tuple[str, ...], count: int
) -> None:
    driver.process_struct_bytes_v3 = entry
    gpu = driver.add_gpu()
    for suffix in hidden:
        for kind in ("Compute", "Graphics", "MPSCompute"):
            driver.hide(f"nvmlDeviceGet{kind}RunningProcesses{suffix}")
    for number in range(count):
        gpu.add_process(1000 + number, (number + 1) << 20)
    found = {(process.pid, process.memory_mib) for process in NvmlSource("here").read().processes}
    assert found == {(1000 + number, number + 1) for number in range(count)}


def test_kinds_are_joined_and_memory_counts_once(driver: FakeNvml) -> None:
    gpu = driver.add_gpu()
    for kind in ("C", "G"):
        gpu.add_process(10, GIB, kind=kind)
    for kind in ("C", "M"):
        gpu.add_process(11, 2 * GIB, kind=kind)
    gpu.add_process(12, None, kind="G")
    gpu.add_process(0, GIB)
    found = {p.pid: (p.kind, p.memory_mib) for p in NvmlSource("here").read().processes}
    assert found == {10: ("C+G", 1024), 11: ("M+C", 2048), 12: ("G", None)}


def test_a_list_that_changes_between_two_calls_is_read_whole(driver: FakeNvml) -> None:
    gpu = driver.add_gpu()
    for number in range(120):
        presence = ("always", "after sizing", "until sizing")[number % 3]
        gpu.add_process(100 + number, GIB, presence=presence)
    read = NvmlSource("here").read().processes
    pids = [process.pid for process in read]
    assert len(set(pids)) == len(pids)
    assert {100 + number for number in range(0, 120, 3)} <= set(pids) <= set(range(100, 220))
    assert {process.memory_mib for process in read} == {1024}


def test_mig_instances_are_gpus_with_a_parent_and_their_own_processes(driver: FakeNvml) -> None:
    gpu = driver.add_gpu(name="NVIDIA A100-SXM4-80GB")
    one, two = gpu.add_mig(memory_total=20 * GIB, memory_used=5 * GIB), gpu.add_mig(memory_total=40 * GIB)
    gpu.add_process(70, 4 * GIB, mig=one)
    gpu.add_process(71, 6 * GIB, mig=two)
    source = NvmlSource("here")
    snapshot = source.read()
    parent, first, second = snapshot.gpus
    assert (first.parent_uuid, second.parent_uuid) == (parent.uuid, parent.uuid)
    assert (first.mig_index, second.mig_index) == (0, 1)
    assert (first.uuid, first.memory_total_mib) == (one.uuid, 20 * 1024)
    assert values(snapshot, 1)["memory"] == 5 * 1024
    assert values(snapshot, 1)["temperature"] is None
    assert values(snapshot, 0)["utilization"] is None
    assert {(p.gpu_uuid, p.pid, p.kind) for p in snapshot.processes} == {(one.uuid, 70, "C"), (two.uuid, 71, "C")}


def test_names_that_are_no_text_do_no_harm(driver: FakeNvml) -> None:
    gpu = driver.add_gpu(temperature=50)
    gpu.name = b"\xff\xfe\x80board"
    snapshot = NvmlSource("here").read()
    assert snapshot.gpus[0].name is None
    assert values(snapshot)["temperature"] == 50


def test_a_value_marked_as_not_available_is_none(driver: FakeNvml) -> None:
    gpu = driver.add_gpu()
    gpu.power_mw = 0xFFFFFFFF
    assert values(NvmlSource("here").read())["power"] is None


def test_every_metric_of_the_catalogue_is_in_every_reading(driver: FakeNvml) -> None:
    driver.add_gpu()
    assert set(values(NvmlSource("here").read())) == {metric.key for metric in GPU_METRICS}
