"""Reads the ledger: how much of the GPUs each user, workload, model, ... used, as pandas DataFrames.

The ledger counts by the half hour. A range from `start` up to, not including, `end` means every half hour that it
touches, so that the parts of a GPU's time and energy always add up to the total.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from gpumon_core.store.accounting import HOUR_S, step_of
from gpumon_core.store.queries.dimensions import Dimension
from gpumon_core.store.queries.frames import fetch, gpu_labels, with_programs
from gpumon_core.store.queries.process_filter import CONTAINER
from gpumon_core.store.schema import (
    gpu_processes,
    gpu_usage,
    gpus,
    hosts,
    imports,
    process_gpus,
    process_hours,
    programs,
)

# What is added up: the process's part of a GPU's busy time, the time it was on the GPU, the time in which it held
# memory and did nothing, memory held, and energy.
SUMS = ("busy_s", "seconds", "idle_s", "memory_mib_s", "energy_j")
# A GPU's own rows beside those of its processes, and their names.
GPU_ROWS = {
    "unattributed": "No known process",
    "unsettled": "Not added up yet",
    "idle": "Idle GPUs",
    "unknown": "Use not known",
    "unrecorded": "While not recording",
}
# The rows of many processes are updated in turn (writer.SETTLED_PER_TICK): what is missing of the GPUs' busy time
# and energy is a row of its own where it is more than this part of the total.
UNSETTLED_FROM = 0.005
# The key of all processes for which a trend is not asked; ids begin with 1.
ALL_OTHERS = 0
# The most processes whose names one query reads.
PIECE = 1000
# A process is at work where one of these is not 0.
AT_WORK = ("sm_utilization", "encoder_utilization", "decoder_utilization")
KEYS: Mapping[str, Any] = {
    "user": gpu_processes.c.username,
    "container": CONTAINER,
    "workload": programs.c.workload,
    "model": programs.c.model,
    "process": process_hours.c.process_id,
    "gpu": process_hours.c.gpu_id,
    "job": programs.c.job_id,
}


@dataclass(frozen=True, slots=True)
class Scope:
    """Which part of the ledger is meant. None and empty filters leave everything in.

    start, end: UTC seconds; every half hour between them counts, also in part. programs_with: column of
    `programs` -> values, any of them.
    """

    start: int
    end: int
    gpu_ids: Sequence[int] | None = None
    users: Sequence[str] | None = None
    programs_with: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def first_step(self) -> int:
        """The first second of the first half hour that counts."""
        return step_of(self.start)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for two scopes that mean the same time and processes."""
        return (
            *(self.first_step, self.end - self.end % 60, self.gpu_ids, self.users),
            tuple((name, tuple(values)) for name, values in self.programs_with.items()),
        )

    @property
    def chooses(self) -> bool:
        """Whether some processes are left out, so that the GPUs' own rows mean nothing."""
        return bool(self.users or any(self.programs_with.values()))

    def query(self) -> list[tuple[str, Any]]:
        """The scope as pairs of a query string, for /api/v1/usage and /api/v1/models."""
        named = (("gpu", self.gpu_ids), ("user", self.users), *self.programs_with.items())
        chosen = [(name, value) for name, values in named for value in values or ()]
        return [("from", self.start), ("to", self.end), *chosen]

    def hours(self, table: sa.Table) -> list[Any]:
        """The conditions for the rows of a table of the ledger."""
        found = [table.c.timestamp_epoch >= self.first_step, table.c.timestamp_epoch < self.end]
        if self.gpu_ids is not None:
            found.append(table.c.gpu_id.in_(list(self.gpu_ids)))
        return found

    def processes(self) -> list[Any]:
        """The conditions for processes and what they run."""
        found = [gpu_processes.c.username.in_(list(self.users))] if self.users else []
        return found + [
            programs.c[name].in_(list(values)) for name, values in self.programs_with.items() if values
        ]


