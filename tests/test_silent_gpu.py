"""A GPU that answers nothing is lost, whatever its error; one that cannot be identified is listed by its place."""

from __future__ import annotations

import json
import logging
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_nvml
import pynvml
import pytest
from conftest import PATIENCE_S
from fake_nvml import GIB, FakeGpu, FakeNvml

from gpumon_core import doctor, settings
from gpumon_core.attribution.local import LocalAttribution
from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.cli import glance
from gpumon_core.export import snapshot as export
from gpumon_core.metrics import GPU_METRICS
from gpumon_core.recording import collector, health
from gpumon_core.recording.state import State
from gpumon_core.store import database
from gpumon_core.store.queries import current
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry import devices, nvml, remedies
from gpumon_core.telemetry.gate import LOST, SESSION_OVER, UNSUPPORTED
from gpumon_core.telemetry.nvml import NvmlSource
from gpumon_core.telemetry.records import GpuReading, HostInfo, Snapshot

# Every error but those that mean the whole session, or that one GPU is lost.
CODES = {
    name.removeprefix("NVML_ERROR_"): value
    for name, value in sorted(vars(pynvml).items())
    if name.startswith("NVML_ERROR_") and isinstance(value, int) and value not in SESSION_OVER | LOST
}
EACH_CODE = pytest.mark.parametrize("code", CODES.values(), ids=CODES)


@pytest.fixture
def driver(fake: FakeNvml) -> Iterator[FakeNvml]:
    """Two GPUs that offer all, with a process each, and pynvml pointed at them."""
    for index, uuid in enumerate(("GPU-first", "GPU-second")):
        gpu = fake.add_gpu(uuid=uuid, gpm_supported=1, temperature=61)
        gpu.set_gpm(pynvml.NVML_GPM_METRIC_SM_UTIL, 44.0)
        gpu.add_process(11 + index, GIB)
    with fake_nvml.loaded(fake):
        yield fake


@pytest.fixture
def begin(driver: FakeNvml) -> Iterator[Callable[[], NvmlSource]]:
    begun: list[NvmlSource] = []

    def source() -> NvmlSource:
        begun.append(NvmlSource("here"))
        return begun[-1]

    yield source
    driver.recover()
    for each in begun:
        each.close()


@pytest.fixture(autouse=True)
def _log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("gpumon_core"), "propagate", True)


# What a reading asks, and what identifies the GPU.
READING = (
    *("TemperatureV", "Temperature", "UtilizationRates", "MemoryInfo", "MemoryInfo_v2", "PowerUsage", "FanSpeed"),
    *("ClockInfo", "EncoderUtilization", "DecoderUtilization", "JpgUtilization", "OfaUtilization"),
    *("PcieThroughput", "PerformanceState", "CurrentClocksEventReasons", "CurrentClocksThrottleReasons"),
    *("TotalEnergyConsumption", "Samples", "FieldValues", "ProcessUtilization", "ProcessesUtilizationInfo"),
    *("MigMode", "EnforcedPowerLimit", "PowerManagementLimit"),
    *(f"{k}RunningProcesses{v}" for k in ("Compute", "Graphics", "MPSCompute") for v in ("_v3", "_v2", "")),
)
FACTS = ("UUID", "Name", "PciInfo_v3", "CudaComputeCapability", "Architecture")


def fail(driver: FakeNvml, gpu: FakeGpu | None, code: int, names: tuple[str, ...]) -> None:
    for name in names:
        driver.fail(f"nvmlDeviceGet{name}", code, gpu)
    for name in ("nvmlGpmQueryDeviceSupport", "nvmlGpmSampleGet"):
        driver.fail(name, code, gpu)


def uuids(snapshot: Snapshot) -> list[str]:
    return [gpu.uuid for gpu in snapshot.gpus]


# ---- Silent --------------------------------------------------------------------------------------


