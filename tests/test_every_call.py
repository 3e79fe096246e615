"""Every NVML function that the source calls, with every error it can return, and calls that never return."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import fake_nvml
import pynvml
import pytest
from conftest import eventually
from fake_nvml import GIB, FakeNvml

from gpumon_core.metrics import GPU_METRICS, Metric, NvmlField, NvmlGpm, Way
from gpumon_core.telemetry import nvml
from gpumon_core.telemetry.gate import LOST, SESSION_OVER, UNSUPPORTED
from gpumon_core.telemetry.nvml import NvmlSource
from gpumon_core.telemetry.records import GpuReading, ProcessReading, Snapshot, SourceUnavailable
from gpumon_core.telemetry.watch import Task, Watch

CODES = {
    name.removeprefix("NVML_ERROR_"): value
    for name, value in sorted(vars(pynvml).items())
    if name.startswith("NVML_ERROR_") and isinstance(value, int)
}
EACH_CODE = pytest.mark.parametrize("code", CODES.values(), ids=CODES)

# A driver -> what it does not have.
OLD = (
    "nvmlSystemGetCudaDriverVersion_v2",
    "nvmlDeviceGetTemperatureV",
    "nvmlDeviceGetMemoryInfo_v2",
    "nvmlDeviceGetFieldValues",
    "nvmlDeviceGetSamples",
    "nvmlDeviceGetEnforcedPowerLimit",
    "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetProcessesUtilizationInfo",
    "nvmlDeviceGetComputeRunningProcesses_v3",
    "nvmlDeviceGetGraphicsRunningProcesses_v3",
    "nvmlDeviceGetMPSComputeRunningProcesses_v3",
    "nvmlGpmQueryDeviceSupport",
)
OLDEST = (
    *OLD,
    "nvmlDeviceGetComputeRunningProcesses_v2",
    "nvmlDeviceGetGraphicsRunningProcesses_v2",
    "nvmlDeviceGetMPSComputeRunningProcesses_v2",
)
DRIVERS: dict[str, tuple[str, ...]] = {"new": (), "old": OLD, "oldest": OLDEST, "mig": ()}

# Every function that the source calls -> a driver on which it does.
CALLS: dict[str, str] = {
    **dict.fromkeys(
        (
            "nvmlInitWithFlags",
            "nvmlShutdown",
            "nvmlSystemGetDriverVersion",
            "nvmlSystemGetNVMLVersion",
            "nvmlSystemGetCudaDriverVersion_v2",
            "nvmlSystemGetProcessName",
            "nvmlDeviceGetCount_v2",
            "nvmlDeviceGetHandleByIndex_v2",
            "nvmlDeviceGetUUID",
            "nvmlDeviceGetName",
            "nvmlDeviceGetPciInfo_v3",
            "nvmlDeviceGetArchitecture",
            "nvmlDeviceGetCudaComputeCapability",
            "nvmlDeviceGetMemoryInfo",
            "nvmlDeviceGetEnforcedPowerLimit",
            "nvmlDeviceGetMigMode",
            "nvmlDeviceGetSamples",
            "nvmlDeviceGetTemperatureV",
            "nvmlDeviceGetUtilizationRates",
            "nvmlDeviceGetMemoryInfo_v2",
            "nvmlDeviceGetPowerUsage",
            "nvmlDeviceGetFanSpeed",
            "nvmlDeviceGetClockInfo",
            "nvmlDeviceGetMaxClockInfo",
            "nvmlDeviceGetEncoderUtilization",
            "nvmlDeviceGetDecoderUtilization",
            "nvmlDeviceGetJpgUtilization",
            "nvmlDeviceGetOfaUtilization",
            "nvmlDeviceGetPerformanceState",
            "nvmlDeviceGetCurrentClocksEventReasons",
            "nvmlDeviceGetPcieThroughput",
            "nvmlDeviceGetCurrPcieLinkGeneration",
            "nvmlDeviceGetCurrPcieLinkWidth",
            "nvmlDeviceGetMaxPcieLinkGeneration",
            "nvmlDeviceGetMaxPcieLinkWidth",
            "nvmlDeviceGetPcieReplayCounter",
            "nvmlDeviceGetBAR1MemoryInfo",
            "nvmlDeviceGetFieldValues",
            "nvmlDeviceGetComputeRunningProcesses_v3",
            "nvmlDeviceGetGraphicsRunningProcesses_v3",
            "nvmlDeviceGetMPSComputeRunningProcesses_v3",
            "nvmlDeviceGetProcessesUtilizationInfo",
            "nvmlGpmQueryDeviceSupport",
            "nvmlGpmSampleAlloc",
            "nvmlGpmSampleGet",
            "nvmlGpmMetricsGet",
            "nvmlGpmSampleFree",
        ),
        "new",
    ),
    **dict.fromkeys(
        (
            "nvmlSystemGetCudaDriverVersion",
            "nvmlDeviceGetTemperature",
            "nvmlDeviceGetPowerManagementLimit",
            "nvmlDeviceGetCurrentClocksThrottleReasons",
            "nvmlDeviceGetTotalEnergyConsumption",
            "nvmlDeviceGetTotalEccErrors",
            "nvmlDeviceGetRemappedRows",
            "nvmlDeviceGetRetiredPages",
            "nvmlDeviceGetRetiredPagesPendingStatus",
            "nvmlDeviceGetProcessUtilization",
            "nvmlDeviceGetComputeRunningProcesses_v2",
            "nvmlDeviceGetGraphicsRunningProcesses_v2",
            "nvmlDeviceGetMPSComputeRunningProcesses_v2",
        ),
        "old",
    ),
    **dict.fromkeys(
        (
            "nvmlDeviceGetComputeRunningProcesses",
            "nvmlDeviceGetGraphicsRunningProcesses",
            "nvmlDeviceGetMPSComputeRunningProcesses",
        ),
        "oldest",
    ),
    **dict.fromkeys(
        (
            "nvmlDeviceGetMaxMigDeviceCount",
            "nvmlDeviceGetMigDeviceHandleByIndex",
            "nvmlDeviceGetGpuInstanceId",
            "nvmlDeviceGetComputeInstanceId",
            "nvmlGpmMigSampleGet",
        ),
        "mig",
    ),
}
# About the driver or about a GPM sample, and not about one GPU: these can only fail for all.
FOR_ALL = {
    "nvmlInitWithFlags",
    "nvmlShutdown",
    "nvmlDeviceGetCount_v2",
    "nvmlGpmSampleAlloc",
    "nvmlGpmMetricsGet",
    "nvmlGpmSampleFree",
    *(name for name in CALLS if name.startswith("nvmlSystem")),
}
EACH_CALL = pytest.mark.parametrize("function", CALLS)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeNvml]:
    """A driver with two equal GPUs that offer everything, GPU 0 with a MIG instance; see `prepare`."""
    fake = FakeNvml(tmp_path_factory.mktemp("nvml") / "state")
    for index, uuid in enumerate(("GPU-first", "GPU-second")):
        gpu = fake.add_gpu(
            uuid=uuid,
            gpm_supported=1,
            memory_temperature=70,
            retired_pending=0,
            nvlink_count=4,
            gpu_utilization=50,
            fan=35,
        )
        for metric in ("SM_UTIL", "SM_OCCUPANCY", "ANY_TENSOR_UTIL", "GRAPHICS_UTIL", "DRAM_BW_UTIL"):
            gpu.set_gpm(getattr(pynvml, f"NVML_GPM_METRIC_{metric}"), 44.0)
        for direction in ("TX", "RX"):
            gpu.set_field(getattr(pynvml, f"NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_{direction}"), 5)
        gpu.retire_page(0x1000)
        for kind in range(3):
            gpu.add_sample(kind, 60, 1_000_000)
        for pid, letter in ((11, "C"), (12, "G"), (13, "M")):
            gpu.add_process(10 * index + pid, GIB, letter, sm=pid, memory_utilization=1)
    mig = fake.gpus[0].add_mig(uuid="MIG-a", gpu_instance_id=7)
    mig.set_gpm(pynvml.NVML_GPM_METRIC_SM_UTIL, 22.0)
    with fake_nvml.loaded(fake):
        yield fake


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETRY_S", "RECOUNT_S", "LONGEST_PAUSE_S"):
        monkeypatch.setattr(nvml, name, 0.0)


def prepare(machine: FakeNvml, driver: str) -> None:
    """End all faults, and make the machine's driver one of DRIVERS."""
    machine.recover()
    for function in DRIVERS[driver]:
        machine.hide(function)
    machine.gpus[0].mig_enabled = int(driver == "mig")


