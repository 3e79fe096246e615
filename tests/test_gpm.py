"""GPU Performance Monitoring: what is measured between two ticks, also of MIG instances (telemetry/gpm.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import fake_nvml
import one_gpu
import pynvml
import pytest
from fake_nvml import FakeGpu, FakeNvml
from one_gpu import GPM, metric_id, nvlink, reading, tick

from gpumon_core.attribution.local import LocalAttribution
from gpumon_core.recording import collector
from gpumon_core.recording.collector import Observer
from gpumon_core.telemetry.nvml import NvmlSource
from gpumon_core.telemetry.records import SourceUnavailable

# The fixtures that these tests share.
clock, gpu, begin, hopper = one_gpu.clock, one_gpu.gpu, one_gpu.begin, one_gpu.hopper


GPM_VALUES = {key: value for key, (_, _, value) in GPM.items()}
EACH_GPM = pytest.mark.parametrize("key", GPM)


def measured(found: dict[str, float | None]) -> dict[str, float | None]:
    return {key: found[key] for key in GPM}


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

    monkeypatch.setattr(collector, "time", SimpleNamespace(sleep=meanwhile))
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
