"""Thirty days in simulated time, with all that happens to clocks, GPUs, counters and recorders in the field: the
ledger says what the driver was made to do, of every user and in every hour.

The account that it is compared with is made here, in plain Python and pandas, from what the fake driver did.
"""

from __future__ import annotations

import itertools
import os
import random
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
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
from gpumon_core.telemetry.records import Snapshot
from gpumon_core.telemetry.watch import Task, Watch

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
    """Time that passes only when the test says so; the wall clock differs from it as the test has set it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed, self.offset = 1000.0, float(BEGIN)
        monkeypatch.setattr(time, "monotonic", lambda: self.passed)
        monkeypatch.setattr(time, "time", lambda: self.passed + self.offset)

    @property
    def label(self) -> int:
        return int(self.passed + self.offset)


@dataclass
class Board:
    """One GPU: what it does until it is made to do something else, and what its counter says."""

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

    def show_to(self, fake: FakeNvml) -> None:
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


class Field:
    """Three boards, a driver, a clock, a recorder, and what happens to them."""

    def __init__(self, folder: Path, clock: Clock, rng: random.Random) -> None:
        self.fake, self.clock, self.rng = FakeNvml(folder / "state"), clock, rng
        numbers = {"power_enforced_limit_mw": 350_000, "memory_used": GIB}
        self.boards = [
            Board(self.fake.add_gpu(uuid=f"GPU-{n}", **numbers, energy_mj=None if n == 2 else 0), n != 2)
            for n in range(3)
        ]
        self.engine = database.open_for_writing(f"sqlite:///{folder}/gpumon.db")
        self.interval = 60
        self.source: NvmlSource | None = None
        self.hiccup: Board | None = None
        self.seconds = 0.0

    def begin(self) -> None:
        self.source = NvmlSource("here", clock=time.time)
        self.writer = Writer(self.engine, "here", "nvml", self.interval)

    def counting(self) -> Board:
        return self.rng.choice(self.boards[:2])

    def clock_is_set(self) -> None:
        far = self.rng.choice((-1, 1)) * self.rng.choice(STEPS)
        self.clock.offset = BEGIN + (far if self.rng.random() < 0.7 else 0)

    def machine_sleeps(self) -> None:
        self.seconds = float(self.rng.randrange(4 * self.interval, 12 * HOUR))

    def recorder_restarts(self) -> None:
        self.end()
        if self.rng.random() < 0.5:
            self.machine_sleeps()
        else:
            self.seconds = float(self.interval)
        self.interval = self.rng.choice(INTERVALS)
        self.begin()

    def recorder_is_killed(self) -> None:
        self.writer = Writer(self.engine, "here", "nvml", self.interval)

    def gpu_is_lost(self) -> None:
        self.rng.choice(self.boards).gpu.lost = True

    def counter_begins_anew(self) -> None:
        board = self.counting()
        board.counter_j = 0.0
        if board.missed_j:
            # What a lost GPU had counted until then nobody can know.
            board.missed_j = 1e-9

    def counter_steps_back(self) -> None:
        self.counting().counter_j -= self.rng.choice((0.001, 1.0, 50.0))

    def counter_misses_a_reading(self) -> None:
        board = self.counting()
        # After a pause it looks like a counter that began at 0.
        self.hiccup = None if board.missed_j else board

    def reading_fails(self) -> None:
        self.fake.fail(ENERGY, pynvml.NVML_ERROR_UNKNOWN)

    def pass_time(self) -> Snapshot:
        """Let the time of a tick pass, with what happens in it; what the driver says then."""
        assert self.source is not None
        self.clock.passed += self.seconds
        self.fake.clear_processes()
        for board in self.boards:
            board.counter_j += board.watts * self.seconds
            board.show_to(self.fake)
        if self.hiccup is not None:
            self.hiccup.gpu.energy_mj, self.hiccup = 17, None
        snapshot = replace(self.source.read(), elapsed=self.clock.passed)
        self.fake.recover()
        return snapshot

    def end(self) -> None:
        self.writer.settle()
        if self.source is not None:
            self.source.close()


# What happens before a tick, and how often.
EVENTS: tuple[tuple[Callable[[Field], None], float], ...] = (
    (Field.clock_is_set, 0.01),
    (Field.machine_sleeps, 0.005),
    (Field.recorder_restarts, 0.005),
    (Field.recorder_is_killed, 0.01),
    (Field.gpu_is_lost, 0.01),
    (Field.counter_begins_anew, 0.01),
    (Field.counter_steps_back, 0.01),
    (Field.counter_misses_a_reading, 0.01),
    (Field.reading_fails, 0.01),
)


def at_once(self: Watch, tasks: Iterable[Task], patience_s: float) -> list[Task]:
    """No call hangs here: without another thread to wait for, thirty days pass in half the time."""
    for task in tasks:
        task.action()
    return []


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [int(seed) for seed in os.environ.get("SOAK_SEEDS", "18").split()])
def test_thirty_days_of_the_field_are_in_the_ledger_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(writer_module, "SETTLED_PER_TICK", 2)
    monkeypatch.setattr(Watch, "run", at_once)
    rng, clock, account = random.Random(seed), Clock(monkeypatch), Account()
    field = Field(tmp_path, clock, rng)
    happened: Counter[str] = Counter()
    with loaded(field.fake):
        field.begin()
        for tick in itertools.count():
            field.seconds = float(field.interval)
            if rng.random() < 0.1:
                for board in field.boards:
                    board.draw(rng)
            for event, often in EVENTS:
                if rng.random() < often:
                    happened[event.__name__] += 1
                    event(field)
                    break
            for board in field.boards:
                board.gpu.lost = board.gpu.lost and rng.random() < 0.8
            snapshot = field.pass_time()
            assert field.writer.write(snapshot, IDENTITIES)
            follow(field.boards, account, clock, field.seconds, field.interval, tick == 0)
            if clock.passed > DAYS * 86400:
                break
        field.end()
    rollups.roll_up(field.engine, "here")
    field.engine.dispose()
    assert len(happened) == len(EVENTS)
    compare(tmp_path / "gpumon.db", account, f"seed {seed}, {dict(happened)}")


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


def compare(path: Path, account: Account, said: str) -> None:
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