@EACH_CODE
def test_a_gpu_whose_calls_all_fail_is_lost_until_one_answers(
    driver: FakeNvml, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(nvml, "RETRY_S", 0.0)
    source = begin()
    before = source.read()
    assert not before.lost
    fail(driver, driver.gpus[1], code, READING)
    for _ in range(3):
        during = source.read()
        assert during.lost == {"GPU-second"}
        assert [reading.uuid for reading in during.readings] == ["GPU-first"]
        assert [process.pid for process in during.processes] == [11]
    driver.recover()
    after = source.read()
    assert not after.lost
    (reading,) = (reading for reading in after.readings if reading.uuid == "GPU-second")
    assert reading.values["temperature"] == 61
    assert len(after.processes) == 2


@pytest.mark.parametrize("code", [CODES["UNKNOWN"], CODES["TIMEOUT"], CODES["INVALID_ARGUMENT"]])
def test_a_gpu_that_is_silent_from_the_start_is_lost(
    driver: FakeNvml, begin: Callable[[], NvmlSource], code: int
) -> None:
    fail(driver, driver.gpus[1], code, READING)
    snapshot = begin().read()
    assert snapshot.lost == {"GPU-second"}
    assert uuids(snapshot) == ["GPU-first", "GPU-second"]


def test_a_gpu_that_offers_nothing_is_not_lost(driver: FakeNvml, begin: Callable[[], NvmlSource]) -> None:
    fail(driver, driver.gpus[1], pynvml.NVML_ERROR_NOT_SUPPORTED, READING)
    source = begin()
    for _ in range(3):
        snapshot = source.read()
        assert not snapshot.lost
        assert len(snapshot.readings) == 2


def test_a_gpu_that_is_silent_for_one_tick_is_there_at_the_next(
    driver: FakeNvml, begin: Callable[[], NvmlSource], caplog: pytest.LogCaptureFixture
) -> None:
    source = begin()
    source.read()
    fail(driver, driver.gpus[1], pynvml.NVML_ERROR_UNKNOWN, READING)
    assert source.read().lost == {"GPU-second"}
    driver.recover()
    assert not source.read().lost
    lost = [line for line in caplog.messages if "is lost" in line]
    assert len(lost) == 1
    assert "every call to it fails (Unknown Error)" in lost[0]


def test_a_mig_instance_that_was_destroyed_is_gone_and_never_lost(
    driver: FakeNvml, begin: Callable[[], NvmlSource], caplog: pytest.LogCaptureFixture
) -> None:
    mig = driver.gpus[0].add_mig(uuid="MIG-a")
    source = begin()
    assert "MIG-a" in uuids(source.read())
    mig.remove()
    assert not source.read().lost
    assert uuids(source.read()) == ["GPU-first", "GPU-second"]
    assert not [line for line in caplog.messages if "lost" in line]


def test_a_mig_instance_that_answers_nothing_is_lost(driver: FakeNvml, begin: Callable[[], NvmlSource]) -> None:
    mig = driver.gpus[0].add_mig(uuid="MIG-a")
    source = begin()
    source.read()
    for name in READING:
        driver.fail(f"nvmlDeviceGet{name}", pynvml.NVML_ERROR_UNKNOWN, mig)
    driver.fail("nvmlGpmMigSampleGet", pynvml.NVML_ERROR_UNKNOWN)
    source.read()
    assert source.read().lost == {"MIG-a"}


def test_one_call_that_answers_is_enough(driver: FakeNvml, begin: Callable[[], NvmlSource]) -> None:
    source = begin()
    source.read()
    fail(driver, driver.gpus[1], pynvml.NVML_ERROR_UNKNOWN, READING)
    driver.recover("nvmlDeviceGetMPSComputeRunningProcesses_v3")
    assert not source.read().lost


@pytest.mark.parametrize("is_container", [True, False])
def test_what_helps_is_said_with_it(
    driver: FakeNvml,
    begin: Callable[[], NvmlSource],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_container: bool,
) -> None:
    monkeypatch.setattr(remedies, "is_container", lambda: is_container)
    source = begin()
    fail(driver, None, pynvml.NVML_ERROR_UNKNOWN, READING)
    assert source.read().lost == {"GPU-first", "GPU-second"}
    for said in (source.remedy("GPU-first"), caplog.text, remedies.of_lost()):
        assert ("Restart this container" in said) == is_container
        assert "xid" in said.lower()
    assert "container" not in remedies.of_lost(None)


@pytest.mark.parametrize("is_container", [True, False])
def test_nvml_that_cannot_begin_with_an_unknown_error_names_the_container(
    driver: FakeNvml, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch, is_container: bool
) -> None:
    monkeypatch.setattr(remedies, "is_container", lambda: is_container)
    driver.fail("nvmlInitWithFlags", pynvml.NVML_ERROR_UNKNOWN)
    with pytest.raises(nvml.SourceUnavailable) as caught:
        begin()
    assert caught.value.remedy.startswith("Restart this container") == is_container


@pytest.mark.parametrize("mark", [True, False])
def test_a_container_is_known_by_what_its_engine_leaves_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: bool
) -> None:
    (tmp_path / ".dockerenv").touch()
    (tmp_path / "environ").write_bytes(b"HOME=/\0container=" + (b"podman\0" if not mark else b"\0"))
    (tmp_path / "cgroup").write_text("0::/init.scope\n")
    monkeypatch.setattr(remedies, "_MARKS", (tmp_path / (".dockerenv" if mark else "none"),))
    monkeypatch.setattr(remedies, "_FIRST_PROCESS", tmp_path)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert remedies.is_container.__wrapped__()
    monkeypatch.setattr(remedies, "_MARKS", ())
    (tmp_path / "environ").write_bytes(b"HOME=/\0")
    assert not remedies.is_container.__wrapped__()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    assert remedies.is_container.__wrapped__()
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    (tmp_path / "cgroup").write_text("0::/system.slice/docker-0123.scope\n")
    assert remedies.is_container.__wrapped__()


