"""What a reading may cost, what is asked less often for it, and what a mean then covers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import fake_nvml
import pynvml
import pytest
from fake_nvml import GIB, FakeGpu, FakeNvml

from gpumon_core.store import database
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry import cost, nvml, plan, samples
from gpumon_core.telemetry.nvml import NvmlSource
from gpumon_core.telemetry.records import GpuReading, Snapshot

SECOND_US = 1_000_000
# What calls took on an H100, in seconds of CPU time.
H100 = {
    "nvmlDeviceGetFieldValues": 0.0036,
    "nvmlDeviceGetSamples": 0.0024,
    "nvmlGpmSampleGet": 0.0018,
    "nvmlDeviceGetProcessesUtilizationInfo": 0.0024,
}
# Readings until it is known what everything costs.
SETTLED = 2 * cost.MEASURED


@dataclass
class Machine:
    """GPUs that take 250 W and are busy 2 of every 4 seconds, on clocks that only a test moves."""

    driver: FakeNvml
    costs_s: dict[str, float]
    now: float = 1000.0

    def thread_time(self) -> float:
        return sum(each * self.driver.calls(name) for name, each in self.costs_s.items())

    def pass_by(self, seconds: float) -> None:
        for _ in range(round(seconds * 5)):
            self.now = round(self.now + 0.2, 3)
            for gpu in self.driver.gpus:
                at = round(self.now * SECOND_US)
                gpu.add_sample(pynvml.NVML_GPU_UTILIZATION_SAMPLES, 100 if self.now % 4 < 2 else 0, at)
                gpu.add_sample(pynvml.NVML_MEMORY_UTILIZATION_SAMPLES, 50, at)
                gpu.add_sample(pynvml.NVML_TOTAL_POWER_SAMPLES, 250_000, at)
                gpu.energy_mj += 50_000


@pytest.fixture
def machine(fake: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine(fake, {})
    clock = SimpleNamespace(monotonic=lambda: made.now, time=lambda: 1_700_000_000 + made.now)
    for module in (nvml, plan, samples):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(cost, "time", SimpleNamespace(thread_time=made.thread_time))
    with fake_nvml.loaded(fake):
        yield made


def boards(machine: Machine, count: int) -> list[FakeGpu]:
    made = [machine.driver.add_gpu(uuid=f"GPU-{n}", gpm_supported=1, memory_temperature=70) for n in range(count)]
    for gpu in made:
        gpu.set_gpm(pynvml.NVML_GPM_METRIC_SM_UTIL, 44.0)
        gpu.add_process(11, GIB, sm=50)
    machine.pass_by(0.2)
    return made


@pytest.fixture
def ticks(machine: Machine) -> Iterator[Callable[[int, float], list[Snapshot]]]:
    """Takes so many readings, so many seconds apart."""
    begun: list[NvmlSource] = []

    def take(count: int, seconds: float) -> list[Snapshot]:
        if not begun:
            begun.append(NvmlSource("here", clock=lambda: machine.now))
            begun[0].read()
        taken = []
        for _ in range(count):
            machine.pass_by(seconds)
            taken.append(begun[0].read())
        return taken

    yield take
    for source in begun:
        source.close()


def first(snapshots: list[Snapshot]) -> list[GpuReading]:
    return [snapshot.readings[0] for snapshot in snapshots]


@pytest.mark.parametrize(
    ("gpus", "seconds", "costs"), [(1, 4.0, H100), (8, 4.0, dict.fromkeys(H100, 0.0002)), (1, 0.2, {})]
)
def test_what_does_not_exceed_its_share_is_asked_at_every_tick(
    machine: Machine,
    ticks: Callable[[int, float], list[Snapshot]],
    gpus: int,
    seconds: float,
    costs: dict[str, float],
) -> None:
    boards(machine, gpus)
    machine.costs_s = costs
    ticks(SETTLED, seconds)
    machine.driver.reset_calls()
    taken = ticks(8, seconds)
    assert all("energy" in reading.values for reading in first(taken))
    assert machine.driver.calls("nvmlGpmSampleGet", 0) == 8


def test_an_energy_counter_that_costs_much_is_asked_less_often_and_stays_exact(
    machine: Machine, ticks: Callable[[int, float], list[Snapshot]], tmp_path: object
) -> None:
    (gpu, *_) = boards(machine, 8)
    machine.costs_s = {"nvmlDeviceGetFieldValues": 0.0036}
    gpu.power_mw = 250_000
    ticks(SETTLED, 4.0)
    engine = database.open_for_writing(f"sqlite:///{tmp_path}/t.db")
    writer = Writer(engine, "here", "nvml", 4)
    taken = ticks(16, 4.0)
    told = [reading.values.get("energy") for reading in first(taken)]
    assert sum(value is not None for value in told) == 4, "one tick of four"
    assert all(reading.values["power"] == pytest.approx(250) for reading in first(taken))
    assert all(reading.values["memory_temperature"] == 70 for reading in first(taken)), (
        "the batch goes on without it"
    )
    while taken[0].readings[0].values.get("energy") is None:
        del taken[0]
    last = max(place for place, reading in enumerate(first(taken)) if reading.values.get("energy") is not None)
    for snapshot in taken[: last + 1]:
        writer.write(snapshot, {})
    assert writer.energy()["GPU-0"] == pytest.approx(250 * 4 * last)
    engine.dispose()


@pytest.mark.parametrize(("seconds", "asked"), [(2.0, 2), (4.0, 4), (6.0, 8)])
def test_samples_that_cost_much_are_asked_before_the_driver_forgets_them(
    machine: Machine, ticks: Callable[[int, float], list[Snapshot]], seconds: float, asked: int
) -> None:
    boards(machine, 8)
    machine.costs_s = {"nvmlDeviceGetSamples": 0.0024}
    ticks(SETTLED, seconds)
    machine.driver.reset_calls()
    taken = ticks(8, seconds)
    # Utilization and memory controller; of power the driver keeps too little to wait.
    assert machine.driver.calls("nvmlDeviceGetSamples", 0) == 2 * asked + 8
    shares = [reading.values["utilization"] for reading in first(taken)]
    assert all(reading.sampling == "interval" for reading in first(taken))
    assert all(reading.values["memory_utilization"] == 50 for reading in first(taken))
    # Busy half of the time, whatever the ticks that were asked.
    assert sum(share or 0 for share in shares) / len(shares) == pytest.approx(50, abs=13)


def test_no_sample_is_lost_or_counted_twice(
    machine: Machine, ticks: Callable[[int, float], list[Snapshot]]
) -> None:
    (gpu, *_) = boards(machine, 8)
    machine.costs_s = {"nvmlDeviceGetSamples": 0.0024}
    ticks(SETTLED, 4.0)
    machine.driver.reset_calls()
    seen = []
    for tick in range(12):
        calls = machine.driver.calls("nvmlDeviceGetSamples", 0)
        for part in range(20):
            machine.now = round(machine.now + 0.2, 3)
            at = round(machine.now * SECOND_US)
            gpu.add_sample(pynvml.NVML_GPU_UTILIZATION_SAMPLES, (tick * 20 + part) % 101, at)
            for other in machine.driver.gpus[1:]:
                other.add_sample(pynvml.NVML_GPU_UTILIZATION_SAMPLES, 5, at)
        (snapshot,) = ticks(1, 0.0)
        reading = snapshot.readings[0]
        seen.append((machine.driver.calls("nvmlDeviceGetSamples", 0) - calls, reading.values["utilization"]))
    means = [share for _, share in seen]
    truth = [sum((tick * 20 + part) % 101 for part in range(20)) / 20 for tick in range(12)]
    pairs = [(a + b) / 2 for a, b in pairwise(truth)]
    new = [share for before, share in zip([None, *means], means, strict=False) if share != before]
    assert len(new) <= 7, "every other tick"
    assert all(any(share == pytest.approx(pair, abs=0.01) for pair in pairs) for share in new[1:])


def test_gpm_that_costs_much_is_measured_over_more_ticks(
    machine: Machine, ticks: Callable[[int, float], list[Snapshot]]
) -> None:
    boards(machine, 8)
    machine.costs_s = {"nvmlGpmSampleGet": 0.0009}
    ticks(SETTLED, 4.0)
    machine.driver.reset_calls()
    taken = ticks(8, 4.0)
    assert machine.driver.calls("nvmlGpmSampleGet", 0) == 4
    assert all(reading.values["sm_activity"] == 44 for reading in first(taken))


def test_processes_are_asked_at_every_tick_whatever_they_cost(
    machine: Machine, ticks: Callable[[int, float], list[Snapshot]]
) -> None:
    boards(machine, 8)
    machine.costs_s = {
        "nvmlDeviceGetProcessesUtilizationInfo": 0.01,
        "nvmlDeviceGetComputeRunningProcesses_v3": 0.01,
    }
    ticks(SETTLED, 4.0)
    taken = ticks(8, 4.0)
    assert all(len(snapshot.processes) == 8 for snapshot in taken)
    assert all(process.sm_utilization == 50 for snapshot in taken for process in snapshot.processes)


def test_what_costs_little_again_is_asked_at_every_tick_again(
    machine: Machine, ticks: Callable[[int, float], list[Snapshot]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "TURNS", 2)
    boards(machine, 8)
    machine.costs_s = {"nvmlGpmSampleGet": 0.01}
    ticks(cost.TURN + 1, 4.0)
    now, machine.costs_s = machine.thread_time(), {}
    machine.thread_time = lambda: now  # type: ignore[method-assign]
    ticks(2 * cost.TURN, 4.0)
    machine.driver.reset_calls()
    ticks(8, 4.0)
    assert machine.driver.calls("nvmlGpmSampleGet", 0) == 8


def test_a_call_that_fails_is_asked_again_at_the_next_tick(
    machine: Machine, ticks: Callable[[int, float], list[Snapshot]]
) -> None:
    boards(machine, 8)
    machine.costs_s = {"nvmlGpmSampleGet": 0.0018}
    ticks(SETTLED, 4.0)
    machine.driver.fail("nvmlGpmSampleGet", pynvml.NVML_ERROR_UNKNOWN, 0)
    ticks(8, 4.0)
    machine.driver.recover()
    taken = ticks(2, 4.0)
    assert first(taken)[-1].values["sm_activity"] == 44


# ---- What a mean covers --------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "word"), [(4.0, "interval"), (24.0, "interval"), (40.0, "partial")])
def test_a_mean_over_a_part_of_the_interval_says_so(
    machine: Machine, ticks: Callable[[int, float], list[Snapshot]], seconds: float, word: str
) -> None:
    """The fake keeps 128 samples, which are 25 seconds."""
    boards(machine, 1)
    taken = ticks(3, seconds)
    assert [reading.sampling for reading in first(taken)] == [word] * 3


def test_samples_that_begin_late_cover_a_part(
    machine: Machine, ticks: Callable[[int, float], list[Snapshot]]
) -> None:
    """A clock that was set back between two readings leaves fewer of them than time has passed."""
    (gpu,) = boards(machine, 1)
    ticks(2, 4.0)
    machine.now += 30
    for part in range(20):
        gpu.add_sample(pynvml.NVML_GPU_UTILIZATION_SAMPLES, 50, round((1009.0 + part / 5) * SECOND_US))
    (reading,) = first(ticks(1, 0.0))
    assert (reading.sampling, reading.values["utilization"]) == ("partial", 50)
    assert first(ticks(1, 4.0))[0].sampling in ("interval", "partial")
