"""What a tick says of the time since the tick before: the driver's own samples (telemetry/samples.py)."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import one_gpu
import pynvml
import pytest
from fake_nvml import FakeGpu, FakeNvml
from one_gpu import GPU, MEMORY, POWER, SECOND, START, add, reading, tick

from gpumon_core.telemetry.nvml import NvmlSource
from gpumon_core.telemetry.samples import DOUBTFUL_AFTER, weighted

# The fixtures that these tests share.
clock, gpu, begin = one_gpu.clock, one_gpu.gpu, one_gpu.begin


def used(found: dict[str, float | None]) -> tuple[float | None, ...]:
    """Mean and highest utilization, of the SMs and of the memory controller."""
    keys = ("utilization", "utilization_max", "memory_utilization", "memory_utilization_max")
    return tuple(found[key] for key in keys)


class Sampler:
    """A driver's nvmlDeviceGetSamples of which a test says everything: types, repetitions, old habits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: int = GPU) -> None:
        self.kind = kind
        self.type = pynvml.NVML_VALUE_TYPE_UNSIGNED_INT
        # (seconds since START, the eight bytes of the value).
        self.retained: list[tuple[float, int]] = []
        self.repeats = False
        self.refuses_to_crop = False
        self.rooms: list[int] = []
        self.since: list[int] = []
        monkeypatch.setitem(pynvml._nvmlGetFunctionPointer_cache, "nvmlDeviceGetSamples", self)

    def __call__(self, handle: Any, kind: Any, since: Any, type_: Any, count: Any, words: Any) -> int:
        if kind.value != self.kind:
            return int(pynvml.NVML_ERROR_NOT_SUPPORTED)
        samples = [(START + round(seconds * SECOND), word) for seconds, word in self.retained]
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
    sampler.retained = [(0, words[0])]
    source = begin()
    tick(source)
    sampler.retained = [(1, words[0]), (2, words[1])]
    assert used(tick(source))[:2] == (mean, highest)


def test_a_sample_above_100_percent_is_ignored(gpu: FakeGpu, begin: Callable[[], NvmlSource]) -> None:
    add(gpu, GPU, (0, 0))
    source = begin()
    tick(source)
    add(gpu, GPU, (1, 30), (2, 101), (3, 0xFFFFFFFF), (4, 50))
    assert used(tick(source))[:2] == (40, 50)


def test_where_every_sample_is_above_100_percent_the_point_reading_is_used(
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
    sampler.retained = [(0, words[0])]
    source = begin()
    tick(source)
    sampler.retained = [(1, words[0]), (2, words[1]), (3, words[2])]
    assert used(tick(source))[:2] == (20, 30)


@pytest.mark.parametrize("refuses", [False, True], ids=["crops", "insufficient size"])
def test_more_samples_than_the_buffer_holds_make_it_grow(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    sampler = Sampler(monkeypatch)
    sampler.refuses_to_crop = refuses
    sampler.retained = [(0, 50)]
    source = begin()
    tick(source)
    sampler.retained = [(number / 10, 100 if number > 500 else 0) for number in range(1, 1001)]
    assert used(tick(source))[:2] == (50, 100)
    assert sampler.rooms[-1] > 1000
    sampler.rooms.clear()
    sampler.retained = [(101 + number / 10, 10) for number in range(900)]
    assert used(tick(source))[:2] == (10, 10)
    assert len(sampler.rooms) == 1, "the larger buffer is used again"


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
    sampler.retained = [(0, 90), (1, 90)]
    source = begin()
    tick(source)
    sampler.retained += [(2, 10), (3, 20)]
    assert used(tick(source))[:2] == (15, 20)
    assert used(tick(source))[:2] == (3, 3)


def test_samples_out_of_order_are_put_in_order(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Sampler(monkeypatch)
    sampler.retained = [(0, 0)]
    source = begin()
    tick(source)
    sampler.retained = [(4, 20), (1, 100)]
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
        sampler.retained.append((seconds, 10))
        tick(source)
    assert sampler.since == [0, START, START + SECOND]


@pytest.mark.parametrize("back_s", [5, 3600, 100_000_000])
def test_a_driver_clock_that_was_set_back_is_adopted_after_a_few_ticks(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch, back_s: float
) -> None:
    sampler = Sampler(monkeypatch)
    sampler.retained = [(0, 50)]
    source = begin()
    tick(source)
    seen = []
    for number in range(1, DOUBTFUL_AFTER + 3):
        # The driver begins its list anew.
        sampler.retained = [(number - back_s - 0.5, 60), (number - back_s, 80)]
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
