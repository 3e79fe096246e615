"""A source of telemetry together with the attribution that fits it: who does what, right now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.settings import Settings
from gpumon_core.telemetry.records import Snapshot, Source

Attributed = tuple[Snapshot, dict[int, ProcessIdentity]]


class Attribution(Protocol):
    """Says who the processes of a snapshot are."""

    def identify(self, pids: set[int], timestamp: float) -> dict[int, ProcessIdentity]:
        """An identity for every PID in a snapshot of that time."""
        ...

    def close(self) -> None:
        """Give back what is held of the processes."""
        ...


class Observer:
    """Takes attributed snapshots."""

    def __init__(self, source: Source, attribution: Attribution) -> None:
        self.source = source
        self._attribution = attribution
        # By PID: who is nameless to the attribution, and who it is with the driver's name.
        self._named: dict[int, tuple[ProcessIdentity, ProcessIdentity]] = {}

    def observe(self) -> Attributed:
        """One snapshot, and who its processes are. Raises SourceUnavailable."""
        snapshot = self.source.read()
        identities = self._attribution.identify(
            {process.pid for process in snapshot.processes}, snapshot.timestamp
        )
        named = {}
        for pid, identity in identities.items():
            if identity.name is None:
                known = self._named.get(pid)
                # The driver is asked once for each, not with every tick.
                if known is None or known[0] != identity:
                    known = identity, replace(identity, name=self.source.process_name(pid))
                named[pid] = known
                identities[pid] = known[1]
        self._named = named
        return snapshot, identities

    def past(self, start: float, end: float, step_s: float) -> Iterator[Attributed]:
        """The snapshots of a time gone by, where the source can tell: a driver cannot."""
        return iter(())

    def close(self) -> None:
        """Give back what the source and the attribution hold."""
        self.source.close()
        self._attribution.close()


class SimulatedObserver(Observer):
    """Simulated GPUs, whose past is as good as their present."""

    def __init__(self, settings: Settings) -> None:
        from gpumon_core.attribution.simulated import SimulatedAttribution
        from gpumon_core.telemetry.simulated import SimulatedSource

        self._simulation = SimulatedSource(gpus=settings.demo_gpus, host=settings.host_name)
        super().__init__(self._simulation, SimulatedAttribution(self._simulation))

    def past(self, start: float, end: float, step_s: float) -> Iterator[Attributed]:
        """Every snapshot from `start` to just before `end`."""
        for tick in range(int((end - start) / step_s)):
            snapshot = self._simulation.snapshot_at(start + tick * step_s)
            pids = {process.pid for process in snapshot.processes}
            yield snapshot, self._attribution.identify(pids, snapshot.timestamp)


def real(settings: Settings) -> Observer:
    """This machine's GPUs. Raises SourceUnavailable."""
    from gpumon_core.attribution.describe import Describer
    from gpumon_core.attribution.local import LocalAttribution
    from gpumon_core.attribution.rules import Rules
    from gpumon_core.telemetry.nvml import NvmlSource

    describer = Describer(commands=settings.commands, rules=Rules.load(settings.rules))
    return Observer(NvmlSource(settings.host_name), LocalAttribution(describer=describer))
