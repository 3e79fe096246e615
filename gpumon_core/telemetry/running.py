"""The running-process calls of NVML, read without trusting their struct layout.

The calls exist in three versions. Which layout a driver writes does not follow from the version
alone: the 535.43 and 535.86 drivers wrote an additional field under the third version's name, and
reading that with the usual layout yields garbled PIDs. So the buffer is filled with a pattern
first, and the size of an entry is measured from how far the driver wrote.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable
from typing import NamedTuple

import pynvml

from gpumon_core.telemetry.gate import NOT_AVAILABLE
from gpumon_core.telemetry.limits import MOST_PROCESSES, is_pid

# Kind -> function; the letters are those of nvidia-smi.
FUNCTIONS = {
    "C": "nvmlDeviceGetComputeRunningProcesses",
    "G": "nvmlDeviceGetGraphicsRunningProcesses",
    "M": "nvmlDeviceGetMPSComputeRunningProcesses",
}
# Newest first: suffix of the function and size of an entry as documented.
VERSIONS = (("_v3", 24), ("_v2", 24), ("", 16))
# Entry size -> layout: pid, padding, memory in bytes [, GPU instance, compute instance [, protected memory]].
LAYOUTS = {size: struct.Struct(layout) for size, layout in {16: "=I4xQ", 24: "=I4xQII", 32: "=I4xQIIQ"}.items()}

# No field ends in this byte: PIDs and instance ids are small or all ones, and no memory is that large.
PATTERN = 0xA5
LARGEST_ENTRY = 40


class Entry(NamedTuple):
    """One process as one call lists it: memory in bytes, MIG instance ids or None outside MIG."""

    pid: int
    memory: int | None
    gpu_instance: int | None = None
    compute_instance: int | None = None


class EntryBuffer:
    """Memory for the driver to list processes in; it grows and is used again."""

    def __init__(self, capacity: int = 32) -> None:
        self.grow(capacity)

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` entries of any layout."""
        self.capacity = capacity
        size = ctypes.sizeof(pynvml.c_nvmlProcessInfo_v2_t)
        self.array = (pynvml.c_nvmlProcessInfo_v2_t * (capacity * LARGEST_ENTRY // size + 1))()

    def list(self, function: str, handle: object, documented_size: int) -> Iterable[Entry]:
        """The processes that `function` lists. Raises pynvml.NVMLError."""
        call = pynvml._nvmlGetFunctionPointer(function)
        for _ in range(5):
            count = ctypes.c_uint(self.capacity)
            ctypes.memset(self.array, PATTERN, ctypes.sizeof(self.array))
            code = call(handle, ctypes.byref(count), self.array)
            # A driver that asks for no more room than it was given would never be content.
            if code != pynvml.NVML_ERROR_INSUFFICIENT_SIZE or not self.capacity < count.value <= MOST_PROCESSES:
                break
            # More may start before the next call: leave them room.
            self.grow(count.value * 2)
        if code != pynvml.NVML_SUCCESS:
            raise pynvml.NVMLError(code)
        if not count.value:
            return ()
        # It cannot have written more than there is room for, whatever it says.
        return _decode(bytes(self.array), min(count.value, self.capacity), documented_size)


def _decode(written: bytes, count: int, documented_size: int) -> Iterable[Entry]:
    extent = len(written.rstrip(bytes((PATTERN,))))
    measured = next((size for size in LAYOUTS if size * (count - 1) < extent <= size * count), documented_size)
    entries = []
    for pid, memory, *more in LAYOUTS[measured].iter_unpack(written[: measured * count]):
        # Beside real processes some drivers list 0 and 4294967295.
        if is_pid(pid):
            known = None if memory in NOT_AVAILABLE else memory
            if more and more[0] not in NOT_AVAILABLE:
                entries.append(Entry(pid, known, more[0], None if more[1] in NOT_AVAILABLE else more[1]))
            else:
                entries.append(Entry(pid, known))
    return entries
