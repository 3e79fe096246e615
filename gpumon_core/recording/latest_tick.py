"""The latest tick, in memory for those who want to ask neither the driver nor the database."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.recording.consumers import CommittedTick
from gpumon_core.telemetry.records import GpuValues, Snapshot


@dataclass(frozen=True, slots=True, eq=False)
class LatestTick:
    """One tick and what goes with it.

    values: by UUID, what a GPU has reported by catalogue key; what is asked rarely as it was when it was asked
    last. A GPU that does not answer now still has them: `snapshot.readings` says whether it does. energy_j: by
    UUID, what the GPUs have taken since they were first seen, in joules, up to the newest tick in the database.
    at: when it was taken, in seconds of time.monotonic.
    """

    snapshot: Snapshot
    identities: Mapping[int, ProcessIdentity]
    values: Mapping[str, GpuValues]
    energy_j: Mapping[str, float]
    at: float


def follow(before: LatestTick | None, snapshot: Snapshot, identities: Mapping[int, ProcessIdentity]) -> LatestTick:
    """The tick that comes after `before`."""
    known = before.values if before else {}
    values = {gpu.uuid: known.get(gpu.uuid, {}) for gpu in snapshot.gpus}
    for reading in snapshot.readings:
        values[reading.uuid] = {**values[reading.uuid], **reading.values}
    return LatestTick(snapshot, identities, values, before.energy_j if before else {}, time.monotonic())


class LatestTickMemory:
    """Holds the latest tick.

    It gets the readings before the commit, so that /metrics has them while the database is away; only the energy,
    which the database adds up, comes as to every consumer: after the commit.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self.latest: LatestTick | None = None

    def read(self, snapshot: Snapshot, identities: Mapping[int, ProcessIdentity]) -> None:
        """A tick was read."""
        with self._guard:
            self.latest = follow(self.latest, snapshot, identities)

    def take(self, tick: CommittedTick) -> None:
        """A tick was committed."""
        with self._guard:
            if self.latest is not None:
                self.latest = replace(self.latest, energy_j=tick.energy_j)

    def clear(self) -> None:
        """Another source is sampled, or none."""
        with self._guard:
            self.latest = None
