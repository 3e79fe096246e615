"""The fake NVML keeps the promises of NVIDIA's documentation, as seen by the real pynvml."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_nvml
import pynvml
import pytest
from conftest import PATIENCE_S
from fake_nvml import NO_INSTANCE, FakeGpu, FakeNvml, Unterminated, layout, loading

GIB = 2**30


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[FakeNvml]:
    """A loaded driver without GPUs, pynvml pointed at it, no session begun."""
    with fake_nvml.loaded(FakeNvml(tmp_path / "nvml.state")) as fake:
        yield fake


@pytest.fixture
def fake(driver: FakeNvml) -> FakeNvml:
    """A session with one GPU."""
    driver.add_gpu()
    pynvml.nvmlInit()
    return driver


@pytest.fixture
def gpu(fake: FakeNvml) -> FakeGpu:
    return fake.gpus[0]


@pytest.fixture
def handle(fake: FakeNvml) -> Any:
    return pynvml.nvmlDeviceGetHandleByIndex(0)


def refused(error: int, function: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(pynvml.NVMLError) as caught:
        function(*arguments)
    assert caught.value.value == error, f"{caught.value} instead of error {error}"


# ---- The shared state and the library ------------------------------------------------------------


def test_both_sides_agree_on_the_size_of_the_shared_structure() -> None:
    assert fake_nvml.library().fake_nvml_state_size() == ctypes.sizeof(layout.State)


def test_every_number_of_the_header_is_an_attribute() -> None:
    missing = set(layout.GPU_NUMBERS) - set(vars(FakeGpu))
    assert not missing
    assert not set(layout.MIG_NUMBERS) - set(vars(fake_nvml.FakeMig))


def test_several_processes_may_build_at_once(tmp_path: Path) -> None:
    shutil.copytree(loading._HERE, tmp_path / "fake_nvml", ignore=shutil.ignore_patterns("build", "__pycache__"))
    command = [sys.executable, "-c", "import fake_nvml; print(fake_nvml.functions()['nvmlInit_v2'] >= 0)"]
    children = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [child.communicate()[0].strip() for child in children] == ["True"] * 3
    assert [path.name for path in (tmp_path / "fake_nvml" / "build").iterdir()] == ["libnvidia-ml.so.1"]


def test_a_missing_compiler_is_named_as_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in loading._SOURCES:
        shutil.copy(loading._HERE / source, tmp_path)
    monkeypatch.setattr(loading, "_HERE", tmp_path)
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(RuntimeError, match="needs a C compiler"):
        loading.build()


def test_a_subprocess_sees_changes_as_they_are_made(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path / "nvml.state")
    gpu = fake.add_gpu(temperature=41)
    script = """if True:
        import sys, pynvml
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        for _ in sys.stdin:
            print(pynvml.nvmlDeviceGetTemperatureV(handle, pynvml.NVML_TEMPERATURE_GPU), flush=True)
    """
    environment = {**os.environ, **fake_nvml.environment(fake)}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdin
        assert child.stdout
        for temperature in (41, 87, 30):
            gpu.temperature = temperature
            child.stdin.write("\n")
            child.stdin.flush()
            assert int(child.stdout.readline()) == temperature
        child.stdin.close()
    assert fake.calls("nvmlDeviceGetTemperatureV", gpu) == 3


@pytest.mark.parametrize("state", [None, "missing", "not a state"])
def test_without_a_state_file_the_driver_is_not_loaded(tmp_path: Path, state: str | None) -> None:
    environment = {**os.environ, **fake_nvml.environment(FakeNvml(tmp_path / "nvml.state"))}
    del environment["FAKE_NVML_STATE"]
    if state:
        environment["FAKE_NVML_STATE"] = str(tmp_path / "other")
    if state == "not a state":
        (tmp_path / "other").write_text("hello")
    script = "import pynvml\ntry: pynvml.nvmlInit()\nexcept pynvml.NVMLError as error: print(error.value)"
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == str(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)


def test_state_files_do_not_mix_in_one_process(tmp_path: Path) -> None:
    one, two = FakeNvml(tmp_path / "one"), FakeNvml(tmp_path / "two")
    one.driver_version, two.driver_version = "550.1", "580.2"
    with fake_nvml.loaded(one):
        pynvml.nvmlInit()
        with fake_nvml.loaded(two):
            refused(pynvml.NVML_ERROR_UNINITIALIZED, pynvml.nvmlSystemGetDriverVersion)
            pynvml.nvmlInit()
            assert pynvml.nvmlSystemGetDriverVersion() == "580.2"
        pynvml.nvmlInit()
        assert pynvml.nvmlSystemGetDriverVersion() == "550.1"


def test_a_second_view_of_the_file_keeps_what_the_first_has_set(tmp_path: Path) -> None:
    FakeNvml(tmp_path / "nvml.state").add_gpu(name="First")
    assert [gpu.name for gpu in FakeNvml(tmp_path / "nvml.state").gpus] == ["First"]


def test_pynvml_is_left_as_it_was_found(tmp_path: Path) -> None:
    before = pynvml.nvmlLib, dict(pynvml._nvmlGetFunctionPointer_cache), pynvml._nvmlLib_refcount
    with fake_nvml.loaded(FakeNvml(tmp_path / "nvml.state")):
        pynvml.nvmlInit()
    assert (pynvml.nvmlLib, pynvml._nvmlGetFunctionPointer_cache, pynvml._nvmlLib_refcount) == before


def test_a_mistyped_value_is_refused(driver: FakeNvml) -> None:
    with pytest.raises(TypeError, match="temprature"):
        driver.add_gpu(temprature=50)
    with pytest.raises(ValueError, match="nvmlDeviceGetFun"):
        driver.fail("nvmlDeviceGetFun", 3)


# ---- Sessions ------------------------------------------------------------------------------------


def test_a_session_ends_with_the_last_shutdown(driver: FakeNvml) -> None:
    refused(pynvml.NVML_ERROR_UNINITIALIZED, pynvml.nvmlDeviceGetCount)
    refused(pynvml.NVML_ERROR_UNINITIALIZED, pynvml.nvmlShutdown)
    pynvml.nvmlInit()
    pynvml.nvmlInit()
    pynvml.nvmlShutdown()
    assert pynvml.nvmlDeviceGetCount() == 0
    pynvml.nvmlShutdown()
    refused(pynvml.NVML_ERROR_UNINITIALIZED, pynvml.nvmlDeviceGetCount)


def test_an_unloaded_driver_ends_the_session_for_good(fake: FakeNvml) -> None:
    fake.driver_loaded = False
    refused(pynvml.NVML_ERROR_DRIVER_NOT_LOADED, pynvml.nvmlDeviceGetCount)
    refused(pynvml.NVML_ERROR_DRIVER_NOT_LOADED, pynvml.nvmlInit)
    fake.driver_loaded = True
    refused(pynvml.NVML_ERROR_UNINITIALIZED, pynvml.nvmlDeviceGetCount)
    pynvml.nvmlInit()
    assert pynvml.nvmlDeviceGetCount() == 1


def test_versions_are_reported(driver: FakeNvml) -> None:
    driver.driver_version, driver.nvml_version, driver.cuda_version = "580.10", "13.580.10", 12080
    assert pynvml.nvmlSystemGetNVMLVersion() == "13.580.10"  # needs no session
    assert pynvml.nvmlSystemGetCudaDriverVersion() == pynvml.nvmlSystemGetCudaDriverVersion_v2() == 12080
    pynvml.nvmlInit()
    assert pynvml.nvmlSystemGetDriverVersion() == "580.10"
    driver.cuda_version = None
    refused(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.nvmlSystemGetCudaDriverVersion_v2)


def test_errors_have_words(driver: FakeNvml) -> None:
    assert pynvml.nvmlErrorString(pynvml.NVML_ERROR_GPU_IS_LOST) == "GPU is lost"
    assert pynvml.nvmlErrorString(12345) == "Unknown Error"


# ---- Devices -------------------------------------------------------------------------------------


def test_a_device_is_found_by_index_uuid_and_bus_id(fake: FakeNvml) -> None:
    second = fake.add_gpu(uuid="GPU-second", pci_bus_id="00000000:B3:00.0")
    assert pynvml.nvmlDeviceGetCount() == 2
    found = [
        pynvml.nvmlDeviceGetHandleByIndex(1),
        pynvml.nvmlDeviceGetHandleByUUID("GPU-second"),
        pynvml.nvmlDeviceGetHandleByPciBusId("00000000:B3:00.0"),
        pynvml.nvmlDeviceGetHandleByPciBusId("0000:b3:00.0"),
        pynvml.nvmlDeviceGetHandleByPciBusId("b3:00.0"),
    ]
    assert [pynvml.nvmlDeviceGetIndex(handle) for handle in found] == [1] * 5
    refused(pynvml.NVML_ERROR_INVALID_ARGUMENT, pynvml.nvmlDeviceGetHandleByIndex, 2)
    refused(pynvml.NVML_ERROR_NOT_FOUND, pynvml.nvmlDeviceGetHandleByUUID, "GPU-third")
    refused(pynvml.NVML_ERROR_NOT_FOUND, pynvml.nvmlDeviceGetHandleByPciBusId, "0000:01:01.0")
    refused(pynvml.NVML_ERROR_INVALID_ARGUMENT, pynvml.nvmlDeviceGetHandleByPciBusId, "nonsense")
    fake.gpus[0].remove()
    assert pynvml.nvmlDeviceGetIndex(found[0]) == 0
    assert second.name == pynvml.nvmlDeviceGetName(found[0])


def test_a_bus_id_is_reported_in_both_spellings(gpu: FakeGpu, handle: Any) -> None:
    gpu.pci_bus_id = "0001:0A:1F.0"
    pci = pynvml.nvmlDeviceGetPciInfo(handle)
    assert (pci.busId, pci.busIdLegacy) == ("00000001:0A:1F.0", "0001:0A:1F.0")
    assert (pci.domain, pci.bus, pci.device, pci.pciDeviceId) == (1, 0x0A, 0x1F, 0x223010DE)


# Attribute, what pynvml says for it, and how to ask.
N = pynvml
ONE_NUMBER: list[tuple[str, Callable[[Any], Any]]] = [
    ("minor_number", N.nvmlDeviceGetMinorNumber),
    ("architecture", N.nvmlDeviceGetArchitecture),
    ("brand", N.nvmlDeviceGetBrand),
    ("core_count", N.nvmlDeviceGetNumGpuCores),
    ("memory_bus_width", N.nvmlDeviceGetMemoryBusWidth),
    ("gpu_utilization", lambda h: N.nvmlDeviceGetUtilizationRates(h).gpu),
    ("memory_utilization", lambda h: N.nvmlDeviceGetUtilizationRates(h).memory),
    ("encoder_utilization", lambda h: N.nvmlDeviceGetEncoderUtilization(h)[0]),
    ("decoder_utilization", lambda h: N.nvmlDeviceGetDecoderUtilization(h)[0]),
    ("jpeg_utilization", lambda h: N.nvmlDeviceGetJpgUtilization(h)[0]),
    ("ofa_utilization", lambda h: N.nvmlDeviceGetOfaUtilization(h)[0]),
    ("temperature", lambda h: N.nvmlDeviceGetTemperature(h, N.NVML_TEMPERATURE_GPU)),
    ("temperature", lambda h: N.nvmlDeviceGetTemperatureV(h, N.NVML_TEMPERATURE_GPU)),
    ("hotspot_temperature", lambda h: N.nvmlDeviceGetTemperatureV(h, N.NVML_TEMPERATURE_GPU_MAX)),
    ("temperature_shutdown", lambda h: N.nvmlDeviceGetTemperatureThreshold(h, 0)),
    ("temperature_slowdown", lambda h: N.nvmlDeviceGetTemperatureThreshold(h, 1)),
    ("temperature_memory_max", lambda h: N.nvmlDeviceGetTemperatureThreshold(h, 2)),
    ("temperature_gpu_max", lambda h: N.nvmlDeviceGetTemperatureThreshold(h, 3)),
    ("power_mw", N.nvmlDeviceGetPowerUsage),
    ("power_limit_mw", N.nvmlDeviceGetPowerManagementLimit),
    ("power_enforced_limit_mw", N.nvmlDeviceGetEnforcedPowerLimit),
    ("power_default_limit_mw", N.nvmlDeviceGetPowerManagementDefaultLimit),
    ("power_min_limit_mw", lambda h: N.nvmlDeviceGetPowerManagementLimitConstraints(h)[0]),
    ("power_max_limit_mw", lambda h: N.nvmlDeviceGetPowerManagementLimitConstraints(h)[1]),
    ("energy_mj", N.nvmlDeviceGetTotalEnergyConsumption),
    ("fan", N.nvmlDeviceGetFanSpeed),
    ("fan", lambda h: N.nvmlDeviceGetFanSpeed_v2(h, 0)),
    ("graphics_clock", lambda h: N.nvmlDeviceGetClockInfo(h, N.NVML_CLOCK_GRAPHICS)),
    ("sm_clock", lambda h: N.nvmlDeviceGetClockInfo(h, N.NVML_CLOCK_SM)),
    ("memory_clock", lambda h: N.nvmlDeviceGetClockInfo(h, N.NVML_CLOCK_MEM)),
    ("video_clock", lambda h: N.nvmlDeviceGetClockInfo(h, N.NVML_CLOCK_VIDEO)),
    ("max_sm_clock", lambda h: N.nvmlDeviceGetMaxClockInfo(h, N.NVML_CLOCK_SM)),
    ("max_memory_clock", lambda h: N.nvmlDeviceGetMaxClockInfo(h, N.NVML_CLOCK_MEM)),
    ("performance_state", N.nvmlDeviceGetPerformanceState),
    ("pcie_generation", N.nvmlDeviceGetCurrPcieLinkGeneration),
    ("pcie_width", N.nvmlDeviceGetCurrPcieLinkWidth),
    ("pcie_max_generation", N.nvmlDeviceGetMaxPcieLinkGeneration),
    ("pcie_max_width", N.nvmlDeviceGetMaxPcieLinkWidth),
    ("pcie_tx_kib_s", lambda h: N.nvmlDeviceGetPcieThroughput(h, N.NVML_PCIE_UTIL_TX_BYTES)),
    ("pcie_rx_kib_s", lambda h: N.nvmlDeviceGetPcieThroughput(h, N.NVML_PCIE_UTIL_RX_BYTES)),
    ("pcie_replays", N.nvmlDeviceGetPcieReplayCounter),
    ("bar1_total", lambda h: N.nvmlDeviceGetBAR1MemoryInfo(h).bar1Total),
    ("bar1_used", lambda h: N.nvmlDeviceGetBAR1MemoryInfo(h).bar1Used),
    ("clocks_event_reasons", N.nvmlDeviceGetCurrentClocksEventReasons),
    ("clocks_event_reasons", N.nvmlDeviceGetCurrentClocksThrottleReasons),
    ("supported_event_reasons", N.nvmlDeviceGetSupportedClocksEventReasons),
    ("ecc_enabled", lambda h: N.nvmlDeviceGetEccMode(h)[0]),
    ("ecc_pending", lambda h: N.nvmlDeviceGetEccMode(h)[1]),
    ("remapped_correctable", lambda h: N.nvmlDeviceGetRemappedRows(h)[0]),
    ("retired_pending", N.nvmlDeviceGetRetiredPagesPendingStatus),
    ("persistence_mode", N.nvmlDeviceGetPersistenceMode),
    ("compute_mode", N.nvmlDeviceGetComputeMode),
    ("display_mode", N.nvmlDeviceGetDisplayMode),
    ("display_active", N.nvmlDeviceGetDisplayActive),
    ("mig_enabled", lambda h: N.nvmlDeviceGetMigMode(h)[0]),
]


@pytest.mark.parametrize(
    ("attribute", "ask"), ONE_NUMBER, ids=[f"{i}-{row[0]}" for i, row in enumerate(ONE_NUMBER)]
)
def test_a_number_is_reported_as_set_and_none_is_not_supported(
    gpu: FakeGpu, handle: Any, attribute: str, ask: Callable[[Any], Any]
) -> None:
    gpu.mig_pending = gpu.mig_enabled = 0
    setattr(gpu, attribute, 77)
    assert ask(handle) == 77
    setattr(gpu, attribute, None)
    refused(pynvml.NVML_ERROR_NOT_SUPPORTED, ask, handle)


def test_what_a_gpu_is_called(gpu: FakeGpu, handle: Any) -> None:
    gpu.name, gpu.serial, gpu.vbios, gpu.uuid = "NVIDIA Grün", "123", "96.00", "GPU-abc"
    gpu.compute_capability = (12, 1)
    assert pynvml.nvmlDeviceGetName(handle) == "NVIDIA Grün"
    assert pynvml.nvmlDeviceGetSerial(handle) == "123"
    assert pynvml.nvmlDeviceGetVbiosVersion(handle) == "96.00"
    assert pynvml.nvmlDeviceGetUUID(handle) == "GPU-abc"
    assert pynvml.nvmlDeviceGetCudaComputeCapability(handle) == (12, 1)
    buffer = ctypes.create_string_buffer(b"\xaa" * 80, 80)
    assert pynvml.nvmlLib.nvmlDeviceGetUUID(handle, buffer, 80) == pynvml.NVML_SUCCESS
    assert buffer.raw == b"GPU-abc\0" + b"\xaa" * 72


def test_a_name_may_be_garbage(gpu: FakeGpu, handle: Any) -> None:
    gpu.name = b"NVIDIA \xff\xfe"
    with pytest.raises(UnicodeDecodeError):
        pynvml.nvmlDeviceGetName(handle)
    gpu.name = Unterminated(b"endless ")
    assert pynvml.nvmlDeviceGetName(handle) == "endless " * 12
    gpu.name = "x" * 96  # 96 bytes with the NUL is all that pynvml has room for
    refused(pynvml.NVML_ERROR_INSUFFICIENT_SIZE, pynvml.nvmlDeviceGetName, handle)


def test_the_first_memory_call_counts_reserved_memory_as_used(gpu: FakeGpu, handle: Any) -> None:
    gpu.memory_total, gpu.memory_reserved, gpu.memory_used = 80 * GIB, 2 * GIB, 10 * GIB
    first = pynvml.nvmlDeviceGetMemoryInfo(handle)
    second = pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2)
    assert (first.total, first.used, first.free) == (80 * GIB, 12 * GIB, 68 * GIB)
    assert (second.used, second.reserved, second.free) == (10 * GIB, 2 * GIB, 68 * GIB)
    gpu.memory_total = None  # unified memory
    refused(pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.nvmlDeviceGetMemoryInfo, handle)


def test_a_structure_of_another_version_is_refused(handle: Any) -> None:
    refused(pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH, pynvml.nvmlDeviceGetMemoryInfo, handle, 0x03000028)
    structure = pynvml.c_nvmlTemperature_v1_t(version=1)
    error = pynvml.nvmlLib.nvmlDeviceGetTemperatureV(handle, ctypes.byref(structure))
    assert error == pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH


def test_invalid_arguments_are_refused(gpu: FakeGpu, handle: Any) -> None:
    invalid = pynvml.NVML_ERROR_INVALID_ARGUMENT
    stranger = ctypes.cast(ctypes.c_void_p(0x1234), type(handle))
    refused(invalid, pynvml.nvmlDeviceGetName, stranger)
    refused(invalid, pynvml.nvmlDeviceGetName, None)
    refused(invalid, pynvml.nvmlDeviceGetClockInfo, handle, 4)
    refused(invalid, pynvml.nvmlDeviceGetTemperature, handle, 2)
    refused(invalid, pynvml.nvmlDeviceGetTemperatureThreshold, handle, 8)
    refused(invalid, pynvml.nvmlDeviceGetPcieThroughput, handle, 2)
    assert pynvml.nvmlLib.nvmlDeviceGetFanSpeed(handle, None) == invalid
    assert pynvml.nvmlLib.nvmlDeviceGetUtilizationRates(handle, None) == invalid
    gpu.remove()
    refused(invalid, pynvml.nvmlDeviceGetName, handle)


def test_every_fan_has_its_speed(gpu: FakeGpu, handle: Any) -> None:
    gpu.fans = (30, 55)
    assert pynvml.nvmlDeviceGetNumFans(handle) == 2
    assert pynvml.nvmlDeviceGetFanSpeed_v2(handle, 1) == 55
    refused(pynvml.NVML_ERROR_INVALID_ARGUMENT, pynvml.nvmlDeviceGetFanSpeed_v2, handle, 2)
    gpu.fans = ()
    refused(pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.nvmlDeviceGetFanSpeed, handle)
    refused(pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.nvmlDeviceGetNumFans, handle)


def test_ecc_errors_need_ecc(gpu: FakeGpu, handle: Any) -> None:
    gpu.set_ecc_errors(5, uncorrected=True, aggregate=True)
    gpu.set_ecc_errors(2, uncorrected=True, aggregate=True, location=7)
    assert pynvml.nvmlDeviceGetTotalEccErrors(handle, 1, 1) == 7
    assert pynvml.nvmlDeviceGetMemoryErrorCounter(handle, 1, 1, pynvml.NVML_MEMORY_LOCATION_SRAM) == 2
    assert pynvml.nvmlDeviceGetTotalEccErrors(handle, 0, 1) == 0
    gpu.ecc_enabled = 0
    refused(pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.nvmlDeviceGetTotalEccErrors, handle, 1, 1)
    refused(pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.nvmlDeviceGetMemoryErrorCounter, handle, 1, 1, 2)


def test_retired_pages_come_with_their_cause(gpu: FakeGpu, handle: Any) -> None:
    refused(pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.nvmlDeviceGetRetiredPages, handle, 1)
    gpu.retire_page(0x1000, timestamp_us=7)
    gpu.retire_page(0x2000, cause=0)
    assert pynvml.nvmlDeviceGetRetiredPages(handle, 1) == [0x1000]
    assert pynvml.nvmlDeviceGetRetiredPages_v2(handle, 1) == [{"address": 0x1000, "timestamp": 7}]
    assert pynvml.nvmlDeviceGetRetiredPages(handle, 0) == [0x2000]


def test_nvlinks_answer_one_by_one(gpu: FakeGpu, handle: Any) -> None:
    refused(pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.nvmlDeviceGetNvLinkState, handle, 0)
    gpu.nvlink_version = 6
    gpu.set_nvlink(0)
    gpu.set_nvlink(1, active=False, errors=(1, 2, 3, 4, 5))
    assert [pynvml.nvmlDeviceGetNvLinkState(handle, link) for link in (0, 1)] == [1, 0]
    assert pynvml.nvmlDeviceGetNvLinkVersion(handle, 0) == 6
    assert pynvml.nvmlDeviceGetNvLinkErrorCounter(handle, 1, pynvml.NVML_NVLINK_ERROR_DL_CRC_DATA) == 4
    refused(pynvml.NVML_ERROR_INVALID_ARGUMENT, pynvml.nvmlDeviceGetNvLinkState, handle, 2)


# ---- Fields, samples, GPM ------------------------------------------------------------------------


def test_every_field_has_its_own_return_code(gpu: FakeGpu, handle: Any) -> None:
    gpu.energy_mj, gpu.memory_temperature, gpu.power_mw = 2**40, None, 123_000
    gpu.set_field(pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, 99, scope=3)
    gpu.set_field(pynvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES, 0, error=pynvml.NVML_ERROR_NO_PERMISSION)
    gpu.set_field(300, -1.5)
    asked = [83, 82, 186, (138, 3), (138, 4), 197, 300, 4000]
    values = pynvml.nvmlDeviceGetFieldValues(handle, asked)
    assert [value.nvmlReturn for value in values] == [0, 3, 0, 0, 3, 4, 0, 2]
    assert (values[0].value.ullVal, values[0].valueType) == (2**40, pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG)
    assert (values[2].value.uiVal, values[2].valueType) == (123_000, pynvml.NVML_VALUE_TYPE_UNSIGNED_INT)
    assert values[3].value.ullVal == 99
    assert (values[6].value.dVal, values[6].valueType) == (-1.5, pynvml.NVML_VALUE_TYPE_DOUBLE)
    gpu.clear_field(300)
    assert pynvml.nvmlDeviceGetFieldValues(handle, [300])[0].nvmlReturn == pynvml.NVML_ERROR_NOT_SUPPORTED


def test_a_counter_set_as_a_field_overrides_what_is_built_in(gpu: FakeGpu, handle: Any) -> None:
    gpu.set_field(83, 5)
    assert pynvml.nvmlDeviceGetFieldValues(handle, [83])[0].value.ullVal == 5
    gpu.ecc_enabled = 1
    gpu.set_ecc_errors(1)
    gpu.set_ecc_errors(4, uncorrected=True, aggregate=True)
    values = pynvml.nvmlDeviceGetFieldValues(handle, [3, 4, 5, 6])
    assert [value.value.ullVal for value in values] == [1, 0, 0, 4]


def test_only_samples_newer_than_the_last_seen_are_reported(gpu: FakeGpu, handle: Any) -> None:
    power = pynvml.NVML_TOTAL_POWER_SAMPLES
    refused(pynvml.NVML_ERROR_NOT_FOUND, pynvml.nvmlDeviceGetSamples, handle, power, 0)
    for i in range(300):
        gpu.add_sample(power, 1000 + i, timestamp_us=i)
    kind, samples = pynvml.nvmlDeviceGetSamples(handle, power, 0)
    assert kind == pynvml.NVML_VALUE_TYPE_UNSIGNED_INT
    assert [sample.timeStamp for sample in samples] == list(range(300 - layout.SAMPLES, 300))
    _, samples = pynvml.nvmlDeviceGetSamples(handle, power, 297)
    assert [sample.sampleValue.uiVal for sample in samples] == [1298, 1299]
    refused(pynvml.NVML_ERROR_NOT_FOUND, pynvml.nvmlDeviceGetSamples, handle, power, 299)
    refused(pynvml.NVML_ERROR_NOT_FOUND, pynvml.nvmlDeviceGetSamples, handle, 1, 0)
    refused(pynvml.NVML_ERROR_INVALID_ARGUMENT, pynvml.nvmlDeviceGetSamples, handle, 10, 0)


def test_gpm_metrics_come_from_two_samples(gpu: FakeGpu, handle: Any) -> None:
    assert pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice == 0
    gpu.gpm_supported = 1
    gpu.set_gpm(pynvml.NVML_GPM_METRIC_SM_UTIL, 62.5)
    first, second = pynvml.nvmlGpmSampleAlloc(), pynvml.nvmlGpmSampleAlloc()
    request = pynvml.c_nvmlGpmMetricsGet_t(
        version=pynvml.NVML_GPM_METRICS_GET_VERSION, numMetrics=2, sample1=first, sample2=second
    )
    request.metrics[0].metricId = pynvml.NVML_GPM_METRIC_SM_UTIL
    request.metrics[1].metricId = pynvml.NVML_GPM_METRIC_SM_OCCUPANCY
    refused(pynvml.NVML_ERROR_INVALID_ARGUMENT, pynvml.nvmlGpmMetricsGet, request)  # nothing sampled
    pynvml.nvmlGpmSampleGet(handle, first)
    gpu.set_gpm(pynvml.NVML_GPM_METRIC_SM_UTIL, 75.0)
    pynvml.nvmlGpmSampleGet(handle, second)
    result = pynvml.nvmlGpmMetricsGet(request)
    assert [(m.nvmlReturn, m.value) for m in result.metrics[:2]] == [(0, 75.0), (3, 0.0)]
    pynvml.nvmlGpmSampleFree(first)
    pynvml.nvmlGpmSampleFree(second)


# ---- Processes -----------------------------------------------------------------------------------

BYTES = {"": 16, "_v2": 24, "_v3": 24}


def raw_processes(handle: Any, function: str, count: int, room: int = 8) -> tuple[int, int, bytes]:
    """Call the C function itself: return code, count, and the buffer, which held only 0xAA."""
    number, buffer = ctypes.c_uint(count), ctypes.create_string_buffer(b"\xaa" * room * 32, room * 32)
    error = getattr(pynvml.nvmlLib, function)(handle, ctypes.byref(number), buffer if room else None)
    return error, number.value, buffer.raw


@pytest.mark.parametrize("kind", ["Compute", "Graphics", "MPSCompute"])
@pytest.mark.parametrize("version", ["", "_v2", "_v3"])
def test_every_version_writes_its_own_structure_and_nothing_else(
    gpu: FakeGpu, handle: Any, kind: Any, version: str
) -> None:
    function, bytes_each = f"nvmlDeviceGet{kind}RunningProcesses{version}", BYTES[version]
    assert raw_processes(handle, function, 0, room=0)[:2] == (pynvml.NVML_SUCCESS, 0)
    gpu.add_process(11, 5 * GIB, kind=kind[0])
    gpu.add_process(12, None, kind=kind[0])
    gpu.add_process(99, 1, kind="G" if kind == "Compute" else "C")
    assert raw_processes(handle, function, 0, room=0)[:2] == (pynvml.NVML_ERROR_INSUFFICIENT_SIZE, 2)
    assert raw_processes(handle, function, 1)[:2] == (pynvml.NVML_ERROR_INSUFFICIENT_SIZE, 2)
    error, count, raw = raw_processes(handle, function, 8)  # big enough: no sizing call is needed
    assert (error, count) == (pynvml.NVML_SUCCESS, 2)
    outside = b"" if version == "" else b"\xff" * 8
    memory = [(5 * GIB).to_bytes(8, "little"), b"\xff" * 8]
    expected = b"".join(
        pid.to_bytes(8, "little") + used + outside for pid, used in zip((11, 12), memory, strict=True)
    )
    assert len(expected) == 2 * bytes_each
    assert raw == expected + b"\xaa" * (len(raw) - len(expected))


def test_running_processes_without_a_buffer_need_a_count_of_zero(gpu: FakeGpu, handle: Any) -> None:
    gpu.add_process(11, 1)
    function = "nvmlDeviceGetComputeRunningProcesses_v3"
    assert raw_processes(handle, function, 4, room=0)[0] == pynvml.NVML_ERROR_INVALID_ARGUMENT
    assert getattr(pynvml.nvmlLib, function)(handle, None, None) == pynvml.NVML_ERROR_INVALID_ARGUMENT


def test_pynvml_lists_processes(gpu: FakeGpu, handle: Any) -> None:
    gpu.add_process(11, 5 * GIB)
    gpu.add_process(11, GIB, kind="G")
    late = gpu.add_process(12, None)
    listed = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    assert [(p.pid, p.usedGpuMemory, p.gpuInstanceId) for p in listed] == [
        (11, 5 * GIB, NO_INSTANCE),
        (12, None, NO_INSTANCE),
    ]
    late.memory = 7
    gpu.fake.remove_process(11)
    assert pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle) == []
    assert pynvml.nvmlDeviceGetComputeRunningProcesses_v2(handle)[0].usedGpuMemory == 7
    gpu.fake.clear_processes()
    assert pynvml.nvmlDeviceGetComputeRunningProcesses(handle) == []


def test_the_535_drivers_write_a_longer_structure(gpu: FakeGpu, handle: Any) -> None:
    gpu.fake.process_struct_bytes_v3 = 32
    for pid in (11, 12):
        gpu.add_process(pid, GIB, protected_memory=5)
    _, count, raw = raw_processes(handle, "nvmlDeviceGetComputeRunningProcesses_v3", 8)
    pids = [int.from_bytes(raw[start : start + 4], "little") for start in (0, 32)]
    assert (count, pids, raw[24:32], raw[64:66]) == (2, [11, 12], (5).to_bytes(8, "little"), b"\xaa\xaa")
    # What today's bindings make of it: a second process that is nonsense.
    assert pynvml.nvmlDeviceGetComputeRunningProcesses(handle)[1].pid == 5
    _, _, raw = raw_processes(handle, "nvmlDeviceGetComputeRunningProcesses_v2", 8)
    assert int.from_bytes(raw[24:28], "little") == 12  # the second version stayed as it was


def test_process_details_are_listed_by_mode(gpu: FakeGpu, handle: Any) -> None:
    gpu.add_process(11, GIB, protected_memory=3)
    gpu.add_process(12, GIB, kind="G")
    version = pynvml.nvmlProcessDetailList_v1
    details = pynvml.nvmlDeviceGetRunningProcessDetailList(handle, version, pynvml.NVML_PROCESS_MODE_COMPUTE)
    assert [(p.pid, p.usedGpuCcProtectedMemory) for p in details] == [(11, 3)]


def test_the_process_list_may_grow_between_two_calls(gpu: FakeGpu, handle: Any) -> None:
    gpu.add_process(1, GIB)
    for pid in range(2, 20):  # more than pynvml leaves room for
        gpu.add_process(pid, GIB, presence="after sizing")
    refused(pynvml.NVML_ERROR_INSUFFICIENT_SIZE, pynvml.nvmlDeviceGetComputeRunningProcesses, handle)
    assert len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) == 19


def test_a_process_may_end_between_two_calls(gpu: FakeGpu, handle: Any) -> None:
    gpu.add_process(1, GIB, presence="until sizing")
    assert pynvml.nvmlDeviceGetComputeRunningProcesses(handle) == []


def test_names_of_processes_that_do_not_exist_are_not_found(gpu: FakeGpu) -> None:
    gpu.add_process(11, GIB, name="/opt/train.py")
    assert pynvml.nvmlSystemGetProcessName(11) == "/opt/train.py"
    refused(pynvml.NVML_ERROR_NOT_FOUND, pynvml.nvmlSystemGetProcessName, 12)
    short = ctypes.create_string_buffer(5)  # the documentation: cropped to the provided length
    assert pynvml.nvmlLib.nvmlSystemGetProcessName(11, short, 5) == pynvml.NVML_SUCCESS
    assert short.value == b"/opt"


def test_process_utilization_lists_the_busy_since_the_last_sample(gpu: FakeGpu, handle: Any) -> None:
    gpu.add_process(10, GIB)  # idle
    refused(pynvml.NVML_ERROR_NOT_FOUND, pynvml.nvmlDeviceGetProcessUtilization, handle, 0)
    gpu.add_process(11, GIB, sm=40, memory_utilization=20, encoder=3, decoder=4, time_us=1000)
    gpu.add_process(11, GIB, kind="G", sm=40, time_us=1000)  # the same process, listed once
    gpu.add_process(12, GIB, sm=5, jpeg=6, ofa=7, time_us=2000)
    samples = pynvml.nvmlDeviceGetProcessUtilization(handle, 0)
    assert [(s.pid, s.timeStamp, s.smUtil) for s in samples] == [(11, 1000, 40), (12, 2000, 5)]
    assert (samples[0].memUtil, samples[0].encUtil, samples[0].decUtil) == (20, 3, 4)
    assert [s.pid for s in pynvml.nvmlDeviceGetProcessUtilization(handle, 1000)] == [12]
    refused(pynvml.NVML_ERROR_NOT_FOUND, pynvml.nvmlDeviceGetProcessUtilization, handle, 2000)
    newer = pynvml.nvmlDeviceGetProcessesUtilizationInfo(handle, 1000)
    assert [(s.pid, s.timeStamp, s.jpgUtil, s.ofaUtil) for s in newer] == [(12, 2000, 6, 7)]
    refused(pynvml.NVML_ERROR_NOT_FOUND, pynvml.nvmlDeviceGetProcessesUtilizationInfo, handle, 2000)


def test_process_slots_are_used_again(gpu: FakeGpu, handle: Any) -> None:
    for pid in range(1, 2 * layout.PROCESSES):
        gpu.add_process(pid, GIB)
        gpu.fake.remove_process(pid - 1)
    assert [p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)] == [2 * layout.PROCESSES - 1]


# ---- MIG -----------------------------------------------------------------------------------------


def test_mig_devices_are_found_by_slot_and_uuid(gpu: FakeGpu, handle: Any) -> None:
    find = pynvml.nvmlDeviceGetMigDeviceHandleByIndex
    refused(pynvml.NVML_ERROR_NOT_SUPPORTED, find, handle, 0)
    assert pynvml.nvmlDeviceGetMaxMigDeviceCount(handle) == 0
    mig = gpu.add_mig(slot=2, uuid="MIG-two", gpu_instance_id=9, compute_instance_id=1, name="1g")
    assert pynvml.nvmlDeviceGetMigMode(handle) == [1, 1]
    assert pynvml.nvmlDeviceGetMaxMigDeviceCount(handle) == 7
    refused(pynvml.NVML_ERROR_NOT_FOUND, find, handle, 0)
    refused(pynvml.NVML_ERROR_INVALID_ARGUMENT, find, handle, 7)
    for found in (find(handle, 2), pynvml.nvmlDeviceGetHandleByUUID("MIG-two")):
        assert pynvml.nvmlDeviceIsMigDeviceHandle(found).value == 1
        assert pynvml.nvmlDeviceGetUUID(found) == "MIG-two"
        assert pynvml.nvmlDeviceGetName(found) == "1g"
        assert pynvml.nvmlDeviceGetIndex(found) == 2
        assert pynvml.nvmlDeviceGetGpuInstanceId(found) == 9
        assert pynvml.nvmlDeviceGetComputeInstanceId(found) == 1
        parent = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(found)
        assert pynvml.nvmlDeviceGetUUID(parent) == gpu.uuid
    assert pynvml.nvmlDeviceIsMigDeviceHandle(handle).value == 0
    refused(pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.nvmlDeviceGetAttributes, handle)
    gpu.mig_enabled = 0
    refused(pynvml.NVML_ERROR_INVALID_ARGUMENT, pynvml.nvmlDeviceGetName, found)
    gpu.mig_enabled = 1
    mig.remove()
    refused(pynvml.NVML_ERROR_INVALID_ARGUMENT, pynvml.nvmlDeviceGetName, found)


def test_a_mig_device_has_memory_and_attributes_of_its_own(gpu: FakeGpu, handle: Any) -> None:
    mig = gpu.add_mig(memory_total=10 * GIB, memory_used=3 * GIB, multiprocessors=14, decoders=1, ofas=2)
    own = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, mig.slot)
    assert pynvml.nvmlDeviceGetMemoryInfo(own).used == 3 * GIB
    assert pynvml.nvmlDeviceGetMemoryInfo(own, pynvml.nvmlMemory_v2).free == 7 * GIB
    attributes = pynvml.nvmlDeviceGetAttributes(own)
    assert (attributes.multiprocessorCount, attributes.memorySizeMB) == (14, 10 * 1024)
    assert (attributes.sharedDecoderCount, attributes.sharedOfaCount) == (1, 2)


MIG_REFUSES: list[Callable[[Any], Any]] = [
    N.nvmlDeviceGetUtilizationRates,
    N.nvmlDeviceGetEncoderUtilization,
    N.nvmlDeviceGetPowerUsage,
    N.nvmlDeviceGetFanSpeed,
    lambda h: N.nvmlDeviceGetTemperatureV(h, 0),
    lambda h: N.nvmlDeviceGetClockInfo(h, 1),
    lambda h: N.nvmlDeviceGetProcessUtilization(h, 0),
    lambda h: N.nvmlDeviceGetSamples(h, 1, 0),
]


@pytest.mark.parametrize("ask", MIG_REFUSES)
def test_what_belongs_to_the_board_is_not_supported_on_a_mig_device(
    gpu: FakeGpu, handle: Any, ask: Callable[[Any], Any]
) -> None:
    gpu.add_mig()
    refused(pynvml.NVML_ERROR_NOT_SUPPORTED, ask, pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, 0))


def test_a_gpu_in_mig_mode_has_no_utilization_but_keeps_power(gpu: FakeGpu, handle: Any) -> None:
    gpu.add_mig()
    not_supported = pynvml.NVML_ERROR_NOT_SUPPORTED
    refused(not_supported, pynvml.nvmlDeviceGetUtilizationRates, handle)
    refused(not_supported, pynvml.nvmlDeviceGetDecoderUtilization, handle)
    refused(not_supported, pynvml.nvmlDeviceGetProcessUtilization, handle, 0)
    refused(not_supported, pynvml.nvmlDeviceGetSamples, handle, pynvml.NVML_GPU_UTILIZATION_SAMPLES, 0)
    refused(not_supported, pynvml.nvmlDeviceGetMemoryErrorCounter, handle, 1, pynvml.NVML_VOLATILE_ECC, 2)
    gpu.add_sample(pynvml.NVML_TOTAL_POWER_SAMPLES, 1)
    assert len(pynvml.nvmlDeviceGetSamples(handle, pynvml.NVML_TOTAL_POWER_SAMPLES, 0)[1]) == 1
    assert pynvml.nvmlDeviceGetPowerUsage(handle) == gpu.power_mw


def test_the_parent_lists_the_processes_of_all_its_instances(gpu: FakeGpu, handle: Any) -> None:
    one, two = gpu.add_mig(), gpu.add_mig(compute_instance_id=4)
    gpu.add_process(11, GIB, mig=one)
    gpu.add_process(12, GIB, mig=two)

    def listed(device: Any) -> list[tuple[int, int, int]]:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(device)
        return [(p.pid, p.gpuInstanceId, p.computeInstanceId) for p in processes]

    assert listed(handle) == [(11, 7, 0), (12, 8, 4)]
    assert listed(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, 1)) == [(12, 8, 4)]


def test_gpm_samples_a_gpu_instance_by_its_id(gpu: FakeGpu, handle: Any) -> None:
    gpu.gpm_supported = 1
    gpu.add_mig(gpu_instance_id=9).set_gpm(1, 33.0)
    samples = [pynvml.nvmlGpmMigSampleGet(handle, 9, pynvml.nvmlGpmSampleAlloc()) for _ in range(2)]
    request = pynvml.c_nvmlGpmMetricsGet_t(version=1, numMetrics=1, sample1=samples[0], sample2=samples[1])
    request.metrics[0].metricId = 1
    assert pynvml.nvmlGpmMetricsGet(request).metrics[0].value == 33.0
    for sample in samples:
        pynvml.nvmlGpmSampleFree(sample)
    refused(pynvml.NVML_ERROR_INVALID_ARGUMENT, pynvml.nvmlGpmMigSampleGet, handle, 8, None)


# ---- Faults --------------------------------------------------------------------------------------


def test_a_function_fails_for_one_gpu_and_for_a_number_of_calls(fake: FakeNvml, handle: Any) -> None:
    fake.add_gpu()
    other = pynvml.nvmlDeviceGetHandleByIndex(1)
    fake.fail("nvmlDeviceGetFanSpeed", pynvml.NVML_ERROR_NO_PERMISSION, gpu=1, times=2)
    for _ in range(2):
        assert pynvml.nvmlDeviceGetFanSpeed(handle) == 30
        refused(pynvml.NVML_ERROR_NO_PERMISSION, pynvml.nvmlDeviceGetFanSpeed, other)
    assert pynvml.nvmlDeviceGetFanSpeed(other) == 30
    fake.fail("nvmlDeviceGetFanSpeed", pynvml.NVML_ERROR_UNKNOWN)
    refused(pynvml.NVML_ERROR_UNKNOWN, pynvml.nvmlDeviceGetFanSpeed, handle)
    fake.fail("nvmlDeviceGetFanSpeed", pynvml.NVML_ERROR_TIMEOUT)  # the same again replaces
    refused(pynvml.NVML_ERROR_TIMEOUT, pynvml.nvmlDeviceGetFanSpeed, other)
    fake.recover("nvmlDeviceGetFanSpeed")
    assert pynvml.nvmlDeviceGetFanSpeed(handle) == 30


def test_looking_up_one_gpu_may_fail(fake: FakeNvml) -> None:
    fake.add_gpu(uuid="GPU-second")
    fake.fail("nvmlDeviceGetHandleByIndex_v2", pynvml.NVML_ERROR_IRQ_ISSUE, gpu=1)
    pynvml.nvmlDeviceGetHandleByIndex(0)
    refused(pynvml.NVML_ERROR_IRQ_ISSUE, pynvml.nvmlDeviceGetHandleByIndex, 1)


def test_a_fault_of_one_mig_device_leaves_its_neighbours_alone(gpu: FakeGpu, handle: Any) -> None:
    one, two = gpu.add_mig(), gpu.add_mig()
    gpu.fake.fail("nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_UNKNOWN, gpu=two)
    pynvml.nvmlDeviceGetMemoryInfo(handle)
    pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, one.slot))
    bad = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, two.slot)
    refused(pynvml.NVML_ERROR_UNKNOWN, pynvml.nvmlDeviceGetMemoryInfo, bad)


def test_a_hidden_function_looks_like_one_the_driver_lacks(fake: FakeNvml, handle: Any) -> None:
    fake.hide("nvmlDeviceGetMemoryInfo_v2")
    with pytest.raises(pynvml.NVMLError_FunctionNotFound):
        pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2)
    pynvml.nvmlDeviceGetMemoryInfo(handle)


def test_initialising_may_fail(driver: FakeNvml) -> None:
    driver.fail("nvmlInitWithFlags", pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, times=1)
    refused(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, pynvml.nvmlInit)
    pynvml.nvmlInit()


def test_a_lost_gpu_answers_nothing_and_the_others_everything(fake: FakeNvml, handle: Any) -> None:
    fake.add_gpu()
    fake.gpus[0].lost = True
    lost = pynvml.NVML_ERROR_GPU_IS_LOST
    refused(lost, pynvml.nvmlDeviceGetName, handle)
    refused(lost, pynvml.nvmlDeviceGetComputeRunningProcesses, handle)
    refused(lost, pynvml.nvmlDeviceGetHandleByIndex, 0)
    refused(lost, pynvml.nvmlDeviceGetHandleByUUID, fake.gpus[0].uuid)
    assert pynvml.nvmlDeviceGetCount() == 2
    assert pynvml.nvmlDeviceGetFanSpeed(pynvml.nvmlDeviceGetHandleByIndex(1)) == 30


def test_a_hanging_call_holds_only_its_own_thread_and_can_be_released(fake: FakeNvml, handle: Any) -> None:
    fake.hang("nvmlDeviceGetPowerUsage", 0.05)
    start = time.monotonic()
    pynvml.nvmlDeviceGetPowerUsage(handle)
    assert time.monotonic() - start >= 0.05
    fake.hang("nvmlDeviceGetPowerUsage", 10 * PATIENCE_S)
    thread = threading.Thread(target=pynvml.nvmlDeviceGetPowerUsage, args=(handle,))
    thread.start()
    assert pynvml.nvmlDeviceGetFanSpeed(handle) == 30
    assert thread.is_alive()
    fake.recover()
    thread.join()


# ---- Counting ------------------------------------------------------------------------------------


def test_calls_are_counted_by_function_and_gpu(fake: FakeNvml, handle: Any) -> None:
    fake.add_gpu()
    other = pynvml.nvmlDeviceGetHandleByIndex(1)
    for device in (handle, handle, other):
        pynvml.nvmlDeviceGetFanSpeed(device)
    counts = [fake.calls("nvmlDeviceGetFanSpeed", gpu) for gpu in (None, 0, fake.gpus[1])]
    assert counts == [3, 2, 1]
    assert fake.calls("nvmlInitWithFlags") == 1
    fake.reset_calls()
    assert fake.total_calls() == 0


def test_time_is_counted_only_on_demand(fake: FakeNvml, handle: Any) -> None:
    pynvml.nvmlDeviceGetFanSpeed(handle)
    assert fake.total_nanoseconds == 0
    fake.time_calls = True
    fake.hang("nvmlDeviceGetFanSpeed", 0.01)
    pynvml.nvmlDeviceGetFanSpeed(handle)
    assert fake.total_nanoseconds >= 10_000_000


def test_calls_of_several_threads_and_processes_are_all_counted(fake: FakeNvml, handle: Any) -> None:
    def ask() -> None:
        for _ in range(500):
            pynvml.nvmlDeviceGetFanSpeed(handle)

    script = """if True:
        import json, pynvml
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        print(json.dumps([pynvml.nvmlDeviceGetFanSpeed(handle) for _ in range(500)]))
    """
    environment = {**os.environ, **fake_nvml.environment(fake)}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert child.stdout
        assert json.loads(child.stdout.read()) == [30] * 500
    assert fake.calls("nvmlDeviceGetFanSpeed", 0) == 2500
