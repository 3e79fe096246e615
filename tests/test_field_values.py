"""NVML's field values: many metrics in one call, each with an error of its own, and NVLink's counters as rates."""

from __future__ import annotations

import math
from collections.abc import Callable

import one_gpu
import pynvml
import pytest
from fake_nvml import FakeGpu, FakeNvml
from one_gpu import FIELDS, Clock, field_id, nvlink, tick

from gpumon_core.metrics import ALL_LINKS, RARELY_S
from gpumon_core.telemetry.nvml import NvmlSource

# The fixtures that these tests share.
clock, gpu, begin, worn = one_gpu.clock, one_gpu.gpu, one_gpu.begin, one_gpu.worn


# What the functions say instead, on the board below; the others have no function.
FALLBACKS: dict[str, float] = {
    "energy": 1000,
    "ecc_corrected_volatile": 31,
    "ecc_uncorrected_volatile": 32,
    "ecc_corrected_aggregate": 33,
    "ecc_uncorrected_aggregate": 34,
    "remapped_rows_corrected": 35,
    "remapped_rows_uncorrected": 36,
    "remapped_rows_pending": 0,
    "remapped_rows_failure": 0,
    "retired_pages_corrected": 2,
    "retired_pages_uncorrected": 1,
    "retired_pages_pending": 0,
}
EACH_FIELD = pytest.mark.parametrize("key", FIELDS)


def test_every_field_arrives_in_its_unit(worn: FakeGpu, begin: Callable[[], NvmlSource]) -> None:
    found = tick(begin())
    assert {key: found[key] for key in FIELDS} == {key: expected for key, (_, _, expected) in FIELDS.items()}


def test_all_fields_are_asked_in_one_call_and_the_rare_ones_in_another(
    fake: FakeNvml, worn: FakeGpu, begin: Callable[[], NvmlSource], clock: Clock
) -> None:
    source = begin()
    tick(source)
    for seconds, calls in ((1, 1), (RARELY_S, 2)):
        clock.now += seconds
        fake.reset_calls()
        tick(source)
        assert fake.calls("nvmlDeviceGetFieldValues") == calls


@pytest.mark.parametrize(
    "error", ["NOT_SUPPORTED", "INVALID_ARGUMENT", "FUNCTION_NOT_FOUND", "ARGUMENT_VERSION_MISMATCH", "DEPRECATED"]
)
@EACH_FIELD
def test_a_field_that_the_driver_does_not_know_is_asked_through_its_function(
    worn: FakeGpu, begin: Callable[[], NvmlSource], key: str, error: str
) -> None:
    worn.set_field(field_id(FIELDS[key][0]), 99, error=getattr(pynvml, f"NVML_ERROR_{error}"))
    found = tick(begin())
    expected = {other: value for other, (_, _, value) in FIELDS.items()}
    assert {other: found.get(other) for other in FIELDS} == {**expected, key: FALLBACKS.get(key)}


def test_nvlink_errors_are_those_of_all_links_where_only_the_newer_fields_are_known(
    gpu: FakeGpu, begin: Callable[[], NvmlSource]
) -> None:
    for name, value in (("REPLAY", 41), ("RECOVERY", 42), ("CRC", 43)):
        for link in (0, 1):
            gpu.set_field(field_id(f"NVLINK_ERROR_DL_{name}"), 1, scope=link)
        gpu.set_field(field_id(f"NVLINK_ERROR_DL_{name}"), value, scope=ALL_LINKS)
    found = tick(begin())
    assert [found[f"nvlink_{kind}_errors"] for kind in ("replay", "recovery", "crc")] == [41, 42, 43]
    assert found.get("nvlink_crc_flit_errors") is None, "not known, and not 0"


@pytest.mark.parametrize("error", ["UNKNOWN", "NO_DATA", "TIMEOUT", "NO_PERMISSION"])
@EACH_FIELD
def test_a_field_that_fails_this_time_is_asked_again(
    worn: FakeGpu, begin: Callable[[], NvmlSource], clock: Clock, key: str, error: str
) -> None:
    name, value, expected = FIELDS[key]
    worn.set_field(field_id(name), 99, error=getattr(pynvml, f"NVML_ERROR_{error}"))
    source = begin()
    found = tick(source)
    assert found.get(key) is None
    assert all(found[other] == FIELDS[other][2] for other in FIELDS if other != key)
    worn.set_field(field_id(name), value)
    clock.now += RARELY_S
    assert tick(source)[key] == expected


