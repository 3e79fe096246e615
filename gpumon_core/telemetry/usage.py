"""What each process used of a device since the tick before.

Source: NVML API reference, nvmlDeviceGetProcessesUtilizationInfo and its elder sister
nvmlDeviceGetProcessUtilization. Both list the processes that used anything at all since a timestamp;
a process that runs and is not listed was idle.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import partial

import pynvml

from gpumon_core.telemetry.gate import Gate, Unsupported
from gpumon_core.telemetry.limits import LATEST_US, is_pid

SampledUse = tuple[int | None, int | None, int | None, int | None]
IDLE: SampledUse = (0, 0, 0, 0)

# nvmlProcessUtilizationInfo_v1_t: time, pid, sm, memory, encoder, decoder, jpeg, optical flow.
_INFO = struct.Struct("=QIIIIIII4x")
# nvmlProcessUtilizationSample_t: pid, time, sm, memory, encoder, decoder.
_SAMPLE = struct.Struct("=I4xQIIII")
LARGEST = 16384
# Reads without any sample after which the timestamps are looked at anew: see samples.py.
DOUBTFUL_AFTER = 15


class UsageReader:
    """Reads the per-process utilization of one device."""

    def __init__(self) -> None:
        self._ways: list[Callable[[object, int], list[tuple[int, int, SampledUse]]]] = [self._info, self._sample]
        self._last_seen = 0
        self._quiet = 0
        self._grow(64)

    def _grow(self, capacity: int) -> None:
        self._capacity = capacity
        self._memory = ctypes.create_string_buffer(_INFO.size * capacity)

    def try_again(self) -> None:
        """Ask again what the device was found not to support."""
        if not self._ways:
            self._ways = [self._info, self._sample]

    def read(self, gate: Gate, subject: str, handle: object) -> dict[int, SampledUse] | None:
        """PID -> percent of SMs, memory controller, encoders and decoders, of those that used any.

        None where the device does not report it, or failed to this time. Raises DeviceLost or SessionOver.
        """
        while self._ways:
            ask = partial(gate.ask, subject, self._ways[0], handle, name="per-process utilization")
            try:
                found = ask(self._last_seen)
                return None if found is None else self._sum_up(found, ask)
            except Unsupported:
                del self._ways[0]
        return None

    def _sum_up(
        self,
        found: list[tuple[int, int, SampledUse]],
        again: Callable[[int], list[tuple[int, int, SampledUse]] | None],
    ) -> dict[int, SampledUse]:
        used: dict[int, list[SampledUse]] = {}
        newest = self._last_seen
        for pid, time, use in found:
            if time > self._last_seen or not time:
                used.setdefault(pid, []).append(use)
                newest = max(newest, time)
        if used:
            self._quiet = 0
        else:
            self._quiet += 1
            if self._quiet >= DOUBTFUL_AFTER:
                self._quiet = 0
                # Samples from before "last seen", and none after: the clock was set back.
                newest = max((time for _, time, _ in again(0) or ()), default=0)
        self._last_seen = newest
        return {pid: uses[0] if len(uses) == 1 else _mean(uses) for pid, uses in used.items()}

    def _info(self, handle: object, since: int) -> list[tuple[int, int, SampledUse]]:
        call = pynvml._nvmlGetFunctionPointer("nvmlDeviceGetProcessesUtilizationInfo")
        request = pynvml.c_nvmlProcessesUtilizationInfo_v1_t()
        array = ctypes.POINTER(pynvml.c_nvmlProcessUtilizationInfo_v1_t)
        while True:
            request.version = pynvml.ProcessesUtilizationInfo_v1
            request.processSamplesCount = self._capacity
            request.lastSeenTimeStamp = since
            request.procUtilArray = ctypes.cast(self._memory, array)
            code = call(handle, ctypes.byref(request))
            if not self._too_small(code, request.processSamplesCount):
                break
        return [
            (pid, time, _use(sm, memory, encoder, decoder))
            for time, pid, sm, memory, encoder, decoder, _, _ in self._entries(
                _INFO, code, request.processSamplesCount
            )
            if is_pid(pid) and time < LATEST_US
        ]

    def _sample(self, handle: object, since: int) -> list[tuple[int, int, SampledUse]]:
        call = pynvml._nvmlGetFunctionPointer("nvmlDeviceGetProcessUtilization")
        count = ctypes.c_uint()
        while True:
            count.value = self._capacity
            code = call(handle, self._memory, ctypes.byref(count), ctypes.c_ulonglong(since))
            if not self._too_small(code, count.value):
                break
        return [
            (pid, time, _use(*use))
            for pid, time, *use in self._entries(_SAMPLE, code, count.value)
            if is_pid(pid) and time < LATEST_US
        ]

    def _too_small(self, code: int, needed: int) -> bool:
        if code != pynvml.NVML_ERROR_INSUFFICIENT_SIZE or self._capacity >= LARGEST:
            return False
        self._grow(max(2 * self._capacity, min(2 * needed, LARGEST)))
        return True

    def _entries(self, layout: struct.Struct, code: int, count: int) -> list[tuple[int, ...]]:
        if code == pynvml.NVML_ERROR_NOT_FOUND:
            return []
        if code != pynvml.NVML_SUCCESS:
            raise pynvml.NVMLError(code)
        written = memoryview(self._memory)[: layout.size * min(count, self._capacity)]
        return list(layout.iter_unpack(written))


def _use(sm: int, memory: int, encoder: int, decoder: int) -> SampledUse:
    """Percentages; what cannot be one is not known."""
    return (
        sm if sm <= 100 else None,
        memory if memory <= 100 else None,
        encoder if encoder <= 100 else None,
        decoder if decoder <= 100 else None,
    )


def _mean(uses: list[SampledUse]) -> SampledUse:
    columns = ([share for share in column if share is not None] for column in zip(*uses, strict=True))
    sm, memory, encoder, decoder = (round(sum(c) / len(c)) if c else None for c in columns)
    return sm, memory, encoder, decoder
