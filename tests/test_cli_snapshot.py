"""`gpumon snapshot`: one tick, as JSON and for people."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pynvml
import pytest
from cli import gpumon, with_driver
from conftest import PATIENCE_S
from fake_nvml import FakeNvml

GIB = 1 << 30


@pytest.fixture
def environ(tmp_path: Path, fake: FakeNvml) -> dict[str, str]:
    return with_driver(tmp_path / "history", fake)


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
    done = gpumon(environ | {"GPUMON_SOURCE": "nvml"}, "snapshot")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "modprobe nvidia" in done.stderr
    done = gpumon(environ, "snapshot", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["source"] == "demo"
    assert "simulated" in done.stderr
