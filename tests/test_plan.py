"""Which functions a tick asks, how often, and in which unit their values arrive (telemetry/plan.py)."""

from __future__ import annotations

from collections.abc import Callable

import one_gpu
import pytest
from fake_nvml import FakeGpu, FakeNvml
from one_gpu import MIB, Clock, field_id, tick

from gpumon_core.metrics import GPU_METRICS, RARELY_S
from gpumon_core.telemetry.nvml import NvmlSource

# The fixtures that these tests share.
clock, gpu, begin, worn = one_gpu.clock, one_gpu.gpu, one_gpu.begin, one_gpu.worn


RARE = {metric.key for metric in GPU_METRICS if metric.every_s}


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
