"""What the state of the recording is judged by, and how old its newest sample is (recording/health.py)."""

from __future__ import annotations

import time
from typing import Any

import pytest

from gpumon_core.recording import health
from gpumon_core.recording.state import State


@pytest.mark.parametrize(
    ("seconds_ago", "age_s", "status"),
    [
        (1, None, "ok"),
        (600, None, "stale"),
        (-3600, None, "stale"),
        (-3600, 1.0, "ok"),
        (600, 1.0, "ok"),
        (0, 60.0, "stale"),
    ],
)
def test_age_is_what_the_recorder_knows_and_else_what_two_clocks_agree_on(
    seconds_ago: int, age_s: float | None, status: str
) -> None:
    reading = health.RecordedState(newest=int(time.time()) - seconds_ago, interval_s=4.0, states=("ok",))
    state: Any = State("recording", "nvml", "sqlite://")
    assert health.judge(reading, state, 4.0, age_s=age_s).status == status


def test_a_time_far_in_the_future_has_no_age(monkeypatch: pytest.MonkeyPatch) -> None:
    now = int(time.time())
    assert health.age_of(now + 3600, 4.0) is None
    monkeypatch.setattr(time, "time", lambda: float(now))
    assert health.age_of(now + 1, 4.0) == 0.0
