"""Which GPU is meant: the one place that knows how people write GPUs, on the command line and in queries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from gpumon_core.format import gpu_label
from gpumon_core.store.schema import gpus, hosts

# What a number alone means.
Number = Literal["index", "id"]
# The most GPUs that a sentence lists, and the most characters of what was written that it repeats.
MOST_LISTED = 8
LONGEST_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Named:
    """The names of a GPU. `here`: whether it is not gone from its host."""

    id: int
    host: str
    index: int
    mig_index: int | None
    uuid: str
    model: str | None = None
    here: bool = True

    @property
    def label(self) -> str:
        """Its index, for a MIG instance with that of the instance: "3:1"."""
        return gpu_label(self.index, self.mig_index)

    def __str__(self) -> str:
        return f"{self.host}/{self.label} ({self.model or 'of unknown model'}, {self.uuid})"


class UnknownGpu(Exception):
    """No GPU has that name; `str()` says which there are, without a full stop."""


class AmbiguousGpu(Exception):
    """Several GPUs have that name; `str()` says which, without a full stop."""


def known(engine: Engine) -> list[Named]:
    """Every GPU and MIG instance that was recorded, by host and index. Raises sqlalchemy.exc.DBAPIError."""
    query = sa.select(
        *(gpus.c.id, gpus.c.gpu_index, gpus.c.mig_index, gpus.c.uuid, gpus.c.state),
        *(gpus.c.name.label("model"), hosts.c.name.label("host")),
    ).join(hosts, hosts.c.id == gpus.c.host_id)
    with engine.connect() as connection:
        rows = connection.execute(
            query.order_by(hosts.c.name, gpus.c.gpu_index, gpus.c.mig_index, gpus.c.id)
        ).all()
    return [
        Named(row.id, row.host, row.gpu_index, row.mig_index, row.uuid, row.model, row.state != "gone")
        for row in rows
    ]


def find(text: str, named: Sequence[Named], number: Number) -> Named:
    """The GPU of that name, in upper or lower case: by index ("3", "index:3", for a MIG instance "3:1"), by UUID
    or the beginning of one, both also after the host ("rack1/3"), or by id ("id:7"). `number` says what a number
    alone means. Of several GPUs that were in one place one after the other, the newest has the index.

    Raises UnknownGpu, AmbiguousGpu.
    """
    wanted = text.strip().lower()
    if wanted.isascii() and wanted.isdecimal():
        wanted = f"{number}:{wanted}"
    found = (
        [gpu for gpu in named if wanted in (f"id:{gpu.id}", *_with_host(gpu, gpu.uuid))]
        or [
            gpu for gpu in _newest_in_place(named) if wanted in (f"index:{gpu.label}", *_with_host(gpu, gpu.label))
        ]
        or [gpu for gpu in named if _begins(gpu, wanted)]
    )
    shown = text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "…"
    if not found:
        there = _listed([gpu for gpu in named if gpu.here] or named)
        raise UnknownGpu(f"there is no GPU {shown}; " + (f"there are {there}" if named else "there are none yet"))
    if len(found) > 1:
        raise AmbiguousGpu(
            f"GPU {shown} means several: name one of {_listed(found)} by its host and index or UUID"
        )
    return found[0]


def _with_host(gpu: Named, name: str) -> tuple[str, str]:
    return name.lower(), f"{gpu.host}/{name}".lower()


def _begins(gpu: Named, wanted: str) -> bool:
    rest = wanted.removeprefix(f"{gpu.host.lower()}/")
    return bool(rest) and gpu.uuid.lower().startswith(rest)


def _newest_in_place(named: Iterable[Named]) -> list[Named]:
    """The GPU in each place of a host: the one that is there now, or was there last."""
    places: dict[tuple[str, str], Named] = {}
    for gpu in sorted(named, key=lambda gpu: (gpu.here, gpu.id)):
        places[gpu.host, gpu.label] = gpu
    return list(places.values())


def _listed(named: Sequence[Named]) -> str:
    more = len(named) - MOST_LISTED
    return ", ".join(map(str, named[:MOST_LISTED])) + (f" and {more} more" if more > 0 else "")
