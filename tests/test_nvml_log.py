"""A failure of the driver is logged once for its device, its call and its error."""

from __future__ import annotations

import busy_driver
import pynvml
import pytest
from busy_driver import BUSY_VALUES, source, uuids, values
from fake_nvml import FakeNvml

from gpumon_core.telemetry import nvml

# The fixtures that these tests share.
driver, _log = busy_driver.driver, busy_driver._log


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