# ---- Nameless ------------------------------------------------------------------------------------


def watch(snapshot: Snapshot) -> list[tuple[int, str]]:
    """Every GPU and its state, as JSON has them."""
    return [(gpu["index"], gpu["state"]) for gpu in export.as_json(snapshot, {}, "nvml")["gpus"]]


@EACH_CODE
@pytest.mark.parametrize("what", ["handle", "facts"])
def test_a_gpu_that_cannot_say_which_it_is_is_nameless(
    driver: FakeNvml, begin: Callable[[], NvmlSource], code: int, what: str
) -> None:
    if what == "handle":
        driver.fail("nvmlDeviceGetHandleByIndex_v2", code, gpu=1)
    else:
        fail(driver, driver.gpus[1], code, (*READING, *FACTS))
    snapshot = begin().read()
    if what == "facts" and code in UNSUPPORTED:
        assert not snapshot.nameless, "it offers nothing, and goes by its place"
        return
    # NVML counts GPUs that belong to others as well: they are nothing to report.
    expected = set() if what == "handle" and code == pynvml.NVML_ERROR_NO_PERMISSION else {1}
    assert (uuids(snapshot), snapshot.nameless) == (["GPU-first"], expected)


def test_a_nameless_gpu_is_listed_everywhere(
    driver: FakeNvml, begin: Callable[[], NvmlSource], database_url: str
) -> None:
    driver.clear_processes()
    driver.fail("nvmlDeviceGetHandleByIndex_v2", pynvml.NVML_ERROR_UNKNOWN, gpu=1)
    snapshot = begin().read()
    assert watch(snapshot) == [(0, "ok"), (1, "lost")]
    view = glance.of_snapshot(snapshot, {}, False)
    assert [gpu.state for gpu in view.gpus] == ["ok", "lost"]
    for text in (export.as_text(snapshot, {}, "nvml"), glance.trouble(view)):
        assert f"GPU 1: no answer. {remedies.of_lost()}" in text
    assert not glance.trouble(replace(view, gpus=view.gpus[:1]))
    engine = database.open_for_writing(database_url)
    writer = Writer(engine, "here", "nvml", 1)
    at = time.time()
    for later in (0, 1):
        assert writer.write(replace(snapshot, timestamp=at + later), {})
    rows = current.gpus(engine)
    assert [(row["gpu_index"], row["state"]) for row in rows] == [(0, "ok"), (1, "lost")]
    found = health.check(engine, State("recording", "nvml", "x"), "here", 1)
    assert (found.status, found.gpus, found.lost) == ("degraded", 2, 1)
    engine.dispose()


def test_one_that_says_which_it_is_takes_its_own_place(
    driver: FakeNvml, begin: Callable[[], NvmlSource], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "RECOUNT_S", 0.0)
    driver.clear_processes()
    driver.fail("nvmlDeviceGetHandleByIndex_v2", pynvml.NVML_ERROR_UNKNOWN, gpu=1)
    source = begin()
    engine = database.open_for_writing(database_url)
    writer = Writer(engine, "here", "nvml", 1)
    at = 1_000_000.0
    for restart in (False, True):
        at += 1
        writer.write(replace(source.read(), timestamp=at), {})
        if restart:
            writer = Writer(engine, "here", "nvml", 1)
    driver.recover()
    writer.write(replace(source.read(), timestamp=at + 1), {})
    rows = current.gpus(engine, gone=True)
    assert [(row["uuid"], row["state"]) for row in rows] == [("GPU-first", "ok"), ("GPU-second", "ok")]
    # One that was known keeps its row.
    driver.fail("nvmlDeviceGetHandleByIndex_v2", pynvml.NVML_ERROR_UNKNOWN, gpu=1)
    writer.write(replace(begin().read(), timestamp=at + 2), {})
    rows = current.gpus(engine, gone=True)
    assert [(row["uuid"], row["state"]) for row in rows] == [("GPU-first", "ok"), ("GPU-second", "lost")]
    engine.dispose()


