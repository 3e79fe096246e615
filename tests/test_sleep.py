"""A GPU that switches itself off while nothing uses it is not asked, and is let fall asleep."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import fake_nvml
import pytest
import sqlalchemy as sa
from fake_nvml import FakeGpu, FakeNvml

from gpumon_core import doctor
from gpumon_core.export import snapshot as export
from gpumon_core.recording import health
from gpumon_core.recording.state import State
from gpumon_core.settings import Settings, load
from gpumon_core.store import database
from gpumon_core.store.queries import current
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry import sleep as sleeping
from gpumon_core.telemetry.nvml import NvmlSource
from gpumon_core.telemetry.records import SourceUnavailable
from gpumon_core.telemetry.sleep import IDLE_S, LONGEST_PAUSE_S, PATIENCE_S, PAUSE_S, Mode, Sleep
from pages.components import cards

STEP_S = 4.0
MIB = 2**20


class Kernel:
    """The files of a machine with GPUs of its own, and a clock that goes when it is said to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.time = 1000.0

    def sleep(self, mode: Mode = "auto") -> Sleep:
        return Sleep(mode, self.root / "sys", self.root / "proc", clock=lambda: self.time)

    def add(self, number: int, d3: str | None = "Enabled (coarse-grained)", control: str = "auto") -> None:
        name = f"0000:{number:02x}:00.0"
        self.write(f"sys/bus/pci/devices/{name}/vendor", "0x10de\n")
        self.write(f"sys/bus/pci/devices/{name}/class", "0x030200\n")
        self.write(f"sys/bus/pci/devices/{name}/power/control", control + "\n")
        self.set(number, "active")
        if d3 is not None:
            text = f"Runtime D3 status:          {d3}\nVideo Memory:               Active\n"
            self.write(f"proc/driver/nvidia/gpus/{name}/power", text)

    def set(self, number: int, status: str) -> None:
        self.write(f"sys/bus/pci/devices/0000:{number:02x}:00.0/power/runtime_status", status + "\n")

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)


class Laptop(SimpleNamespace):
    fake: FakeNvml
    kernel: Kernel
    begin: Callable[..., NvmlSource]


@pytest.fixture
def laptop(tmp_path: Path) -> Iterator[Laptop]:
    fake, kernel = FakeNvml(tmp_path / "nvml"), Kernel(tmp_path)
    sources: list[NvmlSource] = []

    def begin(mode: Mode = "auto") -> NvmlSource:
        sources.append(NvmlSource("laptop", clock=lambda: kernel.time, sleep=kernel.sleep(mode)))
        return sources[-1]

    with fake_nvml.loaded(fake):
        yield Laptop(fake=fake, kernel=kernel, begin=begin)
        for source in sources:
            source.close()


def add(laptop: Laptop, number: int = 1, **facts: str | None) -> FakeGpu:
    """A GPU of the driver and the kernel; the fake's bus numbers begin with 1."""
    laptop.kernel.add(number, **facts)  # type: ignore[arg-type]
    return laptop.fake.add_gpu(uuid=f"GPU-{number}", name="NVIDIA GeForce RTX 4060 Laptop GPU")


def states(laptop: Laptop, source: NvmlSource, seconds: float) -> list[str]:
    """The first GPU's state at every tick of some time."""
    found = []
    until = laptop.kernel.time + seconds
    while laptop.kernel.time < until:
        found.append(source.read().state_of("GPU-1"))
        laptop.kernel.time += STEP_S
    return found


def asked(laptop: Laptop, gpu: FakeGpu) -> int:
    """How many calls have reached a GPU, those that look for its handle included."""
    return sum(laptop.fake.calls(function, gpu) for function in fake_nvml.functions())


def fall_asleep(laptop: Laptop, source: NvmlSource, number: int = 1) -> None:
    """Let time go by until the source is quiet, and the kernel switches the GPU off."""
    assert states(laptop, source, IDLE_S + 3 * STEP_S)[-1] == "quiet"
    laptop.kernel.set(number, "suspended")


def test_not_one_call_reaches_a_sleeping_gpu(laptop: Laptop) -> None:
    gpu = add(laptop)
    source = laptop.begin()
    assert source.read().state_of("GPU-1") == "ok"
    fall_asleep(laptop, source)
    laptop.fake.reset_calls()
    # Longer than the driver is asked for GPUs that were added, and for facts that changed.
    assert set(states(laptop, source, 600)) == {"asleep"}
    source.process_name(1)
    assert asked(laptop, gpu) == 0
    assert laptop.fake.total_calls() == 0, "a session may keep it awake: there is none"