def ranking(engine: Engine, by: Dimension, scope: Scope) -> pd.DataFrame:
    """How much each user, container, ... used, the busiest first, and the GPUs' own rows after them.

    Columns: key (the user's name, the process's or GPU's id, ...; None where it is not known), kind (part, or one
    of GPU_ROWS), processes (how many), busy_s, seconds, idle_s, memory_mib_s, energy_j, estimated (whether some of
    it is split by memory), as float64. Over `kind` energy_j adds up to the GPUs' energy, and busy_s to their busy
    time.
    """
    key = KEYS[by]
    query = (
        sa.select(
            key.label("key"),
            sa.func.count(process_hours.c.process_id.distinct()).label("processes"),
            *(sa.func.sum(process_hours.c[name]).label(name) for name in SUMS),
            sa.func.max(process_hours.c.estimated).label("estimated"),
        )
        .select_from(_joined(by, scope))
        .where(*scope.hours(process_hours), *scope.processes())
        .group_by(key)
    )
    frame = fetch(engine, query).assign(kind="part")
    numbers = [*SUMS, "processes", "estimated"]
    frame[numbers] = frame[numbers].astype("float64")
    frame = frame.sort_values(["busy_s", "memory_mib_s"], ascending=False, kind="stable")
    if not scope.chooses:
        own = _own(gpu_totals(engine, scope), frame)
        frame = pd.concat([frame, own], ignore_index=True) if len(frame) else own
    return frame.reset_index(drop=True)[["key", "kind", *numbers]]


def _joined(by: Dimension, scope: Scope) -> Any:
    """The hours, joined only with the tables that the query needs: a join costs as much as the sum."""
    place: Any = process_hours
    if by == "user" or scope.users:
        place = place.join(gpu_processes, gpu_processes.c.id == process_hours.c.process_id)
    if (KEYS[by] is not KEYS["process"] and by not in ("user", "gpu")) or any(scope.programs_with.values()):
        place = place.outerjoin(programs, programs.c.id == process_hours.c.program_id)
    return place


def _own(totals: pd.DataFrame, parts: pd.DataFrame) -> pd.DataFrame:
    """The GPUs' own rows: what belongs to no process, or not yet."""
    sums = totals[list(TOTALS)].sum()
    late_s = sums["busy_s"] - sums["unattributed_s"] - parts["busy_s"].sum()
    late_j = sums["energy_j"] - sums[["unattributed_j", "idle_j", "unrecorded_j"]].sum() - parts["energy_j"].sum()
    if late_s <= UNSETTLED_FROM * sums["busy_s"] and late_j <= UNSETTLED_FROM * sums["energy_j"]:
        late_s = late_j = 0.0
    rows = [
        {"kind": "unattributed", "busy_s": sums["unattributed_s"], "energy_j": sums["unattributed_j"]},
        {"kind": "unsettled", "busy_s": max(0.0, late_s), "energy_j": max(0.0, late_j)},
        {
            "kind": "idle",
            "seconds": sums["seconds"] - sums["busy_s"] - sums["unknown_s"],
            "energy_j": sums["idle_j"],
        },
        {"kind": "unknown", "seconds": sums["unknown_s"]},
        {"kind": "unrecorded", "energy_j": sums["unrecorded_j"]},
    ]
    frame = pd.DataFrame(rows).reindex(columns=["key", "kind", "processes", *SUMS, "estimated"])
    frame[["busy_s", "energy_j"]] = frame[["busy_s", "energy_j"]].fillna(0.0)
    frame["key"] = frame["kind"].map(GPU_ROWS)
    unknown = (frame["kind"] == "unknown") & (frame["seconds"] > 0.5)
    frame = frame[(frame["energy_j"] > 0.5) | (frame["busy_s"] > 0.5) | unknown]
    return frame.astype(dict.fromkeys((*SUMS, "processes", "estimated"), "float64"))


def trend(engine: Engine, by: Dimension, scope: Scope, keys: Sequence[Any] | None = None) -> pd.DataFrame:
    """The sums of `ranking` by the half hour, without the GPUs' own rows. Where `keys` are given (ids of processes
    or GPUs), all others are one: ALL_OTHERS.

    Columns: timestamp_epoch (the half hour's first second; rows of older versions are of a whole hour), key, and
    the sums as float64.
    """
    key = KEYS[by]
    if keys is not None:
        key = sa.case((key.in_([int(number) for number in keys]), key), else_=ALL_OTHERS)
    query = (
        sa.select(
            process_hours.c.timestamp_epoch,
            key.label("key"),
            *(sa.func.sum(process_hours.c[name]).label(name) for name in SUMS),
        )
        .select_from(_joined(by, scope))
        .where(*scope.hours(process_hours), *scope.processes())
        .group_by(process_hours.c.timestamp_epoch, key)
        .order_by(process_hours.c.timestamp_epoch)
    )
    frame = fetch(engine, query)
    frame[list(SUMS)] = frame[list(SUMS)].astype("float64")
    return frame


