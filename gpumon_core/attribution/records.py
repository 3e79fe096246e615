"""Who a process is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process that cannot be confused with another.

    `start_key` tells two processes under one reused PID apart: on Linux the boot's id and the
    process's start in clock ticks since that boot, which no clock change can move. It is None
    where the process table may not be read; `start_time` (UTC seconds) is None then too.
    """

    pid: int
    start_key: str | None = None
    start_time: float | None = None
    name: str | None = None
    user: str | None = None
