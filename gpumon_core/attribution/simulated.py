"""Who a simulated process is: the simulation itself knows."""

from __future__ import annotations

from collections.abc import Iterable

from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.telemetry.simulated import SimulatedSource

# So many processes are kept in mind.
LARGEST = 8192


class SimulatedAttribution:
    """Identifies the processes of a SimulatedSource, at any time."""

    def __init__(self, source: SimulatedSource) -> None:
        self._source = source
        # Who has a PID, and from when to when.
        self._known: dict[int, tuple[float, float, ProcessIdentity]] = {}

    def identify(self, pids: Iterable[int], timestamp: float) -> dict[int, ProcessIdentity]:
        """An identity for every PID at that time (UTC seconds); where none lives, nothing but its PID."""
        return {pid: self.identify_one(pid, timestamp) for pid in pids}

    def close(self) -> None:
        """There is nothing to give back."""

    def identify_one(self, pid: int, timestamp: float) -> ProcessIdentity:
        """Who has this PID at that time."""
        known = self._known.get(pid)
        if known is not None and known[0] <= timestamp < known[1]:
            return known[2]
        run = self._source.identity(pid, timestamp)
        if run is None:
            return ProcessIdentity(pid)
        identity = ProcessIdentity(pid, run.start_key, float(run.start), run.name, run.user)
        if len(self._known) >= LARGEST:
            self._known.clear()
        self._known[pid] = (run.start, run.end, identity)
        return identity
