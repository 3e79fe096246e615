"""`gpumon doctor`: what it finds on this machine and in the database."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli import gpumon, with_driver
from conftest import PATIENCE_S, eventually
from fake_nvml import FakeNvml

from gpumon_core import doctor
from gpumon_core.settings import Settings, load
from gpumon_core.store import database


@pytest.fixture
def environ(tmp_path: Path, fake: FakeNvml) -> dict[str, str]:
    return with_driver(tmp_path / "history", fake)


def test_doctor_names_what_is_there_and_what_is_wrong(
    environ: dict[str, str], fake: FakeNvml, tmp_path: Path
) -> None:
    fake.add_gpu(name="NVIDIA RTX A6000")
    lost = fake.add_gpu()
    good = gpumon(environ, "doctor")
    assert good.returncode == 0, good.stdout
    for text in (
        "driver 580.159.03",
        "NVIDIA RTX A6000",
        str(tmp_path / "history" / "gpumon.db"),
        "PID namespace",
    ):
        assert text in good.stdout
    lost.lost = True
    bad = gpumon(environ, "doctor")
    assert bad.returncode == 1
    assert "PROBLEM" in bad.stdout
    assert "->" in bad.stdout
    fake.driver_loaded = False
    none = gpumon(environ, "doctor")
    assert none.returncode == 1
    assert "modprobe nvidia" in none.stdout


@pytest.mark.parametrize(
    ("sees", "wsl", "verdict"), [(True, False, "ok"), (False, True, "ok"), (False, False, "warning")]
)
def test_doctor_names_the_hosts_pids_as_a_remedy_where_they_are_one(
    monkeypatch: pytest.MonkeyPatch, sees: bool, wsl: bool, verdict: str
) -> None:
    monkeypatch.setattr(doctor, "sees_host_processes", lambda: sees)
    monkeypatch.setattr(doctor, "is_wsl", lambda: wsl)
    found = doctor._pid_namespace()
    assert found.verdict == verdict
    assert ("--pid=host" in found.remedy) == (verdict == "warning")


@pytest.mark.parametrize(("source", "recorded"), [("auto", "demo.db"), ("demo", "demo.db"), ("nvml", "gpumon.db")])
def test_doctor_looks_at_the_database_that_the_recorder_writes(
    environ: dict[str, str], fake: FakeNvml, tmp_path: Path, source: str, recorded: str
) -> None:
    fake.driver_loaded = False
    done = gpumon(environ | {"GPUMON_SOURCE": source}, "doctor")
    assert f"{tmp_path / 'history' / recorded} does not exist yet" in done.stdout


def test_doctor_recognizes_a_database_of_a_newer_gpumon(
    environ: dict[str, str], fake: FakeNvml, tmp_path: Path
) -> None:
    fake.add_gpu()
    engine = database.open_for_writing(f"sqlite:///{tmp_path / 'history' / 'gpumon.db'}")
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    done = gpumon(environ, "doctor")
    assert done.returncode == 1
    assert "was written by a newer gpumon: it has schema 9999" in done.stdout
    assert "Start the newer one again" in done.stdout


@pytest.mark.parametrize("kind", ["foreign", "first page", "a later page"])
def test_doctor_says_what_is_wrong_with_the_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "gpumon.db"
    database.open_for_writing(f"sqlite:///{path}").dispose()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    if kind == "foreign":
        path.write_bytes(b"my thesis")
    else:
        with path.open("r+b") as file:
            file.seek(100 if kind == "first page" else -8192, os.SEEK_SET if kind == "first page" else os.SEEK_END)
            file.write(os.urandom(3000))
    before = path.read_bytes()
    findings = [one for one in doctor.examine(load(data_dir=tmp_path, source="demo")) if one.topic == "database"]
    # The demo has a file of its own.
    assert [one.verdict for one in findings] == ["ok"]
    url = f"sqlite:///{path}"
    (found,) = [
        one
        for one in doctor.examine(load(data_dir=tmp_path, source="nvml", database_url=url))
        if one.topic == "database"
    ]
    assert found.verdict == "problem"
    assert str(path) in found.text
    assert ("is no SQLite database" if kind == "foreign" else "damaged") in found.text or "malformed" in found.text
    assert found.remedy
    assert path.read_bytes() == before


def test_a_page_waits_for_no_examination(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers, is_broken = threading.Event(), [False]
    fine = doctor.Finding("ok", "GPUs", "all there")

    def examine(_: Settings) -> Iterator[doctor.Finding]:
        yield fine
        answers.wait(PATIENCE_S)
        if is_broken[0]:
            raise RuntimeError("no such luck")

    monkeypatch.setattr(doctor, "examine", examine)
    monkeypatch.setattr(doctor, "_examination", None)
    chosen = load(data_dir=tmp_path)
    found = eventually(lambda: (now := doctor.examination(chosen)).findings and now)
    assert found.findings == (fine,)
    assert not found.is_complete
    monkeypatch.setattr(doctor, "PATIENCE_S", 0.0)
    assert found.is_overdue
    answers.set()
    found = eventually(lambda: (now := doctor.examination(chosen)).is_complete and now)
    assert not found.is_overdue
    is_broken[0] = True
    monkeypatch.setattr(doctor, "EXAMINED_FOR_S", 0.0)
    doctor.examination(chosen)
    found = eventually(lambda: (now := doctor._examination) and now.findings[-1].topic == "doctor" and now)
    assert "no such luck" in found.findings[-1].text
