"""Lets troubles begin and end. What lasts is counted in ticks, so that a busy machine only takes longer."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from .programs import PATIENCE_S, Failed, Program, busy, eventually
from .troubles import TABLE, Trouble, wait_ticks
from .world import Event, World

# How many troubles there are at a time at the most.
AT_ONCE = 3


@dataclass(slots=True)
class Active:
    """A trouble that is there now. `due` is how many ticks each program is to have taken when it ends."""

    trouble: Trouble
    program: Program
    going: Iterator[None]
    event: Event
    ticks: int
    began: float = field(default_factory=time.monotonic)
    due: dict[str, tuple[int, int]] = field(default_factory=dict)


class Director:
    """One run."""

    def __init__(self, world: World, troubles: tuple[Trouble, ...]) -> None:
        self.world, self._troubles = world, troubles
        self._active: list[Active] = []

    def begin(self) -> None:
        """Start both programs, and wait until they record and everything has been asked for once."""
        for program in self.world.programs:
            program.start()
        for program in self.world.programs:
            self._warm_up(program)

    def _warm_up(self, program: Program) -> None:
        """Wait until a new life records as usual, and note what it takes then."""
        wait_ticks(self.world, program, 3)
        if program is self.world.server:
            self.world.visitors.round()
            self.world.server.get("/api/v1/history?range=1d&points=10000", PATIENCE_S)
        program.lives[-1].footprint = program.footprint()

    def once_each(self, spare: int) -> Iterator[tuple[Trouble, Program]]:
        """Every trouble once, in a random order, and some of them again."""
        rng = self.world.rng
        again = rng.choices(self._troubles, [one.weight for one in self._troubles], k=spare) if spare else []
        chosen = [*self._troubles, *again]
        rng.shuffle(chosen)
        for trouble in chosen:
            yield trouble, self._befalls(trouble)

    def until(self, minutes: float) -> Iterator[tuple[Trouble, Program]]:
        """Troubles by their weights, until so much time has passed."""
        weights = [one.weight or 1 for one in self._troubles]
        while self.world.now < 60 * minutes:
            trouble = self.world.rng.choices(self._troubles, weights)[0]
            yield trouble, self._befalls(trouble)

    def _befalls(self, trouble: Trouble) -> Program:
        if trouble.only is not None:
            return next(one for one in self.world.programs if one.name == trouble.only)
        return self.world.rng.choice(self.world.programs)

    def run(self, schedule: Iterator[tuple[Trouble, Program]]) -> None:
        """Work through the schedule."""
        for trouble, program in schedule:
            # Now and then several at once.
            most = self.world.rng.choice((1, 2, AT_ONCE))
            while len(self._active) >= most or any(self._conflicts(one, trouble, program) for one in self._active):
                self._pass_time()
            self._let_begin(trouble, program)
        while self._active:
            self._pass_time()

    @staticmethod
    def _conflicts(one: Active, trouble: Trouble, program: Program) -> bool:
        if not (one.program is program or one.trouble.shared or trouble.shared):
            return False
        # While a process comes and goes nobody can judge the others that it has to bear.
        kinds = {one.trouble.takes, trouble.takes}
        restarts = "process" in kinds or trouble.restarts or one.trouble.restarts
        return len(kinds) == 1 or (restarts and bool(kinds & {"limits", "clock", "store"}))

    def _let_begin(self, trouble: Trouble, program: Program) -> None:
        world = self.world
        befallen = "both" if trouble.shared else program.name
        event = Event(trouble.name, befallen, world.now)
        going = trouble.begin(world, program)
        if trouble.takes == "clock" and not world.offsets:
            return
        lives = len(program.lives)
        try:
            next(going)
        except Failed as error:
            world.fail(f"{trouble.name}: {error}")
        except OSError as error:
            world.say(f"{trouble.name} cannot be made here: {error}")
            return
        world.events.append(event)
        world.say(f"{trouble.name} ({befallen})")
        self._active.append(Active(trouble, program, going, event, world.rng.randrange(2, 5)))
        if len(program.lives) > lives:
            self._watch_start(program)

    def _watch_start(self, program: Program) -> None:
        try:
            self._warm_up(program)
        except Failed as error:
            self.world.fail(f"the {program} was started and does not record: {error}")
            program.stuck = True

    def _pass_time(self) -> None:
        """Look at what goes on, and end what has lasted long enough."""
        time.sleep(0.1)
        for active in list(self._active):
            if self._has_lasted(active):
                self._let_end(active)
        for program in self.world.programs:
            if not program.runs:
                self.world.fail(f"the {program} ended by itself, with status {program.status}")
                program.lives[-1].ended = time.monotonic()
                program.start()
                self._watch_start(program)

    def _has_lasted(self, active: Active) -> bool:
        """Whether every program that should have taken its ticks meanwhile has done so; one that does not is told
        of, and waited for no longer."""
        expected = [
            one
            for one in self.world.programs
            if one.ticks_expected
            and (active.trouble.goes_on or not (active.trouble.shared or one is active.program))
            and not any(other.trouble.takes == "driver" and not other.trouble.goes_on for other in self._active)
        ]
        missing = []
        for one in expected:
            pid, due = active.due.setdefault(one.name, (one.pid, self.world.ticks_of(one) + active.ticks))
            if pid != one.pid:
                active.due.pop(one.name)
                missing.append(one)
            elif self.world.ticks_of(one) < due:
                missing.append(one)
        lasted_s = time.monotonic() - active.began
        if not missing:
            return lasted_s >= active.ticks
        if lasted_s < PATIENCE_S:
            return False
        for one in missing:
            if self.world.age_s(one) > PATIENCE_S / 2:
                self.world.fail(f"the {one} takes no ticks during {active.event}")
                one.stuck = True
        return True

    def _let_end(self, active: Active) -> None:
        self._active.remove(active)
        lives = len(active.program.lives)
        try:
            next(active.going, None)
        except Failed as error:
            self.world.fail(f"after {active.event}: {error}")
        active.event.ended = self.world.now
        befallen = self.world.programs if active.trouble.shared else (active.program,)
        if len(active.program.lives) > lives:
            self._watch_start(active.program)
        for program in befallen:
            if program.stuck or active.trouble.takes == "store":
                self._recovers(program, active.event)

    def _recovers(self, program: Program, after: Event) -> None:
        """Wait until what the driver answers from now on is in the file; else say so and start it anew."""
        since = len(self.world.readings.all())

        def written() -> bool:
            numbers = {reading.number for reading in self.world.read_by(program, since)}
            return bool(numbers & program.store.contents().numbers)

        if any(one.trouble.takes in ("store", "process") and one.program is program for one in self._active):
            return
        try:
            eventually(written, f"what the {program} reads is in its database", PATIENCE_S)
        except Failed as error:
            problem = program.store.contents().problem
            self.world.fail(f"after {after}: {error}{f' ({problem})' if problem else ''}")
            self.revive(program)
            return
        program.stuck = False

    def revive(self, program: Program) -> None:
        """Start a program that does not record any more, so that the run can go on."""
        took = program.end(signal.SIGTERM, 30 * busy())
        if took is None:
            self.world.fail(f"SIGTERM did not end the {program} that was stuck: it had to be killed")
        program.start()
        self._watch_start(program)


def chosen(kind: str, names: str | None, without: str | None = None) -> tuple[Trouble, ...]:
    """The troubles of these names (a comma between two), or all that this kind of database can have. Raises
    ValueError."""
    possible = [one for one in TABLE if one.on in ("", kind)]
    known = {one.name for one in possible}
    wanted = names.split(",") if names else [one.name for one in possible if one.weight]
    unwanted = without.split(",") if without else []
    for name in itertools.chain(wanted, unwanted):
        if name not in known:
            raise ValueError(f"there is no trouble {name!r} on {kind}, but {', '.join(sorted(known))}")
    return tuple(one for one in possible if one.name in wanted and one.name not in unwanted)
