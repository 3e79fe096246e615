"""Processes are watched through handles, so that a tick reads nothing of those that go on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from gpumon_core.attribution.local import LocalAttribution


@pytest.fixture
def attribution() -> Iterator[LocalAttribution]:
    made = LocalAttribution(trusted=True)
    yield made
    made.close()


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_running_process_is_read_once(attribution: LocalAttribution, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        first = attribution.identify({process.pid}, 0)
        monkeypatch.setattr(attribution, "_identify", lambda _: pytest.fail("read again"))
        assert attribution.identify({process.pid}, 0) == first
        process.kill()


def test_a_process_that_ends_is_looked_at_again(attribution: LocalAttribution) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        before = attribution.identify({process.pid}, 0)[process.pid]
        process.kill()
    looked: list[int] = []
    identify = attribution._identify

    def watched(pid: int) -> object:
        looked.append(pid)
        return identify(pid)

    attribution._identify = watched  # type: ignore[method-assign, assignment]
    assert attribution.identify({process.pid}, 0)[process.pid] == before
    assert looked == [process.pid]


def test_no_handle_outlives_its_use(attribution: LocalAttribution) -> None:
    before = handles()
    for _ in range(20):
        with subprocess.Popen(["sleep", "60"]) as process:
            attribution.identify({process.pid}, 0)
            process.kill()
    attribution.identify(set(), 0)
    assert handles() == before


def test_closing_lets_go_of_everything(attribution: LocalAttribution) -> None:
    before = handles()
    with subprocess.Popen(["sleep", "60"]) as process:
        attribution.identify({process.pid, os.getpid()}, 0)
        assert handles() == before + 2
        attribution.close()
        assert handles() == before
        process.kill()


def test_without_handles_the_start_is_compared(
    attribution: LocalAttribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> int:
        raise OSError("no more handles")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    with subprocess.Popen(["sleep", "60"]) as process:
        first = attribution.identify({process.pid}, 0)
        assert first[process.pid].name == "sleep"
        assert attribution.identify({process.pid}, 0) == first
        process.kill()
