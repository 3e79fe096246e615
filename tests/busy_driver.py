"""A driver with two GPUs, one of them busy, and what the tests of NvmlSource ask of its snapshots."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import fake_nvml
import pynvml
import pytest
from fake_nvml import GIB, FakeMig, FakeNvml

from gpumon_core.telemetry.nvml import NvmlSource
from gpumon_core.telemetry.records import GpuInfo, Snapshot, SourceUnavailable

MIB = 2**20
# What one reading asks of a GPU -> the metrics that hang on it.
READING_CALLS: dict[str, set[str]] = {
    "nvmlDeviceGetTemperatureV": {"temperature"},
    "nvmlDeviceGetTemperature": {"temperature"},
    "nvmlDeviceGetUtilizationRates": {"utilization", "memory_utilization"},
    "nvmlDeviceGetMemoryInfo_v2": {"memory"},
    "nvmlDeviceGetMemoryInfo": {"memory"},
    "nvmlDeviceGetPowerUsage": {"power"},
    "nvmlDeviceGetFanSpeed": {"fan_speed"},
    "nvmlDeviceGetClockInfo": {"sm_clock", "memory_clock"},
    **{
        f"nvmlDeviceGet{kind}RunningProcesses{suffix}": set()
        for kind in ("Compute", "Graphics", "MPSCompute")
        for suffix in ("_v3", "_v2", "")
    },
}
# The newer way of asking -> the older one.
OLDER = {
    "nvmlDeviceGetTemperatureV": "nvmlDeviceGetTemperature",
    "nvmlDeviceGetMemoryInfo_v2": "nvmlDeviceGetMemoryInfo",
    **{name: name[:-1] + "2" for name in READING_CALLS if name.endswith("Processes_v3")},
    **{name: name[:-3] for name in READING_CALLS if name.endswith("Processes_v2")},
}
# What is asked about a GPU once -> the facts that hang on it.
FACT_CALLS: dict[str, set[str]] = {
    "nvmlDeviceGetUUID": {"uuid"},
    "nvmlDeviceGetName": {"name"},
    "nvmlDeviceGetPciInfo_v3": {"pci_bus_id"},
    "nvmlDeviceGetMemoryInfo": {"memory_total_mib"},
    "nvmlDeviceGetEnforcedPowerLimit": {"power_limit_w"},
    "nvmlDeviceGetPowerManagementLimit": {"power_limit_w"},
    "nvmlDeviceGetCudaComputeCapability": {"compute_capability"},
    "nvmlDeviceGetArchitecture": {"architecture"},
}
MIG_CALLS = (
    "nvmlDeviceGetMigMode",
    "nvmlDeviceGetMaxMigDeviceCount",
    "nvmlDeviceGetMigDeviceHandleByIndex",
    "nvmlDeviceGetGpuInstanceId",
    "nvmlDeviceGetComputeInstanceId",
)
SYSTEM_CALLS: dict[str, str] = {
    "nvmlSystemGetDriverVersion": "driver_version",
    "nvmlSystemGetNVMLVersion": "nvml_version",
    "nvmlSystemGetCudaDriverVersion": "cuda_version",
    "nvmlSystemGetCudaDriverVersion_v2": "cuda_version",
}
BUSY: dict[str, Any] = {
    "temperature": 61,
    "gpu_utilization": 87,
    "memory_utilization": 43,
    "memory_used": 10 * GIB,
    "memory_reserved": 600 * MIB,
    "power_mw": 231_456,
    "power_enforced_limit_mw": 280_000,
    "fan": 55,
    "sm_clock": 1740,
    "memory_clock": 7601,
}
BUSY_VALUES = {
    "temperature": 61,
    "utilization": 87,
    "memory": 10240,
    "power": 231.456,
    "memory_utilization": 43,
    "fan_speed": 55,
    "sm_clock": 1740,
    "memory_clock": 7601,
}


@pytest.fixture
def driver(fake: FakeNvml) -> Iterator[FakeNvml]:
    """A driver with two GPUs, GPU 0 busy and with one process of each kind; pynvml is pointed at it."""
    first = fake.add_gpu(uuid="GPU-first", **BUSY)
    fake.add_gpu(uuid="GPU-second")
    for pid, kind in ((11, "C"), (12, "G"), (13, "M")):
        first.add_process(pid, GIB, kind)
    with fake_nvml.loaded(fake):
        yield fake


@pytest.fixture
def migs(driver: FakeNvml) -> tuple[FakeMig, FakeMig]:
    """GPU 0 is split in two, and both halves work."""
    gpu = driver.gpus[0]
    driver.clear_processes()
    halves = (
        gpu.add_mig(uuid="MIG-a", memory_total=10 * GIB, memory_used=3 * GIB, gpu_instance_id=7),
        gpu.add_mig(uuid="MIG-b", slot=3, memory_total=20 * GIB, memory_used=5 * GIB, gpu_instance_id=9),
    )
    for pid, half in zip((101, 102), halves, strict=True):
        gpu.add_process(pid, GIB, mig=half)
    return halves


@pytest.fixture(autouse=True)
def _log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("gpumon_core"), "propagate", True)
    caplog.set_level(logging.INFO, logger="gpumon_core")


def use_library(monkeypatch: pytest.MonkeyPatch, library: object) -> None:
    monkeypatch.setattr(pynvml, "nvmlLib", library)
    pynvml._nvmlGetFunctionPointer_cache.clear()


def source() -> NvmlSource:
    return NvmlSource("testhost", clock=lambda: 1_700_000_000.5)


def values(snapshot: Snapshot, uuid: str = "GPU-first") -> dict[str, float | None]:
    (found,) = (reading.values for reading in snapshot.readings if reading.uuid == uuid)
    return {key: found[key] for key in BUSY_VALUES}


def main(snapshot: Snapshot) -> Snapshot:
    """The snapshot with nothing but its main metrics: what is asked rarely comes and goes."""
    readings = (replace(reading, values=values(snapshot, reading.uuid)) for reading in snapshot.readings)
    return replace(snapshot, readings=tuple(readings))


def info(snapshot: Snapshot, uuid: str) -> GpuInfo:
    (found,) = (gpu for gpu in snapshot.gpus if gpu.uuid == uuid)
    return found


def uuids(snapshot: Snapshot) -> list[str]:
    return [gpu.uuid for gpu in snapshot.gpus]


def seen(snapshot: Snapshot) -> set[tuple[str, int, str, int | None]]:
    rows = [(process.gpu_uuid, process.pid, process.kind, process.memory_mib) for process in snapshot.processes]
    assert len(rows) == len(set(rows)), "a process is listed twice"
    return set(rows)


def hide_newer(driver: FakeNvml, function: str) -> None:
    """Make the source use `function` by taking away what it would rather ask."""
    while function in OLDER.values():
        (function,) = (newer for newer, older in OLDER.items() if older == function)
        driver.hide(function)


def expect_unavailable(call: Callable[[], object]) -> None:
    with pytest.raises(SourceUnavailable) as caught:
        call()
    assert str(caught.value)
    assert caught.value.remedy
