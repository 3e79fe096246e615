"""What is asked at the end: where every reading is that the driver answered, and what the programs look like."""

from __future__ import annotations

import re
import signal
import time
from collections import Counter
from dataclasses import dataclass

from fake_nvml.readings import Reading

from .programs import END_WITHIN_S, PATIENCE_S, Failed, Program, busy, eventually
from .stores import COUNTS, Contents
from .world import INTERVAL_S, UUIDS, World

MOST_LINES = 1000
# By how much a process may have grown since it worked as usual: what Python's allocator and SQLite keep.
MAY_GROW_MIB = {"recorder": 16.0, "server": 96.0}
# A page that was just opened has three descriptors, until its session is forgotten.
MAY_OPEN = 8
# How long before and after a fault of the driver what it answered may be lost with it: the tick that was under
# way, and the pauses in which a program looks whether it is over.
BEFORE_S, AFTER_S = 3.0, 12.0
# How far `clock_back` sets the clock back.
MOST_SET_BACK_S = 5
# What the log says of ticks that were lost, with how many.
LOST = re.compile(
    r"(?P<many>\d+) ticks? "
    r"(?:could not be written(?!; they are stored)|.*(?:are|were|was) (?:left out|lost|dropped))"
)
ONE_LOST = re.compile("a tick cannot be written: .*; it is lost")
OWN_FRAME = re.compile(r'File "[^"]*/(?:gpumon_core|pages)/|File "[^"]*/app\.py"')
SET_ASIDE = re.compile(r"damaged and has been set aside")
LOST_GPU = re.compile("answers again|is lost|has not returned|every call to it fails|went away|does not answer")


def settle(world: World) -> None:
    """Wait until the programs record as usual, with everything that waited in their databases."""
    for program in world.programs:
        since = len(world.readings.all())

        def all_written(program: Program = program, since: int = since) -> bool:
            # Twice: what was read before this moment, and something that was read since.
            answered = {one.number for one in world.readings.all() if one.pid == program.pid}
            held = program.store.contents().numbers
            return bool({one for one in answered if one > since} & held)

        try:
            eventually(all_written, f"the {program} records in the end", PATIENCE_S * busy())
        except Failed as error:
            world.fail(str(error))
    try:
        # A GPU that was lost at the start is looked for once a minute.
        eventually(lambda: world.server.health().get("status") == "ok", "/healthz says ok in the end", 150)
    except Failed as error:
        answer = world.server.health()
        world.fail(f"{error}, but {answer.get('status')}: {answer.get('recording_problem')}")
    world.visitors.round()


def judge_processes(world: World) -> None:
    """Memory and descriptors are where they began."""
    for program in world.programs:
        before, pid = program.lives[-1].footprint, program.pid
        if before is None or not program.runs:
            continue

        def slim(program: Program = program, most: int = before.descriptors + MAY_OPEN) -> bool:
            if program.footprint().descriptors <= most:
                return True
            # Sessions that are over are forgotten when another begins.
            time.sleep(2)
            world.visitors.open_page("")
            return False

        try:
            eventually(slim, f"the {program} closes what it had opened", PATIENCE_S)
        except Failed as error:
            world.fail(f"{error}: more are {program.footprint().more_than(before)}")
        after = program.footprint()
        world.say(
            f"the {program} ({pid}): {before.memory_mib:.0f} -> {after.memory_mib:.0f} MiB, "
            f"{before.descriptors} -> {after.descriptors} descriptors"
        )
        if after.memory_mib > before.memory_mib + MAY_GROW_MIB[program.name]:
            world.fail(f"the {program} has grown from {before.memory_mib:.0f} to {after.memory_mib:.0f} MiB")


def end(world: World) -> None:
    """End both programs as systemd does."""
    for program in world.programs:
        if not program.runs:
            continue
        took = program.end(signal.SIGTERM, 60 * busy())
        if took is None or took > END_WITHIN_S * busy():
            world.fail(f"SIGTERM did not end the {program} in time ({took or 'never'})")
        elif not program.ended_well:
            world.fail(f"the {program} ended with status {program.status}")