TOTALS = tuple(column.name for column in gpu_usage.columns if column.name not in ("timestamp_epoch", "gpu_id"))


def gpu_totals(engine: Engine, scope: Scope) -> pd.DataFrame:
    """The use of each GPU: one row per GPU that was recorded, in the order of hosts and indices.

    Columns: gpu_id, host, gpu_index, mig_index, name, first_seen (of the GPU, also in an import), and the sums of
    `gpu_usage` as float64: seconds recorded = busy_s + held_s + free_s + unknown_s.
    """
    began = sa.select(sa.func.min(imports.c.first)).where(imports.c.gpu_id == gpus.c.id).scalar_subquery()
    query = (
        sa.select(
            gpu_usage.c.gpu_id,
            hosts.c.name.label("host"),
            gpus.c.gpu_index,
            gpus.c.mig_index,
            gpus.c.name,
            sa.case((began < gpus.c.first_seen, began), else_=gpus.c.first_seen).label("first_seen"),
            *(sa.func.sum(gpu_usage.c[name]).label(name) for name in TOTALS),
        )
        .join(gpus, gpus.c.id == gpu_usage.c.gpu_id)
        .join(hosts, hosts.c.id == gpus.c.host_id)
        .where(*scope.hours(gpu_usage))
        .group_by(
            *(gpu_usage.c.gpu_id, gpus.c.id, hosts.c.name),
            *(gpus.c.gpu_index, gpus.c.mig_index, gpus.c.name, gpus.c.first_seen),
        )
        .order_by(hosts.c.name, gpus.c.gpu_index, sa.func.coalesce(gpus.c.mig_index, -1))
    )
    frame = fetch(engine, query)
    frame[[*TOTALS, "mig_index"]] = frame[[*TOTALS, "mig_index"]].astype("float64")
    frame["free_s"] = (frame["seconds"] - frame["busy_s"] - frame["held_s"] - frame["unknown_s"]).clip(lower=0)
    return frame


def gpu_hours(engine: Engine, scope: Scope) -> pd.DataFrame:
    """All chosen GPUs together, by the half hour, of every hour that the range touches.

    Columns: timestamp_epoch, and the sums of `gpu_usage` as float64.
    """
    touched = replace(scope, start=scope.start - scope.start % HOUR_S)
    query = (
        sa.select(gpu_usage.c.timestamp_epoch, *(sa.func.sum(gpu_usage.c[name]).label(name) for name in TOTALS))
        .where(*touched.hours(gpu_usage))
        .group_by(gpu_usage.c.timestamp_epoch)
        .order_by(gpu_usage.c.timestamp_epoch)
    )
    frame = fetch(engine, query)
    frame[list(TOTALS)] = frame[list(TOTALS)].astype("float64")
    return frame


