"""What a tick says about the time since the tick before: samples, counters, GPM and per-process utilization."""

from __future__ import annotations

import ctypes
import logging
import math
import struct
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import fake_nvml
import pynvml
import pytest
from fake_nvml import GIB, FakeGpu, FakeNvml

from gpumon_core import observer
from gpumon_core.attribution.local import LocalAttribution
from gpumon_core.metrics import ALL_LINKS, GPU_METRICS, RARELY_S
from gpumon_core.observer import Observer
from gpumon_core.telemetry import plan
from gpumon_core.telemetry.nvml import NvmlSource
from gpumon_core.telemetry.records import GpuReading, ProcessReading, Snapshot, SourceUnavailable
from gpumon_core.telemetry.samples import DOUBTFUL_AFTER, weighted
from gpumon_core.telemetry.usage import DOUBTFUL_AFTER as QUIET_READS

POWER, GPU, MEMORY = (
    pynvml.NVML_TOTAL_POWER_SAMPLES,
    pynvml.NVML_GPU_UTILIZATION_SAMPLES,
    pynvml.NVML_MEMORY_UTILIZATION_SAMPLES,
)
MIB = 2**20
SECOND = 1_000_000  # of the samples' clock, which counts microseconds
# When the fake's first sample was taken.
START = 1_700_000_000 * SECOND
RARE = {metric.key for metric in GPU_METRICS if metric.every_s}


class Clock:
    """The monotonic clock of the plan, which only a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(plan, "time", SimpleNamespace(monotonic=found.monotonic))
    return found


@pytest.fixture
def gpu(fake: FakeNvml) -> Iterator[FakeGpu]:
    """The one GPU of a driver that pynvml is pointed at; at a glance it is idle."""
    board = fake.add_gpu(uuid="GPU-first", gpu_utilization=3, memory_utilization=2, power_mw=50_000)
    with fake_nvml.loaded(fake):
        yield board


@pytest.fixture
def begin(gpu: FakeGpu, clock: Clock) -> Iterator[Callable[[], NvmlSource]]:
    """Begins sources that end with the test."""
    begun: list[NvmlSource] = []

    def source() -> NvmlSource:
        begun.append(NvmlSource("testhost"))
        return begun[-1]

    yield source
    for each in begun:
        each.close()


def reading(snapshot: Snapshot, uuid: str = "GPU-first") -> GpuReading:
    (found,) = (each for each in snapshot.readings if each.uuid == uuid)
    return found


def tick(source: NvmlSource, uuid: str = "GPU-first") -> dict[str, float | None]:
    """The next reading's values."""
    return dict(reading(source.read(), uuid).values)


def used(found: dict[str, float | None]) -> tuple[float | None, ...]:
    """Mean and highest utilization, of the SMs and of the memory controller."""
    keys = ("utilization", "utilization_max", "memory_utilization", "memory_utilization_max")
    return tuple(found[key] for key in keys)


def add(gpu: FakeGpu, kind: int, *samples: tuple[float, int]) -> None:
    """Samples as (seconds since START, value)."""
    for seconds, value in samples:
        gpu.add_sample(kind, value, START + round(seconds * SECOND))


