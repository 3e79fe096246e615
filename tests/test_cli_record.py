"""`gpumon record`: it records without a server, and ends cleanly."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
from cli import PROGRAM, with_driver
from conftest import PATIENCE_S, ROOT, eventually
from fake_nvml import FakeNvml


@pytest.fixture
def environ(tmp_path: Path, fake: FakeNvml) -> dict[str, str]:
    return with_driver(tmp_path / "history", fake)


def committed(path: Path) -> int:
    """How many samples a recorder has written so far."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=PATIENCE_S)) as connection:
            return int(connection.execute("SELECT count(*) FROM gpu_metrics").fetchone()[0])
    except sqlite3.OperationalError:
        # It is about to be made.
        return 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_record_alone_commits_its_ticks_and_ends_cleanly(
    environ: dict[str, str], fake: FakeNvml, tmp_path: Path, number: signal.Signals
) -> None:
    fake.add_gpu()
    command = [*PROGRAM, "record"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environ | {"GPUMON_INTERVAL": "1"}, stderr=subprocess.PIPE, text=True
    ) as recorder:
        eventually(lambda: committed(tmp_path / "history" / "gpumon.db") >= 2)
        recorder.send_signal(number)
        _, log = recorder.communicate(timeout=PATIENCE_S)
    assert recorder.returncode == 0
    assert log.rstrip().endswith("recorder stopped")
    assert committed(tmp_path / "history" / "gpumon.db") >= 2
