"""Who the processes of simulated GPUs are."""

from __future__ import annotations

from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.telemetry.simulated import SimulatedSource


class SimulatedAttribution:
    """Asks the simulation itself."""

    def __init__(self, source: SimulatedSource) -> None:
        self._source = source

    def identify(self, pids: set[int], timestamp: float) -> dict[int, ProcessIdentity]:
        """An identity for every PID, as it is at that time."""
        runs = {run.pid: run for run in self._source.runs_at(timestamp)}
        return {
            pid: ProcessIdentity(
                pid,
                f"demo:{int(runs[pid].start)}",
                runs[pid].start,
                runs[pid].program.name,
                runs[pid].program.user,
            )
            if pid in runs
            else ProcessIdentity(pid)
            for pid in pids
        }