def test_who_leaves_a_gpu_alone_has_no_session_that_holds_it(laptop: Laptop) -> None:
    add(laptop)
    other = add(laptop, 2, d3="Not supported")
    other.gpu_utilization = 70
    source = laptop.begin()
    source.read()
    laptop.fake.reset_calls()
    found = states(laptop, source, IDLE_S + 3 * STEP_S)
    assert found[-1] == "quiet"
    assert laptop.fake.calls("nvmlShutdown") == 1, "an open handle would keep it awake"


def test_a_gpu_that_was_off_before_is_woken_by_the_start_alone(laptop: Laptop) -> None:
    gpu = add(laptop)
    source = laptop.begin()
    laptop.kernel.set(1, "suspended")
    source.read()
    laptop.fake.reset_calls()
    assert set(states(laptop, source, 300)) == {"asleep"}
    assert asked(laptop, gpu) == 0


def test_a_sleeping_gpu_is_listed_with_its_facts_and_has_no_reading(laptop: Laptop) -> None:
    add(laptop)
    source = laptop.begin()
    before = source.read()
    fall_asleep(laptop, source)
    snapshot = source.read()
    assert snapshot.gpus == before.gpus
    assert snapshot.host == before.host
    assert snapshot.asleep == {"GPU-1"}
    assert [*snapshot.readings, *snapshot.processes, *snapshot.lost, *snapshot.quiet] == []
    [shown] = export.as_json(snapshot, {}, "nvml")["gpus"]
    assert (shown["state"], shown["power"], shown["utilization"]) == ("asleep", None, None)
    assert "asleep" in export.as_text(snapshot, {}, "nvml")


def test_a_gpu_that_somebody_uses_again_is_asked_again(laptop: Laptop) -> None:
    gpu = add(laptop)
    source = laptop.begin()
    source.read()
    fall_asleep(laptop, source)
    assert states(laptop, source, 60)[-1] == "asleep"
    laptop.kernel.set(1, "active")
    gpu.gpu_utilization = 80
    gpu.add_process(100, 900 * MIB)
    snapshot = source.read()
    assert snapshot.state_of("GPU-1") == "ok"
    assert snapshot.readings[0].values["memory"] is not None
    assert [process.pid for process in snapshot.processes] == [100]
    assert set(states(laptop, source, 3600)) == {"ok"}, "it works"


def test_a_gpu_that_does_not_fall_asleep_is_asked_again_and_left_alone_ever_less(laptop: Laptop) -> None:
    add(laptop)
    found = states(laptop, laptop.begin(), 100_000)
    starts = [place for place in range(1, len(found)) if found[place] == "quiet" != found[place - 1]]
    lengths = [found[start:].index("ok") * STEP_S for start in starts[:-1]]
    assert all(PATIENCE_S <= length <= PATIENCE_S + 2 * STEP_S for length in lengths)
    pauses = [(later - start) * STEP_S for start, later in pairwise(starts)]
    assert PAUSE_S <= pauses[0] <= PAUSE_S + IDLE_S + PATIENCE_S
    assert all(later > 1.5 * pause for pause, later in pairwise(pauses[:6]))
    assert max(pauses) <= LONGEST_PAUSE_S + IDLE_S + PATIENCE_S + 2 * STEP_S


def test_work_now_and_then_is_no_reason_to_leave_a_gpu_alone_more_often(laptop: Laptop) -> None:
    gpu = add(laptop)
    source = laptop.begin()
    quiet = 0
    for _ in range(60):
        quiet += states(laptop, source, 4 * 60).count("quiet") > 0
        gpu.gpu_utilization = 20
        states(laptop, source, 60)
        gpu.gpu_utilization = 0
    assert quiet <= 5, "in five hours, of a GPU that drives a display"


def test_it_is_left_alone_for_longer_than_the_kernel_waits(laptop: Laptop) -> None:
    add(laptop)
    laptop.kernel.write("sys/bus/pci/devices/0000:01:00.0/power/autosuspend_delay_ms", "100000\n")
    found = states(laptop, laptop.begin(), 600)
    assert found.count("quiet") * STEP_S > 100


@pytest.mark.parametrize(
    ("kind", "d3", "expected"),
    [
        ("C", "Enabled (coarse-grained)", "ok"),
        ("C", "Enabled (fine-grained)", "ok"),
        ("M", "Enabled (fine-grained)", "ok"),
        ("G", "Enabled (coarse-grained)", "ok"),
        ("G", "Enabled (fine-grained)", "quiet"),
    ],
)
def test_who_holds_a_gpu_keeps_it_asked_but_a_desktop_that_the_driver_lets_sleep(
    laptop: Laptop, kind: fake_nvml.devices.Kind, d3: str, expected: str
) -> None:
    add(laptop, d3=d3).add_process(100, 4 * MIB, kind)
    assert states(laptop, laptop.begin(), IDLE_S + 3 * STEP_S)[-1] == expected


