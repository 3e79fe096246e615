"""The command line and setup.sh, as somebody at a terminal meets them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import cli
import pynvml
import pytest
from conftest import PATIENCE_S, ROOT, eventually
from fake_nvml import FakeNvml, environment

from gpumon_core import doctor
from gpumon_core.settings import SettingsError, load, mask_password
from gpumon_core.store import database

GIB = 1 << 30


@pytest.fixture
def environ(tmp_path: Path, fake: FakeNvml) -> dict[str, str]:
    return {
        **os.environ,
        **environment(fake),
        "GPUMON_DATA_DIR": str(tmp_path / "history"),
        "GPUMON_HOST_NAME": "box",
    }


def gpumon(environ: dict[str, str], *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return cli.gpumon(environ | settings, *arguments)


def test_snapshot_prints_one_tick_as_json(environ: dict[str, str], fake: FakeNvml) -> None:
    gpu = fake.add_gpu(name="NVIDIA RTX A6000", temperature=61, fan=None)
    gpu.add_process(os.getpid(), 3 * GIB)
    done = gpumon(environ, "snapshot", "--json")
    assert done.returncode == 0, done.stderr
    tick = json.loads(done.stdout)
    assert (tick["source"], tick["host"]["driver_version"]) == ("nvml", "580.159.03")
    [shown] = tick["gpus"]
    assert (shown["name"], shown["temperature"], shown["fan_speed"]) == ("NVIDIA RTX A6000", 61, None)
    [process] = tick["processes"]
    assert (process["pid"], process["memory_mib"], process["type"]) == (os.getpid(), 3072, "C")
    assert process["name"]
    assert process["user"]
    assert abs(tick["timestamp_epoch"] - time.time()) < 2 * PATIENCE_S


def test_snapshot_has_what_is_measured_between_two_readings(environ: dict[str, str], fake: FakeNvml) -> None:
    fake.add_gpu(name="NVIDIA RTX A6000")
    assert gpumon(environ, "snapshot").returncode == 0
    assert fake.calls("nvmlDeviceGetPowerUsage") == 1
    hopper = fake.add_gpu(name="NVIDIA H100 80GB HBM3", gpm_supported=1)
    hopper.set_gpm(pynvml.NVML_GPM_METRIC_SM_UTIL, 82.5)
    tick = json.loads(gpumon(environ, "snapshot", "--json").stdout)
    assert [gpu["sm_activity"] for gpu in tick["gpus"]] == [None, 82.5]


def test_snapshot_for_people_is_aligned_text(environ: dict[str, str], fake: FakeNvml) -> None:
    fake.add_gpu(name="NVIDIA RTX A6000", fan=None)
    lines = gpumon(environ, "snapshot").stdout.splitlines()
    assert lines[0].startswith("box  driver 580.159.03")
    assert lines[3].startswith("0    NVIDIA RTX A6000")
    assert "–" in lines[3]
    assert lines[-1] == "No process is using a GPU."


def test_without_a_driver_nvml_is_one_sentence_and_auto_says_that_it_simulates(
    environ: dict[str, str], fake: FakeNvml
) -> None:
    fake.driver_loaded = False
    done = gpumon(environ, "snapshot", GPUMON_SOURCE="nvml")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "modprobe nvidia" in done.stderr
    done = gpumon(environ, "snapshot", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["source"] == "demo"
    assert "simulated" in done.stderr


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("GPUMON_INTERVAL", "0", "1 to 3600"),
        ("GPUMON_INTERVAL", "nan", "1 to 3600"),
        ("GPUMON_INTERVAL", "often", "1 to 3600"),
        ("GPUMON_SOURCE", "amd", "nvml"),
        ("GPUMON_RECORD", "maybe", "true"),
        ("GPUMON_LOG_LEVEL", "LOUD", "WARNING"),
        ("GPUMON_RETENTION_RAW_DAYS", "-1", "0.05 to 3650"),
        ("GPUMON_DATABASE_URL", "mysql://u:geheim@db/gpumon", "sqlite:///"),
        ("GPUMON_DATABASE_URL", "postgresql+asyncpg://u:geheim@db/gpumon", "postgresql+psycopg://"),
        ("GPUMON_DATABASE_URL", "postgresql://u:geheim@db:often/gpumon", "%40"),
        ("GPUMON_DATABASE_URL", "sqlite:///:memory:", "name a file"),
        ("GPUMON_DATA_DIR", "/proc/nowhere", "write"),
    ],
)
def test_a_wrong_setting_is_one_line_with_name_value_and_what_is_allowed(
    environ: dict[str, str], name: str, value: str, allowed: str
) -> None:
    done = gpumon(environ, "record", **{name: value})
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert f"{name}={value.replace('geheim', '***')}" in line
    assert allowed in line
    assert "geheim" not in line


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_a_postgresql_url_is_taken_as_other_tools_write_it(scheme: str) -> None:
    rest = "://u:p%40ss@db:5433/gpumon?sslmode=require"
    assert load(database_url=scheme + rest).real_database_url == "postgresql+psycopg" + rest


@pytest.mark.parametrize(
    "password", ["geheim", "ge@geheim", "geheim/geheim", "geheim:geheim", "geheim@geheim@geheim", "?geheim"]
)
def test_no_part_of_a_password_is_shown(password: str) -> None:
    assert mask_password(f"postgresql://u:{password}@db/gpumon") == "postgresql://u:***@db/gpumon"
    assert mask_password(f"mysql://db/gpumon?password={password}&x=1") == "mysql://db/gpumon?password=***&x=1"
    with pytest.raises(SettingsError) as caught:
        load(database_url=f"postgresql://u:{password}@db:often/gpumon")
    assert "geheim" not in str(caught.value)


def test_settings_are_read_from_dotenv_and_the_environment_wins(tmp_path: Path, environ: dict[str, str]) -> None:
    (tmp_path / ".env").write_text("GPUMON_INTERVAL=7\nGPUMON_HOST_NAME=from-file\n")
    code = "from gpumon_core.settings import load; s = load(); print(s.interval, s.host_name, s.source)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environ | {"PYTHONPATH": str(ROOT), "GPUMON_SOURCE": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["7.0", "box", "auto"]


def test_a_misspelt_setting_is_named_with_the_likely_one(environ: dict[str, str], fake: FakeNvml) -> None:
    fake.add_gpu()
    assert "did you mean GPUMON_INTERVAL" in gpumon(environ, "snapshot", GPUMON_INTERVALL="4").stderr


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
    command = [sys.executable, "-m", "gpumon_core", "record"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environ | {"GPUMON_INTERVAL": "1"}, stderr=subprocess.PIPE, text=True
    ) as recorder:
        eventually(lambda: committed(tmp_path / "history" / "gpumon.db") >= 2)
        recorder.send_signal(number)
        _, log = recorder.communicate(timeout=PATIENCE_S)
    assert recorder.returncode == 0
    assert log.rstrip().endswith("recorder stopped")
    assert committed(tmp_path / "history" / "gpumon.db") >= 2


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


def test_doctor_tells_a_database_of_a_newer_gpumon(
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


@pytest.mark.parametrize(
    "arguments", [["--help"], ["record", "--help"], ["snapshot", "--help"], ["doctor", "--help"]]
)
def test_every_verb_explains_itself(environ: dict[str, str], arguments: list[str]) -> None:
    done = gpumon(environ, *arguments)
    assert done.returncode == 0
    assert "usage:" in done.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """setup.sh in a folder of its own, with nothing installed."""
    shutil.copy(ROOT / "setup.sh", tmp_path)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    shutil.copytree(ROOT / ".streamlit", tmp_path / ".streamlit")
    (tmp_path / "bin").mkdir()
    for program in ("bash", "dirname", "cat", "cksum", "tr", "rm", "touch", "env", "id"):
        found = shutil.which(program)
        assert found
        (tmp_path / "bin" / program).symlink_to(found)
    return tmp_path


def setup(tree: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tree / "setup.sh", *arguments],
        env={"PATH": str(tree / "bin"), "HOME": str(tree), **more},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def program(tree: Path, name: str, script: str) -> None:
    path = tree / "bin" / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def test_setup_explains_each_verb(tree: Path) -> None:
    for arguments in ((), ("--help",)):
        done = setup(tree, *arguments)
        assert done.returncode == 0
        for verb in ("run", "demo", "test", "clean"):
            assert f"  {verb} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "python", "sentence"),
    [
        (("dance",), None, "there is no verb 'dance'"),
        (("run",), None, "python3 is not installed"),
        (("run",), 'if [ "$1" = -c ]; then exit 1; else echo "Python 3.9.2"; fi', "needs Python 3.11 or newer"),
        (("run",), 'case "$2" in *ensurepip*) exit 1 ;; esac', "venv module is missing"),
    ],
)
def test_setup_fails_in_one_clear_sentence(
    tree: Path, arguments: tuple[str, ...], python: str | None, sentence: str
) -> None:
    if python is not None:
        program(tree, "python3", python)
    done = setup(tree, *arguments)
    assert done.returncode != 0
    [line] = done.stderr.splitlines()
    assert line.startswith("setup.sh: ")
    assert sentence in line


def test_setup_names_a_taken_port(tree: Path) -> None:
    (tree / ".venv").symlink_to(Path(sys.executable).parent.parent)
    installed = subprocess.run(
        ["bash", "-c", "cat requirements*.txt | cksum | tr -d ' '"],
        cwd=tree,
        capture_output=True,
        text=True,
        check=True,
    )
    (tree / ".venv").unlink()
    (tree / ".venv" / "bin").mkdir(parents=True)
    (tree / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tree / ".venv" / f".installed-requirements.txt-{installed.stdout.strip()}").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, more in ((("--server.port", port), {}), ((), {"STREAMLIT_SERVER_PORT": port})):
            done = setup(tree, "run", *arguments, **more)
            assert done.returncode == 1
            [line] = done.stderr.splitlines()
            assert f"127.0.0.1:{port} cannot be served" in line
    assert "is not a port" in setup(tree, "run", "--server.port", "http").stderr
