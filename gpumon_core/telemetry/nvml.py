"""Snapshots from NVIDIA's driver, through pynvml.

Facts are asked once a minute, a call that a device does not support once an hour, and a device
that does not answer costs its own readings only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from math import inf

import pynvml

from gpumon_core.metrics import GPU_METRICS, MIB, RARELY_S, TICK_COLUMNS
from gpumon_core.safety import text
from gpumon_core.telemetry import devices, facts, remedies, unified
from gpumon_core.telemetry.devices import Device, DeviceRound, Devices, why
from gpumon_core.telemetry.gate import DeviceLost, Gate, SessionOver, Unsupported
from gpumon_core.telemetry.limits import (
    MOST_GPUS,
    MOST_MEMORY_MIB,
    is_pid,
)
from gpumon_core.telemetry.plan import DeviceValues
from gpumon_core.telemetry.records import (
    GpuInfo,
    GpuReading,
    HostInfo,
    ProcessReading,
    Snapshot,
    SourceUnavailable,
    elapsed_beside,
)
from gpumon_core.telemetry.running import FUNCTIONS, Entry
from gpumon_core.telemetry.sleep import Sleep
from gpumon_core.telemetry.usage import IDLE, SampledUse
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
NOTHING: DeviceValues = dict.fromkeys(TICK_COLUMNS)
UNKNOWN: SampledUse = (None, None, None, None)
RANGES = {key: metric.range for metric in GPU_METRICS for key in (metric.key, metric.peak) if key}

REMEDIES = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "Install the NVIDIA driver, or give the container access to the GPU "
    "(docker run --gpus all).",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "Load the NVIDIA kernel module (modprobe nvidia), and look at dmesg "
    "if that fails.",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "The driver was updated while loaded: reboot, or reload the "
    "NVIDIA kernel modules.",
    pynvml.NVML_ERROR_NO_PERMISSION: "Let this user read and write /dev/nvidiactl and /dev/nvidia0.",
}


class NvmlSource:
    """The driver's readings. Raises SourceUnavailable when NVML cannot be initialised.

    The driver is called on a thread of its own: a call that does not return within HANG_S costs that
    device's reading, and no more.
    """

    name = "nvml"
    # A start that hangs is waited for, never begun a second time.
    _hanging_start: Task | None = None

    def __init__(
        self,
        host: str,
        clock: Callable[[], float] = time.time,
        sleep: Sleep | None = None,
        system: unified.System = unified.System(),  # noqa: B008 - it cannot change
    ) -> None:
        """`sleep` says which GPUs are not to be asked, by default none. To begin a session wakes those that are
        off, once."""
        self._sleep = sleep or Sleep("false")
        self._system = system
        self._host_name = host
        self._clock = clock
        self._elapsed: float | None = None
        self._gate = Gate()
        self._watch = Watch("nvml", lambda: self._gate.calling)
        self._open = False
        self._devices = Devices(self._gate, system)
        self._read_at: float | None = None
        self._interval_s = 0.0
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
            raise SourceUnavailable("The NVIDIA driver does not answer: nvmlInit hangs", remedies.HANGS)
        task = Task(self._initialise)
        if self._watch.run([task], START_HANG_S):
            NvmlSource._hanging_start = task
            raise SourceUnavailable(
                f"The NVIDIA driver does not answer: {self._gate.calling} hangs", remedies.HANGS
            )

    def _initialise(self) -> None:
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            remedy = REMEDIES.get(error.value, "Run nvidia-smi: it must work before gpumon can.")
            if error.value == pynvml.NVML_ERROR_UNKNOWN and remedies.is_container():
                remedy = remedies.CONTAINER
            raise SourceUnavailable(f"NVML cannot be used: {error}", remedy) from None
        try:
            self.host = HostInfo(self._host_name)
            self._learn_host()
            # Handles of an earlier session mean nothing now; who is left alone is not asked for a new one.
            self._devices.all = [device for device in self._devices.all if device.rest]
            self._devices.all = self._devices.enumerate(self._gate.fact("driver", pynvml.nvmlDeviceGetCount) or 0)
        except (SessionOver, DeviceLost) as error:
            _shut_down()
            raise SourceUnavailable(
                f"NVML stopped answering: {error}", "Run nvidia-smi and look at dmesg."
            ) from None
        self._open = True
        self._read_at = None
        self._counted_at = time.monotonic()

    def _learn_host(self) -> None:
        self._host_at = time.monotonic()
        self.host = facts.read_host(self._gate, self.host)

    def close(self) -> None:
        """End the NVML session."""
        if self._open:
            self._open = False
            self._watch.run([Task(self._end)], CLOSE_HANG_S)
        self._watch.close()

    def _end(self) -> None:
        _release(self._devices.all)
        _shut_down()

    def read(self) -> Snapshot:
        """Ask every device once. Raises SourceUnavailable when the session is over."""
        try:
            if self._all_rest():
                self._number += 1
                self._elapsed = elapsed_beside(self._clock)
                return self._snapshot(self._clock(), self._number)
            self._reopen()
            if any(device.handle is None and not device.rest for device in self._devices.all):
                self._watch.run([Task(self._take_up)], START_HANG_S)
            if time.monotonic() - self._counted_at >= RECOUNT_S:
                self._watch.run([self._recounting], HANG_S)
            timestamp, self._elapsed = self._clock(), elapsed_beside(self._clock)
            self._number += 1
            number = self._number
            now, before = time.monotonic(), self._read_at
            self._read_at, self._interval_s = now, 0.0 if before is None else now - before
            for device in self._devices.all:
                device.task.action = partial(self._read_device, device, number)
            self._watch.run([device.task for device in self._devices.all if not device.rest], HANG_S)
        except SessionOver as error:
            self.close()
            raise SourceUnavailable(
                f"The NVIDIA driver went away: {error}", "It is tried again until it returns; look at dmesg."
            ) from None
        return self._snapshot(timestamp, number)

    def _all_rest(self) -> bool:
        """Look which GPUs are to be left alone, and let go of them; whether that is all there are."""
        for device in self._devices.all:
            bus_id, here = device.info.pci_bus_id, device.found
            if here is not None and here.number == self._number and device.info.parent_uuid is None:
                # A desktop has the GPU open all the time; a fine-grained driver lets it sleep all the same.
                holders = {kind for kind, _ in here.listed}
                free = not holders or (holders == {"G"} and self._sleep.is_fine_grained(bus_id))
                self._sleep.saw(bus_id, device.is_idle and free)
            trouble = device.lost_at is not None or device.task.stuck
            rest = "" if trouble else self._sleep.look(bus_id)
            if rest and not device.rest:
                log.info("%s (%s) is left alone: %s", device.subject, device.info.uuid, rest)
            device.rest = rest
        if self._open and any(device.rest and device.handle is not None for device in self._devices.all):
            # A session that has a GPU open keeps it awake: the others get a new one.
            self._open = False
            self._watch.run([Task(self._end)], CLOSE_HANG_S)
            for device in self._devices.all:
                device.handle = None
        return bool(self._devices.all) and all(device.rest for device in self._devices.all)

    def _take_up(self) -> None:
        """Give those that woke up a handle of this session."""
        before = self._devices.all
        self._devices.all = self._devices.enumerate(self._devices.count)
        _release(device for device in before if device not in self._devices.all and device.handle is not None)

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
        used: dict[str, dict[int, SampledUse] | None] = {}
        for device in self._devices.all:
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
                if entry.memory is not None and entry.memory * MIB <= (
                    device.info.memory_total_mib or MOST_MEMORY_MIB
                ):
                    # Several lists name the same allocation (compute and graphics; a MIG parent and
                    # its instance): it counts once.
                    memory = max(memory or 0, entry.memory)
                processes[key] = (letters + kind, memory)
        hung = frozenset(device.info.uuid for device in self._devices.all if device.hung)
        self._records = {key: self._records[key] for key in processes if key in self._records}
        return Snapshot(
            timestamp=timestamp,
            elapsed=self._elapsed,
            host=self.host,
            gpus=tuple(device.info for device in self._devices.all),
            readings=tuple(readings),
            processes=tuple(self._record(*key, *found, used.get(key[0])) for key, found in processes.items()),
            lost=hung | {device.info.uuid for device in self._devices.all if device.lost_at is not None},
            hung=hung,
            nameless=frozenset(self._devices.nameless),
            asleep=frozenset(device.info.uuid for device in self._devices.all if device.rest == "asleep"),
            quiet=frozenset(device.info.uuid for device in self._devices.all if device.rest == "quiet"),
        )

    def _record(
        self, uuid: str, pid: int, letters: str, memory: int | None, used: dict[int, SampledUse] | None
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
        for device in self._devices.all:
            plan = device.plan
            lacking = [metric.key for metric in GPU_METRICS if plan.lacks(metric.key)]
            yield device.info, plan.by_interval, plan.energy_counter, lacking

    def remedy(self, uuid: str) -> str:
        """What to do about a GPU that does not answer."""
        return next((one.remedy for one in self._devices.all if one.info.uuid == uuid), "") or remedies.of_lost()

    @property
    def compares(self) -> bool:
        """Whether some values say what happened between two readings, so that the first lacks them."""
        return any(device.plan.compares for device in self._devices.all if device.answers)

    def process_name(self, pid: int) -> str | None:
        """The executable's base name as the driver knows it."""
        if not self._open or not is_pid(pid):
            return None
        names: list[str] = []

        def ask() -> None:
            try:
                names.append(str(pynvml.nvmlSystemGetProcessName(pid)))
            except (pynvml.NVMLError, ValueError):
                # Expected for a process that has ended meanwhile or that may not be read.
                return

        self._naming.action = ask
        if self._watch.run([self._naming], HANG_S) or not names:
            return None
        return text.field("name", names[0].rsplit("/", 1)[-1])

    def _read_device(self, device: Device, number: int) -> None:
        """Ask one device; what it says is left in `device.found`."""
        now = time.monotonic()
        if device.lost_at is not None and now - device.lost_at < min(device.pause_s, RETRY_S):
            return
        if now >= device.again_at:
            device.try_again()
        values: DeviceValues = {}
        used: dict[int, SampledUse] | None = None
        follows = 0 < device.usage_read == number - 1
        failed, self._gate.error = self._gate.failed, None
        offset_s = 4.0 * (device.info.index % 15)
        try:
            device.plan.read(values, RARELY_S, offset_s, self._interval_s, len(self._devices.all))
            answered = self._gate.answered
            lists = {kind: self._list(device, kind) for kind in FUNCTIONS}
            listed = [(kind, entry) for kind, entries in lists.items() for entry in entries or ()]
            says_something = device.plan.has_answered or self._gate.answered > answered
            # Once more after the last has left: it may have worked until then.
            if says_something and (listed or follows):
                used = device.usage.read(self._gate, device.subject, device.handle)
                device.usage_read = number if listed else 0
            if says_something and now >= device.facts_at:
                self._learn_facts(device)
        except DeviceLost as error:
            self._lose(device, str(error), RETRY_S)
            return
        except SessionOver:
            raise
        except Exception as error:
            # Nobody thought of this answer: it costs this GPU, and not the tick of the others.
            log.debug("%s", device.subject, exc_info=True)
            self._lose(device, f"its answers make no sense ({error!r})", RETRY_S)
            return
        if not says_something and (device.has_answered or self._gate.failed > failed):
            # It may be for a moment: it is asked again with the next tick, then at longer and longer intervals.
            device.try_again()
            device.silent += 1
            if device.silent == 1:
                # It may have been taken away: the devices are counted before the next reading.
                self._counted_at = -inf
            if device.silent > 1 or device.info.parent_uuid is None:
                # For a MIG instance that is the usual reason, and nothing to report.
                pause_s = 2.0 ** min(device.silent - 1, 10) - 1
                self._lose(device, f"every call to it fails{why(self._gate)}", pause_s, self._gate.error)
            return
        device.silent, device.has_answered = 0, device.has_answered or says_something
        if device.lost_at is not None:
            log.warning("%s (%s) answers again", device.subject, device.info.uuid)
            self._gate.forget(device.subject)
            device.lost_at = None
        _judge(device.info, values)
        listed = self._complete(device.info, values, listed, lists["C"] is not None)
        ended = _ended(listed, used) if follows and used else {}
        reading = GpuReading(device.info.uuid, {**NOTHING, **values}, device.plan.sampling, ended)
        device.found = DeviceRound(number, reading, listed, used)

    def _complete(
        self, info: GpuInfo, values: DeviceValues, listed: list[tuple[str, Entry]], knows_who: bool
    ) -> list[tuple[str, Entry]]:
        """Put into `values` what else is known of a GPU that shares the machine's memory. Its processes."""
        if info.memory_from == "unified":
            listed = [(kind, entry) for kind, entry in listed if unified.is_pid(entry.pid, self._system)]
            held = [(entry.pid, entry.memory) for _, entry in listed] if knows_who else None
            unified.complete(values, info.name, held, self._system)
        elif info.memory_from is None and not values.get("memory"):
            # Nothing of nothing: no word of how much is used.
            values["memory"] = None
        return listed

    def _lose(self, device: Device, why: str, pause_s: float, code: int | None = None) -> None:
        """Note that a device does not answer, and leave it alone for a while."""
        device.remedy = remedies.of_lost(code)
        if device.lost_at is None:
            log.error("%s (%s) is lost: %s. %s", device.subject, device.info.uuid, why, device.remedy)
        device.lost_at = time.monotonic()
        device.pause_s = pause_s
        device.plan.pause()

    def _learn_facts(self, device: Device) -> None:
        """Ask again what may have changed; what it fails to say stays as it was."""
        device.facts_at = time.monotonic() + devices.FACTS_S
        info = device.info
        parent = next((one.info for one in self._devices.all if one.info.uuid == info.parent_uuid), None)
        now = facts.read(self._gate, self._system, device.handle, info.index, parent, info.mig_index)
        device.info = facts.update(info, now)
        device.plan.power_limit_w = device.info.power_limit_w

    def _list(self, device: Device, kind: str) -> list[Entry] | None:
        """The processes of a kind; None where the driver does not list them, or failed to this time."""
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
            return None if found is None else list(found)
        return None

    def _owner(self, device: Device, entry: Entry) -> str | None:
        """The UUID an entry belongs to: a MIG parent's list names the instances' processes too.

        None where the instance's number is not known, so that only the instance's own list has it.
        """
        if device.info.mig_index is not None or entry.gpu_instance is None:
            return device.info.uuid
        instances = [other for other in self._devices.all if other.info.parent_uuid == device.info.uuid]
        for other in instances:
            if other.instance == (entry.gpu_instance, entry.compute_instance):
                return other.info.uuid
        return None if any(None in (other.instance or ()) for other in instances) else device.info.uuid

    def _recount(self) -> None:
        """Notice devices and MIG instances that were added or taken away, and what could not be identified."""
        now = self._counted_at = time.monotonic()
        parents = [device for device in self._devices.all if device.info.parent_uuid is None]
        try:
            if now - self._host_at >= devices.FACTS_S:
                self._learn_host()
            count = self._gate.fact("driver", pynvml.nvmlDeviceGetCount)
            split = any(self._devices.is_split_anew(parent) for parent in parents if parent.answers)
        except DeviceLost:
            # Its reading, which comes next, finds that out as well.
            return
        if count is None or count > MOST_GPUS:
            return
        in_doubt = self._devices.nameless or any(device.own_uuid is None for device in parents)
        if count == len(parents) and not split and not in_doubt:
            return
        before = self._devices.all
        if count != self._devices.count:
            # One was plugged in or taken out: those behind it have other indices now, and all are looked at.
            for device in before:
                device.rest = ""
        self._devices.all = self._devices.enumerate(count)
        _release(device for device in before if device not in self._devices.all)
        if {device.info.uuid for device in self._devices.all} != {device.info.uuid for device in before}:
            log.info("the driver now lists %d GPUs and MIG instances", len(self._devices.all))


