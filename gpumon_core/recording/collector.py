"""A source of telemetry and the attribution that fits it: what the GPUs do now, and for which processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.settings import Settings
from gpumon_core.telemetry.records import Snapshot, Source, SourceUnavailable

if TYPE_CHECKING:
    from gpumon_core.attribution.inquirer import Inquirer
    from gpumon_core.attribution.readers import Readers
    from gpumon_core.store.writer import Attributed

# The driver samples the use of processes five times a second.
BETWEEN_S = 1.0

log = logging.getLogger(__name__)


class Attribution(Protocol):
    """Identifies the processes of a snapshot."""

    def identify(self, pids: set[int], timestamp: float) -> dict[int, ProcessIdentity]:
        """An identity for every PID in a snapshot of that time."""
        ...

    def close(self) -> None:
        """Release what is open of the processes."""
        ...


class Observer:
    """Takes attributed snapshots."""

    def __init__(self, source: Source, attribution: Attribution, inquirer: Inquirer | None = None) -> None:
        self.source = source
        self._attribution = attribution
        self._inquirer = inquirer
        # By PID: a process that the attribution has no name for, and the same with the driver's name.
        self._named: dict[int, tuple[ProcessIdentity, ProcessIdentity]] = {}

    def observe(self) -> Attributed:
        """One snapshot, and the identities of its processes. Raises SourceUnavailable."""
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
        return snapshot, self._learned(snapshot, identities)

    def observe_once(self, patience_s: float) -> Attributed:
        """One snapshot for a command that looks only once.

        It waits for what containers and model servers answer about the processes. Where something is measured
        between two readings, this is the second, completed with what only the first asked for.
        """
        snapshot, identities = self.observe()
        if self.source.compares:
            time.sleep(BETWEEN_S)
            try:
                second, identities = self.observe()
                snapshot = second.completed_by(snapshot)
            except SourceUnavailable as error:
                log.warning("%s; the reading of a second ago is shown", error)
        if self._inquirer is not None:
            self._inquirer.wait(patience_s)
        return snapshot, self._learned(snapshot, dict(identities))

    def _learned(self, snapshot: Snapshot, identities: dict[int, ProcessIdentity]) -> dict[int, ProcessIdentity]:
        return identities if self._inquirer is None else self._inquirer.add(identities, snapshot.processes)

    @property
    def hung_readers(self) -> int:
        """How many threads hang in a read of what a process controls."""
        return sum(readers.hung for readers in self._readers())

    @property
    def reader_problem(self) -> str | None:
        """What hangs, and since when, in one sentence; None where nothing does."""
        return next((readers.problem for readers in self._readers() if readers.hung), None)

    def _readers(self) -> list[Readers]:
        found = (getattr(one, "readers", None) for one in (self._attribution, self._inquirer))
        return [readers for readers in found if readers is not None]

    def past(self, start: float, end: float, step_s: float) -> Iterator[Attributed]:
        """The snapshots of a past time, where the source knows them: a driver does not."""
        return iter(())

    def close(self) -> None:
        """Close the source and the attribution."""
        if self._inquirer is not None:
            self._inquirer.close()
        self.source.close()
        self._attribution.close()


class SimulatedObserver(Observer):
    """Simulated GPUs. They have a past, too."""

    def __init__(self, settings: Settings) -> None:
        from gpumon_core.simulation.identities import SimulatedAttribution
        from gpumon_core.simulation.source import SimulatedSource

        self._simulation = SimulatedSource(
            gpus=settings.demo_gpus, host=settings.host_name, processes=settings.demo_processes
        )
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
    from gpumon_core.attribution.inquirer import Inquirer
    from gpumon_core.attribution.local import LocalAttribution
    from gpumon_core.attribution.rules import Rules
    from gpumon_core.attribution.secrets import Mask
    from gpumon_core.telemetry.nvml import NvmlSource
    from gpumon_core.telemetry.sleep import Sleep

    rules = Rules.load(settings.rules)
    describer = Describer(commands=settings.commands, rules=rules, ask=settings.ask_servers)
    source = NvmlSource(settings.host_name, sleep=Sleep(settings.let_sleep))
    socket = None if settings.container_socket is None else str(settings.container_socket)
    # Where it may ask no server, it still reads the files that a tick must not wait for.
    inquirer = Inquirer(container_socket=socket, mask=Mask(rules.secrets))
    return Observer(source, LocalAttribution(describer=describer), inquirer)


def chosen(settings: Settings, say: Callable[[str], None]) -> Observer:
    """The source that GPUMON_SOURCE names. Where `auto` finds no driver, GPUs are simulated, and `say` gets a
    sentence about it. Raises SourceUnavailable."""
    if settings.source == "demo":
        return SimulatedObserver(settings)
    try:
        return real(settings)
    except SourceUnavailable as error:
        if settings.source == "nvml":
            raise
        say(f"{error}. These GPUs are simulated. {error.remedy}")
    return SimulatedObserver(settings)