def source() -> NvmlSource:
    return NvmlSource("testhost", clock=lambda: 1_700_000_000.0)


def reading(snapshot: Snapshot, uuid: str) -> GpuReading:
    (found,) = (each for each in snapshot.readings if each.uuid == uuid)
    return found


def says(snapshot: Snapshot, uuid: str) -> dict[str, float]:
    """The values of a GPU that are not None."""
    return {key: value for key, value in reading(snapshot, uuid).values.items() if value is not None}


def running(snapshot: Snapshot, uuid: str = "GPU-second") -> set[ProcessReading]:
    return {process for process in snapshot.processes if process.gpu_uuid == uuid}


class Healthy:
    """What a driver says without faults."""

    def __init__(self, machine: FakeNvml, driver: str) -> None:
        prepare(machine, driver)
        machine.reset_calls()
        reader = source()
        self.asked_at_start = {name for name in CALLS if machine.calls(name)}
        ticks = [reader.read()]
        self.asked = {name for name in fake_nvml.functions() if machine.calls(name)}
        machine.reset_calls()
        ticks.append(reader.read())
        reader.process_name(11)
        reader.close()
        self.asked_later = {name for name in fake_nvml.functions() if machine.calls(name)}
        self.asked |= self.asked_later
        self.gpus = len(ticks[0].gpus)
        self.processes = running(ticks[0])
        # What every tick says; and what it does once GPM has measured.
        first, second = (says(tick, "GPU-second") for tick in ticks)
        self.always = {key: value for key, value in first.items() if second.get(key) == value}
        self.settled = set(second)
        self.settled_of_first = set(says(ticks[1], "GPU-first"))
        self.always_of_first = self.settled_of_first & set(self.always)
        assert len(self.processes) == 3
        assert len(self.always) >= 20


