"""What the recorder says of itself, in its state and in /healthz."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Server
from conftest import eventually as until
from fake_nvml import FakeNvml
from test_lost_files import committed, recording

from gpumon_core.recording import health
from gpumon_core.recording.collector import Observer
from gpumon_core.store import database


def test_a_read_that_hangs_is_counted_named_and_over_when_it_returns(
    fake: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add_gpu()
    hanging = ["the files of process 7 have not answered since 2026-11-28 20:00:00 UTC"]
    monkeypatch.setattr(Observer, "hung_readers", property(lambda _: len(hanging)))
    monkeypatch.setattr(Observer, "reader_problem", property(lambda _: next(iter(hanging), None)))
    path = tmp_path / "history" / "gpumon.db"
    with recording(fake, path) as made:
        committed(made, 1)
        until(lambda: made.state.reader is not None)
        engine = database.open_for_reading(f"sqlite:///{path}")
        found = health.check(engine, made.state, "here", 1, made.counters)
        engine.dispose()
        assert found.status == "degraded"
        answer = found.as_json()
        assert answer["readers_hung"] == 1
        assert answer["reader_problem"] == hanging[0]
        hanging.clear()
        until(lambda: made.state.reader is None)
        assert made.state.hung_readers == 0


def test_the_server_names_no_reader_where_none_hangs(serve: Callable[..., Server], fake: FakeNvml) -> None:
    fake.add_gpu()
    server = serve(fake).ready()
    _, answer = server.health()
    assert answer["readers_hung"] == 0
    assert answer["reader_problem"] is None
