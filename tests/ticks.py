"""Ticks as a recorder hands them to the writer, and what the database then says."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from gpumon_core.attribution.records import ProcessIdentity, Program
from gpumon_core.store import database
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuInfo, GpuReading, HostInfo, ProcessReading, Snapshot

HOST = HostInfo("here", "580.1", "13.0", "13.580.1")
GPUS = tuple(GpuInfo(index, f"GPU-{index}", f"Board {index}", 24576, 300.0) for index in range(3))


def tick(
    now: float,
    processes: dict[tuple[int, int], int | None] | None = None,
    gpus: tuple[GpuInfo, ...] = GPUS,
    lost: frozenset[str] = frozenset(),
    kind: str = "C",
) -> Snapshot:
    """A snapshot; `processes` is (gpu, pid) -> MiB."""
    readings = tuple(
        GpuReading(gpu.uuid, {"temperature": 60.0 + gpu.index, "memory": 1000})
        for gpu in gpus
        if gpu.uuid not in lost
    )
    rows = tuple(
        ProcessReading(f"GPU-{gpu}", pid, kind, memory) for (gpu, pid), memory in (processes or {}).items()
    )
    return Snapshot(now, HOST, gpus, readings, rows, lost)


def who(*pids: int, key: str = "boot:1") -> dict[int, ProcessIdentity]:
    return {pid: ProcessIdentity(pid, key, 1000.0, "train.py", "ada") for pid in pids}


@pytest.fixture
def engine(database_url: str) -> sa.Engine:
    return database.open_for_writing(database_url)


@pytest.fixture
def writer(engine: sa.Engine) -> Writer:
    return Writer(engine, "here", "nvml", 4)


def ask(engine: sa.Engine, query: str) -> list[tuple[object, ...]]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(query)]


def runs(pid: int, program: Program, key: str = "boot:1") -> dict[int, ProcessIdentity]:
    return {pid: ProcessIdentity(pid, key, 1000.0, "train.py", "ada", program)}


def measured(now: float, *, processes: tuple[ProcessReading, ...] = (), **values: float | None) -> Snapshot:
    """A tick of one GPU."""
    return Snapshot(now, HostInfo("here"), GPUS[:1], (GpuReading("GPU-0", values),), processes)


def busy(pid: int, memory: int, sm: int | None = None) -> ProcessReading:
    return ProcessReading("GPU-0", pid, "C", memory, sm, None, None, None)