@pytest.fixture(scope="module")
def healthy(machine: FakeNvml) -> Callable[[str], Healthy]:
    return cache(lambda driver: Healthy(machine, driver))


# ---- The list ------------------------------------------------------------------------------------


def test_the_list_names_every_function_that_the_source_calls(healthy: Callable[[str], Healthy]) -> None:
    assert set().union(*(healthy(driver).asked for driver in DRIVERS)) == set(CALLS)
    for function, driver in CALLS.items():
        assert function in healthy(driver).asked
        assert function not in DRIVERS[driver]


# ---- Every function and every error --------------------------------------------------------------


def _asks(way: Way, function: str) -> bool:
    if isinstance(way, NvmlField):
        return function == "nvmlDeviceGetFieldValues"
    if isinstance(way, NvmlGpm):
        return function.startswith("nvmlGpm")
    return function == way.function + ("_v2" if "nvmlMemory_v2" in way.arguments else "")


@cache
def hangs_on(function: str) -> frozenset[str]:
    """The keys of the metrics that may be told by a function."""
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


@EACH_CODE
@EACH_CALL
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


# ---- Calls that never return ---------------------------------------------------------------------

# Long beside what a call takes on any machine: a GPU that answers is never given up.
HANG_S = 1.0
# For good, as far as a test is concerned.
FOREVER_S = 60.0
Begin = Callable[[], NvmlSource]


# The threads of tests before, of which only one that failed leaves any.
EARLIER: set[threading.Thread] = set()


def threads() -> int:
    """The threads that call the driver, or wait for something to ask it."""
    return sum(thread.name == "nvml" and thread not in EARLIER for thread in threading.enumerate())


# What was waited for until patience ended, since the test began.
GIVEN_UP: list[Task] = []


def waits(action: Callable[[], object]) -> int:
    """How many calls are waited for until patience ends while this is done: each costs its caller that time."""
    before = len(GIVEN_UP)
    action()
    return len(GIVEN_UP) - before


