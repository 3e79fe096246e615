"""The newest tick, held in memory for those who want neither to ask the driver nor the database."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.telemetry.records import Snapshot

Values = Mapping[str, float | None]


@dataclass(frozen=True, slots=True, eq=False)
class Newest:
    """One tick and what goes with it.

    values: by UUID, what a GPU has said by catalogue key; what is asked rarely as it was when it was asked last.
    A GPU that does not answer now keeps them: whether it does, `snapshot.readings` tells. energy_j: by UUID, what
    the GPUs have taken since they were first seen, in joules, up to the newest tick in the database. at: when it
    was taken, in seconds of time.monotonic.
    """

    snapshot: Snapshot
    identities: Mapping[int, ProcessIdentity]
    values: Mapping[str, Values]
    energy_j: Mapping[str, float]
    at: float


def follow(before: Newest | None, snapshot: Snapshot, identities: Mapping[int, ProcessIdentity]) -> Newest:
    """The tick that comes after `before`."""
    known = before.values if before else {}
    values = {gpu.uuid: known.get(gpu.uuid, {}) for gpu in snapshot.gpus}
    for reading in snapshot.readings:
        values[reading.uuid] = {**values[reading.uuid], **reading.values}
    return Newest(snapshot, identities, values, before.energy_j if before else {}, time.monotonic())
