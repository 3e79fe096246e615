"""Calls of the driver that never return: each costs its GPU, is waited for once, and ends when it returns."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from types import SimpleNamespace
from typing import Any

import fake_nvml
import full_driver
import pynvml
import pytest
from conftest import PATIENCE_S, eventually
from fake_nvml import FakeNvml
from full_driver import Healthy, prepare, running, says, source

from gpumon_core.telemetry import nvml, watch
from gpumon_core.telemetry.nvml import NvmlSource
from gpumon_core.telemetry.records import SourceUnavailable
from gpumon_core.telemetry.watch import Task, Watch

# The fixtures that these tests share.
machine, healthy, no_pauses = full_driver.machine, full_driver.healthy, full_driver.no_pauses


pytestmark = pytest.mark.usefixtures("no_pauses")

# For good, as far as a test is concerned.
FOREVER_S = 10 * PATIENCE_S
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


class PatientQueue(SimpleQueue[Any]):
    """Waits until there is an answer, or until the driver says that one more call hangs: then patience has ended.

    So no test waits for a time, and a GPU that answers is never given up, however busy the machine is.
    """

    driver: FakeNvml
    # The time that patience has: it passes only where a call hangs.
    passed_s = 0.0
    hangs = 0

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if timeout is None:
            return super().get(block)
        ends = time.monotonic() + PATIENCE_S
        while True:
            try:
                return super().get(timeout=0.002)
            except Empty:
                # One that began to hang and had to be counted later is waited for as well.
                if self.driver.hangs > PatientQueue.hangs:
                    PatientQueue.hangs += 1
                    PatientQueue.passed_s += 2 * timeout
                    raise
                assert time.monotonic() < ends, "the call neither returns nor hangs"


@pytest.fixture
def hanging(machine: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    """The machine, for which a source waits until a call hangs; in the end every call returns."""
    prepare(machine, "new")
    PatientQueue.driver, PatientQueue.hangs = machine, machine.hangs
    monkeypatch.setattr(watch, "SimpleQueue", PatientQueue)
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: PatientQueue.passed_s))
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


def test_a_call_that_is_slow_but_returns_costs_nothing(machine: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(machine, "new")
    monkeypatch.setattr(nvml, "HANG_S", PATIENCE_S)
    reader = source()
    machine.hang("nvmlDeviceGetPowerUsage", 0.1)
    for _ in range(2):
        snapshot = reader.read()
        assert len(snapshot.readings) == 2
        assert snapshot.hung == frozenset()
    reader.close()


def test_by_the_clock_a_call_is_given_up_when_its_time_is_over(
    machine: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(machine, "new")
    monkeypatch.setattr(nvml, "HANG_S", 0.5)
    reader = source()
    machine.hang("nvmlDeviceGetPowerUsage", FOREVER_S, gpu=0)
    begin = time.monotonic()
    snapshot = reader.read()
    assert time.monotonic() - begin >= 0.5
    assert "GPU-first" in snapshot.hung
    machine.recover()
    eventually(lambda: not reader.read().hung)
    reader.close()


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
