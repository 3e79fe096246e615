"""One GPU of the fake driver, and a clock that only a test moves: what the tests of a tick's values share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import fake_nvml
import pynvml
import pytest
from fake_nvml import FakeGpu, FakeNvml

from gpumon_core.telemetry import plan
from gpumon_core.telemetry.nvml import NvmlSource
from gpumon_core.telemetry.records import GpuReading, Snapshot

POWER, GPU, MEMORY = (
    pynvml.NVML_TOTAL_POWER_SAMPLES,
    pynvml.NVML_GPU_UTILIZATION_SAMPLES,
    pynvml.NVML_MEMORY_UTILIZATION_SAMPLES,
)
MIB = 2**20
SECOND = 1_000_000  # of the samples' clock, which counts microseconds
# When the fake's first sample was taken.
START = 1_700_000_000 * SECOND


class Clock:
    """The monotonic clock of the plan, which only a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(plan, "time", SimpleNamespace(monotonic=found.monotonic))
    return found


@pytest.fixture
def gpu(fake: FakeNvml) -> Iterator[FakeGpu]:
    """The one GPU of a driver that pynvml is pointed at; at a glance it is idle."""
    board = fake.add_gpu(uuid="GPU-first", gpu_utilization=3, memory_utilization=2, power_mw=50_000)
    with fake_nvml.loaded(fake):
        yield board


@pytest.fixture
def begin(gpu: FakeGpu, clock: Clock) -> Iterator[Callable[[], NvmlSource]]:
    """Begins sources that end with the test."""
    begun: list[NvmlSource] = []

    def source() -> NvmlSource:
        begun.append(NvmlSource("testhost"))
        return begun[-1]

    yield source
    for each in begun:
        each.close()


def reading(snapshot: Snapshot, uuid: str = "GPU-first") -> GpuReading:
    (found,) = (each for each in snapshot.readings if each.uuid == uuid)
    return found


def tick(source: NvmlSource, uuid: str = "GPU-first") -> dict[str, float | None]:
    """The next reading's values."""
    return dict(reading(source.read(), uuid).values)


def add(gpu: FakeGpu, kind: int, *samples: tuple[float, int]) -> None:
    """Samples as (seconds since START, value)."""
    for seconds, value in samples:
        gpu.add_sample(kind, value, START + round(seconds * SECOND))


# Key -> the field, what it says, and what the reading then is.
FIELDS: dict[str, tuple[str, int, float]] = {
    "memory_temperature": ("MEMORY_TEMP", 88, 88),
    "energy": ("TOTAL_ENERGY_CONSUMPTION", 7_654_321, 7654.321),
    "ecc_corrected_volatile": ("ECC_SBE_VOL_TOTAL", 11, 11),
    "ecc_uncorrected_volatile": ("ECC_DBE_VOL_TOTAL", 12, 12),
    "ecc_corrected_aggregate": ("ECC_SBE_AGG_TOTAL", 13, 13),
    "ecc_uncorrected_aggregate": ("ECC_DBE_AGG_TOTAL", 14, 14),
    "remapped_rows_corrected": ("REMAPPED_COR", 15, 15),
    "remapped_rows_uncorrected": ("REMAPPED_UNC", 16, 16),
    "remapped_rows_pending": ("REMAPPED_PENDING", 1, 1),
    "remapped_rows_failure": ("REMAPPED_FAILURE", 1, 1),
    "retired_pages_corrected": ("RETIRED_SBE", 17, 17),
    "retired_pages_uncorrected": ("RETIRED_DBE", 18, 18),
    "retired_pages_pending": ("RETIRED_PENDING", 1, 1),
    "nvlink_crc_flit_errors": ("NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL", 19, 19),
    "nvlink_crc_data_errors": ("NVLINK_CRC_DATA_ERROR_COUNT_TOTAL", 20, 20),
    "nvlink_replay_errors": ("NVLINK_REPLAY_ERROR_COUNT_TOTAL", 21, 21),
    "nvlink_recovery_errors": ("NVLINK_RECOVERY_ERROR_COUNT_TOTAL", 22, 22),
    "nvlink_crc_errors": ("NVLINK_ERROR_DL_CRC", 23, 23),
}


def field_id(name: str) -> int:
    return int(getattr(pynvml, f"NVML_FI_DEV_{name}"))


@pytest.fixture
def worn(gpu: FakeGpu) -> FakeGpu:
    """The GPU with errors that its functions count otherwise than its fields."""
    for count, (uncorrected, aggregate) in enumerate(((False, False), (True, False), (False, True), (True, True))):
        gpu.set_ecc_errors(31 + count, uncorrected=uncorrected, aggregate=aggregate)
    gpu.remapped_correctable, gpu.remapped_uncorrectable = 35, 36
    for address, cause in ((0x1000, 0), (0x2000, 0), (0x3000, 1)):
        gpu.retire_page(address, cause=cause)
    for name, value, _ in FIELDS.values():
        gpu.set_field(field_id(name), value)
    return gpu


def nvlink(found: dict[str, float | None]) -> tuple[float | None, float | None]:
    return found["nvlink_tx"], found["nvlink_rx"]


GPM = {
    "graphics_activity": ("GRAPHICS_UTIL", 91.04, 91.04),
    "sm_activity": ("SM_UTIL", 82.5, 82.5),
    "sm_occupancy": ("SM_OCCUPANCY", 33.3333, 33.333),
    "tensor_activity": ("ANY_TENSOR_UTIL", 54.0, 54),
    "dram_activity": ("DRAM_BW_UTIL", 0.0, 0),
    "pcie_tx": ("PCIE_TX_PER_SEC", 1234.5, 1234.5),
    "pcie_rx": ("PCIE_RX_PER_SEC", 0.25, 0.25),
    "nvlink_tx": ("NVLINK_TOTAL_TX_PER_SEC", 400_000.0, 400_000),
    "nvlink_rx": ("NVLINK_TOTAL_RX_PER_SEC", 1.0, 1),
}


def metric_id(key: str) -> int:
    return int(getattr(pynvml, f"NVML_GPM_METRIC_{GPM[key][0]}"))


@pytest.fixture
def hopper(gpu: FakeGpu) -> FakeGpu:
    """The GPU with performance monitoring, and other numbers where its functions tell the same."""
    gpu.gpm_supported = 1
    gpu.pcie_tx_kib_s, gpu.pcie_rx_kib_s = 5 * 1024, 6 * 1024
    for key, (_, value, _) in GPM.items():
        gpu.set_gpm(metric_id(key), value)
    return gpu
