"""Every NVML function that the source calls, with the errors that it can return."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import full_driver
import pynvml
import pytest
from fake_nvml import FakeNvml
from full_driver import CALLS, DRIVERS, FOR_ALL, Healthy, prepare, running, says, source
from nvml_codes import each_error_of

from gpumon_core.metrics import GPU_METRICS, Metric, NvmlField, NvmlGpm, NvmlQuery
from gpumon_core.telemetry.gate import LOST, SESSION_OVER, UNSUPPORTED
from gpumon_core.telemetry.nvml import NvmlSource
from gpumon_core.telemetry.records import SourceUnavailable

# The fixtures that these tests share.
machine, healthy, no_pauses = full_driver.machine, full_driver.healthy, full_driver.no_pauses


pytestmark = pytest.mark.usefixtures("no_pauses")

# ---- The list ------------------------------------------------------------------------------------


def test_the_list_names_every_function_that_the_source_calls(healthy: Callable[[str], Healthy]) -> None:
    assert set().union(*(healthy(driver).asked for driver in DRIVERS)) == set(CALLS)
    for function, driver in CALLS.items():
        assert function in healthy(driver).asked
        assert function not in DRIVERS[driver]


# ---- Every function and every error --------------------------------------------------------------


def _asks(way: NvmlQuery, function: str) -> bool:
    if isinstance(way, NvmlField):
        return function == "nvmlDeviceGetFieldValues"
    if isinstance(way, NvmlGpm):
        return function.startswith("nvmlGpm")
    return function == way.function + ("_v2" if "nvmlMemory_v2" in way.arguments else "")


@cache
def hangs_on(function: str) -> frozenset[str]:
    """The keys of the metrics that a function may report."""
    metrics: list[Metric] = [m for m in GPU_METRICS if any(_asks(way, function) for way in m.nvml)]
    return frozenset(key for metric in metrics for key in (metric.key, metric.peak) if key)


def may_be_unavailable(function: str, code: int) -> bool:
    """Whether the whole source may be unavailable while `function` returns `code`."""
    if function == "nvmlInitWithFlags":
        return True
    return code in SESSION_OVER or (code in LOST and function in FOR_ALL)


def is_lacking(function: str, code: int) -> bool:
    """Whether an error says that the device does not offer this at all."""
    # Some drivers keep their profiling to administrators.
    return code in UNSUPPORTED or (function, code) == ("nvmlGpmSampleGet", pynvml.NVML_ERROR_NO_PERMISSION)


def go_through(
    machine: FakeNvml, whole: Healthy, function: str, code: int, reader: NvmlSource | None, ticks: int
) -> NvmlSource:
    """Read while `function` fails, then recover, and hold every reading to what was promised."""
    for _ in range(ticks):
        try:
            reader = reader or source()
            snapshot = reader.read()
        except SourceUnavailable:
            assert may_be_unavailable(function, code)
            continue
        if function not in FOR_ALL or (code not in LOST and snapshot.gpus):
            costs = hangs_on(function) if function in FOR_ALL else frozenset()
            assert whole.always.keys() - says(snapshot, "GPU-second").keys() <= costs
            assert running(snapshot) == whole.processes
        for each in snapshot.readings:
            if each.uuid == "GPU-first":
                assert whole.always_of_first - says(snapshot, each.uuid).keys() <= hangs_on(function)
    machine.recover(function)
    reader = reader or source()
    for _ in range(2):
        snapshot = reader.read()
    assert (snapshot.lost, snapshot.hung, snapshot.nameless) == (frozenset(), frozenset(), frozenset())
    assert len(snapshot.gpus) == len(snapshot.readings) == whole.gpus
    learned = hangs_on(function) if is_lacking(function, code) else frozenset()
    second, first = says(snapshot, "GPU-second"), says(snapshot, snapshot.gpus[0].uuid)
    assert whole.settled - second.keys() <= (learned if function in FOR_ALL else frozenset())
    assert whole.settled_of_first - first.keys() <= learned
    assert running(snapshot) == whole.processes
    assert reader.process_name(11) == "process-11"
    return reader


@each_error_of(CALLS)
def test_an_error_costs_what_it_concerns_and_only_while_it_lasts(
    machine: FakeNvml, healthy: Callable[[str], Healthy], function: str, code: int
) -> None:
    whole = healthy(CALLS[function])
    gpu = None if function in FOR_ALL else 0
    # Once, the first time that it is asked.
    prepare(machine, CALLS[function])
    machine.fail(function, code, gpu, times=1)
    reader = go_through(machine, whole, function, code, None, ticks=1)
    # For good: after a while, and from the start.
    if function in whole.asked_later:
        if is_lacking(function, code):
            # That one does not ask again.
            reader.close()
            prepare(machine, CALLS[function])
            reader = source()
            reader.read()
        machine.fail(function, code, gpu)
        reader = go_through(machine, whole, function, code, reader, ticks=2)
    if function in whole.asked_at_start or function not in whole.asked_later:
        reader.close()
        prepare(machine, CALLS[function])
        machine.fail(function, code, gpu)
        reader = go_through(machine, whole, function, code, None, ticks=2)
    # And at the end, which nothing stops.
    machine.fail(function, code)
    reader.process_name(11)
    reader.close()


@pytest.mark.parametrize(
    "function", ["nvmlDeviceGetPerformanceState", "nvmlDeviceGetFieldValues", "nvmlGpmSampleGet"]
)
def test_a_gpu_lost_while_it_turns_out_what_it_lacks_comes_back(machine: FakeNvml, function: str) -> None:
    """What was given up in a reading that was cut off is not given up a second time."""
    prepare(machine, "new")
    lacking = ("nvmlDeviceGetFanSpeed", "nvmlDeviceGetTemperatureV", "nvmlDeviceGetCurrentClocksEventReasons")
    for absent in lacking:
        machine.hide(absent)
    machine.fail(function, pynvml.NVML_ERROR_GPU_IS_LOST, gpu=0, times=3)
    reader = source()
    for _ in range(3):
        assert reader.read().lost == {"GPU-first"}
    found = says(reader.read(), "GPU-first")
    assert found["temperature"] == 40
    assert found["clocks_event_reasons"] == 1
    assert "fan_speed" not in found
    reader.close()


def test_what_is_asked_rarely_is_asked_once_a_lost_gpu_is_back(machine: FakeNvml) -> None:
    prepare(machine, "new")
    machine.fail("nvmlDeviceGetUtilizationRates", pynvml.NVML_ERROR_GPU_IS_LOST, gpu=0, times=1)
    reader = source()
    assert reader.read().lost == {"GPU-first"}
    assert says(reader.read(), "GPU-first").keys() >= {"power_limit", "pcie_width", "ecc_corrected_volatile"}
    reader.close()
