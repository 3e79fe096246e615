"""Settings: what is allowed, where they are read, and what their errors say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cli import gpumon, with_driver
from conftest import ROOT
from fake_nvml import FakeNvml

from gpumon_core.settings import SettingsError, load, mask_password


@pytest.fixture
def environ(tmp_path: Path, fake: FakeNvml) -> dict[str, str]:
    return with_driver(tmp_path / "history", fake)


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
    done = gpumon(environ | {name: value}, "record")
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
    assert "did you mean GPUMON_INTERVAL" in gpumon(environ | {"GPUMON_INTERVALL": "4"}, "snapshot").stderr
