"""Snapshots from NVIDIA's driver, through pynvml.

Static facts are asked once, a call that a device does not support is asked once, and a device
that is lost costs its own readings only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import pynvml

from gpumon_core.metrics import GPU_METRICS, MIB, RARELY_S, TICK_COLUMNS
from gpumon_core.telemetry.gate import NOT_AVAILABLE, DeviceLost, Gate, SessionOver, Unsupported
from gpumon_core.telemetry.plan import Plan, Values
from gpumon_core.telemetry.records import (
    GpuInfo,
    GpuReading,
    HostInfo,
    ProcessReading,
    Sampling,
    Snapshot,
    SourceUnavailable,
)
from gpumon_core.telemetry.running import FUNCTIONS, VERSIONS, Buffer, Entry
from gpumon_core.telemetry.usage import IDLE, UsageReader, Use
from gpumon_core.telemetry.watch import Task, Watch

log = logging.getLogger(__name__)

# How long a lost device is left alone, and how often the number of devices is looked at.
RETRY_S = 30.0
RECOUNT_S = 60.0
# When a call counts as hanging. The first of all may have to wake every GPU, one after another.
HANG_S = 5.0
START_HANG_S = 30.0
CLOSE_HANG_S = 2.0
# The longest pause between two attempts to begin a new session.
LONGEST_PAUSE_S = 30.0
HANG_REMEDY = "Look at dmesg for Xid; a driver that hangs needs a reboot."
NOTHING: Values = dict.fromkeys(TICK_COLUMNS)
UNKNOWN: Use = (None, None, None, None)

ARCHITECTURES = {
    value: name.removeprefix("NVML_DEVICE_ARCH_").title()
    for name, value in vars(pynvml).items()
    if name.startswith("NVML_DEVICE_ARCH_") and name != "NVML_DEVICE_ARCH_UNKNOWN"
}

REMEDIES = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "Install the NVIDIA driver, or give the container access to the GPU "
    "(docker run --gpus all).",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "Load the NVIDIA kernel module (modprobe nvidia), and look at dmesg "
    "if that fails.",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "The driver was updated while loaded: reboot, or reload the "
    "NVIDIA kernel modules.",
    pynvml.NVML_ERROR_NO_PERMISSION: "Let this user read and write /dev/nvidiactl and /dev/nvidia0.",
}


class _Device:
    """One GPU or MIG instance: its handle, its facts, and what it has been found to support."""

    def __init__(
        self,
        gate: Gate,
        handle: object,
        info: GpuInfo,
        parent: _Device | None = None,
        instance: tuple[int | None, int | None] | None = None,
    ) -> None:
        self.handle = handle
        self.info = info
        self.instance = instance
        self.subject = f"GPU {info.index}" + ("" if info.mig_index is None else f" MIG {info.mig_index}")
        # An instance whose number is not known stands for itself: its parent's numbers are not its own.
        number = instance[0] if instance else None
        self.plan = Plan(
            gate, self.subject, handle, parent.handle if parent and number is not None else handle, number
        )
        self.plan.power_limit_w = info.power_limit_w
        # Each has its own: a call that hangs still holds its memory.
        self.buffer = Buffer()
        self.usage = UsageReader()
        # The round in which it was asked while processes were there: what it says then is of the time since.
        self.usage_read = 0
        # Kind -> the versions of the running-process call still to be believed in.
        self.lists = {kind: list(VERSIONS) for kind in FUNCTIONS}
        self.lost_at: float | None = None
        self.hung = False
        self.task = Task(lambda: None)
        self.found: _Found | None = None

    @property
    def answers(self) -> bool:
        """Whether it is worth asking: it is not lost, and no call to it hangs."""
        return self.lost_at is None and not self.task.stuck


@dataclass(frozen=True, slots=True)
class _Found:
    """What one device said in one round."""

    number: int
    reading: GpuReading
    listed: list[tuple[str, Entry]]
    used: dict[int, Use] | None


class NvmlSource:
    """The driver's readings. Raises SourceUnavailable when NVML cannot be initialised.

    The driver is called on a thread of its own: a call that does not return within HANG_S costs that
    device's reading, and no more.
    """

    name = "nvml"
    # A start that hangs is waited for, never begun a second time.
    _hanging_start: Task | None = None

    def __init__(self, host: str, clock: Callable[[], float] = time.time) -> None:
        self._host_name = host
        self._clock = clock
        self._gate = Gate()
        self._watch = Watch("nvml", lambda: self._gate.calling)
        self._open = False
        self._devices: list[_Device] = []
        self._nameless: set[int] = set()
        self._records: dict[tuple[str, int], ProcessReading] = {}
        self._number = 0
        self._failed_starts = 0
        self._start_at = 0.0
        self._unavailable: SourceUnavailable | None = None
        self._recounting = Task(self._recount)
        self._naming = Task(lambda: None)
        try:
            self._start()
        except SourceUnavailable:
            self._watch.close()
            raise

    def _start(self) -> None:
        """Begin a session. Raises SourceUnavailable."""
        hanging = NvmlSource._hanging_start
        if hanging is not None and hanging.stuck:
            raise SourceUnavailable("The NVIDIA driver does not answer: nvmlInit hangs", HANG_REMEDY)
        task = Task(self._initialise)
        if self._watch.run([task], START_HANG_S):
            NvmlSource._hanging_start = task
            raise SourceUnavailable(f"The NVIDIA driver does not answer: {self._gate.calling} hangs", HANG_REMEDY)

    def _initialise(self) -> None:
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            remedy = REMEDIES.get(error.value, "Run nvidia-smi: it must work before gpumon can.")
            raise SourceUnavailable(f"NVML cannot be used: {error}", remedy) from None
        try:
            self.host = HostInfo(
                name=self._host_name,
                driver_version=self._gate.fact("driver", pynvml.nvmlSystemGetDriverVersion),
                cuda_version=_cuda_version(self._gate),
                nvml_version=self._gate.fact("driver", pynvml.nvmlSystemGetNVMLVersion),
            )
            # Handles of an earlier session mean nothing now.
            self._devices = []
            self._devices = list(self._enumerate(self._gate.fact("driver", pynvml.nvmlDeviceGetCount) or 0))
        except (SessionOver, DeviceLost) as error:
            _shut_down()
            raise SourceUnavailable(
                f"NVML stopped answering: {error}", "Run nvidia-smi and look at dmesg."
            ) from None
        self._open = True
        self._counted_at = time.monotonic()

    def close(self) -> None:
        """End the NVML session."""
        if self._open:
            self._open = False
            self._watch.run([Task(self._end)], CLOSE_HANG_S)
        self._watch.close()

    def _end(self) -> None:
        _release(self._devices)
        _shut_down()

    def read(self) -> Snapshot:
        """Ask every device once. Raises SourceUnavailable when the session is over."""
        try:
            self._reopen()
            if time.monotonic() - self._counted_at >= RECOUNT_S:
                self._watch.run([self._recounting], HANG_S)
            timestamp = self._clock()
            self._number += 1
            number = self._number
            for device in self._devices:
                device.task.action = partial(self._read_device, device, number)
            self._watch.run([device.task for device in self._devices], HANG_S)
        except SessionOver as error:
            self.close()
            raise SourceUnavailable(
                f"The NVIDIA driver went away: {error}", "It is tried again until it returns; look at dmesg."
            ) from None
        return self._snapshot(timestamp, number)

    def _reopen(self) -> None:
        """Begin a new session after one that ended, at longer and longer intervals. Raises SourceUnavailable."""
        if self._open:
            return
        if self._unavailable is not None and time.monotonic() < self._start_at:
            raise self._unavailable
        try:
            self._start()
        except SourceUnavailable as error:
            self._failed_starts += 1
            self._start_at = time.monotonic() + min(LONGEST_PAUSE_S, 2.0 ** (self._failed_starts - 1))
            self._unavailable = error
            raise
        self._failed_starts, self._unavailable = 0, None

    def _snapshot(self, timestamp: float, number: int) -> Snapshot:
        readings: list[GpuReading] = []
        processes: dict[tuple[str, int], tuple[str, int | None]] = {}
        used: dict[str, dict[int, Use] | None] = {}
        for device in self._devices:
            if device.task.stuck != device.hung:
                device.hung = device.task.stuck
                if device.hung:
                    log.error(
                        "%s (%s): a call of the driver has not returned for %g s (%s); the others go on",
                        device.subject,
                        device.info.uuid,
                        HANG_S,
                        device.task.stuck_in,
                    )
                else:
                    log.warning("%s (%s): the driver has returned", device.subject, device.info.uuid)
            found = device.found
            if device.hung or found is None or found.number != number:
                continue
            readings.append(found.reading)
            used[device.info.uuid] = found.used
            for kind, entry in found.listed:
                owner = self._owner(device, entry)
                if owner is None:
                    continue
                key = (owner, entry.pid)
                letters, memory = processes.get(key, ("", None))
                if entry.memory is not None:
                    # Several lists name the same allocation (compute and graphics; a MIG parent and
                    # its instance): it counts once.
                    memory = max(memory or 0, entry.memory)
                processes[key] = (letters + kind, memory)
        hung = frozenset(device.info.uuid for device in self._devices if device.hung)
        self._records = {key: self._records[key] for key in processes if key in self._records}
        return Snapshot(
            timestamp=timestamp,
            host=self.host,
            gpus=tuple(device.info for device in self._devices),
            readings=tuple(readings),
            processes=tuple(self._record(*key, *found, used.get(key[0])) for key, found in processes.items()),
            lost=hung | {device.info.uuid for device in self._devices if device.lost_at is not None},
            hung=hung,
            nameless=frozenset(self._nameless),
        )

    def _record(
        self, uuid: str, pid: int, letters: str, memory: int | None, used: dict[int, Use] | None
    ) -> ProcessReading:
        """A process's record; the one of the tick before where nothing is new."""
        sm, bandwidth, encoder, decoder = _use(used, pid)
        mib = None if memory is None else round(memory * MIB)
        known = self._records.get((uuid, pid))
        if (
            known is None
            or known.memory_mib != mib
            or known.sm_utilization != sm
            or known.memory_utilization != bandwidth
            or known.encoder_utilization != encoder
            or known.decoder_utilization != decoder
            or known.kind != _kinds(letters)
        ):
            known = ProcessReading(uuid, pid, _kinds(letters), mib, sm, bandwidth, encoder, decoder)
            self._records[uuid, pid] = known
        return known

    def offers(self) -> Iterator[tuple[GpuInfo, bool, bool, list[str]]]:
        """Each device, whether its utilization is measured between ticks, whether it counts energy, and
        the keys of what it has been found not to offer."""
        for device in self._devices:
            plan = device.plan
            lacking = [metric.key for metric in GPU_METRICS if plan.lacks(metric.key)]
            yield device.info, plan.by_interval, plan.energy_counter, lacking

    @property
    def compares(self) -> bool:
        """Whether some values tell what happened between two readings, so that the first lacks them."""
        return any(device.plan.compares for device in self._devices if device.answers)

    def process_name(self, pid: int) -> str | None:
        """The executable's base name as the driver knows it."""
        if not self._open:
            return None
        names: list[str] = []

        def ask() -> None:
            try:
                names.append(str(pynvml.nvmlSystemGetProcessName(pid)))
            except (pynvml.NVMLError, UnicodeDecodeError):
                # Expected for a process that has ended meanwhile or that may not be read.
                return

        self._naming.action = ask
        if self._watch.run([self._naming], HANG_S) or not names:
            return None
        return names[0].rsplit("/", 1)[-1] or None

    def _read_device(self, device: _Device, number: int) -> None:
        """Ask one device; what it says is left in `device.found`."""
        if device.lost_at is not None and time.monotonic() - device.lost_at < RETRY_S:
            return
        values: Values = {}
        used: dict[int, Use] | None = None
        follows = 0 < device.usage_read == number - 1
        try:
            device.plan.read(values, RARELY_S, 4.0 * (device.info.index % 15))
            listed = [(kind, entry) for kind in FUNCTIONS for entry in self._list(device, kind)]
            # Once more after the last has left: it may have worked until then.
            if listed or follows:
                used = device.usage.read(self._gate, device.subject, device.handle)
                device.usage_read = number if listed else 0
        except DeviceLost as error:
            if device.lost_at is None:
                log.error("%s (%s) is lost: %s", device.subject, device.info.uuid, error)
            device.lost_at = time.monotonic()
            return
        if device.lost_at is not None:
            log.warning("%s (%s) answers again", device.subject, device.info.uuid)
            self._gate.forget(device.subject)
            device.lost_at = None
        sampling: Sampling = "interval" if device.plan.by_interval else "point"
        ended = _ended(listed, used) if follows and used else {}
        reading = GpuReading(device.info.uuid, {**NOTHING, **values}, sampling, ended)
        device.found = _Found(number, reading, listed, used)

    def _list(self, device: _Device, kind: str) -> list[Entry]:
        versions = device.lists[kind]
        while versions:
            suffix, size = versions[0]
            function = FUNCTIONS[kind] + suffix
            try:
                found = self._gate.ask(
                    device.subject, device.buffer.list, function, device.handle, size, name=function
                )
            except Unsupported as reason:
                log.debug("%s: %s: %s", device.subject, function, reason)
                del versions[0]
                continue
            return list(found or ())
        return []

    def _owner(self, device: _Device, entry: Entry) -> str | None:
        """The UUID an entry belongs to: a MIG parent's list names the instances' processes too.

        None where the instance's number is not known, so that only its own list tells whose it is.
        """
        if device.info.mig_index is not None or entry.gpu_instance is None:
            return device.info.uuid
        instances = [other for other in self._devices if other.info.parent_uuid == device.info.uuid]
        for other in instances:
            if other.instance == (entry.gpu_instance, entry.compute_instance):
                return other.info.uuid
        return None if any(None in (other.instance or ()) for other in instances) else device.info.uuid

    def _recount(self) -> None:
        """Notice devices and MIG instances that were added or taken away."""
        self._counted_at = time.monotonic()
        parents = [device for device in self._devices if device.info.parent_uuid is None]
        try:
            count = self._gate.fact("driver", pynvml.nvmlDeviceGetCount)
            split = any(self._is_split_anew(parent) for parent in parents if parent.answers)
        except DeviceLost:
            # Its reading, which comes next, finds that out as well.
            return
        if count is None or (count == len(parents) and not split):
            return
        before = self._devices
        self._devices = list(self._enumerate(count))
        _release(device for device in before if device not in self._devices)
        if {device.info.uuid for device in self._devices} != {device.info.uuid for device in before}:
            log.info("the driver now lists %d GPUs and MIG instances", len(self._devices))

    def _enumerate(self, count: int) -> Iterator[_Device]:
        self._nameless.clear()
        for index in range(count):
            found: list[_Device] = []
            try:
                handle = self._gate.fact(f"GPU {index}", pynvml.nvmlDeviceGetHandleByIndex, index)
                if handle is not None:
                    found.append(_Device(self._gate, handle, self._facts(handle, index)))
                    found.extend(self._instances(found[0]))
            except DeviceLost as error:
                # One that was lost before is still listed as lost.
                found = found or [
                    device for device in self._devices if device.info.index == index and device.lost_at is not None
                ]
                if not found:
                    self._gate.say_once(f"GPU {index}", "identification", str(error))
                    self._nameless.add(index)
            yield from found

    def _mig_handles(self, parent: _Device) -> Iterator[tuple[int, object]]:
        """The slots in use for MIG instances, and what is there."""
        subject, ask = parent.subject, self._gate.fact
        mode = ask(subject, pynvml.nvmlDeviceGetMigMode, parent.handle)
        if not mode or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return
        for mig_index in range(ask(subject, pynvml.nvmlDeviceGetMaxMigDeviceCount, parent.handle) or 0):
            name = "nvmlDeviceGetMigDeviceHandleByIndex"
            handle = ask(subject, _mig_handle, parent.handle, mig_index, name=name)
            if handle is not None:
                yield mig_index, handle

    def _is_split_anew(self, parent: _Device) -> bool:
        """Whether MIG instances were made or destroyed; a slot that is used again has a new UUID."""
        now = {
            mig_index: self._gate.fact(parent.subject, pynvml.nvmlDeviceGetUUID, handle)
            for mig_index, handle in self._mig_handles(parent)
        }
        known = {d.info.mig_index: d.info.uuid for d in self._devices if d.info.parent_uuid == parent.info.uuid}
        return now.keys() != known.keys() or any(now[slot] not in (None, known[slot]) for slot in now)

    def _instances(self, parent: _Device) -> Iterator[_Device]:
        subject, ask = parent.subject, self._gate.fact
        for mig_index, handle in self._mig_handles(parent):
            instance = (
                ask(subject, pynvml.nvmlDeviceGetGpuInstanceId, handle),
                ask(subject, pynvml.nvmlDeviceGetComputeInstanceId, handle),
            )
            info = self._facts(handle, parent.info.index, parent.info, mig_index)
            info = replace(info, gpu_instance=instance[0])
            yield _Device(self._gate, handle, info, parent, instance)

    def _facts(
        self, handle: object, index: int, parent: GpuInfo | None = None, mig_index: int | None = None
    ) -> GpuInfo:
        subject = f"GPU {index}"

        def ask(call: Callable[..., Any]) -> Any:
            return self._gate.fact(subject, call, handle)

        memory = ask(pynvml.nvmlDeviceGetMemoryInfo)
        limit = ask(pynvml.nvmlDeviceGetEnforcedPowerLimit) or ask(pynvml.nvmlDeviceGetPowerManagementLimit)
        bus_id = parent.pci_bus_id if parent else ask(_pci_bus_id)
        capability = ask(pynvml.nvmlDeviceGetCudaComputeCapability)
        capability = f"{capability[0]}.{capability[1]}" if capability else None
        architecture = ARCHITECTURES.get(ask(pynvml.nvmlDeviceGetArchitecture))
        slot = "" if mig_index is None else f"-MIG-{mig_index}"
        return GpuInfo(
            index=index,
            # A board whose UUID cannot be read still has a place on the bus that tells it apart.
            uuid=ask(pynvml.nvmlDeviceGetUUID) or f"PCI-{bus_id or index}{slot}",
            name=ask(pynvml.nvmlDeviceGetName),
            memory_total_mib=None
            if memory is None or memory.total in NOT_AVAILABLE
            else round(memory.total * MIB),
            power_limit_w=None if limit is None else limit / 1000,
            pci_bus_id=bus_id,
            architecture=architecture or (parent.architecture if parent else None),
            compute_capability=capability or (parent.compute_capability if parent else None),
            parent_uuid=parent.uuid if parent else None,
            mig_index=mig_index,
        )


