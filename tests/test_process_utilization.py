"""What each process used of a GPU since the tick before, through either call of NVML (telemetry/usage.py)."""

from __future__ import annotations

import ctypes
import logging
import struct
from collections.abc import Callable
from typing import Any

import one_gpu
import pynvml
import pytest
from fake_nvml import GIB, FakeGpu, FakeNvml
from one_gpu import MIB, START, tick

from gpumon_core.telemetry.nvml import NvmlSource
from gpumon_core.telemetry.records import ProcessReading, Snapshot
from gpumon_core.telemetry.usage import DOUBTFUL_AFTER as QUIET_READS

# The fixtures that these tests share.
clock, gpu, begin, hopper = one_gpu.clock, one_gpu.gpu, one_gpu.begin, one_gpu.hopper


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
    """The call that the driver answers: the older one where the driver does not have the newer."""
    if request.param == SAMPLE:
        fake.hide(INFO)
    return str(request.param)


EACH_API = pytest.mark.parametrize("api", [INFO, SAMPLE], indirect=True)


class Usage:
    """A driver's per-process samples of which a test says everything, through either call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, api: str) -> None:
        # (pid, time, (sm, memory, encoder, decoder)).
        self.retained: list[tuple[int, int, tuple[int, int, int, int]]] = []
        self.since: list[int] = []
        self.repeats = False
        call = self._info if api == INFO else self._sample
        monkeypatch.setitem(pynvml._nvmlGetFunctionPointer_cache, api, call)

    def _found(self, since: int, room: int) -> tuple[int, int]:
        self.since.append(since)
        self._now = [entry for entry in self.retained if self.repeats or not entry[1] or entry[1] > since]
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
        driver.retained = [(11, time, (9, 0, 0, 0)), (12, time - 10, (9, 0, 0, 0))]
        source.read()
    assert driver.since == [0, 50, 70, 70]


@EACH_API
def test_several_samples_of_one_process_are_averaged(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    gpu.add_process(11, GIB)
    gpu.add_process(12, GIB)
    driver = Usage(monkeypatch, api)
    driver.retained = [
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
    driver.retained = [(11, 50, (80, 0, 0, 0))]
    source = begin()
    source.read()
    driver.retained.append((11, 60, (20, 0, 0, 0)))
    assert use(source.read(), 11) == (20, 0, 0, 0)


@EACH_API
def test_a_clock_set_back_is_adopted_for_processes_as_well(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    gpu.add_process(11, GIB)
    driver = Usage(monkeypatch, api)
    driver.retained = [(11, START, (80, 0, 0, 0))]
    source = begin()
    source.read()
    for number in range(QUIET_READS + 2):
        driver.retained = [(11, 1000 + number, (20, 0, 0, 0))]
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
    assert fake.calls(api) == 1, "the larger buffer is used again"


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
def test_what_a_process_did_before_it_ended_is_reported_once(
    gpu: FakeGpu, begin: Callable[[], NvmlSource], monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    driver = Usage(monkeypatch, api)
    last = gpu.add_process(11, GIB)
    driver.retained = [(11, START, (80, 0, 0, 0))]
    source = begin()
    assert source.read().readings[0].ended == {}
    last.remove()
    driver.retained = [(11, START + 1000, (60, 0, 0, 0))]
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
