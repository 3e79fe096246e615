"""Consumers get each committed tick once and in order, and cannot harm the recording (recording/consumers.py)."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import fake_nvml
import pytest
import sqlalchemy as sa
from conftest import PATIENCE_S
from conftest import eventually as until
from fake_nvml import FakeNvml

from gpumon_core.attribution.records import ProcessIdentity, Program
from gpumon_core.recording import consumers as consumers_module
from gpumon_core.recording import health, roles, runtime
from gpumon_core.recording.consumers import CommittedTick, Consumer, Consumers
from gpumon_core.recording.recorder import Recorder
from gpumon_core.settings import load
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import HostInfo, Snapshot


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history" / "gpumon.db"


@pytest.fixture(autouse=True)
def _end_is_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumers_module, "ENDS_S", PATIENCE_S)


@contextmanager
def recording(fake: FakeNvml, path: Path, *consumers: Consumer) -> Iterator[Recorder]:
    """A recorder of the fake driver in this process, with these consumers."""
    with fake_nvml.loaded(fake):
        made = Recorder(load(data_dir=path.parent, host_name="here", interval=1, source="nvml"), consumers)
        made.start(patient=True)
        try:
            yield made
        finally:
            made.stop()


def committed(made: Recorder, more: int) -> None:
    before = made.counters.ticks
    until(lambda: made.counters.ticks >= before + more)


def seconds(ticks: list[CommittedTick]) -> list[int]:
    """The seconds of ticks that came in order and once. Two of one second are one row in the database."""
    moments = [tick.snapshot.timestamp for tick in ticks]
    assert all(before < after for before, after in pairwise(moments))
    return list(dict.fromkeys(map(int, moments)))


def stored(path: Path) -> list[int]:
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=PATIENCE_S)
    try:
        return [second for (second,) in connection.execute("SELECT timestamp_epoch FROM gpu_metrics ORDER BY 1")]
    finally:
        connection.close()


# ---- What they get -------------------------------------------------------------------------------


def test_each_tick_comes_once_with_its_processes_and_energy_when_it_is_in_the_database(
    fake: FakeNvml, path: Path
) -> None:
    fake.add_gpu(uuid="GPU-0", power_mw=100_000).add_process(os.getpid(), 1 << 30)
    taken: list[CommittedTick] = []
    is_stored: list[bool] = []

    def take(tick: CommittedTick) -> None:
        is_stored.append(int(tick.snapshot.timestamp) in stored(path))
        taken.append(tick)

    with recording(fake, path, Consumer("events", take)) as made:
        until(lambda: len(taken) >= 3)
    assert seconds(taken) == stored(path)
    assert all(is_stored)
    assert {tick.source for tick in taken} == {"nvml"}
    assert [list(tick.learned) for tick in taken[:1]] == [[os.getpid()]]
    assert taken[-1].identities[os.getpid()].name is not None
    energy = [tick.energy_j["GPU-0"] for tick in taken]
    assert energy == sorted(energy)
    assert energy[-1] > 0
    assert made.consumers["events"].as_json() == {"failed": 0, "dropped": 0, "waiting": 0, "problem": None}


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="same name: hub, hub"):
        Consumers([Consumer("hub", print), Consumer("hub", print)], lambda: None)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another program writes into the database all the time."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.close()


def test_what_waited_for_the_database_comes_after_its_commit_in_order_and_once(fake: FakeNvml, path: Path) -> None:
    fake.add_gpu()
    taken: list[CommittedTick] = []
    with recording(fake, path, Consumer("events", taken.append)) as made:
        until(lambda: taken)
        with locked(path):
            until(lambda: made.counters.buffered >= 3)
            # One may have been committed before the lock.
            assert len(taken) <= made.counters.ticks
            latest = made.latest_tick
            assert latest is not None
            assert latest.snapshot.timestamp > taken[-1].snapshot.timestamp, "/metrics shows what waits"
        until(lambda: made.counters.buffered == 0)
    assert seconds(taken) == stored(path)


def test_a_tick_whose_commit_nobody_knows_of_comes_once(
    fake: FakeNvml, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add_gpu()
    taken: list[CommittedTick] = []
    write, broken = Writer.write_all, []

    def breaks_after_the_commit(self: Writer, ticks: Any) -> int:
        written = write(self, ticks)
        if made.counters.ticks >= 1 and not broken:
            broken.append(int(ticks[-1][0].timestamp))
            self._forget()
            raise sa.exc.OperationalError("COMMIT", {}, sqlite3.OperationalError("connection lost"))
        return written

    monkeypatch.setattr(Writer, "write_all", breaks_after_the_commit)
    with recording(fake, path, Consumer("events", taken.append)) as made:
        until(lambda: broken)
        committed(made, 2)
    assert broken[0] in seconds(taken)
    assert seconds(taken) == stored(path)


def test_what_an_earlier_recorder_left_comes_when_it_is_written(
    fake: FakeNvml, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles, "RETRY_S", 0.5)
    fake.add_gpu()
    first: list[CommittedTick] = []
    with recording(fake, path, Consumer("events", first.append)) as made:
        until(lambda: first)
        with locked(path):
            until(lambda: made.counters.buffered >= 2)
            made.stop()
    second: list[CommittedTick] = []
    with recording(fake, path, Consumer("events", second.append)) as made:
        until(lambda: len(second) >= 3)
    assert seconds(first + second) == stored(path)


def who(pid: int, **more: Any) -> ProcessIdentity:
    return ProcessIdentity(pid, f"boot:{pid}", 5.0, "python", "me", Program(**more))


def test_what_was_learned_is_what_this_consumer_did_not_know() -> None:
    taken: list[CommittedTick] = []
    fails = [False, True, False, False]

    def take(tick: CommittedTick) -> None:
        if fails.pop(0):
            raise ValueError
        taken.append(tick)

    handed = Consumers([Consumer("events", take)], lambda: None)
    handed.start()
    one, two, three = (
        Snapshot(1.0, HostInfo("here")),
        Snapshot(2.0, HostInfo("here")),
        Snapshot(3.0, HostInfo("here")),
    )
    handed.hand_over("nvml", [(one, {1: who(1), 2: who(2)})], {})
    # It fails to take that the model is known now.
    handed.hand_over("nvml", [(two, {1: who(1, model="qwen3"), 2: who(2)})], {})
    handed.hand_over("nvml", [(three, {1: who(1, model="qwen3"), 3: who(3)})], {})
    handed.hand_over("nvml", [(replace(three, timestamp=4.0), {1: who(1, model="qwen3"), 3: who(3)})], {})
    handed.stop()
    assert [dict(tick.learned) for tick in taken] == [
        {1: who(1), 2: who(2)},
        {1: who(1, model="qwen3"), 3: who(3)},
        {},
    ]


# ---- What they may do ----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("no such broker"), SystemExit(3)], ids=["an exception", "an exit"])
@pytest.mark.parametrize("is_immediate", [False, True], ids=["on its thread", "at once"])
def test_one_that_fails_costs_itself_only_and_is_named(
    fake: FakeNvml, path: Path, caplog: pytest.LogCaptureFixture, error: BaseException, is_immediate: bool
) -> None:
    fake.add_gpu()
    is_broken = True
    other: list[CommittedTick] = []

    def take(_: CommittedTick) -> None:
        if is_broken:
            raise error

    consumers = Consumer("mqtt", take, is_immediate=is_immediate), Consumer("events", other.append)
    with caplog.at_level(logging.INFO), recording(fake, path, *consumers) as made:
        until(lambda: made.consumers["mqtt"].failed >= 2)
        [problem] = made.state.consumers
        assert problem.reason == f"mqtt failed to take a tick: {error!r}; everything is recorded"
        assert problem in made.state.problems
        assert made.session is not None
        found = health.judge(
            health.RecordedState(int(time.time()), 1.0, ("ok",)), made.state, 1.0, made.counters, age_s=1.0
        )
        assert found.status == "degraded"
        answer = replace(found, consumers=made.consumers).as_json()["consumers"]
        assert answer["mqtt"]["failed"] >= 2
        assert answer["mqtt"]["problem"] == problem.reason
        assert answer["events"]["problem"] is None
        is_broken = False
        until(lambda: not made.state.consumers)
        committed(made, 1)
        assert made.counters.failed == 0
    assert seconds(other) == stored(path)
    said = [one.getMessage() for one in caplog.records if "mqtt" in one.getMessage()]
    assert said == ["mqtt failed to take a tick; everything is recorded", "mqtt takes ticks again"]


class Unspeakable(Exception):
    """An exception whose own description fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no description")


