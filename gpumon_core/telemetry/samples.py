"""What the driver recorded between two ticks: its own samples of utilization and power.

Source: NVML API reference, nvmlDeviceGetSamples. The driver samples several times a second and retains
the newest hundred or so; each sample speaks of the time since the one before it.
"""

from __future__ import annotations

import ctypes
import struct
import time
from collections.abc import Sequence
from math import inf, isfinite
from operator import mul, sub

import pynvml

from gpumon_core.telemetry.limits import LATEST_US

# Quiet reads in a row after which the timestamps are looked at anew: the clock that the driver
# stamps samples with may have been set back.
DOUBTFUL_AFTER = 3
# A first sample this many times longer than the usual step speaks of samples that were overwritten.
OVERWRITTEN = 10
LARGEST = 8192
# Samples that cover less than this part of the time since the read before, and miss more than a second (the
# longest period of sampling that NVML names), speak of a part of it only.
COVERS, MISSES_US = 0.9, 1_000_000

_LOW_BITS = {
    pynvml.NVML_VALUE_TYPE_UNSIGNED_INT: 0xFFFFFFFF,
    pynvml.NVML_VALUE_TYPE_UNSIGNED_SHORT: 0xFFFF,
}


class SampleReader:
    """Reads one kind of samples of one device, each sample once."""

    def __init__(self, kind: int, highest: float | None = None) -> None:
        self._kind = ctypes.c_int(kind)
        # NVML marks a value that it cannot give with all bits set.
        self._highest = 0xFFFFFFFE if highest is None else highest
        self._last_seen = 0
        self._read_at: float | None = None
        self._quiet = 0
        # Whether samples come: some drivers take the call and never have any.
        self.delivers = False
        # Whether the newest leave out a part of the time since the read before: the driver had retained no more.
        self.partial = False
        self._grow(128)
        self._type = ctypes.c_int()
        self._count = ctypes.c_uint()

    def _grow(self, capacity: int) -> None:
        self._capacity = capacity
        # nvmlSample_t: a time in microseconds and a union of eight bytes.
        self._words = (ctypes.c_ulonglong * (2 * capacity))()

    def read(self, handle: object) -> tuple[float, float] | None:
        """Time-weighted mean and maximum since the read before, in NVML's unit.

        None the first time, and where nothing was sampled since. Raises pynvml.NVMLError.
        """
        times, values = self._fetch(handle, self._last_seen)
        since = self._last_seen
        now, before = time.monotonic(), self._read_at
        self._read_at = now
        if not times or times[-1] <= since:
            self._quiet += 1
            if self._quiet >= DOUBTFUL_AFTER:
                self._quiet = 0
                self.delivers = False
                times, _ = self._fetch(handle, 0)
                self._last_seen = times[-1] if times else 0
            return None
        self._quiet = 0
        self._last_seen = times[-1]
        if not since:
            return None
        self.delivers = True
        steps = _steps(since, times)
        # By our own clock as well: one that was set says nothing of how long it was.
        passed = max(times[-1] - since, 0.0 if before is None else 1e6 * (now - before))
        self.partial = sum(steps) < min(COVERS * passed, passed - MISSES_US)
        return _weighted(steps, values, self._highest)

    def _fetch(self, handle: object, since: int) -> tuple[list[int], Sequence[float]]:
        call = pynvml._nvmlGetFunctionPointer("nvmlDeviceGetSamples")
        while True:
            self._count.value = self._capacity
            code = call(
                handle,
                self._kind,
                ctypes.c_ulonglong(since),
                ctypes.byref(self._type),
                ctypes.byref(self._count),
                self._words,
            )
            full = code == pynvml.NVML_SUCCESS and self._count.value >= self._capacity
            if not (full or code == pynvml.NVML_ERROR_INSUFFICIENT_SIZE) or self._capacity >= LARGEST:
                break
            self._grow(self._capacity * 4)
        if code == pynvml.NVML_ERROR_NOT_FOUND:
            return [], []
        if code != pynvml.NVML_SUCCESS:
            raise pynvml.NVMLError(code)
        end = 2 * min(self._count.value, self._capacity)
        times: list[int] = self._words[0:end:2]
        raw: list[int] = self._words[1:end:2]
        kind = self._type.value
        low = _LOW_BITS.get(kind)
        # Nearly always whole numbers. A driver may leave their upper half as it found it.
        values = [word & low for word in raw] if low else [_finite(decode(word, kind)) for word in raw]
        if times and (times[0] <= since or times[-1] >= LATEST_US or times != sorted(times)):
            # Whatever a driver repeats has been counted already.
            pairs = sorted(pair for pair in zip(times, values, strict=True) if since < pair[0] < LATEST_US)
            return [time for time, _ in pairs], [value for _, value in pairs]
        return times, values


def _finite(value: float) -> float:
    """What is no number, or below 0, is above every highest one, and so left out."""
    return value if isfinite(value) and value >= 0 else inf


def decode(word: int, kind: int) -> float:
    """The number in the eight bytes of an nvmlValue_t, given its nvmlValueType_t."""
    if kind == pynvml.NVML_VALUE_TYPE_DOUBLE:
        return float(struct.unpack("=d", struct.pack("=Q", word))[0])
    if kind == pynvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG:
        return word - (1 << 64) if word >> 63 else word
    if kind == pynvml.NVML_VALUE_TYPE_SIGNED_INT:
        word &= 0xFFFFFFFF
        return word - (1 << 32) if word >> 31 else word
    return word & _LOW_BITS.get(kind, 0xFFFFFFFFFFFFFFFF)


def weighted(
    since: int, times: list[int], values: Sequence[float], highest: float | None
) -> tuple[float, float] | None:
    """Mean and maximum of samples, each weighing the time from the one before it (`since` for the first)."""
    return _weighted(_steps(since, times), values, highest)


def _steps(since: int, times: list[int]) -> list[int]:
    """The time that each sample speaks of, in microseconds."""
    steps = list(map(sub, times, [since, *times]))
    if len(steps) > OVERWRITTEN:
        usual = sorted(steps)[len(steps) // 2]
        if steps[0] > OVERWRITTEN * usual:
            steps[0] = usual
    return steps


def _weighted(steps: list[int], values: Sequence[float], highest: float | None) -> tuple[float, float] | None:
    if highest is not None and max(values) > highest:
        valid = [(step, value) for step, value in zip(steps, values, strict=True) if value <= highest]
        if not valid:
            return None
        steps, values = [step for step, _ in valid], [value for _, value in valid]
    total = sum(steps)
    mean = sum(map(mul, values, steps)) / total if total else sum(values) / len(values)
    return mean, max(values)
