"""`gpumon import` as somebody at a terminal meets it, also killed, and beside a recorder."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import importing
import pynvml
import pytest
import sqlalchemy as sa
from conftest import PATIENCE_S, ROOT, Server
from fake_nvml import FakeNvml, environment, loaded
from importing import NOW, span
from originals import OriginalFile
from ticks import ask

from gpumon_core.__main__ import main
from gpumon_core.legacy_import import importer
from gpumon_core.legacy_import.import_records import ImportRefused
from gpumon_core.settings import Settings
from gpumon_core.store import database

# The fixtures that these tests share.
engine, settings, file = importing.engine, importing.settings, importing.file


@pytest.fixture
def environ(tmp_path: Path, fake: FakeNvml) -> dict[str, str]:
    ours = {"GPUMON_DATA_DIR": str(tmp_path / "history"), "GPUMON_HOST_NAME": "here", "GPUMON_INTERVAL": "1"}
    return {**os.environ, **environment(fake), **ours}


def gpumon(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpumon_core", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def test_on_a_new_installation_the_driver_says_which_gpus_there_are(
    environ: dict[str, str], fake: FakeNvml, tmp_path: Path
) -> None:
    fake.add_gpu(name="NVIDIA RTX A6000")
    file = OriginalFile(tmp_path / "gpu_metrics.db")
    now = int(time.time())
    # Up to this moment, and gpumon is to take a tick a minute: what the driver says now is no tick of that.
    environ["GPUMON_INTERVAL"] = "60"
    file.ticks(range(now - 4000, now, 4))
    file.seen(7, "train", range(now - 4000, now, 4))
    dry = gpumon(environ, "import", str(file.path), "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "Would be taken: 1,000 ticks, 1 processes, 1,000 process snapshots. Nothing was changed." in dry.stdout
    assert not (tmp_path / "history").exists()
    done = gpumon(environ, "import", str(file.path))
    assert done.returncode == 0, done.stderr
    assert "it is about GPU 0, NVIDIA RTX A6000, GPU-" in done.stdout
    assert "Taken: 1,000 ticks, 1 processes, 1,000 process snapshots, in " in done.stdout
    again = gpumon(environ, "import", str(file.path))
    assert (
        "Nothing in it is new.\nLeft out:\n  1,000 ticks, 1,000 process snapshots: imported before\n"
        in again.stdout
    )


def test_without_gpus_it_says_what_comes_first(environ: dict[str, str], fake: FakeNvml, tmp_path: Path) -> None:
    fake.driver_loaded = False
    file = OriginalFile(tmp_path / "gpu_metrics.db")
    file.ticks(span(40))
    done = gpumon(environ, "import", str(file.path))
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "gpumon has recorded no GPU of here yet" in line
    assert "start gpumon" in line


def test_a_driver_that_fails_when_asked_is_reported_in_whole_sentences(
    environ: dict[str, str], fake: FakeNvml, tmp_path: Path
) -> None:
    fake.add_gpu()
    fake.fail("nvmlDeviceGetUtilizationRates", pynvml.NVML_ERROR_UNINITIALIZED)
    file = OriginalFile(tmp_path / "gpu_metrics.db")
    file.ticks(span(40))
    done = gpumon(environ, "import", str(file.path))
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "the driver does not say which GPUs there are" in line
    assert line.endswith(".")
    assert not line.endswith("..")


def test_where_there_are_several_gpus_it_lists_them_and_asks(
    environ: dict[str, str], fake: FakeNvml, tmp_path: Path
) -> None:
    fake.add_gpu(name="NVIDIA RTX A6000")
    fake.add_gpu(name="NVIDIA A100")
    file = OriginalFile(tmp_path / "gpu_metrics.db")
    now = int(time.time())
    file.ticks(range(now - 400, now - 60, 4))
    done = gpumon(environ, "import", str(file.path))
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert "GPU 0, NVIDIA RTX A6000, GPU-" in line
    assert "GPU 1, NVIDIA A100, GPU-" in line
    assert "Choose with --gpu GPU-" in line
    assert ". (see" not in line
    assert gpumon(environ, "import", str(file.path), "--gpu", "1").returncode == 0


def test_an_import_that_is_refused_makes_no_database(
    environ: dict[str, str], fake: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add_gpu()
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    # This process ends by its own rules.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    file = OriginalFile(tmp_path / "gpu_metrics.db")
    file.ticks(range(int(time.time()) - 400, int(time.time()) - 60, 4))
    other = tmp_path / "other.db"
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE things (a)")
    text = tmp_path / "notes.txt"
    text.write_text("no database")
    folder = Path(environ["GPUMON_DATA_DIR"])
    left = sorted(folder.rglob("*"))
    for words in (
        (other,),
        (text,),
        (tmp_path / "none.db",),
        (file.path, "--gpu", "7"),
        (file.path, "--gpu", "3=0"),
    ):
        with loaded(fake):
            assert main(["import", *map(str, words)]) in (1, 2), words
        assert sorted(folder.rglob("*")) == left, words
    with loaded(fake):
        assert main(["import", str(file.path), "--gpu", "0"]) == 0
    assert (folder / "gpumon.db").is_file()


# The command, killed with everything ready for a commit that follows one with ticks in it.
KILLED_HALFWAY = """
import os, signal, sys
import sqlalchemy as sa
from gpumon_core.__main__ import main

