"""A source of telemetry together with the attribution that fits it: who does what, right now."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.settings import Settings
from gpumon_core.telemetry.records import Snapshot, Source


class Attribution(Protocol):
    """Says who the processes of a snapshot are."""

    def identify(self, pids: set[int], timestamp: float) -> dict[int, ProcessIdentity]:
        """An identity for every PID in a snapshot of that time."""
        ...


class Observer:
    """Takes attributed snapshots."""

    def __init__(self, source: Source, attribution: Attribution) -> None:
        self.source = source
        self._attribution = attribution

    def observe(self) -> tuple[Snapshot, dict[int, ProcessIdentity]]:
        """One snapshot, and who its processes are. Raises SourceUnavailable."""
        snapshot = self.source.read()
        identities = self._attribution.identify(
            {process.pid for process in snapshot.processes}, snapshot.timestamp
        )
        for pid, identity in identities.items():
            if identity.name is None:
                identities[pid] = replace(identity, name=self.source.process_name(pid))
        return snapshot, identities

    def close(self) -> None:
        """Give back what the source holds."""
        self.source.close()


def real(settings: Settings) -> Observer:
    """This machine's GPUs. Raises SourceUnavailable."""
    from gpumon_core.attribution.local import LocalAttribution
    from gpumon_core.telemetry.nvml import NvmlSource

    return Observer(NvmlSource(settings.host_name), LocalAttribution())


def simulated(settings: Settings) -> Observer:
    """Simulated GPUs."""
    from gpumon_core.attribution.simulated import SimulatedAttribution
    from gpumon_core.telemetry.simulated import SimulatedSource

    source = SimulatedSource(gpus=settings.demo_gpus, host=settings.host_name)
    return Observer(source, SimulatedAttribution(source))
