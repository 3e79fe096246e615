"""MIG instances: GPUs below their parent, with readings and processes of their own."""

from __future__ import annotations

import busy_driver
import pytest
from busy_driver import BUSY_VALUES, info, seen, source, uuids, values
from fake_nvml import GIB, FakeMig, FakeNvml

from gpumon_core.telemetry import nvml
from gpumon_core.telemetry.records import GpuInfo, ProcessReading

# The fixtures that these tests share.
driver, migs, _log = busy_driver.driver, busy_driver.migs, busy_driver._log


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


def test_two_compute_instances_of_one_gpu_instance_are_distinguished(driver: FakeNvml) -> None:
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
