"""Every error of every call costs the reading that it concerns; a library may lack symbols."""

from __future__ import annotations

from typing import Any

import busy_driver
import fake_nvml
import pynvml
import pytest
from busy_driver import (
    BUSY_VALUES,
    FACT_CALLS,
    MIG_CALLS,
    OLDER,
    READING_CALLS,
    SYSTEM_CALLS,
    expect_unavailable,
    hide_newer,
    main,
    seen,
    source,
    use_library,
    uuids,
    values,
)
from fake_nvml import FakeMig, FakeNvml
from nvml_codes import CODES, each_code, each_error_of, each_outcome

from gpumon_core.telemetry import nvml
from gpumon_core.telemetry.gate import LOST, SESSION_OVER, UNSUPPORTED
from gpumon_core.telemetry.records import GpuInfo

# The fixtures that these tests share.
driver, migs, _log = busy_driver.driver, busy_driver.migs, busy_driver._log


SESSION_CALLS = ("nvmlInitWithFlags", "nvmlShutdown", "nvmlSystemGetProcessName")


class Lacking:
    """The library without some of its symbols, as ctypes shows one: AttributeError."""

    def __init__(self, *absent: str) -> None:
        self._absent = absent

    def __getattr__(self, name: str) -> Any:
        if name in self._absent:
            raise AttributeError(f"undefined symbol: {name}")
        return getattr(fake_nvml.library(), name)


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
