"""A fake of NVIDIA's management library, for tests that run the real pynvml.

`nvml.c` is the library; this package builds it, and sets what it says. Both share one memory-mapped
file, so a change made here is what the next NVML call answers, in this process and in any other that
was started with `environment(fake)`. A value of None is one that the board does not have: the call
returns NVML_ERROR_NOT_SUPPORTED. Units are NVML's own (bytes, milliwatts, MHz, millijoules, percent).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import uuid as uuids
from pathlib import Path
from typing import Any, Literal

from . import layout
from .attributes import Number, Text, TextValue, Unterminated, View, free_slot, set_all
from .devices import BOARD, GIB, NO_INSTANCE, NOT_AVAILABLE, FakeGpu, FakeMig, FakeProcess
from .layout import UNSUPPORTED
from .loading import build, environment, functions, library, loaded

__all__ = [
    "NOT_AVAILABLE",
    "NO_INSTANCE",
    "FakeGpu",
    "FakeMig",
    "FakeNvml",
    "FakeProcess",
    "Unterminated",
    "build",
    "environment",
    "functions",
    "library",
    "loaded",
]

_FAIL, _HIDE, _HANG = 1, 2, 3


class FakeNvml(View):
    """The state of one fake driver with its GPUs, in the file at `state_path` (created when missing)."""

    driver_version = Text()
    nvml_version = Text()
    cuda_version = Number()

    def __init__(self, state_path: str | os.PathLike[str]) -> None:
        self.path = Path(state_path).resolve()
        size = ctypes.sizeof(layout.State)
        fresh = not self.path.exists() or self.path.stat().st_size != size
        with open(self.path, "w+b" if fresh else "r+b") as file:
            file.truncate(size)
            self._map = mmap.mmap(file.fileno(), size)
        self.state = layout.State.from_buffer(self._map)
        super().__init__(self.state)
        self._last_process = -1
        if fresh:
            self.driver_version, self.nvml_version, self.cuda_version = "580.159.03", "13.580.159.03", 13000
            self.state.driver_loaded = self.state.driver_generation = 1
            self.state.process_struct_bytes_v3 = 24
            self.state.bytes, self.state.magic = size, layout.MAGIC

    # -- the driver

    @property
    def driver_loaded(self) -> bool:
        """Unloading ends every session: after loading again, clients must call nvmlInit anew."""
        return bool(self.state.driver_loaded)

    @driver_loaded.setter
    def driver_loaded(self, value: bool) -> None:
        if self.driver_loaded and not value:
            self.state.driver_generation += 1
        self.state.driver_loaded = value

    @property
    def process_struct_bytes_v3(self) -> int:
        """Size of an nvmlProcessInfo_t as the _v3 process calls write it.

        24; 32 is what drivers 535.43 to 535.86 wrote, with usedGpuCcProtectedMemory at the end.
        """
        return int(self.state.process_struct_bytes_v3)

    @process_struct_bytes_v3.setter
    def process_struct_bytes_v3(self, value: Literal[24, 32]) -> None:
        if value not in (24, 32):
            raise ValueError(f"An nvmlProcessInfo_t had 24 or 32 bytes, never {value}.")
        self.state.process_struct_bytes_v3 = value

    # -- devices and processes

    @property
    def gpus(self) -> list[FakeGpu]:
        """The GPUs, in the order of their NVML indices."""
        return [FakeGpu(self, slot) for slot, raw in enumerate(self.state.gpus) if raw.used]

    def add_gpu(
        self,
        *,
        name: TextValue = "NVIDIA RTX A6000",
        uuid: TextValue = None,
        memory_total: int | None = 48 * GIB,
        **values: Any,
    ) -> FakeGpu:
        """Plug in a GPU. `values` are attributes of FakeGpu; left out, those of an RTX A6000."""
        slot = free_slot(self.state.gpus, "GPUs")
        gpu = FakeGpu(self, slot)
        raw = gpu._raw
        ctypes.memset(ctypes.addressof(raw), 0, ctypes.sizeof(raw))
        for number in layout.GPU_NUMBERS:
            setattr(raw, number, UNSUPPORTED)
        for numbers in (raw.clock, raw.max_clock, raw.threshold, raw.fan_speed):
            numbers[:] = [UNSUPPORTED] * len(numbers)
        gpu.name = name
        gpu.uuid = uuid or f"GPU-{uuids.uuid5(uuids.NAMESPACE_OID, str(slot))}"
        own = {
            "serial": f"15601210{slot:05}",
            "minor_number": slot,
            "pci_bus_id": f"00000000:{slot + 1:02X}:00.0",
        }
        set_all(gpu, {**BOARD, **own, "memory_total": memory_total, **values})
        raw.used = 1
        return gpu

    def remove_process(self, pid: int) -> None:
        """End a process: on every GPU, and of every kind."""
        for raw in self.state.processes:
            if raw.presence and raw.pid == pid:
                raw.presence = 0

    def clear_processes(self) -> None:
        """End all processes."""
        for raw in self.state.processes:
            raw.presence = 0

    def next_process(self) -> Any:
        """A slot of the process table that nobody uses. For FakeGpu.add_process."""
        # Round and round, so that a slot is not written again while a reader may still look at it.
        slots = self.state.processes
        for step in range(1, len(slots) + 1):
            index = (self._last_process + step) % len(slots)
            if not slots[index].presence:
                self._last_process = index
                return slots[index]
        raise ValueError(f"The fake has room for {len(slots)} processes, and all are taken.")

    # -- faults: for a named function; for one device or, with gpu None, for all

    def fail(self, function: str, error: int, gpu: FakeGpu | FakeMig | int | None = None, times: int = -1) -> None:
        """Let a function return an error: for the next `times` calls, or for good (-1).

        `gpu` is a GPU (or its index; its MIG devices are included) or a MIG device.
        """
        self._rule(_FAIL, function, gpu, result=error, times=times)

    def hide(self, function: str) -> None:
        """Let a function look like one that this driver does not have: NVML_ERROR_FUNCTION_NOT_FOUND.

        A missing symbol makes pynvml raise the very same exception.
        """
        self._rule(_HIDE, function, None)

    def hang(self, function: str, seconds: float, gpu: FakeGpu | FakeMig | int | None = None) -> None:
        """Let a function sleep before it answers; recover() also wakes those that sleep."""
        self._rule(_HANG, function, gpu, seconds=seconds)

    def recover(self, function: str | None = None, gpu: FakeGpu | FakeMig | int | None = None) -> None:
        """Undo fail, hide and hang: of a function or of all, for a device or for all."""
        number = None if function is None else self._function(function)
        target = None if gpu is None else self._target(gpu)
        for rule in self.state.rules:
            if number in (None, rule.function) and target in (None, (rule.gpu, rule.mig)):
                rule.action = 0
        self._count_rules()

    def _rule(
        self,
        action: int,
        function: str,
        gpu: FakeGpu | FakeMig | int | None,
        *,
        result: int = 0,
        times: int = -1,
        seconds: float = 0.0,
    ) -> None:
        number, target = self._function(function), self._target(gpu)
        for rule in self.state.rules:  # the same again replaces; what is used up makes room
            if not rule.times or (rule.action, rule.function, rule.gpu, rule.mig) == (
                action,
                number,
                *target,
            ):
                rule.action = 0
        rule = self.state.rules[free_slot(self.state.rules, "faults", used="action")]
        rule.function, (rule.gpu, rule.mig) = number, target
        rule.result, rule.times, rule.seconds = result, times, seconds
        rule.action = action
        self._count_rules()

    def _count_rules(self) -> None:
        # The library looks at so many; none, as a rule, and then a fault-free call costs nothing.
        active = [index for index, rule in enumerate(self.state.rules) if rule.action]
        self.state.rule_count = max(active, default=-1) + 1

    def _target(self, gpu: FakeGpu | FakeMig | int | None) -> tuple[int, int]:
        if isinstance(gpu, FakeMig):
            return gpu.gpu.slot, gpu.slot
        if isinstance(gpu, int):
            gpu = self.gpus[gpu]
        return (gpu.slot, -2) if gpu else (-1, -2)

    @staticmethod
    def _function(name: str) -> int:
        if name not in functions():
            raise ValueError(f"The fake has no function {name!r}.")
        return functions()[name]

    # -- what clients did

    def calls(self, function: str, gpu: FakeGpu | int | None = None) -> int:
        """How often a function was called, in all processes; for one GPU (with its MIG devices) or in all."""
        row = self.state.calls[self._function(function)]
        return sum(row) if gpu is None else int(row[self._target(gpu)[0]])

    def total_calls(self) -> int:
        """How often any function was called."""
        return sum(sum(row) for row in self.state.calls)

    def reset_calls(self) -> None:
        """Forget the calls counted and timed so far."""
        ctypes.memset(ctypes.addressof(self.state.calls), 0, ctypes.sizeof(self.state.calls))
        self.state.nanoseconds = 0

    @property
    def hangs(self) -> int:
        """How many calls have begun to hang so far, in all processes."""
        return int(self.state.hangs)

    @property
    def time_calls(self) -> bool:
        """Whether the time spent inside the library is counted, in `total_nanoseconds`."""
        return bool(self.state.time_calls)

    @time_calls.setter
    def time_calls(self, value: bool) -> None:
        self.state.time_calls = value

    @property
    def total_nanoseconds(self) -> int:
        """Time that clients spent inside the library while `time_calls` was set."""
        return int(self.state.nanoseconds)
