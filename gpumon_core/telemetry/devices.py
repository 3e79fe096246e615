"""Which GPUs and MIG instances there are, and what is known of each.

A device that is as it was stays the object that it is, with all that is measured between two readings.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pynvml

from gpumon_core.telemetry import facts, unified
from gpumon_core.telemetry.gate import DeviceLost, Gate
from gpumon_core.telemetry.limits import MOST_GPUS, MOST_MIG_SLOTS
from gpumon_core.telemetry.plan import Plan
from gpumon_core.telemetry.records import GpuInfo, GpuReading
from gpumon_core.telemetry.running import FUNCTIONS, VERSIONS, Entry, EntryBuffer
from gpumon_core.telemetry.sleep import Rest
from gpumon_core.telemetry.usage import SampledUse, UsageReader
from gpumon_core.telemetry.watch import Task

# How often facts that may change are asked, and what a device was found not to offer.
FACTS_S = 60.0
AGAIN_S = 3600.0


class Device:
    """One GPU or MIG instance: its handle, its facts, and what it has been found to support."""

    def __init__(
        self,
        gate: Gate,
        handle: object,
        info: GpuInfo,
        parent: Device | None = None,
        instance: tuple[int | None, int | None] | None = None,
    ) -> None:
        self.handle = handle
        self.info = info
        self.instance = instance
        # The UUID in the driver's words; None where it has none, or failed to say.
        self.own_uuid: str | None = info.uuid
        self.subject = subject_of(info)
        # An instance without a known number is asked itself: its parent's numbers are not its own.
        number = instance[0] if instance else None
        self.plan = Plan(
            gate, self.subject, handle, parent.handle if parent and number is not None else handle, number
        )
        self.plan.power_limit_w = info.power_limit_w
        # Each has its own: a call that hangs still holds its memory.
        self.buffer = EntryBuffer()
        self.usage = UsageReader()
        # The round in which it was asked while processes were there: what it says then is of the time since.
        self.usage_read = 0
        # Kind -> the versions of the running-process call still to be believed in.
        self.lists = {kind: list(VERSIONS) for kind in FUNCTIONS}
        self.lost_at: float | None = None
        # Whether and why it is left alone: see sleep.py. One that is has no handle of this session.
        self.rest: Rest = ""
        # How long it is left alone, and how many readings in a row it has said nothing at all.
        self.pause_s = 0.0
        self.remedy = ""
        self.silent = 0
        self.has_answered = False
        now = time.monotonic()
        # The devices of a machine do so in ticks of their own.
        self.facts_at = now + FACTS_S * (1 + info.index % 15 / 15)
        self.again_at = now + AGAIN_S
        self.hung = False
        self.task = Task(lambda: None)
        self.found: DeviceRound | None = None

    @property
    def answers(self) -> bool:
        """Whether it is worth asking: it is not lost, no call to it hangs, and it is not left alone."""
        return self.lost_at is None and not self.task.stuck and not self.rest

    @property
    def is_idle(self) -> bool:
        """Whether nothing was done on it and nothing held it, by its newest reading."""
        values = {} if self.found is None else self.found.reading.values
        done = [values.get(key) for key in ("utilization", "encoder_utilization", "decoder_utilization")]
        return self.found is not None and done[0] is not None and not any(done)

    def move(self, index: int) -> None:
        """Have another index from now on, after a device before it was removed."""
        if index != self.info.index:
            self.info = replace(self.info, index=index)
            self.subject = subject_of(self.info)
            self.plan.rename(self.subject)

    def try_again(self) -> None:
        """Ask anew what it was found not to offer."""
        self.again_at = time.monotonic() + AGAIN_S
        self.plan.try_again()
        self.usage.try_again()
        self.lists = {kind: list(VERSIONS) for kind in FUNCTIONS}


@dataclass(frozen=True, slots=True)
class DeviceRound:
    """What one device said in one round."""

    number: int
    reading: GpuReading
    listed: list[tuple[str, Entry]]
    used: dict[int, SampledUse] | None


class Devices:
    """The devices that the driver lists."""

    def __init__(self, gate: Gate, system: unified.System) -> None:
        self._gate = gate
        self._system = system
        self.all: list[Device] = []
        # How many GPUs the driver listed when they were looked at last.
        self.count = 0
        # The indices of those that cannot say which they are.
        self.nameless: set[int] = set()

    def enumerate(self, count: int) -> list[Device]:
        """The GPUs, each with its MIG instances. One that is as it was stays the object that it is, with all that
        is measured between two readings."""
        self.count = count
        nameless: set[int] = set()
        found: list[Device] = []
        for index in range(min(count, MOST_GPUS)):
            try:
                here = self._at(index, found)
            except DeviceLost as error:
                # One that was known before is still listed; its reading says that it is lost.
                here = [one for one in self.all if one.info.index == index and one not in found]
                if not here and count > MOST_GPUS:
                    # A count that cannot be: there are as many as are found.
                    break
                if not here:
                    self._gate.say_once(f"GPU {index}", "identification", str(error))
                    nameless.add(index)
            found.extend(here)
        self.nameless = nameless
        return found

    def _at(self, index: int, found: list[Device]) -> list[Device]:
        """The GPU at an index and its instances; none where there is none for this user. Raises DeviceLost."""
        subject = f"GPU {index}"
        known = [one for one in self.all if one.info.index == index and one not in found]
        if any(one.task.stuck or one.rest for one in known):
            return known
        failed = self._gate.failed
        handle = self._gate.fact(subject, pynvml.nvmlDeviceGetHandleByIndex, index)
        if handle is None:
            if self._gate.failed > failed and self._gate.error == pynvml.NVML_ERROR_NO_PERMISSION and not known:
                # NVML counts the GPUs of others as well, such as those that a cgroup hides from this program.
                return []
            raise DeviceLost(f"it cannot be opened{why(self._gate)}")
        opened = self._gate.answered
        uuid = self._gate.text(subject, pynvml.nvmlDeviceGetUUID, handle)
        for one in self.all:
            is_same = (
                one.info.parent_uuid is None and one not in found and _address(one.handle) == _address(handle)
            )
            if is_same and uuid in (None, one.own_uuid):
                for moved in (one, *self._instances_of(one)):
                    moved.move(index)
                return self._with_instances(one, found)
        info = facts.read(self._gate, self._system, handle, index)
        if uuid is None and self._gate.failed > failed and self._gate.answered == opened:
            raise DeviceLost(f"every call to it fails{why(self._gate)}")
        device = Device(self._gate, handle, self._distinct(info, found))
        device.own_uuid = uuid
        return self._with_instances(device, found)

    def _with_instances(self, device: Device, found: list[Device]) -> list[Device]:
        try:
            if device.lost_at is None:
                return [device, *self._instances(device, found)]
        except DeviceLost:
            # Its reading, which comes next, finds that out as well.
            pass
        return [device, *self._instances_of(device)]

    def _distinct(self, info: GpuInfo, found: list[Device]) -> GpuInfo:
        """The facts with a UUID that no other device has: boards with a copied firmware share one."""
        taken = {one.info.uuid for one in found}
        if info.uuid not in taken:
            return info
        subject = f"GPU {info.index}"
        self._gate.say_once(
            subject,
            "nvmlDeviceGetUUID",
            f"{info.uuid}: another device reports the same UUID; gpumon names this one by its place",
        )
        uuid = facts.place_of(info.pci_bus_id or str(info.index), info.mig_index)
        return replace(info, uuid=uuid if uuid not in taken else facts.place_of(f"{info.index}", info.mig_index))

    def _instances_of(self, parent: Device) -> list[Device]:
        return [one for one in self.all if one.info.parent_uuid == parent.info.uuid]

    def _mig_handles(self, parent: Device) -> Iterator[tuple[int, object]]:
        """The slots in use for MIG instances, and what is there."""
        subject, ask = parent.subject, self._gate.fact
        mode = ask(subject, pynvml.nvmlDeviceGetMigMode, parent.handle)
        if not mode or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return
        slots = ask(subject, pynvml.nvmlDeviceGetMaxMigDeviceCount, parent.handle) or 0
        for mig_index in range(min(slots, MOST_MIG_SLOTS)):
            name = "nvmlDeviceGetMigDeviceHandleByIndex"
            handle = ask(subject, _mig_handle, parent.handle, mig_index, name=name)
            if handle is not None:
                yield mig_index, handle

    def is_split_anew(self, parent: Device) -> bool:
        """Whether MIG instances were made or destroyed; a slot that is used again has a new UUID."""
        now = {
            mig_index: self._gate.text(parent.subject, pynvml.nvmlDeviceGetUUID, handle)
            for mig_index, handle in self._mig_handles(parent)
        }
        known = {one.info.mig_index: one.own_uuid for one in self._instances_of(parent)}
        return now.keys() != known.keys() or any(now[slot] not in (None, known[slot]) for slot in now)

    def _instances(self, parent: Device, found: list[Device]) -> list[Device]:
        subject, ask = parent.subject, self._gate.fact
        known = self._instances_of(parent)
        here: list[Device] = []
        for mig_index, handle in self._mig_handles(parent):
            uuid = self._gate.text(subject, pynvml.nvmlDeviceGetUUID, handle)
            same = (one for one in known if one.info.mig_index == mig_index and uuid in (None, one.own_uuid))
            one = next(same, None)
            if one is not None and _address(one.handle) == _address(handle):
                here.append(one)
                continue
            instance = (
                ask(subject, pynvml.nvmlDeviceGetGpuInstanceId, handle),
                ask(subject, pynvml.nvmlDeviceGetComputeInstanceId, handle),
            )
            info = facts.read(self._gate, self._system, handle, parent.info.index, parent.info, mig_index)
            info = self._distinct(replace(info, gpu_instance=instance[0]), [*found, parent, *here])
            made = Device(self._gate, handle, info, parent, instance)
            made.own_uuid = uuid
            here.append(made)
        return here


def why(gate: Gate) -> str:
    """The newest error of the driver, in brackets, for the end of a sentence."""
    return "" if gate.error is None else f" ({pynvml.NVMLError(gate.error)})"


def subject_of(info: GpuInfo) -> str:
    """What a device is called in the log."""
    return f"GPU {info.index}" + ("" if info.mig_index is None else f" MIG {info.mig_index}")


def _address(handle: Any) -> int | None:
    """Where a handle points: it is another object with every answer."""
    return ctypes.cast(handle, ctypes.c_void_p).value


def _mig_handle(parent: object, mig_index: int) -> Any:
    try:
        return pynvml.nvmlDeviceGetMigDeviceHandleByIndex(parent, mig_index)
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_ERROR_NOT_FOUND:
            return None  # an empty slot
        raise