class Sampler:
    """A driver's nvmlDeviceGetSamples of which a test says everything: types, repetitions, old habits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: int = GPU) -> None:
        self.kind = kind
        self.type = pynvml.NVML_VALUE_TYPE_UNSIGNED_INT
        # (seconds since START, the eight bytes of the value).
        self.kept: list[tuple[float, int]] = []
        self.repeats = False
        self.refuses_to_crop = False
        self.rooms: list[int] = []
        self.since: list[int] = []
        monkeypatch.setitem(pynvml._nvmlGetFunctionPointer_cache, "nvmlDeviceGetSamples", self)

    def __call__(self, handle: Any, kind: Any, since: Any, type_: Any, count: Any, words: Any) -> int:
        if kind.value != self.kind:
            return int(pynvml.NVML_ERROR_NOT_SUPPORTED)
        samples = [(START + round(seconds * SECOND), word) for seconds, word in self.kept]
        self.since.append(since.value)
        if not self.repeats:
            samples = [sample for sample in samples if sample[0] > since.value]
        if not samples:
            return int(pynvml.NVML_ERROR_NOT_FOUND)
        type_._obj.value = self.type
        room, count._obj.value = count._obj.value, len(samples)
        self.rooms.append(room)
        if len(samples) > room:
            if self.refuses_to_crop:
                return int(pynvml.NVML_ERROR_INSUFFICIENT_SIZE)
            count._obj.value = room
        for place, sample in enumerate(samples[:room]):
            words[2 * place], words[2 * place + 1] = sample
        return 0


# ---- Utilization: the mean over the time since the tick before -------------------------------------


def test_the_first_tick_is_a_point_reading(gpu: FakeGpu, begin: Callable[[], NvmlSource]) -> None:
    add(gpu, GPU, (1, 90), (2, 95))
    add(gpu, MEMORY, (1, 80), (2, 85))
    assert used(tick(begin())) == (3, 3, 2, 2)


def test_a_tick_is_the_time_weighted_mean_of_the_samples_since_the_tick_before(
    gpu: FakeGpu, begin: Callable[[], NvmlSource]
) -> None:
    add(gpu, GPU, (0, 77))
    add(gpu, MEMORY, (0, 66))
    source = begin()
    tick(source)
    # One second at 100 %, three at 20 %, and 1 of 5 seconds at 40 %, 4 at 10 %.
    add(gpu, GPU, (1, 100), (4, 20))
    add(gpu, MEMORY, (1, 40), (5, 10))
    assert used(tick(source)) == (40.0, 100, 16.0, 40)
    # What the next tick weighs begins where this one ended.
    add(gpu, GPU, (6, 50), (9, 0))
    add(gpu, MEMORY, (6, 30))
    assert used(tick(source)) == (20.0, 50, 30.0, 30)


def test_a_tick_without_new_samples_is_a_point_reading(gpu: FakeGpu, begin: Callable[[], NvmlSource]) -> None:
    add(gpu, GPU, (0, 77))
    source = begin()
    tick(source)
    add(gpu, GPU, (1, 60))
    assert used(tick(source))[:2] == (60, 60)
    for _ in range(2 * DOUBTFUL_AFTER + 1):
        assert used(tick(source))[:2] == (3, 3)
    add(gpu, GPU, (2, 40), (3, 50))
    assert used(tick(source))[:2] == (45, 50)


def test_one_of_two_utilizations_may_have_samples_and_the_other_none(
    fake: FakeNvml, gpu: FakeGpu, begin: Callable[[], NvmlSource]
) -> None:
    add(gpu, GPU, (0, 77))
    source = begin()
    tick(source)
    add(gpu, GPU, (1, 60), (2, 70))
    assert used(tick(source)) == (65, 70, 2, 2)


def test_where_samples_tell_everything_the_point_reading_is_not_asked(
    fake: FakeNvml, gpu: FakeGpu, begin: Callable[[], NvmlSource]
) -> None:
    for kind in (GPU, MEMORY, POWER):
        add(gpu, kind, (0, 10))
    source = begin()
    tick(source)
    fake.reset_calls()
    for kind in (GPU, MEMORY, POWER):
        add(gpu, kind, (1, 20))
    tick(source)
    assert fake.calls("nvmlDeviceGetUtilizationRates") == 0
    assert fake.calls("nvmlDeviceGetPowerUsage") == 0


@pytest.mark.parametrize(
    ("kind", "words", "mean", "highest"),
    [
        ("DOUBLE", [struct.unpack("<Q", struct.pack("<d", x))[0] for x in (12.5, 37.5)], 25.0, 37.5),
        ("UNSIGNED_INT", [20, 0xDEADBEEF_00000028], 30, 40),
        ("UNSIGNED_LONG", [20, 40], 30, 40),
        ("UNSIGNED_LONG_LONG", [20, 40], 30, 40),
        ("SIGNED_LONG_LONG", [20, 40], 30, 40),
        ("SIGNED_INT", [20, 0xDEADBEEF_00000028], 30, 40),
        ("UNSIGNED_SHORT", [20, 0xDEADBEEF_CAFE0028], 30, 40),
    ],
)
def test_samples_of_every_type_are_read(
    gpu: FakeGpu,
    begin: Callable[[], NvmlSource],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    words: list[int],
    mean: float,
    highest: float,
) -> None:
    sampler = Sampler(monkeypatch)
    sampler.type = getattr(pynvml, f"NVML_VALUE_TYPE_{kind}")
    sampler.kept = [(0, words[0])]
    source = begin()
    tick(source)
    sampler.kept = [(1, words[0]), (2, words[1])]
    assert used(tick(source))[:2] == (mean, highest)


def test_a_sample_above_100_percent_is_ignored(gpu: FakeGpu, begin: Callable[[], NvmlSource]) -> None:
    add(gpu, GPU, (0, 0))
    source = begin()
    tick(source)
    add(gpu, GPU, (1, 30), (2, 101), (3, 0xFFFFFFFF), (4, 50))
    assert used(tick(source))[:2] == (40, 50)


def test_where_every_sample_is_above_100_percent_the_point_reading_stands(
    gpu: FakeGpu, begin: Callable[[], NvmlSource]
) -> None:
    add(gpu, GPU, (0, 0))
    source = begin()
    tick(source)
    add(gpu, GPU, (1, 255), (2, 101))
    assert used(tick(source))[:2] == (3, 3)


def test_a_power_sample_with_all_bits_set_is_ignored(gpu: FakeGpu, begin: Callable[[], NvmlSource]) -> None:
    gpu.energy_mj = None
    add(gpu, POWER, (0, 0))
    source = begin()
    tick(source)
    add(gpu, POWER, (1, 100_000), (2, 0xFFFFFFFF), (3, 200_000))
    found = tick(source)
    assert (found["power"], found["power_max"]) == (150, 200)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_sample_that_is_no_number_is_ignored(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch, number: float
) -> None:
    sampler = Sampler(monkeypatch)
    sampler.type = pynvml.NVML_VALUE_TYPE_DOUBLE
    words = [struct.unpack("<Q", struct.pack("<d", value))[0] for value in (10.0, number, 30.0)]
    sampler.kept = [(0, words[0])]
    source = begin()
    tick(source)
    sampler.kept = [(1, words[0]), (2, words[1]), (3, words[2])]
    assert used(tick(source))[:2] == (20, 30)


@pytest.mark.parametrize("refuses", [False, True], ids=["crops", "insufficient size"])
def test_more_samples_than_the_buffer_holds_make_it_grow(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    sampler = Sampler(monkeypatch)
    sampler.refuses_to_crop = refuses
    sampler.kept = [(0, 50)]
    source = begin()
    tick(source)
    sampler.kept = [(number / 10, 100 if number > 500 else 0) for number in range(1, 1001)]
    assert used(tick(source))[:2] == (50, 100)
    assert sampler.rooms[-1] > 1000
    sampler.rooms.clear()
    sampler.kept = [(101 + number / 10, 10) for number in range(900)]
    assert used(tick(source))[:2] == (10, 10)
    assert len(sampler.rooms) == 1, "the larger buffer is kept"


def test_a_full_ring_of_the_driver_is_read_whole(gpu: FakeGpu, begin: Callable[[], NvmlSource]) -> None:
    add(gpu, GPU, (0, 0))
    source = begin()
    tick(source)
    add(gpu, GPU, *((number / 5, 100 if number % 2 else 0) for number in range(1, 129)))
    assert used(tick(source))[:2] == (50, 100)


def test_a_driver_that_never_says_how_much_room_it_needs_does_not_hold_the_tick(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never_content(*_: Any) -> int:
        return int(pynvml.NVML_ERROR_INSUFFICIENT_SIZE)

    monkeypatch.setitem(pynvml._nvmlGetFunctionPointer_cache, "nvmlDeviceGetSamples", never_content)
    source = begin()
    assert used(tick(source)) == used(tick(source)) == (3, 3, 2, 2)


def test_samples_that_the_driver_repeats_are_counted_once(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Sampler(monkeypatch)
    sampler.repeats = True
    sampler.kept = [(0, 90), (1, 90)]
    source = begin()
    tick(source)
    sampler.kept += [(2, 10), (3, 20)]
    assert used(tick(source))[:2] == (15, 20)
    assert used(tick(source))[:2] == (3, 3)


def test_samples_out_of_order_are_put_in_order(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Sampler(monkeypatch)
    sampler.kept = [(0, 0)]
    source = begin()
    tick(source)
    sampler.kept = [(4, 20), (1, 100)]
    assert used(tick(source))[:2] == (40, 100)
    assert sampler.since[-1] == START
    tick(source)
    assert sampler.since[-1] == START + 4 * SECOND


def test_the_last_seen_timestamp_is_passed_on(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Sampler(monkeypatch)
    source = begin()
    for seconds in (0, 1, 5):
        sampler.kept.append((seconds, 10))
        tick(source)
    assert sampler.since == [0, START, START + SECOND]


@pytest.mark.parametrize("back_s", [5, 3600, 100_000_000])
def test_a_driver_clock_that_was_set_back_is_adopted_after_a_few_ticks(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch, back_s: float
) -> None:
    sampler = Sampler(monkeypatch)
    sampler.kept = [(0, 50)]
    source = begin()
    tick(source)
    seen = []
    for number in range(1, DOUBTFUL_AFTER + 3):
        # The driver begins its list anew.
        sampler.kept = [(number - back_s - 0.5, 60), (number - back_s, 80)]
        seen.append(tick(source)["utilization"])
    if back_s > DOUBTFUL_AFTER + 3:
        assert seen[:DOUBTFUL_AFTER] == [3] * DOUBTFUL_AFTER
    assert seen[-2:] == [70, 70]


def test_a_clock_set_back_under_a_ring_of_older_samples_is_adopted_once_they_are_gone(
    gpu: FakeGpu, begin: Callable[[], NvmlSource]
) -> None:
    add(gpu, GPU, *((1000 + number / 6, 50) for number in range(128)))
    source = begin()
    tick(source)
    seen = []
    for second in range(30):
        add(gpu, GPU, *((second + number / 6, 80) for number in range(6)))
        seen.append(tick(source)["utilization"])
    assert set(seen) == {3, 80}, "never a mean of both clocks"
    assert seen[-4:] == [80] * 4


def test_a_clock_set_forward_costs_nothing(gpu: FakeGpu, begin: Callable[[], NvmlSource]) -> None:
    add(gpu, GPU, (0, 0))
    source = begin()
    tick(source)
    add(gpu, GPU, *((3600 + number / 6, 90 if number else 0) for number in range(12)))
    found = tick(source)["utilization"]
    assert found == pytest.approx(90 * 11 / 12, abs=0.1), "the jump is not time that the first sample speaks of"


def test_a_weighted_mean_is_within_its_samples() -> None:
    assert weighted(0, [10], [42], 100) == (42, 42)
    assert weighted(0, [10, 10], [40, 60], 100) == (40, 60)
    assert weighted(10, [10, 10], [40, 60], 100) == (50, 60)
    assert weighted(0, [10, 40], [100, 0], None) == (25, 100)


def test_a_gpu_without_samples_is_sampled_at_points_and_one_with_them_by_interval(
    fake: FakeNvml, gpu: FakeGpu, begin: Callable[[], NvmlSource]
) -> None:
    fake.add_gpu(uuid="GPU-second")
    fake.fail("nvmlDeviceGetSamples", pynvml.NVML_ERROR_NOT_SUPPORTED, gpu=0)
    source = begin()
    seen = []
    for second in range(4):
        add(fake.gpus[1], GPU, (second, 1))
        snapshot = source.read()
        assert reading(snapshot).sampling == "point"
        seen.append(reading(snapshot, "GPU-second").sampling)
    assert seen == ["point", "interval", "interval", "interval"], "the first tick has nothing before it"
    assert [by_interval for _, by_interval, _, _ in source.offers()] == [False, True]
    assert fake.calls("nvmlDeviceGetSamples", 0) == 3, "each kind is asked once"


# ---- Power: the energy counter's difference -------------------------------------------------------


def test_power_is_what_the_energy_counter_grew_by_over_the_time_between(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], clock: Clock
) -> None:
    source = begin()
    first = tick(source)
    assert (first["power"], first["energy"]) == (50, 1000)
    gpu.energy_mj += 600_000
    clock.now += 2
    found = tick(source)
    assert (found["power"], found["power_max"], found["energy"]) == (300, 300, 1600)
    gpu.energy_mj += 100_000
    clock.now += 1
    assert tick(source)["power"] == 100


def test_the_highest_power_comes_from_the_samples(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], clock: Clock
) -> None:
    add(gpu, POWER, (0, 100_000))
    source = begin()
    tick(source)
    add(gpu, POWER, (1, 100_000), (2, 420_000))
    gpu.energy_mj += 600_000
    clock.now += 2
    found = tick(source)
    assert (found["power"], found["power_max"]) == (300, 420)


def test_the_highest_power_is_never_below_the_mean(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], clock: Clock
) -> None:
    add(gpu, POWER, (0, 100_000))
    source = begin()
    tick(source)
    add(gpu, POWER, (1, 100_000), (2, 110_000))
    gpu.energy_mj += 600_000
    clock.now += 2
    found = tick(source)
    assert (found["power"], found["power_max"]) == (300, 300)


def test_an_energy_counter_that_began_anew_gives_no_negative_power(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], clock: Clock
) -> None:
    source = begin()
    tick(source)
    gpu.energy_mj = 5_000
    clock.now += 2
    found = tick(source)
    assert (found["power"], found["energy"]) == (50, 5)
    gpu.energy_mj += 240_000
    clock.now += 2
    assert tick(source)["power"] == 120


def test_an_energy_counter_that_began_anew_within_a_short_tick_counts_from_there(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], clock: Clock
) -> None:
    source = begin()
    tick(source)
    gpu.energy_mj = 5_000
    clock.now += 0.2
    assert tick(source)["power"] == 50
    # The first step back is doubted for a reading.
    for power in (50, 120):
        gpu.energy_mj += 120_000
        clock.now += 1
        assert tick(source)["power"] == power


def test_an_energy_counter_that_stands_still_is_not_believed(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], clock: Clock
) -> None:
    source = begin()
    for _ in range(3):
        assert tick(source)["power"] == 50
        clock.now += 2


def test_an_energy_counter_is_not_read_over_too_short_a_time(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], clock: Clock
) -> None:
    source = begin()
    tick(source)
    for _ in range(4):
        clock.now += 0.2
        gpu.energy_mj += 20_000
        found = tick(source)["power"]
        # 0.6 s have passed: 60 J.
        assert found == (100 if clock.now == pytest.approx(1000.6) else 50)


def test_without_an_energy_counter_power_is_the_mean_of_its_samples(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], clock: Clock
) -> None:
    gpu.energy_mj = None
    add(gpu, POWER, (0, 100_000))
    source = begin()
    first = tick(source)
    assert (first["power"], first["power_max"], first["energy"]) == (50, 50, None)
    add(gpu, POWER, (1, 100_000), (4, 200_000))
    clock.now += 4
    found = tick(source)
    assert (found["power"], found["power_max"]) == (175, 200)
    assert [counter for _, _, counter, _ in source.offers()] == [False]


def test_without_counter_and_samples_power_is_a_point_reading(
    fake: FakeNvml, gpu: FakeGpu, begin: Callable[[], NvmlSource], clock: Clock
) -> None:
    gpu.energy_mj = None
    fake.hide("nvmlDeviceGetSamples")
    source = begin()
    for power in (50_000, 70_500):
        gpu.power_mw = power
        found = tick(source)
        assert found["power"] == found["power_max"] == power / 1000
        clock.now += 2


def test_a_failure_of_the_energy_counter_costs_its_own_tick(
    fake: FakeNvml, gpu: FakeGpu, begin: Callable[[], NvmlSource], clock: Clock
) -> None:
    source = begin()
    tick(source)
    fake.fail("nvmlDeviceGetFieldValues", pynvml.NVML_ERROR_UNKNOWN, times=1)
    gpu.energy_mj += 200_000
    clock.now += 2
    found = tick(source)
    assert (found["power"], found["energy"]) == (50, None)
    gpu.energy_mj += 200_000
    clock.now += 2
    assert tick(source)["power"] == 100, "over both ticks"


# ---- Field values --------------------------------------------------------------------------------

# Key -> the field, what it says, and what the reading then is.
FIELDS: dict[str, tuple[str, int, float]] = {
    "memory_temperature": ("MEMORY_TEMP", 88, 88),
    "energy": ("TOTAL_ENERGY_CONSUMPTION", 7_654_321, 7654.321),
    "ecc_corrected_volatile": ("ECC_SBE_VOL_TOTAL", 11, 11),
    "ecc_uncorrected_volatile": ("ECC_DBE_VOL_TOTAL", 12, 12),
    "ecc_corrected_aggregate": ("ECC_SBE_AGG_TOTAL", 13, 13),
    "ecc_uncorrected_aggregate": ("ECC_DBE_AGG_TOTAL", 14, 14),
    "remapped_rows_corrected": ("REMAPPED_COR", 15, 15),
    "remapped_rows_uncorrected": ("REMAPPED_UNC", 16, 16),
    "remapped_rows_pending": ("REMAPPED_PENDING", 1, 1),
    "remapped_rows_failure": ("REMAPPED_FAILURE", 1, 1),
    "retired_pages_corrected": ("RETIRED_SBE", 17, 17),
    "retired_pages_uncorrected": ("RETIRED_DBE", 18, 18),
    "retired_pages_pending": ("RETIRED_PENDING", 1, 1),
    "nvlink_crc_flit_errors": ("NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL", 19, 19),
    "nvlink_crc_data_errors": ("NVLINK_CRC_DATA_ERROR_COUNT_TOTAL", 20, 20),
    "nvlink_replay_errors": ("NVLINK_REPLAY_ERROR_COUNT_TOTAL", 21, 21),
    "nvlink_recovery_errors": ("NVLINK_RECOVERY_ERROR_COUNT_TOTAL", 22, 22),
    "nvlink_crc_errors": ("NVLINK_ERROR_DL_CRC", 23, 23),
}
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


def field_id(name: str) -> int:
    return int(getattr(pynvml, f"NVML_FI_DEV_{name}"))


@pytest.fixture
def worn(gpu: FakeGpu) -> FakeGpu:
    """The GPU with errors that its functions count otherwise than its fields."""
    for count, (uncorrected, aggregate) in enumerate(((False, False), (True, False), (False, True), (True, True))):
        gpu.set_ecc_errors(31 + count, uncorrected=uncorrected, aggregate=aggregate)
    gpu.remapped_correctable, gpu.remapped_uncorrectable = 35, 36
    for address, cause in ((0x1000, 0), (0x2000, 0), (0x3000, 1)):
        gpu.retire_page(address, cause=cause)
    for name, value, _ in FIELDS.values():
        gpu.set_field(field_id(name), value)
    return gpu


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


# ---- NVLink throughput: a counter's growth ---------------------------------------------------------


def set_nvlink(gpu: FakeGpu, sent_kib: int, received_kib: int) -> None:
    gpu.set_field(pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, sent_kib, scope=ALL_LINKS)
    gpu.set_field(pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, received_kib, scope=ALL_LINKS)


def nvlink(found: dict[str, float | None]) -> tuple[float | None, float | None]:
    return found["nvlink_tx"], found["nvlink_rx"]


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


# ---- Functions of a tick -------------------------------------------------------------------------


def test_engines_clocks_state_and_reasons_arrive_in_their_units(
    gpu: FakeGpu, begin: Callable[[], NvmlSource]
) -> None:
    attributes = {
        "encoder_utilization": 11,
        "decoder_utilization": 12,
        "jpeg_utilization": 13,
        "ofa_utilization": 14,
        "sm_clock": 1980,
        "memory_clock": 2619,
        "graphics_clock": 1981,
        "video_clock": 1545,
        "performance_state": 0,
        "bar1_used": 3 * MIB,
        "power_enforced_limit_mw": 700_000,
        "max_sm_clock": 1980,
        "max_memory_clock": 2620,
        "max_graphics_clock": 1982,
        "max_video_clock": 1546,
        "pcie_generation": 5,
        "pcie_max_generation": 6,
        "pcie_width": 8,
        "pcie_max_width": 16,
        "pcie_replays": 9,
    }
    for name, value in attributes.items():
        setattr(gpu, name, value)
    gpu.clocks_event_reasons = 0x24
    gpu.pcie_tx_kib_s, gpu.pcie_rx_kib_s = 2048, 512
    renamed = {
        "power_enforced_limit_mw": ("power_limit", 700),
        "bar1_used": ("bar1_used", 3),
        "pcie_max_generation": ("max_pcie_generation", 6),
        "pcie_max_width": ("max_pcie_width", 16),
    }
    source = begin()
    found = tick(source)
    expected = dict(renamed.get(name, (name, value)) for name, value in attributes.items())
    expected |= {"clocks_event_reasons": 0x24, "pcie_tx": 2, "pcie_rx": 0.5}
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize("state", [32, 16, 0xFFFFFFFF, None])
def test_a_performance_state_that_is_unknown_is_none(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], state: int | None
) -> None:
    gpu.performance_state = state
    assert tick(begin()).get("performance_state") is None


@pytest.mark.parametrize("reasons", [0, 1, 0x1FF, 1 << 40])
def test_throttle_reasons_on_an_older_driver_come_from_the_older_call(
    fake: FakeNvml, gpu: FakeGpu, begin: Callable[[], NvmlSource], reasons: int
) -> None:
    gpu.clocks_event_reasons = reasons
    assert tick(begin())["clocks_event_reasons"] == reasons
    fake.hide("nvmlDeviceGetCurrentClocksEventReasons")
    assert tick(begin())["clocks_event_reasons"] == reasons


@pytest.mark.parametrize("engine", ["encoder", "decoder", "jpeg", "ofa"])
@pytest.mark.parametrize("share", [None, 101, 0xFFFFFFFF])
def test_an_engine_that_does_not_say_a_percentage_is_none(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], engine: str, share: int | None
) -> None:
    setattr(gpu, f"{engine}_utilization", share)
    assert tick(begin())[f"{engine}_utilization"] is None


@pytest.mark.parametrize("name", ["sm", "memory", "graphics", "video"])
def test_one_clock_that_is_missing_leaves_the_others(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], name: str
) -> None:
    setattr(gpu, f"{name}_clock", None)
    setattr(gpu, f"max_{name}_clock", None)
    found = tick(begin())
    for clock_name in ("sm", "memory", "graphics", "video"):
        assert (found[f"{clock_name}_clock"] is None) == (clock_name == name)
        assert (f"max_{clock_name}_clock" in found) == (clock_name != name)


def test_what_changes_rarely_is_asked_on_the_first_tick_and_then_once_a_minute(
    worn: FakeGpu, begin: Callable[[], NvmlSource], clock: Clock
) -> None:
    source = begin()
    assert tick(source).keys() >= RARE
    for _ in range(int(RARELY_S) - 1):
        clock.now += 1
        assert not tick(source).keys() & RARE
    worn.set_ecc_errors(0)
    worn.set_field(field_id("ECC_SBE_VOL_TOTAL"), 4711)
    clock.now += 1
    found = tick(source)
    assert found.keys() >= RARE
    assert found["ecc_corrected_volatile"] == 4711
    assert not tick(source).keys() & RARE


def test_the_gpus_of_a_machine_are_asked_their_rare_values_in_ticks_of_their_own(
    fake: FakeNvml, gpu: FakeGpu, begin: Callable[[], NvmlSource], clock: Clock
) -> None:
    for number in range(3):
        fake.add_gpu(uuid=f"GPU-{number}")
    source = begin()
    assert all("power_limit" in each.values for each in source.read().readings)
    counts = []
    for _ in range(150):
        clock.now += 1
        counts.append(sum("power_limit" in each.values for each in source.read().readings))
    assert max(counts) == 1
    assert sum(counts) == 8


# ---- GPM -----------------------------------------------------------------------------------------

GPM = {
    "graphics_activity": ("GRAPHICS_UTIL", 91.04, 91.04),
    "sm_activity": ("SM_UTIL", 82.5, 82.5),
    "sm_occupancy": ("SM_OCCUPANCY", 33.3333, 33.333),
    "tensor_activity": ("ANY_TENSOR_UTIL", 54.0, 54),
    "dram_activity": ("DRAM_BW_UTIL", 0.0, 0),
    "pcie_tx": ("PCIE_TX_PER_SEC", 1234.5, 1234.5),
    "pcie_rx": ("PCIE_RX_PER_SEC", 0.25, 0.25),
    "nvlink_tx": ("NVLINK_TOTAL_TX_PER_SEC", 400_000.0, 400_000),
    "nvlink_rx": ("NVLINK_TOTAL_RX_PER_SEC", 1.0, 1),
}
GPM_VALUES = {key: value for key, (_, _, value) in GPM.items()}
EACH_GPM = pytest.mark.parametrize("key", GPM)


def metric_id(key: str) -> int:
    return int(getattr(pynvml, f"NVML_GPM_METRIC_{GPM[key][0]}"))


def measured(found: dict[str, float | None]) -> dict[str, float | None]:
    return {key: found[key] for key in GPM}


@pytest.fixture
def hopper(gpu: FakeGpu) -> FakeGpu:
    """The GPU with performance monitoring, and other numbers where its functions tell the same."""
    gpu.gpm_supported = 1
    gpu.pcie_tx_kib_s, gpu.pcie_rx_kib_s = 5 * 1024, 6 * 1024
    for key, (_, value, _) in GPM.items():
        gpu.set_gpm(metric_id(key), value)
    return gpu


def test_gpm_has_nothing_on_the_first_tick_and_everything_on_the_second(
    fake: FakeNvml, hopper: FakeGpu, begin: Callable[[], NvmlSource]
) -> None:
    source = begin()
    assert measured(tick(source)) == dict.fromkeys(GPM)
    assert measured(tick(source)) == GPM_VALUES
    hopper.set_gpm(metric_id("sm_activity"), 7.0)
    assert measured(tick(source)) == {**GPM_VALUES, "sm_activity": 7}
    assert fake.calls("nvmlDeviceGetPcieThroughput") == 0
    assert fake.calls("nvmlGpmSampleGet") == 3
    assert fake.calls("nvmlGpmSampleAlloc") == 2
    assert fake.calls("nvmlGpmQueryDeviceSupport") == 1


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@EACH_GPM
def test_a_gpm_value_that_is_no_number_is_none_this_time(
    hopper: FakeGpu, begin: Callable[[], NvmlSource], key: str, number: float
) -> None:
    source = begin()
    tick(source)
    hopper.set_gpm(metric_id(key), number)
    assert measured(tick(source)) == {**GPM_VALUES, key: None}
    hopper.set_gpm(metric_id(key), GPM[key][1])
    assert measured(tick(source)) == GPM_VALUES


def test_a_gpm_share_above_100_percent_is_none(hopper: FakeGpu, begin: Callable[[], NvmlSource]) -> None:
    source = begin()
    tick(source)
    hopper.set_gpm(metric_id("sm_activity"), 100.5)
    hopper.set_gpm(metric_id("dram_activity"), 100.0)
    assert measured(tick(source)) == {**GPM_VALUES, "sm_activity": None, "dram_activity": 100}


@EACH_GPM
def test_a_gpm_metric_that_the_gpu_lacks_is_asked_once_and_the_others_stay(
    hopper: FakeGpu, begin: Callable[[], NvmlSource], key: str
) -> None:
    hopper.set_gpm(metric_id(key), None)
    source = begin()
    tick(source)
    expected = {"pcie_tx": 5, "pcie_rx": 6}.get(key)
    assert measured(tick(source)) == {**GPM_VALUES, key: expected}
    hopper.set_gpm(metric_id(key), 50.0)
    assert measured(tick(source)) == {**GPM_VALUES, key: expected}
    (lacking,) = (lacking for _, _, _, lacking in source.offers())
    # NVLink has its counters as a second way, which this board does not have.
    assert (key in lacking) == (not key.startswith("pcie"))
    assert not set(lacking) & set(GPM) - {key}


def test_a_second_look_that_fails_does_not_cost_the_first(
    fake: FakeNvml, hopper: FakeGpu, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = begin()
    looks = Observer(source, LocalAttribution())

    def meanwhile(_: float) -> None:
        fake.fail("nvmlGpmSampleGet", pynvml.NVML_ERROR_UNINITIALIZED)

    monkeypatch.setattr(observer, "time", SimpleNamespace(sleep=meanwhile))
    snapshot, _ = looks.observe_once(0)
    assert snapshot.readings[0].values["temperature"] is not None
    with pytest.raises(SourceUnavailable):
        source.read()


def test_a_board_without_nvlink_sends_nothing_over_it_rather_than_0(
    fake: FakeNvml, hopper: FakeGpu, begin: Callable[[], NvmlSource]
) -> None:
    # As an H100 of a virtual machine answers: GPM says 0, and of every link NVML says that there is none.
    hopper.set_gpm(metric_id("nvlink_tx"), 0.0)
    hopper.set_gpm(metric_id("nvlink_rx"), 0.0)
    source = begin()
    tick(source)
    assert nvlink(tick(source)) == nvlink(tick(source)) == (None, None)
    assert fake.calls("nvmlDeviceGetNvLinkState") == 1
    (lacking,) = (lacking for _, _, _, lacking in source.offers())
    assert {"nvlink_tx", "nvlink_rx"} <= set(lacking)


def test_a_board_whose_links_are_quiet_or_down_sends_0(hopper: FakeGpu, begin: Callable[[], NvmlSource]) -> None:
    hopper.set_nvlink(0, active=False)
    hopper.set_gpm(metric_id("nvlink_rx"), 0.0)
    source = begin()
    tick(source)
    assert nvlink(tick(source)) == (400_000, 0)


@pytest.mark.parametrize(
    "absent", ["nvmlGpmQueryDeviceSupport", "nvmlGpmSampleAlloc", "nvmlGpmSampleGet", "nvmlGpmMetricsGet", None]
)
def test_without_gpm_pcie_throughput_comes_from_its_function(
    fake: FakeNvml, hopper: FakeGpu, begin: Callable[[], NvmlSource], absent: str | None
) -> None:
    if absent:
        fake.hide(absent)
    else:
        hopper.gpm_supported = 0
    source = begin()
    first = measured(tick(source))
    if absent != "nvmlGpmMetricsGet":
        assert first == {**dict.fromkeys(GPM), "pcie_tx": 5, "pcie_rx": 6}
    for _ in range(2):
        assert measured(tick(source)) == {**dict.fromkeys(GPM), "pcie_tx": 5, "pcie_rx": 6}
    fake.reset_calls()
    tick(source)
    assert sum(fake.calls(name) for name in fake_nvml.functions() if "Gpm" in name) == 0


@pytest.mark.parametrize("error", ["UNKNOWN", "TIMEOUT", "INSUFFICIENT_RESOURCES", "MEMORY", "NOT_READY"])
@pytest.mark.parametrize(
    "function", ["nvmlGpmQueryDeviceSupport", "nvmlGpmSampleAlloc", "nvmlGpmSampleGet", "nvmlGpmMetricsGet"]
)
def test_a_gpm_call_that_fails_this_time_is_tried_again(
    fake: FakeNvml, hopper: FakeGpu, begin: Callable[[], NvmlSource], function: str, error: str
) -> None:
    source = begin()
    fake.fail(function, getattr(pynvml, f"NVML_ERROR_{error}"), times=1)
    for _ in range(3):
        found = measured(tick(source))
    assert found == GPM_VALUES


def test_a_gpm_sample_that_is_missing_makes_the_next_one_the_first(
    fake: FakeNvml, hopper: FakeGpu, begin: Callable[[], NvmlSource]
) -> None:
    source = begin()
    for _ in range(2):
        tick(source)
    fake.fail("nvmlGpmSampleGet", pynvml.NVML_ERROR_UNKNOWN, times=1)
    assert measured(tick(source)) == dict.fromkeys(GPM)
    assert measured(tick(source)) == dict.fromkeys(GPM)
    assert measured(tick(source)) == GPM_VALUES


def test_gpm_samples_are_given_back(fake: FakeNvml, hopper: FakeGpu, begin: Callable[[], NvmlSource]) -> None:
    fake.add_gpu(uuid="GPU-second", gpm_supported=1)
    source = begin()
    tick(source)
    source.close()
    assert fake.calls("nvmlGpmSampleAlloc") == fake.calls("nvmlGpmSampleFree") == 4


def test_a_mig_instance_is_measured_through_its_parent(
    fake: FakeNvml, hopper: FakeGpu, begin: Callable[[], NvmlSource]
) -> None:
    for number, name in ((3, "a"), (9, "b")):
        mig = hopper.add_mig(uuid=f"MIG-{name}", gpu_instance_id=number)
        mig.set_gpm(metric_id("sm_activity"), 10.0 + number)
    source = begin()
    assert tick(source, "MIG-a")["sm_activity"] is None
    snapshot = source.read()
    assert reading(snapshot, "MIG-a").values["sm_activity"] == 13
    assert reading(snapshot, "MIG-b").values["sm_activity"] == 19
    assert reading(snapshot).values["sm_activity"] == 82.5
    assert reading(snapshot, "MIG-a").values["pcie_tx"] is None
    assert fake.calls("nvmlGpmMigSampleGet") == 4
    assert fake.calls("nvmlGpmSampleGet") == 2


def test_a_mig_instance_whose_number_is_not_known_is_not_given_its_parents_numbers(
    fake: FakeNvml, hopper: FakeGpu, begin: Callable[[], NvmlSource]
) -> None:
    hopper.add_mig(uuid="MIG-a", gpu_instance_id=3).set_gpm(metric_id("sm_activity"), 13.0)
    fake.fail("nvmlDeviceGetGpuInstanceId", pynvml.NVML_ERROR_UNKNOWN)
    source = begin()
    for _ in range(3):
        assert tick(source, "MIG-a")["sm_activity"] is None


# ---- What each process used ----------------------------------------------------------------------

INFO, SAMPLE = "nvmlDeviceGetProcessesUtilizationInfo", "nvmlDeviceGetProcessUtilization"
Use = tuple[int | None, int | None, int | None, int | None]


def process(snapshot: Snapshot, pid: int) -> ProcessReading:
    (found,) = (each for each in snapshot.processes if each.pid == pid)
    return found


def use(snapshot: Snapshot, pid: int) -> Use:
    found = process(snapshot, pid)
    return (
        found.sm_utilization,
        found.memory_utilization,
        found.encoder_utilization,
        found.decoder_utilization,
    )


@pytest.fixture
def api(request: pytest.FixtureRequest, fake: FakeNvml, gpu: FakeGpu) -> str:
    """The call that tells: the older one where the driver does not have the newer."""
    if request.param == SAMPLE:
        fake.hide(INFO)
    return str(request.param)


EACH_API = pytest.mark.parametrize("api", [INFO, SAMPLE], indirect=True)


class Usage:
    """A driver's per-process samples of which a test says everything, through either call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, api: str) -> None:
        # (pid, time, (sm, memory, encoder, decoder)).
        self.kept: list[tuple[int, int, tuple[int, int, int, int]]] = []
        self.since: list[int] = []
        self.repeats = False
        call = self._info if api == INFO else self._sample
        monkeypatch.setitem(pynvml._nvmlGetFunctionPointer_cache, api, call)

    def _found(self, since: int, room: int) -> tuple[int, int]:
        self.since.append(since)
        self._now = [entry for entry in self.kept if self.repeats or not entry[1] or entry[1] > since]
        if not self._now:
            return int(pynvml.NVML_ERROR_NOT_FOUND), 0
        fits = len(self._now) <= room
        return (0 if fits else int(pynvml.NVML_ERROR_INSUFFICIENT_SIZE)), len(self._now)

    def _info(self, handle: Any, request: Any) -> int:
        asked = request._obj
        code, asked.processSamplesCount = self._found(asked.lastSeenTimeStamp, asked.processSamplesCount)
        if not code:
            text = b"".join(struct.pack("=QIIIIIII4x", t, pid, *u, 0, 0) for pid, t, u in self._now)
            ctypes.memmove(asked.procUtilArray, text, len(text))
        return code

    def _sample(self, handle: Any, memory: Any, count: Any, since: Any) -> int:
        code, count._obj.value = self._found(since.value, count._obj.value)
        if not code:
            text = b"".join(struct.pack("=I4xQIIII", pid, t, *u) for pid, t, u in self._now)
            ctypes.memmove(memory, text, len(text))
        return code


