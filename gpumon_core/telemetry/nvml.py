"""Snapshots from NVIDIA's driver, through pynvml.

Static facts are asked once, a call that a device does not support is asked once, and a device
that is lost costs its own readings only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import pynvml

from gpumon_core.metrics import GPU_METRICS, MIB, Metric, NvmlCall
from gpumon_core.telemetry.gate import NOT_AVAILABLE, DeviceLost, Gate, SessionOver, Unsupported
from gpumon_core.telemetry.records import (
    GpuInfo,
    GpuReading,
    HostInfo,
    ProcessReading,
    Snapshot,
    SourceUnavailable,
)
from gpumon_core.telemetry.running import FUNCTIONS, VERSIONS, Buffer, Entry

log = logging.getLogger(__name__)

# How long a lost device is left alone, and how often the number of devices is looked at.
RETRY_S = 30.0
RECOUNT_S = 60.0

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


class _Probe:
    """One NVML call on one device and the metrics taken from its result.

    Remembers what the device does not support, moving on to the next way of asking.
    """

    def __init__(self, ways: tuple[tuple[NvmlCall, ...], ...], metrics: tuple[Metric, ...]) -> None:
        # ways[i] holds, for every metric, the i-th way of asking; they share function and arguments.
        self._ways = list(ways)
        self.metrics = metrics
        self._prepare()

    def _prepare(self) -> None:
        if not self._ways:
            return
        first = self._ways[0][0]
        self._function: Callable[..., Any] = getattr(pynvml, first.function, _absent)
        self._arguments = [getattr(pynvml, a) if isinstance(a, str) else a for a in first.arguments]
        self._targets = [
            (metric.key, call.field, call.scale, metric.column == "integer")
            for metric, call in zip(self.metrics, self._ways[0], strict=True)
        ]

    @property
    def supported(self) -> bool:
        return bool(self._ways)

    def read(self, gate: Gate, subject: str, handle: object, values: dict[str, float | None]) -> None:
        """Put the metrics of this probe into `values`. Raises DeviceLost or SessionOver."""
        while self._ways:
            try:
                result = gate.ask(subject, self._function, handle, *self._arguments)
            except Unsupported as reason:
                log.debug("%s: %s: %s", subject, self._ways[0][0].function, reason)
                del self._ways[0]
                self._prepare()
                continue
            if result is not None:
                for key, field, scale, whole in self._targets:
                    number = result if field is None else getattr(result, field)
                    if number not in NOT_AVAILABLE:
                        values[key] = round(number * scale) if whole else round(number * scale, 3)
            return


def _absent(*_: object) -> None:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)


def _probes() -> list[_Probe]:
    """The catalogue as NVML calls, each function asked once for all metrics that it yields."""
    shared: dict[tuple[object, ...], list[Metric]] = {}
    for metric in GPU_METRICS:
        if metric.nvml:
            key = tuple((call.function, call.arguments) for call in metric.nvml)
            shared.setdefault(key, []).append(metric)
    return [
        _Probe(tuple(zip(*(metric.nvml for metric in metrics), strict=True)), tuple(metrics))
        for metrics in shared.values()
    ]


class _Device:
    """One GPU or MIG instance: its handle, its facts, and what it has been found to support."""

    def __init__(
        self, handle: object, info: GpuInfo, instance: tuple[int | None, int | None] | None = None
    ) -> None:
        self.handle = handle
        self.info = info
        self.instance = instance
        self.subject = f"GPU {info.index}" + ("" if info.mig_index is None else f" MIG {info.mig_index}")
        self.probes = _probes()
        # Kind -> the versions of the running-process call still to be believed in.
        self.lists = {kind: list(VERSIONS) for kind in FUNCTIONS}
        self.lost_at: float | None = None


class NvmlSource:
    """The driver's readings. Raises SourceUnavailable when NVML cannot be initialised."""

    name = "nvml"

    def __init__(self, host: str, clock: Callable[[], float] = time.time) -> None:
        self._host_name = host
        self._clock = clock
        self._gate = Gate()
        self._buffer = Buffer()
        self._open = False
        self._devices: list[_Device] = []
        self._nameless: set[int] = set()
        self._start()

    def _start(self) -> None:
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            remedy = REMEDIES.get(error.value, "Run nvidia-smi: it must work before gpumon can.")
            raise SourceUnavailable(f"NVML cannot be used: {error}", remedy) from None
        self._open = True
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
            self.close()
            raise SourceUnavailable(
                f"NVML stopped answering: {error}", "Run nvidia-smi and look at dmesg."
            ) from None
        self._counted_at = time.monotonic()

    def close(self) -> None:
        """End the NVML session."""
        if self._open:
            self._open = False
            try:
                pynvml.nvmlShutdown()
            except pynvml.NVMLError as error:
                log.debug("nvmlShutdown: %s", error)

    def read(self) -> Snapshot:
        """Ask every device once. Raises SourceUnavailable when the session is over."""
        try:
            if not self._open:
                self._start()
            self._recount()
            timestamp = self._clock()
            readings: list[GpuReading] = []
            processes: dict[tuple[str, int], tuple[str, int | None]] = {}
            for device in self._devices:
                self._read_device(device, readings, processes)
        except SessionOver as error:
            self.close()
            raise SourceUnavailable(
                f"The NVIDIA driver went away: {error}", "It is tried again until it returns; look at dmesg."
            ) from None
        return Snapshot(
            timestamp=timestamp,
            host=self.host,
            gpus=tuple(device.info for device in self._devices),
            readings=tuple(readings),
            processes=tuple(
                ProcessReading(uuid, pid, _kinds(letters), None if memory is None else round(memory * MIB))
                for (uuid, pid), (letters, memory) in processes.items()
            ),
            lost=frozenset(device.info.uuid for device in self._devices if device.lost_at is not None),
            nameless=frozenset(self._nameless),
        )

    def process_name(self, pid: int) -> str | None:
        """The executable's base name as the driver knows it."""
        if not self._open:
            return None
        try:
            path = pynvml.nvmlSystemGetProcessName(pid)
        except (pynvml.NVMLError, UnicodeDecodeError):
            # Expected for a process that has ended meanwhile or that may not be read.
            return None
        return str(path).rsplit("/", 1)[-1] or None

    def _read_device(
        self,
        device: _Device,
        readings: list[GpuReading],
        processes: dict[tuple[str, int], tuple[str, int | None]],
    ) -> None:
        if device.lost_at is not None and time.monotonic() - device.lost_at < RETRY_S:
            return
        values: dict[str, float | None] = {}
        try:
            for probe in device.probes:
                probe.read(self._gate, device.subject, device.handle, values)
            listed = [(kind, entry) for kind in FUNCTIONS for entry in self._list(device, kind)]
        except DeviceLost as error:
            if device.lost_at is None:
                log.error("%s (%s) is lost: %s", device.subject, device.info.uuid, error)
            device.lost_at = time.monotonic()
            return
        if device.lost_at is not None:
            log.warning("%s (%s) answers again", device.subject, device.info.uuid)
            self._gate.forget(device.subject)
            device.lost_at = None
        readings.append(
            GpuReading(device.info.uuid, {metric.key: values.get(metric.key) for metric in GPU_METRICS})
        )
        for kind, entry in listed:
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

    def _list(self, device: _Device, kind: str) -> list[Entry]:
        versions = device.lists[kind]
        while versions:
            suffix, size = versions[0]
            function = FUNCTIONS[kind] + suffix
            try:
                found = self._gate.ask(
                    device.subject, self._buffer.list, function, device.handle, size, name=function
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
        if time.monotonic() - self._counted_at < RECOUNT_S:
            return
        self._counted_at = time.monotonic()
        parents = [device for device in self._devices if device.info.parent_uuid is None]
        try:
            count = self._gate.fact("driver", pynvml.nvmlDeviceGetCount)
            split = any(self._is_split_anew(parent) for parent in parents if parent.lost_at is None)
        except DeviceLost:
            # Its reading, which comes next, finds that out as well.
            return
        if count is None or (count == len(parents) and not split):
            return
        known = {device.info.uuid for device in self._devices}
        self._devices = list(self._enumerate(count))
        if {device.info.uuid for device in self._devices} != known:
            log.info("the driver now lists %d GPUs and MIG instances", len(self._devices))

    def _enumerate(self, count: int) -> Iterator[_Device]:
        self._nameless.clear()
        for index in range(count):
            found: list[_Device] = []
            try:
                handle = self._gate.fact(f"GPU {index}", pynvml.nvmlDeviceGetHandleByIndex, index)
                if handle is not None:
                    found.append(_Device(handle, self._facts(handle, index)))
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
            yield _Device(handle, self._facts(handle, parent.info.index, parent.info, mig_index), instance)

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


def _kinds(letters: str) -> str:
    """The kinds of a process in nvidia-smi's order and spelling: "C", "C+G", "M+C"."""
    return "+".join(kind for kind in "MCG" if kind in letters)


def _cuda_version(gate: Gate) -> str | None:
    """The newest CUDA version that the driver supports, such as "13.0"."""
    version = gate.fact("driver", pynvml.nvmlSystemGetCudaDriverVersion_v2) or gate.fact(
        "driver", pynvml.nvmlSystemGetCudaDriverVersion
    )
    return f"{version // 1000}.{version % 1000 // 10}" if version else None