@pytest.mark.parametrize("field", ["gpu_utilization", "encoder_utilization", "decoder_utilization"])
@pytest.mark.parametrize("value", [3, None])
def test_a_gpu_at_work_or_that_does_not_say_is_asked(laptop: Laptop, field: str, value: int | None) -> None:
    gpu = add(laptop)
    setattr(gpu, field, value)
    quiet = value is None and field != "gpu_utilization"
    assert states(laptop, laptop.begin(), IDLE_S + 3 * STEP_S)[-1] == ("quiet" if quiet else "ok")


@pytest.mark.parametrize(
    ("mode", "d3", "control", "expected"),
    [
        ("auto", "Enabled (fine-grained)", "auto", "quiet"),
        ("auto", "Enabled (coarse-grained)", "auto", "quiet"),
        ("auto", "Enabled (fine-grained)", "on", "ok"),
        ("auto", "Disabled by default", "auto", "ok"),
        ("auto", "Not supported", "auto", "ok"),
        ("auto", "?", "auto", "ok"),
        ("auto", None, "auto", "ok"),
        ("true", None, "auto", "quiet"),
        ("true", None, "on", "ok"),
        ("false", "Enabled (fine-grained)", "auto", "ok"),
    ],
)
def test_which_gpus_are_let_sleep(laptop: Laptop, mode: Mode, d3: str | None, control: str, expected: str) -> None:
    add(laptop, d3=d3, control=control)
    assert states(laptop, laptop.begin(mode), IDLE_S + 3 * STEP_S)[-1] == expected


@pytest.mark.parametrize(("mode", "expected"), [("auto", "asleep"), ("true", "asleep"), ("false", "ok")])
def test_a_gpu_that_is_off_is_left_alone_unless_the_user_wants_it_asked(
    laptop: Laptop, mode: Mode, expected: str
) -> None:
    add(laptop, d3=None)
    source = laptop.begin(mode)
    laptop.kernel.set(1, "suspended")
    assert source.read().state_of("GPU-1") == expected


@pytest.mark.parametrize("status", ["active", "resuming", "unsupported", "error", "", "\0garbage", None])
def test_a_kernel_that_says_nothing_of_sleep_lets_the_gpu_be_asked(laptop: Laptop, status: str | None) -> None:
    add(laptop)
    source = laptop.begin()
    if status is None:
        (laptop.kernel.root / "sys/bus/pci/devices/0000:01:00.0/power/runtime_status").unlink()
    else:
        laptop.kernel.set(1, status)
    assert source.read().state_of("GPU-1") == "ok"


def test_another_device_at_that_place_is_not_the_gpu(laptop: Laptop) -> None:
    add(laptop)
    laptop.kernel.write("sys/bus/pci/devices/0000:01:00.0/vendor", "0x8086\n")
    laptop.kernel.set(1, "suspended")
    assert laptop.begin().read().state_of("GPU-1") == "ok"


def test_beside_a_sleeping_gpu_the_others_go_on(laptop: Laptop) -> None:
    gpu, other = add(laptop), add(laptop, 2, d3="Not supported")
    other.gpu_utilization = 70
    source = laptop.begin()
    source.read()
    fall_asleep(laptop, source)
    laptop.fake.reset_calls()
    for _ in range(100):
        snapshot = source.read()
        assert [reading.uuid for reading in snapshot.readings] == ["GPU-2"]
        assert [info.uuid for info in snapshot.gpus] == ["GPU-1", "GPU-2"]
        assert (snapshot.state_of("GPU-1"), snapshot.state_of("GPU-2")) == ("asleep", "ok")
        laptop.kernel.time += STEP_S
    assert asked(laptop, gpu) == 0
    laptop.kernel.set(1, "active")
    snapshot = source.read()
    assert {reading.uuid for reading in snapshot.readings} == {"GPU-1", "GPU-2"}
    assert [info.uuid for info in snapshot.gpus] == ["GPU-1", "GPU-2"]


def test_two_that_sleep_wake_one_by_one(laptop: Laptop) -> None:
    first, second = add(laptop), add(laptop, 2)
    source = laptop.begin()
    source.read()
    fall_asleep(laptop, source)
    laptop.kernel.set(2, "suspended")
    assert source.read().asleep == {"GPU-1", "GPU-2"}
    laptop.fake.reset_calls()
    laptop.kernel.set(2, "active")
    snapshot = source.read()
    assert (snapshot.state_of("GPU-1"), snapshot.state_of("GPU-2")) == ("asleep", "ok")
    assert [reading.uuid for reading in snapshot.readings] == ["GPU-2"]
    assert asked(laptop, first) == 0
    assert asked(laptop, second) > 0


