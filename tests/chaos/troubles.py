"""What can happen: one function a trouble, which lets it begin, yields as long as it lasts, and lets it end."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psycopg

from .programs import END_WITHIN_S, PATIENCE_S, Program, busy, eventually
from .stores import ServerStore
from .world import World

Takes = Literal["store", "process", "clock", "limits", "driver", "zoo", "requests"]
Begin = Callable[[World, Program], Iterator[None]]
# nvmlReturn_t, "Device Enums" in the guide.
UNKNOWN_ERROR, TIMEOUT = 999, 10


@dataclass(frozen=True, slots=True)
class Trouble:
    """One row. takes: what no other trouble of the same program may take meanwhile; shared: it befalls both
    programs at once; goes_on: whether the program records meanwhile; restarts: whether it is started anew; on:
    the kind of database that it takes, where it is not any; only: the one program that it can befall."""

    name: str
    weight: float
    takes: Takes
    begin: Begin
    goes_on: bool = True
    shared: bool = False
    restarts: bool = False
    on: str = ""
    only: str | None = None

    @property
    def silences(self) -> bool:
        """Whether neither program can record meanwhile."""
        return self.shared and not self.goes_on


# ---- The database


def vanishes(world: World, program: Program) -> Iterator[None]:
    """The files are removed; now and then the first alone, as `rm gpumon.db` does."""
    store = program.store
    grave = store.bury("removed")
    for part in store.parts()[: world.rng.choice((1, 3, 3))]:
        part.unlink(missing_ok=True)
    # What was committed between the two is gone, too.
    grave.look_again()
    yield


def replaced(world: World, program: Program) -> Iterator[None]:
    """A backup is moved over the file: with or without what SQLite keeps beside the old one."""
    store = program.store
    backup = store.folder / "restored.db"
    with closing(store.connect()) as source, closing(sqlite3.connect(backup)) as target:
        source.backup(target)
    kept = store.contents(path=backup).numbers
    for part in (backup.with_name(backup.name + "-wal"), backup.with_name(backup.name + "-shm")):
        part.unlink(missing_ok=True)
    wait_ticks(world, program, 2)
    grave = store.bury("replaced by a backup")
    if world.rng.random() < 0.5:
        for part in store.parts()[1:]:
            part.unlink(missing_ok=True)
    backup.rename(store.path)
    # What the backup has is not lost.
    grave.look_again()
    grave.held.numbers -= kept
    yield


def damaged(world: World, program: Program) -> Iterator[None]:
    """Pages of the file are overwritten while it is used."""
    program.store.bury("damaged")
    _damage(world, program.store.path)
    yield
    if program.runs and program.store.contents().problem and (world.is_hurried or world.rng.random() < 0.5):
        # Once a minute gpumon reads what it wrote, and so meets it; a start looks through the whole file.
        _end(world, program)
        program.start()


def damaged_while_away(world: World, program: Program) -> Iterator[None]:
    """The same between two runs, when the file is whole and alone."""
    _end(world, program)
    grave = program.store.bury("damaged")
    # A connection that is open makes files beside it, which a program that starts would believe.
    grave.connection.close()
    grave.connection = sqlite3.connect(":memory:")
    for part in program.store.parts()[1:]:
        part.unlink(missing_ok=True)
    _damage(world, program.store.path)
    program.start()
    yield


def _damage(world: World, path: Path) -> None:
    size = path.stat().st_size
    way = world.rng.randrange(3)
    with path.open("r+b") as file:
        if way == 0:
            # Without the first words it would be no database at all, which is left as it is.
            file.seek(16)
            file.write(world.rng.randbytes(4080))
        elif way == 1:
            for page in range(1, size // 4096):
                if world.rng.random() < 0.5:
                    file.seek(4096 * page)
                    file.write(world.rng.randbytes(4096))
        else:
            file.truncate(max(4096, size // 8192 * 4096))


def stolen(_: World, program: Program) -> Iterator[None]:
    """Rows are taken out of the database: what no promise covers, to see that the account notices."""
    # A tick that was on time, among others that were: one that was late may count as merged.
    late = "late.recorded_ms NOT BETWEEN 900 AND 1100"
    near = "late.timestamp_epoch BETWEEN on_time.timestamp_epoch - 3 AND on_time.timestamp_epoch + 1"
    chosen = (
        "SELECT max(timestamp_epoch) FROM gpu_metrics on_time WHERE timestamp_epoch < "
        "(SELECT max(timestamp_epoch) FROM gpu_metrics) "
        f"AND NOT EXISTS (SELECT 1 FROM gpu_metrics late WHERE {near} AND {late})"
    )

    def take() -> bool:
        with closing(sqlite3.connect(program.store.path, timeout=PATIENCE_S)) as connection, connection:
            return connection.execute(f"DELETE FROM gpu_metrics WHERE timestamp_epoch = ({chosen})").rowcount > 0

    eventually(take, "a tick that was on time")
    yield


def locked(_: World, program: Program) -> Iterator[None]:
    """Another program holds the write lock."""
    with closing(sqlite3.connect(program.store.path, isolation_level=None, timeout=PATIENCE_S)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


def full(world: World, program: Program) -> Iterator[None]:
    """The disk is full; without a disk of its own, the process may not make its files longer."""
    folder = program.store.folder
    if os.path.ismount(folder):
        filler = folder / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"\1" * 4096)
        yield
        filler.unlink()
        return
    longest = max(part.stat().st_size for part in (program.store.parts()[0], program.log) if part.exists())
    undo = program.limit(resource.RLIMIT_FSIZE, longest + 100_000)
    yield
    undo()
    del world


def _served(program: Program) -> ServerStore:
    assert isinstance(program.store, ServerStore)
    return program.store


def tables_locked(_: World, program: Program) -> Iterator[None]:
    """Somebody keeps the tables to himself."""
    address = _served(program).url.replace("+psycopg", "")
    with psycopg.connect(address) as connection:
        connection.execute("LOCK TABLE gpu_metrics, gpu_processes IN ACCESS EXCLUSIVE MODE")
        yield
        connection.rollback()


def connections_cut(_: World, program: Program) -> Iterator[None]:
    """All connections are ended, that of the lock among them."""
    query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'gpumon%'"
    _served(program).ask(query)
    yield


def server_silent(world: World, program: Program) -> Iterator[None]:
    """The database server takes connections and does not answer."""
    del program
    assert world.postgres is not None
    stopped_ = world.postgres.processes()
    for pid in stopped_:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    yield
    for pid in reversed(stopped_):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def server_away(world: World, program: Program) -> Iterator[None]:
    """The database server ends, and comes back."""
    del program
    assert world.postgres is not None
    world.postgres.stop()
    yield
    world.postgres.start()


# ---- The process


def stopped(_: World, program: Program) -> Iterator[None]:
    """It is stopped and goes on."""
    program.signal(signal.SIGSTOP)
    program.stopped = True
    yield
    program.signal(signal.SIGCONT)
    program.stopped = False


def ended(world: World, program: Program) -> Iterator[None]:
    """It is told to end, and started again."""
    _end(world, program)
    program.start()
    yield


def ended_while_locked(world: World, program: Program) -> Iterator[None]:
    """It is told to end while ticks wait for the database, and started again when that is free."""
    with closing(sqlite3.connect(program.store.path, isolation_level=None, timeout=PATIENCE_S)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        wait_ticks(world, program, 3)
        _end(world, program)
        connection.execute("ROLLBACK")
    program.start()
    yield


def killed(world: World, program: Program) -> Iterator[None]:
    """It is killed, and started again."""
    life = program.lives[-1]
    program.end(signal.SIGKILL, PATIENCE_S)
    # Ticks are written in their order: what was in memory is newer than all that is in the file.
    mine = {one.number for one in world.readings.all() if one.pid == life.pid}
    held = (grave.held.numbers for grave in program.store.graves)
    newest = max(mine & program.store.contents().numbers.union(*held), default=0)
    life.lost_by_kill = {number for number in mine if number > newest}
    if life.lost_by_kill:
        world.say(f"the {program} had {len(life.lost_by_kill)} readings in memory when it was killed")
    program.start()
    yield


def _end(world: World, program: Program) -> None:
    """SIGTERM, and what is promised of it."""
    limit = END_WITHIN_S * busy()
    took = program.end(signal.SIGTERM, 2 * limit + 30)
    if took is None:
        world.fail(f"SIGTERM did not end the {program}: it had to be killed")
    elif took > limit:
        world.fail(f"SIGTERM ended the {program} only after {took:.1f} s")
    elif not program.ended_well:
        world.fail(f"the {program} ended with status {program.status} on SIGTERM")


# ---- Its surroundings


def clock_set(world: World, program: Program) -> Iterator[None]:
    """The wall clock is set far away, each time to where it never was, and back."""
    far = sum(event.name == "clock" for event in world.events) * 7200 + world.rng.randrange(3600)
    offset = world.offsets[program.name]
    offset.write_text(f"{world.rng.choice('+-')}{far}")
    yield
    offset.write_text("+0")


def clock_back(world: World, program: Program) -> Iterator[None]:
    """The wall clock is set back a little: seconds come twice."""
    offset = world.offsets[program.name]
    offset.write_text(f"-{world.rng.randrange(2, 6)}")
    yield
    offset.write_text("+0")


def descriptors(world: World, program: Program) -> Iterator[None]:
    """It may open hardly anything more; of the server, visitors take the rest."""
    more = 40 if program is world.server else world.rng.randrange(3)
    undo = program.limit(resource.RLIMIT_NOFILE, program.footprint().descriptors + more)
    visitors = world.visitors.idle() if program is world.server else iter((None,))
    next(visitors)
    yield
    undo()
    next(visitors, None)


def _of_driver(world: World, slot: int | None, undo: Callable[[], None]) -> Iterator[None]:
    began = time.monotonic()
    yield
    undo()
    world.driver_faults.append((slot, began, time.monotonic()))


def gpu_lost(world: World, _: Program) -> Iterator[None]:
    """A GPU falls off the bus, and comes back."""
    gpu = world.rng.choice(world.fake.gpus)
    gpu.lost = True
    yield from _of_driver(world, gpu.slot, lambda: setattr(gpu, "lost", False))


def call_hangs(world: World, _: Program) -> Iterator[None]:
    """A call about one GPU does not return."""
    gpu = world.rng.choice(world.fake.gpus)
    function = world.rng.choice(("nvmlDeviceGetPowerUsage", "nvmlDeviceGetComputeRunningProcesses_v3"))
    world.fake.hang(function, 600, gpu)

    def undo() -> None:
        world.fake.recover(function, gpu)
        # Whoever sleeps in there looks every 2 ms, and would go on sleeping under the next rule in its place.
        time.sleep(0.5)

    yield from _of_driver(world, gpu.slot, undo)


def calls_fail(world: World, _: Program) -> Iterator[None]:
    """Some functions answer with errors."""
    functions = world.rng.sample(
        [
            *("nvmlDeviceGetPowerUsage", "nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetFanSpeed"),
            *("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetFieldValues", "nvmlDeviceGetSamples"),
            *("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetProcessUtilization"),
        ],
        3,
    )
    for function in functions:
        world.fake.fail(function, world.rng.choice((UNKNOWN_ERROR, TIMEOUT)))
    yield
    for function in functions:
        world.fake.recover(function)


def driver_gone(world: World, _: Program) -> Iterator[None]:
    """The driver is unloaded, and loaded again."""
    world.fake.driver_loaded = False
    yield from _of_driver(world, None, lambda: setattr(world.fake, "driver_loaded", True))


def manifest(world: World, _: Program) -> Iterator[None]:
    """The manifests of a model are no files that end; what others run is found out all the same."""
    hostile = world.zoo.manifest()
    next(hostile)
    with world.zoo.honest() as model:
        yield
        if world.server.ticks_expected:
            eventually(
                lambda: model.encode() in world.server.get("/api/v1/processes")[1],
                f"the model of the honest runner ({model}) is known to the server",
            )
    next(hostile, None)


# ---- Waiting


def wait_ticks(world: World, program: Program, count: int) -> None:
    """Until a program has taken so many more ticks. Raises Failed."""
    begin = world.ticks_of(program)
    eventually(lambda: world.ticks_of(program) >= begin + count, f"{count} ticks of the {program}")


TABLE: tuple[Trouble, ...] = (
    Trouble("vanish", 3, "store", vanishes, on="sqlite"),
    Trouble("replace", 2, "store", replaced, on="sqlite"),
    Trouble("damage", 1, "store", damaged, restarts=True, on="sqlite"),
    Trouble("damage_away", 1, "store", damaged_while_away, restarts=True, on="sqlite"),
    # Only where it is asked for.
    Trouble("theft", 0, "store", stolen, on="sqlite"),
    Trouble("lock", 3, "store", locked, on="sqlite"),
    Trouble("full", 3, "store", full, on="sqlite"),
    Trouble("term_locked", 1, "store", ended_while_locked, restarts=True, on="sqlite"),
    Trouble("pg_lock", 2, "store", tables_locked, shared=True, on="postgresql"),
    Trouble("pg_cut", 3, "store", connections_cut, shared=True, on="postgresql"),
    Trouble("pg_silent", 2, "store", server_silent, shared=True, on="postgresql"),
    Trouble("pg_away", 2, "store", server_away, shared=True, on="postgresql"),
    Trouble("stop", 2, "process", stopped, goes_on=False),
    Trouble("term", 2, "process", ended),
    Trouble("kill", 2, "process", killed),
    Trouble("clock", 2, "clock", clock_set),
    Trouble("clock_back", 1, "clock", clock_back),
    Trouble("descriptors", 2, "limits", descriptors),
    Trouble("lost", 1, "driver", gpu_lost, shared=True),
    Trouble("hang", 1, "driver", call_hangs, shared=True),
    Trouble("errors", 1, "driver", calls_fail, shared=True),
    Trouble("driver", 1, "driver", driver_gone, goes_on=False, shared=True),
    Trouble("texts", 3, "zoo", lambda world, _: world.zoo.texts(), shared=True),
    Trouble("forks", 1, "zoo", lambda world, _: world.zoo.forks(), shared=True),
    Trouble("fifo", 2, "zoo", lambda world, _: world.zoo.fifo(), shared=True),
    Trouble("link", 2, "zoo", lambda world, _: world.zoo.link(), shared=True),
    Trouble("strange", 2, "zoo", lambda world, _: world.zoo.strange(), shared=True),
    Trouble("manifest", 2, "zoo", manifest, shared=True),
    Trouble("visits", 2, "requests", lambda world, _: world.visitors.come(), only="server"),
    Trouble("half_sent", 1, "requests", lambda world, _: world.visitors.half_sent(), only="server"),
    Trouble("idle", 1, "requests", lambda world, _: world.visitors.idle(), only="server"),
    Trouble("garbage", 1, "requests", lambda world, _: world.visitors.garbage(), only="server"),
    Trouble("heavy", 1, "requests", lambda world, _: world.visitors.heavy(), only="server"),
    Trouble("websockets", 1, "requests", lambda world, _: world.visitors.websockets(), only="server"),
)