def _judge(info: GpuInfo, values: DeviceValues) -> None:
    """Leave out what cannot be: a number beyond its range, and more of the memory than there is."""
    for key, value in values.items():
        lowest, highest = RANGES.get(key, (-inf, inf))
        if value is not None and not lowest <= value <= highest:
            values[key] = None
    total = info.memory_total_mib
    for key in ("memory", "memory_reserved"):
        part = values.get(key)
        if total is not None and part is not None and part > total:
            values[key] = None


def _release(devices: Iterable[Device]) -> None:
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


def _ended(listed: Iterable[tuple[str, Entry]], used: Mapping[int, SampledUse]) -> dict[int, int]:
    """SM utilization, by PID, of processes that are no longer listed."""
    there = {entry.pid for _, entry in listed}
    return {pid: use[0] for pid, use in used.items() if use[0] and pid not in there}


def _use(used: dict[int, SampledUse] | None, pid: int) -> SampledUse:
    """A process's utilization; one that runs and is not listed used nothing."""
    return UNKNOWN if used is None else used.get(pid, IDLE)


@lru_cache(maxsize=64)
def _kinds(letters: str) -> str:
    """The kinds of a process in nvidia-smi's order and spelling: "C", "C+G", "M+C"."""
    return "+".join(kind for kind in "MCG" if kind in letters)