ticks = 0

@sa.event.listens_for(sa.Engine, "commit")
def commit(connection):
    global ticks
    if ticks:
        os.kill(os.getpid(), signal.SIGKILL)
    if sa.inspect(connection).has_table("imports"):
        ticks = connection.exec_driver_sql("SELECT sum(ticks) FROM imports").scalar() or 0

main(["import", sys.argv[1]])
"""


def test_a_killed_import_is_completed_by_the_next_while_a_recorder_works(
    serve: Callable[..., Server], environ: dict[str, str], fake: FakeNvml, tmp_path: Path
) -> None:
    fake.add_gpu()
    server = serve(fake, GPUMON_HOST_NAME="here").ready()
    file = OriginalFile(tmp_path / "gpu_metrics.db")
    now = int(time.time())
    times = range(now - 30_000, now - 60, 2)
    file.ticks(times)
    for pid in (7, 8, 9):
        with file.connection:
            file.connection.executemany(
                "INSERT INTO process_snapshots VALUES (NULL, ?, ?, ?, ?)",
                [(at, pid, "train", 500.0 + at % 50) for at in times],
            )
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_HALFWAY, str(file.path)], cwd=ROOT, env=environ, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    reader = database.open_for_reading(f"sqlite:///{tmp_path / 'history' / 'gpumon.db'}")
    assert ask(reader, "PRAGMA integrity_check") == [("ok",)]
    [(before,)] = ask(reader, "SELECT sum(ticks) FROM imports")
    assert 0 < before < len(times)
    done = gpumon(environ, "import", str(file.path))
    assert done.returncode == 0, done.stderr
    assert ask(reader, "SELECT sum(ticks) FROM imports") == [(len(times),)]
    assert (
        ask(reader, "SELECT sample_count FROM gpu_processes WHERE start_key LIKE 'imported %'")
        == [(len(times),)] * 3
    )
    assert gpumon(environ, "import", str(file.path)).stdout.count("Nothing in it is new.") == 1
    server.wait(lambda status, _: status == 200)
    server.stop()
    assert "database does not take ticks" not in server.log.read_text()


def test_two_imports_at_once_are_one_after_the_other(
    engine: sa.Engine, settings: Settings, file: OriginalFile
) -> None:
    file.ticks(span(400))
    with importer._import_lock(settings.real_database_url, "here", False):
        refused = []

        def other() -> None:
            with pytest.raises(ImportRefused) as caught:
                importer.run(settings, file.path, now=NOW)
            refused.append(str(caught.value))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "importing into" in refused[0]
    assert importer.run(settings, file.path, now=NOW).taken["ticks"] == 100
