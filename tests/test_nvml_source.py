"""NvmlSource over the real pynvml and the fake driver: units, what is missing, faults, and coming back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import fake_nvml
import pynvml
import pytest
from fake_nvml import GIB, FakeGpu, FakeMig, FakeNvml, Unterminated
from nvml_codes import CODES, each_code, each_error_of, each_outcome

from gpumon_core.metrics import GPU_METRICS, TICK_COLUMNS
from gpumon_core.telemetry import nvml
from gpumon_core.telemetry.gate import LOST, SESSION_OVER, UNSUPPORTED
from gpumon_core.telemetry.nvml import NvmlSource
from gpumon_core.telemetry.records import GpuInfo, ProcessReading, Snapshot, SourceUnavailable

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
FINDING_CALLS = ("nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2")
SESSION_CALLS = ("nvmlInitWithFlags", "nvmlShutdown", "nvmlSystemGetProcessName")

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


class Lacking:
    """The library without some of its symbols, as ctypes shows one: AttributeError."""

    def __init__(self, *absent: str) -> None:
        self._absent = absent

    def __getattr__(self, name: str) -> Any:
        if name in self._absent:
            raise AttributeError(f"undefined symbol: {name}")
        return getattr(fake_nvml.library(), name)


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


# ---- What arrives --------------------------------------------------------------------------------


def test_the_main_metrics_arrive_in_their_units(driver: FakeNvml) -> None:
    assert values(source().read()) == BUSY_VALUES


def test_a_number_has_the_type_of_its_column(driver: FakeNvml) -> None:
    driver.gpus[0].memory_used = 10 * GIB + 700 * 1024
    found = values(source().read())
    assert found["memory"] == 10241
    assert all(isinstance(found[m.key], int) for m in GPU_METRICS if m.key in found and m.column == "integer")


def test_every_fact_arrives_in_its_unit(driver: FakeNvml) -> None:
    snapshot = source().read()
    assert snapshot.timestamp == 1_700_000_000.5
    assert snapshot.host.name == "testhost"
    assert snapshot.host.driver_version == "580.159.03"
    assert snapshot.host.cuda_version == "13.0"
    assert snapshot.host.nvml_version == "13.580.159.03"
    assert snapshot.gpus[0] == GpuInfo(
        index=0,
        uuid="GPU-first",
        name="NVIDIA RTX A6000",
        memory_total_mib=48 * 1024,
        power_limit_w=280.0,
        pci_bus_id="00000000:01:00.0",
        architecture="Ampere",
        compute_capability="8.6",
        memory_from="device",
    )
    assert [gpu.index for gpu in snapshot.gpus] == [0, 1]
    assert snapshot.lost == frozenset()


@pytest.mark.parametrize(("number", "text"), [(13000, "13.0"), (12080, "12.8"), (11040, "11.4"), (10020, "10.2")])
def test_the_cuda_version_reads_as_nvidia_writes_it(driver: FakeNvml, number: int, text: str) -> None:
    driver.cuda_version = number
    assert source().host.cuda_version == text


@pytest.mark.parametrize(("code", "name"), [(2, "Kepler"), (7, "Ampere"), (9, "Hopper"), (10, "Blackwell")])
def test_an_architecture_has_its_name(driver: FakeNvml, code: int, name: str) -> None:
    driver.gpus[0].architecture = code
    assert source().read().gpus[0].architecture == name


@pytest.mark.parametrize("code", [0xFFFFFFFF, 4711, None])
def test_an_architecture_newer_than_pynvml_is_none(driver: FakeNvml, code: int | None) -> None:
    driver.gpus[0].architecture = code
    assert source().read().gpus[0].architecture is None


def test_a_board_without_enforced_power_limit_has_the_limit_that_was_set(driver: FakeNvml) -> None:
    driver.gpus[0].power_enforced_limit_mw = None
    driver.gpus[0].power_limit_mw = 250_000
    assert source().read().gpus[0].power_limit_w == 250.0


def test_memory_used_leaves_out_what_the_driver_reserves_as_nvidia_smi_does(driver: FakeNvml) -> None:
    assert values(source().read())["memory"] == 10 * 1024


def test_memory_used_on_an_old_driver_is_its_first_version(driver: FakeNvml) -> None:
    driver.hide("nvmlDeviceGetMemoryInfo_v2")
    assert values(source().read())["memory"] == 10 * 1024 + 600


def test_the_next_reading_is_new(driver: FakeNvml) -> None:
    reader = source()
    reader.read()
    driver.gpus[0].temperature = 75
    assert values(reader.read())["temperature"] == 75


# ---- What is missing -----------------------------------------------------------------------------

BEHIND = {
    "temperature": "temperature",
    "utilization": "gpu_utilization",
    "memory": "memory_used",
    "power": "power_mw",
    "memory_utilization": "memory_utilization",
    "fan_speed": "fan",
    "sm_clock": "sm_clock",
    "memory_clock": "memory_clock",
}


@pytest.mark.parametrize("key", list(BUSY_VALUES))
def test_a_metric_that_the_board_lacks_is_none_and_the_others_stay(driver: FakeNvml, key: str) -> None:
    setattr(driver.gpus[0], BEHIND[key], None)
    with_it = {"utilization", "memory_utilization"} if "utilization" in key else {key}
    assert values(source().read()) == {**BUSY_VALUES, **dict.fromkeys(with_it)}


@pytest.mark.parametrize("key", list(BUSY_VALUES))
def test_zero_is_a_value(driver: FakeNvml, key: str) -> None:
    setattr(driver.gpus[0], BEHIND[key], 0)
    assert values(source().read()) == {**BUSY_VALUES, key: 0}


@pytest.mark.parametrize("key", sorted(set(BEHIND) - {"temperature"}))
@pytest.mark.parametrize("sentinel", [0xFFFFFFFF, 2**64 - 1])
def test_all_bits_set_is_no_value(driver: FakeNvml, key: str, sentinel: int) -> None:
    # A number of the fake is signed: the largest unsigned one is -1 there.
    setattr(driver.gpus[0], BEHIND[key], -1 if sentinel == 2**64 - 1 else sentinel)
    assert values(source().read()) == {**BUSY_VALUES, key: None}


@pytest.mark.parametrize("fact", ["memory_total", "power_enforced_limit_mw"])
def test_a_fact_with_all_bits_set_is_none(driver: FakeNvml, fact: str) -> None:
    setattr(driver.gpus[0], fact, -1)
    driver.gpus[0].power_limit_mw = None
    found = source().read().gpus[0]
    assert (found.memory_total_mib if fact == "memory_total" else found.power_limit_w) is None


def test_a_board_that_offers_nothing_still_is_a_gpu(fake: FakeNvml) -> None:
    bare = fake.add_gpu(name=None, memory_total=None)
    for name, attribute in vars(FakeGpu).items():
        if type(attribute).__name__ in ("Number", "Text"):
            setattr(bare, name, None)
    with fake_nvml.loaded(fake):
        snapshot = source().read()
    assert snapshot.gpus == (GpuInfo(index=0, uuid="PCI-0"),)
    assert dict(snapshot.readings[0].values) == dict.fromkeys(TICK_COLUMNS)


def test_two_boards_without_uuid_are_told_apart_by_their_place_on_the_bus(fake: FakeNvml) -> None:
    fake.add_gpu().uuid = None
    fake.add_gpu().uuid = None
    with fake_nvml.loaded(fake):
        assert uuids(source().read()) == ["PCI-00000000:01:00.0", "PCI-00000000:02:00.0"]


def test_a_machine_without_gpus_has_an_empty_snapshot(fake: FakeNvml) -> None:
    with fake_nvml.loaded(fake):
        snapshot = source().read()
    assert (snapshot.gpus, snapshot.readings, snapshot.processes) == ((), (), ())


def test_a_container_without_libcuda_has_gpus_and_no_cuda_version(driver: FakeNvml) -> None:
    # nvmlSystemGetCudaDriverVersion_v2 then says LIBRARY_NOT_FOUND, which is about libcuda and not NVML.
    driver.cuda_version = None
    snapshot = source().read()
    assert snapshot.host.cuda_version is None
    assert values(snapshot) == BUSY_VALUES


# ---- Asking no more than needed ------------------------------------------------------------------


def test_static_facts_are_asked_once(driver: FakeNvml) -> None:
    reader = source()
    reader.read()
    driver.reset_calls()
    for _ in range(5):
        reader.read()
    once = [*FACT_CALLS, *MIG_CALLS, *SYSTEM_CALLS, *FINDING_CALLS]
    assert {name: driver.calls(name) for name in once} == dict.fromkeys(once, 0)


def test_one_call_yields_all_its_metrics(driver: FakeNvml) -> None:
    reader = source()
    reader.read()
    driver.reset_calls()
    reader.read()
    assert driver.calls("nvmlDeviceGetUtilizationRates", 0) == 1
    assert driver.calls("nvmlDeviceGetMemoryInfo_v2", 0) == 1
    assert driver.calls("nvmlDeviceGetClockInfo", 0) == 4


@pytest.mark.parametrize("code", sorted(UNSUPPORTED))
@pytest.mark.parametrize("function", READING_CALLS)
def test_what_a_device_does_not_support_is_asked_once_and_others_still_are(
    driver: FakeNvml, function: str, code: int
) -> None:
    hide_newer(driver, function)
    driver.fail(function, code, gpu=0)
    reader = source()
    driver.reset_calls()
    for _ in range(3):
        reader.read()
    arguments = 4 if function == "nvmlDeviceGetClockInfo" else 1
    # One is for what is read with every tick, and for what is read rarely.
    rarely = int(function == "nvmlDeviceGetMemoryInfo_v2")
    assert driver.calls(function, 0) == arguments + rarely
    assert driver.calls(function, 1) == 3 * arguments + rarely


def test_what_is_not_supported_is_nothing_to_log(driver: FakeNvml, caplog: pytest.LogCaptureFixture) -> None:
    driver.gpus[0].fan = driver.gpus[0].power_mw = None
    reader = source()
    for _ in range(3):
        reader.read()
    assert caplog.messages == []


# ---- Every error of every call -------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", ["NOT_SUPPORTED", "FUNCTION_NOT_FOUND", "ARGUMENT_VERSION_MISMATCH", "DEPRECATED"]
)
def test_what_a_driver_does_not_have_is_asked_in_the_older_way(driver: FakeNvml, error: str) -> None:
    driver.fail("nvmlDeviceGetMemoryInfo_v2", CODES[error])
    assert values(source().read()) == {**BUSY_VALUES, "memory": 10240 + 600}


@pytest.mark.parametrize("error", ["GPU_IS_LOST", "RESET_REQUIRED", "GPU_NOT_FOUND"])
def test_these_errors_mean_that_the_gpu_is_lost(driver: FakeNvml, error: str) -> None:
    reader = source()
    driver.fail("nvmlDeviceGetPowerUsage", CODES[error], gpu=0)
    assert reader.read().lost == {"GPU-first"}


@pytest.mark.parametrize("error", ["UNINITIALIZED", "DRIVER_NOT_LOADED", "LIB_RM_VERSION_MISMATCH"])
def test_these_errors_mean_that_the_driver_went_away(driver: FakeNvml, error: str) -> None:
    reader = source()
    driver.fail("nvmlDeviceGetPowerUsage", CODES[error], gpu=0)
    expect_unavailable(reader.read)


def expect_unavailable(call: Callable[[], object]) -> None:
    with pytest.raises(SourceUnavailable) as caught:
        call()
    assert str(caught.value)
    assert caught.value.remedy


@each_error_of(READING_CALLS)
def test_an_error_costs_the_reading_that_it_concerns(driver: FakeNvml, function: str, code: int) -> None:
    hide_newer(driver, function)
    reader = source()
    before = reader.read()
    driver.fail(function, code, gpu=0)
    if code in SESSION_OVER:
        expect_unavailable(reader.read)
        driver.recover(function)
        hide_newer(driver, function)
        assert main(reader.read()) == main(before)
        return
    during = reader.read()
    assert during.gpus == before.gpus
    assert values(during, "GPU-second") == values(before, "GPU-second")
    if code in LOST:
        assert during.lost == {"GPU-first"}
        assert [reading.uuid for reading in during.readings] == ["GPU-second"]
        assert during.processes == ()
        return
    assert during.lost == frozenset()
    expected = {**values(before), **dict.fromkeys(READING_CALLS[function])}
    listed = seen(before)
    if code in UNSUPPORTED and function in OLDER:
        expected = {**values(before)}
        expected["memory"] = 10840 if function.endswith("MemoryInfo_v2") else before.readings[0].values["memory"]
    elif "Processes" in function:
        kind = next(kind for kind in ("MPS", "Graphics", "Compute") if kind in function)
        listed = {row for row in listed if row[2] != kind[0]}
    assert values(during) == expected
    assert seen(during) == listed
    driver.recover(function)
    if code not in UNSUPPORTED:
        hide_newer(driver, function)
        assert main(reader.read()) == main(before)


@each_error_of(FACT_CALLS)
def test_an_error_costs_the_fact_that_it_concerns(driver: FakeNvml, function: str, code: int) -> None:
    if function == "nvmlDeviceGetPowerManagementLimit":
        driver.gpus[0].power_enforced_limit_mw = None
    whole = source().read()
    driver.fail(function, code, gpu=0)
    if code in SESSION_OVER:
        expect_unavailable(source)
        driver.recover()
        assert main(source().read()) == main(whole)
        return
    found = source().read()
    assert found.gpus[-1] == whole.gpus[1]
    assert values(found, "GPU-second") == values(whole, "GPU-second")
    if code in LOST:
        assert uuids(found) == ["GPU-second"]
        return
    expected: dict[str, Any] = dict.fromkeys(FACT_CALLS[function])
    if function == "nvmlDeviceGetUUID":
        expected = {"uuid": "PCI-00000000:01:00.0"}
    elif function == "nvmlDeviceGetEnforcedPowerLimit":
        expected = {"power_limit_w": 300.0}
    for field in GpuInfo.__slots__:
        assert getattr(found.gpus[0], field) == expected.get(field, getattr(whole.gpus[0], field))
    assert values(found, found.gpus[0].uuid) == BUSY_VALUES


@each_error_of(MIG_CALLS)
def test_an_error_about_mig_leaves_the_other_gpus_alone(
    driver: FakeNvml, migs: tuple[FakeMig, FakeMig], function: str, code: int
) -> None:
    driver.fail(function, code, gpu=0)
    if code in SESSION_OVER:
        expect_unavailable(source)
        return
    found = source().read()
    assert "GPU-second" in uuids(found)
    assert values(found, "GPU-second")["temperature"] == 40
    assert "GPU-first" in uuids(found)
    # Wherever they are shown, each is shown once.
    assert sorted(process.pid for process in found.processes) == [101, 102]


@each_error_of(SYSTEM_CALLS)
def test_an_error_about_the_driver_costs_one_line_of_the_host(driver: FakeNvml, function: str, code: int) -> None:
    if function == "nvmlSystemGetCudaDriverVersion":
        driver.hide("nvmlSystemGetCudaDriverVersion_v2")
    whole = source().read()
    driver.fail(function, code)
    if code in SESSION_OVER | LOST:
        expect_unavailable(source)
        driver.recover(function)
        assert values(source().read()) == BUSY_VALUES
        return
    found = source().read()
    lost = None if function != "nvmlSystemGetCudaDriverVersion_v2" else "13.0"
    for field in ("driver_version", "nvml_version", "cuda_version"):
        assert getattr(found.host, field) == (
            lost if field == SYSTEM_CALLS[function] else getattr(whole.host, field)
        )
    assert found.readings == whole.readings


@each_code
def test_a_gpu_that_cannot_be_opened_leaves_the_others_alone(
    driver: FakeNvml, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    driver.fail("nvmlDeviceGetHandleByIndex_v2", code, gpu=0)
    if code in SESSION_OVER:
        expect_unavailable(source)
        return
    reader = source()
    assert uuids(reader.read()) == ["GPU-second"]
    driver.recover()
    monkeypatch.setattr(nvml, "RECOUNT_S", 0.0)
    assert uuids(reader.read()) == ["GPU-first", "GPU-second"]


@each_outcome
def test_an_error_while_counting_never_ends_the_readings(
    driver: FakeNvml, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(nvml, "RECOUNT_S", 0.0)
    reader = source()
    before = reader.read()
    driver.fail("nvmlDeviceGetCount_v2", code)
    if code in SESSION_OVER:
        expect_unavailable(reader.read)
        driver.recover()
    assert main(reader.read()) == main(before)


@each_code
def test_nvml_that_cannot_be_initialised_is_unavailable_with_a_remedy(driver: FakeNvml, code: int) -> None:
    driver.fail("nvmlInitWithFlags", code)
    expect_unavailable(source)


@each_code
def test_closing_never_fails(driver: FakeNvml, code: int) -> None:
    reader = source()
    driver.fail("nvmlShutdown", code)
    reader.close()
    reader.close()


@each_outcome
def test_a_process_whose_name_cannot_be_had_has_none(driver: FakeNvml, code: int) -> None:
    reader = source()
    assert reader.process_name(11) == "process-11"
    driver.fail("nvmlSystemGetProcessName", code)
    assert reader.process_name(11) is None


def test_the_name_of_a_process_needs_no_session(driver: FakeNvml) -> None:
    reader = source()
    reader.close()
    assert reader.process_name(11) is None


# ---- A library that lacks a symbol ---------------------------------------------------------------


@pytest.mark.parametrize("function", [*READING_CALLS, *FACT_CALLS, *SYSTEM_CALLS, *MIG_CALLS, *SESSION_CALLS[1:]])
def test_a_symbol_that_the_library_lacks_is_like_a_call_that_is_not_supported(
    driver: FakeNvml, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    driver.hide(function)
    hidden = source().read()
    driver.recover()
    use_library(monkeypatch, Lacking(function))
    reader = source()
    assert reader.read() == hidden
    reader.close()


def test_a_driver_that_only_knows_the_oldest_calls_still_gives_every_metric(
    driver: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_library(monkeypatch, Lacking(*OLDER, "nvmlSystemGetCudaDriverVersion_v2"))
    snapshot = source().read()
    assert values(snapshot) == {**BUSY_VALUES, "memory": 10240 + 600}
    assert snapshot.host.cuda_version == "13.0"
    rows = {("GPU-first", 11, "C", 1024), ("GPU-first", 12, "G", 1024), ("GPU-first", 13, "M", 1024)}
    assert seen(snapshot) == rows


def test_a_pynvml_that_lacks_a_function_uses_the_next_way(
    driver: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(pynvml, "nvmlDeviceGetTemperatureV")
    assert values(source().read()) == BUSY_VALUES


# ---- The log -------------------------------------------------------------------------------------


def test_a_failure_is_logged_once_and_not_every_tick(driver: FakeNvml, caplog: pytest.LogCaptureFixture) -> None:
    driver.fail("nvmlDeviceGetFanSpeed", pynvml.NVML_ERROR_UNKNOWN, gpu=0)
    reader = source()
    for _ in range(10):
        reader.read()
    (line,) = caplog.messages
    assert "GPU 0" in line
    assert "nvmlDeviceGetFanSpeed" in line
    assert "Unknown Error" in line


def test_each_device_call_and_error_has_a_line_of_its_own(
    driver: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    reader = source()
    driver.fail("nvmlDeviceGetFanSpeed", pynvml.NVML_ERROR_UNKNOWN)
    driver.fail("nvmlDeviceGetPowerUsage", pynvml.NVML_ERROR_TIMEOUT, gpu=1)
    reader.read()
    driver.recover("nvmlDeviceGetPowerUsage")
    driver.fail("nvmlDeviceGetPowerUsage", pynvml.NVML_ERROR_NO_DATA, gpu=1)
    for _ in range(3):
        reader.read()
    heads = sorted(line.split(" (further")[0] for line in caplog.messages)
    assert heads == [
        "GPU 0: nvmlDeviceGetFanSpeed failed: Unknown Error",
        "GPU 1: nvmlDeviceGetFanSpeed failed: Unknown Error",
        "GPU 1: nvmlDeviceGetPowerUsage failed: No data",
        "GPU 1: nvmlDeviceGetPowerUsage failed: Timeout",
    ]


def test_a_lost_gpu_is_logged_when_it_goes_and_when_it_returns(
    driver: FakeNvml, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "RETRY_S", 0.0)
    reader = source()
    driver.gpus[0].lost = True
    for _ in range(5):
        reader.read()
    assert [(record.levelname, "GPU-first" in record.message) for record in caplog.records] == [("ERROR", True)]
    driver.gpus[0].lost = False
    for _ in range(5):
        reader.read()
    assert len(caplog.records) == 2
    assert "answers again" in caplog.messages[1]


def test_what_fails_again_after_a_gpu_has_returned_is_logged_again(
    driver: FakeNvml, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "RETRY_S", 0.0)
    driver.fail("nvmlDeviceGetFanSpeed", pynvml.NVML_ERROR_UNKNOWN, gpu=0)
    reader = source()
    for lost in (False, True, False, False):
        driver.gpus[0].lost = lost
        reader.read()
    assert sum("nvmlDeviceGetFanSpeed" in line for line in caplog.messages) == 2


def test_a_gpu_lost_from_the_start_is_nameless_and_logged_once(
    driver: FakeNvml, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "RECOUNT_S", 0.0)
    driver.gpus[0].lost = True
    reader = source()
    for _ in range(5):
        snapshot = reader.read()
        assert (uuids(snapshot), snapshot.nameless) == (["GPU-second"], {0})
    assert len(caplog.messages) == 1
    driver.gpus[0].lost = False
    assert values(reader.read()) == BUSY_VALUES


# ---- Lost and found ------------------------------------------------------------------------------


def test_a_lost_gpu_is_named_and_the_others_go_on(driver: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = source()
    before = reader.read()
    driver.gpus[0].lost = True
    driver.gpus[1].temperature = 77
    during = reader.read()
    assert during.lost == {"GPU-first"}
    assert during.gpus == before.gpus
    assert [reading.uuid for reading in during.readings] == ["GPU-second"]
    assert values(during, "GPU-second")["temperature"] == 77
    monkeypatch.setattr(nvml, "RETRY_S", 0.0)
    driver.gpus[0].lost = False
    driver.gpus[1].temperature = 40
    assert main(reader.read()) == main(before)


def test_a_lost_gpu_is_left_alone_for_a_while(driver: FakeNvml) -> None:
    reader = source()
    driver.gpus[0].lost = True
    reader.read()
    driver.reset_calls()
    for _ in range(5):
        assert reader.read().lost == {"GPU-first"}
    assert sum(driver.calls(name, 0) for name in fake_nvml.functions()) == 0


def test_a_gpu_lost_half_way_through_a_reading_has_none(driver: FakeNvml) -> None:
    reader = source()
    driver.fail("nvmlDeviceGetMPSComputeRunningProcesses_v3", pynvml.NVML_ERROR_GPU_IS_LOST, gpu=0)
    snapshot = reader.read()
    assert snapshot.lost == {"GPU-first"}
    assert [reading.uuid for reading in snapshot.readings] == ["GPU-second"]
    assert snapshot.processes == ()


def test_a_lost_gpu_stays_listed_when_another_is_added(driver: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "RECOUNT_S", 0.0)
    reader = source()
    driver.gpus[0].lost = True
    reader.read()
    driver.add_gpu(uuid="GPU-third")
    snapshot = reader.read()
    assert uuids(snapshot) == ["GPU-first", "GPU-second", "GPU-third"]
    assert snapshot.lost == {"GPU-first"}


def test_a_gpu_that_is_added_or_taken_away_is_noticed(driver: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = source()
    driver.add_gpu(uuid="GPU-third", temperature=50)
    assert len(reader.read().gpus) == 2, "the number of GPUs is not asked at every tick"
    monkeypatch.setattr(nvml, "RECOUNT_S", 0.0)
    snapshot = reader.read()
    assert values(snapshot, "GPU-third")["temperature"] == 50
    assert info(snapshot, "GPU-third").index == 2
    driver.gpus[0].remove()
    assert uuids(reader.read()) == ["GPU-second", "GPU-third"]


# ---- The driver comes and goes -------------------------------------------------------------------


def test_no_library_is_unavailable_and_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> object:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pynvml, "CDLL", no_library)
    use_library(monkeypatch, None)
    with pytest.raises(SourceUnavailable, match="Not Found") as caught:
        source()
    assert "Install the NVIDIA driver" in caught.value.remedy


def test_a_driver_that_is_not_loaded_is_unavailable_and_says_how_to_load_it(driver: FakeNvml) -> None:
    driver.driver_loaded = False
    with pytest.raises(SourceUnavailable, match="Driver Not Loaded") as caught:
        source()
    assert "modprobe nvidia" in caught.value.remedy


def test_a_driver_unloaded_half_way_is_used_again_once_it_is_back(
    driver: FakeNvml, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "LONGEST_PAUSE_S", 0.0)
    reader = source()
    before = reader.read()
    driver.driver_loaded = False
    for _ in range(3):
        expect_unavailable(reader.read)
    driver.driver_version = "590.44.01"
    driver.driver_loaded = True
    after = reader.read()
    assert after.host.driver_version == "590.44.01"
    assert main(replace(after, host=before.host)) == main(before)


def test_a_driver_reloaded_between_two_readings_costs_one(driver: FakeNvml) -> None:
    reader = source()
    before = reader.read()
    driver.driver_loaded = False
    driver.driver_loaded = True
    expect_unavailable(reader.read)
    assert main(reader.read()) == main(before)


def test_a_gpu_lost_over_a_reload_of_the_driver_is_nameless(driver: FakeNvml) -> None:
    reader = source()
    driver.gpus[0].lost = True
    reader.read()
    driver.driver_loaded = False
    expect_unavailable(reader.read)
    driver.driver_loaded = True
    snapshot = reader.read()
    assert (uuids(snapshot), snapshot.lost, snapshot.nameless) == (["GPU-second"], frozenset(), {0})


def test_what_a_new_driver_supports_is_asked_again(driver: FakeNvml) -> None:
    driver.hide("nvmlDeviceGetPowerUsage")
    reader = source()
    assert values(reader.read())["power"] is None
    driver.driver_loaded = False
    expect_unavailable(reader.read)
    driver.recover()
    driver.driver_loaded = True
    assert values(reader.read()) == BUSY_VALUES


def test_a_closed_source_opens_again_when_it_is_read(driver: FakeNvml) -> None:
    reader = source()
    before = reader.read()
    reader.close()
    assert main(reader.read()) == main(before)


# ---- Texts that are not text ---------------------------------------------------------------------

GARBAGE = [b"\xff\xfe\x80 board", b"\xc3", bytes(range(128, 160))]


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("attribute", ["name", "uuid", "pci_bus_id"])
def test_a_text_of_a_gpu_that_is_not_utf_8_costs_that_text(
    driver: FakeNvml, attribute: str, garbage: bytes
) -> None:
    setattr(driver.gpus[0], attribute, garbage)
    snapshot = source().read()
    first = snapshot.gpus[0]
    assert getattr(first, attribute) == ("PCI-00000000:01:00.0" if attribute == "uuid" else None)
    assert values(snapshot, first.uuid) == BUSY_VALUES
    assert snapshot.gpus[1].name == "NVIDIA RTX A6000"


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("attribute", ["driver_version", "nvml_version"])
def test_a_text_of_the_driver_that_is_not_utf_8_costs_that_text(
    driver: FakeNvml, attribute: str, garbage: bytes
) -> None:
    setattr(driver, attribute, garbage)
    snapshot = source().read()
    assert getattr(snapshot.host, attribute) is None
    assert values(snapshot) == BUSY_VALUES


@pytest.mark.parametrize("attribute", ["name", "uuid", "pci_bus_id"])
def test_a_text_without_end_does_no_harm(driver: FakeNvml, attribute: str) -> None:
    setattr(driver.gpus[0], attribute, Unterminated(b"NVIDIA"))
    driver.driver_version = Unterminated(b"580.")
    snapshot = source().read()
    first = snapshot.gpus[0]
    assert str(getattr(first, attribute)).startswith("NVIDIA")
    assert values(snapshot, first.uuid) == BUSY_VALUES
    assert str(snapshot.host.driver_version).startswith("580.580.")


@pytest.mark.parametrize("name", [b"\xff\xfe", Unterminated(b"\xe4bc"), None, b""])
def test_a_process_whose_name_is_not_text_has_none(driver: FakeNvml, name: bytes | None) -> None:
    driver.gpus[0].add_process(77, GIB, name=name)
    assert source().process_name(77) is None


def test_the_name_of_a_process_is_its_programs(driver: FakeNvml) -> None:
    driver.gpus[0].add_process(77, GIB, name="/opt/My Tools/träiner")
    assert source().process_name(77) == "träiner"


# ---- MIG -----------------------------------------------------------------------------------------


def test_a_mig_instance_is_a_gpu_below_its_parent(driver: FakeNvml, migs: tuple[FakeMig, FakeMig]) -> None:
    snapshot = source().read()
    assert uuids(snapshot) == ["GPU-first", "MIG-a", "MIG-b", "GPU-second"]
    assert info(snapshot, "MIG-b") == GpuInfo(
        index=0,
        uuid="MIG-b",
        name="NVIDIA RTX A6000 MIG 1g.20gb",
        memory_total_mib=20 * 1024,
        pci_bus_id="00000000:01:00.0",
        architecture="Ampere",
        compute_capability="8.6",
        parent_uuid="GPU-first",
        mig_index=3,
        gpu_instance=migs[1].gpu_instance_id,
        memory_from="device",
    )
    assert info(snapshot, "MIG-a").mig_index == 0
    assert info(snapshot, "GPU-first").parent_uuid is None


def test_a_mig_instance_has_its_own_readings(driver: FakeNvml, migs: tuple[FakeMig, FakeMig]) -> None:
    snapshot = source().read()
    assert values(snapshot, "MIG-a") == {**dict.fromkeys(BUSY_VALUES), "memory": 3 * 1024}
    assert values(snapshot, "MIG-b")["memory"] == 5 * 1024
    parent = values(snapshot)
    assert (parent["temperature"], parent["power"]) == (61, 231.456)
    assert parent["utilization"] is None, "NVML does not offer it in MIG mode"


def test_a_process_on_a_mig_instance_is_listed_once_and_there(
    driver: FakeNvml, migs: tuple[FakeMig, FakeMig]
) -> None:
    driver.gpus[0].add_process(103, GIB)
    driver.gpus[1].add_process(101, 2 * GIB)
    assert seen(source().read()) == {
        ("MIG-a", 101, "C", 1024),
        ("MIG-b", 102, "C", 1024),
        ("GPU-first", 103, "C", 1024),
        ("GPU-second", 101, "C", 2048),
    }


def test_two_compute_instances_of_one_gpu_instance_are_told_apart(driver: FakeNvml) -> None:
    driver.clear_processes()
    gpu = driver.gpus[0]
    for number in (0, 1):
        mig = gpu.add_mig(uuid=f"MIG-{number}", gpu_instance_id=7, compute_instance_id=number)
        gpu.add_process(200 + number, GIB, mig=mig)
    assert seen(source().read()) == {("MIG-0", 200, "C", 1024), ("MIG-1", 201, "C", 1024)}


def test_a_gpu_with_mig_mode_off_has_no_instances(driver: FakeNvml, migs: tuple[FakeMig, FakeMig]) -> None:
    driver.gpus[0].mig_enabled = 0
    assert uuids(source().read()) == ["GPU-first", "GPU-second"]


def test_a_lost_gpu_loses_its_instances_too(driver: FakeNvml, migs: tuple[FakeMig, FakeMig]) -> None:
    reader = source()
    driver.gpus[0].lost = True
    snapshot = reader.read()
    assert snapshot.lost == {"GPU-first", "MIG-a", "MIG-b"}
    assert [reading.uuid for reading in snapshot.readings] == ["GPU-second"]


def test_an_empty_mig_slot_is_nothing_to_log(
    driver: FakeNvml, migs: tuple[FakeMig, FakeMig], caplog: pytest.LogCaptureFixture
) -> None:
    source().read()
    assert caplog.messages == []


def test_instances_that_are_made_or_destroyed_are_noticed(
    driver: FakeNvml, migs: tuple[FakeMig, FakeMig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "RECOUNT_S", 0.0)
    reader = source()
    migs[0].remove()
    driver.remove_process(101)
    assert uuids(reader.read()) == ["GPU-first", "MIG-b", "GPU-second"]
    new = driver.gpus[0].add_mig(uuid="MIG-new")
    driver.gpus[0].add_process(104, GIB, mig=new)
    snapshot = reader.read()
    assert uuids(snapshot) == ["GPU-first", "MIG-new", "MIG-b", "GPU-second"]
    assert ProcessReading("MIG-new", 104, "C", 1024) in snapshot.processes
    driver.gpus[0].mig_enabled = 0
    assert uuids(reader.read()) == ["GPU-first", "GPU-second"]


def test_mig_mode_switched_on_is_noticed(driver: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "RECOUNT_S", 0.0)
    reader = source()
    driver.gpus[1].add_mig(uuid="MIG-x")
    assert uuids(reader.read()) == ["GPU-first", "GPU-second", "MIG-x"]


def test_gpus_that_stay_as_they_are_keep_what_is_known_of_them(
    driver: FakeNvml, migs: tuple[FakeMig, FakeMig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "RECOUNT_S", 0.0)
    reader = source()
    driver.reset_calls()
    for _ in range(3):
        reader.read()
    assert driver.calls("nvmlDeviceGetName") == 0
