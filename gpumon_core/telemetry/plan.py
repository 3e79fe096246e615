"""What a device is asked: the catalogue as NVML calls, field values and GPM metrics.

A plan begins with the best way to ask for each metric and learns what the device does not support:
then it moves on to the next way, and in the end leaves the metric out.
"""

from __future__ import annotations

import ctypes
import logging
import struct
import time
from collections.abc import Callable, Iterable
from functools import partial
from math import inf, isfinite
from typing import Any

import pynvml

from gpumon_core.metrics import GPU_METRICS, Metric, NvmlCall, NvmlField, NvmlGpm, NvmlQuery
from gpumon_core.telemetry.cost import Pace
from gpumon_core.telemetry.energy import EnergyCounter
from gpumon_core.telemetry.gate import LOST, NOT_AVAILABLE, UNSUPPORTED, DeviceLost, Gate, Unsupported
from gpumon_core.telemetry.gpm import GpmReader
from gpumon_core.telemetry.records import Sampling
from gpumon_core.telemetry.samples import SampleReader, decode

log = logging.getLogger(__name__)

DeviceValues = dict[str, float | None]
# The energy counter is renewed some ten times a second: over less time its growth says little.
ENERGY_OVER_S = 0.5

# nvmlFieldValue_t: id, scope, time, latency, type of the value, nvmlReturn, value.
_FIELD = struct.Struct("=IIqqIiQ")
_SAMPLED = tuple((metric, metric.peak) for metric in GPU_METRICS if metric.peak)
# How long a driver retains samples, as seen on an H100 (docs/hardware.md): they are never asked more rarely.
RETAINED_S = {"utilization": 14.0, "memory_utilization": 14.0, "power": 2.4}
_ENERGY = "energy"


class _Target:
    """Where a number goes, and what becomes of it on the way."""

    __slots__ = ("by_nvlink", "count", "field", "highest", "key", "lowest", "rate", "scale", "whole")

    def __init__(self, metric: Metric, way: NvmlQuery) -> None:
        self.key = metric.key
        self.field = way.field if isinstance(way, NvmlCall) else None
        self.count = isinstance(way, NvmlCall) and way.count
        self.scale = way.scale
        self.whole = metric.column == "integer"
        self.lowest, self.highest = metric.range
        self.rate = isinstance(way, NvmlField) and way.rate
        self.by_nvlink = isinstance(way, NvmlGpm) and way.by_nvlink

    def put(self, values: DeviceValues, result: Any) -> None:
        field = self.field
        if self.count:
            result = len(result)
        elif field is not None:
            result = result[field] if isinstance(field, int) else getattr(result, field)
        if result in NOT_AVAILABLE or not isfinite(result):
            return
        number = result * self.scale
        if self.lowest <= number <= self.highest:
            values[self.key] = round(number) if self.whole else round(number, 3)


class _Call:
    """One function of NVML, asked once for every metric that it yields."""

    __slots__ = ("arguments", "fallback", "function", "keys", "name", "rare", "targets")

    def __init__(self, call: NvmlCall, rare: bool) -> None:
        self.function: Callable[..., Any] = _OWN.get(call.function, getattr(pynvml, call.function, _absent))
        self.name = " ".join(map(str, (call.function, *call.arguments)))
        self.rare = rare
        self.arguments = [getattr(pynvml, a) if isinstance(a, str) else a for a in call.arguments]
        self.targets: list[_Target] = []
        self.keys: list[str] = []
        # Asked only where the samples have not answered already.
        self.fallback = False


class _Fields:
    """Many field values in one call."""

    def __init__(self, asked: list[tuple[Metric, NvmlField]]) -> None:
        self.targets = [_Target(metric, field) for metric, field in asked]
        self.array = (pynvml.c_nvmlFieldValue_t * len(asked))()
        for place, (_, field) in enumerate(asked):
            self.array[place].fieldId = getattr(pynvml, field.name)
            self.array[place].scopeId = field.scope

    def ask(self, handle: object) -> Any:
        call = pynvml._nvmlGetFunctionPointer("nvmlDeviceGetFieldValues")
        code = call(handle, ctypes.c_int(len(self.targets)), self.array)
        if code != pynvml.NVML_SUCCESS:
            raise pynvml.NVMLError(code)
        return list(_FIELD.iter_unpack(self.array))


def _retired_pages(handle: object, cause: int) -> range:
    """As many as the driver counts: where they lie need not be asked."""
    call = pynvml._nvmlGetFunctionPointer("nvmlDeviceGetRetiredPages")
    count = ctypes.c_uint(0)
    code = call(handle, ctypes.c_uint(cause), ctypes.byref(count), None)
    if code not in (pynvml.NVML_SUCCESS, pynvml.NVML_ERROR_INSUFFICIENT_SIZE):
        raise pynvml.NVMLError(code)
    return range(count.value)


