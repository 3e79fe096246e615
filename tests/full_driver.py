"""A driver that offers everything, in the versions that there have been, and what the source asks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import fake_nvml
import pynvml
import pytest
from fake_nvml import GIB, FakeNvml

from gpumon_core.telemetry import nvml
from gpumon_core.telemetry.nvml import NvmlSource
from gpumon_core.telemetry.records import GpuReading, ProcessReading, Snapshot

# A driver -> what it does not have.
OLD = (
    "nvmlSystemGetCudaDriverVersion_v2",
    "nvmlDeviceGetTemperatureV",
    "nvmlDeviceGetMemoryInfo_v2",
    "nvmlDeviceGetFieldValues",
    "nvmlDeviceGetSamples",
    "nvmlDeviceGetEnforcedPowerLimit",
    "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetProcessesUtilizationInfo",
    "nvmlDeviceGetComputeRunningProcesses_v3",
    "nvmlDeviceGetGraphicsRunningProcesses_v3",
    "nvmlDeviceGetMPSComputeRunningProcesses_v3",
    "nvmlGpmQueryDeviceSupport",
)
OLDEST = (
    *OLD,
    "nvmlDeviceGetComputeRunningProcesses_v2",
    "nvmlDeviceGetGraphicsRunningProcesses_v2",
    "nvmlDeviceGetMPSComputeRunningProcesses_v2",
)
DRIVERS: dict[str, tuple[str, ...]] = {"new": (), "old": OLD, "oldest": OLDEST, "mig": ()}

# Every function that the source calls -> a driver on which it does.
CALLS: dict[str, str] = {
    **dict.fromkeys(
        (
            "nvmlInitWithFlags",
            "nvmlShutdown",
            "nvmlSystemGetDriverVersion",
            "nvmlSystemGetNVMLVersion",
            "nvmlSystemGetCudaDriverVersion_v2",
            "nvmlSystemGetProcessName",
            "nvmlDeviceGetCount_v2",
            "nvmlDeviceGetHandleByIndex_v2",
            "nvmlDeviceGetUUID",
            "nvmlDeviceGetName",
            "nvmlDeviceGetPciInfo_v3",
            "nvmlDeviceGetArchitecture",
            "nvmlDeviceGetCudaComputeCapability",
            "nvmlDeviceGetMemoryInfo",
            "nvmlDeviceGetEnforcedPowerLimit",
            "nvmlDeviceGetMigMode",
            "nvmlDeviceGetSamples",
            "nvmlDeviceGetTemperatureV",
            "nvmlDeviceGetUtilizationRates",
            "nvmlDeviceGetMemoryInfo_v2",
            "nvmlDeviceGetPowerUsage",
            "nvmlDeviceGetFanSpeed",
            "nvmlDeviceGetClockInfo",
            "nvmlDeviceGetMaxClockInfo",
            "nvmlDeviceGetEncoderUtilization",
            "nvmlDeviceGetDecoderUtilization",
            "nvmlDeviceGetJpgUtilization",
            "nvmlDeviceGetOfaUtilization",
            "nvmlDeviceGetPerformanceState",
            "nvmlDeviceGetCurrentClocksEventReasons",
            "nvmlDeviceGetPcieThroughput",
            "nvmlDeviceGetCurrPcieLinkGeneration",
            "nvmlDeviceGetCurrPcieLinkWidth",
            "nvmlDeviceGetMaxPcieLinkGeneration",
            "nvmlDeviceGetMaxPcieLinkWidth",
            "nvmlDeviceGetPcieReplayCounter",
            "nvmlDeviceGetBAR1MemoryInfo",
            "nvmlDeviceGetFieldValues",
            "nvmlDeviceGetComputeRunningProcesses_v3",
            "nvmlDeviceGetGraphicsRunningProcesses_v3",
            "nvmlDeviceGetMPSComputeRunningProcesses_v3",
            "nvmlDeviceGetProcessesUtilizationInfo",
            "nvmlGpmQueryDeviceSupport",
            "nvmlGpmSampleAlloc",
            "nvmlGpmSampleGet",
            "nvmlGpmMetricsGet",
            "nvmlGpmSampleFree",
        ),
        "new",
    ),
    **dict.fromkeys(
        (
            "nvmlSystemGetCudaDriverVersion",
            "nvmlDeviceGetTemperature",
            "nvmlDeviceGetPowerManagementLimit",
            "nvmlDeviceGetCurrentClocksThrottleReasons",
            "nvmlDeviceGetTotalEnergyConsumption",
            "nvmlDeviceGetTotalEccErrors",
            "nvmlDeviceGetRemappedRows",
            "nvmlDeviceGetRetiredPages",
            "nvmlDeviceGetRetiredPagesPendingStatus",
            "nvmlDeviceGetProcessUtilization",
            "nvmlDeviceGetComputeRunningProcesses_v2",
            "nvmlDeviceGetGraphicsRunningProcesses_v2",
            "nvmlDeviceGetMPSComputeRunningProcesses_v2",
        ),
        "old",
    ),
    **dict.fromkeys(
        (
            "nvmlDeviceGetComputeRunningProcesses",
            "nvmlDeviceGetGraphicsRunningProcesses",
            "nvmlDeviceGetMPSComputeRunningProcesses",
        ),
        "oldest",
    ),
    **dict.fromkeys(
        (
            "nvmlDeviceGetMaxMigDeviceCount",
            "nvmlDeviceGetMigDeviceHandleByIndex",
            "nvmlDeviceGetGpuInstanceId",
            "nvmlDeviceGetComputeInstanceId",
            "nvmlGpmMigSampleGet",
        ),
        "mig",
    ),
}
# About the driver or about a GPM sample, and not about one GPU: these can only fail for all.
FOR_ALL = {
    "nvmlInitWithFlags",
    "nvmlShutdown",
    "nvmlDeviceGetCount_v2",
    "nvmlGpmSampleAlloc",
    "nvmlGpmMetricsGet",
    "nvmlGpmSampleFree",
    *(name for name in CALLS if name.startswith("nvmlSystem")),
}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeNvml]:
    """A driver with two equal GPUs that offer everything, GPU 0 with a MIG instance; see `prepare`."""
    fake = FakeNvml(tmp_path_factory.mktemp("nvml") / "state")
    for index, uuid in enumerate(("GPU-first", "GPU-second")):
        gpu = fake.add_gpu(
            uuid=uuid,
            gpm_supported=1,
            memory_temperature=70,
            retired_pending=0,
            nvlink_count=4,
            gpu_utilization=50,
            fan=35,
        )
        for metric in ("SM_UTIL", "SM_OCCUPANCY", "ANY_TENSOR_UTIL", "GRAPHICS_UTIL", "DRAM_BW_UTIL"):
            gpu.set_gpm(getattr(pynvml, f"NVML_GPM_METRIC_{metric}"), 44.0)
        for direction in ("TX", "RX"):
            gpu.set_field(getattr(pynvml, f"NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_{direction}"), 5)
        gpu.retire_page(0x1000)
        for kind in range(3):
            gpu.add_sample(kind, 60, 1_000_000)
        for pid, letter in ((11, "C"), (12, "G"), (13, "M")):
            gpu.add_process(10 * index + pid, GIB, letter, sm=pid, memory_utilization=1)
    mig = fake.gpus[0].add_mig(uuid="MIG-a", gpu_instance_id=7)
    mig.set_gpm(pynvml.NVML_GPM_METRIC_SM_UTIL, 22.0)
    with fake_nvml.loaded(fake):
        yield fake


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETRY_S", "RECOUNT_S", "LONGEST_PAUSE_S"):
        monkeypatch.setattr(nvml, name, 0.0)


def prepare(machine: FakeNvml, driver: str) -> None:
    """End all faults, and make the machine's driver one of DRIVERS."""
    machine.recover()
    for function in DRIVERS[driver]:
        machine.hide(function)
    machine.gpus[0].mig_enabled = int(driver == "mig")