@pytest.mark.parametrize("is_immediate", [False, True], ids=["on its thread", "at once"])
def test_an_exception_without_a_description_costs_itself_only(
    fake: FakeNvml, path: Path, is_immediate: bool
) -> None:
    fake.add_gpu()
    other: list[CommittedTick] = []

    def take(_: CommittedTick) -> None:
        raise Unspeakable

    consumers = Consumer("mqtt", take, is_immediate=is_immediate), Consumer("events", other.append)
    with recording(fake, path, *consumers) as made:
        until(lambda: made.consumers["mqtt"].failed >= 2)
        [problem] = made.state.consumers
        assert problem.reason == "mqtt failed to take a tick: Unspeakable; everything is recorded"
        assert made.counters.failed == 0
    assert seconds(other) == stored(path)


def test_a_failure_is_described_in_bounds() -> None:
    def take(_: CommittedTick) -> None:
        raise ValueError("\N{RIGHT-TO-LEFT OVERRIDE}" + 100_000 * "x")

    found = Consumers([Consumer("mqtt", take, is_immediate=True)], lambda: None)
    found.hand_over("nvml", [(Snapshot(1.0, HostInfo("here"), (), ()), {})], {})
    [problem] = found.problems
    assert len(problem.reason) < 500
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in problem.reason


