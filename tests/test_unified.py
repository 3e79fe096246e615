"""GPUs that share the machine's memory: what the driver does not say of them, and where it is known from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_nvml
import pynvml
import pytest
from fake_nvml import GIB, FakeNvml

from gpumon_core.export import snapshot as export
from gpumon_core.telemetry import unified
from gpumon_core.telemetry.nvml import NvmlSource
from gpumon_core.telemetry.records import GpuInfo, Snapshot

MIB = 2**20
TOTAL_KIB = 125_571_584
TOTAL_MIB = 122_628
MEMINFO = f"MemTotal:       {TOTAL_KIB} kB\nMemFree:        100000 kB\nMemAvailable:   90000000 kB\n"
SILENT = {"memory_total": None, "memory_used": None, "memory_reserved": None}
ZEROS = {"memory_total": 0, "memory_used": 0, "memory_reserved": 0}


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[FakeNvml]:
    fake = FakeNvml(tmp_path / "nvml")
    with fake_nvml.loaded(fake):
        yield fake


@pytest.fixture
def system(tmp_path: Path) -> unified.System:
    for name in ("sys", "proc"):
        (tmp_path / name).mkdir()
    (tmp_path / "proc" / "meminfo").write_text(MEMINFO)
    return unified.System(tmp_path / "sys", tmp_path / "proc")


@pytest.fixture
def read(system: unified.System) -> Iterator[Callable[[], Snapshot]]:
    sources: list[NvmlSource] = []

    def once() -> Snapshot:
        if not sources:
            sources.append(NvmlSource("here", system=system))
        return sources[0].read()

    yield once
    for source in sources:
        source.close()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def said(snapshot: Snapshot) -> tuple[GpuInfo, dict[str, Any]]:
    return snapshot.gpus[0], dict(snapshot.readings[0].values)


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        ("NVIDIA GB10", SILENT),
        ("NVIDIA GH200 480GB", SILENT),
        ("NVIDIA GB200", SILENT),
        ("NVIDIA Thor", SILENT),
        ("Orin (nvgpu)", SILENT),
        ("Orin (nvgpu)", ZEROS),
        ("NVIDIA Jetson AGX Xavier", ZEROS),
    ],
)
def test_shared_memory_is_the_machines_and_used_is_what_processes_hold(
    driver: FakeNvml, read: Callable[[], Snapshot], name: str, memory: dict[str, Any]
) -> None:
    gpu = driver.add_gpu(name=name, **memory)
    info, values = said(read())
    assert (info.memory_from, info.memory_total_mib) == ("unified", TOTAL_MIB)
    assert values["memory"] == 0, "the driver lists processes, and there is none"
    gpu.add_process(100, 19135 * MIB)
    gpu.add_process(100, 19135 * MIB, "G")
    gpu.add_process(200, 512 * MIB)
    assert said(read())[1]["memory"] == 19135 + 512, "a process that is listed twice counts once"


def test_where_nobody_knows_who_is_there_the_use_is_not_known(
    driver: FakeNvml, read: Callable[[], Snapshot]
) -> None:
    gpu = driver.add_gpu(name="NVIDIA GB10", **SILENT)
    gpu.add_process(100, fake_nvml.NOT_AVAILABLE)
    assert said(read())[1]["memory"] is None
    gpu.add_process(200, 512 * MIB)
    assert said(read())[1]["memory"] == 512
    for suffix in ("_v3", "_v2", ""):
        driver.fail(f"nvmlDeviceGetComputeRunningProcesses{suffix}", pynvml.NVML_ERROR_UNKNOWN)
    assert said(read())[1]["memory"] is None


@pytest.mark.parametrize("name", ["NVIDIA GB10", "NVIDIA GH200 480GB", "NVIDIA RTX A6000", "NVIDIA H100 PCIe"])
def test_a_board_with_memory_of_its_own_keeps_it(
    driver: FakeNvml, read: Callable[[], Snapshot], name: str
) -> None:
    driver.add_gpu(name=name, memory_total=96 * GIB, memory_used=7 * GIB, memory_reserved=0)
    info, values = said(read())
    assert (info.memory_from, info.memory_total_mib) == ("device", 96 * 1024)
    assert values["memory"] == 7 * 1024


def test_a_driver_that_takes_the_machines_memory_for_the_gpus_is_not_believed_in_its_use(
    driver: FakeNvml, read: Callable[[], Snapshot]
) -> None:
    gpu = driver.add_gpu(name="NVIDIA GB10", memory_total=TOTAL_KIB * 1024, memory_used=34 * GIB)
    gpu.add_process(100, 512 * MIB)
    info, values = said(read())
    assert (info.memory_from, info.memory_total_mib) == ("unified", TOTAL_MIB)
    assert values["memory"] == 512


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_NOT_SUPPORTED])
@pytest.mark.parametrize("times", [1, -1])
def test_a_discrete_board_that_fails_to_say_its_memory_shares_none(
    driver: FakeNvml, read: Callable[[], Snapshot], error: int, times: int
) -> None:
    gpu = driver.add_gpu(name="NVIDIA RTX A6000")
    gpu.add_process(100, 19135 * MIB)
    for function in ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo_v2"):
        driver.fail(function, error, times=times)
    info, values = said(read())
    assert info.memory_from != "unified"
    assert info.memory_total_mib is None
    assert values["memory"] != 19135


def test_a_shared_boards_memory_call_that_fails_for_once_says_nothing(
    driver: FakeNvml, read: Callable[[], Snapshot]
) -> None:
    driver.add_gpu(name="NVIDIA GH200 480GB", memory_total=96 * GIB)
    driver.fail("nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_UNKNOWN, times=1)
    assert said(read())[0].memory_from is None


def test_a_board_that_has_said_its_memory_is_not_shared_because_it_fails_to(
    driver: FakeNvml, read: Callable[[], Snapshot], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpumon_core.telemetry.devices.FACTS_S", -1.0)
    driver.add_gpu(name="NVIDIA GH200 480GB", memory_total=96 * GIB)
    assert said(read())[0].memory_total_mib == 96 * 1024
    driver.fail("nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_NOT_SUPPORTED)
    read()
    info, _ = said(read())
    assert (info.memory_from, info.memory_total_mib) == ("device", 96 * 1024)


def test_zeros_of_an_unknown_board_are_not_its_memory(driver: FakeNvml, read: Callable[[], Snapshot]) -> None:
    driver.add_gpu(name="NVIDIA RTX A6000", **ZEROS)
    info, values = said(read())
    assert (info.memory_from, info.memory_total_mib, values["memory"]) == (None, None, None)


@pytest.mark.parametrize(
    "load",
    [
        "sys/class/devfreq/17000000.gpu/device/load",
        "sys/class/devfreq/17000000.ga10b/device/load",
        "sys/class/devfreq/57000000.gpu/device/load",
        "sys/devices/platform/bus@0/17000000.gpu/load",
        "sys/devices/platform/gpu.0/load",
        "sys/devices/gpu.0/load",
    ],
)
@pytest.mark.parametrize("nvml", [None, 0])
def test_jetsons_load_comes_from_the_kernel(
    driver: FakeNvml, read: Callable[[], Snapshot], tmp_path: Path, load: str, nvml: int | None
) -> None:
    driver.add_gpu(name="Orin (nvgpu)", gpu_utilization=nvml, temperature=0, power_mw=0, energy_mj=None, **ZEROS)
    write(tmp_path / load, "437\n")
    snapshot = read()
    _, values = said(snapshot)
    assert values["utilization"] == values["utilization_max"] == 43.7
    assert values["temperature"] is None, "zeros that mean nothing"
    assert values["power"] is None
    assert snapshot.readings[0].sampling == "point"
    for garbage in ("", "many", "-1", "1001", "9" * 30):
        write(tmp_path / load, garbage)
        assert said(read())[1]["utilization"] is None


@pytest.mark.parametrize("nvml", [None, 0])
def test_without_the_kernels_load_zeros_of_a_jetson_are_not_idleness(
    driver: FakeNvml, read: Callable[[], Snapshot], nvml: int | None
) -> None:
    driver.add_gpu(name="Orin (nvgpu)", gpu_utilization=nvml, **ZEROS)
    assert said(read())[1]["utilization"] is None


@pytest.mark.parametrize("name", ["NVIDIA GB10", "NVIDIA Thor", "NVIDIA RTX A6000"])
def test_a_driver_that_says_how_busy_it_is_is_believed(
    driver: FakeNvml, read: Callable[[], Snapshot], tmp_path: Path, name: str
) -> None:
    gpu = driver.add_gpu(name=name, gpu_utilization=0)
    write(tmp_path / "sys/class/devfreq/17000000.gpu/device/load", "437\n")
    assert said(read())[1]["utilization"] == 0
    gpu.gpu_utilization = 30
    assert said(read())[1]["utilization"] == 30


def test_pids_that_cannot_be_are_no_processes(
    driver: FakeNvml, read: Callable[[], Snapshot], tmp_path: Path
) -> None:
    write(tmp_path / "proc/sys/kernel/pid_max", "32768\n")
    gpu = driver.add_gpu(name="Orin (nvgpu)", **ZEROS)
    for pid in (100, 40_000, 4_194_305, 2**32 - 2):
        gpu.add_process(pid, 100 * MIB)
    snapshot = read()
    assert [process.pid for process in snapshot.processes] == [100]
    assert said(snapshot)[1]["memory"] == 100


@pytest.mark.parametrize(
    ("text", "total"),
    [
        (MEMINFO, TOTAL_MIB),
        ("MemTotal:  0 kB\n", None),
        ("MemTotal:  -5 kB\n", None),
        ("MemTotal:  many kB\n", None),
        ("MemTotal:\n", None),
        ("MemAvailable: 90000000 kB\n", None),
        ("", None),
    ],
)
def test_the_machines_memory_is_memtotal_and_nothing_else(
    system: unified.System, text: str, total: int | None
) -> None:
    write(system.proc_root / "meminfo", text)
    assert system.memory_total_mib() == total


def test_a_tegra_without_a_name_is_known_by_its_device_tree(
    driver: FakeNvml, read: Callable[[], Snapshot], tmp_path: Path
) -> None:
    write(tmp_path / "proc/device-tree/compatible", "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0")
    driver.add_gpu(name=None, **ZEROS)
    assert said(read())[0].memory_from == "unified"


def test_shared_memory_is_marked_where_it_is_shown(driver: FakeNvml, read: Callable[[], Snapshot]) -> None:
    driver.add_gpu(name="NVIDIA GB10", **SILENT)
    snapshot = read()
    assert "shared with the system" in export.as_text(snapshot, {}, "nvml")
    assert export.as_json(snapshot, {}, "nvml")["gpus"][0]["memory_from"] == "unified"