def source() -> NvmlSource:
    return NvmlSource("testhost", clock=lambda: 1_700_000_000.0)


def reading(snapshot: Snapshot, uuid: str) -> GpuReading:
    (found,) = (each for each in snapshot.readings if each.uuid == uuid)
    return found


def says(snapshot: Snapshot, uuid: str) -> dict[str, float]:
    """The values of a GPU that are not None."""
    return {key: value for key, value in reading(snapshot, uuid).values.items() if value is not None}


def running(snapshot: Snapshot, uuid: str = "GPU-second") -> set[ProcessReading]:
    return {process for process in snapshot.processes if process.gpu_uuid == uuid}


class Healthy:
    """What a driver says without faults."""

    def __init__(self, machine: FakeNvml, driver: str) -> None:
        prepare(machine, driver)
        machine.reset_calls()
        reader = source()
        self.asked_at_start = {name for name in CALLS if machine.calls(name)}
        ticks = [reader.read()]
        self.asked = {name for name in fake_nvml.functions() if machine.calls(name)}
        machine.reset_calls()
        ticks.append(reader.read())
        reader.process_name(11)
        reader.close()
        self.asked_later = {name for name in fake_nvml.functions() if machine.calls(name)}
        self.asked |= self.asked_later
        self.gpus = len(ticks[0].gpus)
        self.processes = running(ticks[0])
        # What every tick says; and what it does once GPM has measured.
        first, second = (says(tick, "GPU-second") for tick in ticks)
        self.always = {key: value for key, value in first.items() if second.get(key) == value}
        self.settled = set(second)
        self.settled_of_first = set(says(ticks[1], "GPU-first"))
        self.always_of_first = self.settled_of_first & set(self.always)
        assert len(self.processes) == 3
        assert len(self.always) >= 20


@pytest.fixture(scope="module")
def healthy(machine: FakeNvml) -> Callable[[str], Healthy]:
    return cache(lambda driver: Healthy(machine, driver))
