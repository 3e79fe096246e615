"""The power of a tick is what the driver's energy counter grew by since the tick before (telemetry/energy.py)."""

from __future__ import annotations

from collections.abc import Callable

import one_gpu
import pynvml
import pytest
from fake_nvml import FakeGpu, FakeNvml
from one_gpu import POWER, Clock, add, tick

from gpumon_core.telemetry.nvml import NvmlSource

# The fixtures that these tests share.
clock, gpu, begin = one_gpu.clock, one_gpu.gpu, one_gpu.begin


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


def test_an_energy_counter_that_stops_is_not_believed(
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
