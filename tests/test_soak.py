"""Thirty days in simulated time, with all that happens to clocks, GPUs, counters and recorders in the field: the
ledger says what the driver was made to do, of every user and in every hour.

The account that it is held against is kept here, in plain Python and pandas, from what the fake driver did.
"""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import pynvml
import pytest
from fake_nvml import GIB, FakeGpu, FakeNvml, loaded

from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.store import database, rollups
from gpumon_core.store import writer as writer_module
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.nvml import NvmlSource

DAYS = 30
BEGIN = 1_790_000_000
HOUR = 3600
USERS = ("ada", "grace", "mary")
INTERVALS = (60, 120, 300, 600)
STEPS = (1, 2, 30, 61, 600, 1800, HOUR, 5000, 86400, 3 * 86400)
IDENTITIES = {
    pid: ProcessIdentity(pid, f"boot:{pid}", 1.0, f"job{pid}.py", USERS[pid % 3]) for pid in range(3000, 3030)
}
ENERGY = "nvmlDeviceGetTotalEnergyConsumption"


class Clock:
    """Time that passes only when it is told to; the wall clock is as far from it as somebody set it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed, self.offset = 1000.0, float(BEGIN)
        monkeypatch.setattr(time, "monotonic", lambda: self.passed)
        monkeypatch.setattr(time, "time", lambda: self.passed + self.offset)

    @property
    def label(self) -> int:
        return int(self.passed + self.offset)


@dataclass
class Board:
    """One GPU: what it does until it is made to do something else, and how its counter stands."""

    gpu: FakeGpu
    counts: bool
    watts: int = 100
    work: dict[int, int] = field(default_factory=dict)
    counter_j: float = 5e8
    # Since when nobody has read it: by the label of the last reading.
    read_at: int | None = None
    missed_j: float = 0.0

    def draw(self, rng: random.Random) -> None:
        """Other processes, another power."""
        self.work, free = {}, 100
        for pid in rng.sample(sorted(IDENTITIES), rng.randrange(4)):
            self.work[pid] = rng.randrange(0, max(1, min(60, free)), 5)
            free -= self.work[pid]
        self.watts = 60 + 2 * sum(self.work.values()) + rng.randrange(30)

    def tell(self, fake: FakeNvml) -> None:
        """Let the driver say so."""
        self.gpu.power_mw, self.gpu.gpu_utilization = 1000 * self.watts, sum(self.work.values())
        if self.counts:
            self.gpu.energy_mj = int(1000 * self.counter_j)
        for pid, sm in self.work.items():
            self.gpu.add_process(pid, GIB, "C", sm=sm)


class Account:
    """What must come out: joules and GPU-seconds by user and hour, and what every GPU took by hour."""

    def __init__(self) -> None:
        self.users: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.gpus: dict[int, float] = defaultdict(float)

    def recorded(self, board: Board, end: int, seconds: float) -> None:
        for hour, part in split(end, seconds):
            self.gpus[hour] += board.watts * part
            for pid, sm in board.work.items():
                known = self.users[IDENTITIES[pid].user or "", hour]
                known[0] += board.watts * part * sm / 100
                known[1] += part * sm / 100

    def unrecorded(self, joules: float, start: int, end: int) -> None:
        length = max(1, end - start)
        for hour, part in split(end, length):
            self.gpus[hour] += joules * part / length


def split(end: int, seconds: float) -> list[tuple[int, float]]:
    """A stretch of time, hour by hour."""
    found, begin = [], end - seconds
    hour = int(begin // HOUR) * HOUR
    while hour < end:
        part = min(end, hour + HOUR) - max(begin, hour)
        if part > 0:
            found.append((hour, part))
        hour += HOUR
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [int(os.environ.get("SOAK_SEED", "18"))])
def test_thirty_days_of_the_field_are_in_the_ledger_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(writer_module, "SETTLED_PER_TICK", 2)
    rng, clock, account = random.Random(seed), Clock(monkeypatch), Account()
    fake = FakeNvml(tmp_path / "state")
    numbers = {"power_enforced_limit_mw": 350_000, "memory_used": GIB}
    boards = [
        Board(fake.add_gpu(uuid=f"GPU-{place}", **numbers, energy_mj=None if place == 2 else 0), place != 2)
        for place in range(3)
    ]
    engine = database.open_for_writing(f"sqlite:///{tmp_path}/gpumon.db")
    happened: dict[str, int] = defaultdict(int)
    interval = 60
    with loaded(fake):
        source, writer = NvmlSource("here", clock=time.time), Writer(engine, "here", "nvml", interval)
        hiccup: Board | None = None
        first = True
        while clock.passed < DAYS * 86400:
            event = rng.random()
            seconds = float(interval)
            if rng.random() < 0.1:
                for board in boards:
                    board.draw(rng)
            if event < 0.01:
                happened["clock steps"] += 1
                clock.offset = BEGIN + (rng.choice((-1, 1)) * rng.choice(STEPS) if rng.random() < 0.7 else 0)
            elif event < 0.015:
                happened["suspends"] += 1
                seconds = float(rng.randrange(4 * interval, 12 * HOUR))
            elif event < 0.02:
                happened["restarts"] += 1
                writer.settle()
                source.close()
                seconds = float(rng.choice((interval, rng.randrange(4 * interval, 12 * HOUR))))
                interval = rng.choice(INTERVALS)
                source, writer = NvmlSource("here", clock=time.time), Writer(engine, "here", "nvml", interval)
            elif event < 0.03:
                happened["kills"] += 1
                writer = Writer(engine, "here", "nvml", interval)
            elif event < 0.04:
                happened["lost"] += 1
                rng.choice(boards).gpu.lost = True
            elif event < 0.05:
                happened["resets"] += 1
                anew = rng.choice(boards[:2])
                anew.counter_j = 0.0
                if anew.missed_j:
                    # What a lost GPU had counted until then nobody can know.
                    anew.missed_j = 1e-9
            elif event < 0.06:
                happened["steps back"] += 1
                rng.choice(boards[:2]).counter_j -= rng.choice((0.001, 1.0, 50.0))
            elif event < 0.07:
                happened["hiccups"] += 1
                hiccup = rng.choice(boards[:2])
            elif event < 0.08:
                happened["failed readings"] += 1
                fake.fail(ENERGY, pynvml.NVML_ERROR_UNKNOWN)
            for board in boards:
                if board.gpu.lost and rng.random() < 0.2:
                    board.gpu.lost = False
            clock.passed += seconds
            fake.clear_processes()
            for board in boards:
                board.counter_j += board.watts * seconds
                board.tell(fake)
            if hiccup is not None:
                # After a pause it could not be told from a counter that began anew.
                hiccup.gpu.energy_mj = hiccup.gpu.energy_mj if hiccup.missed_j else 17
                hiccup = None
            snapshot = replace(source.read(), elapsed=clock.passed)
            assert writer.write(snapshot, IDENTITIES)
            fake.recover()
            follow(boards, account, clock, seconds, interval, first)
            first = False
        writer.settle()
        source.close()
    rollups.roll_up(engine, "here")
    engine.dispose()
    compare(tmp_path / "gpumon.db", account, dict(happened), seed)


def follow(
    boards: list[Board], account: Account, clock: Clock, seconds: float, interval: int, first: bool
) -> None:
    """Put a tick into the account: what was recorded, and what a counter took while nobody looked."""
    end = clock.label
    for board in boards:
        taken = board.watts * seconds
        if board.gpu.lost:
            board.missed_j += taken
            continue
        pause = seconds > 3 * interval
        away = board.missed_j > 0
        seen = float(interval) if pause or away else seconds
        missed = board.missed_j + taken - board.watts * seen
        if not first or not board.counts:
            account.recorded(board, end, seen)
        if (pause or away) and board.counts and missed > 0:
            account.unrecorded(missed, board.read_at or end, int(end - seen))
        board.missed_j, board.read_at = 0.0, end


def compare(path: Path, account: Account, happened: dict[str, int], seed: int) -> None:
    """The ledger and the account, user by user and hour by hour."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
        mine = pd.read_sql_query(
            "SELECT username AS user, timestamp_epoch - timestamp_epoch % 3600 AS hour, sum(energy_j) AS joules, "
            "sum(busy_s) AS busy FROM process_hours JOIN gpu_processes ON id = process_id GROUP BY 1, 2",
            connection,
        )
        gpus = pd.read_sql_query(
            "SELECT timestamp_epoch - timestamp_epoch % 3600 AS hour, sum(energy_j) AS joules FROM gpu_usage "
            "GROUP BY 1",
            connection,
        )
        meters = pd.read_sql_query("SELECT sum(energy_j) AS joules FROM gpus", connection)
    due = pd.DataFrame(
        [(user, hour, *values) for (user, hour), values in account.users.items()],
        columns=["user", "hour", "joules", "busy"],
    )
    said = f"seed {seed}, {happened}"
    for name in ("joules", "busy"):
        for user in USERS:
            found, truth = (frame.loc[frame["user"] == user, name].sum() for frame in (mine, due))
            assert found == pytest.approx(truth, rel=0.01), (user, name, said)
    whole = sum(account.gpus.values())
    assert gpus["joules"].sum() == pytest.approx(whole, rel=0.01), said
    assert meters["joules"].iloc[0] == pytest.approx(whole, rel=0.01), said
    hours = gpus.merge(pd.Series(account.gpus, name="due").rename_axis("hour").reset_index(), how="outer").fillna(
        0
    )
    # Labels are whole seconds: an hour may begin one late, of each of the three GPUs.
    off = (hours["joules"] - hours["due"]).abs() - 0.01 * hours["due"] - 3 * 350
    assert (off <= 0).all(), (hours[off > 0].head(10).to_string(), said)
    both = mine.merge(due, on=["user", "hour"], how="outer", suffixes=("", "_due")).fillna(0)
    off = (both["joules"] - both["joules_due"]).abs() - 0.01 * both["joules_due"] - 3 * 350
    assert (off <= 0).all(), (both[off > 0].head(10).to_string(), said)