def _pci_bus_id(handle: object) -> Any:
    # pynvml decodes the text when the attribute is read: here, so that the gate sees it fail.
    return pynvml.nvmlDeviceGetPciInfo(handle).busId


def _mig_handle(parent: object, mig_index: int) -> Any:
    try:
        return pynvml.nvmlDeviceGetMigDeviceHandleByIndex(parent, mig_index)
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_ERROR_NOT_FOUND:
            return None  # an empty slot
        raise


def _release(devices: Iterable[_Device]) -> None:
    for device in devices:
        if not device.task.stuck:
            try:
                device.plan.close()
            except (DeviceLost, SessionOver):
                # What was lent is gone with the device.
                continue


def _shut_down() -> None:
    try:
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        log.debug("nvmlShutdown: %s", error)


def _ended(listed: Iterable[tuple[str, Entry]], used: Mapping[int, Use]) -> dict[int, int]:
    """SM utilization, by PID, of processes that are no longer listed."""
    there = {entry.pid for _, entry in listed}
    return {pid: use[0] for pid, use in used.items() if use[0] and pid not in there}


def _use(used: dict[int, Use] | None, pid: int) -> Use:
    """A process's utilization; one that runs and is not listed used nothing."""
    return UNKNOWN if used is None else used.get(pid, IDLE)


@lru_cache(maxsize=64)
def _kinds(letters: str) -> str:
    """The kinds of a process in nvidia-smi's order and spelling: "C", "C+G", "M+C"."""
    return "+".join(kind for kind in "MCG" if kind in letters)


def _cuda_version(gate: Gate) -> str | None:
    """The newest CUDA version that the driver supports, such as "13.0"."""
    version = gate.fact("driver", pynvml.nvmlSystemGetCudaDriverVersion_v2) or gate.fact(
        "driver", pynvml.nvmlSystemGetCudaDriverVersion
    )
    return f"{version // 1000}.{version % 1000 // 10}" if version else None