# pynvml makes room for as many as the driver says, which may be four billion.
_OWN: dict[str, Callable[..., Any]] = {"nvmlDeviceGetRetiredPages": _retired_pages}


def _absent(*_: object) -> None:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)


def _reader(metric: Metric) -> SampleReader:
    """Reads the samples of a metric, with its range in NVML's unit."""
    return SampleReader(getattr(pynvml, str(metric.samples)), metric.range[1] / metric.nvml[0].scale)


class Plan:
    """How one device is asked for everything in the catalogue."""

    def __init__(self, gate: Gate, subject: str, handle: object, parent: object, instance: int | None) -> None:
        """`parent` and `instance` are a MIG instance's GPU and number there; a GPU is its own parent."""
        self._gate = gate
        self._subject = subject
        self._handle = handle
        self._parent = parent
        self._instance = instance
        self._ways: dict[str, list[NvmlQuery]] = {metric.key: list(metric.nvml) for metric in GPU_METRICS}
        self._samples = {metric.key: _reader(metric) for metric in GPU_METRICS if metric.samples}
        self.pace = Pace(subject)
        # What each question brought last, for the ticks at which it is not asked.
        self._brought: dict[str, DeviceValues] = {}
        # Whether the device said anything in the newest reading.
        self.has_answered = False
        self._gpm: GpmReader | None = None
        # Counters as they were, and when: (value, monotonic seconds).
        self._before: dict[str, tuple[float, float]] = {}
        self._energy = EnergyCounter()
        self._energy_at = 0.0
        # The most that the board may take, W: what its energy counter says is measured against it.
        self.power_limit_w: float | None = None
        self._rare_at = 0.0
        self._has_nvlink: bool | None = None
        # Whether ways were given up since everything was put together; the metrics that lost one since the fields
        # were asked.
        self._outdated = False
        self._moved: set[str] = set()
        self._arrange()

    @property
    def by_interval(self) -> bool:
        """Whether utilization is the mean over the whole interval."""
        reader = self._samples.get("utilization")
        return reader is not None and reader.delivers

    @property
    def sampling(self) -> Sampling:
        """What utilization is: a mean over the interval, over a part of it, or of the moment."""
        reader = self._samples.get("utilization")
        if reader is None or not reader.delivers:
            return "point"
        return "partial" if reader.partial else "interval"

    @property
    def energy_counter(self) -> bool:
        """Whether the device counts the energy it takes."""
        return bool(self._ways["energy"])

    @property
    def compares(self) -> bool:
        """Whether GPM measures some of its values between two readings."""
        return bool(self._gpm and self._gpm_ids)

    def lacks(self, key: str) -> bool:
        """Whether the device has been found not to offer a metric."""
        return not self._ways[key] and key not in self._samples

    def rename(self, subject: str) -> None:
        """Be called otherwise in the log from now on."""
        self._subject = self.pace.subject = subject
        if self._gpm is not None:
            self._gpm.subject = subject

    def try_again(self) -> None:
        """Ask anew what the device was found not to offer in any way. What it offers goes on as it was."""
        for metric in GPU_METRICS:
            if not self._ways[metric.key] and metric.nvml:
                self._ways[metric.key] = list(metric.nvml)
                self._outdated = True
            if metric.samples and metric.key not in self._samples:
                self._samples[metric.key] = _reader(metric)
                self._outdated = True
        if not self._has_nvlink:
            self._has_nvlink = None

    def pause(self) -> None:
        """The device does not answer: a mean power since before then would say nothing of the next tick."""
        self._energy = EnergyCounter()

    def close(self) -> None:
        """Give back what the driver lent."""
        if self._gpm is not None:
            self._gpm.close()

    def read(
        self, values: DeviceValues, rare_every_s: float, offset_s: float, interval_s: float = 0.0, devices: int = 1
    ) -> None:
        """Ask the device. Raises DeviceLost or SessionOver, with what was read before in `values`.

        What is asked rarely is asked now if `rare_every_s` have passed; `offset_s` keeps the devices
        of a machine from doing so in the same tick. `interval_s` has passed since the reading before
        (0: not known), of so many devices: what costs more than its share of it is not asked each time.
        """
        now = time.monotonic()
        rare = now >= self._rare_at
        self.has_answered = False
        self.pace.begin(interval_s, devices)
        self._read_samples(values)
        if self._outdated:
            # Samples do not exist here, or the device was lost in the middle of the reading before.
            self._arrange()
        for calls in (self._calls, self._rare_calls) if rare else (self._calls,):
            for call in calls:
                if not (call.fallback and all(key in values for key in call.keys)):
                    self._ask_in_turn(call, values)
        lacking = self._outdated
        if lacking:
            # A function's next way may be a field.
            self._arrange()
        self._moved.clear()
        self._read_fields_in_turn(values)
        if rare:
            self._read_fields(self._rare_fields, values)
        if self._gpm_ids and not self._recall("GPM", values):
            self.pace.measure("GPM", partial(self._read_gpm, values))
            self._remember("GPM", [target.key for target in self._gpm_targets.values()], values)
        self._derive(values)
        if lacking or self._outdated:
            self._arrange()
            # The next way is tried at once, so that not even the first tick lacks anything.
            self._ask_again(values, rare)
        if rare:
            self._rare_at = now + rare_every_s + (offset_s if not self._rare_at else 0.0)

    def _recall(self, name: str, values: DeviceValues, retained_s: float = inf) -> bool:
        """Whether a question is not to be asked now; what it brought last then is in `values`."""
        if self.pace.is_due(name, retained_s) or name not in self._brought:
            return False
        values.update(self._brought[name])
        return True

    def _remember(self, name: str, keys: Iterable[str | None], values: DeviceValues) -> None:
        if not self.pace.is_thinned(name):
            return
        brought = {key: values[key] for key in keys if key in values and key is not None}
        if brought:
            self._brought[name] = brought
        else:
            # It failed: the next tick asks again.
            self._brought.pop(name, None)

    def _ask_in_turn(self, call: _Call, values: DeviceValues) -> None:
        if call.rare or call.fallback or self.pace.asks_all:
            self._ask(call, values)
        elif _ENERGY in call.keys:
            # A counter is not repeated: it would not have grown.
            if self.pace.is_due(_ENERGY):
                self.pace.measure(_ENERGY, partial(self._ask, call, values))
        elif not self._recall(call.name, values):
            self.pace.measure(call.name, partial(self._ask, call, values))
            self._remember(call.name, call.keys, values)

    def _read_fields_in_turn(self, values: DeviceValues) -> None:
        """The fields of every tick. Of them the energy counter is the one that may cost much."""
        if not any(target.key == _ENERGY for target in self._fields.targets):
            self._read_fields(self._fields, values)
        elif self.pace.is_due(_ENERGY):
            self.pace.measure(_ENERGY, partial(self._read_fields, self._fields, values))
        else:
            self._read_fields(self._fields_without_energy, values)

    def _ask(self, call: _Call, values: DeviceValues) -> None:
        try:
            result = self._gate.ask(self._subject, call.function, self._handle, *call.arguments)
        except Unsupported as reason:
            log.debug("%s: %s: %s", self._subject, call.function.__name__, reason)
            self._give_up(call.keys)
            return
        if result is not None:
            self.has_answered = self.has_answered or not call.rare
            for target in call.targets:
                if not (call.fallback and target.key in values):
                    target.put(values, result)

    def _give_up(self, keys: Iterable[str]) -> None:
        """Leave the way in which these metrics are asked; the next one is first now."""
        for key in keys:
            del self._ways[key][0]
            self._moved.add(key)
        self._outdated = True

    def _ask_again(self, values: DeviceValues, rare: bool) -> None:
        """Ask, in the ways that are now the first, for what is still missing."""
        for _ in range(3):
            for call in [*self._calls, *(self._rare_calls if rare else ())]:
                if not any(key in values for key in call.keys):
                    self._ask(call, values)
            # A field's next way may be another field.
            fields = [
                (metric, way)
                for metric in GPU_METRICS
                if metric.key in self._moved and (rare or not metric.every_s)
                for way in self._ways[metric.key][:1]
                if isinstance(way, NvmlField)
            ]
            self._moved.clear()
            self._read_fields(_Fields(fields), values)
            if not self._outdated:
                break
            self._arrange()
        self._derive(values)

    def _arrange(self) -> None:
        """Put together what is asked, from the ways that are left."""
        self._outdated = False
        calls: dict[tuple[object, ...], _Call] = {}
        rare_keys: set[tuple[object, ...]] = set()
        fields: dict[bool, list[tuple[Metric, NvmlField]]] = {False: [], True: []}
        gpm: dict[int, _Target] = {}
        for metric in GPU_METRICS:
            way = next(iter(self._ways[metric.key]), None)
            rare = metric.every_s > 0
            if isinstance(way, NvmlCall):
                key = (way.function, way.arguments, rare)
                call = calls.get(key) or calls.setdefault(key, _Call(way, rare))
                call.targets.append(_Target(metric, way))
                call.keys.append(metric.key)
                call.fallback = call.fallback or metric.key in self._samples
                if rare:
                    rare_keys.add(key)
            elif isinstance(way, NvmlField):
                fields[rare].append((metric, way))
            elif isinstance(way, NvmlGpm):
                gpm[getattr(pynvml, way.name)] = _Target(metric, way)
        self._calls = [call for key, call in calls.items() if key not in rare_keys]
        self._rare_calls = [call for key, call in calls.items() if key in rare_keys]
        self._fields, self._rare_fields = _Fields(fields[False]), _Fields(fields[True])
        self._fields_without_energy = _Fields([asked for asked in fields[False] if asked[0].key != _ENERGY])
        self._gpm_targets, self._gpm_ids = gpm, list(gpm)

    def _read_samples(self, values: DeviceValues) -> None:
        for metric, peak in _SAMPLED:
            reader = self._samples.get(metric.key)
            if reader is None:
                continue
            name = f"samples of {metric.key}"
            if self._recall(name, values, RETAINED_S[metric.key]):
                continue
            try:
                found = self.pace.measure(
                    name,
                    partial(self._gate.ask, self._subject, reader.read, self._handle, name="nvmlDeviceGetSamples"),
                )
            except Unsupported as reason:
                log.debug("%s: samples of %s: %s", self._subject, metric.key, reason)
                del self._samples[metric.key]
                self._outdated = True
                continue
            way = metric.nvml[0]
            if found is not None:
                mean, highest = found
                values[metric.key] = round(mean * way.scale, 3)
                values[peak] = round(highest * way.scale, 3)
                self.has_answered = True
            self._remember(name, (metric.key, peak), values)

    def _read_fields(self, fields: _Fields, values: DeviceValues) -> None:
        if not fields.targets:
            return
        try:
            found = self._gate.ask(self._subject, fields.ask, self._handle, name="nvmlDeviceGetFieldValues")
        except Unsupported:
            self._give_up(target.key for target in fields.targets)
            return
        if found is None:
            return
        for target, (field, _, _, _, kind, code, word) in zip(fields.targets, found, strict=True):
            if code == pynvml.NVML_SUCCESS:
                self.has_answered = self.has_answered or fields is not self._rare_fields
                number = decode(word, kind)
                if target.rate:
                    self._rate(target, number, values)
                else:
                    target.put(values, number)
            elif code in LOST:
                raise DeviceLost(str(pynvml.NVMLError(code)))
            elif code in UNSUPPORTED or code == pynvml.NVML_ERROR_INVALID_ARGUMENT:
                # An older driver does not know the number of the field.
                self._give_up([target.key])
            else:
                self._gate.say_once(
                    self._subject, f"field value {field} ({target.key})", str(pynvml.NVMLError(code))
                )
                self._gate.failed += 1

    def _rate(self, target: _Target, number: float, values: DeviceValues) -> None:
        if number in NOT_AVAILABLE:
            return
        now = time.monotonic()
        before = self._before.get(target.key)
        self._before[target.key] = (number, now)
        if before is not None and number >= before[0] and now > before[1]:
            target.put(values, (number - before[0]) / (now - before[1]))

    def _read_gpm(self, values: DeviceValues) -> None:
        lacking = list(self._gpm_targets.values())
        try:
            if self._gpm is None:
                self._gpm = GpmReader(self._gate, self._subject, self._parent, self._instance)
            found = self._gpm.read(self._gpm_ids)
        except Unsupported as reason:
            log.debug("%s: GPM: %s", self._subject, reason)
        else:
            if found is None:
                return
            self.has_answered = self.has_answered or bool(found)
            lacking = []
            for metric, target in self._gpm_targets.items():
                number = found.get(metric)
                if number is None:
                    if metric in found:
                        lacking.append(target)
                elif number == 0 and target.by_nvlink and not self._nvlink():
                    lacking.append(target)
                else:
                    target.put(values, number)
        if lacking:
            self._give_up(target.key for target in lacking)

    def _nvlink(self) -> bool:
        """Whether the GPU has NVLink, though nothing may go over it now."""
        if self._has_nvlink is None:
            try:
                self._gate.ask(self._subject, pynvml.nvmlDeviceGetNvLinkState, self._parent, 0)
                self._has_nvlink = True
            except Unsupported:
                self._has_nvlink = False
        return self._has_nvlink

    def _derive(self, values: DeviceValues) -> None:
        """Mean power from the energy counter, and peaks that are never below their means."""
        energy = values.get("energy")
        now = time.monotonic()
        since_s = now - self._energy_at
        if energy is not None and since_s >= ENERGY_OVER_S:
            self._energy_at = now
            growth = self._energy.step(energy, since_s, values.get("power"), self.power_limit_w)
            # A board always takes something: a counter that does not grow is not believed.
            if growth is not None and growth.joules > 0:
                values["power"] = round(growth.joules / growth.seconds, 3)
        for metric, peak in _SAMPLED:
            mean = values.get(metric.key)
            if mean is not None:
                values[peak] = max(mean, values.get(peak) or mean)