def test_one_cannot_change_what_others_get() -> None:
    others: list[CommittedTick] = []

    def take(tick: CommittedTick) -> None:
        tick.identities.clear()  # type: ignore[attr-defined]

    found = Consumers(
        [Consumer("mqtt", take, is_immediate=True), Consumer("events", others.append, is_immediate=True)],
        lambda: None,
    )
    ada = ProcessIdentity(1, "boot:1", 1000.0, "train.py", "ada")
    found.hand_over("nvml", [(Snapshot(1.0, HostInfo("here"), (), ()), {1: ada})], {})
    assert others[0].identities == {1: ada}
    assert [found.health[name].failed for name in ("mqtt", "events")] == [1, 0]


def test_one_that_is_slow_loses_the_oldest_ticks_and_delays_none(fake: FakeNvml, path: Path) -> None:
    fake.add_gpu()
    go_on, taken = threading.Event(), []

    def take(tick: CommittedTick) -> None:
        go_on.wait(PATIENCE_S)
        taken.append(tick)

    with recording(fake, path, Consumer("hub", take, most_waiting=2)) as made:
        until(lambda: made.consumers["hub"].dropped >= 2)
        assert made.consumers["hub"].waiting <= 2
        [problem] = made.state.consumers
        assert "hub is too slow" in problem.reason
        assert (made.counters.failed, made.counters.dropped) == (0, 0)
        go_on.set()
        until(lambda: not made.state.consumers)
    times, found = stored(path), seconds(taken)
    assert found == [times[0], *times[1 - len(found) :]]
    assert len(taken) == made.counters.ticks - made.consumers["hub"].dropped


def test_one_that_hangs_holds_up_neither_ticks_nor_the_end(
    fake: FakeNvml, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers_module, "HANGS_AFTER_S", 0.5)
    monkeypatch.setattr(consumers_module, "ENDS_S", 1.0)
    fake.add_gpu()
    go_on, other = threading.Event(), []

    def take(_: CommittedTick) -> None:
        go_on.wait(10 * PATIENCE_S)

    with recording(fake, path, Consumer("hub", take), Consumer("events", other.append)) as made:
        until(lambda: made.state.consumers)
        assert "hub has not finished a tick" in made.state.consumers[0].reason
        committed(made, 2)
        began = time.monotonic()
        made.stop()
        assert time.monotonic() - began < PATIENCE_S, "it hangs for ten times as long"
        assert made.state.role == "stopped"
        assert made.consumers["hub"].waiting == 0, "what it did not take is given up"
    assert seconds(other) == stored(path)
    go_on.set()


def test_healthz_names_the_consumers(fake: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.add_gpu()
    chosen = load(source="nvml", data_dir=tmp_path, host_name="here", interval=1)
    monkeypatch.setattr(runtime, "settings", lambda: chosen)
    taken: list[CommittedTick] = []
    with fake_nvml.loaded(fake):
        recorder = runtime.start([Consumer("events", taken.append)])
        try:
            until(lambda: taken and recorder.counters.ticks)
            found = runtime.check_health().as_json()["consumers"]
        finally:
            runtime.stop()
    assert set(found) == {"the latest tick", "events"}
    assert found["events"]["failed"] == 0


def test_the_end_lets_them_take_what_waits() -> None:
    taken: list[CommittedTick] = []
    began = threading.Event()

    def take(tick: CommittedTick) -> None:
        began.wait(PATIENCE_S)
        taken.append(tick)

    handed = Consumers([Consumer("events", take)], lambda: None)
    handed.start()
    nobody: dict[int, ProcessIdentity] = {}
    handed.hand_over("nvml", [(Snapshot(second, HostInfo("here")), nobody) for second in range(5)], {})
    began.set()
    handed.stop()
    assert seconds(taken) == [0, 1, 2, 3, 4]