@pytest.fixture
def hanging(machine: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    """The machine, for which a source waits only shortly; in the end every call returns."""
    prepare(machine, "new")
    for name in ("HANG_S", "START_HANG_S", "CLOSE_HANG_S"):
        monkeypatch.setattr(nvml, name, HANG_S)
    monkeypatch.setattr(nvml, "RECOUNT_S", 1000.0)
    monkeypatch.setattr(NvmlSource, "_hanging_start", None)
    run = Watch.run

    def counted(self: Watch, tasks: Iterable[Task], patience_s: float) -> list[Task]:
        found = run(self, tasks, patience_s)
        GIVEN_UP.extend(found)
        return found

    monkeypatch.setattr(Watch, "run", counted)
    EARLIER.clear()
    EARLIER.update(threading.enumerate())
    yield machine
    machine.recover()
    eventually(lambda: threads() == 0)


@pytest.fixture
def begin(hanging: FakeNvml) -> Iterator[Begin]:
    """Begins sources that end with the test."""
    begun: list[NvmlSource] = []

    def one() -> NvmlSource:
        begun.append(source())
        return begun[-1]

    yield one
    hanging.recover()
    for each in begun:
        each.close()


@pytest.mark.parametrize(
    ("driver", "function"),
    [
        ("new", "nvmlDeviceGetSamples"),
        ("new", "nvmlDeviceGetTemperatureV"),
        ("old", "nvmlDeviceGetTemperature"),
        ("new", "nvmlDeviceGetFieldValues"),
        ("new", "nvmlDeviceGetComputeRunningProcesses_v3"),
        ("new", "nvmlDeviceGetProcessesUtilizationInfo"),
        ("new", "nvmlGpmSampleGet"),
        ("new", "nvmlDeviceGetPcieThroughput"),
    ],
)
def test_a_call_that_hangs_costs_its_gpu_and_is_waited_for_once(
    hanging: FakeNvml, healthy: Callable[[str], Healthy], begin: Begin, driver: str, function: str
) -> None:
    whole = healthy(driver)
    prepare(hanging, driver)
    reader = begin()
    reader.read()
    reader.read()
    hanging.hang(function, FOREVER_S, gpu=0)
    before = len(GIVEN_UP)
    snapshot = reader.read()
    assert len(GIVEN_UP) == before + 1
    hanging.reset_calls()
    for _ in range(5):
        assert snapshot.lost == snapshot.hung == {"GPU-first"}
        assert [gpu.uuid for gpu in snapshot.gpus] == ["GPU-first", "GPU-second"]
        assert [each.uuid for each in snapshot.readings] == ["GPU-second"]
        assert says(snapshot, "GPU-second").keys() >= whole.settled
        assert running(snapshot) == whole.processes
        assert not running(snapshot, "GPU-first")
        snapshot = reader.read()
        assert len(GIVEN_UP) == before + 1, "nobody waits twice"
    assert sum(hanging.calls(name, 0) for name in fake_nvml.functions()) == 0
    assert threads() == 2
    hanging.recover(function)
    eventually(lambda: not reader.read().hung)
    snapshot = reader.read()
    assert snapshot.lost == frozenset()
    assert says(snapshot, "GPU-first").keys() >= whole.settled_of_first
    eventually(lambda: threads() == 1)


def test_a_gpu_that_hangs_with_the_first_reading_costs_its_own(hanging: FakeNvml, begin: Begin) -> None:
    hanging.hang("nvmlDeviceGetSamples", FOREVER_S, gpu=0)
    reader = begin()
    snapshot = reader.read()
    assert snapshot.hung == {"GPU-first"}
    assert [each.uuid for each in snapshot.readings] == ["GPU-second"]


def test_the_last_gpu_may_hang_as_well(hanging: FakeNvml, begin: Begin) -> None:
    hanging.hang("nvmlDeviceGetPowerUsage", FOREVER_S, gpu=1)
    reader = begin()
    assert [each.uuid for each in reader.read().readings] == ["GPU-first"]
    assert waits(reader.read) == 0


def test_where_every_gpu_hangs_each_is_waited_for_once(hanging: FakeNvml, begin: Begin) -> None:
    hanging.hang("nvmlDeviceGetPowerUsage", FOREVER_S)
    reader = begin()
    assert waits(reader.read) == 2
    before = len(GIVEN_UP)
    for _ in range(5):
        snapshot = reader.read()
        assert len(GIVEN_UP) == before
        assert snapshot.readings == ()
        assert snapshot.hung == {"GPU-first", "GPU-second"}
    assert threads() == 3
    hanging.recover()
    eventually(lambda: len(reader.read().readings) == 2)


def test_a_mig_instance_that_hangs_leaves_its_gpu(hanging: FakeNvml, begin: Begin) -> None:
    prepare(hanging, "mig")
    hanging.hang("nvmlGpmMigSampleGet", FOREVER_S, gpu=0)
    snapshot = begin().read()
    assert snapshot.hung == {"MIG-a"}
    assert [each.uuid for each in snapshot.readings] == ["GPU-first", "GPU-second"]


def test_a_call_that_is_slow_but_returns_costs_nothing(hanging: FakeNvml, begin: Begin) -> None:
    reader = begin()
    hanging.hang("nvmlDeviceGetPowerUsage", HANG_S / 3)
    for _ in range(2):
        snapshot = reader.read()
        assert len(snapshot.readings) == 2
        assert snapshot.hung == frozenset()
    assert threads() == 1


def test_a_gpu_that_hangs_and_then_is_lost_is_no_longer_hung(hanging: FakeNvml, begin: Begin) -> None:
    reader = begin()
    hanging.hang("nvmlDeviceGetPowerUsage", FOREVER_S, gpu=0)
    assert reader.read().hung == {"GPU-first"}
    hanging.gpus[0].lost = True
    try:
        hanging.recover()
        eventually(lambda: not reader.read().hung)
        assert reader.read().lost == {"GPU-first"}
    finally:
        hanging.gpus[0].lost = False
    assert reader.read().lost == frozenset()


def test_an_nvml_that_hangs_when_it_is_initialised_is_unavailable_and_is_begun_once(
    hanging: FakeNvml, begin: Begin
) -> None:
    hanging.hang("nvmlInitWithFlags", FOREVER_S)
    with pytest.raises(SourceUnavailable, match="hangs") as caught:
        begin()
    given_up = len(GIVEN_UP)
    assert "dmesg" in caught.value.remedy
    hanging.reset_calls()
    for _ in range(3):
        before = threads()
        with pytest.raises(SourceUnavailable, match="nvmlInit hangs"):
            begin()
        assert len(GIVEN_UP) == given_up
        assert threads() <= before
    assert hanging.calls("nvmlInitWithFlags") == 0
    hanging.recover()
    eventually(lambda: threads() == 0)
    assert len(begin().read().readings) == 2


@pytest.mark.parametrize(
    "function", ["nvmlSystemGetDriverVersion", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2"]
)
def test_a_driver_that_hangs_while_the_gpus_are_found_is_unavailable(
    hanging: FakeNvml, begin: Begin, function: str
) -> None:
    hanging.hang(function, FOREVER_S)
    with pytest.raises(SourceUnavailable, match=f"{function.split('_', maxsplit=1)[0]} hangs"):
        begin()
    hanging.recover()
    eventually(lambda: threads() == 0)
    assert len(begin().read().readings) == 2


def test_a_session_that_hangs_when_it_begins_anew_goes_on_once_the_call_has_returned(
    hanging: FakeNvml, begin: Begin
) -> None:
    reader = begin()
    reader.read()
    hanging.driver_loaded = False
    with pytest.raises(SourceUnavailable):
        reader.read()
    hanging.driver_loaded = True
    hanging.hang("nvmlDeviceGetCount_v2", FOREVER_S)
    for _ in range(4):
        with pytest.raises(SourceUnavailable, match="hangs"):
            reader.read()
    eventually(lambda: threads() <= 2)
    hanging.recover()

    def answers() -> bool:
        try:
            return len(reader.read().readings) == 2
        except SourceUnavailable:
            return False

    eventually(answers)


def test_a_count_of_the_gpus_that_hangs_is_waited_for_once(
    hanging: FakeNvml, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = begin()
    reader.read()
    monkeypatch.setattr(nvml, "RECOUNT_S", 0.0)
    hanging.hang("nvmlDeviceGetCount_v2", FOREVER_S)
    assert waits(reader.read) == 1
    before = len(GIVEN_UP)
    for _ in range(5):
        snapshot = reader.read()
        assert len(GIVEN_UP) == before
        assert len(snapshot.readings) == 2
        assert snapshot.hung == frozenset()
    assert threads() == 2
    hanging.recover()
    eventually(lambda: threads() == 1)
    hanging.reset_calls()
    reader.read()
    assert hanging.calls("nvmlDeviceGetCount_v2") == 1, "and then they are counted again"


def test_a_gpu_that_hangs_is_left_alone_when_the_gpus_are_counted(
    hanging: FakeNvml, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = begin()
    hanging.hang("nvmlDeviceGetPowerUsage", FOREVER_S, gpu=0)
    reader.read()
    monkeypatch.setattr(nvml, "RECOUNT_S", 0.0)
    hanging.hang("nvmlDeviceGetMigMode", FOREVER_S, gpu=0)
    for _ in range(3):
        assert waits(reader.read) == 0
    assert threads() == 2


def test_a_name_of_a_process_that_hangs_is_waited_for_once(hanging: FakeNvml, begin: Begin) -> None:
    reader = begin()
    hanging.hang("nvmlSystemGetProcessName", FOREVER_S)
    assert waits(lambda: reader.process_name(11)) == 1
    before = len(GIVEN_UP)
    for pid in range(20):
        assert reader.process_name(pid) is None
    assert len(GIVEN_UP) == before
    assert threads() == 2
    hanging.recover()
    eventually(lambda: reader.process_name(11) == "process-11")


def test_closing_while_a_call_hangs_ends_soon(hanging: FakeNvml, begin: Begin) -> None:
    reader = begin()
    hanging.hang("nvmlDeviceGetPowerUsage", FOREVER_S, gpu=0)
    reader.read()
    assert waits(reader.close) == 0, "only what does not hang itself is waited for"
    eventually(lambda: threads() == 1)
    assert waits(reader.close) == 0


@pytest.mark.parametrize("function", ["nvmlShutdown", "nvmlGpmSampleFree"])
def test_a_close_that_hangs_itself_is_given_up(hanging: FakeNvml, begin: Begin, function: str) -> None:
    reader = begin()
    reader.read()
    hanging.hang(function, FOREVER_S)
    assert waits(reader.close) == 1
    assert waits(reader.close) == 0
    eventually(lambda: threads() == 1)


def test_a_source_that_is_closed_while_a_call_hangs_opens_again(hanging: FakeNvml, begin: Begin) -> None:
    reader = begin()
    hanging.hang("nvmlDeviceGetPowerUsage", FOREVER_S, gpu=0)
    reader.read()
    reader.close()
    snapshot = reader.read()
    assert [each.uuid for each in snapshot.readings] == ["GPU-second"]
    before = threads()
    for _ in range(5):
        assert waits(reader.read) == 0
    assert threads() <= before
    hanging.recover()
    eventually(lambda: len(reader.read().readings) == 2)


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_DRIVER_NOT_LOADED, pynvml.NVML_ERROR_UNKNOWN])
def test_sources_that_cannot_begin_leave_no_thread(hanging: FakeNvml, begin: Begin, code: int) -> None:
    hanging.fail("nvmlInitWithFlags", code)
    for _ in range(10):
        with pytest.raises(SourceUnavailable):
            begin()
    eventually(lambda: threads() == 0)


def test_a_driver_that_went_away_costs_no_threads(hanging: FakeNvml, begin: Begin) -> None:
    reader = begin()
    reader.read()
    hanging.driver_loaded = False
    try:
        for _ in range(10):
            with pytest.raises(SourceUnavailable):
                reader.read()
        eventually(lambda: threads() <= 1)
    finally:
        hanging.driver_loaded = True
    assert len(reader.read().readings) == 2


def test_gpm_samples_of_instances_that_are_gone_are_given_back(hanging: FakeNvml, begin: Begin) -> None:
    prepare(hanging, "mig")
    hanging.reset_calls()
    reader = begin()
    reader.read()
    hanging.gpus[0].mig_enabled = 0
    reader._counted_at -= 2000.0
    reader.read()
    reader.close()
    assert hanging.calls("nvmlGpmSampleAlloc") == hanging.calls("nvmlGpmSampleFree")
