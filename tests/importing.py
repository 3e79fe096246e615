"""gpumon's own ticks and the original's files side by side: what the tests of the import share."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import sqlalchemy as sa
from originals import INTERVAL_S, OriginalFile
from ticks import ask

from gpumon_core.settings import Settings, load
from gpumon_core.store import database
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuInfo, GpuReading, HostInfo, ProcessReading, Snapshot

HOUR = 3600
DAY = 86400
NOW = 1_790_000_000 - 1_790_000_000 % HOUR + 1800
GPUS = tuple(GpuInfo(index, f"GPU-{index}{index}", f"Board {index}", 24576) for index in range(2))


def record(engine: sa.Engine, times: range, gpus: tuple[GpuInfo, ...] = GPUS[:1], pid: int | None = None) -> None:
    """gpumon's own ticks: power 200 W, busy at 10 %."""
    own = Writer(engine, "here", "nvml", INTERVAL_S)
    values = {"temperature": 40.0, "utilization": 10.0, "memory": 2000, "power": 200.0}
    there = () if pid is None else (ProcessReading(gpus[0].uuid, pid, "C", 700),)
    own.write_all(
        [
            (Snapshot(at, HostInfo("here"), gpus, tuple(GpuReading(gpu.uuid, values) for gpu in gpus), there), {})
            for at in times
        ]
    )
    own.settle()


@pytest.fixture
def engine(database_url: str) -> sa.Engine:
    """A database in which gpumon has taken one tick of one GPU, just now."""
    made = database.open_for_writing(database_url)
    record(made, range(NOW, NOW + 1))
    return made


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return load(database_url=database_url, data_dir=tmp_path, host_name="here")


@pytest.fixture
def file(tmp_path: Path) -> OriginalFile:
    return OriginalFile(tmp_path / "gpu_metrics.db")


def everything(engine: sa.Engine) -> dict[str, list[tuple[object, ...]]]:
    """All that a reader can see, but for when it was imported."""
    tables = sa.inspect(engine).get_table_names()
    left_out = ("alembic_version",)
    return {
        table: sorted(ask(engine, f"SELECT * FROM {table}"), key=repr) for table in tables if table not in left_out
    }


def span(length: int, until: int = NOW - 60) -> range:
    return range(until - length, until, INTERVAL_S)


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
