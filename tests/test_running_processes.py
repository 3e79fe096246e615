"""The running-process calls, in every layout that drivers have written: no process lost, no PID garbled."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from typing import Any, Literal

import fake_nvml
import pynvml
import pytest
from fake_nvml import GIB, FakeGpu, FakeNvml

from gpumon_core.telemetry.nvml import NvmlSource
from gpumon_core.telemetry.records import ProcessReading
from gpumon_core.telemetry.running import FUNCTIONS, LARGEST_ENTRY, EntryBuffer

MIB = 2**20
COUNTS = [0, 1, 2, 3, 31, 32, 33, 40, 250]
# The version in use, the size of its entries, and the versions that must be out of the way.
VARIANTS = [("_v3", 24, ()), ("_v3", 32, ()), ("_v2", 24, ("_v3",)), ("", 16, ("_v3", "_v2"))]
EACH_VARIANT = pytest.mark.parametrize(
    ("suffix", "size", "hidden"), VARIANTS, ids=[f"{suffix or 'v1'}-{size}" for suffix, size, _ in VARIANTS]
)


@pytest.fixture
def driver(fake: FakeNvml) -> Iterator[FakeNvml]:
    fake.add_gpu(uuid="GPU-0")
    with fake_nvml.loaded(fake):
        yield fake


@pytest.fixture
def gpu(driver: FakeNvml) -> FakeGpu:
    return driver.gpus[0]


def rows(source: NvmlSource | None = None) -> list[tuple[int, str, int | None]]:
    """PID, kind and memory in MiB of every process now."""
    source = source or NvmlSource("testhost")
    return [(process.pid, process.kind, process.memory_mib) for process in source.read().processes]


def use_variant(driver: FakeNvml, size: int, hidden: tuple[str, ...]) -> None:
    if size == 32:
        driver.process_struct_bytes_v3 = 32
    for function in FUNCTIONS.values():
        for suffix in hidden:
            driver.hide(function + suffix)


# ---- Layouts and lengths -------------------------------------------------------------------------


@EACH_VARIANT
@pytest.mark.parametrize("count", COUNTS)
def test_every_process_is_listed_with_its_pid_and_memory(
    driver: FakeNvml, gpu: FakeGpu, suffix: str, size: int, hidden: tuple[str, ...], count: int
) -> None:
    use_variant(driver, size, hidden)
    there = [(1000 + 17 * number, (number + 1) * 3 * MIB) for number in range(count)]
    for pid, memory in there:
        gpu.add_process(pid, memory, protected_memory=(pid << 20) | 5)
    assert rows() == [(pid, "C", memory // MIB) for pid, memory in there]
    assert driver.calls(FUNCTIONS["C"] + suffix) >= 1


@EACH_VARIANT
def test_a_process_whose_memory_is_not_known_has_none(
    driver: FakeNvml, gpu: FakeGpu, suffix: str, size: int, hidden: tuple[str, ...]
) -> None:
    use_variant(driver, size, hidden)
    for pid in (5, 6, 7):
        gpu.add_process(pid, None)
    assert rows() == [(5, "C", None), (6, "C", None), (7, "C", None)]


@EACH_VARIANT
@pytest.mark.parametrize("pid", [1, 0xA5, 0xA5A5, 0x3FA5A5, 4_194_304])
def test_bytes_like_the_pattern_are_read_as_they_are(
    driver: FakeNvml, gpu: FakeGpu, suffix: str, size: int, hidden: tuple[str, ...], pid: int
) -> None:
    use_variant(driver, size, hidden)
    gpu.add_process(3, 0xA5 * MIB)
    gpu.add_process(pid, 0xA5A5 * MIB, protected_memory=0xA5A5)
    assert rows() == [(3, "C", 0xA5), (pid, "C", 0xA5A5)]


@pytest.mark.parametrize("size", [16, 24, 32])
@pytest.mark.parametrize("count", [1, 2, 5, 300])
def test_an_entry_is_measured_and_not_believed(monkeypatch: pytest.MonkeyPatch, size: int, count: int) -> None:
    # More processes than the fake has room for, and the memory of the fourth one all zero.
    layout = struct.Struct({16: "=I4xQ", 24: "=I4xQII", 32: "=I4xQIIQ"}[size])
    rest = {16: (), 24: (0xFFFFFFFF, 0xFFFFFFFF), 32: (0xFFFFFFFF, 0xFFFFFFFF, 0)}[size]
    expected = [(100 + number, 0 if number == 3 else number * GIB) for number in range(count)]
    written = b"".join(layout.pack(pid, memory, *rest) for pid, memory in expected)

    def call(handle: object, room: Any, array: Any) -> int:
        offered, room._obj.value = room._obj.value, count
        if offered < count:
            return int(pynvml.NVML_ERROR_INSUFFICIENT_SIZE)
        ctypes.memmove(array, written, len(written))
        return int(pynvml.NVML_SUCCESS)

    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer", lambda name: call)
    for documented in (16, 24):
        found = list(EntryBuffer().list("any", None, documented))
        assert [(entry.pid, entry.memory) for entry in found] == expected
        assert {(entry.gpu_instance, entry.compute_instance) for entry in found} == {(None, None)}


# ---- A list that changes under the reader --------------------------------------------------------


def test_the_list_is_new_at_every_reading(driver: FakeNvml, gpu: FakeGpu) -> None:
    source = NvmlSource("testhost")
    for count in (0, 40, 2, 100, 1, 0, 5):
        driver.clear_processes()
        for pid in range(1, count + 1):
            gpu.add_process(pid, pid * MIB)
        assert rows(source) == [(pid, "C", pid) for pid in range(1, count + 1)]


@pytest.mark.parametrize("size", [24, 32])
@pytest.mark.parametrize(("before", "after"), [(33, 34), (33, 200), (40, 3), (40, 1), (40, 0), (100, 99)])
def test_a_list_that_changes_between_two_calls_is_read_as_it_is_then(
    driver: FakeNvml,
    gpu: FakeGpu,
    monkeypatch: pytest.MonkeyPatch,
    size: Literal[24, 32],
    before: int,
    after: int,
) -> None:
    driver.process_struct_bytes_v3 = size
    for pid in range(1, before + 1):
        gpu.add_process(pid, pid * MIB)
    grow = EntryBuffer.grow

    def change_and_grow(buffer: EntryBuffer, capacity: int) -> None:
        monkeypatch.setattr(EntryBuffer, "grow", grow)  # it changes once
        for pid in range(after + 1, before + 1):
            driver.remove_process(pid)
        for pid in range(before + 1, after + 1):
            gpu.add_process(pid, pid * MIB)
        grow(buffer, capacity)

    source = NvmlSource("testhost")
    monkeypatch.setattr(EntryBuffer, "grow", change_and_grow)
    assert rows(source) == [(pid, "C", pid) for pid in range(1, after + 1)]


def test_a_driver_that_never_has_enough_room_does_not_eat_the_memory(driver: FakeNvml, gpu: FakeGpu) -> None:
    gpu.add_process(5, GIB)
    gpu.add_process(6, GIB, "G")
    driver.fail("nvmlDeviceGetComputeRunningProcesses_v3", pynvml.NVML_ERROR_INSUFFICIENT_SIZE)
    source = NvmlSource("testhost")
    for _ in range(20):
        assert rows(source) == [(6, "G", 1024)]
    assert ctypes.sizeof(source._devices.all[0].buffer.array) < 1000 * LARGEST_ENTRY
    driver.recover()
    assert rows(source) == [(5, "C", 1024), (6, "G", 1024)]


# ---- Kinds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "shown"),
    [("C", "C"), ("G", "G"), ("M", "M"), ("CG", "C+G"), ("GC", "C+G"), ("CM", "M+C"), ("CGM", "M+C+G")],
)
def test_a_process_of_several_kinds_is_one_row_and_its_memory_counts_once(
    driver: FakeNvml, gpu: FakeGpu, kinds: str, shown: str
) -> None:
    for kind in kinds:
        gpu.add_process(77, 300 * MIB, "C" if kind == "C" else "G" if kind == "G" else "M")
    assert rows() == [(77, shown, 300)]


def test_of_two_numbers_for_one_process_the_larger_counts(driver: FakeNvml, gpu: FakeGpu) -> None:
    gpu.add_process(77, None, "C")
    gpu.add_process(77, 300 * MIB, "G")
    gpu.add_process(78, 100 * MIB, "C")
    gpu.add_process(78, 200 * MIB, "G")
    gpu.add_process(79, 0, "C")
    assert rows() == [(77, "C+G", 300), (78, "C+G", 200), (79, "C", 0)]


@EACH_VARIANT
@pytest.mark.parametrize("others", [0, 1, 4])
def test_pid_0_is_no_process(
    driver: FakeNvml, gpu: FakeGpu, suffix: str, size: int, hidden: tuple[str, ...], others: int
) -> None:
    use_variant(driver, size, hidden)
    gpu.add_process(0, GIB)
    for pid in range(1, others + 1):
        gpu.add_process(pid, GIB)
    gpu.add_process(0, GIB)
    assert [pid for pid, _, _ in rows()] == list(range(1, others + 1))


def test_a_process_on_two_gpus_has_a_row_on_each(driver: FakeNvml, gpu: FakeGpu) -> None:
    gpu.add_process(9, GIB)
    driver.add_gpu(uuid="GPU-1").add_process(9, 2 * GIB)
    assert NvmlSource("testhost").read().processes == (
        ProcessReading("GPU-0", 9, "C", 1024, 0, 0, 0, 0),
        ProcessReading("GPU-1", 9, "C", 2048, 0, 0, 0, 0),
    )


@pytest.mark.parametrize("size", [24, 32])
def test_a_process_under_mig_belongs_to_its_instance_in_both_layouts(
    driver: FakeNvml, gpu: FakeGpu, size: Literal[24, 32]
) -> None:
    driver.process_struct_bytes_v3 = size
    for number in range(3):
        mig = gpu.add_mig(uuid=f"MIG-{number}")
        gpu.add_process(20 + number, GIB, mig=mig)
    found = [(process.gpu_uuid, process.pid) for process in NvmlSource("testhost").read().processes]
    assert sorted(found) == [("MIG-0", 20), ("MIG-1", 21), ("MIG-2", 22)]