def test_the_others_go_on_as_they_were_beside_one_without_a_name(
    driver: FakeNvml, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPM, samples and the energy counter measure from one reading to the next."""
    driver.fail("nvmlDeviceGetHandleByIndex_v2", pynvml.NVML_ERROR_UNKNOWN, gpu=0)
    source = begin()
    source.read()
    monkeypatch.setattr(nvml, "RECOUNT_S", 0.0)
    driver.reset_calls()
    for _ in range(3):
        snapshot = source.read()
        assert snapshot.nameless == {0}
        (reading,) = snapshot.readings
        assert reading.values["sm_activity"] == 44
    assert driver.calls("nvmlGpmSampleAlloc") == 0
    assert driver.calls("nvmlDeviceGetName") == 0
    driver.recover()
    source.read()
    assert [reading.values.get("sm_activity") for reading in source.read().readings] == [44, 44]


def test_gpus_that_move_up_go_on_as_they_were(
    driver: FakeNvml, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = begin()
    source.read()
    monkeypatch.setattr(nvml, "RECOUNT_S", 0.0)
    driver.gpus[0].remove()
    snapshot = source.read()
    assert [(gpu.index, gpu.uuid) for gpu in snapshot.gpus] == [(0, "GPU-second")]
    assert snapshot.readings[0].values["sm_activity"] == 44


def test_a_uuid_that_failed_once_is_asked_again(
    driver: FakeNvml, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.fail("nvmlDeviceGetUUID", pynvml.NVML_ERROR_UNKNOWN, gpu=1)
    source = begin()
    assert uuids(source.read()) == ["GPU-first", "PCI-00000000:02:00.0"]
    driver.recover()
    monkeypatch.setattr(nvml, "RECOUNT_S", 0.0)
    assert uuids(source.read()) == ["GPU-first", "GPU-second"]


def test_doctor_names_what_does_not_answer(
    driver: FakeNvml, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "SECOND_LOOK_S", 0.0)
    driver.fail("nvmlDeviceGetHandleByIndex_v2", pynvml.NVML_ERROR_UNKNOWN, gpu=0)
    fail(driver, driver.gpus[1], pynvml.NVML_ERROR_UNKNOWN, READING)
    found = doctor.examine(settings.load(data_dir=tmp_path, source="nvml"))
    problems = [one for one in found if one.topic.startswith("GPU") and one.verdict == "problem"]
    assert [one.topic for one in problems] == ["GPU 0", "GPU 1"]
    assert all("Xid" in one.remedy for one in problems)


# ---- What changes, and what appears --------------------------------------------------------------


def test_facts_that_change_are_asked_again(
    driver: FakeNvml, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = begin()
    first = source.read()
    gpu = driver.gpus[0]
    gpu.power_enforced_limit_mw, gpu.name, driver.driver_version = 200_000, "A new name", "590.1"
    assert source.read().gpus == first.gpus, "not with every tick"
    monkeypatch.setattr(devices, "FACTS_S", 0.0)
    monkeypatch.setattr(nvml, "RECOUNT_S", 0.0)
    for device in source._devices.all:
        device.facts_at = 0.0
    source.read()
    after = source.read()
    assert (after.gpus[0].power_limit_w, after.gpus[0].name) == (200, "A new name")
    assert after.host.driver_version == "590.1"
    assert after.gpus[1] == first.gpus[1]
    # What fails to be said is as it was.
    for name in ("EnforcedPowerLimit", "PowerManagementLimit", "Name", "MemoryInfo"):
        driver.fail(f"nvmlDeviceGet{name}", pynvml.NVML_ERROR_UNKNOWN)
    driver.fail("nvmlSystemGetDriverVersion", pynvml.NVML_ERROR_UNKNOWN)
    for _ in range(2):
        assert (source.read().gpus, source.host) == (after.gpus, after.host)


def test_what_appears_later_is_found_and_the_rest_goes_on(
    driver: FakeNvml,
    begin: Callable[[], NvmlSource],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpu = driver.gpus[0]
    speed, gpu.fan = gpu.fan, None
    driver.hide("nvmlDeviceGetProcessesUtilizationInfo")
    driver.hide("nvmlDeviceGetProcessUtilization")
    source = begin()
    source.read()
    gpu.fan = speed
    driver.recover()
    found = source.read()
    assert found.readings[0].values["fan_speed"] is None, "not with every tick"
    assert found.processes[0].sm_utilization is None
    monkeypatch.setattr(devices, "AGAIN_S", 0.0)
    for device in source._devices.all:
        device.again_at = 0.0
    for _ in range(3):
        found = source.read()
        assert found.readings[0].values["fan_speed"] == speed
        assert found.readings[0].values["sm_activity"] == 44
        assert found.processes[0].sm_utilization == 0
    assert caplog.messages == []


def test_samples_that_appear_later_are_read(
    driver: FakeNvml, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.hide("nvmlDeviceGetSamples")
    source = begin()
    assert source.read().readings[0].sampling == "point"
    driver.recover()
    for device in source._devices.all:
        device.again_at = 0.0
    for second in range(3):
        driver.gpus[0].add_sample(pynvml.NVML_GPU_UTILIZATION_SAMPLES, 40, (1000 + second) * 1_000_000)
        reading = source.read().readings[0]
    assert (reading.sampling, reading.values["utilization"]) == ("interval", 40)


# ---- Two readings --------------------------------------------------------------------------------


def test_two_readings_are_one_that_lacks_nothing() -> None:
    def snapshot(values: dict[str, Any]) -> Snapshot:
        return Snapshot(1.0, HostInfo("here"), readings=(GpuReading("GPU-0", values),))

    first = snapshot({"temperature": 60.0, "pcie_width": 16, "fan_speed": 30.0, "sm_activity": None})
    second = snapshot({"temperature": 61.0, "fan_speed": None, "sm_activity": 44.0})
    assert second.completed_by(first).readings[0].values == {
        "temperature": 61.0,
        "pcie_width": 16,
        "fan_speed": 30.0,
        "sm_activity": 44.0,
    }


def test_a_look_that_takes_two_readings_has_what_only_the_first_was_asked(
    driver: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "BETWEEN_S", 0.0)
    found = collector.Observer(NvmlSource("here"), LocalAttribution())
    snapshot, _ = found.observe_once(0.0)
    found.close()
    rare = {metric.key for metric in GPU_METRICS if metric.every_s}
    (gpu, _) = export.as_json(snapshot, {11: ProcessIdentity(11), 12: ProcessIdentity(12)}, "nvml")["gpus"]
    assert gpu["sm_activity"] == 44
    assert len([key for key in rare if gpu[key] is not None]) >= 15


def test_a_server_reports_both_and_goes_on(serve: Callable[..., Any], driver: FakeNvml) -> None:
    """One that answers nothing and one that cannot say which it is, from the first start on."""
    third = driver.add_gpu(uuid="GPU-third")
    fail(driver, driver.gpus[0], pynvml.NVML_ERROR_UNKNOWN, READING)
    driver.fail("nvmlDeviceGetHandleByIndex_v2", pynvml.NVML_ERROR_UNKNOWN, gpu=1)
    server = serve(driver)
    answer = server.wait(lambda _, found: found.get("status") == "degraded")
    assert (answer["gpus"], answer["gpus_lost"]) == (3, 2)
    states = [(gpu["gpu_index"], gpu["state"]) for gpu in ask(server.url, "gpus")["gpus"]]
    assert states == [(0, "lost"), (1, "lost"), (2, "ok")]
    for route in ("processes", "usage", "models", "original/current", "original/history"):
        ask(server.url, route)
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=PATIENCE_S) as found:
        up = [
            line.rsplit(" ", 1)[1]
            for line in found.read().decode().splitlines()
            if line.startswith("gpumon_gpu_up{")
        ]
    assert sorted(up) == ["0.0", "0.0", "1.0"]
    assert "Traceback" not in server.log.read_text()
    assert third.temperature == 40


def ask(url: str, route: str) -> Any:
    """What a route of the API answers."""
    with urllib.request.urlopen(f"{url}/api/v1/{route}", timeout=PATIENCE_S) as found:
        return json.load(found)
