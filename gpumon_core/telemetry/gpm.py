"""GPU performance monitoring (GPM): what Hopper and newer GPUs measure between two samples.

Source: NVML API reference, "GPM Functions". A metric belongs to a pair of samples, so the first tick
has none.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from math import isfinite
from typing import Any

import pynvml

from gpumon_core.telemetry.gate import UNSUPPORTED, Gate, Unsupported

# nvmlGpmMetric_t: id, nvmlReturn, value, and three texts; where they begin in the request.
_METRIC = struct.Struct("=Iid24x")
_METRICS = pynvml.c_nvmlGpmMetricsGet_t.metrics.offset


class GpmReader:
    """Measures some GPM metrics of one GPU or MIG instance, from one read to the next."""

    def __init__(self, gate: Gate, subject: str, handle: object, gpu_instance: int | None = None) -> None:
        """`handle` is the GPU's own; `gpu_instance` picks a MIG instance of it."""
        self._gate = gate
        self.subject = subject
        self._handle = handle
        self._instance = gpu_instance
        self._supported = False
        self._samples: list[Any] = []
        self._has_first = False
        self._request = pynvml.c_nvmlGpmMetricsGet_t()
        self._request.version = pynvml.NVML_GPM_METRICS_GET_VERSION
        self._ids: list[int] = []

    def read(self, ids: list[int]) -> dict[int, float | None] | None:
        """GPM metric id -> value since the read before, None where the GPU does not have the metric;
        None at the first read, or where it failed this time. Raises Unsupported, DeviceLost or SessionOver."""
        if not self._prepare():
            return None
        if ids != self._ids:
            self._ids = list(ids)
            self._request.numMetrics = len(ids)
            for place, metric in enumerate(ids):
                self._request.metrics[place].metricId = metric
        # The older of the two is overwritten.
        first, second = self._samples
        self._samples.reverse()
        if self._gate.ask(self.subject, self._take, first, name="nvmlGpmSampleGet") is None:
            self._has_first = False
            return None
        if not self._has_first:
            self._has_first = True
            return None
        self._request.sample1, self._request.sample2 = second, first
        if self._gate.ask(self.subject, self._evaluate, name="nvmlGpmMetricsGet") is None:
            return None
        found: dict[int, float | None] = {}
        written = memoryview(self._request).cast("B")[_METRICS : _METRICS + len(self._ids) * _METRIC.size]
        for metric, code, value in _METRIC.iter_unpack(written):
            if code == pynvml.NVML_SUCCESS and isfinite(value):
                found[metric] = value
            elif code in UNSUPPORTED or code == pynvml.NVML_ERROR_INVALID_ARGUMENT:
                found[metric] = None
        return found

    def _prepare(self) -> bool:
        """Whether the GPU can be measured and there are two samples to do so."""
        if not self._supported:
            support = self._gate.ask(self.subject, pynvml.nvmlGpmQueryDeviceSupport, self._handle)
            if support is None:
                return False
            if not support.isSupportedDevice:
                raise Unsupported("this GPU has no performance monitoring")
            self._supported = True
        while len(self._samples) < 2:
            sample = self._gate.ask(self.subject, pynvml.nvmlGpmSampleAlloc)
            if sample is None:
                return False
            self._samples.append(sample)
        return True

    def _take(self, sample: Any) -> bool:
        try:
            if self._instance is None:
                pynvml.nvmlGpmSampleGet(self._handle, sample)
            else:
                pynvml.nvmlGpmMigSampleGet(self._handle, self._instance, sample)
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_NO_PERMISSION:
                # A driver may reserve its profiling for administrators; then the other ways are the only ones.
                raise Unsupported(str(error)) from None
            raise
        return True

    def _evaluate(self) -> bool:
        call: Callable[..., int] = pynvml._nvmlGetFunctionPointer("nvmlGpmMetricsGet")
        code = call(ctypes.byref(self._request))
        if code != pynvml.NVML_SUCCESS:
            raise pynvml.NVMLError(code)
        return True

    def close(self) -> None:
        """Give the samples back to the driver."""
        samples, self._samples, self._has_first = self._samples, [], False
        for sample in samples:
            self._gate.fact(self.subject, pynvml.nvmlGpmSampleFree, sample)
