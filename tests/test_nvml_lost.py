"""GPUs that are lost, added or taken away, and a driver that goes and comes back."""

from __future__ import annotations

from dataclasses import replace

import busy_driver
import fake_nvml
import pynvml
import pytest
from busy_driver import BUSY_VALUES, expect_unavailable, info, main, source, use_library, uuids, values
from fake_nvml import FakeNvml

from gpumon_core.telemetry import nvml
from gpumon_core.telemetry.records import SourceUnavailable

# The fixtures that these tests share.
driver, _log = busy_driver.driver, busy_driver._log


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