def judge_readings(world: World, program: Program) -> None:
    """Every reading that the driver answered is in the database, or named as lost with its reason."""
    readings = world.read_by(program)
    labels = sorted({int(one.real_s) + late for one in readings for late in (-1, 0)})
    store, log = program.store, program.log.read_text(errors="replace")
    own = {one.number: one for one in readings}
    clock_was_set = any(event.name.startswith("clock") and event.program == program.name for event in world.events)
    books = Books(program, store.contents(labels), store.aside(labels), own, log, clock_was_set)
    if books.found.problem:
        world.fail(f"the database of the {program} cannot be read in the end: {books.found.problem}")
    store.look_after_graves()
    where: Counter[str] = Counter()
    missing: list[Reading] = []
    for reading in readings:
        place = _place(world, books, reading)
        where[place or "missing"] += 1
        if place is None:
            missing.append(reading)
    if where["with a fault of the driver"] and not LOST_GPU.search(log):
        world.fail(f"the {program} lost readings with the driver, and its log does not say so")
    counts = store.counts()
    for name in COUNTS:
        counts[name] = max(counts[name], sum(life.vitals.get(name) or 0 for life in program.lives))
    told = sum(int(one["many"]) for one in LOST.finditer(log)) + len(ONE_LOST.findall(log))
    lost = -(-len(missing) // len(UUIDS))
    world.say(
        f"the {program}: {len(readings)} readings, {dict(where)}; it counts {counts}, its log names {told} lost"
    )
    # Without a driver every tick fails, and nothing of it was answered.
    unanswered = sum(ended - began + AFTER_S for slot, began, ended in world.driver_faults if slot is None)
    named = told + counts["dropped"] + max(0, counts["failed"] - round(unanswered / INTERVAL_S))
    stretches = "".join(f"\n           {line}" for line in _stretches(world, missing))
    if missing and lost <= named:
        world.say(f"of the {program} {lost} ticks are missing, and {named} are named as lost{stretches}")
    if lost > named:
        written = set().union(*(grave.written() for grave in store.graves))
        ghosts = written & {one.number for one in missing}
        world.fail(
            f"{len(missing)} readings of the {program} are neither in its database nor named as lost"
            + (f"; {len(ghosts)} of them were written into a file that was gone" if ghosts else "")
            + stretches
        )


@dataclass(frozen=True, slots=True)
class Books:
    """Where a program's readings may be: its database as it is in the end, files that it set aside, and files that
    were lost; and its log. own: the readings by number."""

    program: Program
    found: Contents
    aside: list[Contents]
    own: dict[int, Reading]
    log: str
    clock_was_set: bool

    def is_set_aside(self, reading: Reading) -> bool:
        """Whether it went into a damaged file, where nobody can read it, before the damage was met and told of."""
        return bool(SET_ASIDE.search(self.log)) and any(
            grave.why == "damaged"
            and grave.replaced_at is not None
            and grave.lost_at - INTERVAL_S <= reading.monotonic_s <= grave.replaced_at
            for grave in self.program.store.graves
        )

    def is_merged(self, reading: Reading) -> bool:
        """Whether its second came twice: a clock was set back, or a tick was late and the next not. Then one row
        has the mean of both, by the time that each speaks of."""
        second = int(reading.real_s)
        # The time of a tick is taken before the GPU is asked; on a busy machine that is not only a moment, and the
        # clock may be set in between.
        most = 4 + MOST_SET_BACK_S if self.clock_was_set else 4
        keys = [(UUIDS[reading.gpu], second - early) for early in range(most)]
        lost = [grave.held for grave in self.program.store.graves]
        rows = [one.rows[key] for one in (self.found, *self.aside, *lost) for key in keys if key in one.rows]
        return any(self._is_mean(number, recorded_ms, reading) for number, recorded_ms in rows)

    def _is_mean(self, number: int, recorded_ms: int, reading: Reading) -> bool:
        """Whether the number of a row is the mean of several readings, this one among them."""
        one = self.own.get(number)
        if one is None or one.gpu != reading.gpu:
            return True
        # By chance, or where nearly all of it is one of them, a mean is the number of a reading.
        if self.clock_was_set and recorded_ms > 1500 * INTERVAL_S:
            return True
        return one is not reading and abs(one.real_s - reading.real_s) < 0.9 * INTERVAL_S


def _place(world: World, books: Books, reading: Reading) -> str | None:
    """Where a reading is, or why it is nowhere; None where nobody can tell."""
    if reading.number in books.found.numbers:
        return "in the database"
    for grave in books.program.store.graves:
        if reading.number in grave.held.numbers:
            return f"in a file that was {grave.why}"
    if any(reading.number in one.numbers for one in books.aside) or books.is_set_aside(reading):
        return "in a file that was set aside"
    if any(reading.number in life.lost_by_kill for life in books.program.lives):
        return "lost by SIGKILL"
    if any(
        slot in (None, reading.gpu) and began - BEFORE_S <= reading.monotonic_s <= ended + AFTER_S
        for slot, began, ended in world.driver_faults
    ):
        return "with a fault of the driver"
    return "merged with a reading of the same second" if books.is_merged(reading) else None


def _stretches(world: World, missing: list[Reading]) -> list[str]:
    """Where the missing readings are, and what went on then."""
    lines: list[str] = []
    run: list[Reading] = []
    for reading in [*missing, None]:
        if run and (reading is None or reading.monotonic_s - run[-1].monotonic_s > 3):
            begin, end_ = (one.monotonic_s - world.began for one in (run[0], run[-1]))
            near = [
                str(event)
                for event in world.events
                if event.began <= end_ + 2 and (event.ended is None or event.ended >= begin - 5)
            ]
            lines.append(f"{len(run)} from {begin:.1f} to {end_:.1f} s, near {', '.join(near) or 'nothing'}")
            run = []
        if reading is not None:
            run.append(reading)
    return lines[:12]


def judge_logs(world: World) -> None:
    """Logs are short, and without a traceback of gpumon's. Of what the web server's libraries make of nonsense
    there may be one now and then."""
    for program in world.programs:
        lines = program.log.read_text(errors="replace").splitlines()
        world.say(f"the log of the {program} has {len(lines)} lines")
        if len(lines) >= MOST_LINES:
            kinds = Counter(re.sub(r"\d+", "#", line[20:100]) for line in lines)
            commonest = ", ".join(f"{count} x {line!r}" for line, count in kinds.most_common(3))
            world.fail(f"the log of the {program} has {len(lines)} lines: {commonest}")
        for trace, times in traces(lines).items():
            if OWN_FRAME.search(trace) or times > 1 + world.now / 60:
                last = trace.strip().splitlines()[-1].strip()
                world.fail(f"the log of the {program} has a traceback, {times} times: {last}")


def traces(lines: list[str]) -> Counter[str]:
    """The tracebacks in a log, and how often each is there."""
    found: Counter[str] = Counter()
    trace: list[str] = []
    for line in [*lines, ""]:
        # It goes on in lines that are set in, and the error is the last of them, or stands at the margin.
        if trace and not line.startswith(" "):
            trace += [] if line[:1].isdigit() else [line]
            found["\n".join(trace)] += 1
            trace = []
        if trace or line.startswith("Traceback"):
            trace.append(line)
    return found


def judge_secrets(world: World) -> None:
    """Nothing that was planted is in an answer, a database or a log."""
    leaks = list(world.visitors.leaks)
    for program in world.programs:
        log = f"the log of the {program}", program.log.read_bytes()
        for name, content in (log, *program.store.texts()):
            leaks += [f"a secret from {place} is in {name}" for place in world.secrets.seen_in(content)]
    for leak in dict.fromkeys(leaks):
        world.fail(leak)


def judge(world: World) -> None:
    """All of it."""
    settle(world)
    world.say("all is over, and both record")
    judge_processes(world)
    end(world)
    for program in world.programs:
        judge_readings(world, program)
    judge_logs(world)
    judge_secrets(world)
