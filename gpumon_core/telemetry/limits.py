"""What a driver or /proc can mean at all: beyond these bounds a number is no answer, and a text is no text."""

from __future__ import annotations

# PID_MAX_LIMIT of Linux (include/linux/threads.h): no PID is above it, and 0 is no process that can be looked at.
PID_LIMIT = 2**22
# More GPUs or MIG slots than any machine has; a larger count is not believed.
MOST_GPUS = 64
MOST_MIG_SLOTS = 64
# More processes on one GPU than a driver can mean.
MOST_PROCESSES = 16384
# In MiB (64 TiB) and W: what a board's memory and its power limit may be.
MOST_MEMORY_MIB = 2**26
MOST_POWER_W = 10_000.0
# No clock that stamps samples in microseconds has come this far, whatever it counts from.
LATEST_US = 2**60
# Texts of NVML have room for 96 characters, the names of programs for 255.
LONGEST_TEXT = 255


def is_pid(pid: int) -> bool:
    """Whether a process can have this PID."""
    return 0 < pid <= PID_LIMIT


def within(number: float | None, highest: float) -> float | None:
    """The number, where it is above 0 and at most `highest`; otherwise it is not known."""
    return number if number is not None and 0 < number <= highest else None