@EACH_API
def test_what_a_process_used_arrives_with_it(
    fake: FakeNvml, gpu: FakeGpu, begin: Callable[[], NvmlSource], api: str
) -> None:
    gpu.add_process(11, GIB, sm=70, memory_utilization=20, encoder=5, decoder=100)
    gpu.add_process(12, GIB, "G", sm=1)
    source = begin()
    for _ in range(2):
        snapshot = source.read()
        assert process(snapshot, 11) == ProcessReading("GPU-first", 11, "C", 1024, 70, 20, 5, 100)
        assert use(snapshot, 12) == (1, 0, 0, 0)
    assert fake.calls(api) == 2
    assert fake.calls(INFO) == (2 if api == INFO else 1), "what is hidden is asked once"


@EACH_API
def test_a_process_that_runs_and_is_not_listed_used_nothing(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], api: str
) -> None:
    gpu.add_process(11, GIB, sm=70)
    gpu.add_process(12, GIB)
    snapshot = begin().read()
    assert use(snapshot, 12) == (0, 0, 0, 0)
    assert use(snapshot, 11) == (70, 0, 0, 0)


@EACH_API
def test_where_nobody_used_anything_everybody_used_nothing(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], api: str
) -> None:
    gpu.add_process(11, GIB)
    source = begin()
    for _ in range(2 * QUIET_READS + 2):
        assert use(source.read(), 11) == (0, 0, 0, 0)


