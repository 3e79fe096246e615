"""What a killed recorder had not brought into the ledger is there again for the next one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sqlalchemy as sa
from ticks import busy, measured, tick, who

from gpumon_core.attribution.records import Program
from gpumon_core.store import database
from gpumon_core.store import writer as writer_module
from gpumon_core.store.accounting import Gpu
from gpumon_core.store.crash_recovery import resume
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
    gpus = [Gpu(gpu.id, "ok") for gpu in recorder._machine.gpus.values()]
    with engine.connect() as connection:
        stored = connection.execute(sa.text("SELECT max(last_seen) FROM process_gpus WHERE active = 1")).scalar()
        found = resume(connection, gpus, 112, 4, 600)
    assert stored == 100
    assert found.live.keys() == recorder._processes.live.keys()
    assert len(found.live) == 2
    for pair, use in found.live.items():
        known = recorder._processes.live[pair]
        assert use.ledger == known.ledger
        assert use.work == known.work
        assert use.session is not None
        assert known.session is not None
        assert use.session.ledger == known.session.ledger
    assert found.processes == recorder._processes.known
    assert found.programs == {1: 1}


def test_what_is_settled_is_not_added_again(killed: tuple[sa.Engine, Writer]) -> None:
    engine, recorder = killed
    recorder.settle()
    with engine.connect() as connection:
        found = resume(connection, [Gpu(gpu.id, "ok") for gpu in recorder._machine.gpus.values()], 112, 4, 600)
    assert {pair: use.ledger for pair, use in found.live.items()} == {
        pair: use.ledger for pair, use in recorder._processes.live.items()
    }
    assert not any(use.hours for use in found.live.values())


def test_on_gpus_that_nobody_was_on_there_is_nothing_to_take_up(killed: tuple[sa.Engine, Writer]) -> None:
    engine, recorder = killed
    third = list(recorder._machine.gpus.values())[2]
    with engine.connect() as connection:
        assert not resume(connection, [Gpu(third.id, "ok")], 112, 4, 600).live


@pytest.mark.parametrize("settled", [0, 1, 2, 3])
@pytest.mark.parametrize("place", [0, 2], ids=["server first", "server last"])
@pytest.mark.parametrize("name", ["nvidia-cuda-mps-server", "nvidia-cuda-mps"])
@pytest.mark.parametrize("leaves", [False, True], ids=["stay", "one leaves"])
def test_what_the_mps_server_did_is_handed_on_once(
    database_url: str, monkeypatch: pytest.MonkeyPatch, settled: int, place: int, name: str, leaves: bool
) -> None:
    engine = database.open_for_writing(database_url)
    clients = [replace(busy(pid, memory, 0), kind="M+C") for pid, memory in ((8, 1000), (9, 3000))]
    identities = who(7, 8, 9)
    identities[7] = replace(identities[7], name=name)
    monkeypatch.setattr(writer_module, "SETTLED_PER_TICK", settled)
    for number in range(8):
        if number in (0, 5):
            # The one before was killed.
            recorder = Writer(engine, "here", "nvml", 4)
        processes = clients[: 1 if leaves and number >= 4 else 2]
        processes.insert(place, busy(7, 66, 50))
        seen = {process.pid: identities[process.pid] for process in processes}
        recorder.write(
            measured(3600 + 4 * number, processes=tuple(processes), power=100.0, utilization=50.0), seen
        )
    recorder.settle()
    query = "SELECT pid, sum(busy_s) FROM process_hours JOIN gpu_processes ON id = process_id GROUP BY pid"
    with engine.connect() as connection:
        used = {pid: round(busy_s, 3) for pid, busy_s in connection.execute(sa.text(query))}
    # Half of the GPU for 32 seconds: by memory, and while the second is gone all of it the first one's.
    assert used == ({7: 0, 8: 10, 9: 6} if leaves else {7: 0, 8: 4, 9: 12})