def idle_holders(engine: Engine, scope: Scope, idle_s: float) -> pd.DataFrame:
    """Processes that held memory and did nothing for at least `idle_s` seconds of the range, the longest first.

    One row per process and GPU; graphics alone (a desktop) holds no GPU. Columns: process_id, gpu_id, host,
    gpu_index, mig_index, pid, name, username, kind, memory (MiB: now, or its average where it has ended),
    running, idle_since (UTC seconds; NaN where it is at work or has ended), idle_s (of the range), wasted_mib_s
    (memory times that), and the columns of `programs`.
    """
    idle = (
        sa.select(
            process_hours.c.process_id,
            process_hours.c.gpu_id,
            sa.func.sum(process_hours.c.idle_s).label("idle_s"),
        )
        .where(*scope.hours(process_hours), process_hours.c.idle_s > 0)
        .group_by(process_hours.c.process_id, process_hours.c.gpu_id)
        .subquery()
    )
    same = sa.and_(idle.c.process_id == process_gpus.c.process_id, idle.c.gpu_id == process_gpus.c.gpu_id)
    active = sa.and_(process_gpus.c.active == 1, gpus.c.last_seen == hosts.c.last_seen)
    query = (
        sa.select(
            *(process_gpus.c[name] for name in ("process_id", "gpu_id", "kind", "last_busy", "avg_memory")),
            *(process_gpus.c[name] for name in ("memory", *AT_WORK)),
            sa.case((active, 1), else_=0).label("running"),
            hosts.c.name.label("host"),
            hosts.c.last_seen.label("now"),
            *(gpus.c[name] for name in ("gpu_index", "mig_index")),
            *(gpu_processes.c[name] for name in ("pid", "name", "username", "program_id")),
            idle.c.idle_s,
        )
        .select_from(process_gpus)
        .join(gpus, gpus.c.id == process_gpus.c.gpu_id)
        .join(hosts, hosts.c.id == gpus.c.host_id)
        .join(gpu_processes, gpu_processes.c.id == process_gpus.c.process_id)
        .outerjoin(programs, programs.c.id == gpu_processes.c.program_id)
        .outerjoin(idle, same)
        .where(process_gpus.c.kind != "G", *scope.processes())
        .where(sa.or_(idle.c.idle_s.is_not(None), sa.and_(process_gpus.c.active == 1, active)))
    )
    if scope.gpu_ids is not None:
        query = query.where(process_gpus.c.gpu_id.in_(list(scope.gpu_ids)))
    frame = fetch(engine, query)
    numbers = ["last_busy", "memory", "avg_memory", "idle_s", "mig_index", "now", *AT_WORK]
    frame[numbers] = frame[numbers].astype("float64")
    frame["running"] = frame["running"] == 1
    at_work = (frame[list(AT_WORK)].fillna(0) > 0).any(axis=1)
    for_now = (frame["now"] - frame["last_busy"]).where(frame["running"] & ~at_work)
    frame["idle_since"] = frame["last_busy"].where(for_now >= idle_s)
    # Idle time that is shorter than the setting so far is not added up in the ledger yet.
    in_range = (frame["now"] - frame["last_busy"].clip(lower=scope.first_step)).where(frame["idle_since"].notna())
    frame["idle_s"] = frame["idle_s"].fillna(0).clip(lower=in_range.fillna(0))
    frame = frame[frame["idle_s"] >= idle_s]
    frame["memory"] = frame["memory"].where(frame["running"], frame["avg_memory"]).fillna(frame["avg_memory"])
    frame = frame[frame["memory"].fillna(0) > 0]
    frame["wasted_mib_s"] = frame["idle_s"] * frame["memory"]
    frame = frame.sort_values(["idle_s", "memory"], ascending=False, kind="stable")
    dropped = ["now", "last_busy", "avg_memory", *AT_WORK]
    return with_programs(engine, frame.drop(columns=dropped).reset_index(drop=True))


def labels(engine: Engine, by: Dimension, keys: Sequence[Any]) -> dict[Any, str]:
    """The names of a ranking's keys: of processes "train.py (4711)", of GPUs "rack1 GPU 0"; other keys are names
    themselves."""
    if by == "process":
        query = sa.select(gpu_processes.c.id, gpu_processes.c.name, gpu_processes.c.pid)
        ids = [int(key) for key in keys]
        names_of: dict[Any, str] = {}
        # A database takes a limited number of values in a query, and a year has more processes.
        for first in range(0, len(ids), PIECE):
            found = fetch(engine, query.where(gpu_processes.c.id.in_(ids[first : first + PIECE])))
            called = found["name"].fillna("PID") + " (" + found["pid"].astype(str) + ")"
            names_of |= dict(zip(found["id"].tolist(), called, strict=True))
        return names_of
    if by == "gpu":
        columns = (gpus.c.id, gpus.c.gpu_index, gpus.c.mig_index, hosts.c.name.label("host"))
        found = fetch(engine, sa.select(*columns).join(hosts, hosts.c.id == gpus.c.host_id))
        several = found["host"].nunique() > 1
        names = "GPU " + gpu_labels(found["gpu_index"], found["mig_index"])
        return dict(zip(found["id"], found["host"] + " " + names if several else names, strict=True))
    return {key: str(key) for key in keys if key is not None}