def test_the_look_for_new_gpus_wakes_none(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpumon_core.telemetry.nvml.RECOUNT_S", 0.0)
    gpu, _ = add(laptop), add(laptop, 2, d3=None)
    source = laptop.begin()
    source.read()
    fall_asleep(laptop, source)
    source.read()
    laptop.fake.reset_calls()
    assert set(states(laptop, source, 100)) == {"asleep"}
    assert laptop.fake.calls("nvmlDeviceGetCount_v2") > 0, "it was looked"
    assert asked(laptop, gpu) == 0


def test_a_gpu_whose_driver_is_unloaded_is_not_asleep(laptop: Laptop) -> None:
    add(laptop)
    driver = laptop.kernel.root / "sys/bus/pci/devices/0000:01:00.0/driver"
    driver.symlink_to("../../../bus/pci/drivers/nvidia")
    source = laptop.begin()
    source.read()
    fall_asleep(laptop, source)
    assert source.read().state_of("GPU-1") == "asleep"
    driver.unlink()
    laptop.fake.driver_loaded = False
    with pytest.raises(SourceUnavailable):
        source.read()


def test_a_lost_gpu_is_lost_and_not_asleep(laptop: Laptop) -> None:
    gpu = add(laptop)
    source = laptop.begin()
    source.read()
    gpu.lost = True
    source.read()
    laptop.kernel.set(1, "suspended")
    assert source.read().state_of("GPU-1") == "lost"


# ---- What is recorded and shown ----------------------------------------------------------------------


def test_a_sleeping_gpu_has_no_rows_no_power_and_is_no_trouble(laptop: Laptop, tmp_path: Path) -> None:
    add(laptop)
    engine = database.open_for_writing(f"sqlite:///{tmp_path / 't.db'}")
    source = laptop.begin()
    writer = Writer(engine, "laptop", "nvml", STEP_S)
    writer.write(source.read(), {})
    fall_asleep(laptop, source)
    for _ in range(10):
        laptop.kernel.time += STEP_S
        writer.write(source.read(), {})
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM gpu_metrics")).scalar() == 1
    [row] = current.gpus(engine)
    assert row["state"] == "asleep"
    assert cards.condition(row, row["host_last_seen"]).word == "Asleep"
    card = cards.card(row, cards.Context(latest=row["host_last_seen"]))
    assert "Asleep" in card
    assert "would wake it" in card
    reading = replace(health.read(engine, "laptop"), newest=int(time.time()))
    found = health.judge(reading, State("recording", "nvml", "sqlite://"), STEP_S)
    assert (found.status, found.lost) == ("ok", 0)


def test_the_doctor_wakes_no_gpu(laptop: Laptop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    add(laptop)
    laptop.kernel.set(1, "suspended")
    monkeypatch.setattr(sleeping, "Sleep", laptop.kernel.sleep)
    laptop.fake.reset_calls()
    found = list(doctor.examine(Settings(data_dir=tmp_path, source="nvml")))
    assert laptop.fake.total_calls() == 0
    assert any("switched off" in finding.text for finding in found)


@pytest.mark.parametrize(("text", "mode"), [("AUTO", "auto"), ("True", "true"), ("false", "false")])
def test_the_setting_is_read_whatever_its_case(monkeypatch: pytest.MonkeyPatch, text: str, mode: str) -> None:
    monkeypatch.setenv("GPUMON_LET_SLEEP", text)
    assert load().let_sleep == mode


@pytest.mark.parametrize(
    ("nvml", "kernel"),
    [
        ("00000000:01:00.0", "0000:01:00.0"),
        ("0000000F:0A:1F.7", "000f:0a:1f.7"),
        ("00010000:01:00.0", "10000:01:00.0"),
        ("", None),
        (None, None),
        ("../../etc/passwd", None),
        ("0000:01:00.0/..", None),
    ],
)
def test_bus_ids_are_spelled_as_the_kernel_does(nvml: str | None, kernel: str | None) -> None:
    assert sleeping.address(nvml) == kernel


def test_what_is_left_alone_is_logged_once(laptop: Laptop, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    add(laptop)
    source = laptop.begin()
    source.read()
    fall_asleep(laptop, source)
    states(laptop, source, 100)
    assert sum("is left alone" in record.message for record in caplog.records) == 1
