"""The log of readings (see readings.h): which process was answered about which GPU, and when."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass
from pathlib import Path

from . import layout

# The highest number that a program takes for a clock in MHz.
ROOM = 49_999


@dataclass(frozen=True, slots=True)
class Reading:
    """One answer about a GPU's video clock, which was `number`. gpu is the fake's slot; real_s and monotonic_s are
    seconds of CLOCK_REALTIME and CLOCK_MONOTONIC, as the process that asked has them."""

    number: int
    pid: int
    gpu: int
    real_s: float
    monotonic_s: float


class _Entry(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_uint32),
        ("gpu", ctypes.c_int32),
        ("real_ns", ctypes.c_int64),
        ("monotonic_ns", ctypes.c_int64),
    ]


class _Log(ctypes.Structure):
    _fields_ = [
        ("magic", ctypes.c_uint32),
        ("room", ctypes.c_uint32),
        ("count", ctypes.c_uint64),
        ("list", _Entry * ROOM),
    ]


class Readings:
    """The log in the file at `path`, which is made anew. Programs get it with `environment()`."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        with self.path.open("w+b") as file:
            file.truncate(ctypes.sizeof(_Log))
            self._log = _Log.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(_Log)))
        self._log.room, self._log.magic = ROOM, layout.MAGIC
        self._found: list[Reading] = []

    def environment(self) -> dict[str, str]:
        """What to add to a program's environment."""
        return {"FAKE_NVML_READINGS": str(self.path)}

    def all(self) -> list[Reading]:
        """Every reading so far, oldest first, up to one that is just being answered."""
        while len(self._found) < min(self._log.count, ROOM):
            entry = self._log.list[len(self._found)]
            if not entry.pid:
                break
            self._found.append(
                Reading(len(self._found) + 1, entry.pid, entry.gpu, entry.real_ns / 1e9, entry.monotonic_ns / 1e9)
            )
        return self._found