@EACH_API
def test_a_sample_of_a_process_is_counted_once(gpu: FakeGpu, begin: Callable[[], NvmlSource], api: str) -> None:
    running = gpu.add_process(11, GIB, sm=70, time_us=START)
    source = begin()
    assert use(source.read(), 11) == (70, 0, 0, 0)
    assert use(source.read(), 11) == (0, 0, 0, 0)
    running.time_us = START + 1
    assert use(source.read(), 11) == (70, 0, 0, 0)


@EACH_API
def test_the_last_seen_timestamp_of_the_processes_is_passed_on(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    gpu.add_process(11, GIB)
    driver = Usage(monkeypatch, api)
    source = begin()
    for time in (50, 70, 70, 90):
        driver.kept = [(11, time, (9, 0, 0, 0)), (12, time - 10, (9, 0, 0, 0))]
        source.read()
    assert driver.since == [0, 50, 70, 70]


@EACH_API
def test_several_samples_of_one_process_are_averaged(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    gpu.add_process(11, GIB)
    gpu.add_process(12, GIB)
    driver = Usage(monkeypatch, api)
    driver.kept = [
        (11, 50, (10, 0, 4, 255)),
        (12, 50, (90, 0, 0, 0)),
        (11, 60, (30, 1, 0, 8)),
        (11, 70, (50, 2, 0, 6)),
        (0, 70, (99, 99, 99, 99)),
    ]
    snapshot = begin().read()
    assert use(snapshot, 11) == (30, 1, 1, 7)
    assert use(snapshot, 12) == (90, 0, 0, 0)


@EACH_API
def test_process_samples_that_the_driver_repeats_are_counted_once(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    gpu.add_process(11, GIB)
    driver = Usage(monkeypatch, api)
    driver.repeats = True
    driver.kept = [(11, 50, (80, 0, 0, 0))]
    source = begin()
    source.read()
    driver.kept.append((11, 60, (20, 0, 0, 0)))
    assert use(source.read(), 11) == (20, 0, 0, 0)


@EACH_API
def test_a_clock_set_back_is_adopted_for_processes_as_well(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    gpu.add_process(11, GIB)
    driver = Usage(monkeypatch, api)
    driver.kept = [(11, START, (80, 0, 0, 0))]
    source = begin()
    source.read()
    for number in range(QUIET_READS + 2):
        driver.kept = [(11, 1000 + number, (20, 0, 0, 0))]
        snapshot = source.read()
    assert use(snapshot, 11) == (20, 0, 0, 0)


@EACH_API
def test_a_share_above_100_percent_is_not_known(gpu: FakeGpu, begin: Callable[[], NvmlSource], api: str) -> None:
    gpu.add_process(11, GIB, sm=101, memory_utilization=100, encoder=0xFFFFFFFF, decoder=7)
    assert use(begin().read(), 11) == (None, 100, None, 7)


@pytest.mark.parametrize("error", ["NOT_SUPPORTED", "FUNCTION_NOT_FOUND", "ARGUMENT_VERSION_MISMATCH"])
def test_where_neither_call_is_supported_nothing_is_known(
    fake: FakeNvml, gpu: FakeGpu, begin: Callable[[], NvmlSource], error: str
) -> None:
    gpu.add_process(11, GIB, sm=70)
    for function in (INFO, SAMPLE):
        fake.fail(function, getattr(pynvml, f"NVML_ERROR_{error}"))
    source = begin()
    for _ in range(3):
        assert process(source.read(), 11) == ProcessReading("GPU-first", 11, "C", 1024)
    assert (fake.calls(INFO), fake.calls(SAMPLE)) == (1, 1)


@EACH_API
def test_a_failure_costs_the_utilization_of_one_tick(
    fake: FakeNvml, gpu: FakeGpu, begin: Callable[[], NvmlSource], api: str
) -> None:
    gpu.add_process(11, GIB, sm=70)
    fake.fail(api, pynvml.NVML_ERROR_UNKNOWN, times=1)
    source = begin()
    assert use(source.read(), 11) == (None, None, None, None)
    assert use(source.read(), 11) == (70, 0, 0, 0)


@EACH_API
def test_more_processes_than_the_buffer_holds_make_it_grow(
    fake: FakeNvml, gpu: FakeGpu, begin: Callable[[], NvmlSource], api: str
) -> None:
    for pid in range(1000, 1250):
        gpu.add_process(pid, MIB, sm=pid % 100 + 1)
    source = begin()
    snapshot = source.read()
    assert {each.pid: each.sm_utilization for each in snapshot.processes} == {
        pid: pid % 100 + 1 for pid in range(1000, 1250)
    }
    fake.reset_calls()
    source.read()
    assert fake.calls(api) == 1, "the larger buffer is kept"


@EACH_API
def test_a_driver_that_is_never_content_with_the_room_does_not_hold_the_tick(
    fake: FakeNvml, gpu: FakeGpu, begin: Callable[[], NvmlSource], api: str
) -> None:
    gpu.add_process(11, GIB, sm=70)
    fake.fail(api, pynvml.NVML_ERROR_INSUFFICIENT_SIZE)
    assert use(begin().read(), 11) == (None, None, None, None)


def test_where_no_process_runs_their_utilization_is_not_asked(
    fake: FakeNvml, gpu: FakeGpu, begin: Callable[[], NvmlSource]
) -> None:
    tick(begin())
    assert (fake.calls(INFO), fake.calls(SAMPLE)) == (0, 0)


@EACH_API
def test_what_a_process_did_before_it_ended_is_told_once(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    driver = Usage(monkeypatch, api)
    last = gpu.add_process(11, GIB)
    driver.kept = [(11, START, (80, 0, 0, 0))]
    source = begin()
    assert source.read().readings[0].ended == {}
    last.remove()
    driver.kept = [(11, START + 1000, (60, 0, 0, 0))]
    snapshot = source.read()
    assert (snapshot.processes, snapshot.readings[0].ended) == ((), {11: 60})
    asked = len(driver.since)
    assert source.read().readings[0].ended == {}
    assert len(driver.since) == asked, "nobody is there, nor was"


def test_processes_on_mig_instances_have_no_utilization(
    fake: FakeNvml, gpu: FakeGpu, begin: Callable[[], NvmlSource]
) -> None:
    mig = gpu.add_mig(uuid="MIG-a")
    gpu.add_process(11, GIB, mig=mig, sm=70)
    gpu.add_process(12, GIB, sm=70)
    source = begin()
    for _ in range(2):
        snapshot = source.read()
        assert process(snapshot, 11) == ProcessReading("MIG-a", 11, "C", 1024)
        assert process(snapshot, 12) == ProcessReading("GPU-first", 12, "C", 1024)


def test_nothing_of_all_this_is_logged_on_a_healthy_board(
    hopper: FakeGpu,
    begin: Callable[[], NvmlSource],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logging.getLogger("gpumon_core"), "propagate", True)
    caplog.set_level(logging.INFO, logger="gpumon_core")
    hopper.add_process(11, GIB, sm=70)
    source = begin()
    for _ in range(3):
        source.read()
    assert caplog.messages == []
