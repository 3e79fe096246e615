"""What a killed recorder had not brought into the ledger is there again for the next one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sqlalchemy as sa
from test_writer import tick, who

from gpumon_core.attribution.records import Program
from gpumon_core.store import database
from gpumon_core.store import writer as writer_module
from gpumon_core.store.accounts import Gpu
from gpumon_core.store.resuming import resume
from gpumon_core.store.writer import Writer

SERVER = Program(category="inference", workload="vLLM", model="qwen3")
MEMORY = {100: 10, 104: 30, 108: 30, 112: 20}


@pytest.fixture
def killed(database_url: str, monkeypatch: pytest.MonkeyPatch) -> tuple[sa.Engine, Writer]:
    """A recorder that settled only what came or went: 7 stays on two GPUs, 8 has left."""
    monkeypatch.setattr(writer_module, "SETTLED_PER_TICK", 0)
    engine = database.open_for_writing(database_url)
    recorder = Writer(engine, "here", "nvml", 4)
    identities = {pid: replace(one, program=SERVER) for pid, one in who(7, 8).items()}
    for now, memory in MEMORY.items():
        seen = {(0, 7): memory, (1, 7): 5} | ({(0, 8): 40} if now < 108 else {})
        recorder.write(tick(now, seen), identities)
    return engine, recorder


def test_who_is_there_has_all_that_was_recorded(killed: tuple[sa.Engine, Writer]) -> None:
    engine, recorder = killed
    gpus = [Gpu(gpu.id, "ok") for gpu in recorder._gpus.values()]
    with engine.connect() as connection:
        stored = connection.execute(sa.text("SELECT max(last_seen) FROM process_gpus WHERE active = 1")).scalar()
        found = resume(connection, gpus, 112, 4, 600)
    assert stored == 100
    assert found.live.keys() == recorder._live.keys()
    assert len(found.live) == 2
    for pair, use in found.live.items():
        known = recorder._live[pair]
        assert use.ledger == known.ledger
        assert use.work == known.work
        assert use.session is not None
        assert known.session is not None
        assert use.session.ledger == known.session.ledger
    assert found.processes == recorder._processes
    assert found.programs == {1: 1}


def test_what_is_settled_is_not_added_again(killed: tuple[sa.Engine, Writer]) -> None:
    engine, recorder = killed
    recorder.settle()
    with engine.connect() as connection:
        found = resume(connection, [Gpu(gpu.id, "ok") for gpu in recorder._gpus.values()], 112, 4, 600)
    assert {pair: use.ledger for pair, use in found.live.items()} == {
        pair: use.ledger for pair, use in recorder._live.items()
    }
    assert not any(use.hours for use in found.live.values())


def test_on_gpus_that_nobody_was_on_there_is_nothing_to_take_up(killed: tuple[sa.Engine, Writer]) -> None:
    engine, recorder = killed
    third = list(recorder._gpus.values())[2]
    with engine.connect() as connection:
        assert not resume(connection, [Gpu(third.id, "ok")], 112, 4, 600).live