def test_a_field_that_says_that_the_gpu_is_lost_is_believed(
    worn: FakeGpu, begin: Callable[[], NvmlSource]
) -> None:
    worn.set_field(field_id("MEMORY_TEMP"), 0, error=pynvml.NVML_ERROR_GPU_IS_LOST)
    assert begin().read().lost == {"GPU-first"}


def test_a_driver_without_field_values_is_asked_through_functions(
    fake: FakeNvml, worn: FakeGpu, begin: Callable[[], NvmlSource], clock: Clock
) -> None:
    fake.hide("nvmlDeviceGetFieldValues")
    source = begin()
    found = tick(source)
    assert {key: found.get(key) for key in FIELDS} == {key: FALLBACKS.get(key) for key in FIELDS}
    for _ in range(2):
        # That GPM does not tell of NVLink either was found out on the first tick.
        fake.reset_calls()
        clock.now += 1
        worn.energy_mj += 200_000
        assert tick(source)["power"] == 200
        assert fake.calls("nvmlDeviceGetFieldValues") == 0


@EACH_FIELD
def test_a_field_with_all_bits_set_is_no_value(worn: FakeGpu, begin: Callable[[], NvmlSource], key: str) -> None:
    for kind, word in ((pynvml.NVML_VALUE_TYPE_UNSIGNED_INT, 0xFFFFFFFF), (3, 2**64 - 1)):
        worn.set_field(field_id(FIELDS[key][0]), word, value_type=kind)
        assert tick(begin()).get(key) is None


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@EACH_FIELD
def test_a_field_that_is_no_number_is_no_value(
    worn: FakeGpu, begin: Callable[[], NvmlSource], key: str, number: float
) -> None:
    worn.set_field(field_id(FIELDS[key][0]), number, value_type=pynvml.NVML_VALUE_TYPE_DOUBLE)
    assert tick(begin()).get(key) is None


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("DOUBLE", 55.25, 55.25),
        ("UNSIGNED_INT", 55, 55),
        ("UNSIGNED_LONG", 55, 55),
        ("UNSIGNED_LONG_LONG", 55, 55),
        ("SIGNED_LONG_LONG", -5, -5),
        ("SIGNED_INT", -5, -5),
        ("UNSIGNED_SHORT", 55, 55),
    ],
)
def test_a_field_of_any_type_is_read(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], kind: str, value: float, expected: float
) -> None:
    value_type = getattr(pynvml, f"NVML_VALUE_TYPE_{kind}")
    gpu.set_field(field_id("MEMORY_TEMP"), value, value_type=value_type)
    assert tick(begin())["memory_temperature"] == expected


def test_a_pcie_replay_counter_without_its_function_is_a_field(
    fake: FakeNvml, gpu: FakeGpu, begin: Callable[[], NvmlSource], clock: Clock
) -> None:
    gpu.pcie_replays = 4
    assert tick(begin())["pcie_replays"] == 4
    gpu.set_field(pynvml.NVML_FI_DEV_PCIE_REPLAY_COUNTER, 5)
    fake.hide("nvmlDeviceGetPcieReplayCounter")
    assert tick(begin())["pcie_replays"] == 5


def set_nvlink(gpu: FakeGpu, sent_kib: int, received_kib: int) -> None:
    gpu.set_field(pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, sent_kib, scope=ALL_LINKS)
    gpu.set_field(pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, received_kib, scope=ALL_LINKS)


def test_nvlink_throughput_is_the_growth_of_its_counters_per_second(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], clock: Clock
) -> None:
    set_nvlink(gpu, 1 << 40, 7)
    source = begin()
    assert nvlink(tick(source)) == (None, None)
    assert nvlink(tick(source)) == (None, None), "without GPM it is the counters that are asked from here on"
    clock.now += 2
    set_nvlink(gpu, (1 << 40) + 10 * 1024, 7 + 3 * 1024)
    assert nvlink(tick(source)) == (5, 1.5)
    clock.now += 2
    assert nvlink(tick(source)) == (0, 0)


def test_nvlink_counters_that_began_anew_give_no_negative_rate(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], clock: Clock
) -> None:
    set_nvlink(gpu, 1 << 40, 1 << 40)
    source = begin()
    for _ in range(2):
        tick(source)
    clock.now += 2
    set_nvlink(gpu, 0, 0)
    assert nvlink(tick(source)) == (None, None)
    clock.now += 2
    set_nvlink(gpu, 2048, 4096)
    assert nvlink(tick(source)) == (1, 2)


def test_nvlink_counters_with_all_bits_set_are_no_throughput(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], clock: Clock
) -> None:
    set_nvlink(gpu, 2**64 - 1, 2**64 - 1)
    source = begin()
    for _ in range(4):
        assert nvlink(tick(source)) == (None, None)
        clock.now += 2
